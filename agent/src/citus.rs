//! Citus.
pub mod flight;
pub mod plan;
pub mod seen;

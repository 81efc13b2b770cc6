//! One agent runs on each database host. It keeps the local PostgreSQL server in the role that the
//! store gives it, and takes part in deciding who leads.
//!
//! A pure core decides ([`ha::decide`]), a thin shell acts ([`driver`](crate)). The page to read
//! first is ARCHITECTURE.md, "A failover, told once".

pub mod api;
pub mod clock;
pub mod failsafe;
pub mod guard;
pub mod ha;
pub mod lease;
pub mod metrics;
pub mod node;
pub mod peers;
pub mod postgres;
pub mod publish;

//! When clients wait before a transaction: for a planned switchover, for a group without a primary,
//! for a standby. The decisions are pure; only [`gate`] has anything that waits.
//!
//! Not here: the task that feeds the decisions with facts ([`crate::background::handover`]).

pub mod gate;
pub mod hold;
pub mod holding;
pub mod outage;
pub mod read_source;

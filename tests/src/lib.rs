//! The common parts of the tests: real processes to run against, and the load that measures them.
//!
//! The tests themselves are in `tests/tests`; each file is one question about the whole. Nothing
//! here decides anything about a cluster: it starts what a user would start, and looks at it the
//! way a user would. A helper that cannot do its work panics and says how far it got, for its only
//! callers are tests.

#![expect(clippy::panic, reason = "a test ends in a panic, and these are its hands")]

pub mod clients;
pub mod differential;
pub mod load;
pub mod run;
pub mod sim;
pub mod talk;
pub mod torture;

//! What the tests share: real processes to run against, and the load that measures them.
//!
//! The tests themselves are in `tests/tests`; each file is one question about the whole. Nothing
//! here decides anything about a cluster: it starts what a user would start, and looks at it the
//! way a user would.

pub mod run;

//! The proxy's knowledge of its cluster's servers: which one accepts writes, which ones a listener's
//! clients may get, and how a server is asked for its state.
//!
//! Not here: the tasks that keep this knowledge current ([`crate::background`]).

pub mod probe;
pub mod route;
pub mod standing;

//! The path of a client: accepted ([`serve`]), logged in ([`login`]), then forwarded ([`forward`]) and
//! moved between servers ([`client`]) until the client ends. Cancel requests take a path of their own
//! ([`cancel`]).
//!
//! Not here: what messages mean ([`crate::session`]), and who gets a shared server connection
//! ([`crate::pool`]).

pub mod cancel;
pub mod client;
pub mod forward;
pub mod login;
pub mod pool_keeper;
pub mod serve;

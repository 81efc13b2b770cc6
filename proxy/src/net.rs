//! Bytes to and from other machines: streams, TLS, connections to PostgreSQL servers.
//!
//! Not here: which server a session gets ([`crate::cluster`]), and the state of a proxy
//! ([`crate::shared`]). This is the lowest of the groups of modules.

pub mod backend;
pub mod cancel_target;
pub mod descriptors;
pub mod proxy_protocol;
pub mod stream;
pub mod tls;

//! Admission of clients: the rules of the proxy's file, limits of connections, and what PostgreSQL's
//! catalog says of a role's password and rights.
//!
//! Not here: the dialogue of a login ([`crate::clients::login`]).

pub mod access;
pub mod buckets;
pub mod doors;
pub mod identity;
pub mod lanes;
pub mod rules;
pub mod verifiers;

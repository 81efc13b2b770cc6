//! Tasks of a proxy that no client started: following the cluster, proving who accepts writes,
//! obeying switchovers, reloading certificates.
//!
//! Not here: sessions ([`crate::clients`]). Tasks reach sessions through [`crate::shared`] and
//! [`crate::registry`] only.

pub mod beforehand;
pub mod certificates;
pub mod handover;
pub mod known;
pub mod primary_watch;
pub mod prover;
pub mod sampler;
pub mod topology;

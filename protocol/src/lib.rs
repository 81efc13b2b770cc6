//! PostgreSQL's wire format and its handshakes, as values. No I/O, no clock, no cluster.
//!
//! # Phases of a connection
//!
//! ```text
//! opened ── SSLRequest, GSSENCRequest (one byte answers), or TLS at once ──► opened
//!   │  [startup]
//!   ├── CancelRequest ──► closed
//!   ▼
//! startup message ── NegotiateProtocolVersion if it asks for more than is served
//!   │  [startup]
//!   ▼
//! authentication: [auth] steps, whole frames ([frame::take_frame])
//!   ▼
//! ready: ParameterStatus*, BackendKeyData, ReadyForQuery
//!   ▼
//! requests and answers: heads only ([frame::Scanner]), counted by [pipeline]
//! ```
//!
//! # Versions
//!
//! Protocol 3.0 and 3.2 are served; a newer minor version, the grease of libpq 19 (3.9999) and
//! unknown `_pq_.` options are negotiated down. Version 2 and GSSAPI encryption are refused.
//!
//! # Whom to trust
//!
//! Nobody: every parser here takes the bytes of a peer that may be hostile, checks each length
//! against [limits] before it reserves anything, never panics, and brings its own `fuzz_*` entry,
//! a plain function over bytes that a property test and a fuzzer share.
//!
//! The protocol is in chapter 55 of the manual, `/docs/current/protocol.html`.

pub mod auth;
pub mod backend;
pub mod copy;
pub mod error;
pub mod frame;
pub mod frontend;
pub mod fuzz;
pub mod limits;
pub mod params;
pub mod pipeline;
pub mod sqlstate;
pub mod startup;
pub mod txn;
mod wire;

pub use wire::{DecodeError, EncodeError};

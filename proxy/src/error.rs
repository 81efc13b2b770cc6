//! Why a proxy does not start, or stops.

use std::io;

use kornak_config::Listen;

use crate::net::tls::TlsError;

/// A proxy did not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// An address is taken or does not exist.
    #[error("listen on {listen} for `{name}`")]
    Listen {
        /// The listener's name, or `status`.
        name: String,
        listen: Listen,
        #[source]
        source: io::Error,
    },
    /// The settings name a store and none was given.
    #[error("the settings name a store, and there is none")]
    NoStore,
    /// Certificates.
    #[error("set up TLS")]
    Tls(#[from] TlsError),
    /// No thread.
    #[error("start a thread")]
    Thread(#[source] io::Error),
}

/// A proxy ended otherwise than by being told to.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// The proxy did not start.
    #[error("start the proxy")]
    Start(#[from] StartError),
    /// A thread ended by itself.
    #[error("a serving thread ended unexpectedly")]
    ThreadEnded,
}

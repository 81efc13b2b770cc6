//! Certificates: whom a connection trusts, and what it shows of itself. Every TLS connection that an
//! agent, a proxy or the command makes or accepts gets its rustls configuration here.
//!
//! The judges that users know are libpq, curl and Python, which are all OpenSSL with different
//! settings ([`Rules`]). A certificate has to satisfy [`chain`], our reading of OpenSSL's rules, and
//! webpki, unless webpki refuses it for a form that OpenSSL takes (version 1, a server's certificate
//! that is its own authority): then `chain` judges alone and knows no mercy.
//!
//! Not here: sockets, and what a protocol does before its handshake.

pub mod chain;
mod files;
pub mod names;
mod signature;
mod verify;

use std::path::PathBuf;
use std::sync::Arc;

use rustls::client::danger::ServerCertVerifier;
use rustls::crypto::CryptoProvider;
use rustls::server::danger::ClientCertVerifier;
use rustls::sign::{CertifiedKey, SingleCertAndKey};
use rustls::{ClientConfig, ServerConfig};

pub use chain::Rules;
pub use files::{certified, revoked_in};
pub use verify::{Authorities, OfClients, OfServers};

/// Why certificates or keys cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    #[error("read the PEM file {}", .path.display())]
    File {
        path: PathBuf,
        #[source]
        source: rustls::pki_types::pem::Error,
    },
    #[error("{} holds no certificate", .0.display())]
    NoCertificate(PathBuf),
    #[error("the certificate in {} cannot be parsed", .path.display())]
    Malformed {
        path: PathBuf,
        #[source]
        source: names::NoCertificate,
    },
    #[error("the list of revoked certificates in {} cannot be parsed", .0.display())]
    MalformedList(PathBuf),
    #[error("decrypt the key in {}: is keyfile_password (of a role: sslpassword) right, and the key PKCS#8?", .0.display())]
    Decrypt(PathBuf),
    #[error(
        "the key in {} is encrypted in OpenSSL's old form: write it anew with `openssl pkcs8 -topk8`",
        .0.display()
    )]
    OldEncryption(PathBuf),
    #[error(
        "the key in {} is encrypted, and keyfile_password is not set (of a role: sslpassword); a proxy's has to be without, as `openssl pkey` writes it",
        .0.display()
    )]
    NoPassword(PathBuf),
    #[error("the key in {} does not belong to the certificate in {}", .key.display(), .cert.display())]
    OtherKey { cert: PathBuf, key: PathBuf },
    #[error("use the certificates")]
    Use(#[from] rustls::Error),
    #[error(
        "sslmode asks for a certificate that can be verified: a file has to name authorities (sslrootcert; a proxy's tls.server.ca)"
    )]
    NoAuthorities,
}

/// The one implementation of cryptography.
pub fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::aws_lc_rs::default_provider())
}

/// A client that judges servers by `verifier` and shows `own` when it is asked.
///
/// # Errors
/// The provider has no protocol version in common with rustls.
pub fn client_config(
    verifier: Arc<dyn ServerCertVerifier>,
    own: Option<CertifiedKey>,
) -> Result<ClientConfig, TlsError> {
    let builder =
        ClientConfig::builder_with_provider(provider()).with_safe_default_protocol_versions()?;
    let builder = builder.dangerous().with_custom_certificate_verifier(verifier);
    // rustls's own way to a client's certificate refuses those of version 1.
    Ok(match own {
        Some(own) => builder.with_client_cert_resolver(Arc::new(SingleCertAndKey::from(own))),
        None => builder.with_no_client_auth(),
    })
}

/// A server that shows `own`, and asks clients for certificates if there is a `verifier`.
///
/// # Errors
/// The provider has no protocol version in common with rustls.
pub fn server_config(
    verifier: Option<Arc<dyn ClientCertVerifier>>,
    own: CertifiedKey,
) -> Result<ServerConfig, TlsError> {
    let builder =
        ServerConfig::builder_with_provider(provider()).with_safe_default_protocol_versions()?;
    let builder = match verifier {
        Some(verifier) => builder.with_client_cert_verifier(verifier),
        None => builder.with_no_client_auth(),
    };
    Ok(builder.with_cert_resolver(Arc::new(SingleCertAndKey::from(own))))
}

//! TLS on both legs, by rustls.
//!
//! Towards servers with libpq's `sslmode` (`/docs/current/libpq-ssl.html`). Not here: SCRAM channel
//! binding, which needs the certificate's hash on the leg it binds.

use std::path::Path;
use std::sync::Arc;

use bytes::BytesMut;
use kornak_config::proxy::{ClientTls, ServerSideTls, SslMode};
use kornak_protocol::startup::put_ssl_request;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{WebPkiServerVerifier, verify_server_name};
use rustls::crypto::CryptoProvider;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::server::{ParsedCertificate, WebPkiClientVerifier};
use rustls::{ClientConfig, DigitallySignedStruct, RootCertStore, ServerConfig, SignatureScheme};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_rustls::{TlsAcceptor, TlsConnector, TlsStream};

use crate::backend::DialError;
use crate::stream::Stream;

/// What PostgreSQL calls itself in ALPN.
const ALPN: &[u8] = b"postgresql";

/// Why certificates or keys cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// A PEM file cannot be read.
    #[error("read {path}: {what}")]
    File { path: String, what: String },
    /// What is in it will not do.
    #[error("use the certificates")]
    Use(#[from] rustls::Error),
    /// The authorities will not do.
    #[error("use the certificate authorities: {what}")]
    Authorities { what: String },
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::aws_lc_rs::default_provider())
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let read = CertificateDer::pem_file_iter(path).and_then(Iterator::collect);
    read.map_err(|error| file_error(path, &error.to_string()))
}

fn file_error(path: &Path, what: &str) -> TlsError {
    TlsError::File { path: path.display().to_string(), what: what.to_owned() }
}

fn key(path: &Path) -> Result<PrivateKeyDer<'static>, TlsError> {
    PrivateKeyDer::from_pem_file(path).map_err(|error| file_error(path, &error.to_string()))
}

fn authorities(path: &Path) -> Result<Arc<RootCertStore>, TlsError> {
    let mut store = RootCertStore::empty();
    for certificate in certificates(path)? {
        store.add(certificate)?;
    }
    Ok(Arc::new(store))
}

/// Accepts TLS of clients, if there is a certificate.
pub fn acceptor(settings: &ClientTls) -> Result<Option<TlsAcceptor>, TlsError> {
    let (Some(cert), Some(key_file)) = (&settings.cert, &settings.key) else { return Ok(None) };
    let builder =
        ServerConfig::builder_with_provider(provider()).with_safe_default_protocol_versions()?;
    let builder = match &settings.ca {
        Some(ca) => {
            let verifier =
                WebPkiClientVerifier::builder_with_provider(authorities(ca)?, provider())
                    .allow_unauthenticated()
                    .build()
                    .map_err(|error| TlsError::Authorities { what: error.to_string() })?;
            builder.with_client_cert_verifier(verifier)
        }
        None => builder.with_no_client_auth(),
    };
    let mut config = builder.with_single_cert(certificates(cert)?, key(key_file)?)?;
    config.alpn_protocols = vec![ALPN.to_vec()];
    Ok(Some(TlsAcceptor::from(Arc::new(config))))
}

/// How server connections are encrypted.
#[derive(Clone)]
pub struct ServerTls {
    mode: SslMode,
    connector: TlsConnector,
}

impl std::fmt::Debug for ServerTls {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ServerTls").field("mode", &self.mode).finish_non_exhaustive()
    }
}

impl ServerTls {
    /// Reads what the settings name.
    pub fn new(settings: &ServerSideTls) -> Result<Self, TlsError> {
        let builder = ClientConfig::builder_with_provider(provider())
            .with_safe_default_protocol_versions()?;
        let verifier = Arc::new(Verifier::new(settings)?);
        let builder = builder.dangerous().with_custom_certificate_verifier(verifier);
        let mut config = match (&settings.cert, &settings.key) {
            (Some(cert), Some(key_file)) => {
                builder.with_client_auth_cert(certificates(cert)?, key(key_file)?)?
            }
            _ => builder.with_no_client_auth(),
        };
        config.alpn_protocols = vec![ALPN.to_vec()];
        Ok(Self { mode: settings.sslmode, connector: TlsConnector::from(Arc::new(config)) })
    }

    /// Asks the server for TLS, as `sslmode` says.
    pub async fn encrypt(&self, mut tcp: TcpStream, host: &str) -> Result<Stream, DialError> {
        if self.mode == SslMode::Disable {
            return Ok(Stream::Plain(tcp));
        }
        let mut request = BytesMut::new();
        put_ssl_request(&mut request);
        tcp.write_all(&request).await?;
        match tcp.read_u8().await? {
            b'S' => {}
            b'N' if self.mode == SslMode::Prefer => return Ok(Stream::Plain(tcp)),
            b'N' => return Err(DialError::Tls { what: "server has no TLS".to_owned() }),
            other => {
                let what = format!("unexpected answer {}", other.escape_ascii());
                return Err(DialError::Tls { what });
            }
        }
        let name = ServerName::try_from(host.to_owned())
            .map_err(|error| DialError::Tls { what: error.to_string() })?;
        let tls = self.connector.connect(name, tcp).await;
        let tls = tls.map_err(|error| DialError::Tls { what: error.to_string() })?;
        Ok(Stream::Tls(Box::new(TlsStream::Client(tls))))
    }
}

/// libpq's rules: without a CA file any certificate will do, `verify-ca` looks at the chain,
/// `verify-full` at the name as well.
#[derive(Debug)]
struct Verifier {
    chain: Option<Arc<WebPkiServerVerifier>>,
    name: bool,
    provider: Arc<CryptoProvider>,
}

impl Verifier {
    fn new(settings: &ServerSideTls) -> Result<Self, TlsError> {
        let provider = provider();
        let verified = matches!(settings.sslmode, SslMode::VerifyCa | SslMode::VerifyFull);
        let chain = match &settings.ca {
            Some(ca) if verified => Some(
                WebPkiServerVerifier::builder_with_provider(
                    authorities(ca)?,
                    Arc::clone(&provider),
                )
                .build()
                .map_err(|error| TlsError::Authorities { what: error.to_string() })?,
            ),
            None if verified => {
                let what = "sslmode asks for verification and there is no ca file".to_owned();
                return Err(TlsError::Authorities { what });
            }
            _ => None,
        };
        Ok(Self { chain, name: settings.sslmode == SslMode::VerifyFull, provider })
    }
}

impl ServerCertVerifier for Verifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let Some(chain) = &self.chain else { return Ok(ServerCertVerified::assertion()) };
        match chain.verify_server_cert(end_entity, intermediates, server_name, ocsp, now) {
            Ok(verified) => Ok(verified),
            Err(rustls::Error::InvalidCertificate(
                rustls::CertificateError::NotValidForName
                | rustls::CertificateError::NotValidForNameContext { .. },
            )) if !self.name => Ok(ServerCertVerified::assertion()),
            Err(error) => Err(error),
        }?;
        if self.name {
            verify_server_name(&ParsedCertificate::try_from(end_entity)?, server_name)?;
        }
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        rustls::crypto::verify_tls12_signature(message, cert, dss, algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        rustls::crypto::verify_tls13_signature(message, cert, dss, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}

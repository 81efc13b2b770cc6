//! TLS on both legs, by rustls.
//!
//! Towards servers libpq's `sslmode` ladder (`/docs/current/libpq-ssl.html`), towards clients what
//! PostgreSQL does with `ssl = on`. Either side's files can be read again while it runs. Sessions are
//! never resumed, as PostgreSQL resumes none: what a certificate is trusted for is decided anew each
//! time.

mod binding;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use arc_swap::ArcSwap;
use bytes::BytesMut;
use kornak_config::proxy::{ClientTls, ProxyTls, ServerSideTls, SslMode, StatusTls};
use kornak_protocol::auth::Binding;
use kornak_protocol::startup::put_ssl_request;
use kornak_tls::{Authorities, OfClients, OfServers, Rules, certified, revoked_in};
use rustls::ClientConfig;
use rustls::client::Resumption;
use rustls::pki_types::ServerName;
use rustls::server::NoServerSessionStorage;
use rustls::server::danger::ClientCertVerifier;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_rustls::{TlsAcceptor, TlsConnector, TlsStream};

use crate::net::backend::DialError;
use crate::net::stream::Stream;
pub use kornak_tls::{TlsError, names};

/// PostgreSQL's name in ALPN.
pub const ALPN: &[u8] = b"postgresql";

fn authorities(ca: &Path, crl: Option<&PathBuf>) -> Result<Authorities, TlsError> {
    let lists = crl.map_or(Ok(Vec::new()), |crl| revoked_in(crl))?;
    Ok(Authorities::of_file(ca)?.revoking(lists))
}

/// Accepts TLS of clients with the certificate that is in force.
pub struct ClientSide {
    current: ArcSwap<Accepting>,
}

impl std::fmt::Debug for ClientSide {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("ClientSide")
    }
}

struct Accepting {
    /// `None`: clients are served in the clear.
    acceptor: Option<TlsAcceptor>,
    binding: Binding,
    required: bool,
}

/// A client under TLS.
#[derive(Debug)]
pub struct Accepted {
    pub stream: Stream,
    /// The data that SCRAM binds to.
    pub binding: Binding,
    /// The client has agreed on PostgreSQL's protocol, as direct TLS demands.
    pub has_alpn: bool,
}

impl ClientSide {
    /// Reads what the settings name; without a certificate there is no TLS.
    pub fn new(settings: &ClientTls) -> Result<Self, TlsError> {
        Ok(Self { current: ArcSwap::from_pointee(accepting(settings)?) })
    }

    /// Reads the files again. On an error what was in force stays so.
    pub fn reload(&self, settings: &ClientTls) -> Result<(), TlsError> {
        self.current.store(Arc::new(accepting(settings)?));
        Ok(())
    }

    /// Whether there is a certificate to show.
    pub fn is_on(&self) -> bool {
        self.current.load().acceptor.is_some()
    }

    /// Whether clients in the clear are refused.
    pub fn is_required(&self) -> bool {
        self.current.load().required
    }

    /// The handshake; `None` if it fails or there is no certificate.
    pub async fn accept(&self, tcp: TcpStream) -> Option<Accepted> {
        let current = self.current.load_full();
        match current.acceptor.as_ref()?.accept(tcp).await {
            Ok(tls) => {
                let has_alpn = tls.get_ref().1.alpn_protocol() == Some(ALPN);
                let stream = Stream::Tls(Box::new(TlsStream::Server(tls)));
                Some(Accepted { stream, binding: current.binding.clone(), has_alpn })
            }
            Err(error) => {
                tracing::info!(
                    error = &error as &dyn std::error::Error,
                    "TLS handshake of a client failed"
                );
                None
            }
        }
    }
}

fn accepting(settings: &ClientTls) -> Result<Accepting, TlsError> {
    let required = settings.required;
    let (Some(cert), Some(key)) = (&settings.cert, &settings.key) else {
        return Ok(Accepting { acceptor: None, binding: Binding::None, required });
    };
    let certified = certified(cert, key, None)?;
    let binding = certified.cert.first().map_or(Binding::None, |own| binding::of_certificate(own));
    let verifier = match &settings.ca {
        Some(ca) => {
            let authorities = authorities(ca, settings.crl.as_ref())?;
            let verifier = OfClients::new(authorities, Rules::Libpq, false);
            Some(Arc::new(verifier) as Arc<dyn ClientCertVerifier>)
        }
        None => None,
    };
    let mut config = kornak_tls::server_config(verifier, certified)?;
    config.alpn_protocols = vec![ALPN.to_vec()];
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    let acceptor = Some(TlsAcceptor::from(Arc::new(config)));
    Ok(Accepting { acceptor, binding, required })
}

/// The certificate of the status page.
///
/// # Errors
/// A file cannot be read or used.
pub fn of_status(settings: &StatusTls) -> Result<TlsAcceptor, TlsError> {
    let certified = certified(&settings.certfile, &settings.keyfile, None)?;
    let mut config = kornak_tls::server_config(None, certified)?;
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(TlsAcceptor::from(Arc::new(config)))
}

/// One rung of libpq's ladder.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Attempt {
    /// In the clear.
    Plain,
    /// Under TLS, or in the clear if the server has none.
    IfOffered,
    /// Under TLS.
    Tls,
}

/// How server connections are encrypted.
#[derive(Debug)]
pub struct ServerTls {
    current: ArcSwap<Connecting>,
}

#[derive(Debug)]
struct Connecting {
    mode: SslMode,
    /// There are authorities that a certificate must be of.
    verifies: bool,
    config: Arc<ClientConfig>,
}

impl ServerTls {
    /// Reads what the settings name.
    pub fn new(settings: &ServerSideTls) -> Result<Self, TlsError> {
        Ok(Self { current: ArcSwap::from_pointee(connecting(settings)?) })
    }

    /// Reads the files again. On an error what was in force stays so.
    pub fn reload(&self, settings: &ServerSideTls) -> Result<(), TlsError> {
        self.current.store(Arc::new(connecting(settings)?));
        Ok(())
    }

    /// The encryptions to try, in this order, while the server refuses for a reason that another encryption
    /// may mend.
    pub fn attempts(&self) -> &'static [Attempt] {
        match self.current.load().mode {
            SslMode::Disable => &[Attempt::Plain],
            SslMode::Allow => &[Attempt::Plain, Attempt::Tls],
            SslMode::Prefer => &[Attempt::IfOffered, Attempt::Plain],
            SslMode::Require | SslMode::VerifyCa | SslMode::VerifyFull => &[Attempt::Tls],
        }
    }

    /// Whether a server under TLS is one whose certificate an authority of the operator's has signed.
    pub fn verifies(&self) -> bool {
        self.current.load().verifies
    }

    /// Encrypts a fresh connection to `host`.
    pub async fn encrypt(
        &self,
        mut tcp: TcpStream,
        host: &str,
        attempt: Attempt,
    ) -> Result<Stream, DialError> {
        if attempt == Attempt::Plain {
            return Ok(Stream::Plain(tcp));
        }
        let mut request = BytesMut::new();
        put_ssl_request(&mut request);
        tcp.write_all(&request).await?;
        // One byte and no more: what follows it must come through TLS (CVE-2021-23222).
        match tcp.read_u8().await? {
            b'S' => {}
            b'N' if attempt == Attempt::IfOffered => return Ok(Stream::Plain(tcp)),
            b'N' => return Err(tls_error(&"the server has no TLS")),
            other => {
                let answer = other.escape_ascii();
                return Err(tls_error(&format!(
                    "unexpected answer {answer} to the request for TLS"
                )));
            }
        }
        let current = self.current.load_full();
        let name = match ServerName::try_from(host.to_owned()) {
            Ok(name) => name,
            Err(error) if current.mode == SslMode::VerifyFull => return Err(tls_error(&error)),
            // Nobody looks at it.
            Err(_) => ServerName::IpAddress(std::net::Ipv4Addr::UNSPECIFIED.into()),
        };
        let connector = TlsConnector::from(Arc::clone(&current.config));
        let tls = connector.connect(name, tcp).await;
        let tls = tls.map_err(|error| tls_error(&explain(&error)))?;
        Ok(Stream::Tls(Box::new(TlsStream::Client(tls))))
    }
}

fn tls_error(what: &dyn std::fmt::Display) -> DialError {
    DialError::Tls { what: what.to_string() }
}

/// Puts what a person can do about it behind rustls's words.
fn explain(error: &std::io::Error) -> String {
    let text = error.to_string();
    let hint = if text.contains("NotValidForName") {
        "the certificate is for another host; sslmode verify-ca does not look at the name"
    } else if text.contains("UnknownIssuer") || text.contains("no chain leads") {
        "the certificate was not issued by an authority of tls.server.ca"
    } else if text.contains("Expired") || text.contains("NotValidYet") {
        "look at the certificate's dates and at this host's clock"
    } else {
        return text;
    };
    format!("{text} ({hint})")
}

fn connecting(settings: &ServerSideTls) -> Result<Connecting, TlsError> {
    let verifies = matches!(settings.sslmode, SslMode::VerifyCa | SslMode::VerifyFull);
    let by_name = settings.sslmode == SslMode::VerifyFull;
    let verifier = match &settings.ca {
        // As in libpq, a file that is there is used in every mode.
        Some(ca) => {
            let authorities = authorities(ca, settings.crl.as_ref())?;
            OfServers::new(authorities, Rules::Libpq, by_name)
        }
        None if verifies => return Err(TlsError::NoAuthorities),
        None => OfServers::anybody(),
    };
    let own = match (&settings.cert, &settings.key) {
        (Some(cert), Some(key)) => Some(certified(cert, key, None)?),
        _ => None,
    };
    let mut config = kornak_tls::client_config(Arc::new(verifier), own)?;
    config.alpn_protocols = vec![ALPN.to_vec()];
    config.resumption = Resumption::disabled();
    let verifies = settings.ca.is_some();
    Ok(Connecting { mode: settings.sslmode, verifies, config: Arc::new(config) })
}

/// The data that SCRAM binds to on a connection that the proxy opened.
pub fn binding_of_server(stream: &Stream) -> Binding {
    let Stream::Tls(tls) = stream else { return Binding::None };
    let shown = tls.get_ref().1.peer_certificates().and_then(<[_]>::first);
    shown.map_or(Binding::None, |certificate| binding::of_certificate(certificate))
}

/// Every file that the settings name, to be watched.
pub fn files(ProxyTls { client, server }: &ProxyTls) -> Vec<PathBuf> {
    let all = [
        &client.cert,
        &client.key,
        &client.ca,
        &client.crl,
        &server.cert,
        &server.key,
        &server.ca,
        &server.crl,
    ];
    all.into_iter().flatten().cloned().collect()
}

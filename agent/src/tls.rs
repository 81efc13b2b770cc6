//! TLS of the REST API and of those who ask it.
//!
//! Files are PEM, as Patroni takes them: the key may be in the certificate's file, and may be
//! encrypted if it is PKCS#8. They are read again at a reload, because certificates are renewed more
//! often than agents are restarted; a bad one leaves the old in force. Whom to trust is decided in
//! [`kornak_tls`].
//!
//! Not here: cipher lists. rustls has safe suites only, so `restapi.ciphers` has nothing to forbid.

use std::path::Path;
use std::sync::Arc;

use arc_swap::ArcSwap;
use kornak_config::agent::{CtlSettings, ServerTls, VerifyClient};
pub use kornak_tls::TlsError;
use kornak_tls::{Authorities, OfClients, OfServers, Rules, certified};
use rustls::server::danger::ClientCertVerifier;
use rustls::{ClientConfig, ServerConfig};
use secrecy::SecretString;
use tokio_rustls::TlsAcceptor;

/// The server side: what the next connection is accepted with.
#[derive(Debug)]
pub struct RestTls {
    config: ArcSwap<ServerConfig>,
}

impl RestTls {
    /// # Errors
    /// A file cannot be read or used.
    pub fn new(settings: &ServerTls) -> Result<Self, TlsError> {
        Ok(Self { config: ArcSwap::from_pointee(server_config(settings)?) })
    }

    /// Reads the files again. Connections that are open stay as they are.
    ///
    /// # Errors
    /// A file cannot be read or used; the old ones stay in force.
    pub fn reload(&self, settings: &ServerTls) -> Result<(), TlsError> {
        self.config.store(Arc::new(server_config(settings)?));
        Ok(())
    }

    /// For the next connection.
    pub fn acceptor(&self) -> TlsAcceptor {
        TlsAcceptor::from(self.config.load_full())
    }
}

fn server_config(settings: &ServerTls) -> Result<ServerConfig, TlsError> {
    let verifier = match (settings.verify_client, &settings.cafile) {
        (VerifyClient::None, _) | (_, None) => None,
        (verify, Some(ca)) => {
            let required = verify == VerifyClient::Required;
            let verifier = OfClients::new(Authorities::of_file(ca)?, Rules::Https, required);
            Some(Arc::new(verifier) as Arc<dyn ClientCertVerifier>)
        }
    };
    let keyfile = settings.keyfile.as_ref().unwrap_or(&settings.certfile);
    let own = certified(&settings.certfile, keyfile, settings.keyfile_password.as_ref())?;
    let mut config = kornak_tls::server_config(verifier, own)?;
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(config)
}

/// The client side, from `ctl`: without `cacert` the authorities of this machine count, and with
/// `insecure` any certificate does.
///
/// # Errors
/// A file cannot be read or used.
pub fn client_config(settings: &CtlSettings) -> Result<ClientConfig, TlsError> {
    let verifier = match &settings.cacert {
        _ if settings.insecure => OfServers::anybody(),
        Some(ca) => OfServers::new(Authorities::of_file(ca)?, Rules::Https, true),
        None => OfServers::new(Authorities::of_this_machine(), Rules::Https, true),
    };
    let own = settings.certfile.as_deref().map(|cert| {
        let key = settings.keyfile.as_deref().unwrap_or(cert);
        (cert, key, settings.keyfile_password.as_ref())
    });
    client(verifier, own)
}

/// A client that shows the certificate, key and its password that are its `own`, if it has them.
///
/// # Errors
/// A file cannot be read or used.
pub(crate) fn client(
    verifier: OfServers,
    own: Option<(&Path, &Path, Option<&SecretString>)>,
) -> Result<ClientConfig, TlsError> {
    let own = own.map(|(cert, key, password)| certified(cert, key, password)).transpose()?;
    kornak_tls::client_config(Arc::new(verifier), own)
}

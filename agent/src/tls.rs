//! TLS of the REST API and of those who ask it, by rustls.
//!
//! Files are PEM, as Patroni takes them: the key may be in the certificate's file, and may be
//! encrypted if it is PKCS#8. They are read again at a reload, because certificates are renewed more
//! often than agents are restarted; a bad one leaves the old in force.
//!
//! Not here: cipher lists. rustls has safe suites only, so `restapi.ciphers` has nothing to forbid.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use arc_swap::ArcSwap;
use kornak_config::agent::{CtlSettings, ServerTls, VerifyClient};
use pkcs8::EncryptedPrivateKeyInfoRef;
use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::CryptoProvider;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{
    CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, ServerName, UnixTime, pem,
};
use rustls::server::WebPkiClientVerifier;
use rustls::{ClientConfig, DigitallySignedStruct, RootCertStore, ServerConfig, SignatureScheme};
use secrecy::{ExposeSecret, SecretString};
use tokio_rustls::TlsAcceptor;

/// Why certificates or keys cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    #[error("read the PEM file {}", .path.display())]
    File {
        path: PathBuf,
        #[source]
        source: pem::Error,
    },
    #[error("{} holds no certificate", .0.display())]
    NoCertificate(PathBuf),
    #[error("decrypt the key in {}: is keyfile_password right, and the key PKCS#8?", .0.display())]
    Decrypt(PathBuf),
    #[error(
        "the key in {} is encrypted in OpenSSL's old form: write it anew with `openssl pkcs8 -topk8`",
        .0.display()
    )]
    OldEncryption(PathBuf),
    #[error("the key in {} is encrypted, and keyfile_password is not set", .0.display())]
    NoPassword(PathBuf),
    #[error("use the certificates")]
    Use(#[from] rustls::Error),
    #[error("use the certificate authorities: {0}")]
    Authorities(String),
    #[error(
        "sslmode asks for a certificate that can be verified: sslrootcert has to name authorities"
    )]
    NoAuthorities,
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::aws_lc_rs::default_provider())
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let read = CertificateDer::pem_file_iter(path).and_then(Iterator::collect);
    let found: Vec<_> = read.map_err(|source| TlsError::File { path: path.to_owned(), source })?;
    if found.is_empty() { Err(TlsError::NoCertificate(path.to_owned())) } else { Ok(found) }
}

fn key(path: &Path, password: Option<&SecretString>) -> Result<PrivateKeyDer<'static>, TlsError> {
    let failed = |source| TlsError::File { path: path.to_owned(), source };
    let text = std::fs::read_to_string(path).map_err(|error| failed(pem::Error::Io(error)))?;
    if text.contains("Proc-Type: 4,ENCRYPTED") {
        return Err(TlsError::OldEncryption(path.to_owned()));
    }
    let (begin, end) =
        ("-----BEGIN ENCRYPTED PRIVATE KEY-----", "-----END ENCRYPTED PRIVATE KEY-----");
    let block = text.find(begin).and_then(|start| {
        let rest = text.get(start..)?;
        rest.get(..rest.find(end)? + end.len())
    });
    let Some(block) = block else {
        return PrivateKeyDer::from_pem_slice(text.as_bytes()).map_err(failed);
    };
    let password = password.ok_or_else(|| TlsError::NoPassword(path.to_owned()))?;
    let broken = || TlsError::Decrypt(path.to_owned());
    let (_, document) = pkcs8::Document::from_pem(block).map_err(|_| broken())?;
    let encrypted =
        EncryptedPrivateKeyInfoRef::try_from(document.as_bytes()).map_err(|_| broken())?;
    let plain = encrypted.decrypt(password.expose_secret()).map_err(|_| broken())?;
    Ok(PrivatePkcs8KeyDer::from(plain.as_bytes().to_vec()).into())
}

fn authorities(path: &Path) -> Result<Arc<RootCertStore>, TlsError> {
    let mut store = RootCertStore::empty();
    for certificate in certificates(path)? {
        store.add(certificate)?;
    }
    Ok(Arc::new(store))
}

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

    pub(crate) fn acceptor(&self) -> TlsAcceptor {
        TlsAcceptor::from(self.config.load_full())
    }
}

fn server_config(settings: &ServerTls) -> Result<ServerConfig, TlsError> {
    let builder =
        ServerConfig::builder_with_provider(provider()).with_safe_default_protocol_versions()?;
    let builder = match (settings.verify_client, &settings.cafile) {
        (VerifyClient::None, _) | (_, None) => builder.with_no_client_auth(),
        (verify, Some(ca)) => {
            let verifier =
                WebPkiClientVerifier::builder_with_provider(authorities(ca)?, provider());
            let verifier = match verify {
                VerifyClient::Required => verifier,
                _ => verifier.allow_unauthenticated(),
            };
            let verifier = verifier.build();
            builder.with_client_cert_verifier(
                verifier.map_err(|error| TlsError::Authorities(error.to_string()))?,
            )
        }
    };
    let keyfile = settings.keyfile.as_ref().unwrap_or(&settings.certfile);
    let key = key(keyfile, settings.keyfile_password.as_ref())?;
    let mut config = builder.with_single_cert(certificates(&settings.certfile)?, key)?;
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(config)
}

/// The client side, from `ctl`: without `cacert` the authorities of this machine count, and with
/// `insecure` any certificate does.
///
/// # Errors
/// A file cannot be read or used.
pub fn client_config(settings: &CtlSettings) -> Result<ClientConfig, TlsError> {
    let builder =
        ClientConfig::builder_with_provider(provider()).with_safe_default_protocol_versions()?;
    let builder = match &settings.cacert {
        _ if settings.insecure => builder
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(Anybody { provider: provider() })),
        Some(ca) => builder.with_root_certificates(authorities(ca)?),
        None => {
            let mut store = RootCertStore::empty();
            // A machine without any is no mistake: then no https is asked, or it is told so then.
            store.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
            builder.with_root_certificates(store)
        }
    };
    match &settings.certfile {
        None => Ok(builder.with_no_client_auth()),
        Some(certfile) => {
            let keyfile = settings.keyfile.as_ref().unwrap_or(certfile);
            let key = key(keyfile, settings.keyfile_password.as_ref())?;
            Ok(builder.with_client_auth_cert(certificates(certfile)?, key)?)
        }
    }
}

/// What is asked of a server's certificate.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Verify<'p> {
    Nothing,
    /// That one of these authorities has issued it.
    Authority(Option<&'p Path>),
    /// That, and that it is for the host.
    Name(Option<&'p Path>),
}

/// A client that shows the certificate, key and its password that are its `own`, if it has them.
///
/// # Errors
/// A file cannot be read or used.
pub(crate) fn client(
    verify: Verify<'_>,
    own: Option<(&Path, &Path, Option<&SecretString>)>,
) -> Result<ClientConfig, TlsError> {
    let builder =
        ClientConfig::builder_with_provider(provider()).with_safe_default_protocol_versions()?;
    let named = |ca: Option<&Path>| authorities(ca.ok_or(TlsError::NoAuthorities)?);
    let verifier: Arc<dyn ServerCertVerifier> = match verify {
        Verify::Nothing => Arc::new(Anybody { provider: provider() }),
        Verify::Authority(ca) => Arc::new(AnyName(by_chain_and_name(named(ca)?)?)),
        Verify::Name(ca) => by_chain_and_name(named(ca)?)?,
    };
    let builder = builder.dangerous().with_custom_certificate_verifier(verifier);
    match own {
        None => Ok(builder.with_no_client_auth()),
        Some((cert, keyfile, password)) => {
            Ok(builder.with_client_auth_cert(certificates(cert)?, key(keyfile, password)?)?)
        }
    }
}

fn by_chain_and_name(roots: Arc<RootCertStore>) -> Result<Arc<WebPkiServerVerifier>, TlsError> {
    let verifier = WebPkiServerVerifier::builder_with_provider(roots, provider()).build();
    verifier.map_err(|error| TlsError::Authorities(error.to_string()))
}

/// `verify-ca`: the chain counts, whatever the host is called.
#[derive(Debug)]
struct AnyName(Arc<WebPkiServerVerifier>);

impl ServerCertVerifier for AnyName {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        name: &ServerName<'_>,
        ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        use rustls::CertificateError::{NotValidForName, NotValidForNameContext};
        use rustls::Error::InvalidCertificate;
        // The name is looked at last.
        match self.0.verify_server_cert(end_entity, intermediates, name, ocsp, now) {
            Err(InvalidCertificate(NotValidForName | NotValidForNameContext { .. })) => {
                Ok(ServerCertVerified::assertion())
            }
            verified => verified,
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.0.verify_tls12_signature(message, cert, dss)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.0.verify_tls13_signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.supported_verify_schemes()
    }
}

/// `ctl.insecure`: the connection is encrypted, and nobody knows with whom.
#[derive(Debug)]
struct Anybody {
    provider: Arc<CryptoProvider>,
}

impl ServerCertVerifier for Anybody {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
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

//! Whether a peer's certificate will do, for rustls to ask.
//!
//! Both judges have to say yes ([`crate::chain`], webpki), but that webpki is not heard where it
//! refuses a certificate for its form. Revocation lists and names are read by OpenSSL's rules alone.

use std::path::Path;
use std::sync::Arc;

use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, verify_tls13_signature_with_raw_key};
use rustls::pki_types::{CertificateDer, ServerName, SubjectPublicKeyInfoDer, UnixTime};
use rustls::server::WebPkiClientVerifier;
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::{
    CertificateError, DigitallySignedStruct, DistinguishedName, Error, OtherError, RootCertStore,
    SignatureScheme,
};

use crate::chain::{self, Judge, Purpose, Question, Rules, Untrusted};
use crate::{TlsError, files, names, provider};

/// Certificates of authorities, and what they have revoked.
#[derive(Debug, Clone)]
pub struct Authorities {
    /// As they are in the file; webpki keeps only the keys.
    roots: Vec<Vec<u8>>,
    store: Arc<RootCertStore>,
    revoked: Vec<Vec<u8>>,
}

impl Authorities {
    /// Reads the authorities of a PEM file.
    ///
    /// # Errors
    /// The file cannot be read, or it has no certificate.
    pub fn of_file(path: &Path) -> Result<Self, TlsError> {
        Ok(Self::of(files::certificates(path)?))
    }

    /// Authorities that this machine trusts. A machine without any is no error: then no peer is trusted.
    pub fn of_this_machine() -> Self {
        Self::of(rustls_native_certs::load_native_certs().certs)
    }

    fn of(certificates: Vec<CertificateDer<'static>>) -> Self {
        let roots = certificates.iter().map(|certificate| certificate.to_vec()).collect();
        let mut store = RootCertStore::empty();
        // One that webpki cannot read may still be one to OpenSSL.
        store.add_parsable_certificates(certificates);
        Self { roots, store: Arc::new(store), revoked: Vec::new() }
    }

    /// With lists of what has been revoked, as [`crate::revoked_in`] reads them. With any, a
    /// certificate whose issuer has no valid list among them is refused, as by libpq.
    #[must_use]
    pub fn revoking(mut self, lists: Vec<Vec<u8>>) -> Self {
        self.revoked = lists;
        self
    }

    /// Asks [`chain`] what it says to a chain of which webpki has said this.
    fn second_opinion(
        &self,
        first: Result<(), Error>,
        (rules, purpose): (Rules, Purpose),
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<(), Error> {
        let judge = match first {
            Ok(()) => Judge::AfterWebpki,
            // Nobody says why else it refuses a certificate for its form.
            Err(Error::InvalidCertificate(
                CertificateError::Other(_)
                | CertificateError::BadEncoding
                | CertificateError::UnknownIssuer,
            )) => Judge::Alone,
            Err(error) => return Err(error),
        };
        let now = names::at(now.as_secs()).ok_or(Error::FailedToGetCurrentTime)?;
        let between: Vec<&[u8]> = intermediates.iter().map(AsRef::as_ref).collect();
        let (roots, revoked) = (&self.roots, &self.revoked);
        let question = Question { roots, revoked, rules, judge, purpose, now };
        // Where rustls has a word of its own for it, the peer is told with the right alert.
        chain::verify(end_entity, &between, &question).map_err(|error| match error {
            Untrusted::Expired => CertificateError::Expired.into(),
            Untrusted::Revoked => CertificateError::Revoked.into(),
            error => other(error),
        })
    }
}

fn other(error: impl std::error::Error + Send + Sync + 'static) -> Error {
    CertificateError::Other(OtherError(Arc::new(error))).into()
}

/// Judges servers' certificates.
#[derive(Debug)]
pub struct OfServers {
    trust: Option<(Authorities, Option<Arc<WebPkiServerVerifier>>)>,
    rules: Rules,
    by_name: bool,
    /// Names of the peer beside the one that the connection was made to.
    aliases: Vec<String>,
    provider: Arc<CryptoProvider>,
}

impl OfServers {
    /// Any certificate will do, so nobody knows who is at the other end.
    pub fn anybody() -> Self {
        let (rules, by_name, aliases) = (Rules::Libpq, false, Vec::new());
        Self { trust: None, rules, by_name, aliases, provider: provider() }
    }

    /// One of the authorities must have issued it and, with `by_name`, for the host.
    pub fn new(authorities: Authorities, rules: Rules, by_name: bool) -> Self {
        let store = Arc::clone(&authorities.store);
        // Without an authority that it can read it cannot be made, and would refuse everybody.
        let webpki = WebPkiServerVerifier::builder_with_provider(store, provider()).build().ok();
        let (trust, aliases) = (Some((authorities, webpki)), Vec::new());
        Self { trust, rules, by_name, aliases, provider: provider() }
    }

    /// A certificate for one of `aliases` will do as well as one for the host that is connected to.
    #[must_use]
    pub fn or_named(mut self, aliases: Vec<String>) -> Self {
        self.aliases = aliases;
        self
    }
}

impl ServerCertVerifier for OfServers {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let Some((authorities, webpki)) = &self.trust else {
            return Ok(ServerCertVerified::assertion());
        };
        let first = match webpki {
            None => Err(CertificateError::UnknownIssuer.into()),
            Some(it) => it.verify_server_cert(end_entity, intermediates, server_name, ocsp, now),
        };
        let first = match first {
            // The chain has been accepted before the name is looked at, and names are ours.
            Ok(_)
            | Err(Error::InvalidCertificate(
                CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. },
            )) => Ok(()),
            Err(error) => Err(error),
        };
        let question = (self.rules, Purpose::Server);
        authorities.second_opinion(first, question, end_entity, intermediates, now)?;
        if self.by_name {
            let certificate = names::parse(end_entity).map_err(other)?;
            let names = [server_name.to_str()];
            let mut names =
                names.iter().map(AsRef::as_ref).chain(self.aliases.iter().map(String::as_str));
            if !names.any(|name: &str| names::is_for_host(&certificate, name, self.rules)) {
                return Err(CertificateError::NotValidForName.into());
            }
        }
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        tls12_signature(&self.provider, message, cert, dss)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        tls13_signature(&self.provider, message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}

/// Judges clients' certificates.
#[derive(Debug)]
pub struct OfClients {
    authorities: Authorities,
    webpki: Option<Arc<dyn ClientCertVerifier>>,
    rules: Rules,
    required: bool,
    provider: Arc<CryptoProvider>,
}

impl OfClients {
    /// Accepts certificates that one of the authorities has issued; with `required` every client has to
    /// show one.
    pub fn new(authorities: Authorities, rules: Rules, required: bool) -> Self {
        let store = Arc::clone(&authorities.store);
        let webpki = WebPkiClientVerifier::builder_with_provider(store, provider()).build().ok();
        Self { authorities, webpki, rules, required, provider: provider() }
    }
}

impl ClientCertVerifier for OfClients {
    fn client_auth_mandatory(&self) -> bool {
        self.required
    }

    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        self.webpki.as_ref().map_or(&[], |it| it.root_hint_subjects())
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        let first = match &self.webpki {
            None => Err(CertificateError::UnknownIssuer.into()),
            Some(it) => it.verify_client_cert(end_entity, intermediates, now).map(drop),
        };
        let question = (self.rules, Purpose::Client);
        self.authorities.second_opinion(first, question, end_entity, intermediates, now)?;
        Ok(ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        tls12_signature(&self.provider, message, cert, dss)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        tls13_signature(&self.provider, message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}

fn tls13_signature(
    provider: &CryptoProvider,
    message: &[u8],
    cert: &CertificateDer<'_>,
    dss: &DigitallySignedStruct,
) -> Result<HandshakeSignatureValid, Error> {
    // The key alone: webpki would not parse a version 1 certificate around it.
    let certificate = names::parse(cert).map_err(other)?;
    let key = SubjectPublicKeyInfoDer::from(certificate.public_key().raw);
    let algorithms = &provider.signature_verification_algorithms;
    verify_tls13_signature_with_raw_key(message, &key, dss, algorithms)
}

fn tls12_signature(
    provider: &CryptoProvider,
    message: &[u8],
    cert: &CertificateDer<'_>,
    dss: &DigitallySignedStruct,
) -> Result<HandshakeSignatureValid, Error> {
    let algorithms = &provider.signature_verification_algorithms;
    match rustls::crypto::verify_tls12_signature(message, cert, dss, algorithms) {
        Err(Error::InvalidCertificate(
            CertificateError::Other(_) | CertificateError::BadEncoding,
        )) => {}
        judged => return judged,
    }
    let certificate = names::parse(cert).map_err(other)?;
    let key = &certificate.public_key().subject_public_key.data;
    let possible = algorithms.mapping.iter().find(|(scheme, _)| *scheme == dss.scheme);
    let possible = possible.map(|(_, possible)| *possible).unwrap_or_default();
    // A key of another kind than the algorithm's does not even parse.
    let right =
        possible.iter().any(|it| it.verify_signature(key, message, dss.signature()).is_ok());
    match right {
        true => Ok(HandshakeSignatureValid::assertion()),
        false => Err(CertificateError::BadSignature.into()),
    }
}

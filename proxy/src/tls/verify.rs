//! Whether a peer's certificate will do, for rustls to ask.
//!
//! webpki judges first. What it refuses for its form alone is judged again by [`super::chain`], as
//! OpenSSL would, unless there are revocation lists, which only webpki reads.

use std::sync::Arc;

use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, verify_tls13_signature_with_raw_key};
use rustls::pki_types::{
    CertificateDer, CertificateRevocationListDer, ServerName, SubjectPublicKeyInfoDer, UnixTime,
};
use rustls::server::WebPkiClientVerifier;
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::{
    CertificateError, DigitallySignedStruct, DistinguishedName, Error, OtherError, RootCertStore,
    SignatureScheme,
};

use super::chain::{self, Purpose};
use super::{TlsError, names};

/// Certificates of authorities, and what they have revoked.
#[derive(Debug)]
pub(super) struct Authorities {
    /// As they are in the file; webpki keeps only the keys.
    roots: Vec<Vec<u8>>,
    store: Arc<RootCertStore>,
    revoked: Vec<CertificateRevocationListDer<'static>>,
}

impl Authorities {
    pub(super) fn new(
        certificates: Vec<CertificateDer<'static>>,
        revoked: Vec<CertificateRevocationListDer<'static>>,
    ) -> Result<Self, TlsError> {
        let mut store = RootCertStore::empty();
        let roots = certificates.iter().map(|certificate| certificate.to_vec()).collect();
        for certificate in certificates {
            store.add(certificate)?;
        }
        if store.is_empty() {
            return Err(TlsError::Authorities { what: "there is none in the file".to_owned() });
        }
        Ok(Self { roots, store: Arc::new(store), revoked })
    }

    /// Judges again what webpki has refused.
    fn second_opinion(
        &self,
        first: Error,
        purpose: Purpose,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<(), Error> {
        let for_form = matches!(
            first,
            Error::InvalidCertificate(
                CertificateError::Other(_)
                    | CertificateError::BadEncoding
                    | CertificateError::UnknownIssuer
            )
        );
        let Some(now) = names::at(now.as_secs()).filter(|_| for_form && self.revoked.is_empty())
        else {
            return Err(first);
        };
        let between: Vec<&[u8]> = intermediates.iter().map(AsRef::as_ref).collect();
        chain::verify(end_entity, &between, &self.roots, purpose, now).map_err(other)
    }
}

fn other(error: impl std::error::Error + Send + Sync + 'static) -> Error {
    CertificateError::Other(OtherError(Arc::new(error))).into()
}

/// A server's certificate by libpq's rules: without authorities any will do, with them the chain is
/// looked at, and with `by_name` the host's name as well.
#[derive(Debug)]
pub(super) struct OfServers {
    trust: Option<(Authorities, Arc<WebPkiServerVerifier>)>,
    by_name: bool,
    provider: Arc<CryptoProvider>,
}

impl OfServers {
    pub(super) fn new(
        authorities: Option<Authorities>,
        by_name: bool,
        provider: Arc<CryptoProvider>,
    ) -> Result<Self, TlsError> {
        let trust = match authorities {
            None => None,
            Some(authorities) => {
                let store = Arc::clone(&authorities.store);
                let builder =
                    WebPkiServerVerifier::builder_with_provider(store, Arc::clone(&provider))
                        .with_crls(authorities.revoked.iter().cloned());
                let webpki = builder.build().map_err(|error| authorities_error(&error))?;
                Some((authorities, webpki))
            }
        };
        Ok(Self { trust, by_name, provider })
    }
}

fn authorities_error(error: &rustls::server::VerifierBuilderError) -> TlsError {
    TlsError::Authorities { what: error.to_string() }
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
        match webpki.verify_server_cert(end_entity, intermediates, server_name, ocsp, now) {
            // The chain has been accepted before the name is looked at, and names are ours.
            Ok(_)
            | Err(Error::InvalidCertificate(
                CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. },
            )) => {}
            Err(error) => {
                let purpose = Purpose::Server;
                authorities.second_opinion(error, purpose, end_entity, intermediates, now)?;
            }
        }
        if self.by_name {
            let certificate = names::parse(end_entity).map_err(other)?;
            if !names::is_for_host(&certificate, &server_name.to_str()) {
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

/// A client's certificate, if it shows one.
#[derive(Debug)]
pub(super) struct OfClients {
    authorities: Authorities,
    webpki: Arc<dyn ClientCertVerifier>,
    provider: Arc<CryptoProvider>,
}

impl OfClients {
    pub(super) fn new(
        authorities: Authorities,
        provider: Arc<CryptoProvider>,
    ) -> Result<Self, TlsError> {
        let store = Arc::clone(&authorities.store);
        let webpki = WebPkiClientVerifier::builder_with_provider(store, Arc::clone(&provider))
            .with_crls(authorities.revoked.iter().cloned())
            .allow_unauthenticated()
            .build()
            .map_err(|error| authorities_error(&error))?;
        Ok(Self { authorities, webpki, provider })
    }
}

impl ClientCertVerifier for OfClients {
    fn client_auth_mandatory(&self) -> bool {
        false
    }

    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        self.webpki.root_hint_subjects()
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        if let Err(error) = self.webpki.verify_client_cert(end_entity, intermediates, now) {
            let purpose = Purpose::Client;
            self.authorities.second_opinion(error, purpose, end_entity, intermediates, now)?;
        }
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

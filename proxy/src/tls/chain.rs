//! Chains of certificates that webpki refuses and libpq, through OpenSSL, takes: version 1
//! certificates, and self-signed ones that are both the server's and its own authority, which is
//! what the commands in PostgreSQL's documentation make (`/docs/current/ssl-tcp.html`).
//!
//! A second opinion, asked only when webpki's is a refusal for the form; so it says no to everything
//! that it does not know: critical extensions, name constraints, revocation. Pure.

use x509_parser::certificate::X509Certificate;
use x509_parser::extensions::ParsedExtension;
use x509_parser::oid_registry::{OID_PKCS1_SHA1WITHRSA, OID_SHA1_WITH_RSA};
use x509_parser::prelude::ASN1Time;
use x509_parser::x509::X509Version;

use super::names::parse;

/// Longest chain, the peer's own certificate and the root included.
const MAX_CHAIN: usize = 8;

/// What the peer's certificate is shown for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Purpose {
    Server,
    Client,
}

/// Why a chain is not trusted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(super) enum Untrusted {
    #[error("a certificate cannot be parsed")]
    Malformed,
    #[error("no chain leads to an authority of the ca file")]
    UnknownIssuer,
    #[error("a certificate of the chain is not valid at this time")]
    Expired,
    #[error("a certificate of the chain may not be used for this")]
    Usage,
}

/// Follows the issuers from `end_entity` to a self-signed certificate in `roots`.
pub(super) fn verify(
    end_entity: &[u8],
    intermediates: &[&[u8]],
    roots: &[Vec<u8>],
    purpose: Purpose,
    now: ASN1Time,
) -> Result<(), Untrusted> {
    let parsed = |der: &[u8]| parse(der).map(drop).map_err(|_| Untrusted::Malformed);
    parsed(end_entity)?;
    let others: Vec<X509Certificate<'_>> =
        intermediates.iter().filter_map(|der| parse(der).ok()).collect();
    let trusted: Vec<X509Certificate<'_>> =
        roots.iter().filter_map(|der| parse(der).ok()).collect();
    let mut current = parse(end_entity).map_err(|_| Untrusted::Malformed)?;
    // Certificates that stand between this one and the peer's, not counting self-issued ones.
    let mut below = 0;
    for depth in 0..MAX_CHAIN {
        check(&current, depth > 0, below, purpose, &now)?;
        let self_issued = current.issuer().as_raw() == current.subject().as_raw();
        if self_issued && trusted.iter().any(|root| root.as_raw() == current.as_raw()) {
            return Ok(());
        }
        let candidates = trusted.iter().chain(&others);
        let issuer = candidates
            .filter(|it| it.subject().as_raw() == current.issuer().as_raw())
            .filter(|it| it.as_raw() != current.as_raw())
            .find(|it| is_signed_by(&current, it))
            .ok_or(Untrusted::UnknownIssuer)?;
        if depth > 0 && !self_issued {
            below += 1;
        }
        current = issuer.clone();
    }
    Err(Untrusted::UnknownIssuer)
}

/// SHA-1 is refused, as OpenSSL does at every security level above 0.
fn is_signed_by(certificate: &X509Certificate<'_>, issuer: &X509Certificate<'_>) -> bool {
    let algorithm = &certificate.signature_algorithm.algorithm;
    let weak = *algorithm == OID_PKCS1_SHA1WITHRSA || *algorithm == OID_SHA1_WITH_RSA;
    if weak || certificate.signature_algorithm != certificate.tbs_certificate.signature {
        return false;
    }
    certificate.verify_signature(Some(issuer.public_key())).is_ok()
}

/// What OpenSSL's `check_chain` looks at, certificate by certificate.
fn check(
    certificate: &X509Certificate<'_>,
    is_issuer: bool,
    below: u32,
    purpose: Purpose,
    now: &ASN1Time,
) -> Result<(), Untrusted> {
    if !certificate.validity().is_valid_at(*now) {
        return Err(Untrusted::Expired);
    }
    for extension in certificate.extensions() {
        match extension.parsed_extension() {
            ParsedExtension::NameConstraints(_) | ParsedExtension::ParseError { .. } => {
                return Err(Untrusted::Usage);
            }
            ParsedExtension::BasicConstraints(_)
            | ParsedExtension::KeyUsage(_)
            | ParsedExtension::ExtendedKeyUsage(_)
            | ParsedExtension::SubjectAlternativeName(_) => {}
            _ if extension.critical => return Err(Untrusted::Usage),
            _ => {}
        }
    }
    let extended = certificate.extended_key_usage().map_err(|_| Untrusted::Usage)?;
    if let Some(usage) = extended {
        let fits = match purpose {
            Purpose::Server => usage.value.server_auth,
            Purpose::Client => usage.value.client_auth,
        };
        if !fits {
            return Err(Untrusted::Usage);
        }
    }
    let usage = certificate.key_usage().map_err(|_| Untrusted::Usage)?.map(|usage| usage.value);
    if !is_issuer {
        let signs = usage.is_none_or(|usage| {
            let common = usage.digital_signature() || usage.key_agreement();
            common || (purpose == Purpose::Server && usage.key_encipherment())
        });
        return if signs { Ok(()) } else { Err(Untrusted::Usage) };
    }
    let constraints = certificate.basic_constraints().map_err(|_| Untrusted::Usage)?;
    let may_sign = usage.is_none_or(x509_parser::extensions::KeyUsage::key_cert_sign);
    let is_authority = match constraints.map(|extension| extension.value) {
        Some(basic) => basic.ca && basic.path_len_constraint.is_none_or(|most| below <= most),
        // Version 1 knows no extensions: such a root is one by being trusted and self-signed.
        None => {
            let self_issued = certificate.issuer().as_raw() == certificate.subject().as_raw();
            certificate.version() == X509Version::V1 && self_issued
        }
    };
    if is_authority && may_sign { Ok(()) } else { Err(Untrusted::Usage) }
}

//! Chains of certificates by OpenSSL's rules, which are those of libpq, curl and Python. webpki, the
//! other judge, is stricter in form (version 1, a self-signed certificate that is both the server's and
//! its own authority, which is what the commands in PostgreSQL's documentation make:
//! `/docs/current/ssl-tcp.html`) and laxer elsewhere: it looks at no root's dates and takes any
//! certificate for a root.
//!
//! Where webpki has refused, this is the only judge and says no to everything that it does not know.
//! Pure.

use x509_parser::certificate::X509Certificate;
use x509_parser::extensions::{KeyUsage, ParsedExtension};
use x509_parser::prelude::{ASN1Time, FromDer};
use x509_parser::revocation_list::CertificateRevocationList;
use x509_parser::x509::X509Version;

use super::names::parse;
use super::signature;

/// Longest chain, the peer's own certificate and the root included.
const MAX_CHAIN: usize = 8;
/// Bound on the work that a peer can cause: webpki's own limit of signatures in one verification.
const MAX_SIGNATURES: usize = 100;

/// Purpose for which the peer shows its certificate.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Purpose {
    Server,
    Client,
}

/// Whose settings of OpenSSL count, and whose way to read a host's name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rules {
    /// libpq and PostgreSQL: a chain ends at a self-signed certificate.
    Libpq,
    /// curl, and Python from 3.13 on: any certificate of the authorities' file ends a chain.
    Https,
}

/// The verifier that has looked at the chain before.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Judge {
    Alone,
    /// webpki has accepted it, so name constraints hold.
    AfterWebpki,
}

/// Why a chain is not trusted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Untrusted {
    #[error("a certificate cannot be parsed")]
    Malformed,
    #[error("no chain leads to an authority of the ca file")]
    UnknownIssuer,
    #[error("a certificate of the chain is not valid at this time")]
    Expired,
    #[error("a certificate of the chain may not be used for this")]
    Usage,
    #[error("a certificate of the chain has been revoked")]
    Revoked,
    #[error("there is no valid revocation list of an issuer in the chain")]
    NoRevocationList,
}

/// Facts by which a chain is judged.
#[derive(Debug, Clone, Copy)]
pub struct Question<'a> {
    /// Certificates of authorities.
    pub roots: &'a [Vec<u8>],
    /// Revocation lists. With any, each certificate of a chain needs one of its issuer.
    pub revoked: &'a [Vec<u8>],
    pub rules: Rules,
    pub judge: Judge,
    pub purpose: Purpose,
    pub now: ASN1Time,
}

/// Whether the bytes are a revocation list and nothing else.
pub(crate) fn is_list(der: &[u8]) -> bool {
    matches!(CertificateRevocationList::from_der(der), Ok(([], _)))
}

/// Follows the issuers from `end_entity` to one of the roots.
///
/// # Errors
/// No chain leads there that can be trusted.
pub fn verify(
    end_entity: &[u8],
    intermediates: &[&[u8]],
    question: &Question<'_>,
) -> Result<(), Untrusted> {
    let first = parse(end_entity).map_err(|_| Untrusted::Malformed)?;
    // What cannot be parsed leads nowhere.
    let trusted = question.roots.iter().filter_map(|der| parse(der).ok()).collect();
    let others = intermediates.iter().filter_map(|der| parse(der).ok()).collect();
    let lists = question.revoked.iter().filter_map(|der| {
        let (_, list) = CertificateRevocationList::from_der(der).ok()?;
        Some((der.as_slice(), list))
    });
    let mut search =
        Search { question, trusted, others, lists: lists.collect(), signatures: MAX_SIGNATURES };
    search.follow(&first, &mut Vec::new())
}

struct Search<'a> {
    question: &'a Question<'a>,
    trusted: Vec<X509Certificate<'a>>,
    others: Vec<X509Certificate<'a>>,
    lists: Vec<(&'a [u8], CertificateRevocationList<'a>)>,
    signatures: usize,
}

impl<'a> Search<'a> {
    /// `below` are the certificates between the peer's and this one, the peer's first.
    fn follow(
        &mut self,
        current: &X509Certificate<'a>,
        below: &mut Vec<X509Certificate<'a>>,
    ) -> Result<(), Untrusted> {
        if below.len() >= MAX_CHAIN {
            return Err(Untrusted::UnknownIssuer);
        }
        let between = below.iter().skip(1).filter(|it| !is_self_issued(it)).count();
        check(current, !below.is_empty(), between, self.question)?;
        let is_trusted = self.trusted.iter().any(|root| root.as_raw() == current.as_raw());
        let ends_here = is_self_issued(current) || self.question.rules == Rules::Https;
        if is_trusted && ends_here {
            return self.revocation(below, current);
        }
        // An authority's file comes first, as in OpenSSL.
        let candidates: Vec<X509Certificate<'a>> = self
            .trusted
            .iter()
            .chain(&self.others)
            .filter(|it| may_have_issued(it, current) && !below.contains(it) && *it != current)
            .cloned()
            .collect();
        let mut why = Untrusted::UnknownIssuer;
        for issuer in candidates {
            let Some(left) = self.signatures.checked_sub(1) else { break };
            self.signatures = left;
            if !signed_by(current, &issuer) {
                continue;
            }
            below.push(current.clone());
            let judged = self.follow(&issuer, below);
            below.pop();
            match judged {
                Ok(()) => return Ok(()),
                Err(error) => why = error,
            }
        }
        Err(why)
    }

    /// OpenSSL's `CRL_CHECK_ALL`, which libpq and PostgreSQL set: every certificate, the root included,
    /// needs a list of its issuer. A root that is not self-signed has no issuer here.
    fn revocation(
        &self,
        below: &[X509Certificate<'a>],
        root: &X509Certificate<'a>,
    ) -> Result<(), Untrusted> {
        if self.lists.is_empty() {
            return Ok(());
        }
        let chain: Vec<&X509Certificate<'a>> = below.iter().chain([root]).collect();
        for (at, certificate) in chain.iter().enumerate() {
            let issuer = chain.get(at + 1).copied().unwrap_or(root);
            let mut found = false;
            for (der, list) in &self.lists {
                if list.issuer().as_raw() != certificate.issuer().as_raw()
                    || !is_usable(der, list, issuer, &self.question.now)
                {
                    continue;
                }
                found = true;
                if list
                    .iter_revoked_certificates()
                    .any(|it| it.raw_serial() == certificate.raw_serial())
                {
                    return Err(Untrusted::Revoked);
                }
            }
            if !found {
                return Err(Untrusted::NoRevocationList);
            }
        }
        Ok(())
    }
}

/// Lists that are limited to some certificates say so in a critical extension, and are not read.
fn is_usable(
    der: &[u8],
    list: &CertificateRevocationList<'_>,
    issuer: &X509Certificate<'_>,
    now: &ASN1Time,
) -> bool {
    let fresh = list.last_update() <= *now && list.next_update().is_none_or(|next| *now <= next);
    let plain = !list.extensions().iter().any(|it| it.critical);
    let usage = issuer.key_usage().ok().flatten().map(|usage| usage.value.crl_sign());
    fresh && plain && usage.unwrap_or(true) && signature::is_by(der, issuer.public_key())
}

fn is_self_issued(certificate: &X509Certificate<'_>) -> bool {
    certificate.issuer().as_raw() == certificate.subject().as_raw()
}

/// By names and by the numbers that tell keys of one name apart.
fn may_have_issued(issuer: &X509Certificate<'_>, certificate: &X509Certificate<'_>) -> bool {
    if issuer.subject().as_raw() != certificate.issuer().as_raw() {
        return false;
    }
    let wanted = certificate.iter_extensions().find_map(|it| match it.parsed_extension() {
        ParsedExtension::AuthorityKeyIdentifier(id) => id.key_identifier.as_ref(),
        _ => None,
    });
    let own = issuer.iter_extensions().find_map(|it| match it.parsed_extension() {
        ParsedExtension::SubjectKeyIdentifier(id) => Some(id),
        _ => None,
    });
    match (wanted, own) {
        (Some(wanted), Some(own)) => wanted == own,
        _ => true,
    }
}

fn signed_by(certificate: &X509Certificate<'_>, issuer: &X509Certificate<'_>) -> bool {
    certificate.signature_algorithm == certificate.tbs_certificate.signature
        && signature::is_by(certificate.as_raw(), issuer.public_key())
}

/// Applies the checks of OpenSSL's `check_chain`, certificate by certificate.
fn check(
    certificate: &X509Certificate<'_>,
    is_issuer: bool,
    between: usize,
    question: &Question<'_>,
) -> Result<(), Untrusted> {
    if !certificate.validity().is_valid_at(question.now) {
        return Err(Untrusted::Expired);
    }
    for extension in certificate.extensions() {
        match extension.parsed_extension() {
            ParsedExtension::NameConstraints(_) if question.judge == Judge::AfterWebpki => {}
            ParsedExtension::NameConstraints(_) | ParsedExtension::ParseError { .. } => {
                return Err(Untrusted::Usage);
            }
            ParsedExtension::BasicConstraints(_)
            | ParsedExtension::KeyUsage(_)
            | ParsedExtension::ExtendedKeyUsage(_)
            | ParsedExtension::SubjectAlternativeName(_) => {}
            _ if extension.critical && question.judge == Judge::Alone => {
                return Err(Untrusted::Usage);
            }
            _ => {}
        }
    }
    let extended = certificate.extended_key_usage().map_err(|_| Untrusted::Usage)?;
    if let Some(usage) = extended {
        let fits = match question.purpose {
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
            common || (question.purpose == Purpose::Server && usage.key_encipherment())
        });
        return if signs { Ok(()) } else { Err(Untrusted::Usage) };
    }
    let constraints = certificate.basic_constraints().map_err(|_| Untrusted::Usage)?;
    let may_sign = usage.is_none_or(KeyUsage::key_cert_sign);
    let most = |limit: u32| usize::try_from(limit).is_ok_and(|limit| between <= limit);
    let is_authority = match constraints.map(|extension| extension.value) {
        Some(basic) => basic.ca && basic.path_len_constraint.is_none_or(most),
        // Version 1 knows no extensions: such a root is one by being trusted and self-signed. Of
        // version 3 a key that may sign certificates says as much.
        None => {
            let old_root = certificate.version() == X509Version::V1 && is_self_issued(certificate);
            old_root || usage.is_some_and(KeyUsage::key_cert_sign)
        }
    };
    if is_authority && may_sign { Ok(()) } else { Err(Untrusted::Usage) }
}

//! Whether a certificate belongs to a host, and to a role: the names in it.
//!
//! For hosts libpq's rules (`fe-secure-common.c`) or curl's, which are not those of browsers: without a
//! subject alternative name the common name counts, a wildcard stands for one label. For libpq an
//! alternative name of the host's own kind rules the common name out, for curl any name or address
//! does; and curl wants two more labels behind a wildcard. (Python's urllib3 before 2.0 is like curl,
//! later ones leave the common name out.) Pure.

use std::net::IpAddr;

use x509_parser::certificate::X509Certificate;
use x509_parser::extensions::GeneralName;
use x509_parser::prelude::{ASN1Time, FromDer};

use crate::chain::Rules;

/// The bytes are no certificate.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("certificate cannot be parsed")]
pub struct NoCertificate;

/// Parses one certificate; nothing may follow it.
pub fn parse(der: &[u8]) -> Result<X509Certificate<'_>, NoCertificate> {
    match X509Certificate::from_der(der) {
        Ok(([], certificate)) => Ok(certificate),
        _ => Err(NoCertificate),
    }
}

/// Whether the certificate is for `host`, a name or an address.
pub fn is_for_host(certificate: &X509Certificate<'_>, host: &str, rules: Rules) -> bool {
    let address: Option<IpAddr> = host.parse().ok();
    let mut common_name_counts = true;
    let alternative = certificate.subject_alternative_name();
    let names = match &alternative {
        Ok(Some(extension)) => extension.value.general_names.as_slice(),
        Ok(None) => &[],
        // What cannot be read may say anything.
        Err(_) => return false,
    };
    for name in names {
        match name {
            GeneralName::DNSName(pattern) => {
                common_name_counts &= address.is_some() && rules == Rules::Libpq;
                // An address is none of the names there, and libpq compares all the same.
                let named = address.is_none() || rules == Rules::Libpq;
                if named && matches_name(pattern, host, rules) {
                    return true;
                }
            }
            GeneralName::IPAddress(bytes) => {
                common_name_counts &= address.is_none() && rules == Rules::Libpq;
                let same = match address {
                    Some(IpAddr::V4(ip)) => ip.octets() == *bytes,
                    Some(IpAddr::V6(ip)) => ip.octets() == *bytes,
                    None => false,
                };
                if same {
                    return true;
                }
            }
            _ => {}
        }
    }
    common_name_counts
        && common_name(certificate).is_some_and(|name| matches_name(name, host, rules))
}

/// A name with a NUL in it was made to be read as a shorter one (CVE-2009-4034); it matches nothing.
fn matches_name(pattern: &str, host: &str, rules: Rules) -> bool {
    if pattern.contains('\0') || host.is_empty() {
        return false;
    }
    if pattern.eq_ignore_ascii_case(host) {
        return true;
    }
    let Some(suffix) = pattern.strip_prefix('*').filter(|suffix| suffix.starts_with('.')) else {
        return false;
    };
    let Some(at) = host.len().checked_sub(suffix.len()) else { return false };
    let (Some(label), Some(rest)) = (host.get(..at), host.get(at..)) else { return false };
    let specific = match rules {
        Rules::Libpq => suffix.len() > 1,
        Rules::Https => {
            let labels = suffix.get(1..).is_some_and(|rest| rest.contains('.'));
            labels && host.parse::<IpAddr>().is_err()
        }
    };
    specific && !label.is_empty() && !label.contains('.') && rest.eq_ignore_ascii_case(suffix)
}

/// The subject's first common name.
pub fn common_name<'a>(certificate: &'a X509Certificate<'_>) -> Option<&'a str> {
    let name = certificate.subject().iter_common_name().next()?.as_str().ok()?;
    (!name.contains('\0')).then_some(name)
}

/// The subject as RFC 2253 writes it, the most specific part first, as `clientname=DN` of
/// `pg_hba.conf` compares it.
pub fn distinguished_name(certificate: &X509Certificate<'_>) -> Option<String> {
    let registry = x509_parser::objects::oid_registry();
    let mut parts = Vec::new();
    for rdn in certificate.subject().iter_rdn() {
        let mut values = Vec::new();
        for attribute in rdn.iter() {
            let oid = attribute.attr_type();
            let short = x509_parser::objects::oid2abbrev(oid, registry)
                .map_or_else(|_| oid.to_id_string(), str::to_owned);
            values.push(format!("{short}={}", escaped(attribute.as_str().ok()?)));
        }
        parts.push(values.join("+"));
    }
    parts.reverse();
    Some(parts.join(","))
}

/// RFC 2253 §2.4.
fn escaped(value: &str) -> String {
    let mut out = String::with_capacity(value.len());
    let last = value.chars().count().saturating_sub(1);
    for (at, character) in value.chars().enumerate() {
        let edge = character == ' ' && (at == 0 || at == last) || character == '#' && at == 0;
        if edge || ",+\"\\<>;".contains(character) {
            out.push('\\');
        }
        out.push(character);
    }
    out
}

/// Seconds since the epoch, as certificates compare them; `None` for a time that they cannot have.
pub fn at(seconds: u64) -> Option<ASN1Time> {
    ASN1Time::from_timestamp(i64::try_from(seconds).ok()?).ok()
}

#[cfg(test)]
mod tests {
    use rcgen::{CertificateParams, DistinguishedName, DnType, KeyPair, SanType};

    use super::*;

    fn made(common_name: &str, names: Vec<SanType>) -> Vec<u8> {
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.distinguished_name.push(DnType::OrganizationName, "A, B");
        params.distinguished_name.push(DnType::CommonName, common_name);
        params.subject_alt_names = names;
        let key = KeyPair::generate().unwrap();
        params.self_signed(&key).unwrap().der().to_vec()
    }

    fn check(common_name: &str, names: Vec<SanType>, host: &str, expected: bool) {
        let der = made(common_name, names);
        let certificate = parse(&der).unwrap();
        let found = is_for_host(&certificate, host, Rules::Libpq);
        assert_eq!(found, expected, "{common_name} for {host}");
    }

    fn dns(name: &str) -> SanType {
        SanType::DnsName(name.try_into().unwrap())
    }

    fn ip(address: &str) -> SanType {
        SanType::IpAddress(address.parse().unwrap())
    }

    #[test]
    fn without_alternative_names_the_common_name_counts() {
        check("db.example.com", vec![], "db.example.com", true);
        check("DB.example.com", vec![], "db.EXAMPLE.com", true);
        check("db.example.com", vec![], "db2.example.com", false);
        check("10.0.0.1", vec![], "10.0.0.1", true);
    }

    #[test]
    fn an_alternative_name_of_the_hosts_kind_rules_the_common_name_out() {
        check("db.example.com", vec![dns("other")], "db.example.com", false);
        check("db.example.com", vec![ip("10.0.0.1")], "db.example.com", true);
        check("10.0.0.2", vec![ip("10.0.0.1")], "10.0.0.2", false);
        check("10.0.0.2", vec![dns("other")], "10.0.0.2", true);
        check("x", vec![ip("10.0.0.1")], "10.0.0.1", true);
        check("x", vec![ip("::1")], "::1", true);
        check("x", vec![dns("a"), dns("b")], "b", true);
    }

    #[test]
    fn a_wildcard_stands_for_one_label() {
        check("*.example.com", vec![], "db.example.com", true);
        check("*.example.com", vec![], "a.db.example.com", false);
        check("*.example.com", vec![], "example.com", false);
        check("*.example.com", vec![], ".example.com", false);
        check("*", vec![], "db", false);
        check("d*.example.com", vec![], "db.example.com", false);
    }

    #[test]
    fn curl_reads_names_otherwise() {
        let https = |common_name, names, host, expected| {
            let der = made(common_name, names);
            let found = is_for_host(&parse(&der).unwrap(), host, Rules::Https);
            assert_eq!(found, expected, "{common_name} for {host}");
        };
        https("10.0.0.1", vec![], "10.0.0.1", true);
        https("10.0.0.2", vec![dns("other")], "10.0.0.2", false);
        https("db.example.com", vec![ip("10.0.0.1")], "db.example.com", false);
        https("x", vec![dns("10.0.0.1")], "10.0.0.1", false);
        https("*.example.com", vec![], "db.example.com", true);
        https("*.com", vec![], "example.com", false);
        https("*.0.0.1", vec![], "10.0.0.1", false);
    }

    #[test]
    fn a_name_is_written_as_rfc_2253_wants_it() {
        let der = made("joe", vec![]);
        let certificate = parse(&der).unwrap();
        assert_eq!(distinguished_name(&certificate).as_deref(), Some(r"CN=joe,O=A\, B"));
        assert_eq!(common_name(&certificate), Some("joe"));
    }
}

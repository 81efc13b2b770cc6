//! SCRAM's channel binding: the hash of the server's certificate (RFC 5929, `tls-server-end-point`).

use kornak_protocol::auth::Binding;
use kornak_tls::names;
use sha2::{Digest, Sha224, Sha256, Sha384, Sha512};
use x509_parser::signature_algorithm::RsaSsaPssParams;
use x509_parser::x509::AlgorithmIdentifier;

/// The channel binding of a connection whose server shows this certificate. [`Binding::None`] for signatures
/// without a hash of their own (Ed25519): RFC 5929 defines no binding for them, and PostgreSQL and
/// libpq have none either.
pub(super) fn of_certificate(der: &[u8]) -> Binding {
    let Ok(certificate) = names::parse(der) else { return Binding::None };
    match hash_of(&certificate.signature_algorithm) {
        Some(hash) => Binding::TlsServerEndPoint(hash(der)),
        None => Binding::None,
    }
}

type Hash = fn(&[u8]) -> Vec<u8>;

/// MD5 and SHA-1 are replaced by SHA-256.
fn hash_of(algorithm: &AlgorithmIdentifier<'_>) -> Option<Hash> {
    match algorithm.algorithm.to_id_string().as_str() {
        // MD5 with RSA, SHA-1 with RSA (two names), SHA-256 with RSA; ECDSA with the latter two.
        "1.2.840.113549.1.1.4"
        | "1.2.840.113549.1.1.5"
        | "1.3.14.3.2.29"
        | "1.2.840.113549.1.1.11"
        | "1.2.840.10045.4.1"
        | "1.2.840.10045.4.3.2" => Some(digest::<Sha256>),
        "1.2.840.113549.1.1.14" | "1.2.840.10045.4.3.1" => Some(digest::<Sha224>),
        "1.2.840.113549.1.1.12" | "1.2.840.10045.4.3.3" => Some(digest::<Sha384>),
        "1.2.840.113549.1.1.13" | "1.2.840.10045.4.3.4" => Some(digest::<Sha512>),
        // RSA-PSS says in its parameters; without any it is SHA-1.
        "1.2.840.113549.1.1.10" => {
            let parameters = RsaSsaPssParams::try_from(algorithm.parameters.as_ref()?).ok()?;
            match parameters.hash_algorithm_oid().to_id_string().as_str() {
                "1.3.14.3.2.26" | "2.16.840.1.101.3.4.2.1" => Some(digest::<Sha256>),
                "2.16.840.1.101.3.4.2.2" => Some(digest::<Sha384>),
                "2.16.840.1.101.3.4.2.3" => Some(digest::<Sha512>),
                _ => None,
            }
        }
        _ => None,
    }
}

fn digest<D: Digest>(bytes: &[u8]) -> Vec<u8> {
    D::digest(bytes).to_vec()
}

#[cfg(test)]
mod tests {
    use rcgen::{CertificateParams, KeyPair, SignatureAlgorithm};

    use super::*;

    fn bound(algorithm: &'static SignatureAlgorithm) -> (Vec<u8>, Binding) {
        let key = KeyPair::generate_for(algorithm).unwrap();
        let der = CertificateParams::default().self_signed(&key).unwrap().der().to_vec();
        let binding = of_certificate(&der);
        (der, binding)
    }

    #[test]
    fn the_hash_is_that_of_the_certificates_signature() {
        let (der, binding) = bound(&rcgen::PKCS_ECDSA_P256_SHA256);
        assert_eq!(binding, Binding::TlsServerEndPoint(Sha256::digest(&der).to_vec()));
        let (der, binding) = bound(&rcgen::PKCS_ECDSA_P384_SHA384);
        assert_eq!(binding, Binding::TlsServerEndPoint(Sha384::digest(&der).to_vec()));
    }

    #[test]
    fn a_signature_without_a_hash_of_its_own_binds_nothing() {
        assert_eq!(bound(&rcgen::PKCS_ED25519).1, Binding::None);
        assert_eq!(of_certificate(b"no certificate"), Binding::None);
    }
}

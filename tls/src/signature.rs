//! Whether something signed in X.509's way, a certificate or a revocation list, was signed by a key.
//! Pure.
//!
//! With the algorithms of rustls's provider, so the two judges agree on them: no SHA-1 and no RSA keys
//! below 2048 bits, as OpenSSL at security level 2, which distributions set.

use x509_parser::x509::SubjectPublicKeyInfo;

use crate::provider;

/// `signed` is `SEQUENCE { what is signed, algorithm, signature }`.
pub(crate) fn is_by(signed: &[u8], key: &SubjectPublicKeyInfo<'_>) -> bool {
    checked(signed, key).is_some()
}

fn checked(signed: &[u8], key: &SubjectPublicKeyInfo<'_>) -> Option<()> {
    let outer = element(signed)?;
    let message = element(outer.content)?;
    let algorithm = element(message.rest)?;
    // A bit string's first byte counts the bits of the last that do not belong to it.
    let signature = element(algorithm.rest)?.content.strip_prefix(&[0])?;
    let kind = element(element(key.raw)?.content)?.content;
    let provider = provider();
    let mut possible = provider.signature_verification_algorithms.all.iter().filter(|it| {
        *it.signature_alg_id() == *algorithm.content && *it.public_key_alg_id() == *kind
    });
    let data = &key.subject_public_key.data;
    possible.find(|it| it.verify_signature(data, message.whole, signature).is_ok()).map(drop)
}

/// One element of DER.
struct Element<'a> {
    whole: &'a [u8],
    content: &'a [u8],
    rest: &'a [u8],
}

fn element(bytes: &[u8]) -> Option<Element<'_>> {
    let first = usize::from(*bytes.get(1)?);
    let (header, length) = match first {
        0..=0x7f => (2, first),
        // Lengths of more than four bytes belong to nothing that a certificate's file can hold.
        0x81..=0x84 => {
            let digits = bytes.get(2..2 + (first - 0x80))?;
            let length = digits.iter().fold(0, |sum, digit| sum << 8 | usize::from(*digit));
            (2 + digits.len(), length)
        }
        _ => return None,
    };
    let end = header.checked_add(length)?;
    Some(Element {
        whole: bytes.get(..end)?,
        content: bytes.get(header..end)?,
        rest: bytes.get(end..)?,
    })
}

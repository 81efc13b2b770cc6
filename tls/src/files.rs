//! PEM files, as OpenSSL's command writes them.

use std::path::Path;

use pkcs8::EncryptedPrivateKeyInfoRef;
use rustls::pki_types::pem::{self, PemObject};
use rustls::pki_types::{
    CertificateDer, CertificateRevocationListDer, PrivateKeyDer, PrivatePkcs8KeyDer,
    SubjectPublicKeyInfoDer,
};
use rustls::sign::CertifiedKey;
use secrecy::{ExposeSecret, SecretString};

use crate::{TlsError, names, provider};

pub(crate) fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let read = CertificateDer::pem_file_iter(path).and_then(Iterator::collect);
    let found: Vec<_> = read.map_err(|source| TlsError::File { path: path.to_owned(), source })?;
    if found.is_empty() { Err(TlsError::NoCertificate(path.to_owned())) } else { Ok(found) }
}

/// The revocation lists of a file.
///
/// # Errors
/// The file cannot be read, or one of the lists not be parsed.
pub fn revoked_in(path: &Path) -> Result<Vec<Vec<u8>>, TlsError> {
    let read = CertificateRevocationListDer::pem_file_iter(path).and_then(Iterator::collect);
    let found: Vec<CertificateRevocationListDer<'static>> =
        read.map_err(|source| TlsError::File { path: path.to_owned(), source })?;
    let found: Vec<Vec<u8>> = found.iter().map(|list| list.to_vec()).collect();
    match found.iter().all(|list| crate::chain::is_list(list)) {
        true => Ok(found),
        false => Err(TlsError::MalformedList(path.to_owned())),
    }
}

/// A certificate with its chain and its key, which may be in the same file and may be encrypted if it
/// is PKCS#8. rustls's own way would refuse certificates of version 1.
///
/// # Errors
/// A file cannot be read or used, or they do not belong together.
pub fn certified(
    cert: &Path,
    key: &Path,
    password: Option<&SecretString>,
) -> Result<CertifiedKey, TlsError> {
    let chain = certificates(cert)?;
    let private = private_key(key, password)?;
    warn_if_open(key);
    let key_of = provider().key_provider.load_private_key(private)?;
    let first = chain.first().ok_or_else(|| TlsError::NoCertificate(cert.to_owned()))?;
    let parsed = names::parse(first)
        .map_err(|source| TlsError::Malformed { path: cert.to_owned(), source })?;
    let theirs = SubjectPublicKeyInfoDer::from(parsed.public_key().raw);
    if key_of.public_key().is_some_and(|ours| ours != theirs) {
        return Err(TlsError::OtherKey { cert: cert.to_owned(), key: key.to_owned() });
    }
    Ok(CertifiedKey::new(chain, key_of))
}

fn private_key(
    path: &Path,
    password: Option<&SecretString>,
) -> Result<PrivateKeyDer<'static>, TlsError> {
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

fn warn_if_open(key: &Path) {
    use std::os::unix::fs::PermissionsExt;
    let mode = std::fs::metadata(key).map_or(0, |it| it.permissions().mode());
    if mode & 0o007 != 0 {
        let key = key.display();
        tracing::warn!(%key, "every user of this host can reach the private key; chmod o= mends it");
    }
}

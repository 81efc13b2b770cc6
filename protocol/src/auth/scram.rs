//! SCRAM-SHA-256 (RFC 5802, RFC 7677) as PostgreSQL speaks it.
//!
//! The server's side works from the verifier alone. A right proof reveals the ClientKey, and with
//! it [`KeyClient`] can log the same role in to any server that has the same verifier: no password
//! is ever known. A role that does not exist gets a made-up verifier ([`Verifier::mock`]) and
//! fails at the same point as a wrong password.
//!
//! PostgreSQL ignores the user name inside SCRAM (the startup packet has it) and refuses an
//! authorization identity; so do we. Every length is bounded before anything is decoded
//! (CVE-2026-6664, CVE-2026-6665).

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use bytes::BytesMut;
use hmac::{Hmac, KeyInit, Mac};
use sha2::{Digest, Sha256};
use subtle::ConstantTimeEq;
use zeroize::Zeroizing;

use super::{Binding, Credentials, LoginError, Refusal, Step};
use crate::backend;
use crate::frontend::SaslInitialResponse;
use crate::limits::{
    MAX_SCRAM_MESSAGE_BYTES, MAX_SCRAM_NONCE_BYTES, MAX_SCRAM_SALT_BYTES, SCRAM_ITERATIONS,
};

mod client;
mod server;

pub use client::KeyClient;
pub(super) use client::ServerFirst;
pub use server::ScramServer;

/// Name of the mechanism without channel binding.
pub const MECHANISM: &str = "SCRAM-SHA-256";
/// Name of the mechanism with channel binding.
pub const MECHANISM_PLUS: &str = "SCRAM-SHA-256-PLUS";
/// Random bytes of a nonce; 24 characters on the wire, as libpq's.
pub const NONCE_BYTES: usize = 18;

type Key = [u8; 32];

/// Form in which a server stores a password: enough to check a proof, not enough to make one.
#[derive(Clone, PartialEq, Eq)]
pub struct Verifier {
    iterations: u32,
    salt: Vec<u8>,
    stored_key: Zeroizing<Key>,
    server_key: Zeroizing<Key>,
    /// Made up for a role that does not exist: accepts nothing.
    is_mock: bool,
}

impl std::fmt::Debug for Verifier {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Verifier").field("iterations", &self.iterations).finish_non_exhaustive()
    }
}

/// The stored password is no SCRAM verifier.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("stored password is no SCRAM-SHA-256 verifier")]
pub struct BadVerifier;

impl Verifier {
    /// Reads `SCRAM-SHA-256$<iterations>:<salt>$<StoredKey>:<ServerKey>`, as `pg_authid` has it.
    pub fn parse(stored: &[u8]) -> Result<Self, BadVerifier> {
        if stored.len() > MAX_SCRAM_MESSAGE_BYTES {
            return Err(BadVerifier);
        }
        let text = std::str::from_utf8(stored).map_err(|_| BadVerifier)?;
        let rest = text.strip_prefix("SCRAM-SHA-256$").ok_or(BadVerifier)?;
        let (head, keys) = rest.split_once('$').ok_or(BadVerifier)?;
        let (iterations, salt) = head.split_once(':').ok_or(BadVerifier)?;
        let (stored_key, server_key) = keys.split_once(':').ok_or(BadVerifier)?;
        Ok(Self {
            iterations: parse_iterations(iterations).ok_or(BadVerifier)?,
            salt: parse_salt(salt).ok_or(BadVerifier)?,
            stored_key: parse_key(stored_key).ok_or(BadVerifier)?,
            server_key: parse_key(server_key).ok_or(BadVerifier)?,
            is_mock: false,
        })
    }

    /// A verifier for a role that does not exist. The salt depends only on the role's name and on
    /// `server_secret`, so asking twice, or at another proxy with the same secret, shows nothing;
    /// `iterations` should be what real roles have (4096 unless `scram_iterations` says so).
    pub fn mock(server_secret: &[u8], user: &[u8], iterations: u32) -> Self {
        let derive = |what: &[u8]| Zeroizing::new(hmac(server_secret, &[what, b"\0", user]));
        Self {
            iterations,
            salt: derive(b"salt").iter().take(16).copied().collect(),
            stored_key: derive(b"stored key"),
            server_key: derive(b"server key"),
            is_mock: true,
        }
    }

    /// Rounds of PBKDF2.
    pub fn iterations(&self) -> u32 {
        self.iterations
    }
}

/// Keys that a correct proof reveals: enough to log the role in wherever its verifier is the same.
#[derive(Clone, PartialEq, Eq)]
pub struct ScramKeys {
    client_key: Zeroizing<Key>,
    server_key: Zeroizing<Key>,
    salt: Vec<u8>,
    iterations: u32,
}

impl std::fmt::Debug for ScramKeys {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("ScramKeys")
    }
}

impl ScramKeys {
    /// Whether the keys belong to this verifier, that is, whether the role's password is still
    /// the one they were learnt from.
    pub fn fit(&self, verifier: &Verifier) -> bool {
        let stored_key: Key = Sha256::digest(self.client_key.as_slice()).into();
        let same = stored_key.ct_eq(verifier.stored_key.as_slice())
            & self.server_key.as_slice().ct_eq(verifier.server_key.as_slice());
        bool::from(same) && self.salt == verifier.salt && self.iterations == verifier.iterations
    }

    pub(super) fn for_fuzzing() -> Self {
        Self {
            client_key: Zeroizing::new([1; 32]),
            server_key: Zeroizing::new([2; 32]),
            salt: b"salt".to_vec(),
            iterations: 1,
        }
    }
}

fn hmac(key: &[u8], parts: &[&[u8]]) -> Key {
    let mac = <Hmac<Sha256> as KeyInit>::new_from_slice(key);
    let mut mac = mac.expect("HMAC takes keys of any length");
    parts.iter().for_each(|part| mac.update(part));
    mac.finalize().into_bytes().into()
}

fn xor(a: &Key, b: &Key) -> Zeroizing<Key> {
    let mut out = Zeroizing::new(*a);
    out.iter_mut().zip(b).for_each(|(to, from)| *to ^= from);
    out
}

fn parse_iterations(text: &str) -> Option<u32> {
    if !text.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    text.parse().ok().filter(|n| SCRAM_ITERATIONS.contains(n))
}

fn parse_salt(text: &str) -> Option<Vec<u8>> {
    let salt = STANDARD.decode(text).ok()?;
    (1..=MAX_SCRAM_SALT_BYTES).contains(&salt.len()).then_some(salt)
}

fn parse_key(text: &str) -> Option<Zeroizing<Key>> {
    // 32 bytes are 44 characters; longer ones are not even decoded.
    if text.len() != 44 {
        return None;
    }
    let bytes = Zeroizing::new(STANDARD.decode(text).ok()?);
    bytes.as_slice().try_into().ok().map(Zeroizing::new)
}

fn parse_nonce(text: &str) -> Option<&str> {
    let good = text.bytes().all(|b| (0x21..=0x7e).contains(&b) && b != b',');
    (good && (1..=MAX_SCRAM_NONCE_BYTES).contains(&text.len())).then_some(text)
}

/// Takes `<name>=<value>` and its comma from the front of a message.
fn attribute<'a>(rest: &mut &'a str, name: char) -> Option<&'a str> {
    let after = rest.strip_prefix(name)?.strip_prefix('=')?;
    let (value, more) = after.split_once(',').unwrap_or((after, ""));
    *rest = more;
    Some(value)
}

fn message_text(message: &[u8]) -> Option<&str> {
    if message.len() > MAX_SCRAM_MESSAGE_BYTES {
        return None;
    }
    std::str::from_utf8(message).ok()
}

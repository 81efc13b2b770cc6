//! PostgreSQL's md5 method: `"md5" + md5(md5(password + user) + salt)`.
//!
//! Served because old roles have such hashes; whoever knows the hash can log in, so it is as
//! secret as a password. `/docs/current/auth-password.html`.

use hmac::{Hmac, KeyInit, Mac};
use md5::{Digest, Md5};
use sha2::Sha256;
use subtle::ConstantTimeEq;
use zeroize::Zeroizing;

/// The hash that `pg_authid` has of a role's password.
#[derive(Clone, PartialEq, Eq)]
pub struct Md5Secret {
    /// 32 hexadecimal digits in lower case.
    hex: Zeroizing<String>,
    /// Made up for a role that does not exist: accepts nothing.
    is_mock: bool,
}

impl std::fmt::Debug for Md5Secret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Md5Secret")
    }
}

impl Md5Secret {
    /// Reads `md5` and 32 hexadecimal digits.
    pub fn parse(stored: &[u8]) -> Option<Self> {
        let digits = stored.strip_prefix(b"md5")?;
        if digits.len() != 32 || !digits.iter().all(u8::is_ascii_hexdigit) {
            return None;
        }
        let hex = std::str::from_utf8(digits).ok()?.to_ascii_lowercase();
        Some(Self { hex: Zeroizing::new(hex), is_mock: false })
    }

    /// The hash of a role's password.
    pub fn of(user: &[u8], password: &[u8]) -> Self {
        Self { hex: hex_md5(&[password, user]), is_mock: false }
    }

    /// A hash for a role that does not exist, so that it is asked for a password like any other.
    pub fn mock(server_secret: &[u8], user: &[u8]) -> Self {
        let mac = <Hmac<Sha256> as KeyInit>::new_from_slice(server_secret)
            .expect("HMAC takes keys of any length")
            .chain_update(b"md5")
            .chain_update(user);
        Self { hex: hex_md5(&[&mac.finalize().into_bytes()]), is_mock: true }
    }

    /// The answer to a challenge.
    pub fn answer(&self, salt: [u8; 4]) -> Vec<u8> {
        let hex = hex_md5(&[self.hex.as_bytes(), &salt]);
        [b"md5", hex.as_bytes()].concat()
    }

    /// Whether an answer to a challenge is right.
    pub fn accepts(&self, answer: &[u8], salt: [u8; 4]) -> bool {
        let right = self.answer(salt);
        let equal: bool = right.ct_eq(answer).into();
        equal && !self.is_mock
    }
}

fn hex_md5(parts: &[&[u8]]) -> Zeroizing<String> {
    let mut hash = Md5::new();
    parts.iter().for_each(|part| hash.update(part));
    let mut hex = Zeroizing::new(String::with_capacity(32));
    for byte in hash.finalize() {
        let digits = [byte >> 4, byte & 0xf];
        hex.extend(digits.iter().filter_map(|digit| char::from_digit(u32::from(*digit), 16)));
    }
    hex
}

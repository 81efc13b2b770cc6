//! The side that proves, with keys that were recovered instead of a password.

use super::*;

/// One login with recovered keys.
pub struct KeyClient {
    keys: ScramKeys,
    nonce: String,
    /// The flag for channel binding and two commas.
    header: &'static str,
    /// Channel-binding data that follows the flag in the last message.
    bound: Vec<u8>,
    /// Expected signature of the server, once it can be computed.
    expected: Option<Key>,
}

impl KeyClient {
    /// A login in which `nonce` is ours; it must be random and never used again. `plus` says
    /// whether the mechanism with channel binding was chosen.
    pub(in super::super) fn new(
        keys: ScramKeys,
        nonce: &[u8; NONCE_BYTES],
        binding: &Binding,
        plus: bool,
    ) -> Self {
        let (header, bound) = match binding {
            Binding::TlsServerEndPoint(hash) if plus => ("p=tls-server-end-point,,", hash.clone()),
            Binding::TlsServerEndPoint(_) => ("y,,", Vec::new()),
            Binding::None => ("n,,", Vec::new()),
        };
        Self { keys, nonce: STANDARD.encode(nonce), header, bound, expected: None }
    }

    /// The user name is left out: PostgreSQL takes the startup packet's.
    fn first_bare(&self) -> String {
        format!("n=,r={}", self.nonce)
    }

    pub(in super::super) fn first(&self) -> Vec<u8> {
        format!("{}{}", self.header, self.first_bare()).into_bytes()
    }

    /// Proves, if the server's verifier is the one that the keys belong to.
    pub(in super::super) fn on_first(&mut self, message: &[u8]) -> Result<Vec<u8>, LoginError> {
        if self.expected.is_some() {
            return Err(LoginError::Malformed("server's first message came twice"));
        }
        let first = ServerFirst::parse(message)?;
        let added = first.nonce.strip_prefix(self.nonce.as_str());
        if added.is_none_or(str::is_empty) {
            return Err(LoginError::Malformed("server's nonce does not extend ours"));
        }
        if first.salt != self.keys.salt || first.iterations != self.keys.iterations {
            return Err(LoginError::OtherVerifier);
        }
        let bound = STANDARD.encode([self.header.as_bytes(), &self.bound].concat());
        let without_proof = format!("c={bound},r={}", first.nonce);
        let auth_message = format!("{},{},{without_proof}", self.first_bare(), first.text);
        let stored_key: Key = Sha256::digest(self.keys.client_key.as_slice()).into();
        let signature = hmac(&stored_key, &[auth_message.as_bytes()]);
        let proof = xor(&self.keys.client_key, &signature);
        self.expected = Some(hmac(self.keys.server_key.as_slice(), &[auth_message.as_bytes()]));
        Ok(format!("{without_proof},p={}", STANDARD.encode(proof.as_slice())).into_bytes())
    }

    /// Checks the server's own proof.
    pub(in super::super) fn on_last(&self, message: &[u8]) -> Result<(), LoginError> {
        let Some(expected) = self.expected else {
            return Err(LoginError::Malformed("server's last message came first"));
        };
        let text = message_text(message).ok_or(LoginError::Malformed("server's last message"))?;
        if text.starts_with("e=") {
            return Err(LoginError::Refused);
        }
        let mut rest = text;
        let signature = attribute(&mut rest, 'v')
            .and_then(parse_key)
            .ok_or(LoginError::Malformed("server's last message"))?;
        match bool::from(signature.as_slice().ct_eq(&expected)) {
            true => Ok(()),
            false => Err(LoginError::Impostor),
        }
    }
}

/// The server's first message (RFC 5802 §7, server-first-message).
pub(in super::super) struct ServerFirst<'a> {
    pub(super) text: &'a str,
    pub(super) nonce: &'a str,
    pub(super) salt: Vec<u8>,
    pub(super) iterations: u32,
}

impl<'a> ServerFirst<'a> {
    pub(in super::super) fn parse(message: &'a [u8]) -> Result<Self, LoginError> {
        let bad = LoginError::Malformed("server's first message");
        let parse = || {
            let text = message_text(message)?;
            let mut rest = text;
            let nonce = attribute(&mut rest, 'r').and_then(parse_nonce)?;
            let salt = attribute(&mut rest, 's').and_then(parse_salt)?;
            let iterations = attribute(&mut rest, 'i').and_then(parse_iterations)?;
            Some(Self { text, nonce, salt, iterations })
        };
        parse().ok_or(bad)
    }
}

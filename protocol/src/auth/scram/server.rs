//! The side that has the verifier.

use super::*;

#[cfg(test)]
mod tests;

/// One exchange with one client.
///
/// ```text
/// First ── SASLInitialResponse ──► Last ── SASLResponse ──► Over
/// ```
#[derive(Debug)]
pub struct ScramServer {
    verifier: Verifier,
    nonce: String,
    binding: Binding,
    state: State,
}

enum State {
    First,
    Last(Box<Pending>),
    Over,
}

impl std::fmt::Debug for State {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::First => "First",
            Self::Last(_) => "Last",
            Self::Over => "Over",
        })
    }
}

/// Values that the client's last message is checked against.
struct Pending {
    /// The client's flag for channel binding, as sent.
    header: String,
    plus: bool,
    client_first_bare: String,
    server_first: String,
    /// Both nonces.
    nonce: String,
}

impl ScramServer {
    /// An exchange in which `nonce` is ours; it must be random and never used again.
    pub fn new(verifier: Verifier, nonce: &[u8; NONCE_BYTES], binding: Binding) -> Self {
        Self { verifier, nonce: STANDARD.encode(nonce), binding, state: State::First }
    }

    /// Mechanisms to offer, the preferred one first.
    pub fn mechanisms(&self) -> &'static [&'static str] {
        match self.binding {
            Binding::None => &[MECHANISM],
            Binding::TlsServerEndPoint(_) => &[MECHANISM_PLUS, MECHANISM],
        }
    }

    /// A `p` message came; `body` is what follows its length word.
    pub fn on(&mut self, body: &[u8]) -> Step<Credentials, Refusal> {
        let mut out = BytesMut::new();
        let step = if matches!(self.state, State::First) {
            SaslInitialResponse::parse(body).map_err(Refusal::from).and_then(|initial| {
                let first = initial.response.ok_or(Refusal::Malformed("no first message"))?;
                let answer = self.on_first(initial.mechanism, first)?;
                backend::put_authentication_sasl_continue(&answer, &mut out);
                Ok(Step::Send(out.freeze()))
            })
        } else {
            self.on_last(body).map(|(answer, keys)| {
                backend::put_authentication_sasl_final(&answer, &mut out);
                Step::Done { send: out.freeze(), learnt: Credentials::Scram(keys) }
            })
        };
        step.unwrap_or_else(|refusal| {
            self.state = State::Over;
            Step::Refuse(refusal)
        })
    }

    /// Answers the client's first message with the salt (RFC 5802 §5, client-first-message).
    pub(in super::super) fn on_first(
        &mut self,
        mechanism: &[u8],
        message: &[u8],
    ) -> Result<Vec<u8>, Refusal> {
        let plus = match mechanism {
            m if m == MECHANISM.as_bytes() => false,
            m if m == MECHANISM_PLUS.as_bytes() && self.binding != Binding::None => true,
            _ => return Err(Refusal::Unsupported("SASL mechanism was not offered")),
        };
        let text = message_text(message).ok_or(Refusal::Malformed("client's first message"))?;
        let (flag, rest) = text.split_once(',').ok_or(Refusal::Malformed("no binding flag"))?;
        self.check_flag(flag, plus)?;
        let (authzid, bare) = rest.split_once(',').ok_or(Refusal::Malformed("no identity"))?;
        if !authzid.is_empty() {
            return Err(Refusal::Unsupported("authorization identity"));
        }
        let mut rest = bare;
        if rest.starts_with("m=") {
            return Err(Refusal::Unsupported("mandatory SCRAM extension"));
        }
        attribute(&mut rest, 'n').ok_or(Refusal::Malformed("no user name"))?;
        let theirs =
            attribute(&mut rest, 'r').and_then(parse_nonce).ok_or(Refusal::Malformed("nonce"))?;
        let nonce = format!("{theirs}{}", self.nonce);
        let salt = STANDARD.encode(&self.verifier.salt);
        let server_first = format!("r={nonce},s={salt},i={}", self.verifier.iterations);
        let answer = server_first.clone().into_bytes();
        self.state = State::Last(Box::new(Pending {
            header: format!("{flag},,"),
            plus,
            client_first_bare: bare.to_owned(),
            server_first,
            nonce,
        }));
        Ok(answer)
    }

    /// Judges the flag for channel binding (RFC 5802 §6).
    fn check_flag(&self, flag: &str, plus: bool) -> Result<(), Refusal> {
        match (flag, plus) {
            ("n", false) => Ok(()),
            // It could have bound the channel and thinks that we cannot: somebody between us
            // took the offer away.
            ("y", false) if self.binding != Binding::None => {
                Err(Refusal::Malformed("channel binding was offered and not seen"))
            }
            ("y", false) => Ok(()),
            ("p=tls-server-end-point", true) => Ok(()),
            (flag, true) if flag.starts_with("p=") => {
                Err(Refusal::Unsupported("channel binding type"))
            }
            _ => Err(Refusal::Malformed("channel binding flag does not fit the mechanism")),
        }
    }

    /// Checks the proof; answers our own proof and what theirs revealed (RFC 5802 §3).
    pub(in super::super) fn on_last(
        &mut self,
        message: &[u8],
    ) -> Result<(Vec<u8>, ScramKeys), Refusal> {
        let State::Last(pending) = std::mem::replace(&mut self.state, State::Over) else {
            return Err(Refusal::Malformed("message after the end"));
        };
        let text = message_text(message).ok_or(Refusal::Malformed("client's last message"))?;
        let (without_proof, proof) =
            text.rsplit_once(",p=").ok_or(Refusal::Malformed("no proof"))?;
        let mut rest = without_proof;
        let bound = attribute(&mut rest, 'c').ok_or(Refusal::Malformed("no channel binding"))?;
        let nonce = attribute(&mut rest, 'r').ok_or(Refusal::Malformed("no nonce"))?;
        let mut expected = pending.header.clone().into_bytes();
        if let (true, Binding::TlsServerEndPoint(hash)) = (pending.plus, &self.binding) {
            expected.extend_from_slice(hash);
        }
        if bound != STANDARD.encode(expected) {
            return Err(Refusal::Malformed("channel binding does not match"));
        }
        if nonce != pending.nonce {
            return Err(Refusal::Malformed("nonce does not match"));
        }
        let proof = parse_key(proof).ok_or(Refusal::Malformed("proof"))?;
        let auth_message =
            format!("{},{},{without_proof}", pending.client_first_bare, pending.server_first);
        let signature = hmac(self.verifier.stored_key.as_slice(), &[auth_message.as_bytes()]);
        let client_key = xor(&proof, &signature);
        let stored_key: Key = Sha256::digest(client_key.as_slice()).into();
        let right = bool::from(stored_key.ct_eq(self.verifier.stored_key.as_slice()));
        if !right || self.verifier.is_mock {
            return Err(Refusal::WrongPassword);
        }
        let ours = hmac(self.verifier.server_key.as_slice(), &[auth_message.as_bytes()]);
        let keys = ScramKeys {
            client_key,
            server_key: self.verifier.server_key.clone(),
            salt: self.verifier.salt.clone(),
            iterations: self.verifier.iterations,
        };
        Ok((format!("v={}", STANDARD.encode(ours)).into_bytes(), keys))
    }
}

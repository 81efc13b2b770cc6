//! Proving who one is, both sides, as steps: a message comes in, a [`Step`] says what to do.
//!
//! [`ServerAuth`] stands where PostgreSQL stands towards a client; [`ClientAuth`] logs in to a
//! server. What the first learns ([`Credentials`]) is what the second needs, so that the proxy
//! can log a client in on another server without knowing its password: of SCRAM it learns the
//! ClientKey from the client's proof, of md5 it has the hash.
//!
//! Messages go in as bodies and come out whole, tag and length included, ready to be written.
//! Randomness is an argument. Not here: which role may log in where, and fetching verifiers.
//!
//! Flow: `/docs/current/protocol-flow.html#PROTOCOL-FLOW-START-UP`, SASL:
//! `/docs/current/sasl-authentication.html`.

use bytes::{Bytes, BytesMut};
use zeroize::Zeroizing;

use crate::backend::{self, Authentication};
use crate::error::ErrorFields;
use crate::frontend;
use crate::sqlstate::{INVALID_PASSWORD, PROTOCOL_VIOLATION, SqlState};
use crate::wire::{DecodeError, EncodeError};

pub mod cleartext;
pub mod md5;
pub mod scram;
#[cfg(test)]
mod tests;

use md5::Md5Secret;
use scram::{NONCE_BYTES, ScramKeys, ScramServer, Verifier};

/// Next step of a login after a message of the peer.
#[derive(Debug)]
pub enum Step<T, E> {
    /// Write these bytes and wait for the peer's next message. They may be none.
    Send(Bytes),
    /// Write these bytes, if any; the exchange is over.
    Done {
        /// Whole messages. AuthenticationOk is not among them.
        send: Bytes,
        /// Result of the login.
        learnt: T,
    },
    /// The exchange failed. Nothing but an error may follow.
    Refuse(E),
}

/// The channel binding of the TLS connection below (RFC 5929, `tls-server-end-point`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Binding {
    /// No TLS, or no binding that we can compute.
    None,
    /// Hash of the server's certificate (SHA-256, or the certificate's own if stronger).
    TlsServerEndPoint(Vec<u8>),
}

/// A role's password as `pg_authid.rolpassword` has it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum StoredPassword {
    /// `SCRAM-SHA-256$…`.
    Scram(Verifier),
    /// `md5…`.
    Md5(Md5Secret),
}

/// The stored password is neither a SCRAM verifier nor an md5 hash.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("stored password has an unknown format")]
pub struct UnknownPasswordFormat;

impl StoredPassword {
    /// Reads `rolpassword`.
    pub fn parse(stored: &[u8]) -> Result<Self, UnknownPasswordFormat> {
        if let Some(secret) = Md5Secret::parse(stored) {
            return Ok(Self::Md5(secret));
        }
        Verifier::parse(stored).map(Self::Scram).map_err(|_| UnknownPasswordFormat)
    }
}

/// Secrets that log a role in to a server.
#[derive(Clone, PartialEq, Eq)]
pub enum Credentials {
    /// Nothing: the server must not ask.
    None,
    /// The password itself; it answers every method.
    Password(Zeroizing<Vec<u8>>),
    /// Keys recovered from a client's proof; they answer SCRAM with the same verifier only.
    Scram(ScramKeys),
    /// The md5 hash; it answers md5 only.
    Md5(Md5Secret),
}

impl std::fmt::Debug for Credentials {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::None => "None",
            Self::Password(_) => "Password",
            Self::Scram(_) => "Scram",
            Self::Md5(_) => "Md5",
        })
    }
}

/// Why a client is not let in. An unknown role and a wrong password must look alike, which is
/// why there is no variant for the former (see [`Verifier::mock`]).
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// The proof or password is wrong, or the role does not exist.
    #[error("wrong password")]
    WrongPassword,
    /// The message breaks its format.
    #[error("malformed authentication message: {0}")]
    Malformed(&'static str),
    /// The message asks for something that is not served.
    #[error("unsupported authentication request: {0}")]
    Unsupported(&'static str),
}

impl From<DecodeError> for Refusal {
    fn from(_: DecodeError) -> Self {
        Self::Malformed("field out of bounds")
    }
}

impl Refusal {
    /// SQLSTATE of the error that the client gets.
    pub fn sqlstate(self) -> SqlState {
        match self {
            Self::WrongPassword => INVALID_PASSWORD,
            Self::Malformed(_) | Self::Unsupported(_) => PROTOCOL_VIOLATION,
        }
    }

    /// The error for the client, in PostgreSQL's words where it has some. A failed SCRAM exchange
    /// is told as an ErrorResponse and never as SCRAM's own `e=`, which drivers do not read.
    pub fn fields(self, user: &[u8]) -> ErrorFields {
        match self {
            Self::WrongPassword => {
                let user = String::from_utf8_lossy(user);
                let text = format!("password authentication failed for user \"{user}\"");
                ErrorFields::fatal(self.sqlstate(), text)
            }
            Self::Malformed(why) => {
                ErrorFields::fatal(self.sqlstate(), "malformed authentication message").detail(why)
            }
            Self::Unsupported(why) => {
                ErrorFields::fatal(self.sqlstate(), "unsupported authentication request")
                    .detail(why)
            }
        }
    }
}

/// The side that asks for a proof.
///
/// ```text
/// request() ─► client ─ p ─► on() ── Send ─► client ─ p ─► on() ── Done ─► AuthenticationOk
///                              └───────────── Refuse ◄──────┘
/// ```
#[derive(Debug)]
pub enum ServerAuth {
    /// SCRAM-SHA-256, with channel binding over TLS.
    Scram(ScramServer),
    /// PostgreSQL's md5.
    Md5 {
        /// The role's hash.
        secret: Md5Secret,
        /// Four random bytes, fresh for each login.
        salt: [u8; 4],
    },
    /// The password in clear text, compared with what is stored.
    Cleartext {
        /// The role's name (an md5 hash contains it).
        user: Vec<u8>,
        /// The stored password that a proof is compared with.
        stored: StoredPassword,
    },
}

impl ServerAuth {
    /// SCRAM against a verifier. `nonce` is random and fresh for each login.
    pub fn scram(verifier: Verifier, nonce: [u8; NONCE_BYTES], binding: Binding) -> Self {
        Self::Scram(ScramServer::new(verifier, &nonce, binding))
    }

    /// Appends the message that asks for the proof.
    pub fn request(&self, out: &mut BytesMut) -> Result<(), EncodeError> {
        match self {
            Self::Scram(scram) => backend::put_authentication_sasl(scram.mechanisms(), out)?,
            Self::Md5 { salt, .. } => backend::put_authentication_md5(*salt, out),
            Self::Cleartext { .. } => backend::put_authentication_cleartext(out),
        }
        Ok(())
    }

    /// A `p` message came; `body` is what follows its length word.
    pub fn on(&mut self, body: &[u8]) -> Step<Credentials, Refusal> {
        let learnt = match self {
            Self::Scram(scram) => return scram.on(body),
            Self::Md5 { secret, salt } => {
                frontend::password(body).map_err(Refusal::from).and_then(|answer| {
                    let right = secret.accepts(answer, *salt);
                    right.then(|| Credentials::Md5(secret.clone())).ok_or(Refusal::WrongPassword)
                })
            }
            Self::Cleartext { user, stored } => frontend::password(body)
                .map_err(Refusal::from)
                .and_then(|password| cleartext::check(user, password, stored)),
        };
        match learnt {
            Ok(learnt) => Step::Done { send: Bytes::new(), learnt },
            Err(refusal) => Step::Refuse(refusal),
        }
    }
}

/// Why we cannot log in to a server.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LoginError {
    /// The server asks for a method that these credentials cannot answer.
    #[error("server asks for {method}, which the credentials at hand cannot answer")]
    NoCredentials {
        /// The method.
        method: &'static str,
    },
    /// The server asks for a proof that this connection must not give to it.
    #[error("server asks for {method}, which must not be given to it{why}")]
    Forbidden {
        /// The method.
        method: &'static str,
        /// Advice about what would allow the method; begins with a comma, or is empty.
        why: &'static str,
    },
    /// The server asks for a method that is not implemented (GSSAPI, SSPI, OAuth, …).
    #[error("server asks for the unknown authentication method {0}")]
    UnknownMethod(u32),
    /// The server offers no SASL mechanism that is implemented.
    #[error("server offers no SASL mechanism that is served")]
    NoMechanism,
    /// A message of the server breaks the format or the order.
    #[error("malformed or unexpected authentication message: {0}")]
    Malformed(&'static str),
    /// Salt or iteration count differ from the verifier that the keys were recovered from: the
    /// password was changed since then. The caller fetches the verifier again.
    #[error("server has another verifier than the one the keys belong to")]
    OtherVerifier,
    /// The server could not prove that it knows the role's verifier: it is another server.
    #[error("server did not prove that it knows the password")]
    Impostor,
    /// The server refused with an error attribute of SCRAM.
    #[error("server refused the proof")]
    Refused,
}

/// Which methods a server may ask for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Allowed {
    /// The password in clear text.
    pub cleartext: bool,
    /// An md5 hash of it, which tells it to whoever has the time to guess.
    pub md5: bool,
    /// SCRAM: who does not know the verifier learns nothing from it.
    pub scram: bool,
    /// No proof at all.
    pub nothing: bool,
    /// Advice for the operator about a forbidden method; begins with a comma, or is empty.
    pub why: &'static str,
}

impl Allowed {
    /// All but the password in clear text.
    pub const USUAL: Self =
        Self { cleartext: false, md5: true, scram: true, nothing: true, why: "" };
}

/// How a server had us prove who we are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Method {
    /// Not at all: `trust`, a certificate, the name of the operating system's user.
    Nothing,
    /// The password in clear text.
    Password,
    /// A hash of it.
    Md5,
    /// SCRAM-SHA-256.
    Scram,
    /// SCRAM-SHA-256-PLUS, bound to the server's certificate.
    ScramPlus,
}

impl Method {
    /// For logs.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Nothing => "nothing",
            Self::Password => "password",
            Self::Md5 => "md5",
            Self::Scram => scram::MECHANISM,
            Self::ScramPlus => scram::MECHANISM_PLUS,
        }
    }
}

/// The side that logs in to a server.
pub struct ClientAuth {
    user: Vec<u8>,
    credentials: Credentials,
    nonce: [u8; NONCE_BYTES],
    binding: Binding,
    allowed: Allowed,
    method: Method,
    state: ClientState,
}

enum ClientState {
    Start,
    Answered,
    Keys(Box<scram::KeyClient>),
    Password(Box<cleartext::PasswordClient>),
    Proven,
    Over,
}

impl std::fmt::Debug for ClientAuth {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ClientAuth").field("credentials", &self.credentials).finish_non_exhaustive()
    }
}

impl ClientAuth {
    /// A login of `user`. `nonce` is random and fresh for each login.
    pub fn new(
        user: &[u8],
        credentials: Credentials,
        nonce: [u8; NONCE_BYTES],
        binding: Binding,
    ) -> Self {
        let user = user.to_vec();
        let state = ClientState::Start;
        let method = Method::Nothing;
        Self { user, credentials, nonce, binding, allowed: Allowed::USUAL, method, state }
    }

    /// The authentication method that the server has asked for so far.
    pub fn method(&self) -> Method {
        self.method
    }

    /// Permits these methods in place of [`Allowed::USUAL`].
    #[must_use]
    pub fn allow(mut self, allowed: Allowed) -> Self {
        self.allowed = allowed;
        self
    }

    fn check(&self, is_allowed: bool, method: &'static str) -> Result<(), LoginError> {
        match is_allowed {
            true => Ok(()),
            false => Err(LoginError::Forbidden { method, why: self.allowed.why }),
        }
    }

    /// An Authentication message came.
    pub fn on(&mut self, message: &Authentication<'_>) -> Step<(), LoginError> {
        let mut out = BytesMut::new();
        match message {
            Authentication::Cleartext => self.method = Method::Password,
            Authentication::Md5 { .. } => self.method = Method::Md5,
            Authentication::Sasl(offered) if self.binds(*offered) => {
                self.method = Method::ScramPlus;
            }
            Authentication::Sasl(_) => self.method = Method::Scram,
            _ => {}
        }
        let state = std::mem::replace(&mut self.state, ClientState::Over);
        match self.next(state, message, &mut out) {
            Ok(ClientState::Over) => Step::Done { send: out.freeze(), learnt: () },
            Ok(next) => {
                self.state = next;
                Step::Send(out.freeze())
            }
            Err(error) => Step::Refuse(error),
        }
    }

    fn next(
        &self,
        state: ClientState,
        message: &Authentication<'_>,
        out: &mut BytesMut,
    ) -> Result<ClientState, LoginError> {
        Ok(match (state, message) {
            // A server that trusts us asks for nothing; one that began SCRAM must end it, or it
            // would be let off its own proof.
            (ClientState::Start, Authentication::Ok) => {
                self.check(self.allowed.nothing, "no proof")?;
                ClientState::Over
            }
            (ClientState::Answered | ClientState::Proven, Authentication::Ok) => ClientState::Over,
            (ClientState::Start, Authentication::Cleartext) => self.send_cleartext(out)?,
            (ClientState::Start, Authentication::Md5 { salt }) => self.send_md5(*salt, out)?,
            (ClientState::Start, Authentication::Sasl(offered)) => {
                self.check(self.allowed.scram, "SCRAM")?;
                self.begin_sasl(*offered, out)?
            }
            (ClientState::Keys(mut client), Authentication::SaslContinue(first)) => {
                put_sasl(&client.on_first(first)?, out)?;
                ClientState::Keys(client)
            }
            (ClientState::Keys(client), Authentication::SaslFinal(last)) => {
                client.on_last(last)?;
                ClientState::Proven
            }
            (ClientState::Password(mut client), Authentication::SaslContinue(first)) => {
                put_sasl(&client.on_first(first)?, out)?;
                ClientState::Password(client)
            }
            (ClientState::Password(mut client), Authentication::SaslFinal(last)) => {
                client.on_last(last)?;
                ClientState::Proven
            }
            (_, Authentication::Other(kind)) => return Err(LoginError::UnknownMethod(*kind)),
            _ => return Err(LoginError::Malformed("out of order")),
        })
    }

    fn send_cleartext(&self, out: &mut BytesMut) -> Result<ClientState, LoginError> {
        let Credentials::Password(password) = &self.credentials else {
            return Err(LoginError::NoCredentials { method: "password" });
        };
        self.check(self.allowed.cleartext, "the password in clear text")?;
        let sent = frontend::put_password(password, out);
        sent.map_err(|_| LoginError::NoCredentials { method: "password" })?;
        Ok(ClientState::Answered)
    }

    fn send_md5(&self, salt: [u8; 4], out: &mut BytesMut) -> Result<ClientState, LoginError> {
        let secret = match &self.credentials {
            Credentials::Password(password) => Md5Secret::of(&self.user, password),
            Credentials::Md5(secret) => secret.clone(),
            _ => return Err(LoginError::NoCredentials { method: "md5" }),
        };
        self.check(self.allowed.md5, "an md5 hash of the password")?;
        let sent = frontend::put_password(&secret.answer(salt), out);
        sent.map_err(|_| LoginError::NoCredentials { method: "md5" })?;
        Ok(ClientState::Answered)
    }

    fn binds(&self, offered: backend::Mechanisms<'_>) -> bool {
        offered.contains(scram::MECHANISM_PLUS) && self.binding != Binding::None
    }

    fn begin_sasl(
        &self,
        offered: backend::Mechanisms<'_>,
        out: &mut BytesMut,
    ) -> Result<ClientState, LoginError> {
        let plus = self.binds(offered);
        let mechanism = match plus {
            true => scram::MECHANISM_PLUS,
            false if offered.contains(scram::MECHANISM) => scram::MECHANISM,
            false => return Err(LoginError::NoMechanism),
        };
        let (state, first) = match &self.credentials {
            Credentials::Scram(keys) => {
                let client = scram::KeyClient::new(keys.clone(), &self.nonce, &self.binding, plus);
                let first = client.first();
                (ClientState::Keys(Box::new(client)), first)
            }
            Credentials::Password(password) => {
                let client = cleartext::PasswordClient::new(password, &self.binding, plus);
                let first = client.first();
                (ClientState::Password(Box::new(client)), first)
            }
            _ => return Err(LoginError::NoCredentials { method: "SCRAM-SHA-256" }),
        };
        frontend::put_sasl_initial_response(mechanism.as_bytes(), &first, out)
            .map_err(|_| LoginError::Malformed("our own first message is too long"))?;
        Ok(state)
    }
}

fn put_sasl(message: &[u8], out: &mut BytesMut) -> Result<(), LoginError> {
    frontend::put_sasl_response(message, out)
        .map_err(|_| LoginError::Malformed("our own answer is too long"))
}

/// Fuzz entry: a client that sends these bytes as its messages is never let in and never makes
/// us panic. The first byte cuts them into two messages.
pub fn fuzz_server_auth(input: &[u8]) {
    let (cut, rest) = input.split_first().map_or((0, input), |(c, r)| (usize::from(*c), r));
    let (first, last) = rest.split_at_checked(cut).unwrap_or((rest, &[]));
    for binding in [Binding::None, Binding::TlsServerEndPoint(vec![7; 32])] {
        let verifier = Verifier::mock(b"secret", b"nobody", 4096);
        let mut auth = ServerAuth::scram(verifier, [1; NONCE_BYTES], binding);
        for body in [first, last] {
            match auth.on(body) {
                Step::Send(_) => {}
                Step::Refuse(_) => break,
                Step::Done { .. } => unreachable!("a mock verifier accepts nobody"),
            }
        }
    }
    let secret = Md5Secret::mock(b"secret", b"nobody");
    let _ = ServerAuth::Md5 { secret, salt: [1; 4] }.on(first);
    let _ = StoredPassword::parse(rest);
}

/// Fuzz entry: a server that sends these bytes is never believed and never makes us panic.
pub fn fuzz_client_auth(input: &[u8]) {
    let (cut, rest) = input.split_first().map_or((0, input), |(c, r)| (usize::from(*c), r));
    let (first, last) = rest.split_at_checked(cut).unwrap_or((rest, &[]));
    let keys = ScramKeys::for_fuzzing();
    for credentials in
        [Credentials::Scram(keys), Credentials::Password(Zeroizing::new(b"pencil".to_vec()))]
    {
        let mut auth = ClientAuth::new(b"u", credentials, [1; NONCE_BYTES], Binding::None);
        let mut offer = BytesMut::new();
        if backend::put_authentication_sasl(&[scram::MECHANISM], &mut offer).is_err() {
            return;
        }
        let offer = offer.get(5..).unwrap_or_default();
        let Ok(offer) = Authentication::parse(offer) else { return };
        let _ = auth.on(&offer);
        if let Step::Send(_) = auth.on(&Authentication::SaslContinue(first)) {
            let last = auth.on(&Authentication::SaslFinal(last));
            assert!(matches!(last, Step::Refuse(_)));
        }
    }
}

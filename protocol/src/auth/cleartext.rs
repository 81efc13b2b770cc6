//! Uses of a password itself: comparing it with what a server has stored, and proving it to a
//! server by SCRAM.
//!
//! Passwords go through SASLprep for SCRAM; postgres-protocol does that and the client's
//! exchange. It refuses more than 100,000 iterations, so a hostile server cannot keep us busy.

use postgres_protocol::authentication::sasl::{ChannelBinding, ScramSha256};
use subtle::ConstantTimeEq;
use zeroize::Zeroizing;

use super::md5::Md5Secret;
use super::scram::{self, NONCE_BYTES, ScramServer};
use super::{Binding, Credentials, LoginError, Refusal, StoredPassword};
use crate::limits::MAX_SCRAM_MESSAGE_BYTES;

/// Compares a password with the stored one. On success answers the password as credentials: it
/// can be used with every server, whatever method it asks for.
pub fn check(
    user: &[u8],
    password: &[u8],
    stored: &StoredPassword,
) -> Result<Credentials, Refusal> {
    let right = match stored {
        StoredPassword::Md5(secret) => {
            let salt = [0; 4];
            let equal = secret.answer(salt).ct_eq(&Md5Secret::of(user, password).answer(salt));
            bool::from(equal) && secret.accepts(&secret.answer(salt), salt)
        }
        StoredPassword::Scram(verifier) => proves(password, verifier),
    };
    // PostgreSQL refuses empty passwords whatever is stored.
    if right && !password.is_empty() {
        Ok(Credentials::Password(Zeroizing::new(password.to_vec())))
    } else {
        Err(Refusal::WrongPassword)
    }
}

/// Lets a client that has the password talk to a server that has the verifier.
fn proves(password: &[u8], verifier: &scram::Verifier) -> bool {
    let mut client = PasswordClient::new(password, &Binding::None, false);
    // Nobody listens, so the nonce need not be random.
    let mut server = ScramServer::new(verifier.clone(), &[0; NONCE_BYTES], Binding::None);
    let Ok(first) = server.on_first(scram::MECHANISM.as_bytes(), &client.first()) else {
        return false;
    };
    let Ok(last) = client.on_first(&first) else { return false };
    server.on_last(&last).is_ok()
}

/// The client's side of SCRAM with a password.
pub(super) struct PasswordClient {
    scram: ScramSha256,
}

impl PasswordClient {
    pub(super) fn new(password: &[u8], binding: &Binding, plus: bool) -> Self {
        let binding = match binding {
            Binding::TlsServerEndPoint(hash) if plus => {
                ChannelBinding::tls_server_end_point(hash.clone())
            }
            Binding::TlsServerEndPoint(_) => ChannelBinding::unrequested(),
            Binding::None => ChannelBinding::unsupported(),
        };
        Self { scram: ScramSha256::new(password, binding) }
    }

    pub(super) fn first(&self) -> Vec<u8> {
        self.scram.message().to_vec()
    }

    pub(super) fn on_first(&mut self, message: &[u8]) -> Result<Vec<u8>, LoginError> {
        if message.len() > MAX_SCRAM_MESSAGE_BYTES {
            return Err(LoginError::Malformed("server's first message is too long"));
        }
        // It checks iterations, salt and that the nonce extends ours.
        scram::ServerFirst::parse(message)?;
        let updated = self.scram.update(message);
        updated.map_err(|_| LoginError::Malformed("server's first message"))?;
        Ok(self.scram.message().to_vec())
    }

    pub(super) fn on_last(&mut self, message: &[u8]) -> Result<(), LoginError> {
        if message.len() > MAX_SCRAM_MESSAGE_BYTES {
            return Err(LoginError::Malformed("server's last message is too long"));
        }
        if message.starts_with(b"e=") {
            return Err(LoginError::Refused);
        }
        self.scram.finish(message).map_err(|_| LoginError::Impostor)
    }
}

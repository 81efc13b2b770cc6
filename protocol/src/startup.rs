//! The packets without a tag that open a connection: Startup, SSLRequest, GSSENCRequest and
//! CancelRequest, and the answer NegotiateProtocolVersion.
//!
//! Startup packets come from anyone who can reach the port, before any authentication, so the parser
//! reserves nothing that a length word asks for and reads nothing behind the packet's end.
//! Parameters are kept as the bytes that came, in their order and with duplicates: a server
//! gives them its own meaning, and names need not be UTF-8.
//!
//! Format: `/docs/current/protocol-message-formats.html`; the flow, with direct TLS, is in
//! `/docs/current/protocol-flow.html#PROTOCOL-FLOW-START-UP`.

use bytes::{Buf, BufMut, Bytes, BytesMut};

use crate::limits::{MAX_CANCEL_KEY_BYTES, MAX_STARTUP_BYTES, MIN_CANCEL_KEY_BYTES};
use crate::sqlstate::{FEATURE_NOT_SUPPORTED, PROTOCOL_VIOLATION, SqlState};
use crate::wire::{DecodeError, EncodeError, Reader, put_cstr, put_message, put_sized};

#[cfg(test)]
mod tests;

/// First byte of a TLS ClientHello. A client that begins with it speaks direct TLS
/// (`sslnegotiation=direct`, PostgreSQL 17) and must agree on ALPN `postgresql`.
pub const TLS_HANDSHAKE: u8 = 0x16;

/// Longest name of a role or a database: `NAMEDATALEN - 1` of PostgreSQL.
pub const MAX_NAME_BYTES: usize = 63;

const CANCEL_CODE: u32 = 80_877_102;
const SSL_CODE: u32 = 80_877_103;
const GSSENC_CODE: u32 = 80_877_104;

/// Why no connection can begin with these bytes. It must be closed; only the variants that
/// come from a client of PostgreSQL deserve an answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum StartupError {
    /// The length word is impossible: no client of PostgreSQL.
    #[error("startup packet has the length {len}")]
    Length {
        /// The length word as sent.
        len: u32,
    },
    /// A protocol that is not served (2.0, or one after 3). Answer with 0A000.
    #[error("protocol version {0} is not served")]
    Version(ProtocolVersion),
    /// A packet of a known kind with a body that breaks its format. Answer with 08P01.
    #[error("malformed startup packet")]
    Malformed(#[from] DecodeError),
}

impl StartupError {
    /// SQLSTATE of the error that the client gets.
    pub fn sqlstate(self) -> SqlState {
        match self {
            Self::Version(_) => FEATURE_NOT_SUPPORTED,
            Self::Length { .. } | Self::Malformed(_) => PROTOCOL_VIOLATION,
        }
    }
}

/// Version of the protocol as the client asks for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ProtocolVersion {
    /// 3, for all that is served.
    pub major: u16,
    /// 0 up to PostgreSQL 17, 2 from 18 on; 9999 is grease.
    pub minor: u16,
}

impl ProtocolVersion {
    /// The version of PostgreSQL 7.4 to 17.
    pub const V3_0: Self = Self { major: 3, minor: 0 };
    /// The version of PostgreSQL 18: cancel keys may be longer than four bytes.
    pub const V3_2: Self = Self { major: 3, minor: 2 };

    fn from_word(word: u32) -> Self {
        Self { major: (word >> 16) as u16, minor: word as u16 }
    }

    fn word(self) -> u32 {
        u32::from(self.major) << 16 | u32::from(self.minor)
    }
}

impl std::fmt::Display for ProtocolVersion {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}.{}", self.major, self.minor)
    }
}

/// First packet of a connection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Startup {
    /// The client asks for a session.
    Session(StartupMessage),
    /// The client asks for TLS; the answer is one byte, `S` or `N`.
    Ssl,
    /// The client asks for GSSAPI encryption; the answer is one byte, `N`.
    GssEnc,
    /// The client asks to cancel a query of another connection; the connection is closed without an answer.
    Cancel(CancelRequest),
}

/// A request for a session. Its parameters are known to be well formed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StartupMessage {
    /// The version asked for.
    pub version: ProtocolVersion,
    /// Pairs of strings, each with its NUL, without the packet's own terminator.
    params: Bytes,
}

/// The identification of a session whose query is to be cancelled. The key is a secret.
#[derive(Clone, PartialEq, Eq)]
pub struct CancelRequest {
    /// Process id of the session, as told in BackendKeyData.
    pub pid: u32,
    /// Secret of the session: 4 bytes, or up to 256 in protocol 3.2.
    pub key: Bytes,
}

impl std::fmt::Debug for CancelRequest {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("CancelRequest").field("pid", &self.pid).finish_non_exhaustive()
    }
}

/// Takes the packet that opens a connection from the front of `buf`; `Ok(None)` means "read
/// more". Bytes behind the packet stay (a client that sends any behind SSLRequest is trying
/// CVE-2021-23214 and must be refused by the caller).
///
/// The caller looks for [`TLS_HANDSHAKE`] first.
pub fn take_startup(buf: &mut BytesMut) -> Result<Option<Startup>, StartupError> {
    let Some((&word, _)) = buf.split_first_chunk::<4>() else {
        return Ok(None);
    };
    let len = u32::from_be_bytes(word);
    let body_len = len.checked_sub(4).ok_or(StartupError::Length { len })? as usize;
    if !(4..=MAX_STARTUP_BYTES).contains(&body_len) {
        return Err(StartupError::Length { len });
    }
    if buf.len() - 4 < body_len {
        return Ok(None);
    }
    buf.advance(4);
    parse(buf.split_to(body_len).freeze()).map(Some)
}

fn parse(mut body: Bytes) -> Result<Startup, StartupError> {
    let mut reader = Reader::new("Startup", &body);
    match reader.u32("version")? {
        SSL_CODE => Ok(reader.end().map(|()| Startup::Ssl)?),
        GSSENC_CODE => Ok(reader.end().map(|()| Startup::GssEnc)?),
        CANCEL_CODE => {
            let pid = reader.u32("process id")?;
            let key = reader.remainder().len();
            if !(MIN_CANCEL_KEY_BYTES..=MAX_CANCEL_KEY_BYTES).contains(&key) {
                return Err(reader.invalid("key").into());
            }
            Ok(Startup::Cancel(CancelRequest { pid, key: body.split_off(8) }))
        }
        word => {
            let version = ProtocolVersion::from_word(word);
            if version.major != 3 {
                return Err(StartupError::Version(version));
            }
            loop {
                let name = reader.cstr("parameter name")?;
                if name.is_empty() {
                    break;
                }
                reader.cstr("parameter value")?;
            }
            reader.end()?;
            let params = body.slice(4..body.len().saturating_sub(1));
            Ok(Startup::Session(StartupMessage { version, params }))
        }
    }
}

impl StartupMessage {
    /// The parameters in the order they came, duplicates included.
    pub fn params(&self) -> impl Iterator<Item = (&[u8], &[u8])> {
        let mut reader = Reader::new("Startup", &self.params);
        std::iter::from_fn(move || {
            let name = reader.cstr("parameter name").ok()?;
            Some((name, reader.cstr("parameter value").ok()?))
        })
    }

    /// The value that a server would use: of duplicates the last one.
    pub fn get(&self, name: &str) -> Option<&[u8]> {
        self.params().filter(|(n, _)| *n == name.as_bytes()).last().map(|(_, v)| v)
    }

    /// The role that logs in; a server refuses a packet without one (28000).
    pub fn user(&self) -> Option<&[u8]> {
        self.get("user").filter(|user| !user.is_empty())
    }

    /// The database; the role's name, if none is given.
    pub fn database(&self) -> Option<&[u8]> {
        self.get("database").filter(|database| !database.is_empty()).or_else(|| self.user())
    }

    /// Whether and how replication is asked for, as `ProcessStartupPacket` of PostgreSQL reads it:
    /// `database` as it is written here, or a truth value. Every occurrence is looked at.
    ///
    /// # Errors
    /// The word that is neither; answer with 22023.
    pub fn replication(&self) -> Result<Replication, &[u8]> {
        let (mut walsender, mut of_database) = (false, false);
        for (_, word) in self.params().filter(|(name, _)| *name == b"replication") {
            if word == b"database" {
                (walsender, of_database) = (true, true);
            } else {
                walsender = parse_bool(word).ok_or(word)?;
            }
        }
        Ok(match (walsender, of_database) {
            (false, _) => Replication::None,
            (true, false) => Replication::Physical,
            (true, true) => Replication::Logical,
        })
    }

    /// Whether the role's or the database's name is longer than a name of PostgreSQL can be.
    pub fn has_long_names(&self) -> bool {
        let names = [self.user(), self.database()];
        names.into_iter().flatten().any(|name| name.len() > MAX_NAME_BYTES)
    }

    /// The packet as servers before PostgreSQL 17 read it: both names are cut at 63 bytes, wherever
    /// that falls.
    #[must_use]
    pub fn with_short_names(self) -> Self {
        if !self.has_long_names() {
            return self;
        }
        let mut params = BytesMut::with_capacity(self.params.len());
        for (name, value) in self.params() {
            let is_name = matches!(name, b"user" | b"database");
            let end = if is_name { value.len().min(MAX_NAME_BYTES) } else { value.len() };
            params.put_slice(name);
            params.put_u8(0);
            params.put_slice(value.get(..end).unwrap_or_default());
            params.put_u8(0);
        }
        Self { version: self.version, params: params.freeze() }
    }

    /// Answer to a client that asks for a newer protocol or for unknown options.
    /// `newest_minor` is the newest version 3 that this side speaks.
    pub fn negotiate(&self, newest_minor: u16) -> Negotiation {
        let unknown = self
            .params()
            .filter(|(name, _)| name.starts_with(b"_pq_."))
            .map(|(name, _)| Bytes::copy_from_slice(name))
            .collect::<Vec<_>>();
        let minor = self.version.minor.min(newest_minor);
        Negotiation { version: ProtocolVersion { major: 3, minor }, asked: self.version, unknown }
    }

    /// The packet for a server: this one's parameters with some replaced, added (`Some`) or
    /// left out (`None`). A replaced parameter keeps its first place, its duplicates go.
    pub fn put_patched(
        &self,
        version: ProtocolVersion,
        changes: &[(&str, Option<&[u8]>)],
        out: &mut BytesMut,
    ) -> Result<(), EncodeError> {
        let mut done = vec![false; changes.len()];
        let mut params: Vec<(&[u8], &[u8])> = Vec::new();
        for (name, value) in self.params() {
            let change = changes.iter().zip(&mut done).find(|((n, _), _)| n.as_bytes() == name);
            match change {
                None => params.push((name, value)),
                Some(((_, value), done)) => {
                    if let (false, Some(value)) = (*done, value) {
                        params.push((name, value));
                    }
                    *done = true;
                }
            }
        }
        for ((name, value), done) in changes.iter().zip(done) {
            if let (false, Some(value)) = (done, value) {
                params.push((name.as_bytes(), value));
            }
        }
        put_startup(version, params, out)
    }
}

/// A truth value as PostgreSQL's `parse_bool` reads it: the words, their beginnings as long as they
/// are unmistakable, in any case, and the digits.
pub fn parse_bool(text: &[u8]) -> Option<bool> {
    let begins = |word: &[u8], least: usize| {
        let start = word.get(..text.len());
        text.len() >= least && start.is_some_and(|start| start.eq_ignore_ascii_case(text))
    };
    match text {
        b"1" => Some(true),
        b"0" => Some(false),
        _ if begins(b"true", 1) || begins(b"yes", 1) || begins(b"on", 2) => Some(true),
        _ if begins(b"false", 1) || begins(b"no", 1) || begins(b"off", 2) => Some(false),
        _ => None,
    }
}

/// Whether a session is a replication stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Replication {
    /// An ordinary session.
    None,
    /// `replication=true`: a walsender without a database.
    Physical,
    /// `replication=database`: a walsender of one database.
    Logical,
}

/// The outcome of a comparison of what is asked with what is served.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Negotiation {
    /// The version to speak from here on.
    pub version: ProtocolVersion,
    asked: ProtocolVersion,
    /// Options (`_pq_.…`) that are asked for; none is known to us.
    pub unknown: Vec<Bytes>,
}

impl Negotiation {
    /// Whether the client must be told, with [`Negotiation::put`], before it authenticates.
    pub fn must_tell(&self) -> bool {
        self.version != self.asked || !self.unknown.is_empty()
    }

    /// Appends NegotiateProtocolVersion.
    pub fn put(&self, out: &mut BytesMut) -> Result<(), EncodeError> {
        put_message(out, b'v', |out| {
            out.put_u32(self.version.word());
            out.put_u32(u32::try_from(self.unknown.len()).map_err(|_| EncodeError::TooLong)?);
            self.unknown.iter().try_for_each(|name| put_cstr(out, name, "option name"))
        })
    }
}

/// Appends a startup packet. Refuses NUL bytes, empty names and more than
/// [`MAX_STARTUP_BYTES`], as a server would.
pub fn put_startup<'a>(
    version: ProtocolVersion,
    params: impl IntoIterator<Item = (&'a [u8], &'a [u8])>,
    out: &mut BytesMut,
) -> Result<(), EncodeError> {
    put_sized(out, |out| {
        let start = out.len();
        out.put_u32(version.word());
        for (name, value) in params {
            if name.is_empty() {
                return Err(EncodeError::Empty { what: "parameter name" });
            }
            put_cstr(out, name, "parameter name")?;
            put_cstr(out, value, "parameter value")?;
        }
        out.put_u8(0);
        if out.len() - start > MAX_STARTUP_BYTES {
            return Err(EncodeError::TooLong);
        }
        Ok(())
    })
}

/// Appends a request for TLS.
pub fn put_ssl_request(out: &mut BytesMut) {
    out.put_u32(8);
    out.put_u32(SSL_CODE);
}

/// Appends a request for GSSAPI encryption.
pub fn put_gssenc_request(out: &mut BytesMut) {
    out.put_u32(8);
    out.put_u32(GSSENC_CODE);
}

/// Appends a request to cancel. Keys are opaque; a length outside of 4..=256 is refused.
pub fn put_cancel_request(pid: u32, key: &[u8], out: &mut BytesMut) -> Result<(), EncodeError> {
    if !(MIN_CANCEL_KEY_BYTES..=MAX_CANCEL_KEY_BYTES).contains(&key.len()) {
        return Err(EncodeError::KeyLength { len: key.len() });
    }
    put_sized(out, |out| {
        out.put_u32(CANCEL_CODE);
        out.put_u32(pid);
        out.put_slice(key);
        Ok(())
    })
}

/// Fuzz entry: whatever the bytes, never panic, never take more than was there, and what was
/// understood can be written again as it came.
pub fn fuzz_take_startup(input: &[u8]) {
    let mut buf = BytesMut::from(input);
    let Ok(Some(startup)) = take_startup(&mut buf) else { return };
    let taken = input.len() - buf.len();
    assert!(taken <= MAX_STARTUP_BYTES + 4);
    let mut again = BytesMut::new();
    let written = match &startup {
        Startup::Session(message) => {
            let _ = (message.user(), message.database(), message.replication());
            let short = message.clone().with_short_names();
            assert!(!short.has_long_names());
            let mut out = BytesMut::new();
            assert_eq!(message.negotiate(2).put(&mut out), Ok(()));
            put_startup(message.version, message.params(), &mut again)
        }
        Startup::Ssl => {
            put_ssl_request(&mut again);
            Ok(())
        }
        Startup::GssEnc => {
            put_gssenc_request(&mut again);
            Ok(())
        }
        Startup::Cancel(cancel) => put_cancel_request(cancel.pid, &cancel.key, &mut again),
    };
    assert_eq!(written, Ok(()));
    assert_eq!(Some(&again[..]), input.get(..taken));
}

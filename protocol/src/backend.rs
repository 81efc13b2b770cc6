//! Messages of servers: bounds-checked views of framed messages, and the messages that the proxy sends in
//! a server's place.
//!
//! Texts are bytes, in the session's encoding. A cancel key is a secret and is never printed.
//!
//! Format: `/docs/current/protocol-message-formats.html`.

use bytes::{BufMut, Bytes, BytesMut};

use crate::limits::{MAX_CANCEL_KEY_BYTES, MIN_CANCEL_KEY_BYTES};
use crate::txn::{CommandTag, TransactionStatus};
use crate::wire::{DecodeError, EncodeError, Reader, put_cstr, put_message, put_plain};

#[cfg(test)]
mod tests;

/// An Authentication message.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Authentication<'a> {
    /// The login succeeded.
    Ok,
    /// The password in clear text is asked for.
    Cleartext,
    /// The md5 response with this salt is asked for.
    Md5 {
        /// Four random bytes.
        salt: [u8; 4],
    },
    /// A SASL mechanism is to be chosen.
    Sasl(Mechanisms<'a>),
    /// The mechanism's next message.
    SaslContinue(&'a [u8]),
    /// The mechanism's last message.
    SaslFinal(&'a [u8]),
    /// GSSAPI, SSPI, or one of PostgreSQL's future: its number.
    Other(u32),
}

impl std::fmt::Debug for Authentication<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Ok => "Ok",
            Self::Cleartext => "Cleartext",
            Self::Md5 { .. } => "Md5",
            Self::Sasl(_) => "Sasl",
            Self::SaslContinue(_) => "SaslContinue",
            Self::SaslFinal(_) => "SaslFinal",
            Self::Other(_) => "Other",
        })
    }
}

impl<'a> Authentication<'a> {
    /// Reads the body of an `R` message.
    pub fn parse(body: &'a [u8]) -> Result<Self, DecodeError> {
        let mut reader = Reader::new("Authentication", body);
        let message = match reader.u32("kind")? {
            0 => Self::Ok,
            3 => Self::Cleartext,
            5 => Self::Md5 { salt: reader.array("salt")? },
            10 => {
                let names = reader.remainder();
                Mechanisms::check(names)?;
                Self::Sasl(Mechanisms(names))
            }
            11 => Self::SaslContinue(reader.remainder()),
            12 => Self::SaslFinal(reader.remainder()),
            other => {
                reader.remainder();
                Self::Other(other)
            }
        };
        reader.end().map(|()| message)
    }
}

/// The SASL mechanisms that a server offers, the preferred one first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Mechanisms<'a>(&'a [u8]);

impl<'a> Mechanisms<'a> {
    fn check(names: &[u8]) -> Result<(), DecodeError> {
        let mut reader = Reader::new("AuthenticationSASL", names);
        while !reader.cstr("mechanism")?.is_empty() {}
        reader.end()
    }

    /// Iterates over the names.
    pub fn iter(self) -> impl Iterator<Item = &'a [u8]> {
        self.0.split(|b| *b == 0).take_while(|name| !name.is_empty())
    }

    /// Whether one of them is offered.
    pub fn contains(self, name: &str) -> bool {
        self.iter().any(|offered| offered == name.as_bytes())
    }
}

/// Name and value of a ParameterStatus.
pub fn parameter_status(body: &[u8]) -> Result<(&[u8], &[u8]), DecodeError> {
    let mut reader = Reader::new("ParameterStatus", body);
    let name = reader.cstr("name")?;
    let value = reader.cstr("value")?;
    reader.end().map(|()| (name, value))
}

/// Process id and secret of a session, as a cancel request has to show them.
#[derive(Clone, PartialEq, Eq)]
pub struct BackendKey {
    /// Process id of the session; unique only within one server.
    pub pid: u32,
    /// 4 bytes in protocol 3.0, up to 256 in 3.2; opaque.
    pub key: Bytes,
}

impl BackendKey {
    /// Reads the body of a `K` message.
    pub fn parse(body: &[u8]) -> Result<Self, DecodeError> {
        let mut reader = Reader::new("BackendKeyData", body);
        let pid = reader.u32("process id")?;
        let key = reader.remainder();
        if !(MIN_CANCEL_KEY_BYTES..=MAX_CANCEL_KEY_BYTES).contains(&key.len()) {
            return Err(reader.invalid("key"));
        }
        Ok(Self { pid, key: Bytes::copy_from_slice(key) })
    }

    /// Appends BackendKeyData.
    pub fn put(&self, out: &mut BytesMut) -> Result<(), EncodeError> {
        if !(MIN_CANCEL_KEY_BYTES..=MAX_CANCEL_KEY_BYTES).contains(&self.key.len()) {
            return Err(EncodeError::KeyLength { len: self.key.len() });
        }
        put_message(out, b'K', |out| {
            out.put_u32(self.pid);
            out.put_slice(&self.key);
            Ok(())
        })
    }
}

impl std::fmt::Debug for BackendKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("BackendKey").field("pid", &self.pid).finish_non_exhaustive()
    }
}

/// Status of a ReadyForQuery.
pub fn ready_for_query(body: &[u8]) -> Result<TransactionStatus, DecodeError> {
    let mut reader = Reader::new("ReadyForQuery", body);
    let byte = reader.u8("status")?;
    let status = TransactionStatus::from_byte(byte).ok_or_else(|| reader.invalid("status"))?;
    reader.end().map(|()| status)
}

/// Tag of a CommandComplete.
pub fn command_complete(body: &[u8]) -> Result<CommandTag<'_>, DecodeError> {
    let mut reader = Reader::new("CommandComplete", body);
    let tag = reader.cstr("tag")?;
    reader.end().map(|()| CommandTag(tag))
}

/// A NotificationResponse.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Notification<'a> {
    /// Process id of the session that notified.
    pub pid: u32,
    /// The channel.
    pub channel: &'a [u8],
    /// The payload, often empty.
    pub payload: &'a [u8],
}

impl<'a> Notification<'a> {
    /// Reads the body of an `A` message.
    pub fn parse(body: &'a [u8]) -> Result<Self, DecodeError> {
        let mut reader = Reader::new("NotificationResponse", body);
        let pid = reader.u32("process id")?;
        let channel = reader.cstr("channel")?;
        let payload = reader.cstr("payload")?;
        reader.end().map(|()| Self { pid, channel, payload })
    }
}

/// The values of a DataRow, `None` for NULL.
pub fn data_row(body: &[u8]) -> Result<Vec<Option<&[u8]>>, DecodeError> {
    let mut reader = Reader::new("DataRow", body);
    let columns = usize::from(reader.u16("number of columns")?);
    // Each column has four bytes at least, so a lie about their number reserves nothing.
    let mut values = Vec::with_capacity(columns.min(body.len() / 4));
    for _ in 0..columns {
        values.push(match reader.u32("length")? {
            u32::MAX => None,
            len => Some(reader.bytes(len as usize, "value")?),
        });
    }
    reader.end().map(|()| values)
}

/// Answer of a server to a startup packet that asks for a newer protocol than it speaks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NegotiatedVersion<'a> {
    /// Newest minor version of protocol 3 that it speaks.
    pub minor: u16,
    /// Options that it does not know.
    pub unknown: Vec<&'a [u8]>,
}

impl<'a> NegotiatedVersion<'a> {
    /// Reads the body of a `v` message. The version comes as a whole one (3.x) from PostgreSQL,
    /// and as a bare minor by the letter of older manuals; both are taken.
    pub fn parse(body: &'a [u8]) -> Result<Self, DecodeError> {
        let mut reader = Reader::new("NegotiateProtocolVersion", body);
        let word = reader.u32("version")?;
        if !matches!(word >> 16, 0 | 3) {
            return Err(reader.invalid("version"));
        }
        let count = reader.u32("number of options")?;
        let mut unknown = Vec::new();
        for _ in 0..count {
            // Ends at the first one that is not there, so the count reserves nothing.
            unknown.push(reader.cstr("option")?);
        }
        reader.end().map(|()| Self { minor: word as u16, unknown })
    }
}

/// Appends AuthenticationOk.
pub fn put_authentication_ok(out: &mut BytesMut) {
    put_plain(out, b'R', &0u32.to_be_bytes());
}

/// Appends AuthenticationCleartextPassword.
pub fn put_authentication_cleartext(out: &mut BytesMut) {
    put_plain(out, b'R', &3u32.to_be_bytes());
}

/// Appends AuthenticationMD5Password.
pub fn put_authentication_md5(salt: [u8; 4], out: &mut BytesMut) {
    let [a, b, c, d] = salt;
    put_plain(out, b'R', &[0, 0, 0, 5, a, b, c, d]);
}

/// Appends AuthenticationSASL with the mechanisms offered, the preferred one first.
pub fn put_authentication_sasl(mechanisms: &[&str], out: &mut BytesMut) -> Result<(), EncodeError> {
    put_message(out, b'R', |out| {
        out.put_u32(10);
        for name in mechanisms {
            if name.is_empty() {
                return Err(EncodeError::Empty { what: "mechanism" });
            }
            put_cstr(out, name.as_bytes(), "mechanism")?;
        }
        out.put_u8(0);
        Ok(())
    })
}

/// Appends AuthenticationSASLContinue.
pub fn put_authentication_sasl_continue(message: &[u8], out: &mut BytesMut) {
    put_authentication_data(11, message, out);
}

/// Appends AuthenticationSASLFinal.
pub fn put_authentication_sasl_final(message: &[u8], out: &mut BytesMut) {
    put_authentication_data(12, message, out);
}

fn put_authentication_data(kind: u32, message: &[u8], out: &mut BytesMut) {
    put_plain(out, b'R', &[&kind.to_be_bytes(), message].concat());
}

/// Appends ParameterStatus.
pub fn put_parameter_status(
    name: &[u8],
    value: &[u8],
    out: &mut BytesMut,
) -> Result<(), EncodeError> {
    put_message(out, b'S', |out| {
        put_cstr(out, name, "parameter name")?;
        put_cstr(out, value, "parameter value")
    })
}

/// Appends ReadyForQuery.
pub fn put_ready_for_query(status: TransactionStatus, out: &mut BytesMut) {
    put_plain(out, b'Z', &[status.as_byte()]);
}

/// Appends CommandComplete.
pub fn put_command_complete(tag: &str, out: &mut BytesMut) -> Result<(), EncodeError> {
    put_message(out, b'C', |out| put_cstr(out, tag.as_bytes(), "tag"))
}

/// Appends EmptyQueryResponse.
pub fn put_empty_query_response(out: &mut BytesMut) {
    put_plain(out, b'I', b"");
}

/// Appends ParseComplete.
pub fn put_parse_complete(out: &mut BytesMut) {
    put_plain(out, b'1', b"");
}

/// Appends BindComplete.
pub fn put_bind_complete(out: &mut BytesMut) {
    put_plain(out, b'2', b"");
}

/// Appends CloseComplete.
pub fn put_close_complete(out: &mut BytesMut) {
    put_plain(out, b'3', b"");
}

/// Appends NoData.
pub fn put_no_data(out: &mut BytesMut) {
    put_plain(out, b'n', b"");
}

/// Appends RowDescription of text columns without a table (type text, OID 25).
pub fn put_text_row_description(columns: &[&str], out: &mut BytesMut) -> Result<(), EncodeError> {
    put_message(out, b'T', |out| {
        out.put_u16(u16::try_from(columns.len()).map_err(|_| EncodeError::TooLong)?);
        for name in columns {
            put_cstr(out, name.as_bytes(), "column name")?;
            out.put_u32(0);
            out.put_u16(0);
            out.put_u32(25);
            out.put_i16(-1);
            out.put_i32(-1);
            out.put_u16(0);
        }
        Ok(())
    })
}

/// Appends DataRow.
pub fn put_data_row(values: &[Option<&[u8]>], out: &mut BytesMut) -> Result<(), EncodeError> {
    put_message(out, b'D', |out| {
        out.put_u16(u16::try_from(values.len()).map_err(|_| EncodeError::TooLong)?);
        for value in values {
            let len = value.map_or(Ok(-1), |v| i32::try_from(v.len()));
            out.put_i32(len.map_err(|_| EncodeError::TooLong)?);
            out.put_slice(value.unwrap_or_default());
        }
        Ok(())
    })
}

/// Fuzz entry: whatever the bytes, no view panics.
pub fn fuzz_backend(body: &[u8]) {
    if let Ok(Authentication::Sasl(mechanisms)) = Authentication::parse(body) {
        assert!(mechanisms.iter().all(|name| !name.is_empty()));
    }
    let _ = (parameter_status(body), BackendKey::parse(body), ready_for_query(body));
    let _ = (command_complete(body).map(|tag| (tag.kind(), tag.rows())), data_row(body));
    let _ = (Notification::parse(body), NegotiatedVersion::parse(body));
}

//! Messages of clients: borrowed views with bounds checks, and the messages that the proxy sends in a
//! client's place.
//!
//! A view is parsed from a body, or from the prefix of one that [`crate::frame::Scanner`] shows;
//! what lies behind the fields of a view is not looked at. Names and texts are bytes: they are
//! in the client's encoding.
//!
//! Format: `/docs/current/protocol-message-formats.html`.

use bytes::{BufMut, BytesMut};

use crate::frame::Seen;
use crate::wire::{DecodeError, EncodeError, Reader, put_cstr, put_message, put_plain};

mod functions;
mod sql;
#[cfg(test)]
mod tests;
mod tokens;

pub use functions::calls_unknown;
pub use sql::{
    StatementKind, fate_of, fuzz_sql, is_single_statement, may_end_transaction,
    may_touch_session_state, statement_kind,
};
pub use tokens::{Token, Tokens, statements};

/// Whether a server cannot read a message that a client sent, so that it answers with an error (08P01) whatever else
/// holds: a field is cut short, unknown or missing, or bytes are left. Of a body that is not whole only what its
/// beginning tells. A Bind is read up to its names, for what follows is not for the proxy.
pub fn is_malformed(seen: &Seen<'_>) -> bool {
    let body = seen.body;
    match seen.tag {
        b'Q' => match memchr::memchr(0, body) {
            Some(end) => end as u32 + 5 != seen.len,
            None => seen.is_whole(),
        },
        b'H' | b'S' => seen.len != 4,
        _ if !seen.is_whole() => false,
        b'P' => parse(body).is_err(),
        b'B' => Bind::parse(body).is_err(),
        b'C' | b'D' => Target::parse(body).is_err(),
        b'E' => Execute::parse(body).is_err(),
        _ => false,
    }
}

/// A whole Parse: its name, its text, the types of its parameters.
fn parse(body: &[u8]) -> Result<(), DecodeError> {
    let mut reader = Reader::new("Parse", body);
    reader.cstr("statement name")?;
    reader.cstr("text")?;
    let types = reader.u16("number of types")?;
    reader.bytes(4 * usize::from(types), "types")?;
    reader.end()
}

/// Text of a simple query, without its NUL.
pub fn query(body: &[u8]) -> Result<&[u8], DecodeError> {
    let mut reader = Reader::new("Query", body);
    let sql = reader.cstr("text")?;
    reader.end().map(|()| sql)
}

/// The text as far as a prefix of the body has it. The second value tells whether it is whole.
pub fn query_prefix(body: &[u8]) -> (&[u8], bool) {
    match memchr::memchr(0, body).and_then(|end| body.get(..end)) {
        Some(sql) => (sql, true),
        None => (body, false),
    }
}

/// The beginning of a Parse.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ParseMessage<'a> {
    /// Name of the statement; empty for the unnamed one.
    pub statement: &'a [u8],
    /// Text of the statement, as far as it has arrived.
    pub sql: &'a [u8],
    /// Whether the text is whole.
    pub is_whole: bool,
}

impl<'a> ParseMessage<'a> {
    /// Reads a body or a prefix of it; the name must be whole.
    pub fn parse(body: &'a [u8]) -> Result<Self, DecodeError> {
        let mut reader = Reader::new("Parse", body);
        let statement = reader.cstr("statement name")?;
        let (sql, is_whole) = query_prefix(reader.remainder());
        Ok(Self { statement, sql, is_whole })
    }
}

/// The beginning of a Bind.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Bind<'a> {
    /// Name of the portal; empty for the unnamed one.
    pub portal: &'a [u8],
    /// Name of the statement; empty for the unnamed one.
    pub statement: &'a [u8],
}

impl<'a> Bind<'a> {
    /// Reads a body or a prefix of it; both names must be whole.
    pub fn parse(body: &'a [u8]) -> Result<Self, DecodeError> {
        let mut reader = Reader::new("Bind", body);
        Ok(Self { portal: reader.cstr("portal name")?, statement: reader.cstr("statement name")? })
    }
}

/// Object of a Describe or Close.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Target<'a> {
    /// A prepared statement; empty for the unnamed one.
    Statement(&'a [u8]),
    /// A portal; empty for the unnamed one.
    Portal(&'a [u8]),
}

impl<'a> Target<'a> {
    /// Reads the body of a Describe or Close.
    pub fn parse(body: &'a [u8]) -> Result<Self, DecodeError> {
        let mut reader = Reader::new("Describe or Close", body);
        let kind = reader.u8("kind")?;
        let name = reader.cstr("name")?;
        let target = match kind {
            b'S' => Self::Statement(name),
            b'P' => Self::Portal(name),
            _ => return Err(reader.invalid("kind")),
        };
        reader.end().map(|()| target)
    }
}

/// An Execute.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Execute<'a> {
    /// Name of the portal; empty for the unnamed one.
    pub portal: &'a [u8],
    /// Rows to send before the portal is suspended; 0 for all.
    pub max_rows: u32,
}

impl<'a> Execute<'a> {
    /// Reads a body.
    pub fn parse(body: &'a [u8]) -> Result<Self, DecodeError> {
        let mut reader = Reader::new("Execute", body);
        let execute = Self { portal: reader.cstr("portal name")?, max_rows: reader.u32("rows")? };
        reader.end().map(|()| execute)
    }
}

/// The password of a PasswordMessage, without its NUL.
pub fn password(body: &[u8]) -> Result<&[u8], DecodeError> {
    let mut reader = Reader::new("PasswordMessage", body);
    let password = reader.cstr("password")?;
    reader.end().map(|()| password)
}

/// The first message of a SASL exchange.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SaslInitialResponse<'a> {
    /// The mechanism chosen.
    pub mechanism: &'a [u8],
    /// The mechanism's own first message; `None` if it has none.
    pub response: Option<&'a [u8]>,
}

impl<'a> SaslInitialResponse<'a> {
    /// Reads a body.
    pub fn parse(body: &'a [u8]) -> Result<Self, DecodeError> {
        let mut reader = Reader::new("SASLInitialResponse", body);
        let mechanism = reader.cstr("mechanism")?;
        let response = match reader.u32("response length")? {
            u32::MAX => None,
            len => Some(reader.bytes(len as usize, "response")?),
        };
        reader.end().map(|()| Self { mechanism, response })
    }
}

/// The reason in a CopyFail.
pub fn copy_fail(body: &[u8]) -> Result<&[u8], DecodeError> {
    let mut reader = Reader::new("CopyFail", body);
    let reason = reader.cstr("reason")?;
    reader.end().map(|()| reason)
}

/// Appends a Query.
pub fn put_query(sql: &[u8], out: &mut BytesMut) -> Result<(), EncodeError> {
    put_message(out, b'Q', |out| put_cstr(out, sql, "query"))
}

/// Appends a Parse. Types by their OIDs; 0 leaves one to the server.
pub fn put_parse(
    statement: &[u8],
    sql: &[u8],
    types: &[u32],
    out: &mut BytesMut,
) -> Result<(), EncodeError> {
    put_message(out, b'P', |out| {
        put_cstr(out, statement, "statement name")?;
        put_cstr(out, sql, "query")?;
        put_count(out, types.len())?;
        types.iter().for_each(|oid| out.put_u32(*oid));
        Ok(())
    })
}

/// Appends a Bind with parameters in text format (`None` is NULL) and results in text format.
pub fn put_bind(
    portal: &[u8],
    statement: &[u8],
    values: &[Option<&[u8]>],
    out: &mut BytesMut,
) -> Result<(), EncodeError> {
    put_message(out, b'B', |out| {
        put_cstr(out, portal, "portal name")?;
        put_cstr(out, statement, "statement name")?;
        out.put_u16(0);
        put_count(out, values.len())?;
        for value in values {
            let len = value.map_or(Ok(-1), |v| i32::try_from(v.len()));
            out.put_i32(len.map_err(|_| EncodeError::TooLong)?);
            out.put_slice(value.unwrap_or_default());
        }
        out.put_u16(0);
        Ok(())
    })
}

/// Appends a Describe.
pub fn put_describe(target: Target<'_>, out: &mut BytesMut) -> Result<(), EncodeError> {
    put_target(b'D', target, out)
}

/// Appends a Close.
pub fn put_close(target: Target<'_>, out: &mut BytesMut) -> Result<(), EncodeError> {
    put_target(b'C', target, out)
}

fn put_target(tag: u8, target: Target<'_>, out: &mut BytesMut) -> Result<(), EncodeError> {
    put_message(out, tag, |out| {
        let (kind, name) = match target {
            Target::Statement(name) => (b'S', name),
            Target::Portal(name) => (b'P', name),
        };
        out.put_u8(kind);
        put_cstr(out, name, "name")
    })
}

/// Appends an Execute; 0 rows means all.
pub fn put_execute(portal: &[u8], max_rows: u32, out: &mut BytesMut) -> Result<(), EncodeError> {
    put_message(out, b'E', |out| {
        put_cstr(out, portal, "portal name")?;
        out.put_u32(max_rows);
        Ok(())
    })
}

/// Appends a Sync.
pub fn put_sync(out: &mut BytesMut) {
    put_plain(out, b'S', b"");
}

/// Appends a Flush.
pub fn put_flush(out: &mut BytesMut) {
    put_plain(out, b'H', b"");
}

/// Appends a Terminate.
pub fn put_terminate(out: &mut BytesMut) {
    put_plain(out, b'X', b"");
}

/// Appends a CopyDone (of either side).
pub fn put_copy_done(out: &mut BytesMut) {
    put_plain(out, b'c', b"");
}

/// Appends a CopyFail.
pub fn put_copy_fail(reason: &[u8], out: &mut BytesMut) -> Result<(), EncodeError> {
    put_message(out, b'f', |out| put_cstr(out, reason, "reason"))
}

/// Appends a PasswordMessage: clear text, or the answer to an md5 challenge.
pub fn put_password(password: &[u8], out: &mut BytesMut) -> Result<(), EncodeError> {
    put_message(out, b'p', |out| put_cstr(out, password, "password"))
}

/// Appends a SASLInitialResponse.
pub fn put_sasl_initial_response(
    mechanism: &[u8],
    response: &[u8],
    out: &mut BytesMut,
) -> Result<(), EncodeError> {
    put_message(out, b'p', |out| {
        put_cstr(out, mechanism, "mechanism")?;
        out.put_i32(i32::try_from(response.len()).map_err(|_| EncodeError::TooLong)?);
        out.put_slice(response);
        Ok(())
    })
}

/// Appends a SASLResponse.
pub fn put_sasl_response(response: &[u8], out: &mut BytesMut) -> Result<(), EncodeError> {
    put_message(out, b'p', |out| {
        out.put_slice(response);
        Ok(())
    })
}

fn put_count(out: &mut BytesMut, n: usize) -> Result<(), EncodeError> {
    out.put_u16(u16::try_from(n).map_err(|_| EncodeError::TooLong)?);
    Ok(())
}

/// Fuzz entry: whatever the bytes, no view panics.
pub fn fuzz_frontend(body: &[u8]) {
    let _ = (query(body), query_prefix(body), ParseMessage::parse(body), Bind::parse(body));
    let _ = (Target::parse(body), Execute::parse(body), password(body), copy_fail(body));
    let _ = SaslInitialResponse::parse(body);
}

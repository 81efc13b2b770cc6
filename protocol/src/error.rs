//! ErrorResponse and NoticeResponse: fields to send, and a view of fields received.
//!
//! Format: `/docs/current/protocol-error-fields.html`. A peer may leave out any field, the
//! SQLSTATE included (CVE-2026-6666 was a null pointer behind a missing one), so each is
//! optional in [`ErrorView`].

use std::borrow::Cow;

use bytes::{BufMut, BytesMut};

use crate::limits::MAX_ERROR_FIELDS;
use crate::sqlstate::{INTERNAL_ERROR, SqlState};
use crate::wire::{DecodeError, Reader};

/// How bad it is; what a client does first depends on this word.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Severity {
    /// The statement failed, the session goes on.
    Error,
    /// The session ends.
    Fatal,
    /// All sessions of the server end.
    Panic,
    /// A notice: something may be wrong.
    Warning,
    /// A notice.
    Notice,
    /// A notice for debugging.
    Debug,
    /// A notice that was asked for.
    Info,
    /// A notice for the log.
    Log,
}

impl Severity {
    /// The word on the wire, never localized.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Error => "ERROR",
            Self::Fatal => "FATAL",
            Self::Panic => "PANIC",
            Self::Warning => "WARNING",
            Self::Notice => "NOTICE",
            Self::Debug => "DEBUG",
            Self::Info => "INFO",
            Self::Log => "LOG",
        }
    }

    /// The severity of a word, if it is one of PostgreSQL's.
    pub fn from_bytes(word: &[u8]) -> Option<Self> {
        Some(match word {
            b"ERROR" => Self::Error,
            b"FATAL" => Self::Fatal,
            b"PANIC" => Self::Panic,
            b"WARNING" => Self::Warning,
            b"NOTICE" => Self::Notice,
            b"DEBUG" => Self::Debug,
            b"INFO" => Self::Info,
            b"LOG" => Self::Log,
            _ => return None,
        })
    }

    /// Whether the sender closes the connection after it.
    pub fn ends_session(self) -> bool {
        matches!(self, Self::Fatal | Self::Panic)
    }
}

/// An error or notice of our own making. Texts are in English, name no addresses, no SQL.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ErrorFields {
    /// How bad it is.
    pub severity: Severity,
    /// The code that drivers act upon.
    pub sqlstate: SqlState,
    /// One line for a person.
    pub message: Cow<'static, str>,
    /// More for a person, if there is more.
    pub detail: Option<Cow<'static, str>>,
    /// Advice to the user.
    pub hint: Option<Cow<'static, str>>,
    /// The name under which our source can be searched; PostgreSQL's `routine` field.
    pub routine: Option<&'static str>,
}

impl ErrorFields {
    /// An error or notice with its message and nothing more.
    pub fn new(
        severity: Severity,
        sqlstate: SqlState,
        message: impl Into<Cow<'static, str>>,
    ) -> Self {
        let message = message.into();
        Self { severity, sqlstate, message, detail: None, hint: None, routine: None }
    }

    /// An error after which the session goes on.
    pub fn error(sqlstate: SqlState, message: impl Into<Cow<'static, str>>) -> Self {
        Self::new(Severity::Error, sqlstate, message)
    }

    /// An error after which we close.
    pub fn fatal(sqlstate: SqlState, message: impl Into<Cow<'static, str>>) -> Self {
        Self::new(Severity::Fatal, sqlstate, message)
    }

    /// Adds a detail.
    #[must_use]
    pub fn detail(mut self, text: impl Into<Cow<'static, str>>) -> Self {
        self.detail = Some(text.into());
        self
    }

    /// Adds a hint.
    #[must_use]
    pub fn hint(mut self, text: impl Into<Cow<'static, str>>) -> Self {
        self.hint = Some(text.into());
        self
    }

    /// Adds the name of the place it comes from.
    #[must_use]
    pub fn routine(mut self, name: &'static str) -> Self {
        self.routine = Some(name);
        self
    }

    /// Appends an ErrorResponse, or a NoticeResponse if the severity is a notice's. A NUL in a
    /// text becomes a blank: it would end the field and begin another.
    pub fn put(&self, out: &mut BytesMut) {
        let mut body = Vec::with_capacity(64 + self.message.len());
        let word = self.severity.as_str();
        let fields = [
            (b'S', Some(word)),
            (b'V', Some(word)),
            (b'C', Some(self.sqlstate.as_str())),
            (b'M', Some(self.message.as_ref())),
            (b'D', self.detail.as_deref()),
            (b'H', self.hint.as_deref()),
            (b'R', self.routine),
        ];
        for (code, text) in fields {
            let Some(text) = text else { continue };
            body.push(code);
            body.extend(text.bytes().map(|b| if b == 0 { b' ' } else { b }));
            body.push(0);
        }
        body.push(0);
        let is_error = matches!(self.severity, Severity::Error | Severity::Fatal | Severity::Panic);
        out.put_u8(if is_error { b'E' } else { b'N' });
        out.put_u32(4 + body.len() as u32);
        out.put_slice(&body);
    }
}

/// The fields of an error or notice that a server sent. Bytes are as they came, in the encoding
/// of the session; a repeated field counts once, the first time.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ErrorView<'a> {
    severity_local: Option<&'a [u8]>,
    severity: Option<&'a [u8]>,
    /// Five characters, if they came (`C`).
    pub code: Option<&'a [u8]>,
    /// One line for a person (`M`).
    pub message: Option<&'a [u8]>,
    /// More (`D`).
    pub detail: Option<&'a [u8]>,
    /// Advice to the user (`H`).
    pub hint: Option<&'a [u8]>,
    /// The function of the server's source that reported it (`R`).
    pub routine: Option<&'a [u8]>,
}

impl<'a> ErrorView<'a> {
    /// Reads the body of an ErrorResponse or NoticeResponse.
    pub fn parse(body: &'a [u8]) -> Result<Self, DecodeError> {
        let mut reader = Reader::new("ErrorResponse", body);
        let mut view = Self::default();
        for _ in 0..MAX_ERROR_FIELDS {
            let code = reader.u8("field type")?;
            if code == 0 {
                return reader.end().map(|()| view);
            }
            let text = reader.cstr("field")?;
            view.set(code, text);
        }
        Err(reader.invalid("number of fields"))
    }

    /// Reads what there is of a body that was cut off: fields that are whole count, the rest is
    /// as if it had not been sent.
    pub fn parse_prefix(body: &'a [u8]) -> Self {
        let mut reader = Reader::new("ErrorResponse", body);
        let mut view = Self::default();
        for _ in 0..MAX_ERROR_FIELDS {
            let Ok(code) = reader.u8("field type") else { break };
            if code == 0 {
                break;
            }
            let Ok(text) = reader.cstr("field") else { break };
            view.set(code, text);
        }
        view
    }

    fn set(&mut self, code: u8, text: &'a [u8]) {
        let slot = match code {
            b'S' => &mut self.severity_local,
            b'V' => &mut self.severity,
            b'C' => &mut self.code,
            b'M' => &mut self.message,
            b'D' => &mut self.detail,
            b'H' => &mut self.hint,
            b'R' => &mut self.routine,
            _ => return,
        };
        slot.get_or_insert(text);
    }

    /// The severity: of the field that is never localized, else of the one that may be.
    /// An unknown word counts as FATAL, which makes nobody rely on the session.
    pub fn severity(&self) -> Severity {
        self.severity
            .or(self.severity_local)
            .and_then(Severity::from_bytes)
            .unwrap_or(Severity::Fatal)
    }

    /// The SQLSTATE; XX000 if it is missing or is none.
    pub fn sqlstate(&self) -> SqlState {
        self.code.and_then(SqlState::from_bytes).unwrap_or(INTERNAL_ERROR)
    }
}

/// Fuzz entry: whatever the bytes, never panic; a whole reading and one of a prefix agree.
pub fn fuzz_error_view(input: &[u8]) {
    let loose = ErrorView::parse_prefix(input);
    if let Ok(strict) = ErrorView::parse(input) {
        assert_eq!(strict, loose);
    }
    let _ = (loose.severity(), loose.sqlstate());
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::frame::take_frame;
    use crate::sqlstate::{ADMIN_SHUTDOWN, SERIALIZATION_FAILURE, WARNING};

    fn body_of(fields: &ErrorFields) -> (u8, Vec<u8>) {
        let mut out = BytesMut::new();
        fields.put(&mut out);
        let frame = take_frame(&mut out, 4096).unwrap().unwrap();
        assert!(out.is_empty());
        (frame.tag, frame.body.to_vec())
    }

    #[test]
    fn an_error_reads_back_as_it_was_written() {
        let fields = ErrorFields::error(SERIALIZATION_FAILURE, "retry the transaction")
            .detail("the primary changed")
            .hint("run it again")
            .routine("hold");
        let (tag, body) = body_of(&fields);
        assert_eq!(tag, b'E');
        let view = ErrorView::parse(&body).unwrap();
        assert_eq!(view.severity(), Severity::Error);
        assert_eq!(view.sqlstate(), SERIALIZATION_FAILURE);
        assert_eq!(view.message, Some(&b"retry the transaction"[..]));
        assert_eq!(view.detail, Some(&b"the primary changed"[..]));
        assert_eq!(view.hint, Some(&b"run it again"[..]));
        assert_eq!(view.routine, Some(&b"hold"[..]));
    }

    #[test]
    fn a_notice_has_its_own_tag() {
        assert_eq!(body_of(&ErrorFields::new(Severity::Warning, WARNING, "w")).0, b'N');
        assert_eq!(body_of(&ErrorFields::fatal(ADMIN_SHUTDOWN, "bye")).0, b'E');
    }

    #[test]
    fn a_nul_in_a_text_cannot_begin_another_field() {
        let (_, body) = body_of(&ErrorFields::error(WARNING, "a\0Cb"));
        let view = ErrorView::parse(&body).unwrap();
        assert_eq!(view.message, Some(&b"a Cb"[..]));
        assert_eq!(view.sqlstate(), WARNING);
    }

    #[test]
    fn an_error_without_a_sqlstate_is_an_internal_error() {
        // CVE-2026-6666
        let view = ErrorView::parse(b"SERROR\0Mboom\0\0").unwrap();
        assert_eq!(view.sqlstate(), INTERNAL_ERROR);
        assert_eq!(view.severity(), Severity::Error);
        let nothing = ErrorView::parse(b"\0").unwrap();
        assert_eq!((nothing.severity(), nothing.sqlstate()), (Severity::Fatal, INTERNAL_ERROR));
    }

    #[test]
    fn malformed_bodies_are_refused_and_their_whole_fields_still_read() {
        for body in [&b""[..], b"S", b"SERROR", b"SERROR\0", b"SERROR\0\0x"] {
            assert!(ErrorView::parse(body).is_err(), "{body:?}");
        }
        let cut = ErrorView::parse_prefix(b"SFATAL\0VFATAL\0C57P01\0Mterminat");
        assert_eq!((cut.severity(), cut.sqlstate()), (Severity::Fatal, ADMIN_SHUTDOWN));
        assert_eq!(cut.message, None);
    }
}

//! Reading and writing the few data types of the protocol, with bounds.

use bytes::{BufMut, BytesMut};

/// Why a message could not be written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum EncodeError {
    /// A string holds a NUL byte, which would end it early and turn the rest into other fields.
    #[error("the {what} holds a NUL byte")]
    NulInString {
        /// Which string.
        what: &'static str,
    },
    /// The message would be longer than its kind may be.
    #[error("the message is too long")]
    TooLong,
    /// A name that must not be empty is.
    #[error("the {what} is empty")]
    Empty {
        /// Which name.
        what: &'static str,
    },
    /// A cancel key is shorter or longer than the protocol allows.
    #[error("the cancel key has {len} bytes")]
    KeyLength {
        /// Length of the field.
        len: usize,
    },
}

/// Why a framed message could not be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum DecodeError {
    /// A field reaches beyond the end of its message.
    #[error("the message {message} ends inside its {field}")]
    Truncated {
        /// Name of the message.
        message: &'static str,
        /// Name of the field.
        field: &'static str,
    },
    /// Bytes are left after the last field.
    #[error("the message {message} has bytes after its last field")]
    Trailing {
        /// Name of the message.
        message: &'static str,
    },
    /// A field has a value that the protocol does not know.
    #[error("the message {message} has an invalid {field}")]
    Invalid {
        /// Name of the message.
        message: &'static str,
        /// Name of the field.
        field: &'static str,
    },
}

/// A cursor over one message's body. Every read is checked.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Reader<'a> {
    message: &'static str,
    rest: &'a [u8],
}

impl<'a> Reader<'a> {
    pub(crate) fn new(message: &'static str, body: &'a [u8]) -> Self {
        Self { message, rest: body }
    }

    pub(crate) fn u8(&mut self, field: &'static str) -> Result<u8, DecodeError> {
        self.array::<1>(field).map(|[b]| b)
    }

    pub(crate) fn u16(&mut self, field: &'static str) -> Result<u16, DecodeError> {
        self.array(field).map(u16::from_be_bytes)
    }

    pub(crate) fn u32(&mut self, field: &'static str) -> Result<u32, DecodeError> {
        self.array(field).map(u32::from_be_bytes)
    }

    pub(crate) fn array<const N: usize>(
        &mut self,
        field: &'static str,
    ) -> Result<[u8; N], DecodeError> {
        let (head, rest) =
            self.rest.split_first_chunk::<N>().ok_or_else(|| self.truncated(field))?;
        self.rest = rest;
        Ok(*head)
    }

    pub(crate) fn bytes(&mut self, n: usize, field: &'static str) -> Result<&'a [u8], DecodeError> {
        let (head, rest) = self.rest.split_at_checked(n).ok_or_else(|| self.truncated(field))?;
        self.rest = rest;
        Ok(head)
    }

    /// A string up to its NUL, which is taken and not returned.
    pub(crate) fn cstr(&mut self, field: &'static str) -> Result<&'a [u8], DecodeError> {
        let end = memchr::memchr(0, self.rest).ok_or_else(|| self.truncated(field))?;
        let text = self.bytes(end, field)?;
        self.u8(field)?;
        Ok(text)
    }

    /// All that is left.
    pub(crate) fn remainder(&mut self) -> &'a [u8] {
        std::mem::take(&mut self.rest)
    }

    /// Refuses bytes behind the last field.
    pub(crate) fn end(self) -> Result<(), DecodeError> {
        if self.rest.is_empty() {
            Ok(())
        } else {
            Err(DecodeError::Trailing { message: self.message })
        }
    }

    pub(crate) fn invalid(&self, field: &'static str) -> DecodeError {
        DecodeError::Invalid { message: self.message, field }
    }

    fn truncated(&self, field: &'static str) -> DecodeError {
        DecodeError::Truncated { message: self.message, field }
    }
}

/// Writes one tagged message: `body` appends, the length word is set afterwards. On an error
/// `out` is as before.
pub(crate) fn put_message<E: From<EncodeError>>(
    out: &mut BytesMut,
    tag: u8,
    body: impl FnOnce(&mut BytesMut) -> Result<(), E>,
) -> Result<(), E> {
    let start = out.len();
    out.put_u8(tag);
    put_sized(out, body).inspect_err(|_| out.truncate(start))
}

/// Writes a packet without a tag, as [`put_message`].
pub(crate) fn put_sized<E: From<EncodeError>>(
    out: &mut BytesMut,
    body: impl FnOnce(&mut BytesMut) -> Result<(), E>,
) -> Result<(), E> {
    let start = out.len();
    out.put_u32(0);
    let written = body(out).and_then(|()| {
        let len = u32::try_from(out.len() - start).map_err(|_| E::from(EncodeError::TooLong))?;
        if len > crate::limits::MAX_LARGE_MESSAGE_LEN {
            return Err(E::from(EncodeError::TooLong));
        }
        if let Some(word) = out.get_mut(start..start + 4) {
            word.copy_from_slice(&len.to_be_bytes());
        }
        Ok(())
    });
    written.inspect_err(|_| out.truncate(start))
}

/// Writes a message whose body cannot fail and is short.
pub(crate) fn put_plain(out: &mut BytesMut, tag: u8, body: &[u8]) {
    out.reserve(5 + body.len());
    out.put_u8(tag);
    out.put_u32(4 + body.len() as u32);
    out.put_slice(body);
}

/// Writes a string and its NUL.
pub(crate) fn put_cstr(
    out: &mut BytesMut,
    text: &[u8],
    what: &'static str,
) -> Result<(), EncodeError> {
    if memchr::memchr(0, text).is_some() {
        return Err(EncodeError::NulInString { what });
    }
    out.put_slice(text);
    out.put_u8(0);
    Ok(())
}

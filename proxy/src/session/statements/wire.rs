//! The messages that are put in place of a client's.

use bytes::BufMut;

use super::PREFIX;

/// The name of a number of ours.
pub(super) fn name_of(number: u32) -> Box<[u8]> {
    format!("{PREFIX}{number}").into_bytes().into_boxed_slice()
}

/// Appends a Parse under a name of ours; `body` is its body without the name.
pub(super) fn put_parse(number: u32, body: &[u8], out: &mut Vec<u8>) {
    put_named(&name_of(number), body, out);
}

/// Appends a Parse of the unnamed statement.
pub(super) fn put_unnamed(body: &[u8], out: &mut Vec<u8>) {
    put_named(b"", body, out);
}

fn put_named(name: &[u8], body: &[u8], out: &mut Vec<u8>) {
    out.put_u8(b'P');
    out.put_u32((4 + name.len() + 1 + body.len()) as u32);
    out.put_slice(name);
    out.put_u8(0);
    out.put_slice(body);
}

/// Appends a Close or Describe of a statement.
pub(super) fn put_target(tag: u8, name: &[u8], out: &mut Vec<u8>) {
    out.put_u8(tag);
    out.put_u32((4 + 1 + name.len() + 1) as u32);
    out.put_u8(b'S');
    out.put_slice(name);
    out.put_u8(0);
}

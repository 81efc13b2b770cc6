//! The parts of two answers that are compared.

use kornak_protocol::frame::Frame;

/// In a transaction that has failed nothing can be prepared any more, so that a pooled connection that lacks a
/// statement can neither describe it nor say what is wrong with a Bind of it (docs/pooling.md): its error is
/// taken for the description, and for any other error.
pub(super) fn describes_nothing_in_failed_transactions(direct: &mut Vec<Frame>, proxied: &[Frame]) {
    let is = |frame: &Frame, code: &[u8; 6]| {
        frame.tag == b'E' && frame.body.windows(6).any(|it| it == code)
    };
    let is_failed = |frame: &Frame| is(frame, b"C25P02");
    for at in 0.. {
        let Some(told) = proxied.get(at) else { return };
        // A statement that is prepared again on another connection, under the search path of now, is refused before
        // it is described.
        let described = direct.get(at).is_some_and(|it| it.tag == b't');
        if described && is(told, b"C42P01") && direct.get(at + 2) == Some(told) {
            direct.drain(at..at + 2);
        }
        // What is wrong with a Bind is said behind what is wrong with its text, which is prepared again.
        if let Some(error) = direct.get_mut(at).filter(|it| told.tag == b'E' && is(it, b"C08P01")) {
            *error = told.clone();
        }
        if direct.get(at).is_some_and(|it| matches!(it.tag, b't' | b'E')) && is_failed(told) {
            let rest = direct.get(at..).unwrap_or_default();
            let end = rest.iter().position(|it| matches!(it.tag, b'E' | b'Z')).unwrap_or(0);
            direct.splice(at..at + end, []);
            match direct.get_mut(at).filter(|it| it.tag == b'E') {
                Some(error) => *error = told.clone(),
                None => direct.insert(at, told.clone()),
            }
        }
    }
}

/// Without what a pool shows by nature: process ids in notifications, numbers of tables that were made
/// later, and in which function a server noticed an error first.
pub(super) fn comparable(frame: Frame) -> Frame {
    let body = match frame.tag {
        b'A' => [b"own:", frame.body.get(4..).unwrap_or_default()].concat(),
        b'E' | b'N' => {
            let fields = frame.body.split(|byte| *byte == 0);
            let kept = fields.filter(|field| field.first().is_some_and(|it| !b"FLR".contains(it)));
            let mut body = kept.collect::<Vec<_>>().join(&0);
            // Of two names for one text an error may say the other.
            for at in 1..body.len().saturating_sub(3) {
                if body[at - 1..].starts_with(b"\"s") && body[at + 2] == b'"' {
                    body[at + 1] = b'*';
                }
            }
            body
        }
        b'T' => without_tables(&frame.body).unwrap_or_else(|| frame.body.to_vec()),
        _ => return frame,
    };
    Frame { tag: frame.tag, body: body.into() }
}

/// A RowDescription that names no tables.
fn without_tables(body: &[u8]) -> Option<Vec<u8>> {
    let (count, mut rest) = body.split_at_checked(2)?;
    let mut out = count.to_vec();
    while !rest.is_empty() {
        let at = rest.iter().position(|byte| *byte == 0)? + 1;
        let (name, after) = rest.split_at_checked(at)?;
        let (fixed, after) = after.split_at_checked(18)?;
        out.extend_from_slice(name);
        out.extend_from_slice(fixed.get(6..)?);
        rest = after;
    }
    Some(out)
}

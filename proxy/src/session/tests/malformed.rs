//! Messages that no server can read.

use super::*;

/// Any message, with this body.
fn message(out: &mut BytesMut, tag: u8, body: &[u8]) {
    out.extend_from_slice(&[tag]);
    out.extend_from_slice(&(body.len() as u32 + 4).to_be_bytes());
    out.extend_from_slice(body);
}

const BATCHES: [(u8, &[u8]); 8] = [
    (b'P', b"s1\0SELECT 1\0"),
    (b'B', b"\0s1"),
    (b'D', b"Xs1\0"),
    (b'D', b""),
    (b'C', b"S"),
    (b'E', b"\0\0"),
    (b'E', b""),
    (b'H', b"x"),
];

#[test]
fn what_no_server_can_read_gets_an_error_and_keeps_nothing() {
    for (tag, body) in BATCHES {
        let mut play = Play::new();
        play.client(|out| message(out, tag, body)).query("SELECT 1").sync().failed().ready(Idle);
        assert!(play.0.is_quiet(), "{}", tag.escape_ascii());
        assert_eq!(play.0.pinned(), None, "{}", tag.escape_ascii());
    }
    for (tag, body) in [(b'Q', &b"SELECT 1"[..]), (b'Q', b""), (b'Q', b"A\0B\0"), (b'S', b"x")] {
        let mut play = Play::new();
        play.client(|out| message(out, tag, body)).failed().ready(Idle);
        assert!(play.0.is_quiet() && play.0.pinned().is_none(), "{}", tag.escape_ascii());
    }
    let mut play = Play::new();
    play.execute("s1", Some("SELECT 1")).sync().executed(true, "SELECT 1").ready(Idle);
    play.client(|out| message(out, b'P', b"s1\0SELECT 2\0")).sync().failed().ready(Idle);
    assert_eq!(play.replay(), ["s1: SELECT 1"]);
}

#[test]
fn a_dead_transaction_says_so_too() {
    for (tag, body) in BATCHES {
        let mut play = Play::new();
        play.done("BEGIN", "BEGIN", InBlock).lives(&[]);
        play.says(|out| message(out, tag, body), &["E 08P01"]);
        play.says(|out| message(out, tag, body), &[]).says(fe::put_sync, &["Z E"]);
        play.asks("SELECT 1", &["E 40001", "Z E"]).asks("ROLLBACK", &["C ROLLBACK", "Z I"]);
    }
    let mut play = Play::new();
    play.done("BEGIN", "BEGIN", InBlock).lives(&[]);
    play.says(|out| message(out, b'Q', b""), &["E 08P01", "Z E"]);
    play.says(|out| message(out, b'S', b"x"), &["E 08P01", "Z E"]);
    let mut play = Play::new();
    play.execute("", Some("INSERT INTO t VALUES (1)")).lives(&["E 08007"]);
    play.says(|out| message(out, b'S', b"x"), &["E 08P01", "Z I"]);
}

//! A session that its client leaves, or that a switchover waits for.

use super::*;

#[test]
fn only_a_cursor_with_hold_that_is_open_keeps_a_session() {
    let mut play = Play::new();
    play.query("BEGIN").server(|out| {
        be::put_command_complete("BEGIN", out).unwrap();
        be::put_ready_for_query(InBlock, out);
    });
    play.done("DECLARE c CURSOR WITHOUT HOLD FOR SELECT 'hold'", "DECLARE CURSOR", InBlock);
    play.done("COMMIT", "COMMIT", Idle);
    assert_eq!(play.0.pinned(), None);
    play.done("DECLARE c CURSOR WITH HOLD FOR SELECT 1", "DECLARE CURSOR", Idle);
    assert_eq!(play.0.pinned(), Some(Pin::HoldCursor));
    play.done("CLOSE c", "CLOSE CURSOR", Idle);
    assert_eq!(play.0.pinned(), None);
    play.done("BEGIN", "BEGIN", InBlock);
    play.done("DECLARE c CURSOR WITH HOLD FOR SELECT 1", "DECLARE CURSOR", InBlock);
    play.done("ROLLBACK AND CHAIN", "ROLLBACK", InBlock).done("COMMIT", "COMMIT", Idle);
    assert_eq!(play.0.pinned(), None);
    play.lives(&[]);
}

fn ignores(play: &Play, tag: u8, body: &[u8]) -> bool {
    let len = body.len() as u32 + 4;
    play.0.ignores(&Seen { tag, len, body: b"", start: None, end: None })
}

#[test]
fn a_copy_goes_on_under_a_closed_gate() {
    let mut play = Play::new();
    play.query("COPY t FROM STDIN");
    assert!(play.0.stands_between_batches(), "it may be anything");
    play.server(|out| out.extend_from_slice(b"G\0\0\0\x07\0\0\0"));
    assert!(!play.0.stands_between_batches(), "its client has to go on");
    play.client(|out| {
        out.extend_from_slice(b"d\0\0\0\x061\n");
        fe::put_copy_done(out);
    });
    assert!(play.0.stands_between_batches());
    play.complete("COPY 1").ready(Idle);
    assert!(play.0.is_quiet() && ignores(&play, b'd', b"x") && ignores(&play, b'H', b""));
    play.query("SELECT 1");
    assert!(!ignores(&play, b'H', b""));
}

#[test]
fn only_what_cannot_commit_may_be_cancelled() {
    let in_block = |sql: &str| {
        let mut play = Play::new();
        play.done("BEGIN", "BEGIN", InBlock).query(sql).0.cannot_commit()
    };
    assert!(in_block("UPDATE t SET a = 1"));
    assert!(!in_block("COMMIT"));
    assert!(!in_block("CALL p()"));
    assert!(!Play::new().query("INSERT INTO t VALUES (1)").0.cannot_commit());
    assert!(!Play::new().0.cannot_commit());
}

#[test]
fn an_empty_query_in_flight_may_be_said_again() {
    let mut play = Play::new();
    play.query("");
    assert!(play.0.is_harmless());
    play.done("BEGIN", "BEGIN", InBlock).query("-- nothing");
    assert!(!play.0.is_harmless());
}

#[test]
fn only_queries_are_run_again_on_another_standby() {
    let in_flight = |sql: &str| Play::new().query(sql).0.is_single_batch();
    assert!(in_flight("SELECT 1") && in_flight("SHOW x"));
    // Through a standby of a Citus coordinator they may write.
    for sql in
        ["INSERT INTO t VALUES (1)", "CALL p()", "COPY t TO PROGRAM 'x'", "SELECT 1; SELECT 2"]
    {
        assert!(!in_flight(sql), "{sql}");
    }
    let mut play = Play::new();
    play.execute("", Some("DELETE FROM t")).sync();
    assert!(!play.0.is_single_batch());
    let mut play = Play::new();
    play.done("INSERT INTO t VALUES (1)", "INSERT 0 1", Idle).execute("", Some("SELECT 1")).sync();
    assert!(play.0.is_single_batch());
}

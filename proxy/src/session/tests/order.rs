//! The settings of a session, told in the order in which the server applied them.

use std::sync::Arc;

use super::*;
use crate::session::pooled::ConnectionState;

/// An event: a simple query with the tags of its statements and the status behind it; a batch of the
/// extended protocol, `!` for the error that ends it.
#[derive(Clone, Copy)]
enum Step {
    Query(&'static str, &'static [&'static str], TransactionStatus),
    Batch(&'static [(&'static str, &'static str)], TransactionStatus),
}

use Step::{Batch, Query};

fn play(steps: &[Step]) -> Play {
    let mut play = Play::new();
    for step in steps {
        match step {
            Query(sql, tags, status) => {
                play.query(sql);
                for tag in *tags {
                    match *tag {
                        "!" => play.failed(),
                        tag => play.complete(tag),
                    };
                }
                play.ready(*status);
            }
            Batch(list, status) => {
                for (sql, _) in *list {
                    play.execute("", Some(sql));
                }
                play.sync();
                for (_, tag) in *list {
                    match *tag {
                        "!" => {
                            play.failed();
                            break;
                        }
                        tag => play.executed(true, tag),
                    };
                }
                play.ready(*status);
            }
        }
    }
    play
}

/// Stories, and the statements that make their settings again.
const STORIES: &[(&[Step], &[&str])] = &[
    (&[Query("/* tag */ SET my.a = 1", &["SET"], Idle)], &["/* tag */ SET my.a = 1"]),
    (&[Query("SET my.a = 1; SELECT 1", &["SET", "SELECT 1"], Idle)], &["SET my.a = 1"]),
    (&[Query("SELECT 1; SET my.a = 1; SELECT 1/0", &["SELECT 1", "SET", "!"], Idle)], &[]),
    (
        &[
            Query("BEGIN", &["BEGIN"], InBlock),
            Query("SET a = 1", &["SET"], InBlock),
            Query("COMMIT AND CHAIN", &["COMMIT"], InBlock),
            Query("SET b = 1", &["SET"], InBlock),
            Query("ROLLBACK", &["ROLLBACK"], Idle),
        ],
        &["SET a = 1"],
    ),
    (
        &[
            Query("BEGIN", &["BEGIN"], InBlock),
            Query("SET a = 1", &["SET"], InBlock),
            Query("ROLLBACK AND CHAIN", &["ROLLBACK"], InBlock),
            Query("SET b = 1", &["SET"], InBlock),
            Query("COMMIT", &["COMMIT"], Idle),
        ],
        &["SET b = 1"],
    ),
    (
        &[Batch(
            &[("BEGIN", "BEGIN"), ("SET a = 1", "SET"), ("COMMIT", "COMMIT"), ("SELECT 1/0", "!")],
            Idle,
        )],
        &["SET a = 1"],
    ),
    (
        &[Batch(&[("BEGIN", "BEGIN"), ("ROLLBACK", "ROLLBACK"), ("SET a = 1", "SET")], Idle)],
        &["SET a = 1"],
    ),
    (&[Batch(&[("SET a = 1", "SET"), ("SELECT 1/0", "!")], Idle)], &[]),
    (
        &[Query(
            "BEGIN; SET a = 1; SAVEPOINT s; SET b = 1; ROLLBACK TO s; SET c = 1; COMMIT",
            &["BEGIN", "SET", "SAVEPOINT", "SET", "ROLLBACK", "SET", "COMMIT"],
            Idle,
        )],
        &["SET a = 1", "SET c = 1"],
    ),
    (
        &[
            Query("BEGIN", &["BEGIN"], InBlock),
            Query("SAVEPOINT \"S\"", &["SAVEPOINT"], InBlock),
            Query("SET a = 1", &["SET"], InBlock),
            Query("SAVEPOINT s", &["SAVEPOINT"], InBlock),
            Query("SET b = 1", &["SET"], InBlock),
            Query("RELEASE SAVEPOINT s", &["RELEASE"], InBlock),
            Query("SELECT 1/0", &["!"], Failed),
            Query("ROLLBACK WORK TO SAVEPOINT \"S\"", &["ROLLBACK"], InBlock),
            Query("SET c = 1", &["SET"], InBlock),
            Query("END", &["COMMIT"], Idle),
        ],
        &["SET c = 1"],
    ),
    (
        &[
            Query("BEGIN", &["BEGIN"], InBlock),
            Query("SET a = 1", &["SET"], InBlock),
            Query("SELECT 1/0", &["!"], Failed),
            Query("COMMIT", &["ROLLBACK"], Idle),
        ],
        &[],
    ),
    (
        &[
            Query("SET a = 1", &["SET"], Idle),
            Query("BEGIN", &["BEGIN"], InBlock),
            Query("SET LOCAL a = 2", &["SET"], InBlock),
            Query("RESET b", &["RESET"], InBlock),
            Query("PREPARE TRANSACTION 'x'", &["PREPARE TRANSACTION"], Idle),
        ],
        &["SET a = 1"],
    ),
    (
        &[
            Query("SET TIME ZONE 'Asia/Tokyo'", &["SET"], Idle),
            Query("SET search_path = s1", &["SET"], Idle),
            Query("RESET TIME ZONE", &["RESET"], Idle),
            Query("RESET search_path /*application:Rails*/", &["RESET"], Idle),
        ],
        &[],
    ),
    (
        &[
            Query("SET ROLE a", &["SET"], Idle),
            Query("SET SESSION AUTHORIZATION bob", &["SET"], Idle),
            Query("SET ROLE c", &["SET"], Idle),
        ],
        &["SET SESSION AUTHORIZATION bob", "SET ROLE c"],
    ),
    (
        &[
            Query("SET SESSION AUTHORIZATION bob", &["SET"], Idle),
            Query("RESET SESSION AUTHORIZATION", &["RESET"], Idle),
        ],
        &[],
    ),
    (
        &[
            Query("SET my . a = 1", &["SET"], Idle),
            Query("SET my . b = 2", &["SET"], Idle),
            Query("SET a TO DEFAULT", &["SET"], Idle),
        ],
        &["SET my . a = 1", "SET my . b = 2"],
    ),
    (
        &[
            Query(
                "SET SESSION CHARACTERISTICS AS TRANSACTION ISOLATION LEVEL SERIALIZABLE",
                &["SET"],
                Idle,
            ),
            Query("SET SESSION CHARACTERISTICS AS TRANSACTION READ ONLY", &["SET"], Idle),
        ],
        &[
            "SET default_transaction_isolation = 'serializable'",
            "SET default_transaction_read_only = on",
        ],
    ),
];

#[test]
fn settings_are_followed_in_the_order_in_which_they_were_made() {
    for (steps, expected) in STORIES {
        let play = play(steps);
        assert_eq!(play.replay(), *expected);
        assert_eq!(play.0.pinned(), None, "{expected:?}");
    }
}

#[test]
fn what_is_out_of_sight_is_asked_for_or_keeps_the_connection() {
    for (sql, tag, unseen) in [
        ("DO $$ BEGIN SET my.a = 1; END $$", "DO", false),
        ("DO $$ BEGIN EXECUTE format('SET %I = 1', x); END $$", "DO", true),
        ("UPDATE pg_settings SET setting = 'x' WHERE name = 'search_path'", "UPDATE 0", false),
        ("SELECT pg_advisory_lock(1)", "SELECT 1", false),
    ] {
        let mut play = Play::new();
        play.done(sql, tag, Idle);
        assert_eq!(play.0.pinned(), Some(Pin::Opaque), "{sql}");
        play.0.examined(&NOTHING);
        assert_eq!(play.0.pinned(), unseen.then_some(Pin::Opaque), "{sql}");
    }
    let mut play = Play::new();
    play.done("DO $$ BEGIN SET my.a = 1; END $$", "DO", Idle);
    assert_eq!(play.0.custom().collect::<Vec<_>>(), [b"my.a"]);
    for (sql, is_asked) in [
        ("SELECT become_tenant(1)", true),
        ("SELECT * FROM app.count(1)", true),
        ("CALL p()", true),
        ("INSERT INTO t (a, b) VALUES (1, 2) ON CONFLICT (a) DO NOTHING", false),
        ("SELECT count(*), coalesce(max(a), 1) FROM t WHERE a IN (1, 2) AND b = any($1)", false),
        ("SELECT set_config('role', $1, true), set_config('request.jwt.claims', $2, true)", false),
        ("SELECT pg_advisory_xact_lock(1)", false),
    ] {
        let mut play = Play::new();
        play.done(sql, "SELECT 1", Idle);
        assert_eq!(play.0.must_be_asked(), is_asked, "{sql}");
        assert_eq!(play.0.pinned(), None, "{sql}");
        play.0.examined(&NOTHING);
        assert!(!play.0.must_be_asked());
    }
}

const NOTHING: journal::Examined<'static> = journal::Examined {
    locks: false,
    temporary: false,
    listens: false,
    channels: b"0\x02",
    prepared: false,
    hold_cursor: false,
    settings: b"",
    acts_as: None,
};

#[test]
fn prose_in_a_long_text_keeps_no_session() {
    let prose =
        format!("INSERT INTO t VALUES ('{}the set 5 of a set % or set ', 1)", "x".repeat(20_000));
    for text in [prose.clone(), prose.replace("xxx ", "\\'; SELECT 1; SELECT '")] {
        let mut play = Play::new();
        play.done(&text, "INSERT 0 1", Idle);
        assert_eq!(play.0.pinned(), None);
        assert!(play.0.must_be_asked());
    }
}

#[test]
fn a_deallocate_is_noticed_wherever_it_stands() {
    for (sql, tags) in [
        ("DEALLOCATE \"S_1\"", &["DEALLOCATE"][..]),
        ("/* x */ DEALLOCATE PREPARE \"S_1\";", &["DEALLOCATE"]),
        ("SAVEPOINT x;DEALLOCATE \"S_1\";RELEASE x", &["SAVEPOINT", "DEALLOCATE", "RELEASE"]),
        ("SELECT 1; DEALLOCATE ALL", &["SELECT 1", "DEALLOCATE ALL"]),
    ] {
        let mut play = Play::new();
        play.execute("S_1", Some("SELECT 3")).sync().executed(true, "SELECT 1").ready(Idle);
        assert_eq!(play.replay(), ["S_1: SELECT 3"]);
        play.query(sql);
        for tag in tags {
            play.complete(tag);
        }
        play.ready(Idle);
        assert_eq!(play.replay(), Vec::<String>::new(), "{sql}");
        assert_eq!(play.0.pinned(), None, "{sql}");
    }
}

#[test]
fn the_unnamed_statement_is_made_again_until_it_is_dropped() {
    let unnamed = |play: &Play| {
        let mut out = BytesMut::new();
        play.0.put_unnamed(&mut out)
    };
    let parsed = || {
        let mut play = Play::new();
        play.client(|out| fe::put_parse(b"", b"SELECT 1", &[], out).unwrap()).sync();
        play.server(be::put_parse_complete);
        play.ready(Idle);
        play
    };
    assert!(unnamed(&parsed()));
    let mut play = parsed();
    play.lives(&[]);
    assert!(unnamed(&play), "it is made on the next server as well");
    let mut play = parsed();
    play.done("SELECT 1", "SELECT 1", Idle);
    assert!(!unnamed(&play), "a simple query drops it");
    let mut play = parsed();
    play.query("SELEC").failed().ready(Idle);
    assert!(!unnamed(&play), "one that fails as well");
    let mut play = parsed();
    play.client(|out| fe::put_parse(b"", b"SELEC", &[], out).unwrap()).sync();
    play.failed().ready(Idle);
    assert!(!unnamed(&play), "a Parse that fails as well");
}

#[test]
fn memory_of_prepared_statements_has_a_bound() {
    let mut play = Play::new();
    for i in 0..200 {
        let text = format!("SELECT '{}'", "x".repeat(8000));
        play.execute(&format!("s{i}"), Some(&text)).sync().executed(true, "SELECT 1").ready(Idle);
    }
    assert_eq!(play.0.pinned(), Some(Pin::TooMuch));
    assert_eq!(play.replay(), Vec::<String>::new(), "what is not said again is not kept");
}

#[test]
fn what_a_server_says_is_taken_over_from_it() {
    let mut play = Play::new();
    let policy = FailoverSettings { listen: ListenPolicy::Move, ..FailoverSettings::default() };
    play.0.set_policy(policy);
    play.done("SET my.a = 1", "SET", Idle);
    play.done("SELECT set_config('my.b', '2', false)", "SELECT 1", Idle);
    assert_eq!(play.0.custom().collect::<Vec<_>>(), [&b"my.a"[..], b"my.b"], "to be asked for");
    let found = journal::Examined {
        locks: false,
        temporary: false,
        listens: true,
        channels: b"1\x02a",
        prepared: false,
        hold_cursor: false,
        settings: b"DateStyle\x02SELECT 1\x01my.b\x02SELECT 2",
        acts_as: None,
    };
    play.0.examined(&found);
    assert_eq!(play.0.pinned(), None);
    assert_eq!(play.replay(), ["SELECT 1", "SELECT 2", "LISTEN \"a\""]);
    play.done("RESET datestyle", "RESET", Idle);
    assert_eq!(play.replay(), ["SELECT 2", "LISTEN \"a\""], "names are folded as SQL folds them");
    play.done("SELECT set_config($1, '2', false)", "SELECT 1", Idle);
    play.0.examined(&found);
    assert_eq!(play.0.pinned(), Some(Pin::Opaque), "a name that nobody knows cannot be asked for");
    play.0.examined(&journal::Examined { temporary: true, ..found });
    assert_eq!(play.0.pinned(), Some(Pin::Temporary));
}

#[test]
fn what_follows_a_discard_is_not_taken_for_discarded() {
    let mut play = Play::new();
    play.query("DISCARD ALL");
    play.query("SELECT pg_advisory_lock(1)");
    play.complete("DISCARD ALL");
    play.ready(Idle);
    play.complete("SELECT 1");
    play.ready(Idle);
    assert_eq!(play.0.pinned(), Some(Pin::Opaque));
    play.query("DISCARD ALL");
    play.complete("DISCARD ALL");
    play.ready(Idle);
    assert_eq!(play.0.pinned(), None);
}

#[test]
fn what_a_discard_leaves_at_the_server_keeps_its_connection() {
    for (sql, after) in [
        ("SELECT dblink_connect('c', 'host=h')", Some(Pin::Opaque)),
        ("SELECT pg_replication_origin_session_setup('o')", Some(Pin::Opaque)),
        ("LOAD 'auto_explain'", Some(Pin::Load)),
        ("SELECT set_config($1, '2', false)", None),
        ("SELECT pg_advisory_lock(1)", None),
    ] {
        let mut play = Play::new();
        let tag = if sql.starts_with("LOAD") { "LOAD" } else { "SELECT 1" };
        play.done(sql, tag, Idle).done("DISCARD ALL", "DISCARD ALL", Idle);
        assert_eq!(play.0.pinned(), after, "{sql}");
        assert_eq!(play.0.may_be_discarded(), after.is_none(), "{sql}");
    }
}

#[test]
fn a_search_path_of_temporary_tables_makes_every_table_one() {
    let mut play = Play::new();
    play.done("CREATE TABLE t ()", "CREATE TABLE", Idle);
    assert_eq!(play.0.pinned(), None);
    play.done("SET search_path = pg_temp", "SET", Idle);
    play.done("CREATE TABLE t ()", "CREATE TABLE", Idle);
    assert_eq!(play.0.pinned(), Some(Pin::Temporary));
}

#[test]
fn who_acts_as_somebody_is_told_everything_from_the_beginning() {
    let mut play = Play::new();
    play.done("SET ROLE a", "SET", Idle);
    let there = vec![(Box::from(&b"role"[..]), b"SET ROLE a"[..].into())];
    let mut told = BytesMut::new();
    let state = ConnectionState { settings: Some(there), ..ConnectionState::fresh(Arc::default()) };
    // `SET SESSION AUTHORIZATION b` alone would take the role away again.
    play.done("SET SESSION AUTHORIZATION b", "SET", Idle);
    play.done("SET ROLE a", "SET", Idle);
    play.0.put_fit(&state, &mut told);
    let told = told.escape_ascii().to_string();
    let at = |text: &str| told.rfind(text).unwrap_or_else(|| panic!("{text}: {told}"));
    assert!(at("RESET ROLE") < at("SET SESSION AUTHORIZATION b"), "{told}");
    assert!(at("SET SESSION AUTHORIZATION b") < at("SET ROLE a"), "{told}");
}

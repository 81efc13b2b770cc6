mod leaving;
mod malformed;
mod naming;
mod order;

use super::*;
use kornak_protocol::backend as be;
use kornak_protocol::error::ErrorFields;
use kornak_protocol::frame::{Direction, Flow, Scanner, take_frame};
use kornak_protocol::frontend::{self as fe, Target};
use kornak_protocol::txn::TransactionStatus::{Failed, Idle, InBlock};

/// A conversation played message by message.
struct Play(Session);

/// The client's messages in short: tags, with SQLSTATE, status or command tag.
fn told(out: &mut BytesMut) -> Vec<String> {
    let mut list = Vec::new();
    while let Some(frame) = take_frame(out, 1 << 20).unwrap() {
        let tag = char::from(frame.tag);
        list.push(match frame.tag {
            b'E' => format!("E {}", ErrorView::parse(&frame.body).unwrap().sqlstate()),
            b'Z' | b'C' => {
                let text = frame.body.strip_suffix(b"\0").unwrap_or(&frame.body);
                format!("{tag} {}", String::from_utf8_lossy(text))
            }
            _ => tag.to_string(),
        });
    }
    list
}

impl Play {
    fn new() -> Self {
        Self(Session::new(Parameters::default()))
    }

    fn client(&mut self, write: impl FnOnce(&mut BytesMut)) -> &mut Self {
        let mut bytes = BytesMut::new();
        write(&mut bytes);
        let mut scanner = Scanner::new(Direction::Frontend);
        scanner
            .scan(&bytes, |seen| {
                self.0.forwarded(&seen);
                Flow::Pass
            })
            .unwrap();
        self
    }

    fn query(&mut self, sql: &str) -> &mut Self {
        self.client(|out| fe::put_query(sql.as_bytes(), out).unwrap())
    }

    /// Parse, Bind, Execute; no Sync.
    fn execute(&mut self, name: &str, sql: Option<&str>) -> &mut Self {
        self.client(|out| {
            if let Some(sql) = sql {
                fe::put_parse(name.as_bytes(), sql.as_bytes(), &[], out).unwrap();
            }
            fe::put_bind(b"", name.as_bytes(), &[], out).unwrap();
            fe::put_execute(b"", 0, out).unwrap();
        })
    }

    fn sync(&mut self) -> &mut Self {
        self.client(fe::put_sync)
    }

    fn server(&mut self, write: impl FnOnce(&mut BytesMut)) -> Vec<Heard> {
        let mut bytes = BytesMut::new();
        write(&mut bytes);
        let mut heard = Vec::new();
        let mut scanner = Scanner::new(Direction::Backend);
        scanner
            .scan(&bytes, |seen| {
                heard.push(self.0.received(&seen).unwrap());
                Flow::Pass
            })
            .unwrap();
        heard
    }

    fn complete(&mut self, tag: &str) -> &mut Self {
        self.server(|out| be::put_command_complete(tag, out).unwrap());
        self
    }

    fn ready(&mut self, status: TransactionStatus) -> &mut Self {
        self.server(|out| be::put_ready_for_query(status, out));
        self
    }

    fn failed(&mut self) -> &mut Self {
        self.server(|out| Verdict::Dead.put(out));
        self
    }

    /// A simple query, answered.
    fn done(&mut self, sql: &str, tag: &str, status: TransactionStatus) -> &mut Self {
        self.query(sql).complete(tag).ready(status)
    }

    /// The answers to Parse, Bind and Execute.
    fn executed(&mut self, parsed: bool, tag: &str) -> &mut Self {
        self.server(|out| {
            if parsed {
                be::put_parse_complete(out);
            }
            be::put_bind_complete(out);
            be::put_command_complete(tag, out).unwrap();
        });
        self
    }

    fn lose(&mut self) -> (Aftermath, Vec<String>) {
        let mut out = BytesMut::new();
        let aftermath = self.0.lose_server(false, true, &mut out);
        (aftermath, told(&mut out))
    }

    /// Loses the server; the session lives and is told this.
    fn lives(&mut self, expected: &[&str]) -> &mut Self {
        assert_eq!(
            self.lose(),
            (Aftermath::Lives, expected.iter().map(ToString::to_string).collect())
        );
        self
    }

    /// Says something that we answer.
    fn says(&mut self, write: impl FnOnce(&mut BytesMut), expected: &[&str]) -> &mut Self {
        let mut bytes = BytesMut::new();
        write(&mut bytes);
        let mut out = BytesMut::new();
        Scanner::new(Direction::Frontend)
            .scan(&bytes, |seen| {
                self.0.answer(&seen, &mut out);
                Flow::Pass
            })
            .unwrap();
        assert_eq!(told(&mut out), expected);
        self
    }

    fn asks(&mut self, sql: &str, expected: &[&str]) -> &mut Self {
        self.says(|out| fe::put_query(sql.as_bytes(), out).unwrap(), expected)
    }

    /// The messages for a new server: queries and prepared statements.
    fn replay(&self) -> Vec<String> {
        let mut out = BytesMut::new();
        self.0.put_replay(&mut out);
        let mut list = Vec::new();
        while let Some(frame) = take_frame(&mut out, 1 << 20).unwrap() {
            match frame.tag {
                b'Q' => {
                    list.push(
                        String::from_utf8_lossy(fe::query(&frame.body).unwrap()).into_owned(),
                    );
                }
                b'P' => {
                    let parse = fe::ParseMessage::parse(&frame.body).unwrap();
                    let name = String::from_utf8_lossy(parse.statement).into_owned();
                    list.push(format!("{name}: {}", String::from_utf8_lossy(parse.sql)));
                }
                _ => {}
            }
        }
        list
    }
}

#[test]
fn an_idle_session_is_told_nothing() {
    Play::new().done("INSERT INTO t VALUES (1)", "INSERT 0 1", Idle).lives(&[]);
    assert!(Play::new().0.is_open());
}

#[test]
fn an_autocommit_statement_in_flight_has_an_unknown_outcome() {
    Play::new().query("INSERT INTO t VALUES (1)").lives(&["E 08007", "Z I"]);
    Play::new().execute("", Some("INSERT INTO t VALUES (1)")).sync().lives(&["E 08007", "Z I"]);
    // Its tag is here, its commit is not.
    Play::new()
        .execute("", Some("INSERT INTO t VALUES (1)"))
        .sync()
        .executed(true, "INSERT 0 1")
        .lives(&["E 08007", "Z I"]);
}

#[test]
fn each_sync_of_a_pipeline_is_answered() {
    Play::new()
        .execute("", Some("INSERT INTO t VALUES (1)"))
        .sync()
        .execute("", Some("INSERT INTO t VALUES (2)"))
        .sync()
        .lives(&["E 08007", "Z I", "E 08007", "Z I"]);
}

#[test]
fn a_statement_of_an_open_transaction_is_to_be_retried() {
    let mut play = Play::new();
    play.done("BEGIN", "BEGIN", InBlock).query("UPDATE t SET a = 1").lives(&["E 40001", "Z E"]);
    // Whoever swallows the first error sees the same one again.
    play.asks("SELECT 1", &["E 40001", "Z E"])
        .asks("ROLLBACK TO SAVEPOINT x", &["E 40001", "Z E"])
        .asks("SAVEPOINT y", &["E 40001", "Z E"])
        .asks("ROLLBACK AND CHAIN", &["E 40001", "Z E"])
        .asks("/* end */ rollback ;", &["C ROLLBACK", "Z I"]);
    assert!(play.0.is_open());
}

#[test]
fn an_open_transaction_with_nothing_in_flight_is_told_with_its_next_request() {
    Play::new()
        .done("BEGIN", "BEGIN", InBlock)
        .lives(&[])
        .asks("SELECT 1", &["E 40001", "Z E"])
        .asks("COMMIT", &["C ROLLBACK", "Z I"]);
    Play::new().done("BEGIN", "BEGIN", InBlock).lives(&[]).asks("ROLLBACK", &["C ROLLBACK", "Z I"]);
    Play::new().done("BEGIN", "BEGIN", InBlock).lives(&[]).asks("COMMIT", &["E 40001", "Z I"]);
}

#[test]
fn a_commit_in_flight_has_an_unknown_outcome_however_it_is_sent() {
    for sql in
        ["COMMIT", "END", "UPDATE t SET a = 1; COMMIT", "PREPARE TRANSACTION 'x'", "CALL p()"]
    {
        Play::new().done("BEGIN", "BEGIN", InBlock).query(sql).lives(&["E 08007", "Z I"]);
        Play::new()
            .done("BEGIN", "BEGIN", InBlock)
            .execute("", Some(sql))
            .sync()
            .lives(&["E 08007", "Z I"]);
    }
    // A named statement whose text was sent long ago.
    let mut play = Play::new();
    play.execute("s1", Some("COMMIT")).sync().executed(true, "COMMIT").ready(Idle);
    play.done("BEGIN", "BEGIN", InBlock).execute("s1", None).sync().lives(&["E 08007", "Z I"]);
    // One whose text we never saw.
    Play::new()
        .done("BEGIN", "BEGIN", InBlock)
        .execute("never seen", None)
        .sync()
        .lives(&["E 08007", "Z I"]);
}

#[test]
fn a_transaction_that_had_failed_gets_no_second_error() {
    Play::new()
        .done("BEGIN", "BEGIN", InBlock)
        .query("SELECT 1/0")
        .failed()
        .ready(Failed)
        .lives(&[])
        .asks("SELECT 1", &["E 25P02", "Z E"])
        .asks("ROLLBACK TO SAVEPOINT x", &["E 40001", "Z E"])
        .asks("SELECT 1", &["E 25P02", "Z E"])
        .asks("COMMIT", &["C ROLLBACK", "Z I"]);
}

#[test]
fn a_batch_without_its_sync_is_told_once_and_ignored_up_to_it() {
    let mut play = Play::new();
    play.done("BEGIN", "BEGIN", InBlock).execute("", Some("SELECT 1")).lives(&["E 40001"]);
    play.says(|out| fe::put_execute(b"", 0, out).unwrap(), &[]).says(fe::put_sync, &["Z E"]);
    play.asks("ROLLBACK", &["C ROLLBACK", "Z I"]);
    let mut play = Play::new();
    play.execute("", Some("INSERT INTO t VALUES (1)")).lives(&["E 08007"]);
    play.says(fe::put_sync, &["Z I"]);
    assert!(play.0.is_open());
}

#[test]
fn an_error_that_was_passed_on_is_the_only_one() {
    Play::new().query("SELECT 1/0").failed().lives(&["Z I"]);
    Play::new().execute("", Some("SELECT 1/0")).sync().failed().lives(&["Z I"]);
}

#[test]
fn what_changes_nothing_was_not_done() {
    Play::new().query("BEGIN").lives(&["E 57P03", "Z I"]);
    // Said again, unless a part of its answer was passed on.
    for sql in ["DEALLOCATE p", "SET x = 1", "SHOW x", "DISCARD ALL"] {
        let mut play = Play::new();
        assert!(play.query(sql).0.is_harmless() && play.0.forget_harmless(), "{sql}");
    }
    Play::new().query("SELECT f()").lives(&["E 08007", "Z I"]);
    Play::new().sync().lives(&["E 57P03", "Z I"]);
}

#[test]
fn a_dead_transaction_is_ended_in_the_extended_protocol_too() {
    let mut play = Play::new();
    play.done("BEGIN", "BEGIN", InBlock).query("UPDATE t SET a = 1").lives(&["E 40001", "Z E"]);
    play.says(
        |out| {
            fe::put_parse(b"S_1", b"ROLLBACK", &[], out).unwrap();
            fe::put_bind(b"", b"S_1", &[], out).unwrap();
            fe::put_describe(Target::Portal(b""), out).unwrap();
            fe::put_execute(b"", 0, out).unwrap();
            fe::put_sync(out);
        },
        &["1", "2", "n", "C ROLLBACK", "Z I"],
    );
    assert!(play.0.is_open());
    assert_eq!(play.replay(), ["S_1: ROLLBACK"], "the driver believes that it is there");
}

#[test]
fn settings_count_once_they_are_committed() {
    let mut play = Play::new();
    play.done("SET work_mem = '5MB'", "SET", Idle);
    play.done("BEGIN", "BEGIN", InBlock).done("SET search_path TO a, b", "SET", InBlock);
    play.done("ROLLBACK", "ROLLBACK", Idle);
    play.done("BEGIN", "BEGIN", InBlock).done("SET LOCAL enable_seqscan = off", "SET", InBlock);
    play.done("SET TIME ZONE 'UTC'", "SET", InBlock).done("COMMIT", "COMMIT", Idle);
    assert_eq!(play.replay(), ["SET work_mem = '5MB'", "SET TIME ZONE 'UTC'"]);
    play.done("RESET work_mem", "RESET", Idle);
    assert_eq!(play.replay(), ["SET TIME ZONE 'UTC'"]);
    play.done("RESET ALL", "RESET", Idle);
    assert_eq!(play.replay(), [""; 0]);
    assert_eq!(play.0.pinned(), None);
}

#[test]
fn a_setting_made_by_the_extended_protocol_counts_too() {
    let mut play = Play::new();
    play.execute("", Some("SET application_name = 'x'")).sync().executed(true, "SET").ready(Idle);
    assert_eq!(play.replay(), ["SET application_name = 'x'"]);
    play.execute("", Some("SET work_mem = '1MB'"));
    play.execute("", Some("SELECT 1/0")).sync().executed(true, "SET");
    play.server(be::put_parse_complete);
    play.failed().ready(Idle);
    assert_eq!(play.replay(), ["SET application_name = 'x'"], "its implicit transaction failed");
}

#[test]
fn what_cannot_be_followed_pins() {
    let pinned = |sql: &str, tag: &str| Play::new().done(sql, tag, Idle).0.pinned();
    assert_eq!(pinned("SELECT pg_advisory_lock(1)", "SELECT 1"), Some(Pin::Opaque));
    assert_eq!(pinned("SELECT set_config('a.b', 'c', false)", "SELECT 1"), Some(Pin::Opaque));
    assert_eq!(pinned("CREATE TEMP TABLE x (a int)", "CREATE TABLE"), Some(Pin::Temporary));
    assert_eq!(pinned("CREATE TABLE x (a int)", "CREATE TABLE"), None);
    assert_eq!(pinned("LISTEN x", "LISTEN"), Some(Pin::Listen));
    assert_eq!(pinned("LOAD 'x'", "LOAD"), Some(Pin::Load));
    assert_eq!(pinned("PREPARE p AS SELECT 1", "PREPARE"), Some(Pin::SqlPrepare));
    assert_eq!(pinned("SET a.b = 1; SELECT 1", "SET"), None, "the statements are told apart");
    assert_eq!(pinned("SET a.b = 'c\\'; SELECT 1", "SET"), Some(Pin::Setting), "or not");
    assert_eq!(pinned("SELECT nextval('s')", "SELECT 1"), None, "currval does not pin");
    assert_eq!(pinned("SELECT pg_advisory_lock(1)", "SELECT 1"), Some(Pin::Opaque));
    let mut play = Play::new();
    play.done("LISTEN x", "LISTEN", Idle).done("DISCARD ALL", "DISCARD ALL", Idle);
    assert_eq!(play.0.pinned(), None);
}

#[test]
fn a_pinned_session_ends_and_is_told_why() {
    let mut play = Play::new();
    play.done("CREATE TEMP TABLE x (a int)", "CREATE TABLE", Idle);
    let ends = Aftermath::Ends(Verdict::Ends(Some(Pin::Temporary)));
    assert_eq!(play.lose(), (ends, Vec::new()));
}

#[test]
fn prepared_statements_move_once_they_are_confirmed() {
    let mut play = Play::new();
    play.execute("s1", Some("SELECT 1")).sync().executed(true, "SELECT 1").ready(Idle);
    play.client(|out| fe::put_parse(b"s2", b"SELEC", &[], out).unwrap())
        .sync()
        .failed()
        .ready(Idle);
    assert_eq!(play.replay(), ["s1: SELECT 1"]);
    play.client(|out| fe::put_close(Target::Statement(b"s1"), out).unwrap()).sync();
    play.server(be::put_close_complete);
    play.ready(Idle);
    assert_eq!(play.replay(), [""; 0]);
}

#[test]
fn a_copy_cannot_be_continued() {
    let mut play = Play::new();
    play.query("COPY t FROM STDIN");
    play.server(|out| out.extend_from_slice(b"G\0\0\0\x07\0\0\0"));
    assert_eq!(play.lose().0, Aftermath::Ends(Verdict::Ends(None)));
}

#[test]
fn a_message_that_was_half_passed_on_breaks_the_session() {
    let mut play = Play::new();
    play.query("SELECT 1");
    assert_eq!(play.0.lose_server(true, true, &mut BytesMut::new()), Aftermath::Breaks);
}

#[test]
fn last_words_are_kept_from_the_client() {
    let mut play = Play::new();
    let heard = play.server(|out| Verdict::Shutdown.put(out));
    assert_eq!(heard, [Heard::LastWords(Verdict::Shutdown.sqlstate())]);
}

/// An ERROR with this SQLSTATE, text and routine.
fn error(out: &mut BytesMut, code: &[u8], text: &'static str, routine: &'static str) {
    let code = SqlState::from_bytes(code).unwrap();
    ErrorFields::error(code, text).routine(routine).put(out);
}

#[test]
fn an_error_of_a_server_whose_postmaster_is_gone_is_its_last_word() {
    let mut play = Play::new();
    play.done("BEGIN", "BEGIN", InBlock).query("UPDATE t SET a = 1");
    let died = "postmaster was shut down, exiting";
    let heard = play.server(|out| error(out, b"XX000", died, "WaitForAllConnections"));
    assert!(matches!(heard[..], [Heard::LastWords(_)]), "{heard:?}");
    assert_eq!(play.lose(), (Aftermath::Lives, vec!["E 40001".to_owned(), "Z E".to_owned()]));
}

#[test]
fn what_citus_reports_of_a_lost_node_has_the_sqlstate_that_is_true_of_the_statement() {
    let closed = "server closed the connection unexpectedly";
    type Row<'a> = (&'a [&'a str], &'a str, &'a [u8], &'a str, &'a str);
    let rows: [Row<'_>; 6] = [
        (&["BEGIN"], "UPDATE t SET a = 1", b"XX000", closed, "E 40001"),
        (&["BEGIN"], "COMMIT", b"XX000", closed, "E 08007"),
        (&[], "UPDATE t SET a = 1", b"XX000", "postmaster was shut down, exiting", "E 08007"),
        (&[], "UPDATE t SET a = 1", b"57P01", "terminating connection", "E 08007"),
        (&["BEGIN"], "UPDATE t SET a = 1", b"XX000", "cache lookup failed", "XX000"),
        (&["BEGIN"], "UPDATE t SET a = 1", b"23505", "duplicate key", "23505"),
    ];
    for (before, sql, code, text, expected) in rows {
        let mut play = Play::new();
        for begin in before {
            play.done(begin, begin, InBlock);
        }
        play.query(sql);
        let heard = play.server(|out| error(out, code, text, "ReportResultError"));
        let changed = match heard[..] {
            [Heard::Edited] => told(&mut play.0.take_edited()),
            [Heard::Pass] => vec![String::from_utf8_lossy(code).into_owned()],
            _ => panic!("{heard:?}"),
        };
        assert_eq!(changed, [expected], "{sql} {text}");
        play.ready(if before.is_empty() { Idle } else { Failed });
    }
}

#[test]
fn a_commit_that_no_standby_confirmed_is_unknown() {
    let notice = |out: &mut BytesMut| {
        let mut body =
            b"SWARNING\0VWARNING\0C01000\0Mcanceling wait\0RSyncRepWaitForLSN\0\0".to_vec();
        out.extend_from_slice(b"N");
        out.extend_from_slice(&(body.len() as u32 + 4).to_be_bytes());
        out.extend_from_slice(&std::mem::take(&mut body));
    };
    let mut play = Play::new();
    play.query("INSERT INTO t VALUES (1)");
    play.server(notice);
    let heard = play.server(|out| be::put_command_complete("INSERT 0 1", out).unwrap());
    assert_eq!(heard, [Heard::Replace(Verdict::Unknown)]);
    let mut play = Play::new();
    play.execute("", Some("INSERT INTO t VALUES (1)")).sync().executed(true, "INSERT 0 1");
    play.server(notice);
    let heard = play.server(|out| be::put_ready_for_query(Idle, out));
    assert_eq!(heard, [Heard::Precede(Verdict::Unknown)]);
}

#[test]
fn a_held_request_is_refused_with_its_ready_for_query() {
    let mut play = Play::new();
    let refuse = |play: &mut Play, write: &dyn Fn(&mut BytesMut)| {
        let (mut bytes, mut out) = (BytesMut::new(), BytesMut::new());
        write(&mut bytes);
        Scanner::new(Direction::Frontend)
            .scan(&bytes, |seen| {
                play.0.refuse(&seen, Verdict::NoServer, &mut out);
                Flow::StopAfter
            })
            .unwrap();
        told(&mut out)
    };
    let query = |out: &mut BytesMut| fe::put_query(b"SELECT 1", out).unwrap();
    assert_eq!(refuse(&mut play, &query), ["E 57P03", "Z I"]);
    let parse = |out: &mut BytesMut| fe::put_parse(b"", b"SELECT 1", &[], out).unwrap();
    assert_eq!(refuse(&mut play, &parse), ["E 57P03"]);
    play.says(fe::put_sync, &["Z I"]);
}

#[test]
fn the_warning_of_a_server_that_dies_is_kept_from_the_client() {
    let mut play = Play::new();
    let heard = play.server(|out| {
        let body = b"SWARNING\0VWARNING\0C57P02\0Mcrash of another server process\0Rquickdie\0\0";
        out.extend_from_slice(b"N");
        out.extend_from_slice(&(body.len() as u32 + 4).to_be_bytes());
        out.extend_from_slice(body);
    });
    assert_eq!(heard, [Heard::Swallow]);
}

#[test]
fn what_a_failover_does_to_sessions_is_a_matter_of_settings() {
    let with = |change: fn(&mut FailoverSettings)| {
        let mut policy = FailoverSettings::default();
        change(&mut policy);
        let mut play = Play::new();
        play.0.set_policy(policy);
        play
    };
    let mut none = with(|it| it.keep_sessions = KeepSessions::None);
    assert_eq!(none.lose(), (Aftermath::Ends(Verdict::NotKept), Vec::new()));
    let planned = none.0.lose_server(false, false, &mut BytesMut::new());
    assert_eq!(planned, Aftermath::Lives, "a planned one moves it all the same");

    let lock = |play: &mut Play| play.done("SELECT pg_advisory_lock(1)", "SELECT 1", Idle).lose();
    let opaque = Aftermath::Ends(Verdict::Ends(Some(Pin::Opaque)));
    assert_eq!(lock(&mut with(|_| ())), (opaque, Vec::new()));
    let mut all = with(|it| it.keep_sessions = KeepSessions::All);
    assert_eq!(lock(&mut all), (Aftermath::Lives, Vec::new()));
    all.done("CREATE TEMP TABLE x (a int)", "CREATE TABLE", Idle);
    let temporary = Aftermath::Ends(Verdict::Ends(Some(Pin::Temporary)));
    assert_eq!(all.lose(), (temporary, Vec::new()), "what it holds for certain ends it");

    let mut close = with(|it| it.unknown_outcome = UnknownOutcome::Close);
    let ends = Aftermath::Ends(Verdict::UnknownEnds);
    assert_eq!(close.query("INSERT INTO t VALUES (1)").lose(), (ends, Vec::new()));
    assert_eq!(Verdict::UnknownEnds.sqlstate().as_str(), "08007");
}

#[test]
fn a_read_on_a_standby_runs_again_if_it_is_a_batch_of_its_own() {
    let again = |play: &mut Play| play.0.forget_read();
    assert!(again(Play::new().query("SELECT 1")));
    assert!(again(Play::new().execute("", Some("SELECT 1")).sync()));
    assert!(!again(Play::new().query("SELECT 1").query("SELECT 2")), "two batches");
    assert!(!again(Play::new().done("BEGIN", "BEGIN", InBlock).query("SELECT 1")), "a block");
    assert!(!again(Play::new().query("SELECT 1").complete("SELECT 1")), "an answer was passed on");
    assert!(!again(Play::new().done("LISTEN x", "LISTEN", Idle).query("SELECT 1")), "pinned");
}

#[test]
fn a_session_is_read_only_while_its_server_says_so() {
    let mut told = Parameters::default();
    for (value, expected) in [("on", true), ("off", false)] {
        told.set(b"default_transaction_read_only", value.as_bytes()).unwrap();
        assert_eq!(Session::new(told.clone()).is_read_only_by_default(), expected);
    }
    assert!(!Play::new().0.is_read_only_by_default(), "PostgreSQL 13 does not say");
}

#[test]
fn only_what_changes_nothing_may_be_said_again() {
    let again = |play: &mut Play| play.0.is_harmless() && play.0.forget_harmless();
    assert!(again(Play::new().query("BEGIN")));
    assert!(again(Play::new().execute("", Some("BEGIN")).sync()));
    assert!(again(
        Play::new().client(|out| fe::put_parse(b"s", b"DELETE FROM t", &[], out).unwrap()).sync()
    ));
    assert!(!again(Play::new().query("SELECT 1")));
    assert!(!again(Play::new().query("BEGIN; DELETE FROM t")));
    assert!(!again(Play::new().query("BEGIN").query("DELETE FROM t")));
    assert!(!again(Play::new().execute("", Some("BEGIN")).sync().executed(true, "BEGIN")));
    assert!(!again(Play::new().done("BEGIN", "BEGIN", InBlock).query("SELECT 1")));
    assert!(!again(Play::new().done("LISTEN x", "LISTEN", Idle).query("BEGIN")), "pinned");
}

#[test]
fn who_listens_moves_if_it_is_planned_and_the_settings_say_so() {
    let listening = |listen: ListenPolicy| {
        let mut play = Play::new();
        play.0.set_policy(FailoverSettings { listen, ..FailoverSettings::default() });
        play.done("LISTEN a", "LISTEN", Idle);
        play
    };
    let ends = Aftermath::Ends(Verdict::Ends(Some(Pin::Listen)));
    let planned = |play: &mut Play| play.0.lose_server(false, false, &mut BytesMut::new());
    assert_eq!(planned(&mut listening(ListenPolicy::Pin)), ends);
    let mut moves = listening(ListenPolicy::Move);
    assert_eq!((moves.0.pinned(), moves.0.listens()), (None, true));
    moves.done("BEGIN", "BEGIN", InBlock).done("LISTEN b", "LISTEN", InBlock);
    moves.done("ROLLBACK", "ROLLBACK", Idle);
    assert_eq!(planned(&mut moves), Aftermath::Lives);
    assert_eq!(moves.replay(), ["LISTEN \"a\""], "what was rolled back is not heard");
    moves.done("UNLISTEN a", "UNLISTEN", Idle);
    assert!(!moves.0.listens() && moves.0.is_clean());
    assert_eq!(listening(ListenPolicy::Move).lose(), (ends, Vec::new()), "nobody announced it");
    let mut unread = listening(ListenPolicy::Move);
    unread.done("LISTEN \"b\\\\\"; LISTEN c", "LISTEN", Idle);
    assert_eq!(unread.0.pinned(), Some(Pin::Listen));
}

use pgwire::messages::{DecodeContext, PgWireFrontendMessage};
use proptest::prelude::*;

use super::*;
use crate::frame::take_frame;
use crate::pipeline::Fate;

fn written(put: impl FnOnce(&mut BytesMut) -> Result<(), EncodeError>) -> Vec<u8> {
    let mut out = BytesMut::new();
    put(&mut out).unwrap();
    out.to_vec()
}

fn body(out: &[u8]) -> &[u8] {
    assert_eq!(out[1..5], (out.len() as u32 - 1).to_be_bytes());
    &out[5..]
}

/// Reads what we wrote with a codec that is not ours.
fn theirs(out: &[u8]) -> PgWireFrontendMessage {
    let mut buf = BytesMut::from(out);
    let mut context = DecodeContext::default();
    context.awaiting_frontend_ssl = false;
    context.awaiting_frontend_startup = false;
    let message = PgWireFrontendMessage::decode(&mut buf, &context).unwrap().unwrap();
    assert!(buf.is_empty(), "one whole message and nothing more");
    message
}

#[test]
fn what_we_write_another_codec_reads() {
    use PgWireFrontendMessage as M;
    let M::Query(q) = theirs(&written(|o| put_query(b"select 1", o))) else { panic!() };
    assert_eq!(q.query, "select 1");
    let M::Parse(p) = theirs(&written(|o| put_parse(b"s", b"select $1", &[25], o))) else {
        panic!()
    };
    assert_eq!((p.name.as_deref(), p.query.as_str()), (Some("s"), "select $1"));
    assert_eq!(p.type_oids, [25]);
    let M::Bind(b) = theirs(&written(|o| put_bind(b"p", b"s", &[Some(b"v"), None], o))) else {
        panic!()
    };
    assert_eq!((b.portal_name.as_deref(), b.statement_name.as_deref()), (Some("p"), Some("s")));
    assert_eq!(b.parameters.len(), 2);
    assert_eq!((b.parameters[0].as_deref(), b.parameters[1].as_deref()), (Some(&b"v"[..]), None));
    let M::Describe(d) = theirs(&written(|o| put_describe(Target::Portal(b"p"), o))) else {
        panic!()
    };
    assert_eq!((d.target_type, d.name.as_deref()), (b'P', Some("p")));
    let M::Close(c) = theirs(&written(|o| put_close(Target::Statement(b"s"), o))) else { panic!() };
    assert_eq!((c.target_type, c.name.as_deref()), (b'S', Some("s")));
    let M::Execute(e) = theirs(&written(|o| put_execute(b"", 7, o))) else { panic!() };
    assert_eq!((e.name.as_deref(), e.max_rows), (None, 7));
    let plain = |put: fn(&mut BytesMut)| {
        theirs(&written(|o| {
            put(o);
            Ok(())
        }))
    };
    assert!(matches!(plain(put_sync), M::Sync(_)));
    assert!(matches!(plain(put_flush), M::Flush(_)));
    assert!(matches!(plain(put_terminate), M::Terminate(_)));
    assert!(matches!(plain(put_copy_done), M::CopyDone(_)));
    let M::CopyFail(f) = theirs(&written(|o| put_copy_fail(b"why", o))) else { panic!() };
    assert_eq!(f.message, "why");
}

#[test]
fn what_we_write_we_read() {
    let out = written(|o| put_query(b"select 1", o));
    assert_eq!(query(body(&out)), Ok(&b"select 1"[..]));
    let out = written(|o| put_parse(b"s", b"select 1", &[], o));
    let parsed = ParseMessage::parse(body(&out)).unwrap();
    assert_eq!(
        (parsed.statement, parsed.sql, parsed.is_whole),
        (&b"s"[..], &b"select 1"[..], true)
    );
    let out = written(|o| put_bind(b"p", b"s", &[Some(b"x")], o));
    assert_eq!(Bind::parse(body(&out)), Ok(Bind { portal: b"p", statement: b"s" }));
    for target in [Target::Statement(b"s"), Target::Portal(b"")] {
        let out = written(|o| put_close(target, o));
        assert_eq!(Target::parse(body(&out)), Ok(target));
    }
    let out = written(|o| put_execute(b"p", 9, o));
    assert_eq!(Execute::parse(body(&out)), Ok(Execute { portal: b"p", max_rows: 9 }));
    let out = written(|o| put_password(b"secret", o));
    assert_eq!(password(body(&out)), Ok(&b"secret"[..]));
    let out = written(|o| put_sasl_initial_response(b"M", b"first", o));
    let initial = SaslInitialResponse { mechanism: b"M", response: Some(b"first") };
    assert_eq!(SaslInitialResponse::parse(body(&out)), Ok(initial));
    assert_eq!(body(&written(|o| put_sasl_response(b"last", o))), b"last");
    let out = written(|o| put_copy_fail(b"why", o));
    assert_eq!(copy_fail(body(&out)), Ok(&b"why"[..]));
}

#[test]
fn malformed_bodies_are_refused() {
    for bytes in [&b""[..], b"select", b"a\0b"] {
        assert!(query(bytes).is_err() && password(bytes).is_err() && copy_fail(bytes).is_err());
    }
    for bytes in [&b""[..], b"name"] {
        assert!(ParseMessage::parse(bytes).is_err() && Bind::parse(bytes).is_err());
    }
    assert!(Bind::parse(b"p\0s").is_err());
    for bytes in [&b""[..], b"S", b"Sname", b"Xname\0", b"Sname\0x"] {
        assert!(Target::parse(bytes).is_err(), "{bytes:?}");
    }
    for bytes in [&b""[..], b"p", b"p\0", b"p\0\0\0\0", b"p\0\0\0\0\0\0"] {
        assert!(Execute::parse(bytes).is_err(), "{bytes:?}");
    }
    for bytes in [
        &b""[..],
        b"M",
        b"M\0",
        b"M\0\0\0\0",
        b"M\0\0\0\0\x05abcd",
        b"M\0\0\0\0\x03abcd",
        b"M\0\x7f\xff\xff\xffabcd",
        b"M\0\x80\0\0\0abcd",
        b"M\0\xff\xff\xff\xffabcd",
    ] {
        assert!(SaslInitialResponse::parse(bytes).is_err(), "{bytes:?}");
    }
    let none = SaslInitialResponse::parse(b"M\0\xff\xff\xff\xff").unwrap();
    assert_eq!(none.response, None);
}

#[test]
fn a_prefix_tells_that_it_is_one() {
    let cut = ParseMessage::parse(b"s\0select long").unwrap();
    assert_eq!((cut.sql, cut.is_whole), (&b"select long"[..], false));
    assert_eq!(query_prefix(b"select"), (&b"select"[..], false));
    assert_eq!(query_prefix(b"select\0"), (&b"select"[..], true));
}

#[test]
fn a_text_with_a_nul_is_refused_and_nothing_of_it_stays() {
    let mut out = BytesMut::from(&b"before"[..]);
    assert!(put_query(b"select 1\0; drop table t", &mut out).is_err());
    assert!(put_parse(b"s\0", b"select 1", &[], &mut out).is_err());
    assert!(put_close(Target::Statement(b"a\0b"), &mut out).is_err());
    assert!(put_bind(b"", b"", &vec![None; 70_000], &mut out).is_err());
    assert_eq!(&out[..], b"before");
}

#[test]
fn the_first_words_tell_the_kind() {
    use StatementKind as K;
    let rows = [
        ("", K::Empty),
        ("  \n\t", K::Empty),
        ("-- nothing", K::Empty),
        ("/* a /* nested */ */ ;", K::Empty),
        ("select 1", K::Select),
        ("  SELECT 1", K::Select),
        ("(select 1) union (select 2)", K::Select),
        ("with x as (select 1) insert into t select * from x", K::Select),
        ("/* hint */ -- more\n insert into t values (1)", K::Write),
        ("begin", K::Begin),
        ("START TRANSACTION READ ONLY", K::Begin),
        ("commit", K::Commit),
        ("end;", K::Commit),
        ("commit prepared 'x'", K::Commit),
        ("rollback", K::Rollback),
        ("abort work", K::Rollback),
        ("rollback and chain", K::Rollback),
        ("rollback to savepoint a", K::RollbackTo),
        ("ROLLBACK /* x */ WORK TO a", K::RollbackTo),
        ("rollback transaction to a", K::RollbackTo),
        ("savepoint a", K::Savepoint),
        ("release a", K::Release),
        ("prepare p as select 1", K::Prepare),
        ("prepare p (int) as select 1", K::Prepare),
        ("prepare transaction 'x'", K::PrepareTransaction),
        ("execute p", K::Execute),
        ("deallocate all", K::Deallocate),
        ("call p()", K::Call),
        ("do $$begin commit; end$$", K::Do),
        ("set search_path = x", K::Set),
        ("set session authorization x", K::Set),
        ("set local search_path = x", K::SetLocal),
        ("set transaction isolation level serializable", K::SetLocal),
        ("reset all", K::Reset),
        ("discard all", K::Discard),
        ("listen x", K::Listen),
        ("unlisten *", K::Unlisten),
        ("declare c cursor with hold for select 1", K::Declare),
        ("close c", K::Close),
        ("copy t from stdin", K::Copy),
        ("create temp table t (a int)", K::CreateTemp),
        ("create local temporary table t (a int)", K::CreateTemp),
        ("create or replace temp view v as select 1", K::CreateTemp),
        ("create table pg_temp.t (a int)", K::CreateTemp),
        ("create table temperature (a int)", K::Create),
        ("load 'x'", K::Load),
        ("lock table t", K::Lock),
        ("show all", K::Show),
        ("vacuum", K::Other),
        ("selectx", K::Other),
        ("\"select\"", K::Other),
        ("\u{e9}t\u{e9}", K::Other),
        ("1", K::Other),
        (";select 1", K::Other),
        ("/* never ends", K::Empty),
    ];
    for (sql, kind) in rows {
        assert_eq!(statement_kind(sql.as_bytes()), kind, "{sql}");
    }
}

#[test]
fn several_statements_never_pass_for_one() {
    let rows = [
        ("", true),
        ("select 1", true),
        ("select 1;", true),
        ("select 1 ; ; -- the end", true),
        ("select 1; /* c */", true),
        ("select ';'", true),
        ("select 'a;b' ; ", true),
        ("select \"a;b\"", true),
        ("select 'it''s; fine'", true),
        ("select $$a;b$$", true),
        ("select $x$a;$$;b$x$", true),
        ("select /* ; */ 1", true),
        ("select 1 -- ; x", true),
        ("select $1; ", true),
        ("select a$b$c", true),
        ("select 1; select 2", false),
        ("begin; insert into t values (1); commit", false),
        ("select 1;commit", false),
        ("select '';commit", false),
        ("select 'a' ; commit -- '", false),
        ("select \"a\";commit", false),
        ("select $$a$$;commit", false),
        ("select $x$a$y$;$x$;commit", false),
        ("select 1 -- x\n;commit", false),
        ("select 1 -- x\r;commit", false),
        ("select /* /* */ ; */ 1; commit", false),
        // With or without standard_conforming_strings.
        ("select 'a\\'; commit; --'", false),
        ("select E'a\\'; commit; --'", false),
        ("select E'\\\\'", true),
        ("select E'\\\\';", true),
        // What never ends.
        ("select 'a; commit", false),
        ("select $$a; commit", false),
        ("select /* a; commit", false),
        ("select 1; /* never ends", false),
        // A dollar inside an identifier opens nothing.
        ("select a$$;commit;$$", false),
        ("select 1$$;commit;$$", false),
        ("select $1$$;$$", false), // it is one, but who knows
        ("select $1$$'$$;commit;--'", false),
        ("select 1$$'$$;commit;--'", false),
        ("select 1a$$'$$;commit;--'", false),
        ("select a$$'$$;commit;--'", true), // a literal after an identifier
        // Semicolons inside of a body are not told apart.
        ("create function f() returns int begin atomic select 1; end", false),
        ("create rule r as on insert to t do also (delete from a; delete from b)", false),
    ];
    for (sql, single) in rows {
        assert_eq!(is_single_statement(sql.as_bytes()), single, "{sql}");
    }
}

#[test]
fn what_may_end_a_transaction_is_never_missed() {
    use Fate::{Begins, Commits, Nothing, OfSession, Revives, RollsBack, Stays, Unknown};
    let rows = [
        ("select 1", Stays),
        ("insert into t values (1);", Stays),
        ("", Nothing),
        (" ; -- nothing", Nothing),
        ("prepare p as insert into t values (1)", OfSession),
        ("execute p", Stays),
        ("savepoint a", Stays),
        ("release a", Stays),
        ("set local x = 1", OfSession),
        ("/* x */ deallocate p;", OfSession),
        ("discard all", OfSession),
        ("show x; select 1", Unknown),
        ("declare c cursor with hold for select f()", Stays),
        ("begin", Begins),
        ("begin isolation level serializable;", Begins),
        ("rollback to a", Revives),
        ("rollback", RollsBack),
        ("ROLLBACK WORK; ", RollsBack),
        ("abort transaction -- x", RollsBack),
        ("commit", Commits),
        ("END", Commits),
        ("/* x */ commit work;", Commits),
        ("commit and chain", Unknown),
        ("commit and no chain", Unknown),
        ("rollback and chain", Unknown),
        ("rollback prepared 'x'", Unknown),
        ("commit prepared 'x'", Unknown),
        ("prepare transaction 'x'", Unknown),
        ("call p()", Unknown),
        ("do 'begin commit; end'", Unknown),
        ("select 1; commit", Unknown),
        ("begin; select 1", Unknown),
        ("; commit", Unknown),
        ("select 'a\\'; commit; --'", Unknown),
        ("/* */ select 1; /* */ end", Unknown),
    ];
    for (sql, fate) in rows {
        assert_eq!(fate_of(sql.as_bytes()), fate, "{sql}");
        let ends = matches!(fate, RollsBack | Commits | Unknown);
        assert_eq!(may_end_transaction(sql.as_bytes()), ends, "{sql}");
    }
}

#[test]
fn what_may_stay_in_a_session_is_seen() {
    let rows = [
        ("select pg_advisory_lock(1)", true),
        ("select pg_catalog.PG_ADVISORY_LOCK(1)", true),
        ("select \"pg_advisory_lock\"(1)", true),
        ("select pg_try_advisory_lock_shared(1)", true),
        ("select set_config('x', 'y', false)", true),
        ("select * from dblink('x', 'y')", true),
        ("select dblink_connect('x')", true),
        ("select * into temp t from x", true),
        ("select * into temporary t from x", true),
        ("select * into /* x */ temp t from x", true),
        ("insert into pg_temp.t values (1)", true),
        ("select U&\"pg\\005fadvisory_lock\"(1)", true),
        ("select pg_create_logical_replication_slot('a', 'b', true)", true),
        ("select 1; create temp table t()", true),
        ("", false),
        ("select 1", false),
        ("select temp from weather", false),
        ("select my_set_config(1)", false),
        ("select temperature, template from weather", false),
        ("update t set a = 1", false),
        ("select xpg_advisory_lock(1)", false),
    ];
    for (sql, touches) in rows {
        assert_eq!(may_touch_session_state(sql.as_bytes()), touches, "{sql}");
    }
}

#[test]
fn what_a_server_cannot_read_is_known() {
    let rows: &[(u8, &[u8], bool)] = &[
        (b'Q', b"SELECT 1\0", false),
        (b'Q', b"\0", false),
        (b'Q', b"", true),
        (b'Q', b"SELECT 1", true),
        (b'Q', b"SELECT 1\0SELECT 2\0", true),
        (b'P', b"s\0SELECT 1\0\0\0", false),
        (b'P', b"\0\0\0\x01\0\0\0\x17", false),
        (b'P', b"", true),
        (b'P', b"s\0SELECT 1", true),
        (b'P', b"s\0SELECT 1\0\0", true),
        (b'P', b"s\0SELECT 1\0\0\x01\0\0\0", true),
        (b'P', b"s\0SELECT 1\0\0\0x", true),
        (b'B', b"\0s\0\0\0\0\0\0\0", false),
        (b'B', b"\0s", true),
        (b'B', b"", true),
        (b'D', b"Ss\0", false),
        (b'D', b"P\0", false),
        (b'D', b"Xs\0", true),
        (b'C', b"Ss", true),
        (b'C', b"Ss\0x", true),
        (b'C', b"", true),
        (b'E', b"\0\0\0\0\0", false),
        (b'E', b"\0\0\0\0", true),
        (b'E', b"\0\0\0\0\0x", true),
        (b'S', b"", false),
        (b'S', b"x", true),
        (b'H', b"", false),
        (b'H', b"x", true),
        (b'X', b"x", false),
        (b'd', b"", false),
        (b'c', b"x", false),
        (b'f', b"", false),
    ];
    for &(tag, body, malformed) in rows {
        let len = body.len() as u32 + 4;
        let seen = |body, len| Seen { tag, len, body, start: None, end: None };
        let row = format!("{} {}", tag.escape_ascii(), body.escape_ascii());
        assert_eq!(is_malformed(&seen(body, len)), malformed, "{row}");
        if matches!(tag, b'P' | b'B' | b'C' | b'D' | b'E') {
            assert!(!is_malformed(&seen(body, len + 1)), "what is not seen is not judged: {row}");
        }
    }
}

/// Pieces from which statements with every kind of quoting are put together.
fn sql_text() -> impl Strategy<Value = String> {
    let piece = prop::sample::select(vec![
        "select",
        "commit",
        "rollback",
        "begin",
        "to",
        "work",
        "and chain",
        ";",
        " ",
        "'",
        "''",
        "\"",
        "$$",
        "$a$",
        "$1",
        "--",
        "\n",
        "/*",
        "*/",
        "\\",
        "E'",
        "x",
        "a$",
        "(",
        "\u{e9}",
        "set",
        "temp",
        "into",
        "pg_advisory_lock",
        "prepare",
        "transaction",
    ]);
    prop::collection::vec(piece, 0..14).prop_map(|pieces| pieces.concat())
}

proptest! {
    #[test]
    fn no_bytes_break_a_view(input in prop::collection::vec(any::<u8>(), 0..200)) {
        fuzz_frontend(&input);
        fuzz_sql(&input);
    }

    #[test]
    fn no_length_breaks_a_view(
        name in "[a-z]{0,8}",
        len in any::<u32>(),
        rest in prop::collection::vec(prop_oneof![Just(0u8), any::<u8>()], 0..40),
    ) {
        fuzz_frontend(&[name.as_bytes(), &[0], &len.to_be_bytes(), &rest].concat());
    }

    #[test]
    fn no_text_breaks_the_scans(sql in sql_text()) {
        fuzz_sql(sql.as_bytes());
    }

    #[test]
    fn an_end_behind_a_complete_statement_is_never_missed(
        sql in sql_text(),
        end in prop::sample::select(vec!["commit", "ROLLBACK", "end", "call p()"]),
    ) {
        // A text of which we are sure that it is one statement, ended and followed by another.
        if is_single_statement(sql.as_bytes()) && !sql.contains("--") {
            let both = format!("{sql};{end}");
            prop_assert!(may_end_transaction(both.as_bytes()), "{both}");
        }
    }

    #[test]
    fn any_names_and_texts_read_back(name in "[^\0]{0,20}", sql in "[^\0]{0,60}") {
        let mut out = BytesMut::new();
        put_parse(name.as_bytes(), sql.as_bytes(), &[], &mut out).unwrap();
        put_query(sql.as_bytes(), &mut out).unwrap();
        let parse = take_frame(&mut out, 4096).unwrap().unwrap();
        let view = ParseMessage::parse(&parse.body).unwrap();
        prop_assert_eq!((view.statement, view.sql), (name.as_bytes(), sql.as_bytes()));
        let frame = take_frame(&mut out, 4096).unwrap().unwrap();
        prop_assert_eq!(query(&frame.body).unwrap(), sql.as_bytes());
    }
}

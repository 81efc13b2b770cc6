//! The state that one client of a pool leaves behind reaches nobody else, and is still there for
//! itself: a pool of one connection, so that every client gets what the last one had.

use std::fs;
use std::time::Duration;

use anyhow::{Context, Result};
use bytes::BytesMut;
use kornak_protocol::frontend;
use kornak_tests::run::postgres::{Postgres, SUPERUSER_PASSWORD, connect, sqlstate, text};
use kornak_tests::run::proxy::Proxy;
use kornak_tests::run::scratch::Scratch;
use kornak_tests::talk::{Login, Talker, put_execution};
use tokio_postgres::Client;

const SOON: Duration = Duration::from_secs(15);

struct Pool {
    proxy: Proxy,
    admin: Client,
}

impl Pool {
    async fn start(scratch: &Scratch, server: &Postgres, reset: &str) -> Result<Self> {
        let port = server.port();
        let head = format!(
            "scope: demo\nstatic:\n  members: [{{name: a, host: 127.0.0.1, port: {port}}}]"
        );
        let lines = format!(
            "auth: {{method: scram, user: postgres, password: \"{SUPERUSER_PASSWORD}\"}}\n\
             pool: {{wait_timeout: 5s, reset: {reset}}}"
        );
        let more = ", pool_mode: transaction, pool_size: 1";
        let proxy = Proxy::start_as(scratch, reset, &head, more, &lines).await?;
        let pool = Self { proxy, admin: server.connect().await? };
        pool.proxy.ready(&pool.conninfo(), SOON).await;
        Ok(pool)
    }

    fn conninfo(&self) -> String {
        let port = self.proxy.primary();
        format!("host=127.0.0.1 port={port} user=app password=right dbname=postgres")
    }

    async fn client(&self) -> Result<Client> {
        connect(&self.conninfo()).await.context("log in")
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_clients_leave_behind() -> Result<()> {
    let mut scratch = Scratch::new("pooling-state");
    let server = Postgres::start(&scratch, "pg", &[]).await?;
    let pool = {
        let admin = server.connect().await?;
        admin.batch_execute("CREATE ROLE app LOGIN PASSWORD 'right'").await?;
        admin.batch_execute("CREATE SCHEMA one AUTHORIZATION app").await?;
        admin.batch_execute("CREATE SCHEMA two AUTHORIZATION app").await?;
        Pool::start(&scratch, &server, "known").await?
    };
    what_functions_leave_is_their_clients_own(&pool).await.context("functions")?;
    sql_may_name_statements_of_the_protocol(&pool).await.context("sql")?;
    a_name_is_taken_whoever_has_taken_it(&pool, &server).await.context("names")?;
    statements_are_shared_under_equal_settings_only(&pool).await.context("settings")?;
    a_cursor_that_was_rolled_back_leaves_its_client_a_connection(&pool).await.context("cursor")?;
    who_shuts_its_sending_side_is_answered(&pool, &server).await.context("half closed")?;
    who_never_stops_talking_lets_others_have_their_turn(&pool).await.context("pipelines")?;
    what_a_session_has_set_does_not_bend_the_question(&pool).await.context("operators")?;
    a_password_set_again_ends_nobody(&pool, &server).await.context("password")?;
    let pool = Pool::start(&scratch, &server, "always").await?;
    a_reset_of_everything_leaves_nothing_of_a_trigger(&pool).await.context("always")?;
    scratch.passed();
    Ok(())
}

const TENANT: &str = "SELECT coalesce(current_setting('my.tenant', true), '')";

async fn what_functions_leave_is_their_clients_own(pool: &Pool) -> Result<()> {
    pool.admin
        .batch_execute(
            "CREATE FUNCTION become(who text) RETURNS void LANGUAGE sql \
             AS $$ SELECT set_config('my.tenant', who, false) $$; \
             CREATE FUNCTION inner_one() RETURNS void LANGUAGE plpgsql \
             AS $$ BEGIN PERFORM become('inner'); END $$; \
             CREATE PROCEDURE along() LANGUAGE plpgsql \
             AS $$ BEGIN SET work_mem = '9MB'; COMMIT; END $$; \
             CREATE FUNCTION built(part text) RETURNS void LANGUAGE plpgsql \
             AS $$ BEGIN PERFORM set_config('my.' || part, 'built', false); END $$",
        )
        .await?;
    let (a, b) = (pool.client().await?, pool.client().await?);
    for (sql, tenant, work_mem) in [
        ("SELECT become('one')", "one", "4MB"),
        ("SELECT inner_one()", "inner", "4MB"),
        ("CALL along()", "inner", "9MB"),
        ("DO $$ BEGIN SET my.tenant = 'do'; SET work_mem = '8MB'; END $$", "do", "8MB"),
        ("/* tag */ SET my.tenant = 'tag'; SELECT 1", "tag", "8MB"),
    ] {
        a.batch_execute(sql).await?;
        assert_eq!(text(&b, TENANT).await?, "", "{sql}");
        assert_eq!(text(&b, "SHOW work_mem").await?, "4MB", "{sql}");
        assert_eq!(text(&a, TENANT).await?, tenant, "{sql}");
        assert_eq!(text(&a, "SHOW work_mem").await?, work_mem, "{sql}");
    }
    // Its own client does not keep it, but nobody else gets it.
    a.batch_execute("SELECT built('tenant')").await?;
    assert_eq!(text(&b, TENANT).await?, "");
    Ok(())
}

async fn sql_may_name_statements_of_the_protocol(pool: &Pool) -> Result<()> {
    let (a, b) = (pool.client().await?, pool.client().await?);
    // The driver calls them s0, s1, …
    let of_a = a.prepare("SELECT $1::int + 1").await?;
    let of_b = b.prepare("SELECT $1::int + 1").await?;
    assert_eq!(text(&a, "SELECT 1").await?, "1");
    let names = a.simple_query("EXECUTE s0(41)").await;
    assert!(names.is_ok(), "{names:?}");
    a.batch_execute(
        "BEGIN; SAVEPOINT x; DEALLOCATE s0; RELEASE x; CREATE TABLE one.kept (); COMMIT",
    )
    .await?;
    assert_eq!(text(&b, "SELECT count(*) FROM pg_class WHERE relname = 'kept'").await?, "1");
    assert_eq!(sqlstate(a.query(&of_a, &[&1]).await), "26000");
    assert_eq!(sqlstate(a.batch_execute("DEALLOCATE s0").await), "26000");
    assert_eq!(b.query_one(&of_b, &[&1]).await?.get::<_, i32>(0), 2, "others keep theirs");
    // All of ours, by the names that the server shows.
    for name in ["_kornak:1", "_kornak:2", "_kornak:3"] {
        a.batch_execute(&format!("DEALLOCATE \"{name}\"")).await?;
    }
    assert_eq!(b.query_one(&of_b, &[&1]).await?.get::<_, i32>(0), 2);
    let error = b.prepare("SELECT nonsense").await.expect_err("there is no such column");
    assert!(!format!("{error:?}").contains("_kornak"), "{error:?}");
    Ok(())
}

async fn a_name_is_taken_whoever_has_taken_it(pool: &Pool, server: &Postgres) -> Result<()> {
    const PREPARE: &str = "PREPARE a AS SELECT 3";
    // In each batch a text is prepared under each name, and executed unless it is a query.
    let stories: [&[&[(&str, &str)]]; 4] = [
        &[&[("", PREPARE), ("a", "SELECT 1")], &[("b", "EXECUTE a")]],
        &[&[("b", PREPARE)], &[("a", "SELECT 1")], &[("", "DEALLOCATE a")], &[("a", "SELECT 2")]],
        &[&[("a", "SELECT 1")], &[("", PREPARE)], &[("a", "SELECT 2")], &[("", "EXECUTE a")]],
        &[&[("", PREPARE), ("", "DEALLOCATE a"), ("a", "SELECT 1")], &[("", "EXECUTE a")]],
    ];
    for story in stories {
        let mut told = Vec::new();
        for port in [server.port(), pool.proxy.primary()] {
            let mut client = Talker::login(&Login::new(port, "app", "right", "postgres")).await?;
            for batch in story {
                let mut out = BytesMut::new();
                for (name, text) in *batch {
                    if text.starts_with("SELECT") {
                        frontend::put_parse(name.as_bytes(), text.as_bytes(), &[], &mut out)?;
                    } else {
                        put_execution(name, Some(text), &mut out);
                    }
                }
                frontend::put_sync(&mut out);
                client.send(&out).await?;
                told.push(client.told(1).await?);
            }
        }
        let (direct, pooled) = told.split_at(story.len());
        assert_eq!(direct, pooled, "{story:?}");
    }
    Ok(())
}

async fn statements_are_shared_under_equal_settings_only(pool: &Pool) -> Result<()> {
    pool.admin
        .batch_execute(
            "CREATE TABLE one.t AS SELECT 1 AS x; CREATE TABLE two.t AS SELECT 'two'::text AS x; \
             GRANT ALL ON one.t, two.t TO app",
        )
        .await?;
    let (a, b) = (pool.client().await?, pool.client().await?);
    a.batch_execute("SET search_path = one; SET timezone = 'UTC'").await?;
    b.batch_execute("SET search_path = two; SET timezone = 'Asia/Tokyo'").await?;
    let sql = "SELECT extract(epoch FROM '2024-01-01'::timestamptz)::int8";
    let (time_a, time_b) = (a.prepare(sql).await?, b.prepare(sql).await?);
    let (of_a, of_b) = (a.prepare("SELECT x FROM t").await?, b.prepare("SELECT x FROM t").await?);
    for _ in 0..3 {
        assert_eq!(a.query_one(&of_a, &[]).await?.get::<_, i32>(0), 1);
        assert_eq!(b.query_one(&of_b, &[]).await?.get::<_, String>(0), "two");
        let at_a: i64 = a.query_one(&time_a, &[]).await?.get(0);
        let at_b: i64 = b.query_one(&time_b, &[]).await?.get(0);
        assert_eq!(at_a - at_b, 9 * 3600);
    }
    Ok(())
}

async fn a_cursor_that_was_rolled_back_leaves_its_client_a_connection(pool: &Pool) -> Result<()> {
    let (a, b) = (pool.client().await?, pool.client().await?);
    for sql in ["BEGIN", "SAVEPOINT s", "DECLARE c CURSOR WITH HOLD FOR SELECT 1"] {
        a.batch_execute(sql).await?;
    }
    a.batch_execute("ROLLBACK TO s").await?;
    a.batch_execute("COMMIT").await?;
    assert_eq!(text(&a, "SELECT 'a'").await?, "a");
    assert_eq!(text(&b, "SELECT 'b'").await?, "b");
    Ok(())
}

/// Finding 22; and nobody can end the COPY of a client that has said its last.
async fn who_shuts_its_sending_side_is_answered(pool: &Pool, server: &Postgres) -> Result<()> {
    pool.admin.batch_execute("CREATE TABLE copied (x int); GRANT ALL ON copied TO app").await?;
    let data = |text: &str| {
        let len = u32::try_from(text.len() + 4).unwrap_or(0).to_be_bytes();
        [b"d", &len[..], text.as_bytes()].concat()
    };
    let copy_done = b"c\0\0\0\x04".to_vec();
    let stories: [(&[&str], Vec<u8>); 4] = [
        (&["SELECT pg_sleep(0.05)", "SELECT 2"], Vec::new()),
        (&["BEGIN", "SELECT 1/0"], Vec::new()),
        (&["COPY copied FROM STDIN"], data("1\n")),
        (&["COPY copied FROM STDIN"], [data("2\n"), copy_done].concat()),
    ];
    for (queries, rest) in stories {
        let mut told = Vec::new();
        for port in [server.port(), pool.proxy.primary()] {
            let mut client = Talker::login(&Login::new(port, "app", "right", "postgres")).await?;
            for sql in queries {
                client.query(sql).await?;
            }
            client.send(&rest).await?;
            client.shut().await?;
            told.push(client.told(9).await.with_context(|| format!("{queries:?} at {port}"))?);
        }
        assert_eq!(told[0], told[1], "{queries:?}");
    }
    let client = pool.client().await?;
    assert_eq!(text(&client, "SELECT string_agg(x::text, ',') FROM copied").await?, "2,2");
    Ok(())
}

/// Finding 36.
async fn who_never_stops_talking_lets_others_have_their_turn(pool: &Pool) -> Result<()> {
    let login = Login::new(pool.proxy.primary(), "app", "right", "postgres");
    let mut talker = Talker::login(&login).await?;
    let mut batch = BytesMut::new();
    put_execution("", Some("SELECT pg_sleep(0.002)"), &mut batch);
    frontend::put_sync(&mut batch);
    let other = pool.client().await?;
    // So many batches are always on their way that nothing but the proxy makes a pause, also where the client
    // gets its turn late.
    for _ in 0..200 {
        talker.send(&batch).await?;
    }
    let stop = tokio_util::sync::CancellationToken::new();
    let stopped = stop.clone();
    let talking = tokio::spawn(async move {
        while !stopped.is_cancelled() {
            talker.send(&batch).await?;
            talker.told(1).await?;
        }
        anyhow::Ok(())
    });
    let answer = tokio::time::timeout(Duration::from_secs(4), text(&other, "SELECT 'b'")).await;
    stop.cancel();
    assert_eq!(answer.context("its turn comes")??, "b");
    talking.await??;
    Ok(())
}

/// Finding 31: operators and types of the client's own come first in its search path.
async fn what_a_session_has_set_does_not_bend_the_question(pool: &Pool) -> Result<()> {
    pool.admin
        .batch_execute(
            "CREATE FUNCTION one.no(text, text) RETURNS boolean LANGUAGE sql AS 'SELECT false'; \
             CREATE FUNCTION one.no(name, name) RETURNS boolean LANGUAGE sql AS 'SELECT false'; \
             CREATE FUNCTION one.no(oid, oid) RETURNS boolean LANGUAGE sql AS 'SELECT false'; \
             CREATE FUNCTION one.no(int, int) RETURNS boolean LANGUAGE sql AS 'SELECT false'; \
             CREATE OPERATOR one.= (FUNCTION = one.no, LEFTARG = text, RIGHTARG = text); \
             CREATE OPERATOR one.= (FUNCTION = one.no, LEFTARG = name, RIGHTARG = name); \
             CREATE OPERATOR one.= (FUNCTION = one.no, LEFTARG = oid, RIGHTARG = oid); \
             CREATE OPERATOR one.= (FUNCTION = one.no, LEFTARG = int, RIGHTARG = int); \
             CREATE FUNCTION two.holds() RETURNS void LANGUAGE plpgsql AS $$ BEGIN \
               PERFORM pg_catalog.pg_advisory_lock(31), pg_catalog.set_config('work_mem', '3MB', false); \
             END $$; GRANT USAGE ON SCHEMA one, two TO app",
        )
        .await?;
    let (a, b) = (pool.client().await?, pool.client().await?);
    a.batch_execute("SET search_path = one, pg_catalog").await?;
    a.batch_execute("SELECT two.holds()").await?;
    // It holds a lock, so that its connection is nobody else's.
    let denied = sqlstate(b.batch_execute("SELECT 1").await);
    assert_eq!(denied, "53300", "the only connection is kept");
    a.batch_execute("SELECT pg_advisory_unlock_all()").await?;
    assert_eq!(text(&b, "SHOW work_mem").await?, "4MB");
    assert_eq!(text(&b, "SHOW search_path").await?, "\"$user\", public");
    assert_eq!(text(&a, "SHOW work_mem").await?, "3MB");
    Ok(())
}

async fn a_password_set_again_ends_nobody(pool: &Pool, server: &Postgres) -> Result<()> {
    let hba = server.data_dir().join("pg_hba.conf");
    let before = fs::read_to_string(&hba)?;
    fs::write(&hba, format!("local all app trust\n{before}"))?;
    pool.admin.batch_execute("SELECT pg_reload_conf()").await?;
    let client = pool.client().await?;
    client.batch_execute("SET work_mem = '7MB'").await?;
    for password in ["right", "another", "right"] {
        pool.admin.batch_execute(&format!("ALTER ROLE app PASSWORD '{password}'")).await?;
        pool.admin
            .batch_execute(
                "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE usename = 'app'",
            )
            .await?;
        assert_eq!(text(&client, "SHOW work_mem").await?, "7MB", "{password}");
        let wrong = pool.conninfo().replace("password=right", "password=wrong");
        assert_eq!(sqlstate(connect(&wrong).await), "28P01");
    }
    fs::write(&hba, before)?;
    pool.admin.batch_execute("SELECT pg_reload_conf()").await?;
    Ok(())
}

async fn a_reset_of_everything_leaves_nothing_of_a_trigger(pool: &Pool) -> Result<()> {
    pool.admin
        .batch_execute(
            "CREATE TABLE watched (x int); GRANT ALL ON watched TO app; \
             CREATE FUNCTION sets() RETURNS trigger LANGUAGE plpgsql \
             AS $$ BEGIN PERFORM set_config('my.tenant', 'trigger', false), pg_advisory_lock(7); \
                   CREATE TEMP TABLE left_behind (); RETURN NEW; END $$; \
             CREATE TRIGGER t BEFORE INSERT ON watched FOR EACH ROW EXECUTE FUNCTION sets()",
        )
        .await?;
    let (a, b) = (pool.client().await?, pool.client().await?);
    a.batch_execute("SET work_mem = '7MB'").await?;
    let one = a.prepare("SELECT 1").await?;
    a.batch_execute("INSERT INTO watched VALUES (1)").await?;
    assert_eq!(text(&b, TENANT).await?, "");
    assert_eq!(text(&b, "SELECT count(*) FROM pg_class WHERE relname = 'left_behind'").await?, "0");
    let locks = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'";
    assert_eq!(text(&b, locks).await?, "0");
    assert_eq!(text(&a, "SHOW work_mem").await?, "7MB", "what is known is the client's own");
    assert_eq!(a.query_one(&one, &[]).await?.get::<_, i32>(0), 1);
    Ok(())
}

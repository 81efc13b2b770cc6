//! The state that one client of a pool leaves behind reaches nobody else, and is still there for
//! itself: a pool of one connection, so that every client gets what the last one had.

use std::fs;
use std::time::Duration;

use anyhow::{Context, Result};
use kornak_tests::run::postgres::{Postgres, SUPERUSER_PASSWORD, connect, sqlstate, text};
use kornak_tests::run::proxy::Proxy;
use kornak_tests::run::scratch::Scratch;
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
    statements_are_shared_under_equal_settings_only(&pool).await.context("settings")?;
    a_cursor_that_was_rolled_back_leaves_its_client_a_connection(&pool).await.context("cursor")?;
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

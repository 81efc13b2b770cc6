//! Transaction pooling over a real server: two connections, whoever comes. One server and one proxy
//! for most of it; every function below is a sentence, and each leaves the pool as it found it.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use futures_util::future::join_all;
use kornak_tests::load::{Load, LoadSpec};
use kornak_tests::run::cluster::{Cluster, ClusterSpec};
use kornak_tests::run::postgres::{Postgres, SUPERUSER_PASSWORD, connect, sqlstate, text};
use kornak_tests::run::proxy::Proxy;
use kornak_tests::run::scratch::Scratch;
use kornak_tests::run::wait::until;
use tokio::time::timeout;
use tokio_postgres::{AsyncMessage, Client, NoTls};

const SOON: Duration = Duration::from_secs(15);

/// Server connections of the pool.
const SIZE: i64 = 2;

struct Pool {
    scratch: Scratch,
    proxy: Proxy,
    _server: Postgres,
    admin: Client,
}

impl Pool {
    async fn start() -> Result<Self> {
        let scratch = Scratch::new("pooling");
        let server = Postgres::start(&scratch, "pg", &[]).await?;
        let admin = server.connect().await?;
        admin
            .batch_execute(
                "CREATE ROLE app LOGIN PASSWORD 'right'; CREATE ROLE other; GRANT other TO app",
            )
            .await?;
        admin.batch_execute("CREATE TABLE t (id int); GRANT ALL ON t TO PUBLIC").await?;
        let port = server.port();
        let head = format!(
            "scope: demo\nstatic:\n  members: [{{name: a, host: 127.0.0.1, port: {port}}}]"
        );
        let lines = format!(
            "auth: {{method: scram, user: postgres, password: \"{SUPERUSER_PASSWORD}\"}}\n\
             pool: {{wait_timeout: 3s, wait_notice: 1s}}"
        );
        let more = format!(", pool_mode: transaction, pool_size: {SIZE}");
        let proxy = Proxy::start_as(&scratch, "proxy", &head, &more, &lines).await?;
        let pool = Self { scratch, proxy, _server: server, admin };
        pool.proxy.ready(&pool.conninfo("ready"), SOON).await;
        Ok(pool)
    }

    fn conninfo(&self, name: &str) -> String {
        let port = self.proxy.primary();
        format!(
            "host=127.0.0.1 port={port} user=app password=right dbname=postgres \
             application_name={name}"
        )
    }

    async fn client(&self) -> Result<Client> {
        connect(&self.conninfo("a")).await.context("log in")
    }

    /// Server processes of the pool.
    async fn servers(&self) -> Result<i64> {
        let query = "SELECT count(*) FROM pg_stat_activity WHERE usename = 'app'";
        Ok(self.admin.query_one(query, &[]).await?.get(0))
    }

    /// A client that keeps one connection to itself until it is dropped or commits.
    async fn occupy(&self) -> Result<Client> {
        let client = self.client().await?;
        client.batch_execute("BEGIN; SELECT 1").await?;
        Ok(client)
    }

    /// Leaves one connection to the others, and not this one; the rest is held by the clients that
    /// are answered.
    async fn leave_another(&self, than: &str) -> Result<Vec<Client>> {
        let mut held = vec![self.occupy().await?, self.occupy().await?];
        let first = backend(&held[0]).await?;
        let free = held.remove(usize::from(first == than));
        free.batch_execute("COMMIT").await?;
        Ok(held)
    }

    /// Waits until a client can have each of the connections again.
    async fn is_free(&self) {
        until(SOON, "every connection can be had again", || async {
            for _ in 0..SIZE {
                let held = self.occupy().await.map_err(|error| format!("{error:#}"))?;
                let other = timeout(Duration::from_secs(5), self.occupy()).await;
                let _ = held.batch_execute("COMMIT").await;
                match other {
                    Ok(Ok(other)) => drop(other.batch_execute("COMMIT").await),
                    Ok(Err(error)) => return Err(format!("{error:#}")),
                    Err(_) => return Err("only one can be had".to_owned()),
                }
            }
            Ok(())
        })
        .await;
    }

    /// Cancel requests that the proxy has heard of.
    async fn cancels(&self) -> Result<u64> {
        let page = self.proxy.status().get("/metrics").await?.text;
        let line = page.lines().find_map(|line| line.strip_prefix("kornak_proxy_cancels_total "));
        Ok(line.context("the metric is missing")?.parse()?)
    }

    /// Waits until a session is pinned for this reason, or none is.
    async fn pinned(&self, reason: &str, wanted: bool) {
        until(SOON, &format!("pinned by {reason}: {wanted}"), || async {
            let status = self.proxy.status().get("/status").await.and_then(|it| it.json());
            let status = status.map_err(|error| format!("{error:#}"))?;
            let pinned = status["sessions"]["pinned"][reason].as_u64().unwrap_or(0);
            if (pinned > 0) == wanted { Ok(()) } else { Err(format!("{pinned} are")) }
        })
        .await;
    }
}

async fn backend(client: &Client) -> Result<String> {
    text(client, "SELECT pg_backend_pid()").await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pool_in_front_of_a_server() -> Result<()> {
    let mut pool = Pool::start().await?;
    many_clients_share_two_connections(&pool).await.context("many clients")?;
    a_transaction_stays_where_it_began(&pool).await.context("transaction")?;
    settings_follow_their_client_and_nobody_else(&pool).await.context("settings")?;
    a_reset_goes_back_to_what_the_client_logged_in_with(&pool).await.context("reset")?;
    prepared_statements_follow_their_client(&pool).await.context("prepared")?;
    the_unnamed_statement_is_the_clients_own(&pool).await.context("unnamed")?;
    more_statements_than_a_connection_keeps(&pool).await.context("many statements")?;
    an_altered_table_is_met_with_a_new_plan(&pool).await.context("altered")?;
    temporary_tables_keep_their_connection_until_they_are_dropped(&pool).await.context("temp")?;
    advisory_locks_are_kept_and_let_go(&pool).await.context("locks")?;
    set_config_by_a_function_becomes_a_setting(&pool).await.context("set_config")?;
    who_listens_is_notified_until_it_stops(&pool).await.context("listen")?;
    sql_prepare_keeps_its_connection(&pool).await.context("prepare")?;
    what_a_client_leaves_behind_is_cleared_away(&pool).await.context("leftovers")?;
    a_client_that_vanishes_in_a_transaction_leaves_nothing(&pool).await.context("vanished")?;
    who_waits_is_told_and_then_refused_and_lives_on(&pool).await.context("waiting")?;
    a_cancel_reaches_its_own_query_only(&pool).await.context("cancel")?;
    a_connection_that_ends_while_idle_is_noticed_by_nobody(&pool).await.context("ended")?;
    ensure!(pool.servers().await? <= SIZE, "too many connections");
    the_status_shows_the_pool(&pool).await.context("status")?;
    pool.scratch.passed();
    Ok(())
}

async fn the_status_shows_the_pool(pool: &Pool) -> Result<()> {
    let client = pool.client().await?;
    client.batch_execute("BEGIN").await?;
    until(SOON, "the pool as it is", || async {
        let status = pool.proxy.status().get("/status").await.and_then(|it| it.json());
        let status = status.map_err(|error| format!("{error:#}"))?;
        let pools = status["pools"].clone();
        let [shown] = pools.as_array().map(Vec::as_slice).unwrap_or_default() else {
            return Err(pools.to_string());
        };
        let fits = shown["listener"] == "primary"
            // Names are for those who have a password.
            && shown["user"].is_null()
            && !status.to_string().contains("app")
            && (&shown["clients"], &shown["lent"], &shown["waiting"])
                == (&1.into(), &1.into(), &0.into());
        if fits { Ok(()) } else { Err(pools.to_string()) }
    })
    .await;
    client.batch_execute("COMMIT").await?;
    Ok(())
}

async fn many_clients_share_two_connections(pool: &Pool) -> Result<()> {
    let clients = join_all((0..40).map(|_| pool.client())).await;
    let clients = clients.into_iter().collect::<Result<Vec<_>>>()?;
    let work = clients.iter().map(|client| async move {
        for _ in 0..10 {
            client.batch_execute("BEGIN; INSERT INTO t VALUES (1)").await?;
            client.query("INSERT INTO t VALUES ($1)", &[&2]).await?;
            client.batch_execute("COMMIT").await?;
        }
        Ok::<_, tokio_postgres::Error>(())
    });
    join_all(work).await.into_iter().collect::<Result<Vec<_>, _>>()?;
    assert_eq!(pool.servers().await?, SIZE);
    let rows: i64 = pool.admin.query_one("SELECT count(*) FROM t", &[]).await?.get(0);
    assert_eq!(rows, 40 * 10 * 2);
    Ok(())
}

async fn a_transaction_stays_where_it_began(pool: &Pool) -> Result<()> {
    let (a, b) = (pool.client().await?, pool.client().await?);
    a.batch_execute("BEGIN").await?;
    let first = backend(&a).await?;
    b.batch_execute("BEGIN").await?;
    assert_ne!(backend(&b).await?, first, "nobody shares it");
    assert_eq!(backend(&a).await?, first);
    a.batch_execute("COMMIT").await?;
    b.batch_execute("COMMIT").await?;
    Ok(())
}

async fn settings_follow_their_client_and_nobody_else(pool: &Pool) -> Result<()> {
    let a = pool.client().await?;
    a.batch_execute("SET work_mem = '7MB'; ").await?;
    a.batch_execute("SET search_path = pg_catalog, public").await?;
    a.batch_execute("SET ROLE other").await?;
    a.batch_execute("BEGIN; SET work_mem = '9MB'; ROLLBACK").await?;
    let mut last = String::new();
    for round in 0..6 {
        let held = pool.leave_another(&last).await?;
        let here = backend(&a).await?;
        assert_ne!(here, last, "it came to another connection");
        last = here;
        assert_eq!(text(&a, "SHOW work_mem").await?, "7MB", "round {round}");
        assert_eq!(text(&a, "SHOW search_path").await?, "pg_catalog, public");
        assert_eq!(text(&a, "SELECT current_user").await?, "other");
        let b = connect(&pool.conninfo("b")).await?;
        assert_eq!(text(&b, "SHOW work_mem").await?, "4MB");
        assert_eq!(text(&b, "SELECT current_user").await?, "app");
        assert_eq!(text(&b, "SHOW application_name").await?, "b");
        assert_eq!(text(&a, "SHOW application_name").await?, "a");
        held[0].batch_execute("COMMIT").await?;
    }
    Ok(())
}

async fn a_reset_goes_back_to_what_the_client_logged_in_with(pool: &Pool) -> Result<()> {
    let conninfo = format!("{} options='-c geqo=off'", pool.conninfo("mine"));
    let a = connect(&conninfo).await?;
    a.batch_execute("SET geqo = on").await?;
    a.batch_execute("SET application_name = 'else'").await?;
    a.batch_execute("RESET ALL").await?;
    assert_eq!(text(&a, "SHOW geqo").await?, "off");
    assert_eq!(text(&a, "SHOW application_name").await?, "mine");
    a.batch_execute("SET geqo = on").await?;
    a.batch_execute("DISCARD ALL").await?;
    assert_eq!(text(&a, "SHOW geqo").await?, "off");
    assert_eq!(text(&a, "SHOW application_name").await?, "mine");
    // The server is asked what the function may have left, after the connection has its name again.
    assert!(tokio::join!(a.batch_execute("DISCARD ALL"), a.batch_execute("CALL no()")).1.is_err());
    assert_eq!(text(&a, "SHOW application_name").await?, "mine");
    Ok(())
}

async fn prepared_statements_follow_their_client(pool: &Pool) -> Result<()> {
    // Both drivers' names are s0, s1, …; what they mean differs.
    let (a, b) = (pool.client().await?, pool.client().await?);
    let of_a = a.prepare("SELECT $1::int + 1").await?;
    let of_b = b.prepare("SELECT $1::int + 100").await?;
    let mut last = String::new();
    for number in 0..8 {
        let held = pool.leave_another(&last).await?;
        last = backend(&a).await?;
        assert_eq!(a.query_one(&of_a, &[&number]).await?.get::<_, i32>(0), number + 1);
        assert_eq!(b.query_one(&of_b, &[&number]).await?.get::<_, i32>(0), number + 100);
        let again = a.prepare("SELECT $1::int + 100").await?;
        assert_eq!(a.query_one(&again, &[&number]).await?.get::<_, i32>(0), number + 100);
        held[0].batch_execute("COMMIT").await?;
    }
    // An error in the middle of a batch takes back what did not happen.
    assert_eq!(sqlstate(a.prepare("SELECT no_such_column").await), "42703");
    a.batch_execute("BEGIN").await?;
    assert_eq!(sqlstate(a.prepare("SELECT 1 / $1::nonsense").await), "42704");
    assert_eq!(sqlstate(a.query(&of_a, &[&1]).await), "25P02");
    a.batch_execute("ROLLBACK").await?;
    assert_eq!(a.query_one(&of_a, &[&1]).await?.get::<_, i32>(0), 2);
    a.batch_execute("DEALLOCATE ALL").await?;
    assert_eq!(sqlstate(a.query(&of_a, &[&1]).await), "26000");
    assert_eq!(b.query_one(&of_b, &[&1]).await?.get::<_, i32>(0), 101, "b's is still there");
    Ok(())
}

async fn the_unnamed_statement_is_the_clients_own(pool: &Pool) -> Result<()> {
    let clients = join_all((0..6).map(|_| pool.client())).await;
    let clients = clients.into_iter().collect::<Result<Vec<_>>>()?;
    let work = clients.iter().enumerate().map(|(n, client)| async move {
        let n = i32::try_from(n)?;
        for _ in 0..20 {
            let typed = [(&n as &(dyn tokio_postgres::types::ToSql + Sync), INT)];
            let rows = client.query_typed(&format!("SELECT $1 + {n}"), &typed).await?;
            ensure!(rows.first().map(|row| row.get::<_, i32>(0)) == Some(n * 2), "somebody else's");
        }
        Ok(())
    });
    join_all(work).await.into_iter().collect::<Result<Vec<_>>>()?;
    Ok(())
}

const INT: tokio_postgres::types::Type = tokio_postgres::types::Type::INT4;

async fn more_statements_than_a_connection_keeps(pool: &Pool) -> Result<()> {
    let a = pool.client().await?;
    let mut statements = Vec::new();
    for n in 0..230 {
        statements.push(a.prepare(&format!("SELECT {n}")).await?);
    }
    for (n, statement) in statements.iter().enumerate() {
        let row = a.query_one(statement, &[]).await?;
        assert_eq!(row.get::<_, i32>(0), i32::try_from(n)?);
    }
    let kept = text(&a, "SELECT count(*) FROM pg_prepared_statements").await?;
    ensure!(kept.parse::<u32>()? <= 200, "{kept} are kept");
    Ok(())
}

async fn an_altered_table_is_met_with_a_new_plan(pool: &Pool) -> Result<()> {
    pool.admin.batch_execute("CREATE TABLE altered (a int); GRANT ALL ON altered TO app").await?;
    let a = pool.client().await?;
    let before = a.prepare("SELECT * FROM altered").await?;
    a.query(&before, &[]).await?;
    pool.admin.batch_execute("ALTER TABLE altered ADD b int").await?;
    let result = a.query(&before, &[]).await;
    assert_eq!(sqlstate(result), "0A000", "as the server says without a proxy");
    // What a driver does then.
    let after = a.prepare("SELECT * FROM altered").await?;
    assert_eq!(after.columns().len(), 2);
    a.query(&after, &[]).await?;
    Ok(())
}

async fn temporary_tables_keep_their_connection_until_they_are_dropped(pool: &Pool) -> Result<()> {
    let a = pool.client().await?;
    a.batch_execute("CREATE TEMP TABLE own (id int)").await?;
    let here = backend(&a).await?;
    a.batch_execute("INSERT INTO own VALUES (1)").await?;
    assert_eq!(backend(&a).await?, here);
    pool.pinned("temporary_table", true).await;
    let b = pool.client().await?;
    assert_eq!(sqlstate(b.simple_query("SELECT * FROM own").await), "42P01");
    a.batch_execute("DROP TABLE own").await?;
    // One that ends with its transaction keeps nothing.
    a.batch_execute("BEGIN; CREATE TEMP TABLE own (id int) ON COMMIT DROP; COMMIT").await?;
    pool.pinned("temporary_table", false).await;
    pool.is_free().await;
    Ok(())
}

async fn advisory_locks_are_kept_and_let_go(pool: &Pool) -> Result<()> {
    let (a, b) = (pool.client().await?, pool.client().await?);
    let try_lock = "SELECT pg_try_advisory_lock(7)";
    assert_eq!(text(&a, try_lock).await?, "t");
    for _ in 0..3 {
        assert_eq!(text(&b, try_lock).await?, "f", "a has it");
        let here = backend(&a).await?;
        assert_eq!(backend(&a).await?, here);
    }
    a.simple_query("SELECT pg_advisory_unlock(7)").await?;
    a.simple_query("BEGIN; SELECT pg_advisory_xact_lock(8); COMMIT").await?;
    pool.pinned("opaque_function", false).await;
    assert_eq!(text(&b, try_lock).await?, "t");
    drop(b);
    until(SOON, "the lock of a client that left is free", || async {
        match text(&a, try_lock).await.map_err(|error| format!("{error:#}"))?.as_str() {
            "t" => Ok(()),
            _ => Err("taken".to_owned()),
        }
    })
    .await;
    drop(a);
    pool.is_free().await;
    Ok(())
}

async fn set_config_by_a_function_becomes_a_setting(pool: &Pool) -> Result<()> {
    let a = pool.client().await?;
    a.simple_query("SELECT set_config('search_path', 'public, \"it''s\"', false)").await?;
    a.simple_query("BEGIN; SELECT set_config('work_mem', '9MB', true); COMMIT").await?;
    pool.pinned("opaque_function", false).await;
    for _ in 0..4 {
        let held = pool.occupy().await?;
        assert_eq!(text(&a, "SHOW search_path").await?, "public, \"it's\"");
        assert_eq!(text(&a, "SHOW work_mem").await?, "4MB");
        held.batch_execute("COMMIT").await?;
        let b = pool.client().await?;
        assert_eq!(text(&b, "SHOW search_path").await?, "\"$user\", public");
    }
    Ok(())
}

async fn who_listens_is_notified_until_it_stops(pool: &Pool) -> Result<()> {
    let (a, mut connection) = tokio_postgres::connect(&pool.conninfo("a"), NoTls).await?;
    let (tell, mut told) = tokio::sync::mpsc::unbounded_channel();
    tokio::spawn(async move {
        while let Some(Ok(message)) = std::future::poll_fn(|cx| connection.poll_message(cx)).await {
            if let AsyncMessage::Notification(notification) = message {
                let _ = tell.send(notification.payload().to_owned());
            }
        }
    });
    a.batch_execute("LISTEN news").await?;
    pool.pinned("listen", true).await;
    pool.admin.batch_execute("NOTIFY news, 'one'").await?;
    assert_eq!(timeout(SOON, told.recv()).await?.as_deref(), Some("one"));
    a.batch_execute("UNLISTEN *").await?;
    pool.pinned("listen", false).await;
    pool.is_free().await;
    Ok(())
}

async fn sql_prepare_keeps_its_connection(pool: &Pool) -> Result<()> {
    let a = pool.client().await?;
    a.batch_execute("PREPARE mine AS SELECT 42").await?;
    for _ in 0..3 {
        let held = pool.occupy().await?;
        assert_eq!(text(&a, "EXECUTE mine").await?, "42");
        held.batch_execute("COMMIT").await?;
    }
    pool.pinned("sql_prepare", true).await;
    a.batch_execute("DEALLOCATE mine").await?;
    pool.pinned("sql_prepare", false).await;
    Ok(())
}

async fn what_a_client_leaves_behind_is_cleared_away(pool: &Pool) -> Result<()> {
    for _ in 0..3 {
        let a = pool.client().await?;
        a.batch_execute("CREATE TEMP TABLE left_behind (id int)").await?;
        a.batch_execute("SET work_mem = '11MB'; PREPARE p AS SELECT 1; LISTEN x").await?;
        drop(a);
    }
    pool.is_free().await;
    let b = pool.client().await?;
    for _ in 0..4 {
        let held = pool.occupy().await?;
        assert_eq!(text(&b, "SHOW work_mem").await?, "4MB");
        assert_eq!(text(&b, "SELECT count(*) FROM pg_listening_channels()").await?, "0");
        assert_eq!(sqlstate(b.simple_query("EXECUTE p").await), "26000");
        assert_eq!(sqlstate(b.simple_query("SELECT * FROM left_behind").await), "42P01");
        held.batch_execute("COMMIT").await?;
    }
    Ok(())
}

async fn a_client_that_vanishes_in_a_transaction_leaves_nothing(pool: &Pool) -> Result<()> {
    pool.admin.batch_execute("TRUNCATE t").await?;
    for _ in 0..SIZE {
        let a = pool.client().await?;
        a.batch_execute("BEGIN; INSERT INTO t VALUES (666); SET LOCAL work_mem = '13MB'").await?;
        drop(a);
    }
    pool.is_free().await;
    let b = pool.client().await?;
    b.batch_execute("BEGIN").await?;
    assert_eq!(text(&b, "SHOW work_mem").await?, "4MB");
    assert_eq!(text(&b, "SELECT count(*) FROM t").await?, "0");
    b.batch_execute("COMMIT").await?;
    assert_eq!(text(&b, "SELECT count(*) FROM t").await?, "0");
    Ok(())
}

async fn who_waits_is_told_and_then_refused_and_lives_on(pool: &Pool) -> Result<()> {
    let (waiting, mut connection) = tokio_postgres::connect(&pool.conninfo("a"), NoTls).await?;
    let (tell, mut told) = tokio::sync::mpsc::unbounded_channel();
    tokio::spawn(async move {
        while let Some(Ok(message)) = std::future::poll_fn(|cx| connection.poll_message(cx)).await {
            if let AsyncMessage::Notice(notice) = message {
                let _ = tell.send(notice.message().to_owned());
            }
        }
    });
    let held = [pool.occupy().await?, pool.occupy().await?];
    let refused = timeout(SOON, waiting.simple_query("SELECT 1")).await?;
    assert_eq!(sqlstate(refused), "53300");
    let notice = told.recv().await.context("no notice")?;
    assert!(notice.contains("busy"), "{notice}");
    // In an extended batch as well.
    assert_eq!(sqlstate(timeout(SOON, waiting.query("SELECT 1", &[])).await?), "53300");
    drop(held);
    assert_eq!(text(&waiting, "SELECT 1").await?, "1");
    Ok(())
}

async fn a_cancel_reaches_its_own_query_only(pool: &Pool) -> Result<()> {
    let (a, b) = (pool.client().await?, pool.client().await?);
    // Idle: ignored, whoever has its last connection now.
    let held = pool.occupy().await?;
    backend(&a).await?;
    let work = b.simple_query("SELECT pg_sleep(1)");
    let before = pool.cancels().await?;
    let cancels = async {
        for _ in 0..20 {
            a.cancel_token().cancel_query(NoTls).await?;
        }
        Ok::<_, tokio_postgres::Error>(())
    };
    let (worked, cancelled) = tokio::join!(work, cancels);
    cancelled?;
    assert_eq!(sqlstate(worked), "no error", "b's query was cancelled by a");
    // The driver does not wait for them to arrive, and the next query must not be hit.
    until(SOON, "every request has arrived", || async {
        let now = pool.cancels().await.map_err(|error| format!("{error:#}"))?;
        if now == before + 20 { Ok(()) } else { Err(format!("{now} after {before}")) }
    })
    .await;
    // Running: cancelled.
    let work = a.simple_query("SELECT pg_sleep(60)");
    let cancel = async {
        until(SOON, "it sleeps", || async {
            let query = "SELECT count(*) FROM pg_stat_activity WHERE query LIKE '%pg_sleep(60)' \
                         AND state = 'active'";
            match pool.admin.query_one(query, &[]).await {
                Ok(row) if row.get::<_, i64>(0) == 1 => Ok(()),
                _ => Err("not yet".to_owned()),
            }
        })
        .await;
        a.cancel_token().cancel_query(NoTls).await
    };
    let (worked, cancelled) = tokio::join!(timeout(SOON, work), cancel);
    cancelled?;
    assert_eq!(sqlstate(worked?), "57014");
    // Waiting for a connection: answered by the proxy.
    let more = pool.occupy().await?;
    let work = a.simple_query("SELECT 1");
    let cancel = async {
        until(SOON, "it waits", || async {
            let status = pool.proxy.status().get("/status").await.and_then(|it| it.json());
            let held = status.map_err(|error| format!("{error:#}"))?;
            let held = held["sessions"]["by_state"]["held"].as_u64();
            if held == Some(1) { Ok(()) } else { Err(format!("{held:?} wait")) }
        })
        .await;
        a.cancel_token().cancel_query(NoTls).await
    };
    let (worked, cancelled) = tokio::join!(timeout(SOON, work), cancel);
    cancelled?;
    assert_eq!(sqlstate(worked?), "57014");
    drop((held, more));
    assert_eq!(text(&a, "SELECT 1").await?, "1");
    Ok(())
}

async fn a_connection_that_ends_while_idle_is_noticed_by_nobody(pool: &Pool) -> Result<()> {
    let clients = join_all((0..6).map(|_| pool.client())).await;
    let clients = clients.into_iter().collect::<Result<Vec<_>>>()?;
    for _ in 0..3 {
        join_all(clients.iter().map(backend)).await.into_iter().collect::<Result<Vec<_>>>()?;
        let end = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'app'";
        until(SOON, "they are gone", || async {
            // Again: one may have been on its way for clients that did not have to wait for it.
            pool.admin.simple_query(end).await.map_err(|error| error.to_string())?;
            let left = pool.servers().await.map_err(|error| error.to_string())?;
            if left == 0 { Ok(()) } else { Err(format!("{left} left")) }
        })
        .await;
    }
    join_all(clients.iter().map(backend)).await.into_iter().collect::<Result<Vec<_>>>()?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pool_goes_along_in_switchovers_and_after_a_crash() -> Result<()> {
    let cluster = Cluster::start(ClusterSpec {
        name: "pooled",
        listener: ", pool_mode: transaction, pool_size: 6",
        ..Default::default()
    })
    .await?;
    // 18 clients on six connections.
    let load = Load::start(&LoadSpec::mixed(&cluster.app())).await?;
    load.flows(20, Duration::from_secs(30)).await;
    for _ in 0..3 {
        println!("{}", cluster.switchover_to_the_next().await?);
        load.flows(10, Duration::from_secs(20)).await;
        cluster.healthy(Duration::from_secs(45)).await;
    }
    let report = load.stop_and_verify(&cluster.app_on_leader().await?).await?;
    assert_eq!((report.errors(), report.lost_connections(), report.stale_reads()), (0, 0, 0));

    let load = Load::start(&LoadSpec::mixed(&cluster.app())).await?;
    load.flows(20, Duration::from_secs(30)).await;
    let leader = cluster.leader().await?;
    cluster.node(&leader)?.kill_postmaster()?;
    load.flows(10, Duration::from_secs(60)).await;
    cluster.healthy(Duration::from_secs(90)).await;
    let report = load.stop().await;
    println!("{report}");
    let verdict = report.verify(&cluster.app_on_leader().await?).await?;
    println!("{verdict}");
    for (client, problem) in report.problems() {
        println!("{} got {:?} in {:?}", client.kind, problem.sqlstate, problem.doing);
    }
    assert!(verdict.is_clean(), "{verdict}");
    assert_eq!(report.lost_connections(), 0, "clients of a pool stay");
    cluster.passed();
    Ok(())
}

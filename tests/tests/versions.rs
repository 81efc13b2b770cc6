//! The differences between PostgreSQL's releases: `KORNAK_PG_BIN` names the programs of one, and
//! `make matrix` runs this with each. A test says `skipped:` with the reason where a release does
//! not have its subject.

#![expect(clippy::print_stdout, reason = "a test says what it skips and what it saw")]

use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use kornak_tests::run::agent::Node;
use kornak_tests::run::cluster::{Cluster, ClusterSpec, run};
use kornak_tests::run::postgres::{describe, program, release};
use kornak_tests::run::psql::{Said, psql};
use kornak_tests::run::wait::until;
use serde_json::json;

const LIMIT: Duration = Duration::from_secs(60);

async fn value(node: &Node, database: &str, sql: &str) -> Result<Option<String>, String> {
    let client = node.connect_to(database).await.map_err(|error| describe(&error))?;
    let rows = client.query(sql, &[]).await.map_err(|error| describe(&error))?;
    Ok(rows.first().and_then(|row| row.get(0)))
}

/// Changes of the table that the slot's user has not had yet.
async fn changes(node: &Node) -> Result<Vec<String>> {
    let client = node.connect_to("app").await?;
    let sql =
        "SELECT data FROM pg_logical_slot_get_changes('fo', NULL, NULL) WHERE data LIKE 'table%'";
    let rows = client.query(sql, &[]).await.context("read the slot")?;
    Ok(rows.iter().map(|row| row.get(0)).collect())
}

/// Waits until each standby has the failover slot as PostgreSQL keeps it.
async fn synchronized(cluster: &Cluster, leader: &str) -> Result<()> {
    let source = cluster.node(leader)?;
    for node in cluster.nodes.iter().filter(|node| node.name() != leader) {
        until(LIMIT, &format!("{} has the failover slot", node.name()), || async {
            // A standby takes it once the slot's user is further than what the standby still has.
            value(source, "app", "SELECT pg_log_standby_snapshot()::text").await?;
            changes(source).await.map_err(|error| format!("{error:#}"))?;
            let sql = "SELECT (to_jsonb(s) - 'database')::text FROM pg_replication_slots AS s \
                       WHERE slot_name = 'fo'";
            let slot = value(node, "app", sql).await?.unwrap_or_default();
            let is_ready = slot.contains(r#""synced": true"#)
                && slot.contains(r#""temporary": false"#)
                && slot.contains(r#""invalidation_reason": null"#);
            if is_ready { Ok(()) } else { Err(slot) }
        })
        .await;
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn failover_slots_are_there_after_a_switchover_and_a_crash() -> Result<()> {
    let found = release()?;
    if found < 17 {
        println!("skipped: PostgreSQL {found} has no failover slots");
        return Ok(());
    }
    let parameters =
        ["wal_level: logical", "sync_replication_slots: on", "hot_standby_feedback: on"];
    let spec = ClusterSpec {
        name: "failover-slots",
        synchronous: false,
        parameters: parameters.map(str::to_owned).to_vec(),
        ..Default::default()
    };
    let mut cluster = Cluster::start(spec).await?;
    let names: Vec<String> = cluster.nodes.iter().map(|node| node.name().to_owned()).collect();
    // Consumers must not be ahead of a standby: each node names the slots of the others.
    for node in &cluster.nodes {
        let others: Vec<&str> =
            names.iter().map(String::as_str).filter(|name| *name != node.name()).collect();
        let line = format!("synchronized_standby_slots: '{}'", others.join(", "));
        node.edit(
            "    log_checkpoints: \"on\"\n",
            &format!("    log_checkpoints: \"on\"\n    {line}\n"),
        )?;
        node.reload()?;
    }
    let first = cluster.leader().await?;
    cluster.app_on_leader().await?.batch_execute("CREATE TABLE t (i int)").await?;
    let node = cluster.node(&first)?;
    let sql = "SELECT pg_create_logical_replication_slot('fo', 'test_decoding', false, false, true)::text";
    value(node, "app", sql).await.map_err(anyhow::Error::msg)?;
    synchronized(&cluster, &first).await?;

    value(node, "app", "INSERT INTO t VALUES (1) RETURNING i::text")
        .await
        .map_err(anyhow::Error::msg)?;
    let second = names.iter().find(|name| **name != first).context("three nodes")?;
    cluster.switchover(&first, second).await?;
    // The store names the new leader before its recovery has ended, and until then its slots are not to be read.
    cluster.new_leader(&first, LIMIT).await;
    let rows = changes(cluster.node(second)?).await?;
    ensure!(rows.iter().any(|row| row.contains("integer]:1")), "after the switchover: {rows:?}");

    // The former primary's own slot makes room for the copy of the new one's.
    synchronized(&cluster, second).await?;
    let node = cluster.node(second)?;
    value(node, "app", "INSERT INTO t VALUES (2) RETURNING i::text")
        .await
        .map_err(anyhow::Error::msg)?;
    cluster.healthy(LIMIT).await;
    cluster.node_mut(second)?.kill_all();
    let third = cluster.new_leader(second, LIMIT).await;
    // The server gives consumers nothing that a standby on its list does not have.
    cluster.node_mut(second)?.start_agent()?;
    cluster.healthy(LIMIT).await;
    let rows = changes(cluster.node(&third)?).await?;
    ensure!(rows.iter().any(|row| row.contains("integer]:2")), "after the crash: {rows:?}");
    ensure!(!rows.iter().any(|row| row.contains("integer]:1")), "nothing from long ago: {rows:?}");
    synchronized(&cluster, &third).await?;
    cluster.passed();
    Ok(())
}

/// Waits until the standby has replayed what the leader has written so far.
async fn replayed(leader: &Node, standby: &Node) -> Result<()> {
    let written = value(leader, "postgres", "SELECT pg_current_wal_lsn()::text").await;
    let written = written.map_err(anyhow::Error::msg)?.context("a position")?;
    let sql = format!("SELECT (pg_last_wal_replay_lsn() >= '{written}')::text");
    until(LIMIT, &format!("{} has replayed {written}", standby.name()), || async {
        match value(standby, "postgres", &sql).await? {
            Some(answer) if answer == "true" => Ok(()),
            other => Err(format!("{other:?}")),
        }
    })
    .await;
    Ok(())
}

/// Whether a member says that it waits for a restart.
async fn is_pending(node: &Node) -> Result<bool, String> {
    let answer = node.rest().get("/patroni").await.map_err(|error| format!("{error:#}"))?;
    Ok(answer.json().map_err(|error| format!("{error:#}"))?["pending_restart"] == true)
}

/// A standby must not have less than its primary has: which of the two is restarted first makes the difference.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_parameter_that_needs_a_restart_is_raised_and_lowered() -> Result<()> {
    let spec =
        ClusterSpec { name: "pending", nodes: 2, synchronous: false, ..ClusterSpec::default() };
    let cluster = Cluster::start(spec).await?;
    let leader = cluster.leader().await?;
    let standby = cluster.nodes.iter().find(|node| node.name() != leader).context("two nodes")?;
    let leader = cluster.node(&leader)?;
    for (wanted, order) in [("130", [standby, leader]), ("70", [leader, standby])] {
        let parameters = json!({"postgresql": {"parameters": {"max_connections": wanted}}});
        cluster.configure(&parameters).await?;
        for node in order {
            until(LIMIT, &format!("{} waits for a restart", node.name()), || async {
                if is_pending(node).await? { Ok(()) } else { Err("not so".to_owned()) }
            })
            .await;
        }
        for node in order {
            let answer = node.rest().post("/restart", &json!({"restart_pending": true})).await?;
            ensure!(answer.code == 200, "{}: {} {}", node.name(), answer.code, answer.text);
            cluster.healthy(LIMIT).await;
            // A standby cannot start with fewer connections than the last record that it replayed demands.
            replayed(leader, standby).await?;
        }
        for node in order {
            until(LIMIT, &format!("{} has {wanted} and is content", node.name()), || async {
                let found = value(node, "postgres", "SHOW max_connections").await?;
                let pending = is_pending(node).await?;
                let is_so = found.as_deref() == Some(wanted) && !pending;
                if is_so { Ok(()) } else { Err(format!("{found:?}, pending: {pending}")) }
            })
            .await;
        }
    }
    cluster.passed();
    Ok(())
}

/// Sends SIGINT to a `psql` in a long query; what it said.
async fn interrupted(cluster: &Cluster, conninfo: &str, word: &str) -> Result<Said> {
    let sql = format!("SELECT pg_sleep(60) /* {word} */");
    let mut command = program("psql");
    command.args(["-X", "-A", "-t", "-w", "-c", &sql, "-d", conninfo]).env("HOME", "/nonexistent");
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let child = command.spawn().context("start psql")?;
    let pid = child.id();
    let leader = cluster.leader().await?;
    let node = cluster.node(&leader)?;
    let running = format!(
        "SELECT count(*)::text FROM pg_stat_activity WHERE state = 'active' AND query = '{sql}'"
    );
    until(LIMIT, "the query runs", || async {
        match value(node, "postgres", &running).await? {
            Some(count) if count == "1" => Ok(()),
            other => Err(format!("{other:?}")),
        }
    })
    .await;
    kornak_tests::run::process::send(pid, rustix::process::Signal::INT)?;
    let output = tokio::task::spawn_blocking(move || child.wait_with_output()).await??;
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    Ok(Said {
        ok: output.status.success(),
        text: text(&output.stdout),
        error: text(&output.stderr),
    })
}

/// Ways in which this release's libpq can connect; `None`: it has no TLS.
async fn ways(found: u32, base: &str) -> Result<Vec<String>> {
    let mut ways = vec!["sslmode=disable".to_owned()];
    let tried = psql(&format!("{base} sslmode=require"), "", "SELECT 1").await?;
    if tried.error.contains("SSL support is not compiled in") {
        println!("skipped in part: these programs have no TLS");
    } else {
        ways.push("sslmode=require channel_binding=require".to_owned());
        if found >= 17 {
            ways.push("sslmode=require sslnegotiation=direct".to_owned());
        }
    }
    if found >= 18 {
        let newest: Vec<String> =
            ways.iter().map(|way| format!("{way} min_protocol_version=3.2")).collect();
        ways.extend(newest);
    }
    Ok(ways)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_releases_own_libpq_works_through_the_proxy() -> Result<()> {
    let found = release()?;
    let spec = ClusterSpec {
        name: "libpq",
        nodes: 2,
        synchronous: false,
        tls: true,
        ..ClusterSpec::default()
    };
    let cluster = Cluster::start(spec).await?;
    let pooled = cluster.pooled_proxy(4).await?;
    pooled.ready(&Cluster::app_on(pooled.primary()), LIMIT).await;
    for (port, is_pooled) in [(cluster.proxy.primary(), false), (pooled.primary(), true)] {
        let base = Cluster::app_on(port);
        for way in ways(found, &base).await? {
            if is_pooled && way.contains("sslmode=require") {
                continue;
            }
            let conninfo = format!("{base} {way}");
            let sql = "CREATE TEMP TABLE x (i int); INSERT INTO x SELECT generate_series(1, 1000); \
                       SELECT sum(i) FROM x";
            let said = psql(&conninfo, "", sql).await?;
            assert_eq!(said.expect(&way).lines().last(), Some("500500"), "{way}");
            let copied =
                psql(&conninfo, "", "\\copy (SELECT generate_series(1, 3)) TO STDOUT").await?;
            assert_eq!(copied.expect(&way), "1\n2\n3", "{way}");
            let conninfo = format!("{conninfo} gssencmode=disable");
            let said = interrupted(&cluster, &conninfo, &format!("{port} {way}")).await?;
            let refusal = said.expect_err(&way);
            assert!(
                refusal.contains("canceling statement due to user request"),
                "{way}: {refusal}"
            );
            println!("PostgreSQL {found}, pooled: {is_pooled}, {way}: ok");
        }
    }
    drivers(&cluster, pooled.primary()).await?;
    cluster.passed();
    Ok(())
}

/// Drivers of Python, where `KORNAK_PYTHON` names an interpreter that has them.
async fn drivers(cluster: &Cluster, pooled: u16) -> Result<()> {
    let Some(python) = std::env::var_os("KORNAK_PYTHON") else {
        println!("skipped in part: KORNAK_PYTHON names no Python with asyncpg and psycopg");
        return Ok(());
    };
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/matrix/smoke.py");
    for port in [cluster.proxy.primary(), pooled] {
        let mut command = Command::new(&python);
        command.arg(script).arg(Cluster::app_on(port));
        let output = run(command).await?;
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        let (out, error) = (text(&output.stdout), text(&output.stderr));
        ensure!(output.status.success(), "smoke.py: {out}{error}");
        print!("{out}");
    }
    Ok(())
}

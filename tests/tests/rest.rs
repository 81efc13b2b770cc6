//! The agent's REST API around a real server: what it answers from, and what a changed file changes.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use kornak_tests::run::cluster::{Cluster, ClusterSpec};
use kornak_tests::run::process::send;
use kornak_tests::run::wait::until;
use parking_lot::Mutex;
use rustix::process::Signal;
use serde_json::json;

const SOON: Duration = Duration::from_secs(30);

/// COMPAT's names of Patroni 4.1; those of a primary.
const METRICS: &[&str] = &[
    "patroni_version",
    "patroni_postgres_running",
    "patroni_postmaster_start_time",
    "patroni_postgres_timeline",
    "patroni_primary",
    "patroni_xlog_location",
    "patroni_standby_leader",
    "patroni_replica",
    "patroni_sync_standby",
    "patroni_quorum_standby",
    "patroni_xlog_received_location",
    "patroni_xlog_replayed_location",
    "patroni_xlog_replayed_timestamp",
    "patroni_xlog_paused",
    "patroni_postgres_streaming",
    "patroni_postgres_in_archive_recovery",
    "patroni_postgres_server_version",
    "patroni_cluster_unlocked",
    "patroni_failsafe_mode_is_active",
    "patroni_dcs_last_seen",
    "patroni_pending_restart",
    "patroni_is_paused",
    "patroni_postgres_state",
];

async fn alone(name: &'static str) -> Result<Cluster> {
    let spec = ClusterSpec { name, nodes: 1, synchronous: false, ..Default::default() };
    Cluster::start(spec).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_changed_file_is_taken_while_the_server_goes_on() -> Result<()> {
    let mut cluster = alone("reload").await?;
    let node = cluster.node_mut("node0")?;
    let (rest, postmaster) = (node.rest(), node.postmaster().context("it runs")?);
    let before = fs::read_to_string(node.file())?;
    let login = "  authentication: {username: admin, password: secret}\n";
    let after = before
        .replace("restapi:\n", &format!("restapi:\n{login}"))
        .replace("    shared_buffers", "    work_mem: 8MB\n    shared_buffers")
        .replace("scope: demo\n", "scope: another\n")
        + "tags:\n  shiny: true\n";
    fs::write(node.file(), &after)?;
    let refused_checks = Arc::new(Mutex::new(Vec::new()));
    let asking = {
        let (rest, refused_checks) = (rest.clone(), Arc::clone(&refused_checks));
        tokio::spawn(async move {
            loop {
                match rest.code("/primary").await {
                    Ok(200) => tokio::time::sleep(Duration::from_millis(5)).await,
                    Ok(code) => refused_checks.lock().push(code),
                    Err(_) => refused_checks.lock().push(0),
                }
            }
        })
    };
    node.agent().context("it runs")?.signal(Signal::HUP)?;
    until(SOON, "the tag", || async {
        let status = rest.get("/patroni").await.and_then(|answer| answer.json());
        let status = status.map_err(|error| format!("{error:#}"))?;
        let shown = status["tags"]["shiny"] == true && status["role"] == "primary";
        if shown { Ok(()) } else { Err(status.to_string()) }
    })
    .await;
    let client = node.connect().await?;
    until(SOON, "the parameter", || async {
        let row = client.query_one("SHOW work_mem", &[]).await.map_err(|it| it.to_string())?;
        let found: String = row.get(0);
        if found == "8MB" { Ok(()) } else { Err(found) }
    })
    .await;
    let refused = rest.post("/reload", &json!({})).await?;
    assert_eq!((refused.code, refused.text.as_str()), (401, "no auth header received"));
    let log = fs::read_to_string(node.log())?;
    let told = log.lines().find(|line| line.contains("needs a restart"));
    assert!(told.is_some_and(|line| line.contains("key=\"scope\"")), "{told:?}");

    // A mistake changes nothing; the old file brings back what was.
    fs::write(node.file(), after.replace("work_mem: 8MB", "work_mem: 8MB\n  data_dir: [1]"))?;
    node.agent().context("it runs")?.signal(Signal::HUP)?;
    until(SOON, "the refusal", || async {
        let log = fs::read_to_string(node.log()).map_err(|error| error.to_string())?;
        let told = log.contains("the configuration is wrong, the old one stays in force");
        if told { Ok(()) } else { Err("not told yet".to_owned()) }
    })
    .await;
    fs::write(node.file(), &before)?;
    node.agent().context("it runs")?.signal(Signal::HUP)?;
    until(SOON, "no password", || async {
        let answer = rest.post("/reload", &json!({})).await.map_err(|it| format!("{it:#}"))?;
        if answer.code == 202 { Ok(()) } else { Err(answer.text) }
    })
    .await;
    client.batch_execute("CREATE TABLE goes_on ()").await.context("write")?;
    assert_eq!(node.postmaster(), Some(postmaster), "the server was not restarted");
    asking.abort();
    assert_eq!(*refused_checks.lock(), [0_u16; 0], "no health check noticed anything");
    cluster.passed();
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn callbacks_hear_of_each_event_once_and_of_nothing_else() -> Result<()> {
    let mut cluster = alone("callbacks").await?;
    let node = cluster.node_mut("node0")?;
    let home = node.file().parent().context("a directory")?.join("node0");
    let (script, told) = (home.join("told.sh"), home.join("told"));
    fs::write(&script, format!("#!/bin/sh\necho \"$@\" >> {}\n", told.display()))?;
    fs::set_permissions(&script, fs::Permissions::from_mode(0o755))?;
    let mut text = fs::read_to_string(node.file())?;
    let all = ["on_start", "on_stop", "on_restart", "on_reload", "on_role_change"];
    let lines = all.map(|name| format!("    {name}: {}\n", script.display())).concat();
    text = text.replacen(
        "postgresql:\n  listen",
        &format!("postgresql:\n  callbacks:\n{lines}  listen"),
        1,
    );
    fs::write(node.file(), text)?;
    let mut before = Vec::new();
    // What was heard before, and then one of these.
    let mut heard = async |alternatives: &[&[&str]]| {
        before = until(SOON, "the callbacks", || async {
            let text = fs::read_to_string(&told).unwrap_or_default();
            let lines: Vec<String> = text.lines().map(str::to_owned).collect();
            let fits = |more: &&[&str]| {
                let known = lines.strip_prefix(before.as_slice());
                known.is_some_and(|new| new.iter().map(String::as_str).eq(more.iter().copied()))
            };
            if alternatives.iter().any(fits) { Ok(lines) } else { Err(text) }
        })
        .await;
    };
    node.agent().context("it runs")?.signal(Signal::HUP)?;
    heard(&[&["on_reload primary demo"]]).await;
    assert_eq!(node.rest().post("/restart", &json!({})).await?.code, 200);
    heard(&[&["on_restart primary demo"]]).await;
    // A crash is heard of when the server is up again, and the end of the agent is one of the server.
    node.kill_postmaster()?;
    // If processes of it were still there when it was looked at, the leadership is given up first.
    let gave_up = ["on_role_change replica demo", "on_role_change primary demo"];
    heard(&[&["on_start primary demo"], &gave_up]).await;
    node.stop_agent(SOON).await;
    heard(&[&["on_stop primary demo"]]).await;
    cluster.passed();
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_statement_that_hangs_blocks_no_health_check() -> Result<()> {
    let cluster = alone("hang").await?;
    let node = cluster.node("node0")?;
    let rest = node.rest();
    let page = rest.get("/metrics").await?.text;
    for name in METRICS {
        let line = format!("\n{name}{{scope=\"demo\",name=\"node0\"}} ");
        assert!(page.contains(&line), "{name} is missing in\n{page}");
    }

    let client = node.connect().await?;
    let theirs = "SELECT pid FROM pg_stat_activity WHERE backend_type = 'client backend' \
                  AND application_name NOT IN ('test', 'kornak_proxy') AND pid <> pg_backend_pid()";
    let rows = client.query(theirs, &[]).await?;
    // One that has ended meanwhile cannot be stopped.
    let backends: Vec<u32> = rows
        .iter()
        .filter_map(|row| u32::try_from(row.get::<_, i32>(0)).ok())
        .filter(|pid| send(*pid, Signal::STOP).is_ok())
        .collect();
    assert!(!backends.is_empty(), "the agent has no connection to its server");
    let mut slowest = Duration::ZERO;
    for path in ["/health", "/patroni", "/cluster", "/primary", "/metrics"].repeat(4) {
        let asked = Instant::now();
        let code = rest.code(path).await?;
        slowest = slowest.max(asked.elapsed());
        assert!(code == 200 || code == 503, "{path}: {code}");
    }
    for pid in &backends {
        // One that was ended meanwhile needs nothing.
        let _ = send(*pid, Signal::CONT);
    }
    // Patroni would wait two seconds for its statement.
    assert!(slowest < Duration::from_secs(1), "a check took {slowest:?}");
    until(SOON, "all is well again", || async {
        let code = rest.code("/primary").await.map_err(|error| format!("{error:#}"))?;
        if code == 200 { Ok(()) } else { Err(code.to_string()) }
    })
    .await;
    cluster.passed();
    Ok(())
}

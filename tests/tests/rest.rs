//! The agent's REST API around a real server: what it answers from, and what a changed file changes.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use kornak_tests::run::agent::Node;
use kornak_tests::run::cluster::{Cluster, ClusterSpec, run};
use kornak_tests::run::etcd::Etcd;
use kornak_tests::run::kornak;
use kornak_tests::run::port::Port;
use kornak_tests::run::postgres::{Postgres, SUPERUSER_PASSWORD, connect, describe, superuser};
use kornak_tests::run::process::{Process, freeze, send};
use kornak_tests::run::rest::Rest;
use kornak_tests::run::scratch::Scratch;
use kornak_tests::run::wait::until;
use parking_lot::Mutex;
use rustix::process::Signal;
use serde_json::json;
use tokio::net::UnixDatagram;
use tokio_postgres::Client;

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

/// How the role logs in that a new rule lets in.
fn login_of_ann(node: &Node) -> String {
    format!("host=127.0.0.1 port={} user=ann dbname=app", node.port())
}

/// The address of a pooler, a rule and a map are taken from the changed file.
async fn rules_are_in_force(etcd: &Etcd, node: &Node, client: &Client) -> Result<()> {
    until(SOON, "the pooler's address in the store", || async {
        let read = ["get", "--print-value-only", "/service/demo/members/node0"];
        let member = etcd.ctl(&read).await.map_err(|error| format!("{error:#}"))?;
        let url = "\"proxy_url\":\"postgres://127.0.0.1:6432/postgres\"";
        if member.contains(url) { Ok(()) } else { Err(member) }
    })
    .await;
    client.batch_execute("CREATE ROLE ann LOGIN").await?;
    let ann = login_of_ann(node);
    until(SOON, "the new rule", || async {
        connect(&ann).await.map(drop).map_err(|error| describe(&error))
    })
    .await;
    let mapped = "SELECT count(*) FROM pg_ident_file_mappings WHERE map_name = 'people' \
                  AND sys_name = 'ann' AND pg_username = 'app' AND error IS NULL";
    assert_eq!(client.query_one(mapped, &[]).await?.get::<_, i64>(0), 1);
    Ok(())
}

/// Another node may not have the name of one that runs.
async fn refuses_a_second(node: &Node, file: &str) -> Result<()> {
    let own = file.lines().find(|line| line.starts_with("  listen: ")).context("the REST API's")?;
    let own = own.replace("  listen: ", "");
    let second = node.file().with_file_name("second.yml");
    fs::write(&second, file.replace(&own, &Port::free().address()))?;
    let answer = tokio::time::timeout(SOON, run(kornak::with_file("agent", &second))).await;
    let output = answer.context("it goes on running")??;
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success() && said.contains("already a node named"), "{said}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_changed_file_is_taken_while_the_server_goes_on() -> Result<()> {
    let mut cluster = alone("reload").await?;
    let node = &mut cluster.nodes[0];
    let (rest, postmaster) = (node.rest(), node.postmaster().context("it runs")?);
    let before = fs::read_to_string(node.file())?;
    let login = "  authentication: {username: admin, password: secret}\n";
    let after = before
        .replace("restapi:\n", &format!("restapi:\n{login}"))
        .replace("    shared_buffers", "    work_mem: 8MB\n    shared_buffers")
        .replace("scope: demo\n", "scope: another\n")
        .replace(
            "  pg_hba:\n",
            "  proxy_address: 127.0.0.1:6432\n  pg_ident:\n    - people ann app\n  pg_hba:\n    \
             - host app ann 127.0.0.1/32 trust\n",
        )
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
    rules_are_in_force(&cluster.etcd, node, &client).await?;
    let ann = login_of_ann(node);
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
        let told = log.contains("configuration is wrong, the old one stays in force");
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
    until(SOON, "the end of the rule", || async {
        match connect(&ann).await {
            Ok(_) => Err("ann is let in".to_owned()),
            Err(_) => Ok(()),
        }
    })
    .await;
    client.batch_execute("CREATE TABLE goes_on ()").await.context("write")?;
    assert_eq!(node.postmaster(), Some(postmaster), "the server was not restarted");
    refuses_a_second(node, &before).await?;
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
        .filter(|pid| freeze(*pid).is_ok())
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

/// `kornak config generate` asks a server that runs on its own; an agent with that file, and with what
/// only a person knows, looks after it from then on, and does not restart it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_running_server_is_taken_over_with_a_generated_file() -> Result<()> {
    let mut scratch = Scratch::new("generated");
    let etcd = Etcd::start(1).await?;
    let settings = ["max_connections=77", "work_mem=5MB", "wal_log_hints=on"];
    let server = Postgres::start(&scratch, "old", &settings).await?;
    server.connect().await?.batch_execute("CREATE TABLE t AS SELECT 1 AS i").await?;

    let file = scratch.join("generated.yml");
    let mut command = kornak::command(["config", "generate", "--dsn", &superuser(server.port())]);
    command.arg(&file);
    let output = run(command).await?;
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let text = fs::read_to_string(&file)?;
    let rest = Port::free();
    let mut known = String::new();
    for line in text.lines() {
        let (key, _) = line.split_once(':').unwrap_or((line, ""));
        let line = match key.trim() {
            "scope" => "scope: demo".to_owned(),
            "name" => "name: node0".to_owned(),
            "listen" if line.contains("8008") => format!("  listen: {}", rest.address()),
            "connect_address" if line.contains("8008") => {
                format!("  connect_address: {}", rest.address())
            }
            "connect_address" => format!("  connect_address: 127.0.0.1:{}", server.port()),
            "password" => line.replace("CHANGE-ME", SUPERUSER_PASSWORD),
            _ => line.replace("CHANGE-ME:2379", &etcd.endpoints()[0]),
        };
        known.push_str(&line);
        known.push('\n');
    }
    fs::write(&file, known + "watchdog:\n  mode: off\n")?;

    let pid_file = server.data_dir().join("postmaster.pid");
    let before = fs::read_to_string(&pid_file)?;
    let systemd = UnixDatagram::bind(scratch.join("notify"))?;
    let told = async |expected: &str| -> Result<()> {
        let mut message = [0; 256];
        let answer = tokio::time::timeout(SOON, systemd.recv(&mut message)).await;
        let length = answer.with_context(|| format!("systemd is not told {expected}"))??;
        let text = String::from_utf8_lossy(&message[..length]).into_owned();
        anyhow::ensure!(text.trim_end().starts_with(expected), "{text:?} is not {expected}");
        Ok(())
    };
    let mut command = kornak::with_file("agent", &file);
    command.env("NOTIFY_SOCKET", scratch.join("notify"));
    let mut agent = Process::spawn("agent", command, &scratch.join("agent.log"))?;
    told("READY=1").await?;
    let rest = Rest::new(&rest.address());
    until(SOON, "the agent leads with the server", || async {
        match rest.code("/primary").await {
            Ok(200) => Ok(()),
            other => Err(format!("{other:?}")),
        }
    })
    .await;
    let first = |text: &str| text.lines().next().map(str::to_owned);
    assert_eq!(first(&fs::read_to_string(&pid_file)?), first(&before), "it was not restarted");
    until(SOON, "the configuration is in the store", || async {
        let config = rest.get("/config").await.map_err(|error| format!("{error:#}"))?;
        if config.text.contains("\"max_connections\": \"77\"") { Ok(()) } else { Err(config.text) }
    })
    .await;
    let client = server.connect().await?;
    let row = client.query_one("SELECT i, current_setting('work_mem') FROM t", &[]).await?;
    assert_eq!((row.get::<_, i32>(0), row.get::<_, String>(1).as_str()), (1, "5MB"));

    // And it is the agent's from now on: a restart keeps what it had.
    let restart = rest.post("/restart", &json!({})).await?;
    assert_eq!((restart.code, restart.text.as_str()), (200, "restarted successfully"));
    let row = server.connect().await?;
    let row = row.query_one("SELECT current_setting('max_connections'), i FROM t", &[]).await?;
    assert_eq!((row.get::<_, String>(0).as_str(), row.get::<_, i32>(1)), ("77", 1));
    let postmaster = first(&fs::read_to_string(&pid_file)?).context("it runs")?;
    let environment = fs::read(format!("/proc/{postmaster}/environ"))?;
    assert!(!String::from_utf8_lossy(&environment).contains("NOTIFY_SOCKET"), "it is the agent's");
    agent.signal(Signal::HUP)?;
    told("RELOADING=1\nMONOTONIC_USEC=").await?;
    told("READY=1").await?;
    agent.signal(Signal::TERM)?;
    told("STOPPING=1").await?;
    agent.terminate(SOON).await;
    scratch.passed();
    Ok(())
}

//! Data directories from backups, and those that went another way; a store from a backup; copies and
//! restarts that take too long.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use kornak_tests::run::agent::{AgentSpec, Node, Program};
use kornak_tests::run::cluster::{Cluster, ClusterSpec};
use kornak_tests::run::etcd::Etcd;
use kornak_tests::run::postgres::{Postgres, SUPERUSER_PASSWORD, bin_dir, describe, program};
use kornak_tests::run::scratch::Scratch;
use kornak_tests::run::wait::until;
use rustix::fs::{CWD, Mode, mkfifoat};
use serde_json::{Value, json};

const LIMIT: Duration = Duration::from_secs(90);

fn script(path: &Path, text: &str) -> Result<()> {
    fs::write(path, text)?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o755))?;
    Ok(())
}

/// A server with an archive, a base backup of it, a restore point, and a row behind that.
async fn backed_up(scratch: &Scratch, backup: &Path, archive: &Path) -> Result<Postgres> {
    let archive_command = format!("archive_command=cp %p {}/%f", archive.display());
    let settings = ["wal_level=replica", "archive_mode=on", &archive_command, "wal_log_hints=on"];
    let source = Postgres::start(scratch, "source", &settings).await?;
    let client = source.connect().await?;
    client.batch_execute("CREATE TABLE t (i int); INSERT INTO t VALUES (1)").await?;
    let output = program("pg_basebackup")
        .env("PGPASSWORD", SUPERUSER_PASSWORD)
        .args(["-h", "127.0.0.1", "-U", "postgres", "--checkpoint=fast", "-X", "none"])
        .args(["-p", &source.port().to_string(), "-D"])
        .arg(backup)
        .output()
        .context("run pg_basebackup")?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    client.batch_execute("INSERT INTO t VALUES (2)").await?;
    client.query("SELECT pg_create_restore_point('before_the_mistake')", &[]).await?;
    client.batch_execute("DELETE FROM t").await?;
    let sql = "SELECT pg_walfile_name(pg_switch_wal())";
    let wanted: String = client.query_one(sql, &[]).await?.get(0);
    until(LIMIT, "the last file is archived", || async {
        let sql = "SELECT coalesce(last_archived_wal, '') FROM pg_stat_archiver";
        let last: String =
            client.query_one(sql, &[]).await.map_err(|error| describe(&error))?.get(0);
        if last >= wanted { Ok(()) } else { Err(format!("{last}, {wanted} wanted")) }
    })
    .await;
    Ok(source)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cluster_begins_at_a_point_in_time_of_a_backup() -> Result<()> {
    let mut scratch = Scratch::new("restore");
    let home = scratch.server_dir("backups");
    let (backup, archive) = (home.join("base"), scratch.server_dir("archive"));
    let _source = backed_up(&scratch, &backup, &archive).await?;
    let told = home.join("told");
    let restore = home.join("restore.sh");
    let text = format!(
        "#!/bin/sh\nset -e\necho \"$@\" > {told}\ncp -r {backup}/. \"$PGTARGET\"\n",
        told = told.display(),
        backup = backup.display()
    );
    // The directory is the last of the words.
    let text = text.replace(
        "\"$PGTARGET\"",
        "\"$(for word in \"$@\"; do case $word in --datadir=*) echo \"${word#--datadir=}\";; esac; done)\"",
    );
    script(&restore, &text)?;
    let check = home.join("after.sh");
    let seen = home.join("seen");
    script(
        &check,
        &format!(
            "#!/bin/sh\nexec psql -Atc 'SELECT count(*) FROM t' \"$1\" > {}\n",
            seen.display()
        ),
    )?;
    let etcd = Etcd::start(1).await?;
    let spec = AgentSpec {
        scope: "restored".to_owned(),
        name: "r0".to_owned(),
        etcd: etcd.endpoints(),
        ttl: 8,
        failsafe: true,
        bootstrap: vec![
            "method: wished".to_owned(),
            "wished:".to_owned(),
            format!("  command: {}", restore.display()),
            "  stanza: main".to_owned(),
            "  recovery_conf:".to_owned(),
            format!("    restore_command: cp {}/%f %p", archive.display()),
            "    recovery_target_name: before_the_mistake".to_owned(),
            format!("post_bootstrap: {}", check.display()),
        ],
        ..AgentSpec::default()
    };
    let node = Node::start(&scratch, &spec, Program::Kornak)?;
    until(LIMIT, "the restored cluster takes writes", || async {
        let client = node.connect().await.map_err(|error| describe(&error))?;
        let write = client.batch_execute("INSERT INTO t VALUES (3)").await;
        write.map_err(|error| describe(&error))
    })
    .await;
    let client = node.connect().await?;
    let sql = "SELECT string_agg(i::text, ',' ORDER BY i) FROM t WHERE i < 3";
    let rows: String = client.query_one(sql, &[]).await?.get(0);
    assert_eq!(rows, "1,2", "what was deleted by mistake is there");
    let told = fs::read_to_string(told)?;
    let data = node.data_dir();
    for word in ["--scope=restored", "--stanza=main", &format!("--datadir={}", data.display())] {
        assert!(told.contains(word), "{word} in {told}");
    }
    until(LIMIT, "post_bootstrap has reached the server", || async {
        let text = fs::read_to_string(&seen).map_err(|error| error.to_string())?;
        if matches!(text.trim(), "2" | "3") { Ok(()) } else { Err(text) }
    })
    .await;
    drop(node);
    scratch.passed();
    Ok(())
}

/// The first leader names the configuration before the cluster is complete, and somebody may change it then.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_configured_while_a_cluster_is_created_stays() -> Result<()> {
    let mut scratch = Scratch::new("early");
    let home = scratch.server_dir("scripts");
    // Whoever reads from a pipe waits for who writes to it.
    let (wait, go) = (home.join("wait.sh"), home.join("go"));
    let mode = Mode::RUSR | Mode::WUSR | Mode::RGRP | Mode::ROTH;
    mkfifoat(CWD, &go, mode).context("make a pipe")?;
    script(&wait, &format!("#!/bin/sh\nread go < {}\n", go.display()))?;
    let mut etcd = Etcd::start(1).await?;
    let spec = AgentSpec {
        scope: "early".to_owned(),
        name: "e0".to_owned(),
        etcd: etcd.endpoints(),
        ttl: 8,
        failsafe: true,
        bootstrap: vec![format!("post_bootstrap: {}", wait.display())],
        ..AgentSpec::default()
    };
    let node = Node::start(&scratch, &spec, Program::Kornak)?;
    let change = json!({"maximum_lag_on_failover": 77});
    until(LIMIT, "the configuration can be changed", || async {
        let answer = node.rest().patch("/config", &change).await;
        let answer = answer.map_err(|error| format!("{error:#}"))?;
        if answer.code == 200 { Ok(()) } else { Err(answer.text) }
    })
    .await;
    fs::write(&go, "go\n")?;
    until(LIMIT, "the cluster is created", || async {
        let identifier =
            etcd.ctl(&["get", "--print-value-only", "/service/early/initialize"]).await;
        let identifier = identifier.map_err(|error| format!("{error:#}"))?;
        if identifier.trim().is_empty() { Err("not yet".to_owned()) } else { Ok(()) }
    })
    .await;
    let config = node.rest().get("/config").await?.json()?;
    assert_eq!(config["maximum_lag_on_failover"], 77, "{config}");
    drop(node);
    scratch.passed();
    etcd.passed();
    Ok(())
}

/// The leader writes what nobody else gets, and is lost; a standby that was away takes over. Returns
/// the former leader's name.
async fn diverge(cluster: &mut Cluster) -> Result<String> {
    let former = lose_diverged(cluster).await?;
    cluster.node_mut(&former)?.start_agent()?;
    cluster.healthy(LIMIT).await;
    Ok(former)
}

/// Has the leader diverge like [`diverge`], and leaves it down.
async fn lose_diverged(cluster: &mut Cluster) -> Result<String> {
    cluster.healthy(LIMIT).await;
    let leader = cluster.leader().await?;
    let other = cluster.nodes.iter().map(|it| it.name().to_owned()).find(|name| *name != leader);
    let other = other.context("two nodes")?;
    cluster.node_mut(&other)?.kill_all();
    let client = cluster.node(&leader)?.connect().await?;
    client
        .batch_execute("CREATE TABLE IF NOT EXISTS lost (i int); INSERT INTO lost VALUES (1)")
        .await?;
    cluster.node_mut(&leader)?.kill_all();
    cluster.node_mut(&other)?.start_agent()?;
    assert_eq!(cluster.new_leader(&leader, LIMIT).await, other);
    let client = cluster.node(&other)?.connect().await?;
    client
        .batch_execute("CREATE TABLE IF NOT EXISTS kept (i int); INSERT INTO kept VALUES (1)")
        .await?;
    Ok(leader)
}

/// The agent is killed while pg_rewind runs, and the next one has what became of it.
async fn rewound_without_an_agent(cluster: &mut Cluster, hold: &Path) -> Result<String> {
    fs::write(hold, "")?;
    let former = lose_diverged(cluster).await?;
    let node = cluster.node_mut(&former)?;
    node.start_agent()?;
    until(LIMIT, "pg_rewind is past its rehearsal", || async {
        let log = node.agent_log().map_err(|error| error.to_string())?;
        if log.contains("pg_rewind begun") { Ok(()) } else { Err(log) }
    })
    .await;
    node.kill_agent();
    node.start_agent()?;
    fs::remove_file(hold)?;
    cluster.healthy(LIMIT).await;
    Ok(former)
}

/// pg_rewind, which waits while `hold` is there.
fn rewind_that_waits(dir: &Path) -> Result<(PathBuf, String)> {
    let (tool, hold) = (dir.join("rewind.sh"), dir.join("hold"));
    let (real, held) = (bin_dir().join("pg_rewind"), hold.display());
    let waits = format!("while [ -e {held} ]; do sleep 0.1; done");
    let text = format!(
        "#!/bin/sh\ncase \"$*\" in *--dry-run*) ;; *) {waits} ;; esac\nexec {} \"$@\"\n",
        real.display()
    );
    script(&tool, &text)?;
    Ok((hold, format!("bin_name: {{pg_rewind: {}}}", tool.display())))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_diverged_primary_comes_back_by_rewind_or_as_a_new_copy() -> Result<()> {
    let spec = ClusterSpec { name: "diverged", nodes: 1, synchronous: false, ..Default::default() };
    let mut cluster = Cluster::start(spec).await?;
    let (hold, line) = rewind_that_waits(cluster.path("").as_path())?;
    let added = cluster.add_node(|node| node.postgresql = vec![line])?;
    let former = diverge(&mut cluster).await?;
    let log = cluster.node(&former)?.agent_log()?;
    assert!(
        log.contains("server has diverged from the leader, rewind begun")
            && log.contains("rewind completed")
    );
    assert_eq!(rewound_without_an_agent(&mut cluster, &hold).await?, added);
    let log = cluster.node(&added)?.agent_log()?;
    assert!(!log.contains("contents of the data directory removed"), "{log}");

    let instead = json!({"postgresql": {
        "use_pg_rewind": false, "remove_data_directory_on_diverged_timelines": true}});
    cluster.configure(&instead).await?;
    let former = diverge(&mut cluster).await?;
    let log = cluster.node(&former)?.agent_log()?;
    assert!(log.contains("contents of the data directory removed"), "{log}");
    let client = cluster.node(&former)?.connect().await?;
    let kept: i64 = client.query_one("SELECT count(*) FROM kept", &[]).await?.get(0);
    assert_eq!(kept, 3);

    // The store comes back from a backup that is older than two changes of leadership.
    let snapshot = cluster.etcd.snapshot().await?;
    let first = cluster.leader().await?;
    cluster.switchover(&first, &former).await?;
    cluster.healthy(LIMIT).await;
    let client = cluster.node(&former)?.connect().await?;
    client.batch_execute("INSERT INTO kept VALUES (4)").await?;
    let watch = cluster.watch_writes();
    cluster.etcd.restore(&snapshot).await?;
    cluster.healthy(LIMIT).await;
    // Members may have shown what they knew before the store came back without their leadership.
    let client = until(LIMIT, "a leader in the restored store", || async {
        cluster.connect_to_leader().await.map_err(|error| format!("{error:#}"))
    })
    .await;
    let kept: i64 = client.query_one("SELECT count(*) FROM kept", &[]).await?.get(0);
    assert_eq!(kept, 4, "what was written after the backup of the store is there");
    cluster.proxy.ready(&cluster.app(), LIMIT).await;
    let overlaps: Vec<String> =
        watch.finish().await.overlaps().iter().map(ToString::to_string).collect();
    assert!(overlaps.is_empty(), "two writable primaries: {overlaps:?}");
    cluster.passed();
    Ok(())
}

/// The first copy is a base backup; while `hang` is there, the operator's method never ends.
fn method_that_hangs(dir: &Path) -> Result<(PathBuf, Vec<String>)> {
    let (command, hang) = (dir.join("copy.sh"), dir.join("hang"));
    script(&command, &format!("#!/bin/sh\n[ -e {} ] || exit 1\nsleep 987\n", hang.display()))?;
    let lines = vec![
        "create_replica_methods: [slow, basebackup]".to_owned(),
        format!("slow: {{command: {}}}", command.display()),
    ];
    Ok((hang, lines))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_copy_that_hangs_gives_way_to_one_that_is_asked_for_with_force() -> Result<()> {
    let spec =
        ClusterSpec { name: "reinit", nodes: 1, synchronous: false, ..ClusterSpec::default() };
    let mut cluster = Cluster::start(spec).await?;
    let (hang, lines) = method_that_hangs(cluster.path("").as_path())?;
    let name = cluster.add_node(|node| node.postgresql = lines)?;
    cluster.healthy(LIMIT).await;
    let client = cluster.connect_to_leader().await?;
    client.batch_execute("CREATE TABLE t AS SELECT 1 AS i").await?;

    fs::write(&hang, "")?;
    let node = cluster.node(&name)?;
    let left = node.data_dir().join("left");
    fs::write(&left, "")?;
    let ask = |body: Value| async move { node.rest().post("/reinitialize", &body).await };
    let answer = ask(json!({})).await?;
    ensure!(answer.code == 200, "{} {}", answer.code, answer.text);
    until(LIMIT, "the operator's method runs", || async {
        node.process_titled("copy.sh").ok_or_else(|| format!("{:?}", node.processes()))
    })
    .await;
    let answer = ask(json!({"from_leader": true})).await?;
    assert_eq!((answer.code, answer.text.as_str()), (503, "reinitialize already in progress"));
    let answer = ask(json!({"force": true, "from_leader": true})).await?;
    assert_eq!((answer.code, answer.text.as_str()), (200, "reinitialize started"));
    cluster.healthy(LIMIT).await;
    let row = node.connect().await?.query_one("SELECT i FROM t", &[]).await?;
    assert_eq!(row.get::<_, i32>(0), 1);
    ensure!(!left.exists(), "the old data is still there");
    assert_eq!(node.process_titled("copy.sh"), None, "what was given up has ended");

    let leader = cluster.node("node0")?.rest().post("/reinitialize", &json!({})).await?;
    assert_eq!((leader.code, leader.text.as_str()), (503, "I am the leader, can not reinitialize"));
    cluster.passed();
    Ok(())
}

/// The standby's archive is slow, and a standby looks there before it takes connections.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_restart_that_takes_longer_than_asked_for_is_said_to_go_on() -> Result<()> {
    let spec =
        ClusterSpec { name: "restart", nodes: 1, synchronous: false, ..ClusterSpec::default() };
    let mut cluster = Cluster::start(spec).await?;
    let slow = cluster.path("slow");
    let command = format!("restore_command: \"[ -e {} ] && sleep 4; false\"", slow.display());
    let name = cluster.add_node(|node| {
        node.postgresql = vec!["recovery_conf:".to_owned(), format!("  {command}")];
    })?;
    cluster.healthy(LIMIT).await;
    fs::write(&slow, "")?;
    let node = cluster.node(&name)?;
    let before = node.postmaster();
    let answer = node.rest().post("/restart", &json!({"timeout": 1})).await?;
    assert_eq!((answer.code, answer.text.as_str()), (503, "postgres is still starting"));
    assert_ne!(node.postmaster(), before, "it was restarted");
    fs::remove_file(&slow)?;
    cluster.healthy(LIMIT).await;
    let (running, unmet) = (node.postmaster(), "restart conditions are not satisfied");
    for condition in [
        json!({"role": "primary"}),
        json!({"role": "standby_leader"}),
        json!({"postgres_version": "9.6.0"}),
        json!({"restart_pending": true}),
    ] {
        let answer = node.rest().post("/restart", &condition).await?;
        assert_eq!((answer.code, answer.text.as_str()), (503, unmet), "{condition}");
    }
    assert_eq!(node.postmaster(), running, "nobody has touched it");
    let met = json!({"timeout": "20s", "role": "replica", "postgres_version": "99.0"});
    let answer = node.rest().post("/restart", &met).await?;
    assert_eq!((answer.code, answer.text.as_str()), (200, "restarted successfully"));
    assert_ne!(node.postmaster(), running, "it was restarted");

    // A switchover waits for the archive as well: to kill the candidate would be worse.
    cluster.healthy(LIMIT).await;
    let leader = cluster.leader().await?;
    fs::write(&slow, "")?;
    cluster.switchover(&leader, &name).await?;
    fs::remove_file(&slow)?;
    cluster.healthy(LIMIT).await;
    assert_eq!(cluster.leader().await?, name);
    cluster.passed();
    Ok(())
}

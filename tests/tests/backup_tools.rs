//! Backup tools themselves by their recipes for Patroni (docs/backups.md). Skipped, aloud, where a tool is not installed.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use kornak_tests::run::agent::{AgentSpec, Node, Program};
use kornak_tests::run::cluster::run;
use kornak_tests::run::etcd::Etcd;
use kornak_tests::run::postgres::{SUPERUSER_PASSWORD, bin_dir, describe, server_user};
use kornak_tests::run::scratch::Scratch;
use kornak_tests::run::wait::until;
use serde_json::json;

const LIMIT: Duration = Duration::from_secs(90);

/// The standby has all rows without a base backup of the leader, follows it, and then leads in its place.
async fn copied_then_leads(leader: &Node, standby: &Node) {
    is(standby, "1,2,3", "SELECT string_agg(i::text, ',' ORDER BY i) FROM t").await;
    is(leader, "streaming", "SELECT max(state) FROM pg_stat_replication").await;
    let body = json!({"leader": leader.name(), "candidate": standby.name()});
    // The leader's agent hears of its standby a moment later than the server.
    until(LIMIT, "the leader hands over", || async {
        let answer = leader.rest().post("/switchover", &body).await;
        match answer.map_err(|error| error.to_string())? {
            answer if answer.code == 200 => Ok(()),
            answer => Err(format!("{} {}", answer.code, answer.text)),
        }
    })
    .await;
    is(standby, "false", "SELECT pg_is_in_recovery()::text").await;
    is(standby, "streaming", "SELECT max(state) FROM pg_stat_replication").await;
}

/// Runs a tool as the servers' user and answers what it printed.
async fn as_server_user(mut command: Command) -> Result<String> {
    command.env("PGPASSWORD", SUPERUSER_PASSWORD).current_dir("/");
    if let Some(user) = server_user() {
        command.uid(user.uid).gid(user.gid);
    }
    let shown = format!("{command:?}");
    let output = run(command).await?;
    let said = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{shown}: {said}");
    Ok(said.into_owned())
}

/// Where pgBackRest has its repository.
struct Depot {
    file: PathBuf,
}

impl Depot {
    fn new(home: &Path) -> Result<Self> {
        let file = home.join("pgbackrest.conf");
        let home = home.display();
        let text = format!(
            "[global]\nrepo1-path={home}/repo\nrepo1-retention-full=2\nlog-path={home}\nlock-path={home}\nspool-path={home}\n\
             start-fast=y\nlog-level-console=warn\n[demo]\npg1-path=/nonexistent\n"
        );
        fs::write(&file, text).context("write pgBackRest's file")?;
        Ok(Self { file })
    }

    /// The command for the server in this directory.
    fn tool(&self, data: &str) -> String {
        format!("pgbackrest --config={} --stanza=demo --pg1-path={data}", self.file.display())
    }

    async fn run(&self, node: &Node, words: &[&str]) -> Result<()> {
        let mut command = Command::new("pgbackrest");
        command.arg(format!("--config={}", self.file.display())).arg("--stanza=demo");
        let server = node.data_dir();
        let server = server.parent().context("it is below the server's directory")?;
        command.arg(format!("--pg1-path={}/data", server.display()));
        command.arg(format!("--pg1-socket-path={}", server.display()));
        command.arg(format!("--pg1-port={}", node.port()));
        command.args(words);
        as_server_user(command).await.map(drop)
    }
}

async fn ask(node: &Node, sql: &str) -> Result<String, String> {
    let client = node.connect().await.map_err(|error| describe(&error))?;
    let row = client.query_one(sql, &[]).await.map_err(|error| describe(&error))?;
    Ok(row.get::<_, Option<String>>(0).unwrap_or_default())
}

async fn is(node: &Node, wanted: &str, sql: &str) {
    until(LIMIT, &format!("{}: {sql} = {wanted}", node.name()), || async {
        let found = ask(node, sql).await?;
        if found == wanted { Ok(()) } else { Err(found) }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pgbackrest_makes_copies_archives_through_a_switchover_and_restores() -> Result<()> {
    if Command::new("pgbackrest").arg("version").output().is_err() {
        println!("skipped: pgbackrest is not installed");
        return Ok(());
    }
    let mut scratch = Scratch::new("pgbackrest");
    let depot = Depot::new(&scratch.server_dir("depot"))?;
    let etcd = Etcd::start(1).await?;
    let spec = |scope: &str, name: &str| {
        let tool = depot.tool(&format!("{}/data", scratch.server_dir(name).display()));
        AgentSpec {
            scope: scope.to_owned(),
            name: name.to_owned(),
            etcd: etcd.endpoints(),
            ttl: 8,
            failsafe: true,
            parameters: vec![
                "archive_mode: \"on\"".to_owned(),
                "archive_timeout: 5s".to_owned(),
                // The same for all nodes: it runs in the data directory.
                format!("archive_command: {} archive-push %p", depot.tool("$PWD")),
            ],
            postgresql: vec![
                "create_replica_methods: [pgbackrest]".to_owned(),
                "pgbackrest:".to_owned(),
                format!("  command: {tool} --delta restore"),
                "  keep_data: true".to_owned(),
                "  no_params: true".to_owned(),
                "recovery_conf:".to_owned(),
                format!("  restore_command: {tool} archive-get %f %p"),
            ],
            ..AgentSpec::default()
        }
    };
    let start = |spec: &AgentSpec| Node::start(&scratch, spec, Program::Kornak);
    let first = start(&spec("demo", "a"))?;
    is(&first, "false", "SELECT pg_is_in_recovery()::text").await;
    match depot.run(&first, &["stanza-create"]).await {
        Err(error) if error.to_string().contains("VersionNotSupportedError") => {
            println!("skipped: this pgBackRest does not know this release");
            drop(first);
            scratch.passed();
            return Ok(());
        }
        made => made?,
    }
    let client = first.connect().await?;
    client.batch_execute("CREATE TABLE t AS SELECT 1 AS i").await?;
    depot.run(&first, &["backup", "--type=full"]).await?;
    // pgBackRest counts whole seconds: a target in the second in which the backup ended is before it.
    let ended = ask(&first, "SELECT clock_timestamp()::text").await.map_err(anyhow::Error::msg)?;
    let later =
        format!("SELECT (clock_timestamp() > '{ended}'::timestamptz + interval '1 s')::text");
    is(&first, "true", &later).await;
    client.batch_execute("INSERT INTO t VALUES (2)").await?;
    let target = ask(&first, "SELECT clock_timestamp()::text").await.map_err(anyhow::Error::msg)?;
    client.batch_execute("INSERT INTO t VALUES (3)").await?;

    let second = start(&spec("demo", "b"))?;
    copied_then_leads(&first, &second).await;
    // It writes a file of the log and waits until that is in the archive.
    depot.run(&second, &["check"]).await?;

    let mut again = spec("again", "c");
    again.bootstrap = vec![
        "method: pgbackrest".to_owned(),
        "pgbackrest:".to_owned(),
        format!(
            "  command: {} --type=time --target=\"{target}\" --target-action=promote restore",
            depot.tool(&format!("{}/data", scratch.server_dir("c").display()))
        ),
        "  keep_existing_recovery_conf: true".to_owned(),
        "  no_params: true".to_owned(),
    ];
    let third = start(&again)?;
    is(&third, "false", "SELECT pg_is_in_recovery()::text").await;
    is(&third, "1,2", "SELECT string_agg(i::text, ',' ORDER BY i) FROM t").await;
    drop((first, second, third));
    scratch.passed();
    Ok(())
}

/// Barman's home and its file, for a host that reaches its backups without its API.
struct Barman {
    home: PathBuf,
    file: PathBuf,
}

impl Barman {
    fn new(home: PathBuf) -> Self {
        Self { file: home.join("barman.conf"), home }
    }

    /// Barman asks whichever of these nodes accepts writes.
    fn know(&self, nodes: &[&Node]) -> Result<()> {
        let hosts = vec!["127.0.0.1"; nodes.len()].join(",");
        let ports: Vec<String> = nodes.iter().map(|node| node.port().to_string()).collect();
        let ports = ports.join(",");
        let conninfo = format!(
            "host={hosts} port={ports} user=postgres dbname=postgres target_session_attrs=read-write"
        );
        let name = std::env::var("USER").unwrap_or_default();
        let user = if server_user().is_some() { "postgres".to_owned() } else { name };
        let (home, bin) = (self.home.display(), bin_dir().display().to_string());
        let text = format!(
            "[barman]\nbarman_home = {home}\nbarman_user = {user}\nlog_file = {home}/barman.log\nbarman_lock_directory = {home}\n\
             configuration_files_directory = {home}/none\n\
             [main]\ndescription = demo\nconninfo = {conninfo}\nstreaming_conninfo = {conninfo}\n\
             backup_method = postgres\narchiver = on\npath_prefix = {bin}\nimmediate_checkpoint = true\n"
        );
        fs::write(&self.file, text).context("write Barman's file")
    }

    fn tool(&self) -> String {
        format!("barman -c {}", self.file.display())
    }

    async fn run(&self, words: &[&str]) -> Result<String> {
        let mut command = Command::new("barman");
        command.arg("-c").arg(&self.file).args(words);
        as_server_user(command).await
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn barman_makes_copies_archives_through_a_switchover_and_restores() -> Result<()> {
    if Command::new("barman").arg("--version").output().is_err() {
        println!("skipped: barman is not installed");
        return Ok(());
    }
    let mut scratch = Scratch::new("barman");
    let barman = Barman::new(scratch.server_dir("depot"));
    let etcd = Etcd::start(1).await?;
    let script = |name: &str, options: &str| -> Result<String> {
        let file = barman.home.join(name);
        let tool = barman.tool();
        let text = format!(
            "#!/bin/sh\nfor word in \"$@\"; do case $word in --datadir=*) data=${{word#--datadir=}} ;; esac; done\n\
             exec {tool} recover {options} main latest \"$data\"\n"
        );
        fs::write(&file, text).context("write a method")?;
        fs::set_permissions(&file, fs::Permissions::from_mode(0o755))
            .context("make it a program")?;
        Ok(file.display().to_string())
    };
    let method = script("from_barman", "")?;
    let incoming = barman.home.join("main/incoming").display().to_string();
    let spec = |scope: &str, name: &str| AgentSpec {
        scope: scope.to_owned(),
        name: name.to_owned(),
        etcd: etcd.endpoints(),
        ttl: 8,
        failsafe: true,
        parameters: vec![
            "archive_mode: \"on\"".to_owned(),
            "archive_timeout: 5s".to_owned(),
            format!("archive_command: cp %p {incoming}/.%f && mv {incoming}/.%f {incoming}/%f"),
        ],
        postgresql: vec![
            "create_replica_methods: [barman]".to_owned(),
            "barman:".to_owned(),
            format!("  command: {method}"),
            "recovery_conf:".to_owned(),
            format!("  restore_command: {} get-wal main %f > %p", barman.tool()),
        ],
        // Barman's backup streams as the superuser.
        pg_hba: ["local all all", "host replication all samenet", "host all all samenet"]
            .map(|line| format!("- {line} scram-sha-256"))
            .to_vec(),
        ..AgentSpec::default()
    };
    let start = |spec: &AgentSpec| Node::start(&scratch, spec, Program::Kornak);
    let first = start(&spec("demo", "a"))?;
    is(&first, "false", "SELECT pg_is_in_recovery()::text").await;
    barman.know(&[&first])?;
    // Makes its folders; the first file of the log comes with the first look.
    let _ = barman.run(&["check", "main"]).await;
    barman.run(&["switch-wal", "--force", "--archive", "main"]).await?;
    let client = first.connect().await?;
    client.batch_execute("CREATE TABLE t AS SELECT 1 AS i").await?;
    barman.run(&["backup", "--wait", "main"]).await?;
    client.batch_execute("INSERT INTO t VALUES (2)").await?;
    let target = ask(&first, "SELECT clock_timestamp()::text").await.map_err(anyhow::Error::msg)?;
    client.batch_execute("INSERT INTO t VALUES (3)").await?;
    barman.run(&["switch-wal", "--force", "--archive", "main"]).await?;

    let second = start(&spec("demo", "b"))?;
    copied_then_leads(&first, &second).await;
    barman.know(&[&first, &second])?;
    barman.run(&["switch-wal", "--force", "--archive", "main"]).await?;
    barman.run(&["check", "main"]).await?;

    let method = script("to_a_time", &format!("--target-time '{target}' --target-action promote"))?;
    let mut again = spec("again", "c");
    again.bootstrap = vec![
        "method: barman".to_owned(),
        "barman:".to_owned(),
        format!("  command: {method}"),
        "  keep_existing_recovery_conf: true".to_owned(),
    ];
    let third = start(&again)?;
    is(&third, "false", "SELECT pg_is_in_recovery()::text").await;
    is(&third, "1,2", "SELECT string_agg(i::text, ',' ORDER BY i) FROM t").await;
    drop((first, second, third));
    scratch.passed();
    Ok(())
}

//! A cluster that follows another one, and takes over from it.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use kornak_tests::run::agent::{AgentSpec, Node, Program};
use kornak_tests::run::cluster::{Cluster, ClusterSpec, run};
use kornak_tests::run::etcd::Etcd;
use kornak_tests::run::kornak;
use kornak_tests::run::postgres::{Postgres, describe, program, superuser};
use kornak_tests::run::scratch::Scratch;
use kornak_tests::run::wait::until;
use serde_json::{Value, json};

const LIMIT: Duration = Duration::from_secs(90);

/// Role and state of each member by the word of `node`.
async fn roles(node: &Node) -> Result<Vec<(String, String, String)>, String> {
    let answer = node.rest().get("/cluster").await.map_err(|error| format!("{error:#}"))?;
    let cluster: Value = answer.json().map_err(|error| format!("{error:#}"))?;
    let text = |member: &Value, key: &str| member[key].as_str().unwrap_or_default().to_owned();
    let members = cluster["members"].as_array().cloned().unwrap_or_default();
    Ok(members.iter().map(|it| (text(it, "name"), text(it, "role"), text(it, "state"))).collect())
}

/// Waits until one member has this role and the other streams; the first one's name.
async fn settled(nodes: &[Node], leader_role: &str) -> String {
    until(LIMIT, &format!("a {leader_role} and a streaming replica"), || async {
        let roles = roles(&nodes[0]).await?;
        let leader = roles.iter().find(|(_, role, _)| role == leader_role);
        let streams = |role: &str, state: &str| role == "replica" && state == "streaming";
        let replicas = roles.iter().filter(|(_, role, state)| streams(role, state)).count();
        match leader {
            Some((name, ..)) if replicas == nodes.len() - 1 => Ok(name.clone()),
            _ => Err(format!("{roles:?}")),
        }
    })
    .await
}

async fn count(node: &Node, wanted: i64) {
    until(LIMIT, &format!("{wanted} values on {}", node.name()), || async {
        let client = node.connect().await.map_err(|error| describe(&error))?;
        let row = client.query_one("SELECT count(DISTINCT i) FROM t", &[]).await;
        let found: i64 = row.map_err(|error| describe(&error))?.get(0);
        if found == wanted { Ok(()) } else { Err(found.to_string()) }
    })
    .await;
}

fn named<'a>(nodes: &'a [Node], name: &str) -> Result<&'a Node> {
    nodes.iter().find(|node| node.name() == name).with_context(|| format!("no node {name}"))
}

async fn configure(node: &Node, change: &Value) -> Result<()> {
    let answer = node.rest().patch("/config", change).await?;
    ensure!(answer.code == 200, "PATCH /config: {} {}", answer.code, answer.text);
    Ok(())
}

/// A cluster of two with a table in it, and another one of two that follows it.
struct Pair {
    near: Cluster,
    far: [Node; 2],
    scratch: Scratch,
}

impl Pair {
    async fn start() -> Result<Self> {
        let spec =
            ClusterSpec { name: "near", nodes: 2, synchronous: false, ..ClusterSpec::default() };
        let near = Cluster::start(spec).await?;
        let source = near.node(&near.leader().await?)?;
        write(source, "CREATE TABLE t (i int); INSERT INTO t VALUES (1)").await;
        // The other cluster is a copy of this one, and its members cascade from its leader.
        let scratch = Scratch::new("far");
        let start = |name: &str| {
            let home = scratch.server_dir(name);
            let (tell, told) = (home.join("tell.sh"), home.join("told"));
            fs::write(&tell, format!("#!/bin/sh\necho \"$@\" >> {}\n", told.display()))?;
            fs::set_permissions(&tell, fs::Permissions::from_mode(0o755))?;
            let all = ["on_start", "on_stop", "on_role_change"];
            let calls = all.map(|name| format!("{name}: {}", tell.display())).join(", ");
            let spec = AgentSpec {
                postgresql: vec![format!("callbacks: {{{calls}}}")],
                scope: "far".to_owned(),
                name: name.to_owned(),
                etcd: near.etcd.endpoints(),
                ttl: near.spec.ttl,
                synchronous: false,
                failsafe: true,
                dcs: vec![format!("standby_cluster: {{host: 127.0.0.1, port: {}}}", source.port())],
                ..AgentSpec::default()
            };
            Node::start(&scratch, &spec, Program::Kornak)
        };
        let far = [start("far0")?, start("far1")?];
        settled(&far, "standby_leader").await;
        Ok(Self { near, far, scratch })
    }

    fn passed(mut self) {
        self.scratch.passed();
        self.near.passed();
    }
}

/// Waits until a server takes these statements.
async fn write(node: &Node, statements: &str) {
    until(LIMIT, &format!("{} takes writes", node.name()), || async {
        let client = node.connect().await.map_err(|error| describe(&error))?;
        client.batch_execute(statements).await.map_err(|error| describe(&error))
    })
    .await;
}

/// `kornak demote-cluster` or `promote-cluster` as an operator types it.
async fn command(node: &Node, words: &[&str]) -> Result<()> {
    let mut command = kornak::command(words.iter().copied());
    command.arg("-c").arg(node.file()).arg("--force");
    succeeded(command).await
}

async fn succeeded(command: Command) -> Result<()> {
    let words = format!("{command:?}");
    let output = run(command).await?;
    ensure!(
        output.status.success(),
        "{words}: {}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(())
}

/// Waits until one of these events is the last that the callbacks of a node have heard.
async fn hears(node: &Node, events: &[&str], role: &str) {
    let told = node.data_dir().with_file_name("told");
    until(LIMIT, &format!("{} hears of {role}", node.name()), || async {
        let text = fs::read_to_string(&told).unwrap_or_default();
        let last = text.lines().last().unwrap_or_default();
        let fits = events.iter().any(|event| last == format!("{event} {role} far"));
        if fits { Ok(()) } else { Err(text) }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_standby_cluster_follows_and_takes_over() -> Result<()> {
    let pair = Pair::start().await?;
    let far = &pair.far;
    let source = pair.near.node(&pair.near.leader().await?)?;
    let first = settled(far, "standby_leader").await;
    let far_leader = named(far, &first)?;
    write(source, "INSERT INTO t VALUES (2)").await;
    for node in far {
        count(node, 2).await;
    }
    let codes = [("/standby-leader", 200), ("/leader", 200), ("/primary", 503)];
    for (path, expected) in codes {
        assert_eq!(far_leader.rest().code(path).await?, expected, "{path}");
    }
    for node in far {
        let role = if node.name() == first { "standby_leader" } else { "replica" };
        // Who starts before it leads hears of a start as a replica first.
        hears(node, &["on_start", "on_role_change"], role).await;
    }
    let refused = far_leader.connect().await?.batch_execute("INSERT INTO t VALUES (0)").await;
    assert!(refused.is_err(), "the leader of a standby cluster is read-only");

    // Promoted by taking the section out.
    configure(far_leader, &json!({"standby_cluster": null})).await?;
    let promoted = settled(far, "leader").await;
    assert_eq!(promoted, first);
    write(far_leader, "INSERT INTO t VALUES (3)").await;
    until(LIMIT, "its REST API says so", || async {
        match far_leader.rest().code("/primary").await {
            Ok(200) => Ok(()),
            other => Err(format!("{other:?}")),
        }
    })
    .await;
    hears(far_leader, &["on_role_change"], "primary").await;
    pair.passed();
    Ok(())
}

/// The way of a disaster: the other site was promoted while this one still wrote. This one gives up what
/// it wrote alone, on both of its members, follows, and in the end leads again.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cluster_that_has_written_becomes_a_standby_cluster_and_a_primary_again() -> Result<()> {
    let pair = Pair::start().await?;
    let (near, far) = (&pair.near, &pair.far);
    let far_leader = named(far, &settled(far, "standby_leader").await)?;
    let first = near.leader().await?;
    let near_leader = near.node(&first)?;
    command(far_leader, &["promote-cluster"]).await?;
    write(far_leader, "INSERT INTO t VALUES (2)").await;
    write(near_leader, "INSERT INTO t VALUES (-1)").await;
    for node in &near.nodes {
        count(node, 2).await;
    }

    let port = far_leader.port().to_string();
    command(near_leader, &["demote-cluster", "--host", "127.0.0.1", "--port", &port]).await?;
    settled(&near.nodes, "standby_leader").await;
    write(far_leader, "INSERT INTO t VALUES (3)").await;
    for node in &near.nodes {
        count(node, 3).await;
        let client = node.connect().await?;
        let row = client.query_one("SELECT count(*) FROM t WHERE i < 0", &[]).await?;
        assert_eq!(row.get::<_, i64>(0), 0, "{} has kept what it wrote alone", node.name());
    }

    command(near_leader, &["promote-cluster"]).await?;
    let leader = settled(&near.nodes, "leader").await;
    write(near.node(&leader)?, "INSERT INTO t VALUES (4)").await;
    for node in &near.nodes {
        count(node, 4).await;
    }
    pair.passed();
    Ok(())
}

/// A server that archives, and a cluster of one node that has nothing of it but a backup and the archive.
async fn archived(scratch: &Scratch) -> Result<(Postgres, Node, Etcd)> {
    let archive = scratch.server_dir("archive");
    let (log, backup) = (archive.join("log"), archive.join("backup"));
    let archives = format!("archive_command=mkdir -p {0} && cp %p {0}/%f", log.display());
    let source = Postgres::start(scratch, "source", &["archive_mode=on", &archives]).await?;
    let client = source.connect().await?;
    client.batch_execute("CREATE TABLE t (i int); INSERT INTO t VALUES (1)").await?;
    let mut command = program("pg_basebackup");
    command.args(["--checkpoint=fast", "--wal-method=none", "--no-sync", "-D"]).arg(&backup);
    command.arg("-d").arg(superuser(source.port()));
    succeeded(command).await?;

    let restore = archive.join("restore.sh");
    let text = format!(
        "#!/bin/sh\nfor word; do case $word in --datadir=*) to=${{word#*=}} ;; esac; done\n\
         mkdir -p \"$to\" && chmod 700 \"$to\" && cp -a {}/. \"$to\"\n",
        backup.display()
    );
    fs::write(&restore, text)?;
    fs::set_permissions(&restore, fs::Permissions::from_mode(0o755))?;
    let etcd = Etcd::start(1).await?;
    let spec = AgentSpec {
        scope: "far".to_owned(),
        name: "far0".to_owned(),
        etcd: etcd.endpoints(),
        ttl: 8,
        failsafe: true,
        dcs: vec![format!(
            "standby_cluster: {{create_replica_methods: [restore], \
                 restore_command: \"cp {}/%f %p\"}}",
            log.display()
        )],
        parameters: vec![
            "archive_mode: \"on\"".to_owned(),
            format!("archive_command: \"cp %p {}/%f\"", log.display()),
        ],
        postgresql: vec![
            "create_replica_methods: [restore]".to_owned(),
            format!("restore: {{command: {}, no_leader: true}}", restore.display()),
        ],
        ..AgentSpec::default()
    };
    let node = Node::start(scratch, &spec, Program::Kornak)?;
    Ok((source, node, etcd))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_standby_cluster_lives_on_a_backup_and_an_archive_alone() -> Result<()> {
    let mut scratch = Scratch::new("archived");
    let (source, node, _etcd) = archived(&scratch).await?;
    let far = std::slice::from_ref(&node);
    settled(far, "standby_leader").await;
    let client = source.connect().await?;
    client.batch_execute("INSERT INTO t VALUES (2)").await?;
    // The archive gets whole segments.
    client.batch_execute("SELECT pg_switch_wal()").await?;
    count(&node, 2).await;
    let states = roles(&node).await.map_err(anyhow::Error::msg)?;
    assert_eq!(states[0].2, "in archive recovery", "{states:?}");

    drop(source);
    command(&node, &["promote-cluster"]).await?;
    settled(far, "leader").await;
    write(&node, "INSERT INTO t VALUES (3)").await;
    count(&node, 3).await;

    // Its shutdown checkpoint comes to lie in the next segment, which a server would not archive.
    let client = node.connect().await?;
    let question = "SELECT pg_walfile_name(pg_current_wal_lsn() + 16777216)";
    let segment: String = client.query_one(question, &[]).await?.get(0);
    let log = scratch.path().join("archive").join("log");
    let restore = format!("cp {}/%f %p", log.display());
    command(&node, &["demote-cluster", "--restore-command", &restore]).await?;
    settled(far, "standby_leader").await;
    assert!(log.join(&segment).exists(), "{segment} is not in the archive");
    scratch.passed();
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_leadership_of_a_standby_cluster_is_handed_over_as_asked() -> Result<()> {
    let pair = Pair::start().await?;
    let far = &pair.far;
    let source = pair.near.node(&pair.near.leader().await?)?;
    for value in [2, 3] {
        let leader = settled(far, "standby_leader").await;
        let other = far.iter().find(|node| node.name() != leader).context("two nodes")?;
        let words = ["switchover", "--leader", &leader, "--candidate", other.name()];
        command(named(far, &leader)?, &words).await?;
        let now = settled(far, "standby_leader").await;
        assert_eq!(now, other.name());
        write(source, &format!("INSERT INTO t VALUES ({value})")).await;
        for node in far {
            count(node, value).await;
            let role = if node.name() == now { "standby_leader" } else { "replica" };
            hears(node, &["on_role_change"], role).await;
        }
    }
    until(LIMIT, "a request that is carried out is cleared", || async {
        let read = ["get", "--print-value-only", "/service/far/failover"];
        let value = pair.near.etcd.ctl(&read).await.map_err(|error| format!("{error:#}"))?;
        if value.trim() == "{}" { Ok(()) } else { Err(value) }
    })
    .await;
    pair.passed();
    Ok(())
}

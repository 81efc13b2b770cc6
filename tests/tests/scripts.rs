//! Scripts of an operator: commands before a promotion and before a stop, and how long a stop may
//! take.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use kornak_tests::run::agent::Node;
use kornak_tests::run::cluster::{Cluster, ClusterSpec};
use kornak_tests::run::postgres::describe;
use kornak_tests::run::wait::until;
use rustix::process::Signal;
use serde_json::json;

const LIMIT: Duration = Duration::from_secs(90);

fn script(path: &Path, text: &str) -> Result<()> {
    fs::write(path, text)?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o755))?;
    Ok(())
}

/// Lines that the scripts of a node have left beside its data directory.
fn told(node: &Node) -> PathBuf {
    node.data_dir().with_file_name("told")
}

fn lines(node: &Node) -> Vec<String> {
    let text = fs::read_to_string(told(node)).unwrap_or_default();
    text.lines().map(str::to_owned).collect()
}

async fn one(node: &Node, sql: &str) -> Result<String, String> {
    let client = node.connect().await.map_err(|error| describe(&error))?;
    let row = client.query_one(sql, &[]).await.map_err(|error| describe(&error))?;
    Ok(row.get(0))
}

const STARTED: &str = "SELECT pg_postmaster_start_time()::text";
const RECEIVED: &str = "SELECT pg_last_wal_receive_lsn()::text";

async fn start(name: &'static str) -> Result<Cluster> {
    Cluster::start(ClusterSpec { name, nodes: 1, synchronous: false, ..ClusterSpec::default() })
        .await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_is_forbidden_to_promote_gives_the_key_up_and_goes_on_as_it_is() -> Result<()> {
    let mut cluster = start("forbidden").await?;
    let forbid = cluster.path("forbid.sh");
    let line = format!("pre_promote: {} \"an argument\"", forbid.display());
    let first = cluster.add_node(|node| {
        node.tags = vec!["failover_priority: 2".to_owned()];
        node.postgresql = vec![line];
    })?;
    let second = cluster.add_node(|_| ())?;
    let path = told(cluster.node(&first)?);
    script(&forbid, &format!("#!/bin/sh\necho \"$# $1\" >> {}\nexit 1\n", path.display()))?;
    cluster.healthy(LIMIT).await;
    let preferred = cluster.node(&first)?;
    let started = one(preferred, STARTED).await.map_err(anyhow::Error::msg)?;
    until(LIMIT, "both standbys have the same", || async {
        let (here, there) =
            (one(preferred, RECEIVED).await?, one(cluster.node(&second).unwrap(), RECEIVED).await?);
        if here == there { Ok(()) } else { Err(format!("{here} and {there}")) }
    })
    .await;

    cluster.node_mut("node0")?.kill_all();
    assert_eq!(cluster.new_leader("node0", LIMIT).await, second);
    let preferred = cluster.node(&first)?;
    assert_eq!(lines(preferred), ["1 an argument"], "asked once, with its own arguments alone");
    until(LIMIT, "it replicates from the new leader", || async {
        let members = cluster.members().await.map_err(|error| format!("{error:#}"))?;
        let streams = members.iter().any(|it| it.name == first && it.state == "streaming");
        if streams { Ok(()) } else { Err(format!("{members:?}")) }
    })
    .await;
    assert_eq!(one(preferred, STARTED).await.map_err(anyhow::Error::msg)?, started);
    cluster.passed();
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn before_every_stop_in_order_the_operators_command_runs() -> Result<()> {
    let mut cluster = start("before-stop").await?;
    let tell = cluster.path("tell.sh");
    let line = format!("before_stop: {}", tell.display());
    let name = cluster.add_node(|node| node.postgresql = vec![line])?;
    let data = cluster.node(&name)?.data_dir();
    let text = format!(
        "#!/bin/sh\necho \"$# $(head -n1 {}/postmaster.pid)\" >> {}\nexit 1\n",
        data.display(),
        told(cluster.node(&name)?).display()
    );
    script(&tell, &text)?;
    cluster.healthy(LIMIT).await;
    let mut expected = Vec::new();
    let running = |cluster: &Cluster| -> Result<String> {
        Ok(format!("0 {}", cluster.node(&name)?.postmaster().context("it runs")?))
    };

    expected.push(running(&cluster)?);
    let answer = cluster.node(&name)?.rest().post("/restart", &json!({})).await?;
    ensure!(answer.code == 200, "{} {}", answer.code, answer.text);
    assert_eq!(lines(cluster.node(&name)?), expected, "the restart of a standby");

    cluster.healthy(LIMIT).await;
    cluster.switchover("node0", &name).await?;
    cluster.healthy(LIMIT).await;
    assert_eq!(lines(cluster.node(&name)?), expected, "nothing of it was stopped");
    expected.push(running(&cluster)?);
    cluster.switchover(&name, "node0").await?;
    assert_eq!(lines(cluster.node(&name)?), expected, "a leader that hands over");

    cluster.healthy(LIMIT).await;
    expected.push(running(&cluster)?);
    cluster.node_mut(&name)?.stop_agent(LIMIT).await;
    assert_eq!(lines(cluster.node(&name)?), expected, "the end of the agent");
    cluster.passed();
    Ok(())
}

/// Gives the archiver something to do, and waits until its command hangs.
async fn archiver_hangs(cluster: &Cluster, leader: &str) -> Result<()> {
    let client = cluster.connect_to_leader().await?;
    client.batch_execute("CREATE TABLE IF NOT EXISTS t (i int); INSERT INTO t VALUES (1)").await?;
    client.batch_execute("SELECT pg_switch_wal()").await?;
    let node = cluster.node(leader)?;
    until(LIMIT, "the archiver is busy", || async {
        node.process_titled("sleep").map(drop).ok_or_else(|| format!("{:?}", node.processes()))
    })
    .await;
    Ok(())
}

/// The archiver's command hangs, and a server that has shut down waits for it: for a few seconds, in
/// which it could have got something done.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_archiver_that_hangs_keeps_a_server_from_ending_for_a_few_seconds() -> Result<()> {
    let mut cluster = Cluster::start(hanging("stop-limit", 1)).await?;
    cluster.configure(&json!({"primary_stop_timeout": 1})).await?;
    let hold = cluster.node("node0")?.data_dir().with_file_name("hold");
    fs::write(&hold, "")?;
    archiver_hangs(&cluster, "node0").await?;
    let node = cluster.node_mut("node0")?;
    let postmaster = node.postmaster();
    let asked = Instant::now();
    node.agent().context("it runs")?.signal(Signal::TERM)?;
    until(LIMIT, "well over the limit", || async {
        let over = asked.elapsed() > Duration::from_millis(2500);
        if over { Ok(()) } else { Err(format!("{:?}", asked.elapsed())) }
    })
    .await;
    assert_eq!(node.postmaster(), postmaster, "it is waited for");
    // Well below what init systems wait.
    let status = node.stop_agent(Duration::from_secs(25)).await.context("it ran")?;
    ensure!(status.success(), "{status}");
    let log = node.agent_log()?;
    ensure!(
        !log.contains("is killed") && log.contains("neither the archiver nor a walsender"),
        "{log}"
    );

    node.start_agent()?;
    cluster.healthy(LIMIT).await;
    cluster.configure(&json!({"synchronous_mode": true})).await?;
    archiver_hangs(&cluster, "node0").await?;
    let node = cluster.node_mut("node0")?;
    let status = node.stop_agent(Duration::from_secs(25)).await.context("it ran")?;
    ensure!(status.success(), "{status}");
    let left = node.process_titled("postgres");
    ensure!(left.is_none(), "left: {left:?} of {:?}", node.processes());
    assert_eq!(cluster.key("leader").await?, "");
    cluster.passed();
    Ok(())
}

/// A cluster whose archiver hangs as long as there is a file.
fn hanging(name: &'static str, nodes: usize) -> ClusterSpec {
    // It runs in the data directory.
    let command = "while [ -e ../hold ]; do sleep 0.2; done";
    ClusterSpec {
        name,
        nodes,
        synchronous: false,
        parameters: vec![
            "archive_mode: \"on\"".to_owned(),
            format!("archive_command: '{command}'"),
        ],
        ..ClusterSpec::default()
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_switchover_does_not_wait_for_an_archiver_that_hangs() -> Result<()> {
    let cluster = Cluster::start(hanging("hanging-archiver", 2)).await?;
    let leader = cluster.leader().await?;
    let candidate = if leader == "node0" { "node1" } else { "node0" };
    let node = cluster.node(&leader)?;
    fs::write(node.data_dir().with_file_name("hold"), "")?;
    archiver_hangs(&cluster, &leader).await?;
    let postmaster = node.postmaster();
    // The command fails if the switchover does.
    cluster.switchover(&leader, candidate).await?;
    assert_eq!(cluster.leader().await?, candidate);
    // It was not killed in the midst of writing, and comes back once the archiver has had its time.
    cluster.healthy(LIMIT).await;
    ensure!(node.postmaster() != postmaster, "it is another server");
    let log = node.agent_log()?;
    ensure!(log.contains("server has shut down, its processes linger"), "{log}");
    ensure!(!log.contains("started in place"), "{log}");
    cluster.passed();
    Ok(())
}

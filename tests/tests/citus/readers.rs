//! Clients of the standbys' listener, while the servers that answer them change.

use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use kornak_tests::run::citus::{CitusCluster, CitusSpec};
use kornak_tests::run::postgres::{connect, describe};
use kornak_tests::run::wait::{strict_timing, until};
use tokio::task::JoinSet;
use tokio_postgres::Client;
use tokio_util::sync::CancellationToken;

use super::{SOON, distribute, needs_citus};

/// Rows that are read; each group has some of them.
const ROWS: i64 = 100;

/// Readers that keep their connection; one more connects anew for each read.
const KEEPING: usize = 3;

/// Between two reads of one client.
const THINK: Duration = Duration::from_millis(10);

/// Clients that count the rows on every group, again and again.
struct Readers {
    stop: CancellationToken,
    tasks: JoinSet<Result<Seen>>,
}

/// The reads of one reader.
#[derive(Debug, Default)]
struct Seen {
    reads: usize,
    longest: Duration,
    /// When it was and what it said.
    errors: Vec<(Instant, String)>,
}

impl Readers {
    fn start(cluster: &CitusCluster) -> Self {
        let stop = CancellationToken::new();
        let mut tasks = JoinSet::new();
        for number in 0..=KEEPING {
            tasks.spawn(read(cluster.app_reading(), number < KEEPING, stop.clone()));
        }
        Self { stop, tasks }
    }

    /// Ends them and answers what they saw together.
    async fn stop(mut self) -> Result<Seen> {
        self.stop.cancel();
        let mut all = Seen::default();
        while let Some(one) = self.tasks.join_next().await {
            let one = one??;
            assert!(one.reads > 0, "a reader has never been answered: {:?}", one.errors);
            all.reads += one.reads;
            all.longest = all.longest.max(one.longest);
            all.errors.extend(one.errors);
        }
        println!(
            "{} reads, the longest {:.0?}, {} errors",
            all.reads,
            all.longest,
            all.errors.len()
        );
        Ok(all)
    }
}

async fn read(login: String, keeps: bool, stop: CancellationToken) -> Result<Seen> {
    let mut seen = Seen::default();
    let mut kept = None;
    while !stop.is_cancelled() {
        let client = match kept.take() {
            Some(client) => client,
            None => connect(&login).await.context("log in as a reader")?,
        };
        let began = Instant::now();
        match client.query_one("SELECT count(*) FROM kornak_load", &[]).await {
            Ok(row) => {
                assert_eq!(row.get::<_, i64>(0), ROWS);
                seen.reads += 1;
                seen.longest = seen.longest.max(began.elapsed());
            }
            Err(error) => seen.errors.push((began, describe(&error))),
        }
        if keeps {
            kept = Some(client);
        }
        tokio::time::sleep(THINK).await;
    }
    Ok(seen)
}

async fn fill(cluster: &CitusCluster) -> Result<()> {
    distribute(cluster).await?;
    let app = connect(&cluster.app()).await?;
    let rows = format!("INSERT INTO kornak_load SELECT n, 0 FROM generate_series(1, {ROWS}) n");
    Ok(app.batch_execute(&rows).await?)
}

/// Ports of the servers that answer a client.
async fn answering(client: &Client) -> Result<Vec<i32>, String> {
    let query = "SELECT DISTINCT inet_server_port() FROM kornak_load ORDER BY 1";
    let rows = client.query(query, &[]).await.map_err(|error| describe(&error))?;
    Ok(rows.iter().map(|row| row.get(0)).collect())
}

/// Ports of the leaders of the worker groups, or of their standbys.
async fn workers(cluster: &CitusCluster, leaders: bool) -> Result<Vec<i32>> {
    let mut ports = Vec::new();
    for group in cluster.groups.keys().filter(|group| **group > 0) {
        for (name, role, _) in cluster.members(*group).await? {
            if (role == "leader") == leaders {
                ports.push(i32::from(cluster.node(&name)?.port()));
            }
        }
    }
    ports.sort_unstable();
    Ok(ports)
}

/// Waits until these are the servers that answer the client.
async fn is_answered_by(client: &Client, wanted: &[i32]) {
    until(SOON, "the right servers answer", || async {
        match answering(client).await? {
            found if found == wanted => Ok(()),
            found => Err(format!("{found:?}, not {wanted:?}")),
        }
    })
    .await;
}

/// In a group of two there is no standby from the switch until the former primary follows, and that
/// takes its time where WAL is looked for in an archive first.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn readers_notice_no_switchover() -> Result<()> {
    needs_citus!();
    let first = vec!["recovery_conf: {restore_command: 'sleep 0.4; false'}"];
    let spec = CitusSpec { name: "citus-readers", first, ..CitusSpec::default() };
    let cluster = CitusCluster::start(spec).await?;
    fill(&cluster).await?;
    let one = connect(&cluster.app_reading()).await?;
    is_answered_by(&one, &workers(&cluster, false).await?).await;
    for group in [1, 1, 2, 2, 0] {
        let readers = Readers::start(&cluster);
        cluster.switchover(group).await?;
        cluster.healthy(SOON).await;
        let seen = readers.stop().await?;
        assert_eq!(seen.errors, [], "in the switchover of group {group}");
        is_answered_by(&one, &workers(&cluster, false).await?).await;
    }
    cluster.passed();
    Ok(())
}

/// Standbys that do not come back are not waited for: primaries answer, until there is one again.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn primaries_answer_readers_while_a_group_has_no_standby() -> Result<()> {
    needs_citus!();
    let spec = CitusSpec { name: "citus-reads", members: vec![2, 1, 2], ..CitusSpec::default() };
    let mut cluster = CitusCluster::start(spec).await?;
    fill(&cluster).await?;
    let one = connect(&cluster.app_reading()).await?;
    assert_eq!(answering(&one).await, Ok(workers(&cluster, true).await?));
    let readers = Readers::start(&cluster);
    cluster.add_member(1).await?;
    cluster.healthy(SOON).await;
    is_answered_by(&one, &workers(&cluster, false).await?).await;
    assert_eq!(readers.stop().await?.errors, [], "when a standby came");

    // A failover leaves a group of two without one; its host stays away.
    let readers = Readers::start(&cluster);
    let leader = cluster.leader(2).await?;
    let blow = Instant::now();
    cluster.node_mut(&leader)?.kill_all();
    until(SOON, "group 2 has another leader", || async {
        match cluster.leader(2).await {
            Ok(name) if name != leader => Ok(()),
            other => Err(format!("{other:?}")),
        }
    })
    .await;
    is_answered_by(&one, &workers(&cluster, true).await?).await;
    cluster.node_mut(&leader)?.start_agent()?;
    cluster.healthy(SOON).await;
    is_answered_by(&one, &workers(&cluster, false).await?).await;
    let seen = readers.stop().await?;
    println!("{:.1?} after the blow", blow.elapsed());
    assert_eq!(seen.errors, [], "in a failover");
    cluster.passed();
    Ok(())
}

/// A worker's standby that crashes costs what was in flight on it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn readers_wait_for_a_standby_that_crashed() -> Result<()> {
    needs_citus!();
    let spec = CitusSpec { name: "citus-standby", members: vec![2, 2], ..CitusSpec::default() };
    let cluster = CitusCluster::start(spec).await?;
    fill(&cluster).await?;
    let members = cluster.members(1).await?;
    let standby = members.iter().find(|(_, role, _)| role != "leader").context("no standby")?;
    let readers = Readers::start(&cluster);
    let one = connect(&cluster.app_reading()).await?;
    is_answered_by(&one, &workers(&cluster, false).await?).await;
    let blow = Instant::now();
    cluster.node(&standby.0)?.kill_postmaster()?;
    cluster.healthy(SOON).await;
    is_answered_by(&one, &workers(&cluster, false).await?).await;
    let seen = readers.stop().await?;
    let late = seen.errors.iter().filter(|(when, _)| *when > blow + notice());
    let late: Vec<_> = late.map(|(when, text)| (when.duration_since(blow), text)).collect();
    assert!(late.is_empty(), "began after the standby was known to be away: {late:?}");
    cluster.passed();
    Ok(())
}

/// After so long proxies know that a standby is away.
fn notice() -> Duration {
    Duration::from_millis(if strict_timing() { 200 } else { 1000 })
}

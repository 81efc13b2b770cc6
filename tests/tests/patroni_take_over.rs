//! docs/runbooks/take-over-patroni.md, step by step, under load: a Patroni cluster becomes a Kornak
//! cluster and a Patroni cluster again. What watches and routes such clusters goes on working:
//! `check_patroni`, and an HAProxy configured as Patroni's documentation says.

#![expect(clippy::print_stdout, reason = "a run shows what it did")]

use std::collections::BTreeSet;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use kornak_tests::load::{Load, LoadSpec, Report};
use kornak_tests::run::agent::Program;
use kornak_tests::run::cluster::{Cluster, ClusterSpec, run};
use kornak_tests::run::haproxy::HaProxy;
use kornak_tests::run::kornak;
use kornak_tests::run::patroni::Patroni;
use kornak_tests::run::postgres::{connect, describe, superuser};
use kornak_tests::run::wait::until;

const SOON: Duration = Duration::from_secs(60);

/// Runs a command that must succeed; what it printed.
async fn succeed(mut command: Command, words: &[&str]) -> Result<String> {
    let output = run({
        command.args(words);
        command
    })
    .await?;
    let said = [output.stdout, output.stderr].concat();
    let said = String::from_utf8_lossy(&said).into_owned();
    assert!(output.status.success(), "{words:?}: {said}");
    Ok(said)
}

/// The runbook's steps 2 to 4: every node, standbys first, becomes `program`.
async fn convert(
    cluster: &mut Cluster,
    patroni: &Patroni,
    program: impl Fn() -> Program,
) -> Result<()> {
    let leader = cluster.leader().await?;
    let mut names: Vec<String> = cluster.nodes.iter().map(|it| it.name().to_owned()).collect();
    names.sort_by_key(|name| *name == leader);
    for name in &names {
        if *name == leader {
            // Step 3: the leader last, after a switchover to a node that is done.
            let file = cluster.node(name)?.file().to_owned();
            let file = file.to_str().context("a path in UTF-8")?;
            let words =
                ["-c", file, "switchover", "--leader", name, "--candidate", &names[0], "--force"];
            let said = succeed(patroni.command("patronictl"), &words).await?;
            assert!(said.contains("Successfully switched over"), "{said}");
            cluster.healthy(SOON).await;
        }
        let began = Instant::now();
        let node = cluster.node_mut(name)?;
        let stopped = node.stop_agent(SOON).await;
        assert!(stopped.is_some_and(|status| status.success()), "{name} ended with {stopped:?}");
        node.set_program(program());
        node.start_agent()?;
        cluster.healthy(SOON).await;
        println!("{name} changed over in {:.1?}", began.elapsed());
    }
    Ok(())
}

/// The effect of switchovers and of nothing else.
fn only_switchovers_were_felt(report: &Report) {
    let mut seen = BTreeSet::new();
    for (client, problem) in report.problems() {
        let code = problem.sqlstate.as_deref().unwrap_or("none");
        seen.insert(format!("{:?} {code}", problem.doing));
        assert!(
            ["40001", "08007", "57P03", "25P02"].contains(&code),
            "client {} ({}) got {code} in {:?} at {:.2?}: {}",
            client.number,
            client.kind,
            problem.doing,
            problem.at,
            problem.message
        );
    }
    println!("errors seen: {seen:?}");
    assert_eq!(report.lost_connections(), 0, "client connections survive");
    for client in &report.clients {
        let count = client.problems.len() + client.further_problems;
        assert!(count <= 2, "client {} failed {count} times at one switchover", client.number);
    }
}

/// Checks that monitoring is content with a healthy cluster: each check of the leader, a standby
/// and the whole.
async fn monitoring_is_content(cluster: &Cluster, patroni: &Patroni) -> Result<()> {
    let leader = cluster.leader().await?;
    let standby = cluster.nodes.iter().find(|node| node.name() != leader);
    let standby = standby.context("there is a standby")?.name().to_owned();
    let url = |name: &str| Ok::<_, anyhow::Error>(cluster.node(name)?.rest().base());
    let (leader, standby) = (url(&leader)?, url(&standby)?);
    let all: Vec<String> = cluster.nodes.iter().map(|node| node.rest().base()).collect();
    let all = all.join(",");
    let timeline = cluster.connect_to_leader().await?;
    let timeline = timeline
        .query_one("SELECT timeline_id::text FROM pg_control_checkpoint()", &[])
        .await?
        .get::<_, String>(0);
    for (endpoint, words, expected) in [
        (&all, &["cluster_has_leader"][..], 0),
        (&all, &["cluster_node_count", "-c", "3:3", "--healthy-critical", "3:3"], 0),
        (&all, &["cluster_has_replica", "-c", "2:2", "--max-lag", "16MB"], 0),
        (&all, &["cluster_has_scheduled_action"], 0),
        (&all, &["cluster_is_in_maintenance"], 0),
        (&all, &["cluster_config_has_changed", "--hash", "0"], 2),
        (&leader, &["node_is_alive"], 0),
        (&leader, &["node_is_primary"], 0),
        (&leader, &["node_is_leader"], 0),
        (&leader, &["node_is_replica"], 2),
        (&standby, &["node_is_replica", "--max-lag", "16MB"], 0),
        (&standby, &["node_is_replica", "--is-async"], 0),
        (&standby, &["node_is_replica", "--is-sync"], 2),
        (&standby, &["node_is_primary"], 2),
        (&standby, &["node_is_pending_restart"], 0),
        (&leader, &["node_tl_has_changed", "--timeline", &timeline], 0),
        (&leader, &["node_patroni_version", "--patroni-version", "1.0"], 2),
    ] {
        let mut command = patroni.command("check_patroni");
        command.args(["-e", endpoint]).args(words);
        let output = run(command).await?;
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        assert_eq!(output.status.code(), Some(expected), "{words:?} of {endpoint}: {said}");
    }
    Ok(())
}

async fn haproxy_leads_to(port: u16, server: u16) {
    until(SOON, "HAProxy leads to the leader", || async {
        let client = connect(&superuser(port)).await.map_err(|error| describe(&error))?;
        let row = client.query_one("SHOW port", &[]).await.map_err(|error| describe(&error))?;
        let found: String = row.get(0);
        if found == server.to_string() { Ok(()) } else { Err(format!("it leads to {found}")) }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_patroni_cluster_becomes_a_kornak_cluster_and_goes_back() -> Result<()> {
    let spec = ClusterSpec {
        name: "takeover",
        ttl: 20,
        synchronous: false,
        patroni: &[0, 1, 2],
        ..Default::default()
    };
    let mut cluster = Cluster::start(spec).await?;
    let patroni = Patroni::installed()?;
    monitoring_is_content(&cluster, &patroni).await?;

    let haproxy = HaProxy::start(&cluster)?;

    // Step 1: the file is one for Kornak.
    for node in &cluster.nodes {
        let said = succeed(kornak::with_file("check", node.file()), &[]).await?;
        assert!(said.contains("good for an agent"), "{said}");
    }
    for back in [false, true] {
        let load = Load::start(&LoadSpec::mixed(&cluster.app())).await?;
        load.flows(20, SOON).await;
        if back {
            convert(&mut cluster, &patroni, || Program::Patroni(patroni.clone())).await?;
        } else {
            convert(&mut cluster, &patroni, || Program::Kornak).await?;
        }
        load.flows(10, SOON).await;
        let report = load.stop().await;
        println!("{report}");
        let verdict = report.verify(&cluster.app_on_leader().await?).await?;
        assert!(verdict.is_clean(), "{verdict}");
        only_switchovers_were_felt(&report);
        monitoring_is_content(&cluster, &patroni).await?;
        let leader = cluster.leader().await?;
        haproxy_leads_to(haproxy.primary(), cluster.node(&leader)?.port()).await;
    }
    cluster.passed();
    Ok(())
}

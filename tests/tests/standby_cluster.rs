//! A cluster that follows another one, and takes over from it.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use kornak_tests::run::agent::{AgentSpec, Node, Program};
use kornak_tests::run::cluster::{Cluster, ClusterSpec};
use kornak_tests::run::postgres::describe;
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

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_standby_cluster_follows_and_takes_over() -> Result<()> {
    let spec = ClusterSpec { name: "near", nodes: 2, synchronous: false, ..ClusterSpec::default() };
    let near = Cluster::start(spec).await?;
    let leader = near.leader().await?;
    let source = near.node(&leader)?;
    source
        .connect()
        .await?
        .batch_execute("CREATE TABLE t (i int); INSERT INTO t VALUES (1)")
        .await?;

    // The other cluster is a copy of this one, and its members cascade from its leader.
    let mut scratch = Scratch::new("far");
    let start = |name: &str| {
        let spec = AgentSpec {
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
    let first = settled(&far, "standby_leader").await;
    let far_leader = named(&far, &first)?;
    source.connect().await?.batch_execute("INSERT INTO t VALUES (2)").await?;
    for node in &far {
        count(node, 2).await;
    }
    let codes = [("/standby-leader", 200), ("/leader", 200), ("/primary", 503)];
    for (path, expected) in codes {
        assert_eq!(far_leader.rest().code(path).await?, expected, "{path}");
    }
    let refused = far_leader.connect().await?.batch_execute("INSERT INTO t VALUES (0)").await;
    assert!(refused.is_err(), "the leader of a standby cluster is read-only");

    // Promoted by taking the section out.
    configure(far_leader, &json!({"standby_cluster": null})).await?;
    let promoted = settled(&far, "leader").await;
    assert_eq!(promoted, first);
    until(LIMIT, "the promoted leader takes writes", || async {
        let client = far_leader.connect().await.map_err(|error| describe(&error))?;
        let write = client.batch_execute("INSERT INTO t VALUES (3)").await;
        write.map_err(|error| describe(&error))
    })
    .await;
    until(LIMIT, "its REST API says so", || async {
        match far_leader.rest().code("/primary").await {
            Ok(200) => Ok(()),
            other => Err(format!("{other:?}")),
        }
    })
    .await;

    scratch.passed();
    near.passed();
    Ok(())
}

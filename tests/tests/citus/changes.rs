//! Changes of an operator to the nodes' files: the superuser's login, and where a server is.

use std::time::Duration;

use anyhow::{Context, Result};
use kornak_tests::run::certificates::Workshop;
use kornak_tests::run::citus::{CitusCluster, CitusSpec};
use kornak_tests::run::postgres::{SUPERUSER_PASSWORD, connect, describe};
use kornak_tests::run::wait::until;
use tokio_postgres::Client;

use super::{SOON, distribute, needs_citus};

const STOP_LIMIT: Duration = Duration::from_secs(60);
const OTHER: &str = r"it's \another";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_changed_login_of_the_superuser_is_the_one_that_citus_uses() -> Result<()> {
    needs_citus!();
    let spec = CitusSpec { name: "citus-login", members: vec![2, 1, 1], ..CitusSpec::default() };
    let cluster = CitusCluster::start(spec).await?;
    distribute(&cluster).await?;
    logins(&cluster, SUPERUSER_PASSWORD, &[&format!("password={}", quoted(SUPERUSER_PASSWORD))])
        .await;

    // As documented: on the coordinator, which tells the workers, and then in the files.
    change_password(&cluster, SUPERUSER_PASSWORD, OTHER).await?;
    let yaml = |password: &str| format!("username: postgres, password: {}}}", json(password));
    for node in cluster.nodes() {
        node.edit(&yaml(SUPERUSER_PASSWORD), &yaml(OTHER))?;
        node.reload()?;
    }
    logins(&cluster, OTHER, &[&format!("password={}", quoted(OTHER))]).await;

    // Back, and with a certificate besides.
    let pair = Workshop::new(&cluster.scratch).self_signed("superuser", "postgres")?;
    let (cert, key) = (pair.cert.display().to_string(), pair.key.display().to_string());
    change_password(&cluster, OTHER, SUPERUSER_PASSWORD).await?;
    let with_certificate = yaml(SUPERUSER_PASSWORD)
        .replace('}', &format!(", sslcert: {}, sslkey: {}}}", json(&cert), json(&key)));
    for node in cluster.nodes() {
        node.edit(&yaml(OTHER), &with_certificate)?;
        node.reload()?;
    }
    let words = [
        &*format!("password={}", quoted(SUPERUSER_PASSWORD)),
        &format!("sslcert={cert}"),
        &format!("sslkey={key}"),
    ];
    logins(&cluster, SUPERUSER_PASSWORD, &words).await;
    cluster.healthy(SOON).await;
    for node in cluster.nodes() {
        let log = node.agent_log()?;
        assert!(!log.contains(OTHER) && !log.contains(SUPERUSER_PASSWORD), "{}", node.name());
    }
    cluster.passed();
    Ok(())
}

/// As a value of a connection string.
fn quoted(value: &str) -> String {
    format!("'{}'", value.replace('\\', r"\\").replace('\'', r"\'"))
}

/// As a string of YAML.
fn json(value: &str) -> String {
    serde_json::Value::from(value).to_string()
}

async fn change_password(cluster: &CitusCluster, from: &str, to: &str) -> Result<()> {
    let leader = cluster.leader(0).await?;
    let client = superuser(cluster.node(&leader)?.port(), from).await?;
    let alter = format!("ALTER ROLE postgres PASSWORD '{}'", to.replace('\'', "''"));
    client.batch_execute(&alter).await.context("change the password")
}

async fn superuser(port: u16, password: &str) -> Result<Client> {
    let login = CitusCluster::superuser_on(port, "citus");
    let ours = quoted(password);
    connect(&login.replace(&quoted(SUPERUSER_PASSWORD), &ours)).await.context("log in")
}

/// Waits until every node lets the superuser in with the password and has exactly these words for the
/// other nodes, and until they work: a new session reaches every shard.
async fn logins(cluster: &CitusCluster, password: &str, words: &[&str]) {
    let text = |error: anyhow::Error| format!("{error:#}");
    until(SOON, "the superuser's login is right on every node", || async {
        for node in cluster.nodes() {
            let client = superuser(node.port(), password).await.map_err(text)?;
            let query = "SELECT authinfo FROM pg_dist_authinfo WHERE rolename = 'postgres'";
            let rows = client.query(query, &[]).await.map_err(|error| describe(&error))?;
            let found: Vec<String> = rows.iter().map(|row| row.get(0)).collect();
            let [login] = found.as_slice() else {
                return Err(format!("{}: {} rows", node.name(), found.len()));
            };
            if *login != words.join(" ") {
                return Err(format!("{}: {login}", node.name()));
            }
        }
        let leader = cluster.leader(0).await.map_err(text)?;
        let port = cluster.node(&leader).map_err(text)?.port();
        let client = superuser(port, password).await.map_err(text)?;
        let read = client.query("SELECT count(*) FROM kornak_load", &[]).await;
        read.map(drop).map_err(|error| describe(&error))
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_changed_address_is_followed() -> Result<()> {
    needs_citus!();
    let spec = CitusSpec { name: "citus-moves", members: vec![1, 1, 2], ..CitusSpec::default() };
    let mut cluster = CitusCluster::start(spec).await?;
    distribute(&cluster).await?;

    // Another host, while the server runs; nobody has to do anything.
    let node = cluster.node("work1-1")?;
    let at = |host: &str| format!("connect_address: {host}:{}", node.port());
    node.edit(&at("127.0.0.1"), &at("localhost"))?;
    node.reload()?;
    registered(&cluster, &("localhost".to_owned(), node.port())).await;
    works(&cluster).await?;

    // Another port, with a restart: a standby's, a primary's that is alone, and the coordinator's.
    let leader = cluster.leader(2).await?;
    let standby = if leader == "work2-1" { "work2-2" } else { "work2-1" };
    for name in [standby, "work1-1", "coord1"] {
        let node = cluster.node_mut(name)?;
        node.stop_agent(STOP_LIMIT).await.context("it runs")?;
        node.move_port()?;
        node.start_agent()?;
        cluster.healthy(SOON).await;
        works(&cluster).await?;
    }
    cluster.passed();
    Ok(())
}

/// Waits until every leader has a row with this address.
async fn registered(cluster: &CitusCluster, wanted: &(String, u16)) {
    let text = |error: anyhow::Error| format!("{error:#}");
    until(SOON, "the new address is registered everywhere", || async {
        for group in cluster.groups.keys() {
            let leader = cluster.leader(*group).await.map_err(text)?;
            let client = cluster.node(&leader).map_err(text)?.connect_to("citus").await;
            let client = client.map_err(|error| describe(&error))?;
            let query = "SELECT nodename, nodeport FROM pg_dist_node";
            let rows = client.query(query, &[]).await.map_err(|error| describe(&error))?;
            let found: Vec<(String, i32)> =
                rows.iter().map(|row| (row.get(0), row.get(1))).collect();
            if !found.contains(&(wanted.0.clone(), i32::from(wanted.1))) {
                return Err(format!("{leader}: {found:?}, not {wanted:?}"));
            }
        }
        Ok(())
    })
    .await;
}

/// A new session of an application writes to every shard.
async fn works(cluster: &CitusCluster) -> Result<()> {
    let client = connect(&cluster.app()).await.context("log in")?;
    let write = "INSERT INTO kornak_load SELECT n, 0 FROM generate_series(1, 100) n \
        ON CONFLICT (id) DO UPDATE SET client = kornak_load.client + 1";
    client.batch_execute(write).await.context("write")
}

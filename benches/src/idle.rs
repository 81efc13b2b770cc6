//! Measures the memory that an idle session costs a proxy after its login.

use std::fmt::Write as _;
use std::fs;

use anyhow::{Context, Result};
use futures_util::future::try_join_all;
use kornak_tests::run::postgres::connect;
use tokio_postgres::Client;

use crate::ways::{APP, APP_PASSWORD, Way};

/// Sessions where each needs a server connection: the server takes 450, and PgBouncer keeps those it once opened.
const FEW: usize = 150;

/// Sessions where they share.
const MANY: usize = 1500;

/// Logins at once: SCRAM is work for both sides.
const AT_ONCE: usize = 25;

/// One line for each way that is a process: memory per session after its login, and after a query
/// with an answer of 60 KB.
pub async fn table(ways: &[Way]) -> Result<String> {
    let mut out = String::from("memory of an idle session\n");
    for way in ways {
        let Some(pid) = way.pid else { continue };
        let sessions = if way.pooled { MANY } else { FEW };
        // What is allocated once is allocated before.
        drop(open(way, AT_ONCE).await?);
        let before = resident_kib(pid)?;
        let clients = open(way, sessions).await?;
        let logged_in = resident_kib(pid)?;
        for client in &clients {
            client.simple_query("SELECT repeat('x', 60000)").await.context("query")?;
        }
        let used = resident_kib(pid)?;
        let each = |after: f64| (after - before) / sessions as f64;
        let _ = writeln!(
            out,
            "  {:<20}{:>8.2} KiB after the login, {:>8.2} KiB after a query, of {sessions} sessions",
            way.name,
            each(logged_in),
            each(used),
        );
    }
    Ok(out)
}

async fn open(way: &Way, sessions: usize) -> Result<Vec<Client>> {
    let conninfo = format!(
        "host=127.0.0.1 port={} user={APP} password={APP_PASSWORD} dbname={APP} sslmode=disable",
        way.port
    );
    let mut clients = Vec::with_capacity(sessions);
    while clients.len() < sessions {
        let more = (0..AT_ONCE.min(sessions - clients.len())).map(|_| connect(&conninfo));
        clients.extend(try_join_all(more).await.context("log in")?);
    }
    Ok(clients)
}

/// Memory of a process that is not files, in KiB.
fn resident_kib(pid: u32) -> Result<f64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:"));
    let number = line.and_then(|line| line.split_whitespace().next()).context("no RssAnon")?;
    Ok(number.parse()?)
}

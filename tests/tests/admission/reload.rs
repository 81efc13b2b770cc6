//! Other settings while clients are in: SIGHUP.

use std::fs;
use std::time::Duration;

use anyhow::{Context, Result};
use kornak_tests::run::postgres::{Postgres, sqlstate};
use kornak_tests::run::scratch::Scratch;
use kornak_tests::run::wait::until;
use rustix::process::Signal;

use super::{Proxy, SOON, auth};

pub(super) async fn other_settings_hold_while_clients_are_in(
    scratch: &Scratch,
    server: &Postgres,
) -> Result<()> {
    let lines = format!(
        "status: {{listen: \"STATUS\"}}\nlimits: {{max_clients: 10}}\npool: {{size: 1}}\n{}",
        auth("")
    );
    let listeners = [", pool_mode: transaction", ""];
    let proxy = Proxy::start(scratch, "reloaded", server.port(), &listeners, &lines).await?;
    proxy.ready().await;
    let file = scratch.join("reloaded.yml");
    let reload = async |from: &str, to: &str, expected: &str| {
        let text = fs::read_to_string(&file)?;
        assert!(text.contains(from), "{text}");
        fs::write(&file, text.replace(from, to))?;
        let before = proxy.log()?.matches(expected).count();
        proxy.process.signal(Signal::HUP)?;
        until(SOON, expected, || async {
            let log = proxy.log().map_err(|error| error.to_string())?;
            if log.matches(expected).count() > before { Ok(()) } else { Err(log) }
        })
        .await;
        anyhow::Ok(())
    };
    let clients = [proxy.login(0, "app").await?, proxy.login(0, "app").await?];
    clients[0].batch_execute("BEGIN").await?;
    let waits = clients[1].batch_execute("BEGIN");
    tokio::pin!(waits);
    let early = tokio::time::timeout(Duration::from_millis(200), &mut waits).await;
    assert!(early.is_err(), "there is one connection");
    // A wrong file changes nothing.
    reload("size: 1", "size: none", "configuration is wrong, the old one stays in force").await?;
    let early = tokio::time::timeout(Duration::from_millis(200), &mut waits).await;
    assert!(early.is_err(), "there is one connection");
    reload("size: none", "size: 2", "configuration reloaded").await?;
    tokio::time::timeout(SOON, waits).await.context("there is room for a second connection")??;
    // A smaller pool: connections beyond it end when they are given back.
    let waiting = "changed value needs a restart of the proxy";
    reload("size: 2}\n", "size: 1}\n  threads: 7\n", waiting).await?;
    assert!(proxy.log()?.contains("proxy.threads"), "{}", proxy.log()?);
    for client in &clients {
        client.batch_execute("COMMIT").await?;
    }
    let admin = server.connect().await?;
    until(SOON, "one connection is left", || async {
        let text = "SELECT count(*) FROM pg_stat_activity WHERE usename = 'app'";
        let row = admin.query_one(text, &[]).await.map_err(|error| error.to_string())?;
        if row.get::<_, i64>(0) == 1 { Ok(()) } else { Err(format!("{row:?}")) }
    })
    .await;
    // Who is in stays; whoever comes meets the new bound; times hold for all.
    let own = proxy.login(1, "app").await?;
    reload("max_clients: 10", "max_clients: 3", "configuration reloaded").await?;
    until(SOON, "a fourth client is refused", || async {
        let state = sqlstate(proxy.login(1, "app").await);
        if state == "53300" { Ok(()) } else { Err(state) }
    })
    .await;
    own.batch_execute("SELECT 1").await?;
    reload("max_clients: 3", "client_idle_timeout: 1s", "configuration reloaded").await?;
    until(SOON, "nobody may be idle", || async {
        let open = clients.iter().chain([&own]).filter(|it| !it.is_closed()).count();
        if open == 0 { Ok(()) } else { Err(format!("{open} are there")) }
    })
    .await;
    Ok(())
}

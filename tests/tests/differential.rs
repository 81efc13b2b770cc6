//! A client cannot tell the proxy from a server: random conversations, byte by byte.
//!
//! `KORNAK_DIFFERENTIAL_CONVERSATIONS` and `KORNAK_DIFFERENTIAL_SEED` make it longer, or another one.

use std::time::{Duration, Instant};

use anyhow::Result;
use kornak_tests::differential::many::{Crowd, POOL_SIZE, Way};
use kornak_tests::differential::{Plan, Stage};
use kornak_tests::run::postgres::{Postgres, SUPERUSER_PASSWORD};
use kornak_tests::run::proxy::Proxy;
use kornak_tests::run::scratch::Scratch;

/// The conversations that one run of the tests has time for.
const CONVERSATIONS: u64 = 20_000;

/// Durability is of no interest here, time is; and rows must not move by themselves.
const SETTINGS: [&str; 9] = [
    "fsync=off",
    "synchronous_commit=off",
    "full_page_writes=off",
    "autovacuum=off",
    "shared_buffers=32MB",
    "max_connections=150",
    "jit=off",
    "log_min_messages=panic",
    "log_min_error_statement=panic",
];

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_is_told_the_same_bytes_as_by_the_server() -> Result<()> {
    let mut scratch = Scratch::new("differential");
    let server = Postgres::start(&scratch, "pg", &SETTINGS).await?;
    let head = format!(
        "scope: demo\nstatic:\n  members: [{{name: a, host: 127.0.0.1, port: {}}}]",
        server.port()
    );
    let auth =
        format!("auth: {{method: scram, user: postgres, password: \"{SUPERUSER_PASSWORD}\"}}");
    let proxy = Proxy::start(&scratch, "proxy", &head, &auth).await?;
    let plan = Plan::from_environment(CONVERSATIONS);
    let stage = Stage { server, proxy };
    stage.prepare(plan.lanes).await?;
    let conninfo = format!(
        "host=127.0.0.1 port={} user=postgres password='{}' dbname=postgres",
        stage.proxy.primary(),
        SUPERUSER_PASSWORD.replace('\'', "\\'")
    );
    stage.proxy.ready(&conninfo, Duration::from_secs(15)).await;

    let began = Instant::now();
    let outcome = stage.run(plan).await;
    println!(
        "{} conversations of seed {} in {:.1?}",
        plan.conversations,
        plan.seed,
        began.elapsed()
    );
    if let Err(difference) = outcome {
        anyhow::bail!("the proxy can be told from the server:\n{difference}");
    }
    scratch.passed();
    Ok(())
}

/// Conversations of many clients at once.
const CONVERSATIONS_OF_MANY: u64 = 4_000;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_clients_see_only_what_is_theirs() -> Result<()> {
    let mut scratch = Scratch::new("differential-many");
    let server = Postgres::start(&scratch, "pg", &SETTINGS).await?;
    let head = format!(
        "scope: demo\nstatic:\n  members: [{{name: a, host: 127.0.0.1, port: {}}}]",
        server.port()
    );
    let lines = |reset: &str| {
        format!(
            "auth: {{method: scram, user: postgres, password: \"{SUPERUSER_PASSWORD}\"}}\n\
             pool: {{reset: {reset}, wait_notice: 0}}"
        )
    };
    let pooled = format!(", pool_mode: transaction, pool_size: {POOL_SIZE}");
    let proxies = [
        Proxy::start_as(&scratch, "pooled", &head, &pooled, &lines("known")).await?,
        Proxy::start_as(&scratch, "plain", &head, "", &lines("known")).await?,
        Proxy::start_as(&scratch, "always", &head, &pooled, &lines("always")).await?,
    ];
    let names = ["pooled", "plain", "always"];
    let ways = names.into_iter().zip(&proxies);
    let ways = ways.map(|(name, proxy)| Way { name, port: proxy.primary() }).collect();
    let crowd = Crowd { server: &server, ways };
    crowd.prepare().await?;
    for proxy in &proxies {
        let conninfo = format!(
            "host=127.0.0.1 port={} user=postgres password='{}' dbname=postgres",
            proxy.primary(),
            SUPERUSER_PASSWORD.replace('\'', "\\'")
        );
        proxy.ready(&conninfo, Duration::from_secs(15)).await;
    }
    let plan = Plan::from_environment(CONVERSATIONS_OF_MANY);
    let began = Instant::now();
    let outcome = crowd.run(plan).await;
    println!(
        "{} conversations of many clients, seed {}, in {:.1?}",
        plan.conversations,
        plan.seed,
        began.elapsed()
    );
    if let Err(difference) = outcome {
        anyhow::bail!("a client can tell that it is not alone:\n{difference}");
    }
    scratch.passed();
    Ok(())
}

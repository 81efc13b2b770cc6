//! The measuring tools measured: a load that finds nothing wrong must be able to find it.

use std::time::Duration;

use anyhow::Result;
use kornak_tests::load::{Load, LoadSpec};
use kornak_tests::run::postgres::{Postgres, superuser};
use kornak_tests::run::process::Process;
use kornak_tests::run::scratch::{Scratch, processes_below};
use kornak_tests::run::wait::until_true;

const SOON: Duration = Duration::from_secs(15);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_undisturbed_server_gives_no_error_and_loses_no_row() -> Result<()> {
    let mut scratch = Scratch::new("calm");
    let server = Postgres::start(&scratch, "pg", &[]).await?;
    let load = Load::start(&LoadSpec::mixed(&superuser(server.port()))).await?;
    load.flows(30, SOON).await;
    let report = load.stop().await;
    println!("{report}");
    let client = server.connect().await?;
    let verdict = report.verify(&client).await?;
    assert_eq!((report.errors(), report.lost_connections(), report.stale_reads()), (0, 0, 0));
    assert!(verdict.is_clean() && verdict.acknowledged > 0, "{verdict}");

    // And it does find what somebody takes away behind its back.
    let newest = "SELECT max(id) FROM kornak_load";
    client.batch_execute(&format!("DELETE FROM kornak_load WHERE id = ({newest})")).await?;
    let verdict = report.verify(&client).await?;
    assert_eq!(verdict.missing.len(), 1, "{verdict}");
    scratch.passed();
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_ends_every_session_is_seen_by_every_client() -> Result<()> {
    let mut scratch = Scratch::new("storm");
    let server = Postgres::start(&scratch, "pg", &[]).await?;
    let mut spec = LoadSpec::mixed(&superuser(server.port()));
    spec.reconnecting = 0;
    let load = Load::start(&spec).await?;
    load.flows(5, SOON).await;
    let client = server.connect().await?;
    let others = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity \
                  WHERE backend_type = 'client backend' AND pid <> pg_backend_pid()";
    client.batch_execute(others).await?;
    load.flows(5, SOON).await;
    let report = load.stop().await;
    println!("{report}");
    assert_eq!(report.lost_connections(), 16, "each client had one connection");
    let verdict = report.verify(&client).await?;
    assert!(verdict.is_clean(), "{verdict}");
    scratch.passed();
    Ok(())
}

#[tokio::test]
async fn whatever_runs_below_a_scratch_directory_ends_with_it() -> Result<()> {
    let mut scratch = Scratch::new("reaped");
    let path = scratch.path().to_owned();
    // A grandchild with a session of its own, as a guard is: not ours to wait for.
    let mut shell = std::process::Command::new("/bin/sh");
    shell.args(["-c", "setsid sleep 600 & exit 0"]).current_dir(&path);
    let mut process = Process::spawn("shell", shell, &scratch.join("shell.log"))?;
    assert!(process.exit(SOON).await.success());
    until_true(SOON, "the grandchild runs", || async { !processes_below(&path).is_empty() }).await;
    scratch.passed();
    drop(scratch);
    assert_eq!(processes_below(&path), [0_u32; 0]);
    assert!(!path.exists());
    Ok(())
}

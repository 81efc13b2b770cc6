//! Values that a server would not take as they are written: parameters, and passwords in its own encoding.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a failed step fails the test")]

mod support;

use kornak_agent::guard::Fencing;
use kornak_agent::postgres::{ServerProcess, StartAs, StopMode};
use kornak_cluster::ClusterConfig;
use kornak_config::agent::InitdbOption;
use serde_json::json;
use support::{Field, LIMIT, become_guard, stream, until};

#[test]
fn guard_process() {
    become_guard();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_misspelled_parameter_or_value_keeps_no_server_down() {
    let mut field = Field::new();
    let mut a = field.node("a");
    let own = &mut a.options.settings.parameters;
    own.insert("shared_bufers".to_owned(), "64MB".into());
    own.insert("work_mem".to_owned(), "5MB".into());
    a.postgres = a.again();
    let shared = json!({"postgresql": {"parameters": {
        "wal_keep_segments": 100, "no_such": 1, "work_mem": "64XB", "max_connections": 300_000,
        "maintenance_work_mem": "10XB", "my.extension": "kept", "track_commit_timestamp": "perhaps",
    }}});
    let shared = ClusterConfig::parse(&shared.to_string()).unwrap();
    a.postgres.set_dynamic(&shared);
    a.bootstrap().await;
    a.postgres.stop(StopMode::Fast, LIMIT).await.unwrap();
    a.postgres.start(&StartAs::Primary(Fencing::Unfenced)).await.unwrap();
    a.postgres.wait_ready(LIMIT).await.unwrap();
    for (name, value) in [
        ("wal_keep_size", "1600MB"),
        ("work_mem", "5MB"),
        ("maintenance_work_mem", "64MB"),
        ("max_connections", "100"),
        ("track_commit_timestamp", "off"),
        ("my.extension", "kept"),
    ] {
        let found = a.execute(&format!("SELECT current_setting('{name}')")).await;
        assert_eq!(found.as_deref(), Some(value), "{name}");
    }
    // What is in force is not called waiting for a restart.
    let pending = a.postgres.reload().await.unwrap();
    assert!(pending.is_empty(), "{pending:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_standby_is_started_anew_where_its_primary_has_greater_parameters() {
    let mut field = Field::new();
    let (a, b) = (field.node("a"), field.node("b"));
    let given = |connections: u32| {
        let text = json!({"postgresql": {"parameters": {"max_connections": connections}}});
        ClusterConfig::parse(&text.to_string()).unwrap()
    };
    a.postgres.set_dynamic(&given(60));
    b.postgres.set_dynamic(&given(60));
    a.bootstrap().await;
    stream(&a, &b).await;
    b.execute("SELECT pg_wal_replay_pause()").await;
    assert!(!b.postgres.end_for_parameters().await.unwrap(), "paused by somebody");
    b.execute("SELECT pg_wal_replay_resume()").await;
    a.postgres.stop(StopMode::Fast, LIMIT).await.unwrap();
    a.postgres.set_dynamic(&given(70));
    a.start_primary().await;
    let version = a.postgres.status().await.unwrap().version;
    until("b has ended, or was told to", async || match b.postgres.process().await.unwrap() {
        ServerProcess::None => version < 140_000,
        _ => b.postgres.end_for_parameters().await.unwrap_or(false),
    })
    .await;
    until("b has ended", async || b.processes() == 0).await;
    b.postgres.start(&StartAs::Standby(Some(a.upstream()))).await.unwrap();
    b.postgres.wait_ready(LIMIT).await.unwrap();
    assert_eq!(b.execute("SELECT current_setting('max_connections')").await.as_deref(), Some("70"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_password_is_the_same_in_a_server_of_another_encoding() {
    let mut field = Field::new();
    let (mut a, mut b) = (field.node("a"), field.node("b"));
    for node in [&mut a, &mut b] {
        node.options.settings.replication.password = Some("pä ß".into());
        node.postgres = node.again();
    }
    let latin = [("encoding", "LATIN1"), ("locale", "C")];
    let latin = latin
        .map(|(name, value)| InitdbOption { name: name.to_owned(), value: Some(value.to_owned()) });
    a.postgres.initdb(&latin, &[]).await.unwrap();
    a.postgres.start_first(&StartAs::Primary(Fencing::Unfenced)).await.unwrap();
    a.postgres.wait_ready(LIMIT).await.unwrap();
    a.postgres.create_roles().await.unwrap();
    a.postgres.finish_first().await.unwrap();
    stream(&a, &b).await;
}

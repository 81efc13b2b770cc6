//! The hands, on real servers: a cluster's life from initdb to the return of a lost primary.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a failed step fails the test")]

mod support;

use std::time::Duration;

use kornak_agent::guard::Fencing;
use kornak_agent::postgres::{
    Authority, CloneError, ControlState, DataDirState, RewindError, RewindNeed, SqlError, StartAs,
    StartError, StopMode, ToolError, Unfinished, Upstream,
};
use kornak_cluster::{ClusterConfig, Lsn, Timeline};
use kornak_config::agent::CustomBootstrap;
use rustix::process::Signal;
use support::{Field, LIMIT, Node, become_guard, kill, stream, until};

#[test]
fn guard_process() {
    become_guard();
}

/// A primary with a standby that streams from it.
async fn pair(field: &mut Field) -> (Node, Node) {
    let (a, b) = (field.node("a"), field.node("b"));
    a.bootstrap().await;
    stream(&a, &b).await;
    (a, b)
}

async fn caught_up(primary: &Node, standby: &Node) {
    let end = primary.postgres.status().await.unwrap().flush_lsn.unwrap();
    until("the standby has all", async || {
        let status = standby.postgres.status().await;
        status.is_ok_and(|status| status.replayed_lsn >= Some(end) && status.is_streaming())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_standby_is_cloned_and_streams_and_everybody_says_so() {
    let mut field = Field::new();
    let (a, b) = pair(&mut field).await;
    a.execute("CREATE TABLE public.t AS SELECT generate_series(1, 100) AS i").await;
    caught_up(&a, &b).await;
    assert_eq!(b.execute("SELECT count(*) FROM public.t").await.as_deref(), Some("100"));

    let primary = a.postgres.status().await.unwrap();
    assert!(!primary.in_recovery);
    assert_eq!(primary.timeline, Timeline(1));
    assert!(primary.insert_lsn >= primary.write_lsn && primary.write_lsn >= primary.flush_lsn);
    assert_eq!(primary.version / 10_000, 15);
    let [row] = primary.replication.as_slice() else { panic!("{:?}", primary.replication) };
    assert_eq!((row.application_name.as_str(), row.state.as_deref()), ("b", Some("streaming")));
    assert_eq!(row.sync_state.as_deref(), Some("async"));
    let standby = b.postgres.status().await.unwrap();
    assert!(standby.in_recovery);
    assert_eq!(standby.timeline, Timeline(1));
    assert_eq!(standby.system_identifier, primary.system_identifier);
    let receiver = standby.receiver.unwrap();
    assert_eq!(receiver.slot_name.as_deref(), Some("b"));
    assert_eq!(receiver.sender_port, Some(a.port));
    assert!(!standby.primary_conninfo.contains("pl'ica"), "no password outside of its file");

    a.postgres.set_synchronous_standby_names("\"b\"", LIMIT).await.unwrap();
    until("b is synchronous", async || {
        let rows = a.postgres.status().await.unwrap().replication;
        rows.first().is_some_and(|row| row.sync_state.as_deref() == Some("sync"))
    })
    .await;
    assert_eq!(a.postgres.status().await.unwrap().synchronous_standby_names, "\"b\"");
    // The next agent does not change what it was not asked to.
    a.again().reload().await.unwrap();
    assert_eq!(a.postgres.status().await.unwrap().synchronous_standby_names, "\"b\"");
}

/// A standby that has everything says so again only after ten seconds, if it is not asked.
#[tokio::test(flavor = "multi_thread")]
async fn a_commit_that_waits_for_the_lost_is_let_go_once_another_counts_that_has_it() {
    let mut field = Field::new();
    let (a, _b) = pair(&mut field).await;
    a.postgres.set_synchronous_standby_names("\"lost\"", LIMIT).await.unwrap();
    let client = a.postgres.sql().connect_patiently().await.unwrap();
    let commit = tokio::spawn(async move {
        let sql = "SET synchronous_commit = on; CREATE TABLE public.t AS SELECT 1 AS i";
        client.batch_execute(sql).await
    });
    until("it waits", async || {
        let waiting = "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'SyncRep'";
        a.execute(waiting).await.as_deref() == Some("1")
    })
    .await;
    until("the standby has said its last word", async || {
        let told = "SELECT replay_lsn = pg_current_wal_flush_lsn() FROM pg_stat_replication";
        a.execute(told).await.as_deref() == Some("t")
    })
    .await;
    a.postgres.set_synchronous_standby_names("\"b\"", LIMIT).await.unwrap();
    let done = tokio::time::timeout(Duration::from_secs(3), commit).await;
    done.expect("it is let go").unwrap().unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_switchover_needs_no_rewind() {
    let mut field = Field::new();
    let (a, b) = pair(&mut field).await;
    a.execute("CREATE TABLE public.t AS SELECT 1 AS i").await;
    caught_up(&a, &b).await;
    let standbys = a.postgres.terminate_walsenders_except(&["b"]).await.unwrap();
    assert_eq!(standbys, 0);
    a.postgres.checkpoint().await.unwrap();
    a.postgres.stop(StopMode::Fast, LIMIT).await.unwrap();
    assert_eq!(a.processes(), 0);
    let control = a.postgres.controldata().await.unwrap();
    assert_eq!(control.state, ControlState::ShutDown);
    let end = control.shutdown_end().unwrap();
    until("b has the shutdown checkpoint", async || {
        b.postgres.status().await.unwrap().position() >= end
    })
    .await;
    assert_eq!(b.postgres.status().await.unwrap().position(), end, "and nothing more exists");

    let promoted = b.postgres.promote(Fencing::Unfenced, LIMIT).await.unwrap();
    assert_eq!(promoted.timeline, Timeline(2));
    b.execute("INSERT INTO public.t VALUES (2)").await;
    assert_eq!(
        a.postgres.rewind_needed(&b.upstream(), Authority::Primary).await.unwrap(),
        RewindNeed::No
    );
    a.postgres.start(&StartAs::Standby(Some(b.upstream()))).await.unwrap();
    a.postgres.wait_ready(LIMIT).await.unwrap();
    caught_up(&b, &a).await;
    assert_eq!(a.execute("SELECT count(*) FROM public.t").await.as_deref(), Some("2"));
    assert_eq!(a.postgres.status().await.unwrap().timeline, Timeline(2));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_crashed_primary_that_went_its_own_way_is_rewound_and_streams() {
    let mut field = Field::new();
    let (a, b) = pair(&mut field).await;
    a.execute("CREATE TABLE public.t AS SELECT 1 AS i").await;
    caught_up(&a, &b).await;
    b.postgres.promote(Fencing::Unfenced, LIMIT).await.unwrap();
    b.execute("INSERT INTO public.t VALUES (2)").await;
    // What nobody else has.
    a.execute("INSERT INTO public.t SELECT generate_series(10, 1000)").await;
    let pid = a.postgres.guard().await.unwrap().status().await.unwrap().postmaster.unwrap();
    kill(pid, Signal::KILL);
    a.postgres.stop(StopMode::Kill, LIMIT).await.unwrap();
    assert_eq!(a.postgres.controldata().await.unwrap().state, ControlState::InProduction);

    assert_eq!(
        a.postgres.rewind_needed(&b.upstream(), Authority::Primary).await.unwrap(),
        RewindNeed::Diverged
    );
    b.postgres.checkpoint().await.unwrap();
    // The end of the log is now the header of a page that nobody has written, and nobody writes any more.
    b.execute("ALTER SYSTEM SET bgwriter_delay = '10s'").await;
    b.execute("SELECT pg_reload_conf(), pg_switch_wal()").await;
    a.postgres.rewind(&b.upstream(), Authority::Primary).await.unwrap();
    a.postgres.start(&StartAs::Standby(Some(b.upstream()))).await.unwrap();
    a.postgres.wait_ready(LIMIT / 3).await.unwrap();
    caught_up(&b, &a).await;
    assert_eq!(a.execute("SELECT count(*) FROM public.t").await.as_deref(), Some("2"));
    let conf =
        std::fs::read_to_string(a.options.settings.data_dir.join("postgresql.conf")).unwrap();
    assert!(conf.contains(&format!("port={}", b.port)), "it follows b: {conf}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_running_standby_changes_its_primary_without_a_restart() {
    let mut field = Field::new();
    let (a, b) = pair(&mut field).await;
    let c = field.node("c");
    c.postgres.clone_from(Some(&a.upstream()), false).await.unwrap();
    c.postgres.start(&StartAs::Standby(Some(a.upstream()))).await.unwrap();
    c.postgres.wait_ready(LIMIT).await.unwrap();
    caught_up(&a, &c).await;
    let started = c.postgres.status().await.unwrap().postmaster_start_time;
    a.postgres.stop(StopMode::Fast, LIMIT).await.unwrap();
    b.postgres.promote(Fencing::Unfenced, LIMIT).await.unwrap();
    c.postgres.follow(Some(&b.upstream())).await.unwrap();
    b.execute("CREATE TABLE public.t AS SELECT 1 AS i").await;
    caught_up(&b, &c).await;
    let status = c.postgres.status().await.unwrap();
    assert_eq!((status.postmaster_start_time, status.timeline), (started, Timeline(2)));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reload_tells_what_needs_a_restart() {
    let mut field = Field::new();
    let a = field.node("a");
    a.bootstrap().await;
    let config = |text: &str| ClusterConfig::parse(text).unwrap();
    let text = r#"{"postgresql": {"parameters": {"work_mem": "6MB", "max_connections": 120,
        "shared_buffers": "1GB", "max_files_per_process": 900}}}"#;
    a.postgres.set_dynamic(&config(text));
    let mut pending = a.postgres.reload().await.unwrap();
    pending.sort_by(|left, right| left.name.cmp(&right.name));
    let names: Vec<_> =
        pending.iter().map(|p| (p.name.as_str(), p.old.as_str(), p.new.as_str())).collect();
    assert_eq!(
        names,
        [("max_connections", "100", "120"), ("max_files_per_process", "1000", "900")],
        "the local shared_buffers wins over the store's"
    );
    assert_eq!(a.execute("SHOW work_mem").await.as_deref(), Some("6MB"));
    a.postgres.stop(StopMode::Fast, LIMIT).await.unwrap();
    a.start_primary().await;
    assert_eq!(a.postgres.pending_restart().await.unwrap(), []);
    assert_eq!(a.execute("SHOW max_connections").await.as_deref(), Some("120"));
    assert_eq!(a.execute("SHOW cluster_name").await.as_deref(), Some("demo"));
}

#[tokio::test(flavor = "multi_thread")]
async fn the_gate_of_a_handover_sees_who_works() {
    let mut field = Field::new();
    let a = field.node("a");
    a.bootstrap().await;
    assert_eq!(a.postgres.activity().await.unwrap().busy, []);
    let login = format!(
        "host=127.0.0.1 port={} user=postgres password=s3cret-super dbname=postgres \
         application_name=app",
        a.port
    );
    let (client, connection) =
        tokio_postgres::connect(&login, tokio_postgres::NoTls).await.unwrap();
    tokio::spawn(connection);
    client.batch_execute("BEGIN; SELECT 1").await.unwrap();
    let activity = a.postgres.activity().await.unwrap();
    let [backend] = activity.busy.as_slice() else { panic!("{activity:?}") };
    assert_eq!(backend.application_name, "app");
    assert_eq!(backend.state, "idle in transaction");
    assert!(backend.transaction_ms.is_some() && !backend.works_long);
    client.batch_execute("COMMIT").await.unwrap();
    assert_eq!(a.postgres.activity().await.unwrap().busy, []);
    client.batch_execute("BEGIN; SELECT 1").await.unwrap();
    assert_eq!(a.postgres.terminate_busy().await.unwrap(), 1);
    until("it has ended", async || a.postgres.activity().await.unwrap().busy.is_empty()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn slots_are_made_moved_and_dropped_on_both_kinds_of_server() {
    let mut field = Field::new();
    let (a, b) = pair(&mut field).await;
    for node in [&a, &b] {
        node.postgres.create_physical_slot("spare").await.unwrap();
        node.postgres.create_physical_slot("spare").await.unwrap();
    }
    a.execute("CREATE TABLE public.t AS SELECT generate_series(1, 1000) AS i").await;
    caught_up(&a, &b).await;
    let to = b.postgres.status().await.unwrap().replayed_lsn.unwrap();
    for node in [&a, &b] {
        node.postgres.advance_slot("spare", to).await.unwrap();
        node.postgres.advance_slot("spare", Lsn(0x100_0000)).await.unwrap();
        let slots = node.postgres.slots().await.unwrap();
        let spare = slots.iter().find(|slot| slot.name == "spare").unwrap();
        assert_eq!((spare.restart, spare.physical), (Some(to), true));
        assert!(node.postgres.drop_slot("spare").await.unwrap());
        assert!(node.postgres.drop_slot("spare").await.unwrap());
    }
    assert!(!a.postgres.drop_slot("b").await.unwrap(), "b uses its slot");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_not_made_here_is_not_touched() {
    let mut field = Field::new();
    let a = field.node("a");
    assert_eq!(a.postgres.data_dir_state().unwrap(), DataDirState::Missing);
    a.bootstrap().await;
    assert_eq!(a.postgres.data_dir_state().unwrap(), DataDirState::Cluster { version: 15 });
    assert!(a.postgres.initdb(&[], &[]).await.is_err());
    let b = field.node("b");
    let dir = &b.options.settings.data_dir;
    std::fs::create_dir(dir).unwrap();
    assert_eq!(b.postgres.data_dir_state().unwrap(), DataDirState::Empty);
    std::fs::write(dir.join("letter"), "dear").unwrap();
    let state = b.postgres.data_dir_state().unwrap();
    assert!(matches!(state, DataDirState::Foreign { .. }), "{state:?}");
    let refused = b.postgres.clone_from(Some(&a.upstream()), false).await;
    assert!(matches!(refused, Err(CloneError::NotEmpty { .. })), "{refused:?}");
    assert_eq!(std::fs::read_to_string(dir.join("letter")).unwrap(), "dear");

    // A copy that fails leaves nothing behind, and can be tried again.
    let c = field.node("c");
    let nowhere = Upstream { port: 1, ..a.upstream() };
    assert!(c.postgres.clone_from(Some(&nowhere), false).await.is_err());
    assert_eq!(c.postgres.data_dir_state().unwrap(), DataDirState::Empty);
    c.postgres.clone_from(Some(&a.upstream()), false).await.unwrap();
    // By name it is replaced.
    c.postgres.clone_from(Some(&a.upstream()), true).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn two_that_took_the_same_timeline_are_told_apart() {
    let mut field = Field::new();
    let (a, b, c) = (field.node("a"), field.node("b"), field.node("c"));
    a.bootstrap().await;
    for node in [&b, &c] {
        node.postgres.clone_from(Some(&a.upstream()), false).await.unwrap();
        node.postgres.start(&StartAs::Standby(Some(a.upstream()))).await.unwrap();
        node.postgres.wait_ready(LIMIT).await.unwrap();
    }
    // Both have all of it and are promoted at the same position, not knowing of each other.
    a.postgres.stop(StopMode::Fast, LIMIT).await.unwrap();
    let end = a.postgres.controldata().await.unwrap().shutdown_end().unwrap();
    for node in [&b, &c] {
        until("it has everything", async || {
            node.postgres.status().await.is_ok_and(|status| status.position() >= end)
        })
        .await;
    }
    for node in [&b, &c] {
        let promoted = node.postgres.promote(Fencing::Unfenced, LIMIT).await.unwrap();
        assert_eq!(promoted.timeline, Timeline(2));
        node.execute("CHECKPOINT").await;
    }
    c.execute("CREATE TABLE public.c (i int)").await;
    let position = c.postgres.leader_position(&c.upstream()).await.unwrap();
    let two = position.timeline;
    assert!(b.postgres.took_another_way(&c.upstream(), &position, two).await.unwrap());
    assert!(!c.postgres.took_another_way(&c.upstream(), &position, two).await.unwrap());
    b.postgres.stop(StopMode::Fast, LIMIT).await.unwrap();
    assert_eq!(
        b.postgres.rewind_needed(&c.upstream(), Authority::Primary).await.unwrap(),
        RewindNeed::Diverged
    );
    // pg_rewind would see equal numbers and do nothing; a new copy it has to be.
    let refused = b.postgres.rewind(&c.upstream(), Authority::Primary).await;
    assert!(matches!(refused, Err(RewindError::SameNumber(_))), "{refused:?}");
    b.postgres.clone_from(Some(&c.upstream()), true).await.unwrap();
    b.postgres.start(&StartAs::Standby(Some(c.upstream()))).await.unwrap();
    b.postgres.wait_ready(LIMIT).await.unwrap();
    until("it streams", async || {
        b.postgres.status().await.is_ok_and(|status| status.is_streaming())
    })
    .await;
    assert_eq!(
        b.postgres.rewind_needed(&c.upstream(), Authority::Primary).await.unwrap(),
        RewindNeed::No
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_does_not_answer_says_why() {
    let mut field = Field::new();
    let a = field.node("a");
    assert!(matches!(a.postgres.status().await, Err(SqlError::Refused)));
    a.bootstrap().await;
    let pid = a.postgres.guard().await.unwrap().status().await.unwrap().postmaster.unwrap();
    a.postgres.stop(StopMode::Immediate, LIMIT).await.unwrap();
    assert!(!std::path::Path::new(&format!("/proc/{pid}")).exists());
    assert!(matches!(a.postgres.status().await, Err(SqlError::Refused)));
    let conf = a.options.settings.data_dir.join("postgresql.base.conf");
    std::fs::write(&conf, "max_files_per_process = nonsense\n").unwrap();
    a.postgres.start(&StartAs::Primary(Fencing::Unfenced)).await.unwrap();
    let error = a.postgres.wait_ready(Duration::from_secs(20)).await.unwrap_err();
    assert!(error.to_string().contains("ended with code:1"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_tool_left_half_done_is_no_server() {
    let mut field = Field::new();
    let (a, b) = (field.node("a"), field.node("b"));
    a.bootstrap().await;
    let note = |text: &str| std::fs::write(field.path().join("b.unfinished"), text).unwrap();
    let dir = &b.options.settings.data_dir;
    std::fs::create_dir(dir).unwrap();
    std::fs::write(dir.join("half"), "").unwrap();
    note("copy\n");
    let state = b.postgres.data_dir_state().unwrap();
    assert!(matches!(state, DataDirState::Foreign { .. }), "an old note is no proof: {state:?}");
    std::fs::remove_file(dir.join("half")).unwrap();
    assert_eq!(b.postgres.data_dir_state().unwrap(), DataDirState::Empty);

    // Another agent's tool still works.
    std::fs::create_dir_all(&b.guard.runtime_dir).unwrap();
    let mut lock = std::fs::File::options();
    let lock = lock.append(true).create(true).open(b.guard.runtime_dir.join("tool.lock")).unwrap();
    rustix::fs::flock(&lock, rustix::fs::FlockOperation::LockExclusive).unwrap();
    let busy = b.postgres.clone_from(Some(&a.upstream()), false).await;
    assert!(matches!(busy, Err(CloneError::Tool(ToolError::Busy { .. }))), "{busy:?}");
    drop(lock);
    b.postgres.clone_from(Some(&a.upstream()), false).await.unwrap();
    assert_eq!(b.postgres.unfinished(), None);

    note("rewind\n");
    let start = b.postgres.start(&StartAs::Standby(Some(a.upstream()))).await;
    assert!(matches!(start, Err(StartError::Unfinished(Unfinished::Rewind))), "{start:?}");
    assert_eq!(
        b.postgres.rewind_needed(&a.upstream(), Authority::Primary).await.unwrap(),
        RewindNeed::Diverged
    );
    assert!(
        b.postgres.rewind(&a.upstream(), Authority::Primary).await.is_err(),
        "what differed is no longer known"
    );
    b.postgres.clone_from(Some(&a.upstream()), true).await.unwrap();
    b.postgres.start(&StartAs::Standby(Some(a.upstream()))).await.unwrap();
    b.postgres.wait_ready(LIMIT).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_configuration_elsewhere_and_a_base_of_ones_own_are_used() {
    let mut field = Field::new();
    let mut a = field.node("a");
    let (etc, base) = (field.path().join("etc"), field.path().join("base.conf"));
    std::fs::create_dir(&etc).unwrap();
    std::fs::write(&base, "work_mem = 7MB\nmaintenance_work_mem = 70MB\n").unwrap();
    if let Some(user) = &a.user {
        std::os::unix::fs::chown(&etc, Some(user.uid), Some(user.gid)).unwrap();
    }
    let settings = &mut a.options.settings;
    settings.config_dir.clone_from(&etc);
    settings.custom_conf = Some(base);
    settings.parameters.insert("maintenance_work_mem".to_owned(), "80MB".into());
    settings.pg_ident = Some(vec!["people ann app".to_owned()]);
    a.postgres = a.again();
    a.bootstrap().await;
    let shown = async |name: &str| a.execute(&format!("SHOW {name}")).await.unwrap();
    assert_eq!(shown("work_mem").await, "7MB", "of the base");
    assert_eq!(shown("maintenance_work_mem").await, "80MB", "the agent's comes later");
    for (name, file) in [
        ("config_file", "postgresql.conf"),
        ("hba_file", "pg_hba.conf"),
        ("ident_file", "pg_ident.conf"),
    ] {
        assert_eq!(shown(name).await, etc.join(file).display().to_string());
    }
    let mapped = "SELECT count(*) FROM pg_ident_file_mappings WHERE map_name = 'people'";
    assert_eq!(a.execute(mapped).await.as_deref(), Some("1"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tool_may_work_while_the_logging_collector_still_writes() {
    let mut field = Field::new();
    let a = field.node("a");
    a.bootstrap().await;
    a.postgres.stop(StopMode::Fast, LIMIT).await.unwrap();
    let text = r#"{"postgresql": {"parameters": {"logging_collector": "on"}}}"#;
    a.postgres.set_dynamic(&ClusterConfig::parse(text).unwrap());
    a.start_primary().await;
    let before = a.processes();
    a.postgres.stop(StopMode::Immediate, LIMIT).await.unwrap();
    assert!(before > 1 && a.processes() <= 1);
    assert_eq!(a.postgres.local_end().await.unwrap(), None, "only its recovery will tell");
    a.postgres.recover_from_crash().await.unwrap();
    let end = a.postgres.local_end().await.unwrap().unwrap();
    assert_eq!(end.timeline, Timeline(1));
    until("the collector has ended", async || a.processes() == 0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cluster_is_made_by_a_command_and_recovers_to_the_end_of_its_archive() {
    let mut field = Field::new();
    let (a, b) = (field.node("a"), field.node("b"));
    a.bootstrap().await;
    a.execute("CREATE TABLE public.t AS SELECT 1 AS i").await;
    a.postgres.stop(StopMode::Fast, LIMIT).await.unwrap();
    let source = a.options.settings.data_dir.display().to_string();
    let target = b.options.settings.data_dir.display().to_string();
    let method = CustomBootstrap {
        params: serde_json::Map::new(),
        name: "copy".to_owned(),
        command: format!("sh -c 'cp -r {source}/. {target}'"),
        no_params: true,
        keep_existing_recovery_conf: false,
        recovery_conf: serde_json::Map::new(),
    };
    b.postgres.custom_bootstrap(&method).await.unwrap();
    let archive = ("restore_command".to_owned(), format!("cp {source}/pg_wal/%f %p"));
    let start = StartAs::PointInTime(Fencing::Unfenced, Some([archive].into()));
    let early = b.postgres.start(&StartAs::Standby(None)).await;
    assert!(matches!(early, Err(StartError::Unfinished(Unfinished::Bootstrap))), "{early:?}");
    b.postgres.start_first(&start).await.unwrap();
    b.postgres.wait_ready(LIMIT).await.unwrap();
    until("recovery is over", async || {
        b.postgres.status().await.is_ok_and(|status| !status.in_recovery)
    })
    .await;
    assert_eq!(b.postgres.status().await.unwrap().timeline, Timeline(2));
    assert_eq!(b.execute("SELECT count(*) FROM public.t").await.as_deref(), Some("1"));
    assert_eq!(
        b.postgres.connection_url(),
        format!("postgres://postgres@127.0.0.1:{}/postgres", b.port)
    );
    b.postgres.run_script("sh -c 'test -r $PGPASSFILE -a $0 = x'", &["x"], LIMIT).await.unwrap();
    assert!(b.postgres.run_script("false", &[], LIMIT).await.is_err());
    assert!(b.postgres.run_script("'", &[], LIMIT).await.is_err());
}

/// WAL that a standby had flushed before a start is in its files, however late it replays.
#[tokio::test(flavor = "multi_thread")]
async fn the_end_of_a_servers_log_is_read_from_its_files() {
    let mut field = Field::new();
    let a = field.node("a");
    a.bootstrap().await;
    let from = a.postgres.status().await.unwrap().insert_lsn.unwrap();
    a.execute("CREATE TABLE public.t AS SELECT generate_series(1, 1000) AS i").await;
    // Records that go over pages, and a segment that is not used to its end.
    for length in [7_000, 100_000, 1] {
        let message = format!("SELECT pg_logical_emit_message(true, 'x', repeat('y', {length}))");
        a.execute(&message).await;
        a.execute("SELECT pg_switch_wal()").await;
    }
    a.execute("INSERT INTO public.t VALUES (0)").await;
    let flushed = a.postgres.status().await.unwrap().flush_lsn.unwrap();
    a.postgres.stop(StopMode::Kill, LIMIT).await.unwrap();
    let end = a.postgres.wal_end(from).await.unwrap().unwrap();
    assert!(end >= flushed, "{end} of {flushed}");
    assert_eq!(a.postgres.wal_end(end).await.unwrap(), Some(end));

    // PostgreSQL itself finds the same, and says when it is there.
    a.postgres.start(&StartAs::Standby(None)).await.unwrap();
    a.postgres.wait_ready(LIMIT).await.unwrap();
    until("its own log is read", async || {
        let startup = a.postgres.status().await.unwrap().startup;
        startup.is_some_and(|startup| startup.is_at_the_end())
    })
    .await;
    assert_eq!(a.postgres.status().await.unwrap().replayed_lsn, Some(end));
}

/// The control file says so minutes later, and the receiver has ended with its primary.
#[tokio::test(flavor = "multi_thread")]
async fn a_standby_knows_the_timeline_that_it_has_followed_to() {
    let mut field = Field::new();
    let (a, b) = pair(&mut field).await;
    let c = field.node("c");
    c.postgres.clone_from(Some(&a.upstream()), false).await.unwrap();
    c.postgres.start(&StartAs::Standby(Some(a.upstream()))).await.unwrap();
    c.postgres.wait_ready(LIMIT).await.unwrap();
    a.postgres.stop(StopMode::Fast, LIMIT).await.unwrap();
    b.postgres.promote(Fencing::Unfenced, LIMIT).await.unwrap();
    c.postgres.follow(Some(&b.upstream())).await.unwrap();
    b.execute("CREATE TABLE public.t (i int)").await;
    caught_up(&b, &c).await;
    b.postgres.stop(StopMode::Kill, LIMIT).await.unwrap();
    let mut told = None;
    until("the receiver ends", async || {
        told = c.postgres.status().await.ok();
        told.as_ref().is_some_and(|status| status.receiver.is_none())
    })
    .await;
    let status = told.unwrap();
    assert_eq!((status.timeline, status.checkpoint_timeline), (Timeline(2), Timeline(1)));
    assert!(status.has_streamed);
}

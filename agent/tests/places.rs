//! Copies and removals on real servers, broken off at moments of their own choosing, with the log and a tablespace
//! elsewhere.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a failed step fails the test")]

mod support;

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use kornak_agent::guard::Fencing;
use kornak_agent::postgres::{DataDirState, Parameters, StartAs, StartError, StopMode, Unfinished};
use kornak_config::agent::{CustomBootstrap, InitdbOption, ReplicaMethod};
use support::{Field, LIMIT, Node, become_guard, until};

#[test]
fn guard_process() {
    become_guard();
}

fn option(name: &str, value: String) -> InitdbOption {
    InitdbOption { name: name.to_owned(), value: Some(value) }
}

/// A node whose log and tablespace are where others have something as well.
struct Elsewhere {
    wal: PathBuf,
    tablespace: PathBuf,
}

impl Elsewhere {
    fn new(field: &Field, node: &Node) -> Self {
        let (wal, tablespace) = (field.path().join("wal_b"), field.path().join("ts_b"));
        for dir in [&wal, &tablespace] {
            node.dir(dir);
            // Of a file system, and of another version.
            for name in ["lost+found", "PG_14_202107181"] {
                fs::create_dir(dir.join(name)).unwrap();
                fs::write(dir.join(name).join("x"), "not ours").unwrap();
            }
        }
        Self { wal, tablespace }
    }

    fn options(&self, source: &Path) -> Vec<InitdbOption> {
        let mapping = format!("{}={}", source.display(), self.tablespace.display());
        let wal = self.wal.display().to_string();
        vec![option("tablespace-mapping", mapping), option("waldir", wal)]
    }

    #[track_caller]
    fn strangers_are_there(&self) {
        for dir in [&self.wal, &self.tablespace] {
            for name in ["lost+found", "PG_14_202107181"] {
                assert_eq!(fs::read_to_string(dir.join(name).join("x")).unwrap(), "not ours");
            }
        }
    }
}

/// An agent after the death of the one before.
async fn again(node: &mut Node, options: Vec<InitdbOption>) {
    node.options.settings.create_replica_methods = vec![ReplicaMethod::Basebackup { options }];
    node.postgres = node.again();
    node.postgres.settle().await;
}

async fn streams(a: &Node, b: &Node) {
    b.postgres.start(&StartAs::Standby(Some(a.upstream()))).await.unwrap();
    b.postgres.wait_ready(LIMIT).await.unwrap();
    until("it streams", async || {
        b.postgres.status().await.is_ok_and(|status| status.is_streaming())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_copy_that_is_broken_off_anywhere_leaves_nothing_in_the_way_of_the_next() {
    let mut field = Field::new();
    let (a, mut b) = (field.node("a"), field.node("b"));
    a.bootstrap().await;
    let source = field.path().join("ts_a");
    a.dir(&source);
    a.execute(&format!("CREATE TABLESPACE ts LOCATION '{}'", source.display())).await;
    a.execute("CREATE TABLE public.t TABLESPACE ts AS SELECT generate_series(1, 30000) AS i").await;
    let place = Elsewhere::new(&field, &b);
    let data = b.options.settings.data_dir.clone();
    let options = place.options(&source);
    for pause in [0, 20, 150, 500, 1100] {
        let slow = [options.clone(), vec![option("max-rate", "8M".to_owned())]].concat();
        again(&mut b, slow).await;
        let source = a.upstream();
        let copy = b.postgres.clone_from(Some(&source), false);
        let broken_off = tokio::time::timeout(Duration::from_millis(pause), copy).await;
        assert!(broken_off.is_err(), "{broken_off:?}");
        again(&mut b, options.clone()).await;
        let state = b.postgres.data_dir_state().unwrap();
        assert!(matches!(state, DataDirState::Empty | DataDirState::Missing), "{state:?}");
        let started = b.postgres.start(&StartAs::Standby(None)).await;
        assert!(started.is_err(), "{pause}: {started:?}");
    }
    b.postgres.clone_from(Some(&a.upstream()), false).await.unwrap();
    streams(&a, &b).await;
    assert_eq!(fs::read_link(data.join("pg_wal")).unwrap(), place.wal);

    // The removal before a copy, and the copy; no setting says any more where the log is.
    let mapped: Vec<_> = options.into_iter().filter(|it| it.name != "waldir").collect();
    b.postgres.stop(StopMode::Fast, LIMIT).await.unwrap();
    for pause in [0, 1, 3, 10, 30, 200] {
        again(&mut b, mapped.clone()).await;
        let source = a.upstream();
        let replaced = b.postgres.clone_from(Some(&source), true);
        let _ = tokio::time::timeout(Duration::from_millis(pause), replaced).await;
    }
    again(&mut b, mapped).await;
    b.postgres.clone_from(Some(&a.upstream()), true).await.unwrap();
    streams(&a, &b).await;
    assert_eq!(b.execute("SELECT count(*) FROM public.t").await.as_deref(), Some("30000"));
    assert_eq!(fs::read_link(data.join("pg_wal")).unwrap(), place.wal, "the link is kept");
    place.strangers_are_there();
    let left: Vec<_> = fs::read_dir(&data).unwrap().flatten().map(|it| it.file_name()).collect();
    assert!(!left.iter().any(|name| name.to_string_lossy().starts_with("kornak.")), "{left:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backup_that_is_put_where_a_copy_was_broken_off_is_not_touched() {
    let mut field = Field::new();
    let (a, mut b) = (field.node("a"), field.node("b"));
    a.bootstrap().await;
    let data = b.options.settings.data_dir.clone();
    let slow = vec![option("max-rate", "1M".to_owned())];
    again(&mut b, slow).await;
    let source = a.upstream();
    let copy = b.postgres.clone_from(Some(&source), false);
    assert!(tokio::time::timeout(Duration::from_millis(700), copy).await.is_err());
    a.postgres.stop(StopMode::Fast, LIMIT).await.unwrap();
    let from = format!("{}/.", a.options.settings.data_dir.display());
    let copied = std::process::Command::new("cp").arg("-a").arg(from).arg(&data).status().unwrap();
    assert!(copied.success());
    fs::write(data.join("RESTORED_BY_HAND"), "x").unwrap();
    again(&mut b, Vec::new()).await;
    assert_eq!(b.postgres.data_dir_state().unwrap(), DataDirState::Cluster { version: 15 });
    assert!(b.postgres.initdb(&[], &[]).await.is_err());
    assert!(b.postgres.clone_from(Some(&a.upstream()), false).await.is_err());
    assert!(data.join("RESTORED_BY_HAND").exists() && !data.join("kornak.new").exists());
    assert_eq!(b.postgres.unfinished(), None);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_recovery_to_a_point_in_time_goes_on_after_the_death_of_its_agent() {
    let mut field = Field::new();
    let (a, mut b) = (field.node("a"), field.node("b"));
    a.bootstrap().await;
    a.execute("CREATE TABLE public.t AS SELECT 1 AS i").await;
    a.postgres.stop(StopMode::Fast, LIMIT).await.unwrap();
    let source = a.options.settings.data_dir.display().to_string();
    let target = b.options.settings.data_dir.clone();
    // It makes the directory itself, and fails if there is one.
    let make = |end: &str| CustomBootstrap {
        params: serde_json::Map::new(),
        name: "copy".to_owned(),
        command: format!(
            "sh -c 'mkdir -m 755 {0} && cp -r {source}/. {0} && rm -f {0}/postmaster.pid{end}'",
            target.display()
        ),
        no_params: true,
        keep_existing_recovery_conf: false,
        recovery_conf: serde_json::Map::new(),
    };
    let slow = make(" && sleep 30");
    let made = b.postgres.custom_bootstrap(&slow);
    assert!(tokio::time::timeout(Duration::from_secs(2), made).await.is_err());
    again(&mut b, Vec::new()).await;
    assert_eq!(b.postgres.data_dir_state().unwrap(), DataDirState::Empty, "its command was ended");
    b.postgres.remove_first().await.unwrap();
    assert!(!target.exists(), "the next command makes it again");
    b.postgres.custom_bootstrap(&make("")).await.unwrap();
    assert!(b.postgres.goes_on() && !b.postgres.was_started());

    let go = field.path().join("go");
    let fetch =
        format!("while ! [ -e {} ]; do sleep 0.1; done; cp {source}/pg_wal/%f %p", go.display());
    let archive: Parameters = [("restore_command".to_owned(), fetch)].into();
    let start = StartAs::PointInTime(Fencing::Unfenced, Some(archive));
    b.postgres.start_first(&start).await.unwrap();
    b.postgres.stop(StopMode::Kill, LIMIT).await.unwrap();
    again(&mut b, Vec::new()).await;
    assert_eq!(b.postgres.data_dir_state().unwrap(), DataDirState::Begun);
    assert!(b.postgres.goes_on() && b.postgres.was_started() && b.postgres.is_recovering());
    let standby = b.postgres.start(&StartAs::Standby(None)).await;
    assert!(matches!(standby, Err(StartError::Unfinished(Unfinished::Bootstrap))), "{standby:?}");
    assert!(b.postgres.is_recovering(), "a start that is refused changes nothing");
    fs::write(go, "").unwrap();
    b.postgres.start_first(&start).await.unwrap();
    let writable = b.postgres.wait_writable().await;
    let log = fs::read_to_string(b.postgres.log_file()).unwrap();
    assert!(writable.is_ok(), "{writable:?}: {log}");
    assert!(!b.postgres.is_recovering());
    b.postgres.begin_filling().await.unwrap();
    assert!(!b.postgres.goes_on(), "what fills it may not be done twice");
    b.postgres.finish_first().await.unwrap();
    assert_eq!(b.execute("SELECT count(*) FROM public.t").await.as_deref(), Some("1"));
    assert_eq!(b.postgres.data_dir_state().unwrap(), DataDirState::Cluster { version: 15 });
}

//! The guard and real servers: whatever happens, no server outlives its deadline.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a failed step fails the test")]

mod support;

use std::time::Duration;

use kornak_agent::guard::{Exit, Fencing, GuardError, ServerSignal, Watched, boottime_now};
use kornak_agent::postgres::{PromoteError, ServerProcess, StartAs, StartError, StopMode};
use rustix::process::Signal;
use support::{Field, LIMIT, Node, become_guard, kill, until};
use tokio::time::timeout;

#[test]
fn guard_process() {
    become_guard();
}

async fn gone(node: &Node) -> Exit {
    let guard = node.postgres.guard().await.unwrap();
    let mut watch = guard.watch();
    let gone = watch.wait_for(|watched| matches!(watched, Watched::Gone { .. }));
    let Watched::Gone { exit, .. } = *timeout(LIMIT, gone).await.expect("in time").unwrap() else {
        unreachable!("that was waited for");
    };
    exit
}

#[tokio::test(flavor = "multi_thread")]
async fn a_primary_whose_lease_is_not_proven_is_stopped_with_all_its_processes() {
    let mut field = Field::new();
    let node = field.node_with("a", |guard| guard.stop_budget = Duration::from_secs(6));
    node.bootstrap().await;
    node.busy_backend().await;
    let guard = node.postgres.guard().await.unwrap();
    let deadline = boottime_now() + Duration::from_secs(7);
    guard.arm(deadline).await.unwrap();
    // In order, so that what has been acknowledged reaches the standbys.
    assert_eq!(gone(&node).await, Exit::Code(0));
    assert!(boottime_now() < deadline, "stopped before the deadline");
    assert_eq!(node.processes(), 0);
    assert!(*guard.fired().borrow());

    // Late is late: it is neither extended nor started until somebody has seen the end.
    assert!(guard.arm(boottime_now() + LIMIT).await.is_err());
    let start = StartAs::Primary(Fencing::Armed);
    assert!(matches!(node.postgres.start(&start).await, Err(StartError::Guard(_))));
    guard.disarm().await.unwrap();
    assert!(node.postgres.start(&start).await.is_err(), "not armed");
    guard.arm(boottime_now() + LIMIT).await.unwrap();
    node.postgres.start(&start).await.unwrap();
    node.postgres.wait_ready(LIMIT).await.unwrap();
    assert_eq!(node.execute("SELECT pg_is_in_recovery()").await.as_deref(), Some("f"));
    node.postgres.stop(StopMode::Fast, LIMIT).await.unwrap();
    assert_eq!(node.postgres.process().await.unwrap(), ServerProcess::None);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_proven_lease_keeps_the_primary() {
    let mut field = Field::new();
    let node = field.node("a");
    node.bootstrap().await;
    let guard = node.postgres.guard().await.unwrap();
    let begun = boottime_now();
    while boottime_now().since(begun) < Duration::from_secs(2) {
        guard.arm(boottime_now() + Duration::from_millis(900)).await.unwrap();
        until("time passes", async || {
            guard.status().await.unwrap().armed().unwrap() - boottime_now()
                < Duration::from_millis(700)
        })
        .await;
    }
    guard.disarm().await.unwrap();
    assert_eq!(node.execute("SELECT 1").await.as_deref(), Some("1"));
}

#[tokio::test(flavor = "multi_thread")]
async fn backends_of_a_killed_postmaster_do_not_live_on() {
    let mut field = Field::new();
    let node = field.node("a");
    node.bootstrap().await;
    node.busy_backend().await;
    let ServerProcess::Running { pid } = node.postgres.process().await.unwrap() else {
        panic!("it runs");
    };
    kill(pid, Signal::KILL);
    assert_eq!(gone(&node).await, Exit::Signal(9));
    assert_eq!(node.processes(), 0);
    // And the next one starts at once.
    node.start_primary().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stopped_postmaster_and_its_backends_are_killed() {
    let mut field = Field::new();
    let node = field.node("a");
    node.bootstrap().await;
    node.busy_backend().await;
    let guard = node.postgres.guard().await.unwrap();
    let pid = guard.status().await.unwrap().postmaster.expect("it runs");
    kill(pid, Signal::STOP);
    let stop = node.postgres.stop(StopMode::Fast, Duration::from_millis(200)).await;
    assert!(stop.is_err(), "a stopped postmaster does not answer");
    let deadline = boottime_now() + Duration::from_millis(1000);
    guard.arm(deadline).await.unwrap();
    assert_eq!(gone(&node).await, Exit::Signal(9));
    assert!(boottime_now() < deadline, "killed before the deadline");
    assert_eq!(node.processes(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dead_guard_takes_its_server_along() {
    let mut field = Field::new();
    let node = field.node("a");
    node.bootstrap().await;
    node.busy_backend().await;
    let guard = node.postgres.guard().await.unwrap();
    kill(guard.pid(), Signal::KILL);
    until("no process is left", async || node.processes() == 0).await;
    until("the client has noticed", async || guard.is_lost()).await;
    assert!(matches!(guard.status().await, Err(GuardError::Lost)));
    // The next guard is another one, and the server can be started again.
    node.start_primary().await;
    assert_ne!(node.postgres.guard().await.unwrap().pid(), guard.pid());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guard_is_not_ended_by_a_polite_request() {
    let mut field = Field::new();
    let node = field.node("a");
    node.bootstrap().await;
    let guard = node.postgres.guard().await.unwrap();
    for signal in [Signal::TERM, Signal::INT, Signal::HUP, Signal::QUIT] {
        kill(guard.pid(), signal);
    }
    assert!(guard.status().await.unwrap().postmaster.is_some());
    // Its children listen to them.
    let open = node.postgres.stop(StopMode::Smart, Duration::from_millis(300)).await;
    open.expect_err("our own connection keeps it open");
    node.postgres.stop(StopMode::Smart, LIMIT).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn the_next_agent_goes_on_with_the_same_guard() {
    let mut field = Field::new();
    let node = field.node("a");
    node.bootstrap().await;
    let first = node.postgres.guard().await.unwrap();
    first.arm(boottime_now() + LIMIT).await.unwrap();
    let again = node.again();
    let second = again.guard().await.unwrap();
    assert_eq!(second.pid(), first.pid());
    assert!(second.status().await.unwrap().armed().is_some(), "the deadline is still in force");
    assert!(second.watch().borrow().running().is_some());
    until("the older client is out", async || first.is_lost()).await;
    again.stop(StopMode::Fast, LIMIT).await.unwrap();
    assert_eq!(node.processes(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_an_agent_leaves_is_there_as_long_as_its_server_and_its_deadline() {
    let mut field = Field::new();
    let node = field.node("a");
    node.bootstrap().await;
    let first = node.postgres.guard().await.unwrap();
    first.keep("left".to_owned()).await.unwrap();
    assert_eq!(first.kept().await.unwrap(), None, "no deadline is armed");
    let deadline = boottime_now() + LIMIT;
    first.arm(deadline).await.unwrap();
    let again = node.again();
    let second = again.guard().await.unwrap();
    let kept = second.kept().await.unwrap().expect("the next agent finds it");
    assert_eq!(kept.text, "left");
    assert_eq!(u128::from(kept.deadline_ns), deadline.since_start().as_nanos());

    again.stop(StopMode::Fast, LIMIT).await.unwrap();
    assert_eq!(second.kept().await.unwrap(), None, "it was about that server");
    again.start(&StartAs::Primary(Fencing::Armed)).await.unwrap();
    assert_eq!(second.kept().await.unwrap(), None, "another one leads by another word");
    second.keep("left again".to_owned()).await.unwrap();
    assert!(second.kept().await.unwrap().is_some());
    second.disarm().await.unwrap();
    second.arm(deadline).await.unwrap();
    assert_eq!(second.kept().await.unwrap(), None, "the leadership was over in between");
    again.stop(StopMode::Fast, LIMIT).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_ran_without_a_guard_is_adopted() {
    let mut field = Field::new();
    let node = field.node("a");
    node.bootstrap().await;
    node.postgres.stop(StopMode::Fast, LIMIT).await.unwrap();
    let settings = &node.options.settings;
    let mut command = tokio::process::Command::new(settings.program("postgres"));
    command.arg("-D").arg(&settings.data_dir).arg(format!("--port={}", node.port)).current_dir("/");
    if let Some(user) = &node.user {
        command.uid(user.uid).gid(user.gid);
    }
    let mut foreign = command.stderr(std::process::Stdio::null()).spawn().unwrap();
    let again = node.again();
    until("it is adopted", async || {
        // Adoption is tried once for each connection.
        node.again().guard().await.is_ok_and(|guard| guard.watch().borrow().running().is_some())
    })
    .await;
    let guard = again.guard().await.unwrap();
    let status = guard.status().await.unwrap();
    assert_eq!(status.postmaster, foreign.id());
    assert!(status.adopted);
    assert!(status.armed().is_some(), "nobody has proven a lease for it: it may not run for ever");
    guard.arm(boottime_now() + Duration::from_millis(600)).await.unwrap();
    let _ = timeout(LIMIT, foreign.wait()).await.expect("it is killed as any other");
    until("nothing is left", async || node.processes() == 0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_standby_is_not_promoted_after_the_deadline() {
    let mut field = Field::new();
    let node = field.node("a");
    node.bootstrap().await;
    node.postgres.stop(StopMode::Fast, LIMIT).await.unwrap();
    node.postgres.start(&StartAs::Standby(None)).await.unwrap();
    node.postgres.wait_ready(LIMIT).await.unwrap();
    let guard = node.postgres.guard().await.unwrap();
    let refused = node.postgres.promote(Fencing::Armed, LIMIT).await;
    assert!(matches!(refused, Err(PromoteError::Guard(GuardError::Refused { .. }))), "not armed");
    guard.arm(boottime_now() + Duration::from_millis(800)).await.unwrap();
    // The agent is frozen here. Its server is stopped although it is only a standby: a promotion may
    // be on its way.
    gone(&node).await;
    assert!(guard.promote(Fencing::Armed).await.is_err());
    assert!(node.postgres.start(&StartAs::Standby(None)).await.is_err(), "still armed");
    guard.disarm().await.unwrap();
    node.postgres.start(&StartAs::Standby(None)).await.unwrap();
    node.postgres.wait_ready(LIMIT).await.unwrap();
    guard.arm(boottime_now() + LIMIT).await.unwrap();
    let promoted = node.postgres.promote(Fencing::Armed, LIMIT).await.unwrap();
    assert_eq!(promoted.timeline.0, 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guard_needs_no_disk_to_act() {
    let mut field = Field::new();
    let node = field.node("a");
    let guard = node.postgres.guard().await.unwrap();
    let status = std::fs::read_to_string(format!("/proc/{}/status", guard.pid())).unwrap();
    let resident = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    let resident: u64 = resident.trim().strip_suffix(" kB").unwrap().parse().unwrap();
    let locked = guard.locked_kib().unwrap();
    assert!(locked >= resident / 2, "{locked} KiB of {resident} are locked");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guard_that_nobody_needs_ends_itself() {
    let mut field = Field::new();
    let node = field.node_with("a", |guard| guard.linger = Duration::from_millis(300));
    let guard = node.postgres.guard().await.unwrap();
    let pid = guard.pid();
    assert!(matches!(guard.signal(ServerSignal::Fast).await, Err(GuardError::Refused { .. })));
    drop(guard);
    drop(node.postgres);
    until("it has ended", async || {
        // A zombie has no working directory.
        std::fs::read_link(format!("/proc/{pid}/cwd")).is_err()
    })
    .await;
}

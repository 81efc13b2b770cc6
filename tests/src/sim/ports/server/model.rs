//! The modelled server's answers and actions.

use std::rc::Rc;
use std::time::Duration;

use kornak_agent::guard::GuardError;
use kornak_agent::postgres::{
    Authority, ControlData, ControlState, HistoryLine, LeaderPosition, Receiver, ReplicationRow,
    RewindError, RewindNeed, ServerStatus, SqlError, Startup, StopError, StopMode,
};
use kornak_cluster::{Lsn, Timeline};

use crate::sim::disk::lsn;
use crate::sim::host::{end, index_of};
use crate::sim::net;
use crate::sim::postgres::{self, Names, Run};
use crate::sim::scenario::Mutation;
use crate::sim::world::{SYSID, World};

/// Between two looks of whoever waits for the server.
const POLL: Duration = Duration::from_millis(10);

/// For another server to answer.
const ASK_LIMIT: Duration = Duration::from_secs(2);

/// A server that was stopped in order and lingers is killed after this.
const LINGER_LIMIT: Duration = Duration::from_secs(5);

pub(super) fn run_of(w: &World, index: usize) -> Run {
    w.hosts[index].server.borrow().run
}

/// Waits until the server is in one of these states. False if it takes longer than `limit`.
pub(super) async fn reaches(w: &Rc<World>, index: usize, states: &[Run], limit: Duration) -> bool {
    let began = w.exec.now();
    while !states.contains(&run_of(w, index)) {
        if w.exec.now().since(began) >= limit {
            return false;
        }
        w.exec.sleep(POLL).await;
    }
    true
}

pub(super) async fn stop(
    w: &Rc<World>,
    index: usize,
    mode: StopMode,
    limit: Duration,
) -> Result<(), StopError> {
    let promoting = run_of(w, index) == Run::Promoting;
    match mode {
        _ if promoting && w.plan.mutation == Some(Mutation::PromotionGoesOn) => return Ok(()),
        StopMode::Fast | StopMode::Smart => postgres::stop_fast(w, index),
        StopMode::Immediate | StopMode::Kill => {
            w.exec.sleep(w.rng.millis(2, 30)).await;
            postgres::kill_all(w, index);
        }
    }
    if reaches(w, index, &[Run::Down], limit).await {
        return Ok(());
    }
    Err(StopError::StillRunning(limit))
}

pub(super) async fn end_what_lingers(w: &Rc<World>, index: usize) -> Result<(), StopError> {
    if !reaches(w, index, &[Run::Down], LINGER_LIMIT).await {
        postgres::kill_all(w, index);
    }
    Ok(())
}

pub(super) fn sql(run: Run) -> Result<(), SqlError> {
    match run {
        Run::Down | Run::Leftovers => Err(SqlError::Refused),
        Run::Starting => Err(SqlError::StartingUp),
        Run::Stopping => Err(SqlError::ShuttingDown),
        Run::Standby | Run::Promoting | Run::Primary => Ok(()),
    }
}

pub(super) fn status(w: &Rc<World>, index: usize) -> Result<ServerStatus, SqlError> {
    sql(run_of(w, index))?;
    postgres::drop_silent_senders(w, index);
    let host = &w.hosts[index];
    let (server, disk) = (host.server.borrow(), host.disk.borrow());
    let in_recovery = server.run != Run::Primary;
    let reading = server.reading.filter(|(_, until)| host.now(w) < *until);
    let counts = w.plan.mutation == Some(Mutation::RestartedCounts);
    let shown = reading.map_or(disk.wal.end(), |(shown, _)| lsn(shown));
    let early = w.plan.mutation == Some(Mutation::PledgeBeforeTheStreamEnds);
    let pauses = disk.upstream.is_none() && (server.pauses() || early);
    let waits = if pauses { "RecoveryRetrieveRetryInterval" } else { "RecoveryWalStream" };
    let waits = (reading.is_none() || counts).then(|| waits.to_owned());
    let number = server.state().1;
    let timeline = Timeline(disk.wal.timeline());
    let upstream = disk.upstream.map(|upstream| w.hosts[upstream].name.clone());
    Ok(ServerStatus {
        in_recovery,
        timeline,
        version: 150_000,
        system_identifier: SYSID.to_owned(),
        postmaster_start_time: number.to_string(),
        write_lsn: (!in_recovery).then(|| disk.wal.end()),
        flush_lsn: (!in_recovery).then(|| disk.wal.flush_lsn()),
        insert_lsn: (!in_recovery).then(|| disk.wal.end()),
        received_lsn: in_recovery.then_some(shown),
        replayed_lsn: in_recovery.then_some(shown),
        replay_timestamp: None,
        replay_paused: false,
        has_streamed: in_recovery && server.has_streamed,
        startup: in_recovery.then(|| Startup {
            pid: number,
            began: number.to_string(),
            wait_event: waits,
        }),
        receiver: (server.streams() && !(pauses && early)).then(|| Receiver {
            status: "streaming".to_owned(),
            sender_host: upstream.clone(),
            sender_port: Some(5432),
            slot_name: None,
            received_timeline: Some(timeline),
            written_lsn: Some(shown),
            flushed_lsn: Some(shown),
        }),
        replication: replication(w, index),
        slots: Vec::new(),
        checkpointer_wait: Some("CheckpointerMain".to_owned()),
        synchronous_standby_names: disk.sync_names.clone(),
        primary_conninfo: upstream.map(|host| format!("host={host} port=5432")).unwrap_or_default(),
        primary_slot_name: String::new(),
        checkpoint_timeline: timeline,
    })
}

/// As [`status`], of a server whose disk may hang.
pub(super) async fn unhung_status(w: &Rc<World>, index: usize) -> Result<ServerStatus, SqlError> {
    if w.hosts[index].disk_hangs.get() && sql(run_of(w, index)).is_ok() {
        w.exec.sleep(ASK_LIMIT).await;
        return Err(SqlError::TimedOut(ASK_LIMIT));
    }
    status(w, index)
}

pub(super) fn replication(w: &World, index: usize) -> Vec<ReplicationRow> {
    let host = &w.hosts[index];
    let names = Names::parse(&host.disk.borrow().sync_names);
    let sent = host.disk.borrow().wal.flush_lsn();
    let server = host.server.borrow();
    let blind = w.plan.mutation == Some(Mutation::NamesSeemRead);
    let end = host.disk.borrow().wal.flushed();
    let rows = server.senders(end).map(|row| {
        let (standby, of) = (row.standby, row.of);
        let application_name = w.hosts[standby].name.clone();
        let older = row.older_names.filter(|_| !blind);
        let named = match &older {
            Some(older) => Names::parse(older).names(&application_name),
            None => names.names(&application_name),
        };
        let flushed = Some(lsn(row.flushed));
        ReplicationRow {
            pid: u32::try_from(standby).unwrap_or_default() * 100_000 + of,
            user: None,
            application_name,
            client_addr: None,
            state: Some("streaming".to_owned()),
            sync_state: Some(if named { "quorum" } else { "async" }.to_owned()),
            sync_priority: Some(u32::from(named)),
            sent_lsn: Some(if older.is_some() { lsn(row.sent) } else { sent }),
            write_lsn: flushed,
            flush_lsn: flushed,
            replay_lsn: flushed,
            slot: None,
            wait_event: older.is_none().then(|| "WalSenderMain".to_owned()),
        }
    });
    rows.collect()
}

pub(super) fn control(w: &World, index: usize) -> ControlData {
    let disk = w.hosts[index].disk.borrow();
    let state = match (disk.clean, disk.was_primary) {
        (true, true) => ControlState::ShutDown,
        (true, false) => ControlState::ShutDownInRecovery,
        (false, true) => ControlState::InProduction,
        (false, false) => ControlState::InArchiveRecovery,
    };
    let (end, timeline) = (disk.wal.end(), Timeline(disk.wal.timeline()));
    let recovering = state.is_recovery();
    // A shutdown checkpoint that begins here ends within the last record of the model, wherever pages end.
    let checkpoint =
        if state == ControlState::ShutDown { Lsn(end.0.saturating_sub(168)) } else { end };
    ControlData {
        system_identifier: SYSID.parse().unwrap_or_default(),
        state,
        checkpoint,
        redo: checkpoint,
        timeline,
        minimum_recovery_end: if recovering { end } else { Lsn(0) },
        minimum_recovery_timeline: if recovering { timeline } else { Timeline(0) },
        wal_segment_bytes: 16 << 20,
        checksums: false,
        wal_log_hints: true,
        max_connections: 100,
        max_worker_processes: 8,
        max_wal_senders: 10,
        max_prepared_transactions: 0,
        max_locks_per_transaction: 64,
    }
}

pub(super) fn timed_out() -> RewindError {
    RewindError::Leader(SqlError::TimedOut(ASK_LIMIT))
}

/// Asks another server for its timeline and the way to it.
pub(super) async fn position(
    w: &Rc<World>,
    from: usize,
    leader: &str,
) -> Result<LeaderPosition, RewindError> {
    let Some(there) = index_of(w, leader) else { return Err(timed_out()) };
    let asked = net::call(w, end(from), end(there), ASK_LIMIT, move |w, reply| {
        let host = &w.hosts[there];
        if !host.alive() {
            return w.net.lose(reply);
        }
        if let Err(error) = sql(host.server.borrow().run) {
            return reply.give(Err(error));
        }
        let disk = host.disk.borrow();
        let anybody = w.plan.mutation == Some(Mutation::RewindsToAnybody);
        let says_primary = anybody || host.server.borrow().is_primary();
        let rows = disk.wal.history();
        let lines = rows.windows(2).filter_map(|pair| match pair {
            [(left, _), (_, begin)] => Some(HistoryLine {
                timeline: Timeline(*left),
                end: lsn(*begin),
                reason: "promotion".to_owned(),
            }),
            _ => None,
        });
        reply.give(Ok(LeaderPosition {
            timeline: Timeline(disk.wal.timeline()),
            history: lines.collect(),
            checkpoint_timeline: Timeline(disk.wal.timeline()),
            flushed: says_primary.then(|| disk.wal.flush_lsn()),
            system_identifier: SYSID.parse().unwrap_or_default(),
        }));
    });
    asked.await.ok_or_else(timed_out)?.map_err(RewindError::Leader)
}

pub(super) async fn rewind(
    w: &Rc<World>,
    index: usize,
    leader: &str,
    authority: Authority,
) -> Result<(), RewindError> {
    let Some(upstream) = index_of(w, leader) else { return Err(timed_out()) };
    let there = position(w, index, leader).await?;
    // What is half rewound is a new copy's from here on, and a copy is made of any server.
    let torn = w.hosts[index].disk.borrow().torn;
    if !torn && authority.diverged_from(&there) == RewindNeed::Undecided {
        return Err(RewindError::InRecovery);
    }
    w.say(index, format_args!("rewinds"));
    w.hosts[index].disk.borrow_mut().torn = true;
    w.exec.sleep(w.rng.millis(50, 800)).await;
    let there = &w.hosts[upstream];
    if !there.alive() || !w.net.both(end(index), end(upstream)) {
        return Err(timed_out());
    }
    let theirs = there.disk.borrow().wal.clone();
    let mut disk = w.hosts[index].disk.borrow_mut();
    disk.wal.rewind_to_common(&theirs);
    disk.wal.receive(&theirs);
    disk.wal.flush();
    (disk.torn, disk.was_primary, disk.clean) = (false, false, false);
    Ok(())
}

pub(super) fn refused(command: &'static str, why: &str) -> GuardError {
    GuardError::Refused { command, why: why.to_owned() }
}

/// Asks any server whether it is in recovery.
pub(super) async fn recovery(
    w: &Rc<World>,
    from: usize,
    name: &str,
) -> Result<(Option<bool>, Option<String>), SqlError> {
    let Some(there) = index_of(w, name) else { return Err(SqlError::TimedOut(ASK_LIMIT)) };
    let asked = net::call(w, end(from), end(there), ASK_LIMIT, move |w, reply| {
        let host = &w.hosts[there];
        if !host.alive() {
            return w.net.lose(reply);
        }
        let run = host.server.borrow().run;
        let answer = sql(run).map(|()| (Some(run != Run::Primary), Some(SYSID.to_owned())));
        reply.give(answer);
    });
    asked.await.unwrap_or(Err(SqlError::TimedOut(ASK_LIMIT)))
}

//! The modelled server, as the shipped agent asks for it.

mod model;

use std::io;
use std::path::PathBuf;
use std::rc::Rc;
use std::time::Duration;

use kornak_agent::guard::{Exit, Fencing, GuardError};
use kornak_agent::ha::slots::Found;
use kornak_agent::postgres::{
    Activity, Authority, Backend, ConfigureError, ControlData, ControlDataError, DataDirState,
    Ended, LeaderPosition, LocalEnd, PendingRestart, PromoteError, Promoted, ReplayError,
    RewindError, RewindNeed, ServerProcess, ServerStatus, SqlError, StartAs, StartError, StopError,
    StopMode, Stopped, Upstream, rewind_need,
};
use kornak_agent::server::{self, Answered};
use kornak_cluster::{ClusterConfig, Lsn, Moment, Timeline};
use parking_lot::Mutex;
use tokio_util::sync::CancellationToken;

use self::model::{
    control, end_what_lingers, position, reaches, recovery, refused, rewind, run_of, sql, status,
    stop, unhung_status,
};
use super::Life;
use super::guard::permits;
use crate::sim::host::index_of;
use crate::sim::postgres::{self, Run};
use crate::sim::scenario::Mutation;
use crate::sim::world::{World, current};

/// An answer: when it was given, by which run of the server in which state, and the status.
type Told = (Moment, (Run, u32), ServerStatus);

/// Knowledge that one life of an agent has of its server.
#[derive(Debug)]
pub struct Server {
    life: Life,
    /// `synchronous_standby_names` of the next start.
    prepared: Mutex<Option<String>>,
    names_changed_at: Mutex<Moment>,
    /// The last answer, for a server that tells old positions.
    told: Mutex<Option<Told>>,
}

impl Server {
    /// The server as a life of the agent that begins knows it.
    pub fn new(life: Life) -> Self {
        Self {
            life,
            prepared: Mutex::default(),
            names_changed_at: Mutex::default(),
            told: Mutex::default(),
        }
    }

    /// Asks the server, with an instruction before and after it.
    fn ask<T: Send + 'static>(
        &self,
        work: impl AsyncFnOnce(&Rc<World>, usize) -> T + 'static,
    ) -> Answered<'static, T> {
        let life = self.life;
        life.ask(async move |w| {
            life.step(&w).await;
            let answer = work(&w, life.host).await;
            life.step(&w).await;
            answer
        })
    }
}

impl server::Server for Server {
    fn process(&self) -> Answered<'_, Result<ServerProcess, GuardError>> {
        self.ask(async |w, index| {
            let (run, number) = w.hosts[index].server.borrow().state();
            let gone = w.plan.mutation == Some(Mutation::PostmasterGoneMeansStopped);
            Ok(match run {
                Run::Down => ServerProcess::None,
                Run::Leftovers if gone => ServerProcess::None,
                Run::Leftovers => ServerProcess::Remains { processes: 1 },
                _ => ServerProcess::Running { pid: number },
            })
        })
    }

    fn status(&self) -> Answered<'_, Result<ServerStatus, SqlError>> {
        let life = self.life;
        Box::pin(async move {
            let old = current().plan.mutation == Some(Mutation::AnswersFromMemory);
            if !old {
                return self.ask(async |w, index| unhung_status(w, index).await).await;
            }
            let now = || {
                let w = current();
                let state = w.hosts[life.host].server.borrow().state();
                (w.hosts[life.host].now(&w), state)
            };
            let (at, state) = now();
            let told = self.told.lock().clone();
            if let Some((when, of, status)) = told
                && of == state
                && at.since(when) < Duration::from_secs(1)
            {
                return Ok(status);
            }
            let fresh = self.ask(async |w, index| status(w, index)).await?;
            let (at, state) = now();
            *self.told.lock() = Some((at, state, fresh.clone()));
            Ok(fresh)
        })
    }

    fn activity(&self) -> Answered<'_, Result<Activity, SqlError>> {
        self.ask(async |w, index| {
            sql(run_of(w, index))?;
            let busy = w.hosts[index].server.borrow().busy();
            let backend = |number| Backend {
                pid: u32::try_from(number).unwrap_or_default(),
                database: None,
                user: None,
                application_name: String::new(),
                state: "active".to_owned(),
                transaction_ms: None,
                works_long: false,
            };
            Ok(Activity { busy: (0..busy).map(backend).collect(), prepared_transactions: 0 })
        })
    }

    fn controldata(&self) -> Answered<'_, Result<ControlData, ControlDataError>> {
        self.ask(async |w, index| Ok(control(w, index)))
    }

    fn wal_end(&self, _: Lsn) -> Answered<'_, io::Result<Option<Lsn>>> {
        self.ask(async |w, index| {
            w.exec.sleep(w.rng.millis(1, 300)).await;
            Ok(Some(w.hosts[index].disk.borrow().wal.end()))
        })
    }

    fn ended_by_itself(&self) -> Answered<'_, Option<Ended>> {
        // It says only why, and slows the next start down.
        Box::pin(std::future::ready(None))
    }

    fn has_shut_down(&self) -> Answered<'_, bool> {
        self.ask(async |w, index| {
            run_of(w, index) == Run::Down && w.hosts[index].disk.borrow().clean
        })
    }

    fn start<'a>(&'a self, start_as: &'a StartAs) -> Answered<'a, Result<u32, StartError>> {
        let (start_as, names) = (start_as.clone(), self.prepared.lock().clone());
        self.ask(async move |w, index| {
            let host = &w.hosts[index];
            let (standby, fencing) = match &start_as {
                StartAs::Standby(upstream) => {
                    let upstream = upstream.as_ref();
                    let upstream = upstream.and_then(|upstream| index_of(w, &upstream.host));
                    host.disk.borrow_mut().upstream = upstream;
                    // Never beside a guard that has fired.
                    (true, Fencing::Unfenced)
                }
                StartAs::Primary(fencing) | StartAs::PointInTime(fencing, _) => (false, *fencing),
            };
            if let Some(names) = names {
                host.disk.borrow_mut().sync_names = names;
            }
            if host.disk.borrow().torn {
                return Err(StartError::NoData { dir: PathBuf::new() });
            }
            permits(w, index, fencing).map_err(|why| refused("START", why))?;
            if !postgres::start(w, index, standby) {
                return Err(refused("START", "processes are left").into());
            }
            Ok(host.server.borrow().state().1)
        })
    }

    fn wait_ready(&self, limit: Duration) -> Answered<'_, Result<(), StartError>> {
        self.ask(async move |w, index| {
            let ready = [Run::Standby, Run::Primary, Run::Down, Run::Leftovers];
            if !reaches(w, index, &ready, limit).await {
                return Err(StartError::NotReady(limit));
            }
            match run_of(w, index) {
                Run::Standby | Run::Primary => Ok(()),
                _ => Err(StartError::Exited {
                    exit: Exit::Unknown,
                    log: PathBuf::new(),
                    said: String::new(),
                }),
            }
        })
    }

    fn promote(
        &self,
        fencing: Fencing,
        limit: Duration,
    ) -> Answered<'_, Result<Promoted, PromoteError>> {
        let life = self.life;
        self.ask(async move |w, index| {
            sql(run_of(w, index))?;
            crate::sim::faults::scripts::at_promotion(w, index);
            life.step(w).await;
            let began = w.exec.now();
            if run_of(w, index) == Run::Standby {
                permits(w, index, fencing).map_err(|why| refused("PROMOTE", why))?;
                postgres::promote(w, index);
            }
            let over = [Run::Primary, Run::Down, Run::Leftovers];
            if !reaches(w, index, &over, limit).await {
                return Err(PromoteError::StillInRecovery(limit));
            }
            sql(run_of(w, index))?;
            let timeline = Timeline(w.hosts[index].disk.borrow().wal.timeline());
            Ok(Promoted { elapsed: w.exec.now().since(began), timeline })
        })
    }

    fn stop(&self, mode: StopMode, limit: Duration) -> Answered<'_, Result<(), StopError>> {
        self.ask(async move |w, index| stop(w, index, mode, limit).await)
    }

    fn stop_writing(&self, limit: Duration) -> Answered<'_, Result<Stopped, StopError>> {
        self.ask(async move |w, index| {
            stop(w, index, StopMode::Fast, limit).await.map(|()| Stopped::Gone)
        })
    }

    fn end_in_time(&self) -> Answered<'_, Result<(), StopError>> {
        self.ask(async |w, index| end_what_lingers(w, index).await)
    }

    fn end_lingering(&self) -> Answered<'_, Result<(), StopError>> {
        self.ask(async |w, index| end_what_lingers(w, index).await)
    }

    fn terminate_walsenders_except<'a>(
        &'a self,
        keep: &'a [&'a str],
    ) -> Answered<'a, Result<u32, SqlError>> {
        let keep: Vec<String> = keep.iter().map(|name| (*name).to_owned()).collect();
        self.ask(async move |w, index| {
            sql(run_of(w, index))?;
            let keep: Vec<usize> = keep.iter().filter_map(|name| index_of(w, name)).collect();
            postgres::end_senders(w, index, &keep);
            Ok(0)
        })
    }

    fn terminate_busy(&self) -> Answered<'_, Result<u32, SqlError>> {
        self.ask(async |w, index| {
            sql(run_of(w, index))?;
            postgres::end_clients(w, index);
            Ok(0)
        })
    }

    fn follow<'a>(
        &'a self,
        upstream: Option<&'a Upstream>,
    ) -> Answered<'a, Result<(), ConfigureError>> {
        let host = upstream.map(|upstream| upstream.host.clone());
        self.ask(async move |w, index| {
            let upstream = host.and_then(|host| index_of(w, &host));
            postgres::follow(w, index, upstream);
            Ok(())
        })
    }

    fn reload(&self) -> Answered<'_, Result<Vec<PendingRestart>, ConfigureError>> {
        Box::pin(std::future::ready(Ok(Vec::new())))
    }

    fn set_synchronous_standby_names<'a>(
        &'a self,
        names: &'a str,
        _: Duration,
    ) -> Answered<'a, Result<(), ConfigureError>> {
        let names = names.to_owned();
        *self.prepared.lock() = Some(names.clone());
        let life = self.life;
        Box::pin(async move {
            let set = self
                .ask(async move |w, index| {
                    sql(run_of(w, index))?;
                    postgres::set_sync_names(w, index, &names);
                    Ok(())
                })
                .await;
            let w = current();
            *self.names_changed_at.lock() = w.hosts[life.host].now(&w);
            set
        })
    }

    fn pending_restart(&self) -> Answered<'_, Result<Vec<PendingRestart>, ConfigureError>> {
        Box::pin(std::future::ready(Ok(Vec::new())))
    }

    fn asks_an_archive(&self) -> Answered<'_, bool> {
        self.ask(async |_, _| false)
    }

    fn end_for_parameters(&self) -> Answered<'_, Result<bool, ReplayError>> {
        // Replay is never paused.
        self.ask(async |w, index| Ok(sql(run_of(w, index)).map(|()| false)?))
    }

    fn resume_replay(&self) -> Answered<'_, Result<(), SqlError>> {
        self.ask(async |w, index| sql(run_of(w, index)))
    }

    fn checkpoint(&self) -> Answered<'_, Result<(), SqlError>> {
        self.ask(async |w, index| {
            sql(run_of(w, index))?;
            w.exec.sleep(w.rng.millis(5, 100)).await;
            sql(run_of(w, index))
        })
    }

    fn slots(&self) -> Answered<'_, Result<Vec<Found>, SqlError>> {
        self.ask(async |w, index| sql(run_of(w, index)).map(|()| Vec::new()))
    }

    fn create_physical_slot<'a>(&'a self, _: &'a str) -> Answered<'a, Result<(), SqlError>> {
        self.ask(async |w, index| sql(run_of(w, index)))
    }

    fn create_logical_slot<'a>(
        &'a self,
        _: &'a str,
        _: &'a str,
        _: &'a str,
    ) -> Answered<'a, Result<(), SqlError>> {
        self.ask(async |w, index| sql(run_of(w, index)))
    }

    fn drop_slot<'a>(&'a self, _: &'a str) -> Answered<'a, Result<bool, SqlError>> {
        self.ask(async |w, index| sql(run_of(w, index)).map(|()| true))
    }

    fn advance_slot<'a>(&'a self, _: &'a str, _: Lsn) -> Answered<'a, Result<(), SqlError>> {
        self.ask(async |w, index| sql(run_of(w, index)))
    }

    fn advance_logical_slot<'a>(
        &'a self,
        _: &'a str,
        _: &'a str,
        _: Lsn,
    ) -> Answered<'a, Result<(), SqlError>> {
        self.ask(async |w, index| sql(run_of(w, index)))
    }

    fn recovery_of<'a>(
        &'a self,
        host: &'a str,
        _: u16,
    ) -> Answered<'a, Result<(Option<bool>, Option<String>), SqlError>> {
        let host = host.to_owned();
        self.ask(async move |w, index| recovery(w, index, &host).await)
    }

    fn leader_position<'a>(
        &'a self,
        leader: &'a Upstream,
    ) -> Answered<'a, Result<LeaderPosition, RewindError>> {
        let leader = leader.host.clone();
        self.ask(async move |w, index| position(w, index, &leader).await)
    }

    fn took_another_way<'a>(
        &'a self,
        _: &'a Upstream,
        _: &'a LeaderPosition,
        _: Timeline,
    ) -> Answered<'a, Result<bool, RewindError>> {
        // No two timelines of a world have the same number.
        Box::pin(std::future::ready(Ok(false)))
    }

    fn rewind_needed<'a>(
        &'a self,
        leader: &'a Upstream,
        authority: Authority,
    ) -> Answered<'a, Result<RewindNeed, RewindError>> {
        let leader = leader.host.clone();
        self.ask(async move |w, index| {
            let local = {
                let disk = w.hosts[index].disk.borrow();
                LocalEnd { timeline: Timeline(disk.wal.timeline()), lsn: disk.wal.end() }
            };
            let theirs = position(w, index, &leader).await?;
            let torn = w.hosts[index].disk.borrow().torn;
            Ok(if torn { RewindNeed::Diverged } else { rewind_need(local, &theirs, authority) })
        })
    }

    fn rewind<'a>(
        &'a self,
        leader: &'a Upstream,
        authority: Authority,
    ) -> Answered<'a, Result<(), RewindError>> {
        let leader = leader.host.clone();
        self.ask(async move |w, index| rewind(w, index, &leader, authority).await)
    }

    fn keep_log_bounded(&self, _: CancellationToken) -> Answered<'_, ()> {
        Box::pin(std::future::ready(()))
    }

    fn data_dir_state(&self) -> io::Result<DataDirState> {
        Ok(DataDirState::Cluster { version: 15 })
    }

    fn is_signalled_as_standby(&self) -> bool {
        current().hosts[self.life.host].disk.borrow().standby_signal
    }

    fn goes_on(&self) -> bool {
        false
    }

    fn is_rewinding(&self) -> bool {
        false
    }

    fn commits_wait_for_replay(&self) -> bool {
        false
    }

    fn names_changed_at(&self) -> Moment {
        *self.names_changed_at.lock()
    }

    fn prepare_synchronous_standby_names(&self, names: &str) {
        *self.prepared.lock() = Some(names.to_owned());
    }

    fn set_dynamic(&self, _: &ClusterConfig) {}

    fn show_dynamic(&self) {}

    fn has_adopted_a_primary(&self) -> bool {
        false
    }

    fn forget_adoption(&self) {}
}

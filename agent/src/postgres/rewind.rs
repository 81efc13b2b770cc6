//! Bringing back a former primary, or a standby that went another way, by undoing what the others do
//! not have (`pg_rewind`, /docs/current/app-pgrewind.html).

mod compare;

use std::fs;
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::time::Duration;

use kornak_cluster::{Lsn, Timeline};
use tracing::info;

use super::archive::wal_file;
use super::claim::{Claim, Unfinished};
use super::conf::{BASE_CONF, MAIN_CONF, conninfo_words, join_conninfo};
use super::controldata::{ControlData, ControlState};
use super::files::ConfigureError;
use super::os::{read_file, remove_file, write_file};
use super::sql::{self, SqlError, ask};
use super::tool::{self, ToolError};
use super::{ControlDataError, DataDirState, Postgres, Upstream};
use compare::same_way;
pub use compare::{
    Authority, HistoryLine, LeaderPosition, LocalEnd, RewindNeed, parse_history, rewind_need,
};

/// Crash recovery of a large server takes minutes.
const RECOVERY_LIMIT: Duration = Duration::from_secs(24 * 3600);
const REWIND_LIMIT: Duration = Duration::from_secs(24 * 3600);
/// Longest history file that is read: some 50 bytes for each promotion.
const MAX_HISTORY_BYTES: u32 = 1 << 20;

/// Why the data directory is not what it should be.
#[derive(Debug, thiserror::Error)]
pub enum RewindError {
    #[error("see where the local log ends")]
    Control(#[from] ControlDataError),
    /// pg_rewind needs one of the two, from before the divergence.
    #[error("rewind: needs data checksums or wal_log_hints")]
    NotPossible,
    /// The leader has not written a checkpoint since it was promoted: pg_rewind would see its old
    /// timeline. Ask it for one, and try again.
    #[error("rewind: the leader has not written a checkpoint on timeline {0} yet")]
    NoCheckpoint(Timeline),
    #[error("ask the leader for its timeline")]
    Leader(#[source] SqlError),
    /// The history does not fit what it should tell.
    #[error("the history of timeline {0} is not understood")]
    History(Timeline),
    #[error(
        "the leader is a server of another cluster: its system identifier is {theirs}, here it is {ours}"
    )]
    OtherCluster { ours: u64, theirs: u64 },
    /// pg_rewind sees equal timelines and does nothing.
    #[error(
        "rewind: this server has log up to {ours} on timeline {timeline}, the leader only up to {theirs}: it has \
         lost what it had flushed, and only a new copy helps"
    )]
    Ahead { timeline: Timeline, ours: Lsn, theirs: Lsn },
    /// pg_rewind tells timelines by their number.
    #[error(
        "rewind: this server and the leader both took timeline {0}, each on a way of its own: only a \
         new copy helps"
    )]
    SameNumber(Timeline),
    /// A leader of the past may be a standby now, and what it lacks acknowledged elsewhere since.
    #[error("rewind: the leader is in recovery")]
    InRecovery,
    #[error("recover the server from its crash before the rewind")]
    Recover(#[source] ToolError),
    /// The data directory may be half changed: only another rewind or a new copy helps.
    #[error("rewind the data directory")]
    Rewind(#[source] ToolError),
    /// pg_rewind has ended before it changed anything.
    #[error("compare the data directory with the leader's")]
    Untouched(#[source] ToolError),
    /// An earlier rewind was interrupted: nobody knows any more what differs. Only a new copy helps.
    #[error("an earlier rewind of the data directory was not finished: reinitialize this member")]
    Unfinished,
    /// A tool works on the data directory, or what it is about could not be written down.
    #[error("claim the data directory")]
    Claim(#[source] ToolError),
    #[error("note what is done to the data directory, or keep its configuration files")]
    Note(#[source] io::Error),
    /// Somebody replaces the data directory.
    #[error("the rewind was given up")]
    GivenUp,
    #[error("prepare or restore configuration files")]
    Configure(#[from] ConfigureError),
}

/// Bytes that are compared where a timeline begins: its first record has the time of the promotion
/// in it.
const FORK_BYTES: usize = 256;

/// Reads a piece of a segment. A whole one may be large, and what is freed of it the allocator keeps for each thread.
fn piece(file: &Path, offset: u64) -> io::Result<[u8; FORK_BYTES]> {
    let mut bytes = [0; FORK_BYTES];
    fs::File::open(file)?.read_exact_at(&mut bytes, offset)?;
    Ok(bytes)
}

impl Postgres {
    /// Whether this server went another way than the leader under the same numbers of timelines. False
    /// as well if it cannot be told, for what it takes may have been removed.
    pub async fn took_another_way(
        &self,
        leader: &Upstream,
        position: &LeaderPosition,
        timeline: Timeline,
    ) -> Result<bool, RewindError> {
        let name = format!("{:08X}.history", timeline.0);
        let text = fs::read_to_string(self.data_dir().join("pg_wal").join(name)).ok();
        let Some(parents) = text.as_deref().and_then(parse_history) else { return Ok(false) };
        if !same_way(timeline, &parents, position) {
            return Ok(true);
        }
        let Some(fork) = parents.last() else { return Ok(false) };
        let segment_bytes = self.controldata().await?.wal_segment_bytes;
        let Some((file, offset)) = wal_file(timeline, fork.end, segment_bytes) else {
            return Ok(false);
        };
        let ours = piece(&self.data_dir().join("pg_wal").join(&file), offset);
        let theirs = self.leaders_bytes(leader, &file, offset).await?;
        Ok(matches!((&ours, &theirs), (Ok(a), Some(b)) if a.as_slice() != b.as_slice()))
    }

    /// A piece of the leader's log; `None` if it has it no more.
    async fn leaders_bytes(
        &self,
        leader: &Upstream,
        file: &str,
        offset: u64,
    ) -> Result<Option<Vec<u8>>, RewindError> {
        let (settings, port) = (self.settings(), leader.port);
        let role = settings.rewind();
        let login = sql::remote_login(&leader.host, port, &settings.database, role, "rewind");
        let client = login.connect().await.map_err(RewindError::Leader)?;
        let statement = format!(
            "SELECT encode(pg_read_binary_file('pg_wal/{file}', {offset}, {FORK_BYTES}, true), 'hex')"
        );
        let rows = ask(&client, "show a piece of its log", &statement).await;
        let rows = rows.map_err(RewindError::Leader)?;
        let text = rows.into_iter().next().and_then(|row| row.into_iter().next().flatten());
        let bytes = text.as_deref().and_then(super::slots::from_hex);
        Ok(bytes.filter(|bytes| bytes.len() == FORK_BYTES))
    }

    /// Where the log of the server ends, which must not run. `None`: it has crashed as a primary;
    /// [`Postgres::recover_from_crash`] first.
    pub async fn local_end(&self) -> Result<Option<LocalEnd>, ControlDataError> {
        Ok(LocalEnd::of(&self.controldata().await?))
    }

    /// Asks the leader for its timeline and the way to it.
    pub async fn leader_position(&self, leader: &Upstream) -> Result<LeaderPosition, RewindError> {
        const OPERATION: &str = "tell its timeline";
        let settings = self.settings();
        let login = sql::remote_login(
            &leader.host,
            leader.port,
            &settings.database,
            settings.rewind(),
            "rewind",
        );
        let client = login.connect().await.map_err(RewindError::Leader)?;
        // The view of the receiver is empty for a role without pg_read_all_stats; a standby's control
        // file knows the timeline from its first restartpoint there on, or from the rewind.
        let statement = "SELECT CASE WHEN s.r THEN greatest(w.received_tli, c.timeline_id, \
             (pg_control_recovery()).min_recovery_end_timeline) \
             ELSE ('x' || substr(pg_walfile_name(pg_current_wal_lsn()), 1, 8))::bit(32)::int END, \
             c.timeline_id, i.system_identifier, \
             CASE WHEN NOT s.r THEN pg_current_wal_flush_lsn() END \
             FROM (SELECT pg_is_in_recovery() AS r OFFSET 0) AS s \
             CROSS JOIN pg_control_checkpoint() AS c CROSS JOIN pg_control_system() AS i \
             LEFT JOIN pg_stat_wal_receiver AS w ON true";
        let rows = ask(&client, OPERATION, statement).await.map_err(RewindError::Leader)?;
        let text = |column: usize| rows.first()?.get(column)?.as_deref();
        let number = |column: usize| text(column)?.parse::<u32>().ok().map(Timeline);
        let identifier = text(2).and_then(|text| text.parse().ok());
        let (Some(timeline), Some(checkpoint_timeline), Some(system_identifier)) =
            (number(0), number(1), identifier)
        else {
            return Err(RewindError::Leader(SqlError::Answer { operation: OPERATION }));
        };
        let flushed = text(3).and_then(|text| text.parse().ok());
        let mut history = Vec::new();
        if timeline > Timeline(1) {
            let statement = format!(
                "SELECT convert_from(pg_read_binary_file('pg_wal/{:08X}.history', 0, \
                 {MAX_HISTORY_BYTES}, true), 'UTF8')",
                timeline.0
            );
            let rows = ask(&client, "tell the history of its timeline", &statement)
                .await
                .map_err(RewindError::Leader)?;
            let text = rows.into_iter().next().and_then(|row| row.into_iter().next().flatten());
            let lines = text.as_deref().and_then(parse_history);
            history = lines.ok_or(RewindError::History(timeline))?;
        }
        Ok(LeaderPosition { timeline, history, checkpoint_timeline, flushed, system_identifier })
    }

    /// Replays the log of a server that has crashed, without letting anybody in, so that its end is
    /// known and pg_rewind takes it. The log is kept: nothing is archived.
    pub async fn recover_from_crash(&self) -> Result<(), RewindError> {
        let claim = self.inner.claim().map_err(RewindError::Claim)?;
        self.recover_claimed(&claim).await
    }

    async fn recover_claimed(&self, claim: &Claim) -> Result<(), RewindError> {
        let dir = self.data_dir();
        let signal = dir.join("standby.signal");
        remove_file(&signal, self.os_user())
            .map_err(|source| ConfigureError::Write { path: signal.clone(), source })?;
        let settings = self.settings();
        let mut command = self.tool("postgres");
        command.args(["--single", "-D"]).arg(dir);
        command.arg("-c").arg(format!("config_file={}", self.inner.main_conf().display()));
        // As in its life before: recovery writes them into the control file, where pg_rewind and
        // standbys look for them.
        for (name, value) in self.controlled(true).await {
            command.arg("-c").arg(format!("{name}={value}"));
        }
        for parameter in [
            "archive_mode=on",
            "archive_command=false",
            "shared_preload_libraries=",
            "listen_addresses=",
            "synchronous_standby_names=",
            "logging_collector=off",
        ] {
            command.arg("-c").arg(parameter);
        }
        let command = command.arg(&settings.database);
        let outcome = tool::run_claimed(command, claim, RECOVERY_LIMIT).await;
        outcome.map_err(RewindError::Recover)?;
        info!("server recovered from its crash");
        Ok(())
    }

    /// Whether this node can follow `leader` as it is. The server must not run, and is not changed: a
    /// crash recovery here would add to the log of what may be a fresh copy.
    pub async fn rewind_needed(
        &self,
        leader: &Upstream,
        authority: Authority,
    ) -> Result<RewindNeed, RewindError> {
        if self.unfinished() == Some(Unfinished::Rewind) {
            let claim = self.inner.claim().map_err(RewindError::Claim)?;
            if self.take_over_rewind(&claim).await? {
                self.have_log_written(leader).await;
            }
        }
        if self.unfinished().is_some() {
            return Ok(RewindNeed::Diverged);
        }
        let control = self.controldata().await?;
        if self.is_fresh_copy(&control) {
            return Ok(RewindNeed::No);
        }
        let position = self.leader_position(leader).await?;
        same_cluster(&control, &position)?;
        let own = LocalEnd::of(&control).map_or(control.timeline, |local| local.timeline);
        if self.took_another_way(leader, &position, own).await? {
            tracing::warn!(timeline = %own, "two servers diverged on the same timeline");
            return Ok(authority.diverged_from(&position));
        }
        let need = match LocalEnd::of(&control) {
            Some(local) => rewind_need(local, &position, authority),
            // It has crashed as a primary and may have written beyond the fork.
            None if control.timeline < position.timeline => authority.diverged_from(&position),
            None => RewindNeed::No,
        };
        info!(timeline = %control.timeline, leader = %position.timeline, ?need, "history compared with the leader's");
        Ok(need)
    }

    /// A copy that has not been started yet: its control file tells what its source was doing. (Until version 14
    /// a primary could have such a file while it was backed up; it has been started, and says so.)
    fn is_fresh_copy(&self, control: &ControlData) -> bool {
        let dir = self.data_dir();
        let old = matches!(self.data_dir_state(), Ok(DataDirState::Cluster { version: ..=14 }));
        let exclusive = old && control.state.was_primary() && dir.join("postmaster.opts").exists();
        dir.join("backup_label").exists() && !exclusive
    }

    /// Undoes what the leader does not have. The server must not run; it is started as a standby
    /// afterwards. Configuration files stay as they were.
    pub async fn rewind(&self, leader: &Upstream, authority: Authority) -> Result<(), RewindError> {
        let claim = self.inner.claim().map_err(RewindError::Claim)?;
        if self.unfinished().is_some() {
            return Err(RewindError::Unfinished);
        }
        let mut control = self.controldata().await?;
        if !control.checksums && !control.wal_log_hints {
            return Err(RewindError::NotPossible);
        }
        let position = self.leader_position(leader).await?;
        same_cluster(&control, &position)?;
        if !authority.has(&position) {
            return Err(RewindError::InRecovery);
        }
        if position.checkpoint_timeline < position.timeline {
            return Err(RewindError::NoCheckpoint(position.timeline));
        }
        if !control.state.is_clean() {
            self.recover_claimed(&claim).await?;
            control = self.controldata().await?;
        }
        let local = LocalEnd::of(&control);
        let own = local.map_or(control.timeline, |local| local.timeline);
        if self.took_another_way(leader, &position, own).await? {
            return Err(RewindError::SameNumber(own));
        }
        if let (Some(local), Some(theirs)) = (local, position.flushed)
            && local.timeline == position.timeline
            && local.lsn > theirs
        {
            return Err(RewindError::Ahead { timeline: own, ours: local.lsn, theirs });
        }
        info!(timeline = %control.timeline, leader = %position.timeline, "pg_rewind begun");
        let passfile = self.inner.write_passfile()?;
        let settings = self.settings();
        let mut words = conninfo_words(settings.rewind(), &passfile, &leader.host, leader.port);
        words.push(("dbname", settings.database.clone()));
        words.push(("application_name", format!("{} rewind", sql::APPLICATION_PREFIX)));
        let source = join_conninfo(&words);
        // First without touching anything: whatever is wrong shows while nothing is lost yet.
        let mut rehearsal = self.rewind_command(&source);
        rehearsal.arg("--dry-run");
        let rehearsed = tool::run_claimed(&mut rehearsal, &claim, REWIND_LIMIT).await;
        rehearsed.map_err(RewindError::Rewind)?;
        // From here on it goes to its end, whatever becomes of the step that began it.
        let this = self.clone();
        let rewinding = tokio::spawn(async move { this.rewind_for_good(claim, &source).await });
        *self.inner.rewinding_task.lock() = Some(rewinding.abort_handle());
        match rewinding.await {
            Ok(Ok(())) => {
                self.have_log_written(leader).await;
                Ok(())
            }
            Ok(Err(error)) => Err(error),
            Err(_) => Err(RewindError::GivenUp),
        }
    }

    async fn rewind_for_good(&self, claim: Claim, source: &str) -> Result<(), RewindError> {
        self.keep_own_files()?;
        self.inner.begin_rewind().map_err(noted)?;
        let log = self.inner.rewind_log();
        let mut command = self.rewind_command(source);
        let outcome = tool::run_outliving(command.arg("--progress"), &claim, &log).await;
        if let Err(error @ ToolError::Failed { .. }) = outcome {
            // It says how much there is to copy before it changes anything.
            if String::from_utf8_lossy(&fs::read(&log).map_err(noted)?).contains("need to copy") {
                return Err(RewindError::Rewind(error));
            }
            self.inner.finish_rewind().map_err(noted)?;
            return Err(RewindError::Untouched(error));
        }
        outcome.map_err(RewindError::Rewind)?;
        self.complete_rewind(&claim).await?;
        info!("pg_rewind completed");
        Ok(())
    }

    /// pg_rewind outlives the agent that started it. It writes the control file last: if that is the new one,
    /// all the rest has been written, and is on disk if the host has not been started anew since.
    pub(super) async fn take_over_rewind(&self, claim: &Claim) -> Result<bool, RewindError> {
        let Some(note) = self.inner.rewinding() else { return Ok(false) };
        let done = self.controldata().await?.state == ControlState::InArchiveRecovery;
        if !done || note.boot != super::claim::boot_id().map_err(noted)? {
            return Ok(false);
        }
        self.complete_rewind(claim).await?;
        info!("rewind of an earlier agent is complete");
        Ok(true)
    }

    async fn complete_rewind(&self, claim: &Claim) -> Result<(), RewindError> {
        for entry in fs::read_dir(self.inner.kept_files()).map_err(noted)?.flatten() {
            let (kept, path) = (entry.path(), self.data_dir().join(entry.file_name()));
            let text = fs::read(&kept).map_err(noted)?;
            let mode = entry.metadata().map_err(noted)?.mode() & 0o777;
            write_file(&path, &text, mode, self.os_user())
                .map_err(|source| ConfigureError::Write { path, source })?;
        }
        self.place(claim, super::place::sync_all).await.map_err(noted)?;
        self.inner.finish_rewind().map_err(noted)
    }

    fn rewind_command(&self, source: &str) -> tokio::process::Command {
        let mut command = self.tool("pg_rewind");
        command.args(["--no-ensure-shutdown", "--target-pgdata"]).arg(self.data_dir());
        command.arg("--source-server").arg(source);
        command
    }

    /// Files in the data directory that pg_rewind would take from the leader, byte for byte.
    fn keep_own_files(&self) -> Result<(), RewindError> {
        let kept = self.inner.kept_files();
        super::place::remove_tree(&kept).map_err(noted)?;
        crate::guard::make_runtime_dir(&kept).map_err(noted)?;
        for name in [MAIN_CONF, BASE_CONF, "pg_hba.conf", "pg_ident.conf", "postgresql.auto.conf"] {
            let path = self.data_dir().join(name);
            match read_file(&path, self.os_user()) {
                Ok(text) => {
                    write_file(&kept.join(name), &text, self.inner.mode_of(&path), None)
                        .map_err(noted)?;
                }
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(source) => return Err(ConfigureError::Keep { path, source }.into()),
            }
        }
        Ok(())
    }
}

/// An error of noting the work beside the data directory.
fn noted(source: io::Error) -> RewindError {
    RewindError::Note(source)
}

fn same_cluster(control: &ControlData, leader: &LeaderPosition) -> Result<(), RewindError> {
    let (ours, theirs) = (control.system_identifier, leader.system_identifier);
    if ours == theirs { Ok(()) } else { Err(RewindError::OtherCluster { ours, theirs }) }
}

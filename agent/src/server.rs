//! The local server and its data directory, as the shell uses them while a cluster lives.
//!
//! [`Postgres`] is the server of the product; the simulation has a model of one. Making a data directory (a new
//! cluster, a copy), the state files of logical slots and what Citus needs are asked of [`Postgres`] itself.

use std::fmt;
use std::io;
use std::pin::Pin;
use std::time::Duration;

use kornak_cluster::{ClusterConfig, Lsn, Moment, Timeline};
use tokio_util::sync::CancellationToken;

use crate::guard::{Fencing, GuardError};
use crate::ha::slots::Found;
use crate::postgres::{
    Activity, Authority, ConfigureError, ControlData, ControlDataError, DataDirState, Ended,
    LeaderPosition, PendingRestart, Postgres, PromoteError, Promoted, ReplayError, RewindError,
    RewindNeed, ServerProcess, ServerStatus, SqlError, StartAs, StartError, StopError, StopMode,
    Stopped, Upstream,
};

/// An answer that is on its way.
pub type Answered<'a, T> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;

macro_rules! port {
    (
        $(
            waits fn $slow:ident(&self $(, $slow_name:ident: $slow_type:ty)*) -> $slow_out:ty;
        )*
        $(
            fn $quick:ident(&self $(, $quick_name:ident: $quick_type:ty)*) $(-> $quick_out:ty)?;
        )*
    ) => {
        /// One kind of server. Each operation is described at [`Postgres`].
        #[allow(missing_docs, reason = "described where they are carried out")]
        #[allow(clippy::needless_lifetimes, reason = "some arguments need the name")]
        pub trait Server: Send + Sync + fmt::Debug {
            $(fn $slow<'a>(&'a self $(, $slow_name: $slow_type)*) -> Answered<'a, $slow_out>;)*
            $(fn $quick(&self $(, $quick_name: $quick_type)*) $(-> $quick_out)?;)*
        }

        #[allow(clippy::needless_lifetimes, reason = "some arguments need the name")]
        impl Server for Postgres {
            $(fn $slow<'a>(&'a self $(, $slow_name: $slow_type)*) -> Answered<'a, $slow_out> {
                Box::pin(Self::$slow(self $(, $slow_name)*))
            })*
            $(fn $quick(&self $(, $quick_name: $quick_type)*) $(-> $quick_out)? {
                Self::$quick(self $(, $quick_name)*)
            })*
        }
    };
}

port! {
    // What there is.
    waits fn process(&self) -> Result<ServerProcess, GuardError>;
    waits fn status(&self) -> Result<ServerStatus, SqlError>;
    waits fn activity(&self) -> Result<Activity, SqlError>;
    waits fn controldata(&self) -> Result<ControlData, ControlDataError>;
    waits fn wal_end(&self, from: Lsn) -> io::Result<Option<Lsn>>;
    waits fn ended_by_itself(&self) -> Option<Ended>;
    waits fn has_shut_down(&self) -> bool;
    // Starting and stopping.
    waits fn start(&self, start_as: &'a StartAs) -> Result<u32, StartError>;
    waits fn wait_ready(&self, limit: Duration) -> Result<(), StartError>;
    waits fn promote(&self, fencing: Fencing, limit: Duration) -> Result<Promoted, PromoteError>;
    waits fn stop(&self, mode: StopMode, limit: Duration) -> Result<(), StopError>;
    waits fn stop_writing(&self, limit: Duration) -> Result<Stopped, StopError>;
    waits fn end_in_time(&self) -> Result<(), StopError>;
    waits fn end_lingering(&self) -> Result<(), StopError>;
    waits fn terminate_walsenders_except(&self, keep: &'a [&'a str]) -> Result<u32, SqlError>;
    waits fn terminate_busy(&self) -> Result<u32, SqlError>;
    // Changing what it does.
    waits fn follow(&self, upstream: Option<&'a Upstream>) -> Result<(), ConfigureError>;
    waits fn reload(&self) -> Result<Vec<PendingRestart>, ConfigureError>;
    waits fn set_synchronous_standby_names(&self, names: &'a str, limit: Duration)
        -> Result<(), ConfigureError>;
    waits fn pending_restart(&self) -> Result<Vec<PendingRestart>, ConfigureError>;
    waits fn asks_an_archive(&self) -> bool;
    waits fn end_for_parameters(&self) -> Result<bool, ReplayError>;
    waits fn resume_replay(&self) -> Result<(), SqlError>;
    waits fn checkpoint(&self) -> Result<(), SqlError>;
    // Its slots.
    waits fn slots(&self) -> Result<Vec<Found>, SqlError>;
    waits fn create_physical_slot(&self, name: &'a str) -> Result<(), SqlError>;
    waits fn create_logical_slot(&self, name: &'a str, database: &'a str, plugin: &'a str)
        -> Result<(), SqlError>;
    waits fn drop_slot(&self, name: &'a str) -> Result<bool, SqlError>;
    waits fn advance_slot(&self, name: &'a str, to: Lsn) -> Result<(), SqlError>;
    waits fn advance_logical_slot(&self, name: &'a str, database: &'a str, to: Lsn)
        -> Result<(), SqlError>;
    // Comparing it with others'.
    waits fn recovery_of(&self, host: &'a str, port: u16)
        -> Result<(Option<bool>, Option<String>), SqlError>;
    waits fn leader_position(&self, leader: &'a Upstream) -> Result<LeaderPosition, RewindError>;
    waits fn took_another_way(&self, leader: &'a Upstream, position: &'a LeaderPosition, timeline: Timeline)
        -> Result<bool, RewindError>;
    waits fn rewind_needed(&self, leader: &'a Upstream, authority: Authority)
        -> Result<RewindNeed, RewindError>;
    waits fn rewind(&self, leader: &'a Upstream, authority: Authority) -> Result<(), RewindError>;
    waits fn keep_log_bounded(&self, stop: CancellationToken) -> ();

    fn data_dir_state(&self) -> io::Result<DataDirState>;
    fn is_signalled_as_standby(&self) -> bool;
    fn goes_on(&self) -> bool;
    fn is_rewinding(&self) -> bool;
    fn commits_wait_for_replay(&self) -> bool;
    fn names_changed_at(&self) -> Moment;
    fn prepare_synchronous_standby_names(&self, names: &str);
    fn set_dynamic(&self, config: &ClusterConfig);
    fn show_dynamic(&self);
    fn has_adopted_a_primary(&self) -> bool;
    fn forget_adoption(&self);
}

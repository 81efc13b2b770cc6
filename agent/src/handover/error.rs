//! Why a handover fails.

use std::time::Duration;

use kornak_dcs::DcsError;

use crate::ha::switchover::Refusal;
use crate::lease::ClaimError;
use crate::postgres::{SqlError, StartError, StopError};
use crate::starting::StandAloneError;

/// Why a handover did not happen. Until `switch` nobody notices; afterwards the message says where
/// the primary is.
#[derive(Debug, thiserror::Error)]
pub enum HandoverError {
    #[error(transparent)]
    Refused(#[from] Refusal),
    #[error("the leader key was lost before the switch")]
    Lease(#[source] ClaimError),
    #[error("the store did not take the handover record")]
    Store(#[source] DcsError),
    #[error("somebody changed the handover record")]
    RecordChanged,
    #[error("checkpoint before the handover")]
    Checkpoint(#[source] SqlError),
    #[error("end transactions that outlast every drain")]
    Stragglers(#[source] SqlError),
    #[error(
        "transactions kept running for {0:?}; end them, or ask for a switchover that ends them"
    )]
    NeverDrained(Duration),
    /// Whatever comes next is decided anew.
    #[error("the server has ended by itself before the switch")]
    Ended,
    #[error("the server did not stop in time and was started again in place")]
    NotStopped,
    #[error("{candidate} did not take over, the server was started again in place")]
    NotTaken { candidate: String },
    /// In a standby cluster no server was stopped for it.
    #[error("{candidate} did not take the leader key")]
    NotLed { candidate: String },
    #[error("the server was started again in place and takes no connections yet, after {0:?}")]
    Starting(Duration),
    #[error("the server has stopped and could not be started again in place")]
    Stuck(#[from] StuckError),
}

/// Why a server that was stopped for a handover does not run again.
#[derive(Debug, thiserror::Error)]
pub enum StuckError {
    #[error("take the leader key back")]
    Claim(#[from] ClaimError),
    #[error("stop what is left of the server")]
    Stop(#[from] StopError),
    #[error("name no synchronous standbys")]
    StandAlone(#[from] StandAloneError),
    #[error("start the server")]
    Start(#[from] StartError),
}

//! A leadership that passes from one agent to the next while the store is away: in failsafe mode the guard keeps what the
//! next agent needs to ask the members in the place of the one before.
//!
//! As long as the guard's deadline has not come, nobody else leads: the agent that armed it had proven so. The list
//! that is left covers what the store may have, for it is left before it is written there. A leadership that
//! is lost or claimed anew leaves nothing until the leader's housekeeping says so again.

use std::collections::BTreeMap;
use std::time::Duration;

use kornak_cluster::{Epoch, LeaseId, Moment};
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use tracing::{info, warn};

use super::{ClaimError, Held, Keeper};
use crate::guard::GuardError;

/// Of the text's format.
const VERSION: u32 = 1;

/// The members that a leader without the store asks, with their addresses.
pub(super) type Asked = BTreeMap<String, String>;

/// The text that the guard keeps.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Left {
    v: u32,
    epoch: Epoch,
    lease: i64,
    ttl_ms: u64,
    asked: Asked,
}

impl Keeper {
    /// Leaves the leadership that is held to the next agent, which is to ask these members.
    pub async fn leave(&self, asked: &Asked) -> Result<(), GuardError> {
        // Behind the gate: a claim that is made meanwhile has left nothing.
        let _gate = self.inner.gate.lock().await;
        let (Some(held), generation) = self.shown() else { return Ok(()) };
        let left = Left {
            v: VERSION,
            epoch: held.epoch,
            lease: held.lease.0,
            ttl_ms: u64::try_from(held.ttl.as_millis()).unwrap_or(u64::MAX),
            asked: asked.clone(),
        };
        self.inner.guard.keep(serde_json::to_string(&left).unwrap_or_default()).await?;
        if self.generation() == generation { Ok(()) } else { self.leave_nothing().await }
    }

    /// The next agent finds nothing from now on.
    pub async fn leave_nothing(&self) -> Result<(), GuardError> {
        self.inner.guard.keep(String::new()).await
    }

    /// As [`Keeper::leave_nothing`], where the server is about to be stopped in any case.
    pub(super) async fn leave_nothing_if_possible(&self) {
        if let Err(error) = self.leave_nothing().await {
            warn!(
                error = &error as &dyn std::error::Error,
                "guard could not be told to forget the leadership"
            );
        }
    }

    /// Takes over what the agent before has left with the server that runs, if there is something and it is not too
    /// late, until the deadline that it armed. `asked` is the list before anything is held. Only for a server that
    /// is seen to be a primary.
    pub async fn inherit(&self, asked: &Mutex<Option<Asked>>) -> Result<(), ClaimError> {
        let _gate = self.inner.gate.lock().await;
        let (known, generation) = self.shown();
        if known.is_some() || self.is_unfenced() {
            return Ok(());
        }
        let kept = self.inner.guard.kept().await.map_err(ClaimError::Guard)?;
        let Some(kept) = kept else { return Ok(()) };
        let left = serde_json::from_str::<Left>(&kept.text).ok().filter(|left| left.v == VERSION);
        let Some(left) = left else { return Ok(()) };
        let held = Held {
            lease: LeaseId(left.lease),
            ttl: Duration::from_millis(left.ttl_ms),
            epoch: left.epoch,
            until: Moment::new(Duration::from_nanos(kept.deadline_ns)),
            // Nothing that this agent has seen.
            proven_at: Moment::default(),
        };
        if self.inner.machine.now() >= held.until {
            return Ok(());
        }
        *asked.lock() = Some(left.asked);
        // The guard is armed with it, or has brought it nearer meanwhile: to arm it again would undo that.
        self.publish(held, generation)?;
        info!(
            epoch = held.epoch.revision.0,
            "leadership of the agent before taken over without the store"
        );
        Ok(())
    }
}

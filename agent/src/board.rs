//! The notes that one task of the agent leaves for another, and the signals by which they wake each other.
//!
//! Each note names the task that writes it. Not here: what lasts beyond the process (`memory`, `lease`, `failsafe`).

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32};

use kornak_cluster::{Lsn, Moment};
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

use crate::ha::sync::Writes;

/// The notes of one agent's tasks.
#[derive(Debug, Default)]
pub struct Board {
    /// The store takes no writes, for lack of space. Written with each answer of the store.
    pub full: Arc<AtomicBool>,
    /// How often the store's history had gone back when `Context::state` looked last, which writes it.
    pub rewound: AtomicU32,
    /// A new cluster is being created here. Written by the driver.
    pub creating: AtomicBool,
    /// One checkpoint that was asked for by REST at a time; when the last one began. Written by the REST command.
    pub asked_checkpoint: tokio::sync::Mutex<Option<Moment>>,
    /// The record of our own writes of `sync`. Written by whichever of the leader's tasks writes that key.
    pub sync_writes: parking_lot::Mutex<Writes>,
    /// A list of members that was to be written to `failsafe` and may not have been. Written by the leader's
    /// housekeeping, cleared by the failsafe rounds.
    pub unproven_failsafe: parking_lot::Mutex<Option<BTreeMap<String, String>>>,
    /// While the store is away: how far the leader's slots are, as it has told last; on the leader, how far the
    /// members are whose slots it keeps. Written by the failsafe rounds and by `POST /failsafe`.
    pub told_slots: parking_lot::Mutex<BTreeMap<String, Lsn>>,
    /// Every member has confirmed this leader in the last round. Written by the failsafe rounds.
    pub failsafe_active: AtomicBool,
    /// Nobody may rewind from here yet. Written by the leader's housekeeping.
    pub checkpoint_pending: AtomicBool,
    /// Logical slots that this standby has to copy from the leader, for which it is restarted. Written by the care for slots.
    pub slots_to_copy: parking_lot::Mutex<Vec<String>>,
    /// The last complaint about a slot, so that it is not repeated. Of the care for slots alone.
    pub slot_complaint: parking_lot::Mutex<Option<String>>,
    /// Members that were last said to share a slot. Of the care for slots alone.
    pub shared_slot: parking_lot::Mutex<Option<String>>,
    /// Parameters that wait for a restart, in Patroni's form. Written after each reload and start.
    pub pending_restart: parking_lot::Mutex<Option<serde_json::Value>>,
}

/// The signals by which the agent's tasks wake each other.
#[derive(Debug, Default)]
pub struct Signals {
    /// Asks for a look at the server now.
    pub look: Arc<Notify>,
    /// Asks the driver for a cycle now.
    pub cycle: Arc<Notify>,
    /// Asks the reader of the agent's file to read it again.
    pub reread: Arc<Notify>,
    /// Cancelled: the settings have changed, and the driver ends as soon as nothing is under way.
    pub renew: CancellationToken,
}

//! The words in which pools are told what happened and say what to do.

use std::time::Duration;

use kornak_cluster::Moment;

/// A startup packet on a listener.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct KindId(pub u32);

/// A place for one server connection, from the order to open it to its end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct SlotId(pub u32);

/// A client; it waits for one connection at a time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct MemberId(pub u32);

/// A role and a database on a listener.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct PoolId(pub u32);

/// Bounds and patience of one listener's pools.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Server connections of one pool.
    pub pool_size: usize,
    /// Server connections of the whole listener.
    pub max_servers: usize,
    /// How long a client waits while all connections are busy.
    pub wait_timeout: Duration,
    /// How long it waits while there is no connection at all.
    pub hold_timeout: Duration,
    /// After this long a waiting client is told; `None`: never.
    pub notice_after: Option<Duration>,
    /// An idle connection is closed after this long; `None`: never.
    pub idle_timeout: Option<Duration>,
}

/// An event that the pools are told of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Event {
    /// A client of this kind, on this thread, wants a connection.
    Ask { member: MemberId, kind: KindId, lane: usize },
    /// The client does not want a connection any more.
    Withdraw { member: MemberId, kind: KindId },
    /// A connection that was to be opened is there; it is closed at its first rest after `expires`.
    Opened { slot: SlotId, expires: Moment },
    /// The connection could not be opened, and another try would not help this login.
    Failed { slot: SlotId },
    /// A client has given its connection back, fit for the next.
    Released { slot: SlotId },
    /// A connection is closed: by its client's fault, or because it was found dead or outdated.
    Gone { slot: SlotId },
    /// Somebody changes a database, for which nobody may be connected to it who would not be without
    /// a pool: of each kind as many connections are kept as it has clients.
    Spare,
    /// Time passes.
    Tick,
}

/// An effect that the shell carries out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Effect {
    /// Hand the connection to the client.
    Give { slot: SlotId, member: MemberId },
    /// Open a connection on this thread.
    Open { slot: SlotId, kind: KindId, lane: usize },
    /// Close an idle connection. Its place is free already.
    Close { slot: SlotId },
    /// Tell the client that it waits, and how many are in front of it.
    Notice { member: MemberId, ahead: usize },
    /// Have the client, which has waited for a while, see whether it is still there.
    Look { member: MemberId },
    /// The client's time is up: all connections are busy, or there is none.
    Expire { member: MemberId, why: Expired },
    /// The login that failed was for this client.
    Refuse { member: MemberId, slot: SlotId },
}

/// Why a client waited in vain.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Expired {
    /// Others had all connections.
    Busy,
    /// There was none.
    NoServer,
}

/// The counts of a pool, for people.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct PoolCount {
    pub clients: usize,
    pub waiting: usize,
    pub idle: usize,
    pub lent: usize,
    pub opening: usize,
    /// How long the oldest has waited.
    pub longest_wait: Duration,
}

//! The decisions of an agent, with their reasons.

use std::time::Duration;

use kornak_cluster::{Leadership, Lsn};

use super::depose::Reason;
use super::upstream::Source;

/// The next step of a node.
#[must_use = "a decision that nobody applies is a bug"]
#[derive(Debug, Clone, PartialEq)]
pub struct Decision {
    /// The step. Applying it twice must be the same as applying it once.
    pub action: Action,
    /// Logged with the step and shown to the operator.
    pub why: Why,
    /// The longest time the driver may sleep before it looks again.
    pub recheck: Duration,
}

/// One step.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Action {
    /// Do nothing.
    Wait,
    /// Claim the right to bootstrap, then create the cluster.
    Bootstrap,
    /// Make a copy of this member's server.
    Clone { from: String },
    /// Make a copy although nobody leads, by a method that needs no running member.
    CloneWithoutLeader,
    /// Bring the stopped server back as a standby: rewind or clone it again if it has diverged.
    Rejoin { leader: Option<String> },
    /// Start the stopped server in place as primary.
    StartPrimary,
    /// Copy logical slots from the leader, for which the standby restarts.
    CopySlots,
    /// Replicate from there from now on; no restart.
    Follow { upstream: Source },
    /// The cluster becomes a standby cluster: stop the primary in order and let it follow the remote
    /// one. The key is kept.
    DemoteCluster,
    /// Look at the server again at once: what is waited for is about to arrive.
    Look,
    /// Promise to acknowledge nothing more to this leadership, which seems lost.
    Pledge(Leadership),
    /// Take that promise back, or forget it once it has no object any more.
    EndPledge,
    /// Take the leader key from a leader that can acknowledge nothing any more, and name who may race.
    Depose,
    /// Ask the other members where they stand.
    AskPeers,
    /// Create the leader key.
    Claim { take_over: bool },
    /// Make the server primary; the lease is ours.
    Promote,
    /// Stop the server and every process of it, fast or at once.
    Demote { immediate: bool },
    /// Give the leader key up so that another member takes it.
    Release,
    /// Keep leading: publish, adjust synchronous standbys, slots.
    Lead,
    /// Stay out of it and say so: a person must act.
    Refuse,
}

/// Why a step was chosen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Why {
    StoreNeverRead,
    ConfigUnknown,
    StoreFull,
    BusyWith(super::snapshot::Job),
    Paused,
    // the data directory
    ClusterIsNew,
    MembersWithoutCluster,
    InitializeUnknown,
    OtherBootstraps,
    WaitingForLeader,
    NothingHereYet,
    DataDirUnusable,
    WrongSystemIdentifier,
    // leading
    Healthy,
    WonLease,
    LeaseUnproven,
    LeaseBeingProven,
    ViewBehindLease,
    SyncNotOurs,
    LeaseLost,
    OtherLeads,
    LeaderKeyFree,
    KeyIsOursServerIsDown,
    StandbyHasEverything,
    NoTimeToStart,
    DoesNotStart,
    StartsTooLong,
    SilentTooLong,
    StandbyCluster,
    // following
    LeaderKnown,
    AlreadyFollows,
    /// The leader has logical slots that this standby lacks.
    SlotsMissing,
    UpstreamChanged,
    ReplicationBroken,
    Deposal(Reason),
    ServerDown,
    ServerStarting,
    ServerSilent,
    ServerClosed,
    StillStopping,
    ProcessesLeft,
    // racing
    PeersUnknown,
    MostAdvanced,
    NamedCandidate,
    NoFailoverTag,
    NoWatchdog,
    PromisedFailsafe,
    NotInFailsafeList,
    FailsafeUnknown,
    LostRecently,
    NotSynchronous,
    SyncUnknown,
    HandoverUnknown,
    QuorumMissing {
        votes: u32,
        needed: u32,
    },
    TooFarBehind {
        lag_bytes: u64,
    },
    TimelineBehind,
    OtherIsPrimary,
    PeerAhead {
        position: Lsn,
    },
    OwnWalUnread,
    PeerPreferred,
    OtherIsCandidate,
    CandidateLacksWal {
        needed: Lsn,
    },
    UnfencedPrimary,
    UnfencedRuns,
    UnfencedUnheard {
        left: Duration,
    },
    LeavesUnfenced,
    StoreLost,
}

const FAILSAFE_UNKNOWN: &str = "the key failsafe is missing or makes no sense, so it is not known whom a leader without \
    the store asks: make sure that the last leader is down and name the next one (failover), or write the key again";

impl Why {
    /// A sentence for the operator's log.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::StoreNeverRead => "the store has not been read yet",
            Self::ConfigUnknown => {
                "the configuration in the store makes no sense, and no good one is known: write it again"
            }
            Self::StoreFull => {
                "the store takes no writes, a key that is given up could not be claimed"
            }
            Self::BusyWith(_) => "a step is under way",
            Self::Paused => "the cluster is in maintenance mode",
            Self::ClusterIsNew => "the cluster does not exist yet",
            Self::MembersWithoutCluster => {
                "members with data are published although the key initialize is missing: let them lead, or \
                 remove the cluster's keys (kornak remove) to create a new one"
            }
            Self::InitializeUnknown => {
                "the key initialize makes no sense: write the system identifier, or delete it"
            }
            Self::OtherBootstraps => "another node is creating the cluster",
            Self::WaitingForLeader => "waiting for a leader",
            Self::NothingHereYet => "the data directory is empty",
            Self::DataDirUnusable => "the data directory cannot be used",
            Self::WrongSystemIdentifier => "the data directory belongs to another cluster",
            Self::Healthy => "leading with a proven lease",
            Self::WonLease => "the leader key is ours",
            Self::LeaseUnproven => "the lease could not be proven in time",
            Self::ViewBehindLease => "what was read is older than our claim",
            Self::SyncNotOurs => "the store names synchronous standbys of another leader",
            Self::LeaseBeingProven => "the leader key bears our name, its lease is not proven yet",
            Self::LeaseLost => "the leader key is not ours any more",
            Self::OtherLeads => "another node leads",
            Self::LeaderKeyFree => "the leader key is free and this server is primary",
            Self::KeyIsOursServerIsDown => "the leader's server is down",
            Self::StandbyHasEverything => "a synchronous standby can take over at once",
            Self::NoTimeToStart => "a failover is preferred to starting in place",
            Self::DoesNotStart => "the leader's server does not come up",
            Self::StartsTooLong => {
                "the leader's server takes too long to start, and another can lead"
            }
            Self::SilentTooLong => {
                "the leader's server has not answered for too long, and another can lead"
            }
            Self::StandbyCluster => "this is a standby cluster",
            Self::LeaderKnown => "joining the leader",
            Self::AlreadyFollows => "following the leader",
            Self::SlotsMissing => "logical slots are missing",
            Self::UpstreamChanged => "the leader has changed",
            Self::ReplicationBroken => "replication does not come up",
            Self::Deposal(reason) => reason.as_str(),
            Self::ServerDown => "the server is down",
            Self::ServerStarting => "the server is starting",
            Self::ServerSilent => "the server does not answer",
            Self::ServerClosed => "the server does not let the agent in",
            Self::StillStopping => "the server has shut down and has not ended",
            Self::ProcessesLeft => "processes of the server are left",
            Self::PeersUnknown => "the other members have not been asked",
            Self::MostAdvanced => "no other member has more",
            Self::NamedCandidate => "named as the candidate",
            // Patroni's words, and the reason.
            Self::NoFailoverTag => {
                "following a different leader because I am not allowed to promote (tagged nofailover)"
            }
            Self::NoWatchdog => "the watchdog that is required is not there",
            Self::PromisedFailsafe => "a leader without the store was promised to stay",
            Self::NotInFailsafeList => {
                "not a member of the list that a leader without the store asks"
            }
            Self::FailsafeUnknown => FAILSAFE_UNKNOWN,
            Self::LostRecently => "the last attempt to lead failed here",
            Self::NotSynchronous => "not a synchronous standby",
            Self::SyncUnknown => {
                "who may take over is not known: the key sync is missing or makes no sense; a failover to a \
                 member by name is still possible"
            }
            Self::HandoverUnknown => "the record of a planned switchover makes no sense",
            Self::QuorumMissing { .. } => "too few synchronous standbys could be compared with",
            Self::TooFarBehind { .. } => "too far behind the former leader",
            Self::TimelineBehind => "on an older timeline than the cluster",
            Self::OtherIsPrimary => "another member runs as primary",
            Self::PeerAhead { .. } => "another member has more",
            Self::OwnWalUnread => "the server has not read its own log to the end yet",
            Self::PeerPreferred => "another member has the same and a higher priority",
            Self::OtherIsCandidate => "another member is the candidate",
            Self::CandidateLacksWal { .. } => "not all of the former leader's WAL is here",
            Self::UnfencedPrimary
            | Self::UnfencedRuns
            | Self::UnfencedUnheard { .. }
            | Self::LeavesUnfenced => self.of_unfenced(),
            Self::StoreLost => "the store is away",
        }
    }

    /// Sentence for the reasons that concern a primary without a guard.
    const fn of_unfenced(self) -> &'static str {
        match self {
            Self::UnfencedRuns => {
                "a primary without a guard runs: start its agent or stop its server, or name the member that \
                 is to lead (failover)"
            }
            Self::UnfencedUnheard { .. } => {
                "a primary without a guard may be running, its server is given time to be heard of"
            }
            Self::LeavesUnfenced => {
                "leaving a primary without a guard, so that it can acknowledge nothing"
            }
            _ => "a primary without a guard may be running",
        }
    }
}

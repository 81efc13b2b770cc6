//! The properties of a world: drawn from its seed, with some of it pinned by the test.

use std::time::Duration;

use kornak_cluster::{SyncMode, Tags};
use serde_json::{Value, json};

use super::rng::Rng;

/// A promise of the design that is broken on purpose, to see that somebody notices.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mutation {
    /// The guard is told deadlines and does nothing.
    GuardNeverFires,
    /// The guard looks at its deadline once, and never again; it refuses nothing.
    GuardIsEdgeTriggered,
    /// The guard is armed by the first renewal after the server has become writable.
    GuardArmedTooLate,
    /// A renewed lease counts as leadership, to its very end.
    KeepaliveIsProof,
    /// The postmaster's exit counts as the server's.
    PostmasterGoneMeansStopped,
    /// The first candidate that asks is promoted, whether the store names it or not.
    CandidateIgnoresSync,
    /// A claim does not compare that the synchronous standbys are still those that were read.
    ClaimOnOldSync,
    /// A claim compares what is read when it is sent, which may not be what was decided on.
    ClaimOnAnotherView,
    /// A candidate counts nobody's vote.
    QuorumIgnored,
    /// Members say where they stand from memory, as of their last look at the server.
    AnswersFromMemory,
    /// A member whose server does not run counts as one that has nothing.
    DownCounts,
    /// Any process that answers at a member's address counts as that member.
    NameNotChecked,
    /// A standby that was restarted counts what it has replayed since as all that it has.
    RestartedCounts,
    /// Commits stop waiting for a standby before the store stops naming it.
    NamesBeforeStore,
    /// A write of the synchronous standbys without an answer counts as not done.
    OpenSyncWriteIgnored,
    /// Synchronous standbys are planned from what the store showed before our own last write.
    PlansFromOldView,
    /// A crashed primary starts in place while the store names its standbys as before.
    StartsBesideItsStandbys,
    /// Whether it has to name nobody first is read from a store that does not show all of its own writes yet.
    StandsAloneByAnOldView,
    /// A leader that takes its key up again is promoted while the store names its standbys as before.
    PromotedBesideItsStandbys,
    /// A promise to a leader without the store is forgotten by a restart.
    PromiseNotDurable,
    /// A promise to a leader without the store is not kept by a member that sees a leader key.
    PromiseForgottenWhileLeaderShows,
    /// Members that a leader without the store does not ask race nevertheless.
    FailsafeListIgnored,
    /// A leader that rests on its members' word adds a member that has not given it.
    ListGrowsOverTheMembersHeads,
    /// A server that was told to end recovery goes on with that when its agent gives the key back.
    PromotionGoesOn,
    /// A walsender that goes by older names seems to have read the new ones.
    NamesSeemRead,
    /// A configuration that is gone or makes no sense counts as the default one.
    ConfigGoneIsDefault,
    /// A renewal is believed to last as long as the configuration says, whatever was granted.
    ConfiguredLease,
    /// Maintenance mode, and the mark of a primary without a guard, are not seen.
    PauseIgnored,
    /// A leader whose server is down believes that nobody else can lead.
    NobodyElseCanLead,
    /// The lease of a leadership that was lost is renewed all the same.
    LostLeaseRenewed,
    /// A leadership is taken up again although its release was sent.
    ReleasedLeaseTakenUpAgain,
    /// A leader whose handover failed takes the key again without looking.
    GoesBackBlindly,
    /// Rewinds believe that whoever is named the leader in an old view of the store is a primary.
    RewindsToAnybody,
    /// So many voters promise as a candidate needs votes, and not one more.
    PledgesTooFew,
    /// A promise to acknowledge nothing to a lost leader is forgotten by a restart.
    PledgeNotDurable,
    /// A standby promises when its configuration names no upstream, though its server may still receive.
    PledgeBeforeTheStreamEnds,
    /// A promise tells where the member said that it stood some time ago.
    PledgeOfAnOldPosition,
    /// A promise is written whatever has become of the one before.
    PledgeOverWithdrawal,
    /// A standby follows a leader again without taking its promise back.
    WithdrawalNotSent,
    /// A withdrawal without an answer counts as done.
    WithdrawalUnknownIsDone,
    /// A deposal does not compare that the synchronous standbys are still those that have promised.
    DeposedByOldSync,
    /// A deposal does not compare that the promises still stand.
    DeposedByOldPledges,
    /// A deposal does not compare that the configuration, with maintenance mode, is the one that was read.
    DeposedInMaintenance,
    /// A deposal does not compare that there is neither a handover nor a primary without a guard.
    DeposedDuringHandover,
    /// A member that has promised to leave a leader lets it go on without the store.
    FencedAcceptsFailsafe,
    /// A proxy believes any leader key it is shown.
    ProxyWalksBack,
    /// A proxy sends a request again when it hears nothing.
    ProxySendsAgain,
}

impl Mutation {
    /// All of them.
    pub const ALL: [Self; 47] = [
        Self::GuardNeverFires,
        Self::GuardIsEdgeTriggered,
        Self::GuardArmedTooLate,
        Self::KeepaliveIsProof,
        Self::PostmasterGoneMeansStopped,
        Self::CandidateIgnoresSync,
        Self::ClaimOnOldSync,
        Self::ClaimOnAnotherView,
        Self::QuorumIgnored,
        Self::AnswersFromMemory,
        Self::DownCounts,
        Self::NameNotChecked,
        Self::RestartedCounts,
        Self::NamesBeforeStore,
        Self::OpenSyncWriteIgnored,
        Self::PlansFromOldView,
        Self::StartsBesideItsStandbys,
        Self::StandsAloneByAnOldView,
        Self::PromotedBesideItsStandbys,
        Self::PromiseNotDurable,
        Self::PromiseForgottenWhileLeaderShows,
        Self::FailsafeListIgnored,
        Self::ListGrowsOverTheMembersHeads,
        Self::PromotionGoesOn,
        Self::NamesSeemRead,
        Self::ConfigGoneIsDefault,
        Self::ConfiguredLease,
        Self::PauseIgnored,
        Self::NobodyElseCanLead,
        Self::LostLeaseRenewed,
        Self::ReleasedLeaseTakenUpAgain,
        Self::GoesBackBlindly,
        Self::RewindsToAnybody,
        Self::PledgesTooFew,
        Self::PledgeNotDurable,
        Self::PledgeBeforeTheStreamEnds,
        Self::PledgeOfAnOldPosition,
        Self::PledgeOverWithdrawal,
        Self::WithdrawalNotSent,
        Self::WithdrawalUnknownIsDone,
        Self::DeposedByOldSync,
        Self::DeposedByOldPledges,
        Self::DeposedInMaintenance,
        Self::DeposedDuringHandover,
        Self::FencedAcceptsFailsafe,
        Self::ProxyWalksBack,
        Self::ProxySendsAgain,
    ];
}

/// The settings of a world.
#[derive(Debug, Clone)]
pub struct Scenario {
    pub nodes: usize,
    pub proxies: usize,
    /// For each proxy.
    pub clients: usize,
    pub sync: SyncMode,
    pub strict: bool,
    pub sync_count: u32,
    pub failsafe: bool,
    pub ttl: Duration,
    pub max_lag_bytes: u64,
    /// How often an agent stalls between two instructions.
    pub stalls_per_mille: u64,
    /// How many times as often as usual messages are slow.
    pub slowness: usize,
    /// For each node.
    pub tags: Vec<Tags>,
    /// Faults happen until then.
    pub faults_until: Duration,
    /// Mean time between two faults.
    pub fault_every: Duration,
    /// Agents' observations of their servers are up to a second old, a standby that starts does not tell at once what it has,
    /// and a member's address may be another one's.
    pub untrue: bool,
    /// A walsender may go by older names for a while after they were changed.
    pub late_names: bool,
    /// A leader without a sign of life for so long is deposed by its standbys; zero: never.
    pub suspect_after: Duration,
    /// The configuration changes, and maintenance mode comes and goes.
    pub changing: bool,
    /// How long a leader's server may take to come up, and say nothing.
    pub start_timeout: Duration,
    pub mutation: Option<Mutation>,
}

/// The part of a [`Scenario`] that a test pins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Asynchronous,
    Synchronous,
    Strict,
    /// Any mode, with failsafe mode on and a store that is often away.
    Failsafe,
    /// Any mode, with switchovers all the time.
    Handover,
    /// Synchronous standbys come and go, the store is slow, and agents stall between instructions.
    Churn,
    /// Quorum mode, sometimes with standbys that come and go as in `Churn`.
    Quorum,
    /// Three nodes in quorum mode under load, whose answers need not be true ([`Scenario::untrue`]): one standby's stream
    /// stalls or its server goes down shortly before the leader's does.
    Untrue,
    /// Without failsafe mode the store is away for longer than a lease, again and again, and nothing else is slow: there is
    /// a leader soon after it is back.
    Outage,
    /// Any mode, with failsafe mode on: agents and servers are restarted while the store is away for longer than a lease.
    Away,
    /// Any mode: settings are changed at any time, maintenance mode comes and goes, keys are missing or make no sense for a
    /// while, and the store is full.
    Settings,
    /// Any mode: servers do not start, end as they start, or hang, for longer than a leader may wait.
    Disks,
    /// Any mode, three to five nodes: one rare situation after the other, each in a cluster that is well
    /// (`faults/scripts.rs`).
    Situations,
    /// As `Situations`, with those in which somebody acts on what another one has not seen (`faults/unseen.rs`).
    Unseen,
    /// Synchronous modes, in which standbys depose a leader that seems lost: it is lost, frozen or cut off for any time, and comes
    /// back at any step (`faults/lost.rs`).
    Fence,
}

impl Kind {
    /// All of them.
    pub const ALL: [Self; 15] = [
        Self::Asynchronous,
        Self::Synchronous,
        Self::Strict,
        Self::Failsafe,
        Self::Handover,
        Self::Churn,
        Self::Quorum,
        Self::Untrue,
        Self::Outage,
        Self::Away,
        Self::Settings,
        Self::Disks,
        Self::Situations,
        Self::Unseen,
        Self::Fence,
    ];
}

impl Scenario {
    /// Draws the settings.
    pub fn draw(rng: &Rng, kind: Kind, mutation: Option<Mutation>) -> Self {
        let untrue = kind == Kind::Untrue;
        let fence = kind == Kind::Fence;
        let quorum = kind == Kind::Quorum || untrue || (fence && rng.chance(500));
        let churn = kind == Kind::Churn || (kind == Kind::Quorum && rng.chance(500));
        let situations = matches!(kind, Kind::Situations | Kind::Unseen);
        let nodes = if churn || quorum || situations { 3 + rng.below(3) } else { 2 + rng.below(4) };
        let mode = match kind {
            Kind::Asynchronous => 0,
            Kind::Synchronous => 1,
            Kind::Strict => 2,
            Kind::Churn | Kind::Quorum | Kind::Untrue | Kind::Fence => 1 + rng.below(2),
            Kind::Situations | Kind::Unseen => [0, 0, 1, 1, 2][rng.below(5)],
            Kind::Failsafe
            | Kind::Handover
            | Kind::Outage
            | Kind::Away
            | Kind::Settings
            | Kind::Disks => rng.below(3),
        };
        let outage = kind == Kind::Outage;
        let often = if situations { 500 } else { 300 };
        let always = matches!(kind, Kind::Failsafe | Kind::Away);
        let failsafe = always || (rng.chance(often) && !outage);
        // With failsafe mode a promise lasts 20 s, whatever the ttl.
        let ttl = Duration::from_secs(5 + rng.below(if failsafe { 12 } else { 6 }) as u64);
        let ttl = if situations { Duration::from_secs(8 + rng.below(4) as u64) } else { ttl };
        // Longer than all that a fence may take.
        let ttl = if fence { Duration::from_secs(12 + rng.below(9) as u64) } else { ttl };
        let nodes = if untrue { 3 } else { nodes };
        Self {
            nodes,
            proxies: 1 + rng.below(2),
            clients: if untrue || situations || fence { 4 } else { 1 + rng.below(2) },
            sync: match mode {
                0 => SyncMode::Off,
                _ if quorum => SyncMode::Quorum,
                _ => SyncMode::On,
            },
            strict: mode == 2,
            sync_count: 1 + u32::from(!untrue && rng.chance(250)),
            failsafe,
            ttl,
            max_lag_bytes: 1_048_576,
            slowness: match rng.below(4) {
                _ if situations => 1,
                0 if fence => 3,
                0 => 8,
                1 if churn => 30,
                _ => 1,
            },
            tags: (0..nodes).map(|node| tags(rng, node, nodes)).collect(),
            faults_until: match kind {
                Kind::Fence => Duration::from_secs(40 + rng.below(40) as u64),
                _ if kind == Kind::Disks || situations => {
                    Duration::from_secs(90 + rng.below(60) as u64)
                }
                _ => Duration::from_secs(20 + rng.below(25) as u64),
            },
            fault_every: if untrue {
                rng.millis(3000, 7000)
            } else if kind == Kind::Disks {
                rng.millis(8000, 20_000)
            } else if outage {
                ttl
            } else if fence {
                rng.millis(4000, 12_000)
            } else if churn {
                rng.millis(300, 1500)
            } else {
                rng.millis(700, 6000)
            },
            stalls_per_mille: if churn { 25 } else { 4 },
            untrue,
            late_names: matches!(
                kind,
                Kind::Churn
                    | Kind::Quorum
                    | Kind::Settings
                    | Kind::Situations
                    | Kind::Unseen
                    | Kind::Fence
            ),
            changing: kind == Kind::Settings,
            suspect_after: if fence { Duration::from_secs(2) } else { suspected_everywhere() },
            start_timeout: Duration::from_secs(if kind == Kind::Disks { 15 } else { 300 }),
            mutation,
        }
    }

    /// Value of `config`.
    pub fn config(&self) -> Value {
        let ttl = self.ttl.as_secs();
        json!({
            "ttl": ttl, "loop_wait": 1, "retry_timeout": 2,
            "maximum_lag_on_failover": self.max_lag_bytes,
            "synchronous_mode": match self.sync {
                SyncMode::Off => json!(false),
                SyncMode::On => json!(true),
                SyncMode::Quorum => json!("quorum"),
            },
            "synchronous_mode_strict": self.strict,
            "synchronous_node_count": self.sync_count,
            "failsafe_mode": self.failsafe,
            "primary_start_timeout": self.start_timeout.as_secs(),
            "postgresql": {"use_slots": false, "use_pg_rewind": true},
        })
    }
}

/// `KORNAK_SUSPECT`: seconds, for worlds of the other kinds.
fn suspected_everywhere() -> Duration {
    Duration::from_secs(super::from_environment("KORNAK_SUSPECT").unwrap_or(0))
}

fn tags(rng: &Rng, node: usize, nodes: usize) -> Tags {
    let value = match rng.below(10) {
        0 if node == nodes - 1 && nodes > 2 => json!({"nofailover": true}),
        1 => json!({"failover_priority": 1 + rng.below(3)}),
        2 if nodes > 2 => json!({"sync_priority": 1 + rng.below(3)}),
        _ => json!({}),
    };
    serde_json::from_value(value).unwrap_or_default()
}

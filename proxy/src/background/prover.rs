//! Proves, once for all sessions, that a leader accepts writes.
//!
//! One task per group: it looks when the topology names another leader, when a session doubts the
//! last proof, and every few milliseconds while a promotion is under way. It keeps a connection to
//! the candidate of a planned switchover from the moment it is named, for a connection lives through
//! the promotion and then answers at once.

use std::collections::{BTreeSet, HashSet};
use std::sync::Arc;
use std::time::Duration;

use kornak_cluster::{Epoch, GroupId, HandoverPhase, Node, Timeline, Topology};
use kornak_protocol::sqlstate::TOO_MANY_CONNECTIONS;
use tokio_util::sync::CancellationToken;

use crate::background::primary_watch;
use crate::cluster::probe::{Facts, Prober};
use crate::cluster::standing::{Instance, Serving, Why};
use crate::net::backend::{Address, Connected, DialError};
use crate::shared::{Bar, Shared};
use crate::waiting::outage::is_soon_ended;

/// Pause between two looks at a server that is about to be promoted.
const PROMOTION_PAUSE: Duration = Duration::from_millis(5);

/// Looks in quick succession before the pause grows: two seconds.
const QUICK_LOOKS: u32 = 400;

/// Pause between looks at a server that does not answer, or not as wished.
const PAUSE: Duration = Duration::from_millis(50);

/// Pause between two looks whether what an earlier run has left prepared is ended: that takes its
/// coordinator some 50 ms, and everybody waits for it.
const FINISH_PAUSE: Duration = Duration::from_millis(20);

/// Looks at that pause, before it becomes a second: ten seconds.
const FINISH_LOOKS: u32 = 500;

/// Time for one look.
const LOOK_LIMIT: Duration = Duration::from_secs(1);

/// Starts a task for every group that appears.
pub async fn run(shared: Arc<Shared>, stop: CancellationToken) {
    let mut registered = shared.registered.subscribe();
    tokio::select! {
        _ = registered.wait_for(|registered| *registered) => {}
        () = stop.cancelled() => return,
    }
    let mut topology = shared.topology.subscribe();
    let mut known = HashSet::new();
    loop {
        let groups: Vec<GroupId> = topology.borrow_and_update().groups.keys().copied().collect();
        for group in groups {
            if known.insert(group) {
                let task = GroupProver::new(Arc::clone(&shared), group).run();
                tokio::spawn(primary_watch::keep(Arc::clone(&shared), group, stop.clone()));
                let stop = stop.clone();
                tokio::spawn(async move { stop.run_until_cancelled(task).await });
            }
        }
        tokio::select! {
            changed = topology.changed() => if changed.is_err() { return },
            () = stop.cancelled() => return,
        }
    }
}

/// The server that the topology asks us to prove.
#[derive(Debug, Clone, PartialEq)]
enum Wanted {
    /// Nothing to do before something changes.
    Rest,
    /// A planned switchover: nobody serves; stay connected to the candidate.
    Stand,
    /// Prove this one; `eagerly` while its promotion is under way.
    Prove { node: Arc<Node>, epoch: Epoch, eagerly: bool },
}

/// Decides which server has to prove itself.
fn question(
    cluster: &Topology,
    group: GroupId,
) -> (Option<(String, Epoch)>, Option<HandoverPhase>) {
    let leader = cluster.groups.get(&group).and_then(|group| group.leader.clone());
    (leader, cluster.handover.as_ref().map(|record| record.phase))
}

struct GroupProver {
    shared: Arc<Shared>,
    group: GroupId,
    /// To a server that was asked last and has not proven itself.
    open: Option<(Address, Connected)>,
    /// Of the servers that served, for comparison (docs/safety.md A12).
    identifier: Option<String>,
    timeline: Option<Timeline>,
}

impl GroupProver {
    fn new(shared: Arc<Shared>, group: GroupId) -> Self {
        let Bar { identifier, timeline } =
            shared.bars.lock().get(&group).cloned().unwrap_or_default();
        Self { shared, group, open: None, identifier, timeline }
    }

    async fn run(mut self) {
        let shared = Arc::clone(&self.shared);
        let mut topology = shared.topology.subscribe();
        let mut changes = shared.topology.subscribe();
        let group = self.group;
        let mut looks = 0u32;
        loop {
            // Registered before looking, so that no doubt is missed.
            let doubted = shared.doubted();
            tokio::pin!(doubted);
            doubted.as_mut().enable();
            let cluster = Arc::clone(&topology.borrow_and_update());
            let pause = match self.wanted(&cluster) {
                Wanted::Rest => {
                    looks = 0;
                    self.warm(&cluster).await;
                    None
                }
                Wanted::Stand => {
                    looks = 0;
                    self.warm(&cluster).await;
                    None
                }
                Wanted::Prove { node, epoch, eagerly } => {
                    looks = looks.saturating_add(1);
                    let before = question(&cluster, group);
                    let proven = tokio::select! {
                        proven = self.prove(&node, epoch) => proven,
                        // Another leader is named: this one may keep us waiting for seconds.
                        _ = changes.wait_for(|now| question(now, group) != before) => continue,
                    };
                    let quick = eagerly && looks < QUICK_LOOKS;
                    match proven {
                        true if self.is_unfinished() && looks < FINISH_LOOKS => Some(FINISH_PAUSE),
                        true if self.is_unfinished() => Some(LOOK_LIMIT),
                        true => Some(Duration::ZERO),
                        false if quick => Some(PROMOTION_PAUSE),
                        false => Some(PAUSE),
                    }
                }
            };
            let pausing = async {
                match pause {
                    Some(pause) => tokio::time::sleep(pause).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                () = pausing => {}
                () = &mut doubted, if pause.is_none() => {}
                changed = topology.changed() => if changed.is_err() { return },
            }
        }
    }

    fn wanted(&self, cluster: &Topology) -> Wanted {
        let handover = cluster.handover.as_ref().filter(|record| {
            record.is_understood() && record.group.unwrap_or(GroupId::COORDINATOR) == self.group
        });
        let phase = handover.map(|record| record.phase);
        if phase == Some(HandoverPhase::Switch) {
            self.shared.change_standing(self.group, |s| s.withdraw(Why::Handover, true));
            return Wanted::Stand;
        }
        let standings = self.shared.standings();
        let standing = standings.0.get(&self.group);
        let serving = standing.and_then(|standing| standing.serving.as_ref().ok());
        let last = standing.and_then(|standing| standing.last());
        let Some(group) = cluster.groups.get(&self.group) else { return Wanted::Rest };
        let Some((name, epoch)) = &group.leader else {
            // Unknown, not nobody: who served last goes on as long as it answers.
            return match last {
                Some(last) if serving.is_none() || self.shared.is_doubted(self.group) => {
                    let (node, epoch) = (Arc::clone(&last.node), last.epoch);
                    Wanted::Prove { node, epoch, eagerly: false }
                }
                _ => Wanted::Rest,
            };
        };
        let moved = last.is_some_and(|last| *last.name != **name);
        if moved {
            self.shared.change_standing(self.group, |s| s.withdraw(Why::Unproven, true));
        }
        let same = serving
            .is_some_and(|s| *s.name == **name && s.epoch == *epoch && s.unfinished.is_empty());
        if same && !self.shared.is_doubted(self.group) {
            return Wanted::Rest;
        }
        let node = match group.nodes.get(name) {
            Some(node) => Arc::new(node.clone()),
            // Its member key has expired; its address has not changed.
            None => match last.filter(|last| *last.name == **name) {
                Some(last) => Arc::clone(&last.node),
                None => return Wanted::Rest,
            },
        };
        let eagerly = moved || phase == Some(HandoverPhase::Promote) || last.is_none();
        Wanted::Prove { node, epoch: *epoch, eagerly }
    }

    /// Connects to the candidate of a switchover, so that it need not be dialled later.
    async fn warm(&mut self, cluster: &Topology) {
        let Some(record) = &cluster.handover else {
            self.open = None;
            return;
        };
        let candidate = record.candidate.as_ref();
        let group = cluster.groups.get(&self.group);
        let node = candidate.and_then(|name| group?.nodes.get(name));
        let Some(node) = node.filter(|_| self.shared.prober.can_ask()) else { return };
        let at = Address::from(node);
        if self.open.as_ref().is_some_and(|(address, _)| *address == at) {
            return;
        }
        self.open = self.shared.prober.connect(&at, LOOK_LIMIT).await.ok().map(|c| (at, c));
    }

    async fn prove(&mut self, node: &Arc<Node>, epoch: Epoch) -> bool {
        let facts = match self.look(node).await {
            Ok(facts) => facts,
            Err(error) => return self.serves_without_answer(node, epoch, &error),
        };
        let known = self.identifier.as_deref();
        let cluster = self.shared.topology();
        let group = cluster.groups.get(&self.group);
        let initialized = group.and_then(|group| group.system_identifier.as_deref());
        let refused = if facts.in_recovery {
            Some(Why::ReadOnly)
        } else if !facts.instance.may_serve(known, self.timeline, initialized) {
            Some(Why::Foreign)
        } else {
            None
        };
        if let Some(why) = refused {
            let trouble = (why == Why::Foreign).then(|| why.as_str().to_owned());
            if trouble.is_some() && self.shared.set_trouble("leader", trouble) {
                tracing::error!(node = %node.name, why = why.as_str(), "leader's answers rejected");
            }
            self.shared.change_standing(self.group, |s| s.withdraw(why, false));
            return false;
        }
        self.shared.set_trouble("leader", None);
        let mut unfinished = facts.prepared;
        unfinished.retain(|it| cluster.groups.len() > 1 && is_soon_ended(&cluster, it));
        self.identifier = facts.instance.system_identifier.clone().or(self.identifier.take());
        self.timeline = facts.instance.timeline.or(self.timeline);
        let name: Arc<str> = node.name.as_str().into();
        let timeline = facts.instance.timeline.map(|timeline| timeline.0);
        let new = self.shared.standings().serving(self.group).is_err();
        if new {
            tracing::info!(node = %name, group = self.group.0, epoch = epoch.revision.0, timeline, "leader accepts writes");
        }
        let instance = facts.instance;
        let serving = Serving { node: Arc::clone(node), name, epoch, instance, unfinished };
        self.shared.change_standing(self.group, |s| s.prove(serving));
        if !self.is_unfinished() {
            self.open = None;
        }
        true
    }

    /// Whether the leader goes on serving although it has not said what is asked of it.
    fn serves_without_answer(&self, node: &Arc<Node>, epoch: Epoch, error: &DialError) -> bool {
        let serving = self.shared.standings().serving(self.group).ok().cloned();
        let itself = serving.as_ref().filter(|serving| *serving.name == *node.name);
        match (error, itself) {
            // Full, and alive: who has proven itself in this term goes on.
            (DialError::Refused { sqlstate: TOO_MANY_CONNECTIONS, .. }, Some(serving)) => {
                let serving = Serving { epoch, ..Serving::clone(serving) };
                self.shared.change_standing(self.group, |s| s.prove(serving));
                true
            }
            (error, _) if error.is_ours() => {
                let trouble = Some(format!("the leader cannot be asked: {error}"));
                if self.shared.set_trouble("leader", trouble) {
                    tracing::error!(node = %node.name, error = error as &dyn std::error::Error, "leader could not be asked");
                }
                // Nothing is known that was not known before.
                serving.is_some()
            }
            (error, _) => {
                tracing::debug!(node = %node.name, error = error as &dyn std::error::Error, "leader does not answer");
                let trouble = (!error.is_about_server()).then(|| error.to_string());
                if self.shared.set_trouble("leader", trouble) {
                    tracing::error!(node = %node.name, error = error as &dyn std::error::Error, "leader refuses the proxy's own login");
                }
                self.shared.change_standing(self.group, |s| s.withdraw(Why::Silent, false));
                false
            }
        }
    }

    /// Whether the server that serves has transactions of an earlier run that nobody has ended.
    fn is_unfinished(&self) -> bool {
        let standings = self.shared.standings.borrow();
        standings.serving(self.group).is_ok_and(|serving| !serving.unfinished.is_empty())
    }

    async fn look(&mut self, node: &Node) -> Result<Facts, DialError> {
        let at = Address::from(node);
        let prober = &self.shared.prober;
        if !prober.can_ask() {
            prober.knock(&at, LOOK_LIMIT).await?;
            // Nobody to ask: the store's word has to do.
            return Ok(Facts {
                in_recovery: !node.says_primary,
                instance: Instance { timeline: node.timeline, ..Instance::default() },
                lsn: None,
                prepared: BTreeSet::new(),
            });
        }
        if let Some((address, mut connected)) = self.open.take()
            && address == at
            && let Ok(facts) = Prober::look(&mut connected, LOOK_LIMIT).await
        {
            self.open = Some((at, connected));
            return Ok(facts);
        }
        let mut connected = prober.connect(&at, LOOK_LIMIT).await?;
        let facts = Prober::look(&mut connected, LOOK_LIMIT).await?;
        self.open = Some((at, connected));
        Ok(facts)
    }
}

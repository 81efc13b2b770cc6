//! Without a store: roles are found by asking the servers of a list.
//!
//! There is no term of leadership to go by, so a new primary is accepted only if it is of the same
//! cluster and on a higher timeline than the last one, or is the same server; two that both accept
//! writes on the same timeline leave everything as it was and raise an alarm. Safety sentences 1 and
//! 5 are not promised in this mode (docs/safety.md A12).

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::join_all;
use kornak_cluster::topology::Group;
use kornak_cluster::{Epoch, GroupId, Lsn, Node, NodeRole, Revision, Timeline, Topology};
use kornak_config::proxy::StaticMember;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::cluster::probe::{Facts, Prober};
use crate::net::backend::{Address, Connected, DialError};
use crate::shared::Shared;

/// Pause between two rounds while all is well.
const CALM: Duration = Duration::from_secs(1);

/// Pause while there is no primary.
const SEEKING: Duration = Duration::from_millis(50);

/// Time for one server's answer.
const LOOK_LIMIT: Duration = Duration::from_secs(1);

/// The result of asking the servers of the list.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Finding {
    /// This one is primary.
    Primary(String),
    /// Nobody accepts writes.
    Nobody,
    /// Two of them do, and nothing tells them apart.
    Ambiguous(String, String),
}

/// The last primary that was accepted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Accepted {
    pub name: String,
    pub timeline: Option<Timeline>,
    pub identifier: Option<String>,
}

/// Finds the primary among what servers say of themselves. Pure.
pub fn find(said: &BTreeMap<String, Facts>, last: Option<&Accepted>) -> Finding {
    let eligible = |(name, facts): &(&String, &Facts)| {
        let Some(last) = last else { return !facts.in_recovery };
        let higher = match (facts.instance.timeline, last.timeline) {
            (Some(now), Some(before)) => now > before,
            _ => false,
        };
        let follows = facts.instance.may_follow(last.identifier.as_deref(), last.timeline);
        !facts.in_recovery && follows && (higher || **name == last.name)
    };
    let mut writable: Vec<_> = said.iter().filter(eligible).collect();
    writable.sort_by_key(|(_, facts)| facts.instance.timeline);
    match (writable.pop(), writable.pop()) {
        (Some((a, first)), Some((b, second)))
            if first.instance.timeline == second.instance.timeline =>
        {
            Finding::Ambiguous(a.clone(), b.clone())
        }
        (Some((name, _)), _) => Finding::Primary(name.clone()),
        (None, _) => Finding::Nobody,
    }
}

/// A server to ask.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Listed {
    pub member: StaticMember,
    pub noloadbalance: bool,
    /// By what somebody else said of it; believed only if nobody can be asked.
    pub leads: bool,
}

/// The servers of the file; without a role to ask with, the first one counts as the primary.
pub fn listed(members: &[StaticMember]) -> Vec<Listed> {
    let listed = |(n, member): (usize, &StaticMember)| Listed {
        member: member.clone(),
        noloadbalance: false,
        leads: n == 0,
    };
    members.iter().enumerate().map(listed).collect()
}

/// Asks the servers of a list that may change, until told to stop.
pub async fn run(
    shared: Arc<Shared>,
    mut members: watch::Receiver<Vec<Listed>>,
    stop: CancellationToken,
) {
    if !shared.prober.can_ask() {
        stop.run_until_cancelled(believe(&shared, members)).await;
        return;
    }
    let mut askers: Vec<Asker> = Vec::new();
    let mut last: Option<Accepted> = None;
    let mut terms = 0;
    loop {
        keep_up(&mut askers, &members.borrow_and_update());
        let answers = join_all(askers.iter_mut().map(|asker| asker.ask(&shared.prober))).await;
        let mut said = BTreeMap::new();
        let mut refusal = None;
        for (asker, answer) in askers.iter_mut().zip(answers) {
            asker.answers = answer.as_ref().err().is_none_or(|error| !error.is_about_server());
            match answer {
                Ok(facts) => drop(said.insert(asker.name().to_owned(), facts)),
                Err(error) if asker.answers => {
                    refusal = Some(format!("{}: {error}", asker.name()));
                }
                Err(_) => {}
            }
        }
        if shared.set_trouble("servers", refusal.clone()) {
            let why = refusal.unwrap_or_default();
            tracing::error!(%why, "server refuses the proxy's own login");
        }
        let finding = find(&said, last.as_ref());
        let seeking = !matches!(finding, Finding::Primary(_));
        shared.set_trouble("static", None);
        match finding {
            Finding::Primary(name) => {
                let facts = said.get(&name);
                let instance = facts.map(|facts| facts.instance.clone()).unwrap_or_default();
                let (timeline, identifier) = (instance.timeline, instance.system_identifier);
                let accepted = Accepted { name, timeline, identifier };
                if last.as_ref() != Some(&accepted) {
                    terms += 1;
                    tracing::info!(node = %accepted.name, "primary found");
                    last = Some(accepted);
                }
            }
            Finding::Nobody => {}
            Finding::Ambiguous(a, b) => {
                let text = format!("both {a} and {b} accept writes on the same timeline");
                tracing::error!(node = %a, other = %b, "two servers accept writes on one timeline");
                shared.set_trouble("static", Some(text));
            }
        }
        shared.set_topology(Arc::new(topology(&askers, &said, last.as_ref(), terms)));
        let pause = if seeking { SEEKING } else { CALM };
        tokio::select! {
            () = tokio::time::sleep(pause) => {}
            () = shared.doubted() => {}
            // Nobody sends any more: the list of a file never changes.
            Ok(()) = members.changed() => {}
            () = stop.cancelled() => return,
        }
    }
}

/// Adapts the askers to the list; connections of servers that stay are kept.
fn keep_up(askers: &mut Vec<Asker>, members: &[Listed]) {
    let mut before = std::mem::take(askers);
    for listed in members {
        let same = before.iter().position(|asker| asker.listed.member == listed.member);
        let mut asker = match same {
            Some(n) => before.swap_remove(n),
            None => Asker::new(listed.clone()),
        };
        asker.listed.clone_from(listed);
        askers.push(asker);
    }
}

fn topology(
    askers: &[Asker],
    said: &BTreeMap<String, Facts>,
    last: Option<&Accepted>,
    terms: u64,
) -> Topology {
    let leader = last.map(|last| last.name.as_str());
    let written: Option<Lsn> = leader.and_then(|name| said.get(name)?.lsn);
    let nodes = askers.iter().map(|Asker { listed, answers, .. }| {
        let name = &listed.member.name;
        let leads = leader == Some(name.as_str());
        let replayed = said.get(name).and_then(|facts| facts.lsn);
        let lag_bytes = written.zip(replayed).map(|(w, r)| w.bytes_ahead_of(r));
        (name.clone(), node_of(listed, leads, *answers, lag_bytes))
    });
    let group = Group {
        nodes: nodes.collect(),
        leader: leader.map(|name| (name.to_owned(), Epoch { store: 0, revision: Revision(terms) })),
        system_identifier: last.and_then(|last| last.identifier.clone()),
    };
    let groups = [(GroupId::COORDINATOR, Arc::new(group))].into();
    Topology { groups, ..Topology::default() }
}

fn node_of(listed: &Listed, leads: bool, running: bool, lag_bytes: Option<u64>) -> Node {
    let member = &listed.member;
    Node {
        name: member.name.clone(),
        group: GroupId::COORDINATOR,
        host: member.host.as_str().into(),
        port: member.port,
        role: if leads { NodeRole::Primary } else { NodeRole::Standby },
        running,
        says_primary: leads,
        lag_bytes,
        noloadbalance: listed.noloadbalance,
        timeline: None,
        api_base: String::new(),
        kornak: false,
    }
}

/// Nobody may be asked (no `auth.user`): what the list says counts.
async fn believe(shared: &Shared, mut members: watch::Receiver<Vec<Listed>>) {
    let what = "roles cannot be asked for without auth.user: what the list of members says counts";
    tracing::warn!("roles cannot be asked for without auth.user");
    let mut last: Option<String> = None;
    let mut terms = 0;
    loop {
        let list = members.borrow_and_update().clone();
        let trouble = (list.len() > 1).then(|| what.to_owned());
        shared.set_trouble("static", trouble);
        let leader = list.iter().find(|listed| listed.leads).map(|l| l.member.name.clone());
        if leader.is_some() && leader != last {
            terms += 1;
            last = leader;
        }
        let nodes = list.iter().map(|listed| {
            let name = listed.member.name.clone();
            let node = node_of(listed, last.as_ref() == Some(&name), true, None);
            (name, node)
        });
        let leader = last.clone().map(|name| (name, Epoch { store: 0, revision: Revision(terms) }));
        let group = Group { nodes: nodes.collect(), leader, system_identifier: None };
        let groups = [(GroupId::COORDINATOR, Arc::new(group))].into();
        shared.set_topology(Arc::new(Topology { groups, ..Topology::default() }));
        if members.changed().await.is_err() {
            return;
        }
    }
}

struct Asker {
    listed: Listed,
    connected: Option<Connected>,
    /// The server answered when asked last, be it by a refusal.
    answers: bool,
}

impl Asker {
    fn new(listed: Listed) -> Self {
        Self { listed, connected: None, answers: false }
    }

    fn name(&self) -> &str {
        &self.listed.member.name
    }

    async fn ask(&mut self, prober: &Prober) -> Result<Facts, DialError> {
        if let Some(mut connected) = self.connected.take()
            && let Ok(facts) = Prober::look(&mut connected, LOOK_LIMIT).await
        {
            self.connected = Some(connected);
            return Ok(facts);
        }
        let member = &self.listed.member;
        let at = Address { host: member.host.as_str().into(), port: member.port };
        let mut connected = prober.connect(&at, LOOK_LIMIT).await?;
        let facts = Prober::look(&mut connected, LOOK_LIMIT).await?;
        self.connected = Some(connected);
        Ok(facts)
    }
}

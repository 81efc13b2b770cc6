//! The store, as the shipped agent asks it.

use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use kornak_agent::ha::sync::Names;
use kornak_cluster::{Handover, Member, Pledge, RaftTerm, Revision, SyncState};
use kornak_dcs::keys::Keys;
use kornak_dcs::{
    Compare, Dcs, DcsError, DcsFuture, Follow, Granted, KeyValue, LeaseId, Op, Remaining, Renewed,
    Txn, TxnOutcome, View,
};
use tokio::sync::watch;

use super::Life;
use crate::sim::faults::unseen::{self, Fate};
use crate::sim::faults::{lost, scripts};
use crate::sim::net::End;
use crate::sim::postgres;
use crate::sim::scenario::Mutation;
use crate::sim::store;
use crate::sim::world::World;

/// A client of the store.
#[derive(Debug)]
pub struct Store {
    pub life: Life,
    /// The contents that the agent has been shown.
    pub view: watch::Receiver<Arc<View>>,
}

impl Store {
    fn ask<T: Send + 'static>(
        &self,
        work: impl AsyncFnOnce(&Rc<World>, End) -> Result<T, DcsError> + 'static,
    ) -> DcsFuture<'static, T> {
        let life = self.life;
        life.ask(async move |w| {
            life.step(&w).await;
            let answer = work(&w, End::Host(life.host)).await;
            life.step(&w).await;
            answer
        })
    }
}

impl Dcs for Store {
    fn range(&self, prefix: &str) -> DcsFuture<'_, View> {
        let prefix = prefix.to_owned();
        self.ask(async move |w, from| store::range(w, from, prefix).await)
    }

    fn txn(&self, mut txn: Txn) -> DcsFuture<'_, TxnOutcome> {
        let (view, host) = (self.view.clone(), self.life.host);
        let life = self.life;
        self.ask(async move |w, from| {
            let about = About::new(&w.store.keys, &txn);
            if about.claims {
                scripts::at_claim(w, host);
                life.step(w).await;
            }
            if about.deposes {
                lost::at_deposal(w, host);
                life.step(w).await;
            }
            let fate = unseen::spring(w, host, &about);
            let Some(mutation) = w.plan.mutation else {
                let answer = send(w, from, txn, fate).await;
                if about.deposes {
                    lost::after_deposal(w, host);
                }
                return answer;
            };
            let view = Arc::clone(&view.borrow());
            if let Some(answer) = not_asked(w, host, mutation, &about, &view) {
                return Ok(answer);
            }
            change(w, host, mutation, &about, &mut txn, &view);
            let answer = send(w, from, txn, fate).await;
            told(mutation, &about, answer, &view)
        })
    }

    fn grant(&self, ttl: Duration) -> DcsFuture<'_, Granted> {
        self.ask(async move |w, from| store::grant(w, from, ttl).await)
    }

    fn keep_alive(&self, lease: LeaseId) -> DcsFuture<'_, Renewed> {
        self.ask(async move |w, from| {
            let mut renewed = store::keep_alive(w, from, lease).await?;
            if w.plan.mutation == Some(Mutation::ConfiguredLease) {
                let seconds = w.config.borrow()["ttl"].as_u64().unwrap_or_default();
                renewed.ttl = Duration::from_secs(seconds);
            }
            let blind = w.plan.mutation == Some(Mutation::KeepaliveIsProof);
            Ok(if blind { Renewed { raft_term: RaftTerm::NONE, ..renewed } } else { renewed })
        })
    }

    fn time_to_live(&self, lease: LeaseId) -> DcsFuture<'_, Remaining> {
        self.ask(async move |w, from| store::time_to_live(w, from, lease).await)
    }

    fn revoke(&self, lease: LeaseId) -> DcsFuture<'_, ()> {
        self.ask(async move |w, from| store::revoke(w, from, lease).await)
    }

    fn follow(&self, _: &str) -> Follow {
        Follow::new(self.view.clone(), None)
    }
}

async fn send(w: &Rc<World>, from: End, txn: Txn, fate: Fate) -> Result<TxnOutcome, DcsError> {
    match fate {
        Fate::AsUsual => store::txn(w, from, txn).await,
        Fate::Unanswered => {
            store::txn(w, from, txn).await?;
            Err(DcsError::Unknown { detail: "no answer".into() })
        }
        Fate::Late(delay) => {
            store::txn_late(w, from, txn, delay);
            std::future::pending().await
        }
    }
}

/// The purpose of a transaction.
pub struct About {
    /// The transaction creates the leader key.
    claims: bool,
    /// The transaction takes the leader key from a leader that seems lost.
    deposes: bool,
    /// The transaction writes a promise to acknowledge nothing to it.
    pledges: bool,
    /// The transaction withdraws it.
    withdraws: bool,
    /// The transaction only asks whether the leader key is ours.
    proves: bool,
    /// The synchronous standbys that it writes.
    sync: Option<SyncState>,
    /// The transaction asks so in the name of a proven leadership, before its server starts or is promoted.
    stands_alone: bool,
    /// The members that it lists for a leader without the store.
    pub lists: Option<BTreeSet<String>>,
    /// The transaction deletes the leader key in the name of whoever has it.
    pub releases: bool,
}

impl About {
    fn new(keys: &Keys, txn: &Txn) -> Self {
        let (leader, sync) = (keys.leader(), keys.sync());
        let put = |name: &String| {
            txn.then.iter().find_map(|op| match op {
                Op::Put { key, value, .. } if key == name => Some(value.clone()),
                _ => None,
            })
        };
        let created = |compare: &Compare| match compare {
            Compare::Created { key, revision } if *key == leader => Some(*revision),
            _ => None,
        };
        let created = txn.compare.iter().find_map(created);
        let deletes = txn.then.iter().any(|op| matches!(op, Op::Delete { key } if *key == leader));
        let deposes =
            deletes && put(&sync).is_some() && txn.compare.iter().any(|it| is_fence(keys, it));
        let promise = |op: &Op| match op {
            Op::Put { key, value, .. } if key.starts_with(&keys.fences()) => {
                serde_json::from_str::<Pledge>(value).ok()
            }
            _ => None,
        };
        let promise = txn.then.iter().find_map(promise);
        let sync = put(&sync).and_then(|text| serde_json::from_str(&text).ok());
        Self {
            claims: created == Some(Revision::NONE),
            deposes,
            pledges: promise.is_some_and(|promise| !promise.withdrawn),
            withdraws: promise.is_some_and(|promise| promise.withdrawn),
            proves: txn.then.is_empty() && created.is_some(),
            stands_alone: !deposes
                && sync.is_some()
                && created.is_some_and(|revision| !revision.is_none()),
            lists: put(&keys.failsafe())
                .and_then(|text| serde_json::from_str::<BTreeMap<String, String>>(&text).ok())
                .map(|list| list.into_keys().collect()),
            releases: !deposes
                && created.is_some_and(|revision| !revision.is_none())
                && txn.then.iter().any(|op| matches!(op, Op::Delete { key } if *key == leader)),
            sync,
        }
    }

    /// The transaction plans the synchronous standbys of a leader that serves.
    fn plans(&self) -> bool {
        self.sync.is_some() && !self.claims && !self.stands_alone && !self.deposes
    }

    /// The transaction does so, and names one.
    pub fn names_somebody(&self) -> bool {
        self.plans() && self.sync.as_ref().is_some_and(|sync| !sync.standbys().is_empty())
    }
}

/// Whether a promise is compared.
fn is_fence(keys: &Keys, compare: &Compare) -> bool {
    matches!(compare, Compare::Modified { key, .. } if key.starts_with(&keys.fences()))
}

/// Transactions that are not even sent, and their answer.
fn not_asked(
    w: &Rc<World>,
    host: usize,
    mutation: Mutation,
    about: &About,
    view: &View,
) -> Option<TxnOutcome> {
    let standby = w.hosts[host].disk.borrow().standby_signal;
    let skipped = match mutation {
        Mutation::KeepaliveIsProof => about.proves,
        Mutation::StartsBesideItsStandbys => about.stands_alone && !standby,
        Mutation::PromotedBesideItsStandbys => about.stands_alone && standby,
        Mutation::WithdrawalNotSent => about.withdraws,
        _ => false,
    };
    let done = || TxnOutcome {
        succeeded: true,
        revision: view.revision,
        raft_term: RaftTerm::NONE,
        gets: Vec::new(),
    };
    skipped.then(done)
}

fn revision_of(view: &View, key: &str) -> Revision {
    view.get(key).map_or(Revision::NONE, |found| found.mod_revision)
}

/// Changes what is sent, or what is done before.
fn change(
    w: &Rc<World>,
    host: usize,
    mutation: Mutation,
    about: &About,
    txn: &mut Txn,
    view: &View,
) {
    let (sync, handover) = (w.store.keys.sync(), w.store.keys.handover());
    match mutation {
        Mutation::ClaimOnOldSync if about.claims => {
            txn.compare.retain(|it| !matches!(it, Compare::Modified { key, .. } if *key == sync));
        }
        Mutation::ClaimOnAnotherView if about.claims => {
            for compare in &mut txn.compare {
                if let Compare::Modified { key, revision } = compare
                    && *key == sync
                {
                    *revision = revision_of(view, key);
                }
            }
        }
        Mutation::GoesBackBlindly if about.claims => {
            let record = txn.compare.iter().find_map(|it| match it {
                Compare::Value { key, value } if *key == handover => Some(value.clone()),
                _ => None,
            });
            txn.compare.retain(|it| !matches!(it, Compare::Value { key, .. } if *key == handover));
            // As it was when the server stopped, it thinks.
            let record = record.and_then(|text| serde_json::from_str::<Handover>(&text).ok());
            if let Some(record) = record.filter(|_| w.plan.sync != kornak_cluster::SyncMode::Off) {
                let standbys: Vec<String> = record.candidate.into_iter().collect();
                let state = SyncState::new(&w.hosts[host].name, &standbys);
                txn.then.push(Op::put(sync, serde_json::to_string(&state).unwrap_or_default()));
            }
        }
        Mutation::NamesBeforeStore if !about.claims && !about.stands_alone => {
            let Some(state) = &about.sync else { return };
            if w.hosts[host].server.borrow().is_primary() {
                let standbys = state.standbys();
                let waits = standbys.len().saturating_sub(state.quorum as usize);
                let names = Names::of(&standbys, waits, w.plan.sync, w.plan.strict).to_string();
                postgres::set_sync_names(w, host, &names);
            }
        }
        _ => change_deposal(w, host, mutation, about, txn, view),
    }
}

/// Changes what is sent to depose a leader, or to promise it.
fn change_deposal(
    w: &Rc<World>,
    host: usize,
    mutation: Mutation,
    about: &About,
    txn: &mut Txn,
    view: &View,
) {
    let keys = &w.store.keys;
    let of = |it: &Compare, wanted: &[String]| matches!(it, Compare::Modified { key, .. } if wanted.contains(key));
    match mutation {
        Mutation::DeposedByOldSync if about.deposes => {
            txn.compare.retain(|it| !of(it, &[keys.sync()]));
        }
        Mutation::DeposedByOldPledges if about.deposes => {
            txn.compare.retain(|it| !is_fence(keys, it));
        }
        Mutation::DeposedInMaintenance if about.deposes => {
            txn.compare.retain(|it| !of(it, &[keys.config()]));
        }
        Mutation::DeposedDuringHandover if about.deposes => {
            txn.compare.retain(|it| !of(it, &[keys.handover(), keys.unfenced()]));
        }
        Mutation::PledgeOverWithdrawal if about.pledges => {
            txn.compare.retain(|it| !is_fence(keys, it));
        }
        Mutation::PledgeOfAnOldPosition if about.pledges => {
            let member = view.get(&keys.member(&w.hosts[host].name));
            let said = member.and_then(|found| serde_json::from_str::<Member>(&found.value).ok());
            let Some(position) = said.and_then(|member| member.xlog_location) else { return };
            for op in &mut txn.then {
                if let Op::Put { value, .. } = op
                    && let Ok(pledge) = serde_json::from_str::<Pledge>(value)
                {
                    let old = Pledge { position, ..pledge };
                    *value = serde_json::to_string(&old).unwrap_or_default();
                }
            }
        }
        _ => {}
    }
}

/// Changes what is answered.
fn told(
    mutation: Mutation,
    about: &About,
    answer: Result<TxnOutcome, DcsError>,
    view: &View,
) -> Result<TxnOutcome, DcsError> {
    let planned = about.plans();
    match (mutation, answer) {
        (Mutation::OpenSyncWriteIgnored, Err(error)) if planned => {
            Err(DcsError::Unreachable { detail: error.to_string() })
        }
        (Mutation::PlansFromOldView | Mutation::StandsAloneByAnOldView, Ok(outcome)) if planned => {
            Ok(TxnOutcome { revision: view.revision.min(outcome.revision), ..outcome })
        }
        (Mutation::WithdrawalUnknownIsDone, Err(_)) if about.withdraws => Ok(TxnOutcome {
            succeeded: true,
            revision: view.revision,
            raft_term: RaftTerm::NONE,
            gets: Vec::new(),
        }),
        (_, answer) => answer,
    }
}

/// The part of the store that an agent is shown.
pub fn as_shown(w: &Rc<World>, host: usize, view: Arc<View>) -> Arc<View> {
    let keys = &w.store.keys;
    let everybody = || w.hosts.iter().map(|host| host.name.clone()).collect::<Vec<_>>();
    let (key, value) = match w.plan.mutation {
        Some(Mutation::CandidateIgnoresSync) if view.get(&keys.leader()).is_none() => {
            (keys.sync(), serde_json::to_string(&SyncState::new(&w.hosts[host].name, &everybody())))
        }
        Some(Mutation::QuorumIgnored) => {
            let Some(found) = view.get(&keys.sync()) else { return view };
            let Ok(state) = serde_json::from_str::<SyncState>(&found.value) else { return view };
            (keys.sync(), serde_json::to_string(&SyncState { quorum: 0, ..state }))
        }
        Some(Mutation::PledgesTooFew) => {
            let leads = view.get(&keys.leader()).map(|found| found.value.as_str());
            let Some(found) = view.get(&keys.sync()) else { return view };
            let Ok(state) = serde_json::from_str::<SyncState>(&found.value) else { return view };
            if leads.is_none_or(|leads| leads == w.hosts[host].name) {
                return view;
            }
            let quorum = state.quorum.saturating_sub(1);
            (keys.sync(), serde_json::to_string(&SyncState { quorum, ..state }))
        }
        Some(Mutation::ConfigGoneIsDefault) => {
            let said = view.get(&keys.config());
            if said.is_some_and(|found| found.value.len() > 2) {
                return view;
            }
            let ttl = w.plan.ttl.as_secs();
            return with(&view, keys.config(), &serde_json::json!({ "ttl": ttl }).to_string());
        }
        Some(Mutation::PauseIgnored) => {
            let mut changed = View::clone(&view);
            changed.keys.remove(&keys.unfenced());
            if let Some(found) = changed.keys.get_mut(&keys.config()) {
                found.value = found.value.replace("\"pause\":true", "\"pause\":false");
            }
            return Arc::new(changed);
        }
        Some(Mutation::NobodyElseCanLead) => return nobody_else(w, host, &view),
        Some(Mutation::FailsafeListIgnored) => {
            let Some(found) = view.get(&keys.failsafe()) else { return view };
            let list = serde_json::from_str::<BTreeMap<String, String>>(&found.value);
            let Ok(mut list) = list else { return view };
            let name = &w.hosts[host].name;
            list.entry(name.clone()).or_insert_with(|| format!("http://{name}:8008/patroni"));
            (keys.failsafe(), serde_json::to_string(&list))
        }
        _ => return view,
    };
    let mut changed = View::clone(&view);
    if let (Some(found), Ok(value)) = (changed.keys.get_mut(&key), value) {
        found.value = value;
    }
    Arc::new(changed)
}

/// With a key of this value.
fn with(view: &View, key: String, value: &str) -> Arc<View> {
    let mut changed = View::clone(view);
    let revision = changed.revision;
    let found = KeyValue {
        key: key.clone(),
        value: value.to_owned(),
        create_revision: revision,
        mod_revision: revision,
        lease: LeaseId::NONE,
    };
    changed.keys.insert(key, found);
    Arc::new(changed)
}

/// Every other member seems to be down.
fn nobody_else(w: &World, host: usize, view: &View) -> Arc<View> {
    let mut changed = View::clone(view);
    for other in w.hosts.iter().filter(|other| other.index != host) {
        if let Some(found) = changed.keys.get_mut(&w.store.keys.member(&other.name)) {
            found.value = found.value.replace("\"running\"", "\"stopped\"");
        }
    }
    Arc::new(changed)
}

/// Renews the last lease that this agent held for as long as the agent lives.
pub async fn renews_what_is_lost(w: Rc<World>, life: Life) {
    let mut last = None;
    loop {
        w.exec.sleep(Duration::from_secs(1)).await;
        let Some(agent) = w.hosts[life.host].agent.borrow().clone() else { continue };
        last = agent.keeper.held().map(|held| held.lease).or(last);
        if let Some(lease) = last {
            // An answer changes nothing.
            drop(store::keep_alive(&w, End::Host(life.host), lease).await);
        }
    }
}

/// A leader that rests on its members' word adds members that have not given it.
pub async fn lets_the_list_grow(w: Rc<World>, life: Life) {
    loop {
        w.exec.sleep(Duration::from_millis(20)).await;
        let keys = &w.store.keys;
        let Some(agent) = w.hosts[life.host].agent.borrow().clone() else { continue };
        let Some(held) = agent.keeper.held() else { continue };
        let view = Arc::clone(&agent.view.borrow());
        let all: BTreeMap<String, String> = view
            .below(&keys.member(""))
            .map(|(name, _)| (name.to_owned(), format!("http://{name}:8008/patroni")))
            .collect();
        let text = serde_json::to_string(&all).unwrap_or_default();
        if view.get(&keys.failsafe()).is_some_and(|found| found.value == text) {
            continue;
        }
        let mine = Compare::Lease { key: keys.leader(), lease: held.lease };
        let put = Txn::just(Op::put(keys.failsafe(), text)).when(mine);
        // An answer changes nothing.
        drop(store::txn(&w, End::Host(life.host), put).await);
    }
}

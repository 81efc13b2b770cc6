//! State of the store in memory, as values: keys, leases, revisions. Time is an argument.

use std::collections::BTreeMap;

use kornak_cluster::Moment;

use crate::{
    Compare, DcsError, KeyValue, LeaseId, Op, RaftTerm, Reach, Remaining, Revision, Txn,
    TxnOutcome, View,
};

/// The whole store at one revision.
#[derive(Debug)]
pub(super) struct State {
    store: u64,
    pub(super) term: RaftTerm,
    revision: Revision,
    keys: BTreeMap<String, KeyValue>,
    leases: BTreeMap<LeaseId, Lease>,
    last_lease: LeaseId,
}

#[derive(Debug, Clone, Copy)]
struct Lease {
    ttl: std::time::Duration,
    ends: Moment,
}

/// Names of the keys that a step wrote or deleted.
pub(super) type Touched = Vec<String>;

impl State {
    /// Empty, at revision 1 and term 2, as a fresh etcd is.
    pub(super) fn new(store: u64, last_lease: LeaseId) -> Self {
        Self {
            store,
            term: RaftTerm(2),
            revision: Revision(1),
            keys: BTreeMap::new(),
            leases: BTreeMap::new(),
            last_lease,
        }
    }

    pub(super) fn view(&self, prefix: &str, reach: Reach) -> View {
        let keys = self
            .keys
            .range(prefix.to_owned()..)
            .take_while(|(key, _)| key.starts_with(prefix))
            .map(|(key, found)| (key.clone(), found.clone()))
            .collect();
        View { store: self.store, revision: self.revision, raft_term: self.term, reach, keys }
    }

    /// When the next lease ends, if there is one.
    pub(super) fn next_end(&self) -> Option<Moment> {
        self.leases.values().map(|lease| lease.ends).min()
    }

    /// Ends what is over at `now`, oldest first, each lease in a revision of its own.
    pub(super) fn expire(&mut self, now: Moment) -> Touched {
        let mut over: Vec<(Moment, LeaseId)> = self
            .leases
            .iter()
            .filter(|(_, lease)| lease.ends <= now)
            .map(|(id, lease)| (lease.ends, *id))
            .collect();
        over.sort_unstable();
        over.into_iter().flat_map(|(_, id)| self.end_lease(id)).collect()
    }

    pub(super) fn grant(&mut self, ttl: std::time::Duration, now: Moment) -> LeaseId {
        self.last_lease.0 += 1;
        self.leases.insert(self.last_lease, Lease { ttl, ends: now + ttl });
        self.last_lease
    }

    pub(super) fn lease_ttl(&self, id: LeaseId) -> Result<std::time::Duration, DcsError> {
        self.leases.get(&id).map(|lease| lease.ttl).ok_or(DcsError::LeaseLost)
    }

    /// In whole seconds, as etcd tells it.
    pub(super) fn remaining(&self, id: LeaseId, now: Moment) -> Result<Remaining, DcsError> {
        let lease = self.leases.get(&id).ok_or(DcsError::LeaseLost)?;
        let left = std::time::Duration::from_secs(lease.ends.since(now).as_secs());
        Ok(Remaining { granted: lease.ttl, left })
    }

    pub(super) fn renew(
        &mut self,
        id: LeaseId,
        now: Moment,
    ) -> Result<std::time::Duration, DcsError> {
        let lease = self.leases.get_mut(&id).ok_or(DcsError::LeaseLost)?;
        lease.ends = now + lease.ttl;
        Ok(lease.ttl)
    }

    pub(super) fn revoke(&mut self, id: LeaseId) -> Result<Touched, DcsError> {
        if self.leases.contains_key(&id) {
            Ok(self.end_lease(id))
        } else {
            Err(DcsError::LeaseLost)
        }
    }

    /// A new raft leader: the term grows, and every lease starts anew, as etcd does it.
    pub(super) fn elect(&mut self, now: Moment) {
        self.term = self.term.next();
        for lease in self.leases.values_mut() {
            lease.ends = now + lease.ttl;
        }
    }

    fn end_lease(&mut self, id: LeaseId) -> Touched {
        self.leases.remove(&id);
        let doomed: Touched = self
            .keys
            .values()
            .filter(|found| found.lease == id)
            .map(|found| found.key.clone())
            .collect();
        if !doomed.is_empty() {
            self.revision = self.revision.next();
        }
        for key in &doomed {
            self.keys.remove(key);
        }
        doomed
    }

    /// Runs a transaction; an error means that nothing was done.
    pub(super) fn txn(&mut self, txn: &Txn) -> Result<(TxnOutcome, Touched), DcsError> {
        refuse_double_writes(&txn.then)?;
        refuse_double_writes(&txn.otherwise)?;
        let succeeded = txn.compare.iter().all(|compare| self.holds(compare));
        let branch = if succeeded { &txn.then } else { &txn.otherwise };
        for op in branch {
            if let Op::Put { lease, .. } = op
                && !lease.is_none()
                && !self.leases.contains_key(lease)
            {
                return Err(DcsError::LeaseLost);
            }
        }
        let next = self.revision.next();
        let mut touched = Touched::new();
        let mut gets = Vec::new();
        for op in branch {
            self.run(op, next, &mut touched, &mut gets);
        }
        if !touched.is_empty() {
            self.revision = next;
        }
        let outcome = TxnOutcome { succeeded, revision: self.revision, raft_term: self.term, gets };
        Ok((outcome, touched))
    }

    fn run(
        &mut self,
        op: &Op,
        revision: Revision,
        touched: &mut Touched,
        gets: &mut Vec<Option<KeyValue>>,
    ) {
        match op {
            Op::Put { key, value, lease } => {
                let create_revision =
                    self.keys.get(key).map_or(revision, |found| found.create_revision);
                let written = KeyValue {
                    key: key.clone(),
                    value: value.clone(),
                    create_revision,
                    mod_revision: revision,
                    lease: *lease,
                };
                self.keys.insert(key.clone(), written);
                touched.push(key.clone());
            }
            Op::Delete { key } => {
                if self.keys.remove(key).is_some() {
                    touched.push(key.clone());
                }
            }
            Op::DeletePrefix { prefix } => {
                let doomed: Touched = self
                    .keys
                    .range(prefix.clone()..)
                    .take_while(|(key, _)| key.starts_with(prefix.as_str()))
                    .map(|(key, _)| key.clone())
                    .collect();
                for key in &doomed {
                    self.keys.remove(key);
                }
                touched.extend(doomed);
            }
            Op::Get { key } => gets.push(self.keys.get(key).cloned()),
        }
    }

    fn holds(&self, compare: &Compare) -> bool {
        match compare {
            Compare::Created { key, revision } => {
                self.keys.get(key).map_or(Revision::NONE, |found| found.create_revision)
                    == *revision
            }
            Compare::Modified { key, revision } => {
                self.keys.get(key).map_or(Revision::NONE, |found| found.mod_revision) == *revision
            }
            Compare::Lease { key, lease } => {
                self.keys.get(key).is_some_and(|found| found.lease == *lease)
            }
            Compare::Value { key, value } => {
                self.keys.get(key).is_some_and(|found| found.value == *value)
            }
            Compare::NoneCreatedAfter { prefix, revision } => self
                .keys
                .range(prefix.clone()..)
                .take_while(|(key, _)| key.starts_with(prefix.as_str()))
                .all(|(_, found)| found.create_revision <= *revision),
        }
    }
}

/// etcd refuses a branch that writes one key twice, or writes what it also deletes.
fn refuse_double_writes(branch: &[Op]) -> Result<(), DcsError> {
    for (at, op) in branch.iter().enumerate() {
        let Op::Put { key, .. } = op else { continue };
        let clash = branch.iter().enumerate().any(|(other_at, other)| match other {
            Op::Put { key: other, .. } => other_at != at && other == key,
            Op::Delete { key: other } => other == key,
            Op::DeletePrefix { prefix } => key.starts_with(prefix.as_str()),
            Op::Get { .. } => false,
        });
        if clash {
            return Err(DcsError::Refused { detail: format!("duplicate key {key} in a txn") });
        }
    }
    Ok(())
}

//! Which server of each group has proven that it accepts writes.
//!
//! The leader key says who should; a proof is a login and `pg_is_in_recovery() = false`. A *term* is
//! the time during which connections to a leader may be used: it ends when another member leads, or
//! when the same one comes back as another instance (timeline or start of the postmaster), not when
//! the key is re-created (docs/safety.md A12). A *proof* may fail and be renewed within a term: then open
//! connections go on and new ones wait.
//!
//! Pure. Not here: probing ([`crate::background::prover`]).

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use kornak_cluster::{Epoch, GroupId, Node, Timeline};

/// The identity of one run of a server.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Instance {
    /// `None` if it could not be asked.
    pub system_identifier: Option<String>,
    pub timeline: Option<Timeline>,
    /// `pg_postmaster_start_time()`.
    pub started: Option<String>,
}

/// A server that accepts writes.
#[derive(Debug, Clone, PartialEq)]
pub struct Serving {
    pub node: Arc<Node>,
    pub name: Arc<str>,
    pub epoch: Epoch,
    pub instance: Instance,
    /// In a Citus cluster: distributed transactions that were prepared when it began to serve and that
    /// nobody has ended since. Their clients may have been told that they are committed.
    pub unfinished: BTreeSet<String>,
}

/// Why nobody serves a group.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Why {
    /// No leader was ever seen.
    NoLeader,
    /// A leader is known and has not proven itself yet.
    Unproven,
    /// The server does not answer.
    Silent,
    /// The server answers and is in recovery.
    ReadOnly,
    /// A planned switchover is under way.
    Handover,
    /// The server does not belong to the known cluster, or is behind its history.
    Foreign,
}

impl Why {
    /// For people and labels.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::NoLeader => "no leader is known",
            Self::Unproven => "the leader has not proven yet that it accepts writes",
            Self::Silent => "the leader does not answer",
            Self::ReadOnly => "the leader is still in recovery",
            Self::Handover => "a planned switchover is under way",
            Self::Foreign => "the leader has another system identifier or an older timeline",
        }
    }
}

/// Counts the primaries of one group: another member, another run, or the same run anew after a handover.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Term(pub u64);

impl Term {
    /// The term of a group that is not known.
    pub const NONE: Self = Self(0);

    /// The term after this one.
    #[must_use]
    pub fn next(self) -> Self {
        Self(self.0.wrapping_add(1))
    }
}

/// Counts the proofs that a group's server accepts writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Proof(pub u64);

impl Proof {
    /// Nobody has proven anything yet.
    pub const NONE: Self = Self(0);

    /// The proof after this one.
    #[must_use]
    pub fn next(self) -> Self {
        Self(self.0.wrapping_add(1))
    }
}

/// Counts the changes of what any session's server may be: while it stays the same, no connection has to be
/// looked at.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Generation(pub u64);

impl Generation {
    /// Older than each that a session may see.
    pub const NONE: Self = Self(0);
}

/// One group's standing.
#[derive(Debug, Clone, PartialEq)]
pub struct Standing {
    /// Connections of an earlier term must not be used.
    pub term: Term,
    /// Grows with each proof.
    pub proof: Proof,
    pub serving: Result<Arc<Serving>, Why>,
    /// The last that served, for comparison.
    last: Option<Arc<Serving>>,
}

impl Default for Standing {
    fn default() -> Self {
        Self { term: Term(1), proof: Proof::NONE, serving: Err(Why::NoLeader), last: None }
    }
}

impl Standing {
    /// Nobody serves until the next proof; `ends_term` if connections must go as well.
    pub fn withdraw(&mut self, why: Why, ends_term: bool) {
        if ends_term && (self.last.is_some() || self.serving.is_ok()) {
            self.term = self.term.next();
            // Whoever proves itself next begins this term, the same instance included.
            self.last = None;
        }
        self.serving = Err(why);
    }

    /// The last server that served, even if its proof has failed since.
    pub fn last(&self) -> Option<&Arc<Serving>> {
        self.last.as_ref()
    }

    /// A server has proven itself.
    pub fn prove(&mut self, mut serving: Serving) {
        match &self.last {
            Some(last)
                if last.name == serving.name && last.instance.is_same_run(&serving.instance) =>
            {
                // What was prepared later is somebody's who works.
                serving.unfinished.retain(|name| last.unfinished.contains(name));
            }
            Some(_) => self.term = self.term.next(),
            None => {}
        }
        self.proof = self.proof.next();
        let serving = Arc::new(serving);
        self.last = Some(Arc::clone(&serving));
        self.serving = Ok(serving);
    }
}

impl Instance {
    fn is_same_run(&self, other: &Self) -> bool {
        self.timeline == other.timeline && self.started == other.started
    }

    /// Whether a server may follow one that had this identifier and timeline: the same cluster, and
    /// not its past. What is unknown does not speak against it.
    pub fn may_follow(&self, identifier: Option<&str>, timeline: Option<Timeline>) -> bool {
        let other_cluster = match (&self.system_identifier, identifier) {
            (Some(ours), Some(known)) => ours != known,
            _ => false,
        };
        let past = match (self.timeline, timeline) {
            (Some(now), Some(known)) => now < known,
            _ => false,
        };
        !other_cluster && !past
    }

    /// [`Instance::may_follow`] where the store may say which cluster it is (`initialize`): one made anew under the
    /// old name is followed, whether somebody removed the first one or its bootstrap was given up when its
    /// server had already been seen. The store's word alone refuses nobody.
    pub fn may_serve(
        &self,
        identifier: Option<&str>,
        timeline: Option<Timeline>,
        initialized: Option<&str>,
    ) -> bool {
        let is_anew = initialized.is_some()
            && initialized != identifier
            && self.system_identifier.as_deref() == initialized;
        is_anew || self.may_follow(identifier, timeline)
    }
}

/// All groups.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Standings(pub BTreeMap<GroupId, Standing>);

impl Standings {
    /// The server that accepts writes for a group.
    pub fn serving(&self, group: GroupId) -> Result<&Arc<Serving>, Why> {
        self.0.get(&group).map_or(Err(Why::NoLeader), |s| s.serving.as_ref().map_err(|why| *why))
    }

    /// The term of a group.
    pub fn term(&self, group: GroupId) -> Term {
        self.0.get(&group).map_or(Term::NONE, |standing| standing.term)
    }

    /// The newest proof of a group.
    pub fn proof(&self, group: GroupId) -> Proof {
        self.0.get(&group).map_or(Proof::NONE, |standing| standing.proof)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use kornak_cluster::{NodeRole, Revision};

    fn serving(name: &str, timeline: u32, started: &str) -> Serving {
        let node = Node {
            name: name.to_owned(),
            group: GroupId(0),
            host: "h".into(),
            port: 1,
            role: NodeRole::Primary,
            running: true,
            says_primary: true,
            lag_bytes: None,
            noloadbalance: false,
            timeline: None,
            api_base: String::new(),
            kornak: false,
        };
        let instance = Instance {
            system_identifier: Some("7".to_owned()),
            timeline: Some(Timeline(timeline)),
            started: Some(started.to_owned()),
        };
        let epoch = Epoch { store: 1, revision: Revision(1) };
        let unfinished = BTreeSet::new();
        Serving { node: Arc::new(node), name: name.into(), epoch, instance, unfinished }
    }

    #[test]
    fn what_is_unfinished_when_a_server_begins_to_serve_can_only_become_less() {
        let with = |started: &str, names: &[&str]| {
            let unfinished = names.iter().map(|name| (*name).to_owned()).collect();
            Serving { unfinished, ..serving("a", 1, started) }
        };
        let left = |standing: &Standing| -> Vec<String> {
            standing.serving.as_ref().unwrap().unfinished.iter().cloned().collect()
        };
        let mut standing = Standing::default();
        standing.prove(with("t0", &["x", "y"]));
        assert_eq!(left(&standing), ["x", "y"]);
        standing.withdraw(Why::Silent, false);
        standing.prove(with("t0", &["y", "z"]));
        assert_eq!(left(&standing), ["y"], "z began later");
        standing.prove(with("t0", &["z"]));
        standing.prove(with("t0", &["y", "z"]));
        assert_eq!(left(&standing), [""; 0]);
        standing.prove(with("t1", &["z"]));
        assert_eq!(left(&standing), ["z"], "another run");
    }

    #[test]
    fn another_cluster_is_followed_only_if_the_store_has_it_under_this_name() {
        let rows = [
            // known before, the store's, the server's, its timeline
            (None, None, "7", 1, true),
            (Some("7"), None, "7", 5, true),
            (Some("7"), None, "7", 4, false),
            (Some("7"), Some("7"), "7", 4, false),
            (Some("7"), Some("7"), "8", 9, false),
            (Some("7"), None, "8", 9, false),
            (Some("7"), Some("8"), "8", 1, true),
            (Some("7"), Some("9"), "8", 9, false),
            (Some("7"), Some("nonsense"), "7", 5, true),
        ];
        for (known, initialized, own, timeline, expected) in rows {
            let instance = Instance {
                system_identifier: Some(own.to_owned()),
                timeline: Some(Timeline(timeline)),
                started: None,
            };
            let last = known.map(|_| Timeline(5));
            let found = instance.may_serve(known, last, initialized);
            assert_eq!(found, expected, "{known:?} {initialized:?} {own} {timeline}");
        }
    }

    #[test]
    fn a_term_ends_with_another_member_timeline_or_start_and_not_with_a_failed_proof() {
        let mut standing = Standing::default();
        standing.prove(serving("a", 1, "t0"));
        let Term(term) = standing.term;
        standing.withdraw(Why::Silent, false);
        standing.prove(serving("a", 1, "t0"));
        assert_eq!(standing.term, Term(term));
        standing.prove(serving("a", 1, "t1"));
        assert_eq!(standing.term, Term(term + 1), "restarted");
        standing.prove(serving("a", 2, "t1"));
        assert_eq!(standing.term, Term(term + 2), "promoted again");
        standing.prove(serving("b", 2, "t1"));
        assert_eq!(standing.term, Term(term + 3), "another member");
        standing.withdraw(Why::Handover, true);
        assert_eq!(standing.term, Term(term + 4));
        standing.withdraw(Why::Handover, true);
        standing.prove(serving("b", 2, "t1"));
        assert_eq!(standing.term, Term(term + 4), "a withdrawal ends a term once");
    }

    #[test]
    fn another_cluster_and_the_past_cannot_follow() {
        let now = serving("a", 5, "t").instance;
        assert!(now.may_follow(Some("7"), Some(Timeline(5))));
        assert!(now.may_follow(None, None));
        assert!(!now.may_follow(Some("8"), Some(Timeline(5))));
        assert!(!now.may_follow(Some("7"), Some(Timeline(6))));
    }
}

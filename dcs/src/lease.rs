//! When a lease proves that its holder leads, and until when (docs/safety.md A2).
//!
//! A renewal alone proves nothing: the leader key may be gone while its lease lives, and a deposed
//! raft leader may have answered. Proven is a renewal *and*, asked after it, a linearizable answer
//! that the key still hangs on this lease in this term of leadership, *and* that both answers come
//! from one raft term. The deadline counts from before the renewal was sent, by what was granted.
//!
//! Not here: who sends, and when. Everything is a function of its arguments.

use std::time::Duration;

use kornak_cluster::{Epoch, Moment};

use crate::{Compare, LeaseId, RaftTerm, Renewed, TxnOutcome};

/// The moment by which a holder must have stopped writing, if it `sent` its last proven renewal then.
/// The store cannot have ended the lease before `sent + granted`; `margin` is what stopping takes.
pub fn fence_at(sent: Moment, granted: Duration, margin: Duration) -> Moment {
    sent + granted.saturating_sub(margin)
}

/// Comparisons that must hold in the transaction that follows a renewal.
pub fn leader_checks(leader_key: &str, lease: LeaseId, epoch: Epoch) -> Vec<Compare> {
    vec![
        Compare::Lease { key: leader_key.to_owned(), lease },
        Compare::Created { key: leader_key.to_owned(), revision: epoch.revision },
    ]
}

/// Why a renewal does not prove leadership.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Unproven {
    /// The leader key is gone, or is another's. Leadership has ended.
    #[error("the leader key is not held by this lease in this epoch")]
    KeyLost,
    /// The store granted nothing.
    #[error("the renewal was answered with no time left")]
    NoTime,
    /// Leadership may go on: ask again at once, before the old deadline.
    #[error("raft terms differ: renewed in {renewed}, checked in {checked}")]
    TermChanged { renewed: RaftTerm, checked: RaftTerm },
}

/// Judges a renewal that was sent at `sent`, and the answer to [`leader_checks`] sent after the
/// renewal's answer was there. `Ok` is the new [`fence_at`]; it never lies before `proven`, the
/// deadline proven so far.
pub fn prove(
    sent: Moment,
    renewed: Renewed,
    checked: &TxnOutcome,
    margin: Duration,
    proven: Option<Moment>,
) -> Result<Moment, Unproven> {
    if !checked.succeeded {
        return Err(Unproven::KeyLost);
    }
    if renewed.ttl.is_zero() {
        return Err(Unproven::NoTime);
    }
    if renewed.raft_term != checked.raft_term {
        return Err(Unproven::TermChanged {
            renewed: renewed.raft_term,
            checked: checked.raft_term,
        });
    }
    let fence = fence_at(sent, renewed.ttl, margin);
    Ok(proven.map_or(fence, |proven| proven.max(fence)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Revision;

    const MARGIN: Duration = Duration::from_secs(2);

    fn renewed(ttl_secs: u64, raft_term: RaftTerm) -> Renewed {
        Renewed { ttl: Duration::from_secs(ttl_secs), raft_term }
    }

    fn checked(succeeded: bool, raft_term: RaftTerm) -> TxnOutcome {
        TxnOutcome { succeeded, revision: Revision(9), raft_term, gets: Vec::new() }
    }

    #[test]
    fn the_deadline_counts_from_before_the_send_and_by_what_was_granted() {
        let sent = Moment::at_millis(10_000);
        let fence = prove(sent, renewed(8, RaftTerm(3)), &checked(true, RaftTerm(3)), MARGIN, None);
        assert_eq!(fence, Ok(Moment::at_millis(16_000)));
    }

    #[test]
    fn a_margin_longer_than_the_lease_leaves_no_time_at_all() {
        let sent = Moment::at_millis(10_000);
        assert_eq!(fence_at(sent, Duration::from_secs(1), MARGIN), sent);
    }

    #[test]
    fn what_does_not_prove_leadership() {
        let sent = Moment::at_millis(10_000);
        let terms = Unproven::TermChanged { renewed: RaftTerm(3), checked: RaftTerm(4) };
        for (sentence, renewed, checked, why) in [
            (
                "the key is gone",
                renewed(8, RaftTerm(3)),
                checked(false, RaftTerm(3)),
                Unproven::KeyLost,
            ),
            (
                "the lease is over",
                renewed(0, RaftTerm(3)),
                checked(true, RaftTerm(3)),
                Unproven::NoTime,
            ),
            ("an election lay between", renewed(8, RaftTerm(3)), checked(true, RaftTerm(4)), terms),
            (
                "a lost key outweighs an election",
                renewed(8, RaftTerm(3)),
                checked(false, RaftTerm(4)),
                Unproven::KeyLost,
            ),
        ] {
            assert_eq!(prove(sent, renewed, &checked, MARGIN, None), Err(why), "{sentence}");
        }
    }

    #[test]
    fn a_slow_answer_does_not_take_back_what_was_proven_since() {
        let proven = Moment::at_millis(20_000);
        let slow = Moment::at_millis(10_000);
        let fence =
            prove(slow, renewed(8, RaftTerm(3)), &checked(true, RaftTerm(3)), MARGIN, Some(proven));
        assert_eq!(fence, Ok(proven));
    }
}

//! The transactions by which synchronous standbys depose a leader that is lost, without waiting for its lease
//! (docs/safety.md, *Failover without waiting for the lease*).
//!
//! Not here: when any of them is sent.

use kornak_cluster::{ClusterState, Leader, Leadership, Pledge, Revision, SyncState};

use crate::keys::Keys;
use crate::{Compare, Op, Txn, json};

fn in_force(keys: &Keys, of: Leadership) -> Vec<Compare> {
    vec![
        Compare::Created { key: keys.leader(), revision: of.epoch.revision },
        Compare::Modified { key: keys.sync(), revision: of.sync },
    ]
}

/// Writes the promise of `member`, whose key was last written at `seen`: a withdrawal since makes it fail, however late
/// it is done.
pub fn pledge(keys: &Keys, member: &str, seen: Revision, pledge: &Pledge) -> Txn {
    let key = keys.fence(member);
    let mut txn = Txn::just(Op::put(&key, json(pledge)));
    txn.compare = in_force(keys, pledge.of);
    txn.when(Compare::Modified { key, revision: seen })
}

/// Withdraws the promise of `member`. The key is overwritten and not deleted, so that a write of the promise that is
/// still on its way compares a revision that is gone.
pub fn withdraw(keys: &Keys, member: &str, of: Leadership) -> Txn {
    let pledge = Pledge {
        v: kornak_cluster::member::KORNAK_RECORDS_VERSION,
        of,
        timeline: kornak_cluster::Timeline(0),
        position: kornak_cluster::Lsn(0),
        withdrawn: true,
    };
    Txn::just(Op::put(keys.fence(member), json(&pledge)))
}

/// Deposes `leader`, as `cluster` shows it, by the promises of `counted` (members and the revisions of their keys), and
/// names in `sync` who may take over.
pub fn depose(
    keys: &Keys,
    leader: &Leader,
    cluster: &ClusterState,
    counted: &[(String, Revision)],
    sync: &SyncState,
) -> Txn {
    let of = Leadership { epoch: leader.epoch, sync: cluster.sync_revision };
    let mut txn = Txn::just(Op::delete(keys.leader())).and(Op::put(keys.sync(), json(sync)));
    txn.compare = in_force(keys, of);
    txn.compare.push(Compare::Lease { key: keys.leader(), lease: leader.lease });
    let promises = counted.iter().map(|(member, revision)| (keys.fence(member), *revision));
    let others = [
        (keys.config(), cluster.config_revision),
        (keys.handover(), Revision::NONE),
        (keys.unfenced(), Revision::NONE),
    ];
    let unchanged = promises.chain(others);
    txn.compare.extend(unchanged.map(|(key, revision)| Compare::Modified { key, revision }));
    txn
}

//! The member that keeps this node from leading, in the words that Patroni's users look for in a log.

use kornak_cluster::Tags;

use super::decision::Why;
use super::snapshot::Snapshot;

/// `None`: nobody does, or it is not known by what.
pub fn in_patronis_words(s: &Snapshot, why: Why) -> Option<String> {
    let own = s.tags.failover_priority();
    let preferred = |name: &str, tags: &Tags| {
        let theirs = tags.failover_priority();
        (theirs > own).then(|| {
            format!(
                "{name} has equally tolerable WAL position and priority {theirs}, while this node has \
                 priority {own}"
            )
        })
    };
    let answers = s.race.iter().flat_map(|race| &race.peers);
    let mut peers = answers.filter_map(|(name, peer)| Some((name, peer.as_ref()?)));
    match why {
        // A handover gives the candidate all of the log.
        Why::OtherIsCandidate => {
            let name = s.cluster.handover.as_ref()?.candidate.as_deref()?;
            preferred(name, &s.cluster.members.get(name)?.tags)
        }
        Why::PeerPreferred => peers.find_map(|(name, peer)| preferred(name, &peer.tags)),
        Why::PeerAhead { position } => {
            let (name, _) = peers.find(|(_, peer)| peer.position == Some(position))?;
            Some(format!("Wal position of {name} is ahead of my wal position"))
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::sync::Arc;

    use kornak_cluster::{ClusterState, HandoverPhase, Lsn, Member};
    use serde_json::json;

    use super::*;
    use crate::ha::snapshot::Peer;

    fn snapshot() -> Snapshot {
        let tags: Tags = serde_json::from_value(json!({"failover_priority": 2})).unwrap();
        let member = json!({"state": "running", "role": "replica", "tags": tags});
        let member: Member = serde_json::from_value(member).unwrap();
        let cluster = ClusterState {
            handover: Some(crate::ha::tests::handover("b", HandoverPhase::Switch)),
            members: BTreeMap::from([("b".to_owned(), member)]),
            ..ClusterState::default()
        };
        let peer = Peer { tags, position: Some(Lsn(7)), ..Peer::default() };
        let race = crate::ha::tests::answers(&[("b", Some(peer)), ("d", None)]);
        Snapshot { race: Some(race), cluster: Arc::new(cluster), ..crate::ha::tests::standby() }
    }

    #[test]
    fn a_rival_is_named_with_what_it_has_more() {
        let priority =
            "b has equally tolerable WAL position and priority 2, while this node has priority 1";
        for (why, expected) in [
            (Why::PeerPreferred, Some(priority)),
            (
                Why::PeerAhead { position: Lsn(7) },
                Some("Wal position of b is ahead of my wal position"),
            ),
            (Why::OtherIsCandidate, Some(priority)),
            (Why::Paused, None),
        ] {
            assert_eq!(in_patronis_words(&snapshot(), why).as_deref(), expected, "{why:?}");
        }
    }
}

//! Whom a standby replicates from, and whose server a new member copies.

use kornak_cluster::{ClusterState, Member, MemberState, Tags};

/// Where a standby's log comes from.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Source {
    Member(String),
    /// The primary that a standby cluster follows.
    Remote,
    /// The archive alone (tag `nostream`, or a standby cluster without a host).
    Archive,
}

/// Chooses for the member `me`. `None`: nobody leads whom it could follow.
///
/// A member that is to cascade (tag `replicatefrom`) follows that member while it runs, else the
/// leader; and the leader as well where the tags lead in a circle.
pub fn source(me: &str, tags: &Tags, cluster: &ClusterState) -> Option<Source> {
    let leader = cluster.leader.as_ref().map(|leader| leader.name.as_str());
    let remote = cluster.config.as_ref().and_then(|config| config.standby_cluster.as_ref());
    if let (Some(standby_cluster), None) = (remote, leader.filter(|leader| *leader != me)) {
        let streams = standby_cluster.remote.is_some() && !tags.nostream();
        return Some(if streams { Source::Remote } else { Source::Archive });
    }
    if tags.nostream() {
        return Some(Source::Archive);
    }
    let leader = leader.filter(|leader| *leader != me)?;
    let cascades = tags.replicatefrom().filter(|name| may_cascade(me, name, leader, cluster));
    Some(Source::Member(cascades.unwrap_or(leader).to_owned()))
}

/// Whether the way from `from` upwards ends at the leader without coming by `me`.
fn may_cascade(me: &str, from: &str, leader: &str, cluster: &ClusterState) -> bool {
    let mut at = from;
    for _ in 0..=cluster.members.len() {
        if at == me {
            return false;
        }
        let Some(member) = cluster.members.get(at) else { return at != from };
        if at == leader {
            return true;
        }
        if member.state != MemberState::Running {
            return at != from;
        }
        match member.tags.replicatefrom() {
            Some(next) => at = next,
            None => return true,
        }
    }
    false
}

/// Whether the primary hears what a server with these tags needs (`hot_standby_feedback`): nobody on the way
/// there takes its log from the archive alone.
pub fn feedback_reaches_the_leader(tags: &Tags, cluster: &ClusterState) -> bool {
    let mut tags = tags;
    for _ in 0..=cluster.members.len() {
        if tags.nostream() {
            return false;
        }
        match tags.replicatefrom().and_then(|name| cluster.members.get(name)) {
            Some(member) => tags = &member.tags,
            None => return true,
        }
    }
    true
}

/// Members that offer themselves as the source of a copy (tag `clonefrom`) and run; the leader is not
/// among them: it is the one to fall back on.
pub fn clone_sources(me: &str, cluster: &ClusterState) -> Vec<String> {
    let leader = cluster.leader.as_ref().map(|leader| leader.name.as_str());
    let offers = |(name, member): &(&String, &Member)| {
        member.tags.clonefrom()
            && member.state == MemberState::Running
            && name.as_str() != me
            && Some(name.as_str()) != leader
    };
    cluster.members.iter().filter(offers).map(|(name, _)| name.clone()).collect()
}

/// Whether `member` streams from `upstream`, by the tags: its slot there is expected to be in use.
pub fn streams_from(member: &str, upstream: &str, cluster: &ClusterState) -> bool {
    cluster.members.get(member).is_some_and(|facts| {
        source(member, &facts.tags, cluster) == Some(Source::Member(upstream.to_owned()))
    })
}

//! The store's knowledge of a Citus cluster, group by group. Pure.

use std::collections::{BTreeMap, BTreeSet};

use kornak_cluster::{
    ClusterState, GroupId, Handover, Member, MemberRole, MemberState, Revision, Scope,
};
use kornak_dcs::View;
use kornak_dcs::keys::{self, Keys};

use super::plan::{Address, Group, Wanted};

/// A group's leader key and where its holder says it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Leader {
    pub name: String,
    pub address: Option<Address>,
    /// REST base of the holder.
    pub api: Option<String>,
    /// The key carries Kornak's mark.
    pub kornak: bool,
}

/// All groups at one revision of the store.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Seen {
    pub revision: Revision,
    pub wanted: Wanted,
    pub leaders: BTreeMap<GroupId, Leader>,
    /// Pools of members that have one, by the address of their server.
    pub pools: BTreeMap<Address, String>,
    /// Hosts of all members' REST APIs.
    pub hosts: BTreeSet<String>,
    /// The planned switchover under way, whichever group's.
    pub handover: Option<Handover>,
}

impl Seen {
    /// Reads a view of the whole cluster.
    pub fn read(scope: &Scope, view: &View) -> Self {
        let mut seen = Self { revision: view.revision, ..Self::default() };
        for group in keys::groups(scope, view).into_iter().flatten() {
            let state = Keys::new(&scope.with_group(group)).state(view);
            seen.wanted.insert(group, group_of(&state));
            seen.handover = state.handover.clone().or(seen.handover);
            if let Some(leader) = leader_of(&state) {
                seen.leaders.insert(group, leader);
            }
            let apis = state.members.values().filter_map(Member::api_address);
            seen.hosts.extend(apis.map(|(host, _)| host));
            let pools = state
                .members
                .values()
                .filter_map(|member| Some((address_of(member)?, member.poolinfo.clone()?)));
            seen.pools.extend(pools);
        }
        seen
    }

    /// Whether a planned switchover of this group is under way.
    pub fn switches(&self, group: GroupId) -> bool {
        let record = self.handover.as_ref();
        record.is_some_and(|record| record.group == Some(group))
    }

    /// The leader of the coordinator's group.
    pub fn coordinator(&self) -> Option<&Leader> {
        self.leaders.get(&GroupId::COORDINATOR)
    }
}

fn address_of(member: &Member) -> Option<Address> {
    member.conn_address().map(|(host, port)| Address { host, port })
}

fn leader_of(state: &ClusterState) -> Option<Leader> {
    let name = state.leader.as_ref()?.name.clone();
    let member = state.members.get(&name);
    Some(Leader {
        address: member.and_then(address_of),
        api: member.map(|member| member.api_base().to_owned()),
        kornak: member.is_some_and(|member| member.kornak.is_some()),
        name,
    })
}

fn group_of(state: &ClusterState) -> Group {
    let leader = state.leader.as_ref().map(|leader| leader.name.as_str());
    let runs = |member: &Member| member.state == MemberState::Running;
    let primary = state.leader_member().and_then(|(_, member)| {
        let leads = runs(member) && member.role == MemberRole::Primary;
        address_of(member).filter(|_| leads)
    });
    let readable = state
        .members
        .iter()
        .filter(|(name, member)| leader != Some(name.as_str()) && !member.tags.noloadbalance());
    let (running, resting): (Vec<_>, Vec<_>) = readable.partition(|(_, member)| runs(member));
    let addresses = |members: Vec<(&String, &Member)>| -> BTreeSet<Address> {
        members.into_iter().filter_map(|(_, member)| address_of(member)).collect()
    };
    Group { primary, secondaries: addresses(running), resting: addresses(resting) }
}

#[cfg(test)]
mod tests {
    use kornak_dcs::KeyValue;

    use kornak_cluster::LeaseId;

    use super::*;

    pub(crate) fn view(keys: &[(&str, &str)]) -> View {
        let mut view = View::empty();
        view.revision = Revision(7);
        for (key, value) in keys {
            let found = KeyValue {
                key: (*key).to_owned(),
                value: (*value).to_owned(),
                create_revision: Revision(1),
                mod_revision: Revision(1),
                lease: LeaseId::NONE,
            };
            view.keys.insert((*key).to_owned(), found);
        }
        view
    }

    fn member(host: &str, role: &str, state: &str, tags: &str) -> String {
        format!(
            r#"{{"conn_url":"postgres://{host}:5432/citus","api_url":"http://{host}:8008/patroni","state":"{state}","role":"{role}","tags":{tags}}}"#
        )
    }

    #[test]
    fn only_running_members_that_may_be_read_from_are_secondaries() {
        let rows = [
            ("/service/demo/1/leader".to_owned(), "a".to_owned()),
            ("/service/demo/1/members/a".to_owned(), member("a", "primary", "running", "{}")),
            ("/service/demo/1/members/b".to_owned(), member("b", "replica", "running", "{}")),
            ("/service/demo/1/members/c".to_owned(), member("c", "replica", "stopped", "{}")),
            (
                "/service/demo/1/members/d".to_owned(),
                member("d", "replica", "streaming", r#"{"noloadbalance":true}"#),
            ),
            ("/service/demo/2/leader".to_owned(), "x".to_owned()),
            ("/service/demo/2/members/x".to_owned(), member("x", "promoted", "running", "{}")),
            ("/service/demo/3/initialize".to_owned(), "1".to_owned()),
        ];
        let rows: Vec<(&str, &str)> = rows.iter().map(|(k, v)| (k.as_str(), v.as_str())).collect();
        let seen = Seen::read(&Scope::new("service", "demo", None), &view(&rows));
        let at = |host: &str| Address { host: host.to_owned(), port: 5432 };
        let first = &seen.wanted[&GroupId(1)];
        assert_eq!(first.primary, Some(at("a")));
        assert_eq!(first.secondaries, BTreeSet::from([at("b")]));
        assert_eq!(first.resting, BTreeSet::from([at("c")]));
        assert_eq!(seen.wanted[&GroupId(2)].primary, None, "not before it is primary");
        assert_eq!(seen.leaders[&GroupId(2)].name, "x");
        assert!(seen.wanted.contains_key(&GroupId(3)), "any key makes a group");
        let hosts = ["a", "b", "c", "d", "x"].map(str::to_owned);
        assert_eq!(seen.hosts, BTreeSet::from(hosts), "whoever may speak for a member");
    }
}

//! The last known cluster, in a file: a proxy that starts while the store is away serves from it.
//!
//! The file is a list of servers to ask, and a bar for their answers: a leader is used only if it accepts writes, is of
//! the same cluster, and is not on an older timeline than the one that this proxy has seen last (docs/safety.md,
//! *Without the store*). When the store answers, its word replaces all of it.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering::SeqCst;
use std::time::Duration;

use futures_util::future::join_all;
use kornak_cluster::topology::Group;
use kornak_cluster::{Epoch, GroupId, Node, NodeRole, Revision, Timeline, Topology};
use serde::{Deserialize, Serialize};
use tokio_util::sync::CancellationToken;

use super::topology::by_asking::{Accepted, Finding, find};
use crate::cluster::probe::{Facts, Prober};
use crate::cluster::standing::Standings;
use crate::net::backend::{Address, DialError};
use crate::shared::{Bar, Shared};

/// Of the file's format.
const VERSION: u32 = 1;

/// No cluster's file is longer: 64 KiB are some hundred servers.
const MAX_BYTES: u64 = 64 * 1024;

/// The file changes no more often; what is written is of use after minutes.
const PAUSE: Duration = Duration::from_secs(1);

/// For the store's first answer.
pub const STORE_PATIENCE: Duration = Duration::from_millis(1500);

/// Between two looks at servers of a group whose leader does not serve.
const SEEK: Duration = Duration::from_millis(500);

/// Time for one server's answer.
const LOOK_LIMIT: Duration = Duration::from_secs(1);

/// A cluster as the file has it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Known {
    v: u32,
    /// Prefix of the cluster's keys.
    cluster: String,
    groups: BTreeMap<u32, KnownGroup>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct KnownGroup {
    leader: Option<KnownLeader>,
    system_identifier: Option<String>,
    /// Of the last server that accepted writes.
    timeline: Option<Timeline>,
    nodes: BTreeMap<String, KnownNode>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct KnownLeader {
    name: String,
    store: u64,
    revision: Revision,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct KnownNode {
    host: String,
    port: u16,
    api_base: String,
    noloadbalance: bool,
    kornak: bool,
}

impl Known {
    /// From what the store says now; what it does not say any more stays as it was.
    fn next(before: Option<&Self>, cluster: &str, topology: &Topology, known: &Standings) -> Self {
        let group = |(id, group): (&GroupId, &Arc<Group>)| {
            let before = before.and_then(|before| before.groups.get(&id.0));
            let last = known.0.get(id).and_then(|standing| standing.last());
            let leader = group.leader.as_ref().map(|(name, epoch)| KnownLeader {
                name: name.clone(),
                store: epoch.store,
                revision: epoch.revision,
            });
            let nodes = group.nodes.iter().map(|(name, node)| {
                let node = KnownNode {
                    host: node.host.to_string(),
                    port: node.port,
                    api_base: node.api_base.clone(),
                    noloadbalance: node.noloadbalance,
                    kornak: node.kornak,
                };
                (name.clone(), node)
            });
            let identifier = last.and_then(|last| last.instance.system_identifier.clone());
            let group = KnownGroup {
                leader: leader.or_else(|| before?.leader.clone()),
                system_identifier: identifier
                    .or_else(|| group.system_identifier.clone())
                    .or_else(|| before?.system_identifier.clone()),
                timeline: last.and_then(|last| last.instance.timeline).or_else(|| before?.timeline),
                nodes: nodes.collect(),
            };
            (id.0, group)
        };
        let groups = topology.groups.iter().map(group).collect();
        Self { v: VERSION, cluster: cluster.to_owned(), groups }
    }

    /// Whether there is anybody to ask.
    fn is_of_use(&self, cluster: &str) -> bool {
        let can_be_told = |group: &KnownGroup| {
            group.leader.is_some() && group.system_identifier.is_some() && !group.nodes.is_empty()
        };
        self.v == VERSION
            && self.cluster == cluster
            && !self.groups.is_empty()
            && self.groups.values().all(can_be_told)
    }

    fn topology(&self) -> Topology {
        let groups = self.groups.iter().map(|(id, known)| {
            let group = GroupId(*id);
            let leads = known.leader.as_ref().map(|leader| leader.name.as_str());
            let nodes = known.nodes.iter().map(|(name, node)| {
                let role = match leads == Some(name) {
                    true => NodeRole::Primary,
                    false => NodeRole::Standby,
                };
                (name.clone(), node.node(name, group, role))
            });
            let leader = known.leader.as_ref().map(|leader| {
                let epoch = Epoch { store: leader.store, revision: leader.revision };
                (leader.name.clone(), epoch)
            });
            let system_identifier = known.system_identifier.clone();
            (group, Arc::new(Group { leader, nodes: nodes.collect(), system_identifier }))
        });
        Topology { groups: groups.collect(), ..Topology::default() }
    }
}

impl KnownNode {
    fn node(&self, name: &str, group: GroupId, role: NodeRole) -> Node {
        Node {
            name: name.to_owned(),
            group,
            host: self.host.as_str().into(),
            port: self.port,
            role,
            running: true,
            says_primary: role == NodeRole::Primary,
            lag_bytes: None,
            noloadbalance: self.noloadbalance,
            timeline: None,
            api_base: self.api_base.clone(),
            kornak: self.kornak,
        }
    }
}

/// Keeps the file as new as what the store says.
pub async fn keep(shared: Arc<Shared>, path: PathBuf, stop: CancellationToken) {
    let cluster = shared.settings().scope.whole().root();
    let (mut topology, mut standings) = (shared.topology.subscribe(), shared.standings.subscribe());
    let mut written = read(&path).ok();
    let mut complained = false;
    loop {
        let (now, known) =
            (Arc::clone(&topology.borrow_and_update()), Arc::clone(&standings.borrow_and_update()));
        if shared.store_seen.load(SeqCst) {
            let next = Known::next(written.as_ref(), &cluster, &now, &known);
            if next.is_of_use(&cluster) && written.as_ref() != Some(&next) {
                match write(&path, &next) {
                    Ok(()) => written = Some(next),
                    Err(error) if !complained => {
                        complained = true;
                        let error = &error as &dyn std::error::Error;
                        tracing::warn!(path = %path.display(), error, "the cluster's servers cannot be noted: started without the store, this proxy will not know them; see proxy.state_file");
                    }
                    Err(_) => {}
                }
            }
        }
        let changed = async {
            tokio::select! {
                _ = topology.changed() => {}
                _ = standings.changed() => {}
            }
            tokio::time::sleep(PAUSE).await;
        };
        if stop.run_until_cancelled(changed).await.is_none() {
            return;
        }
    }
}

/// The store does not answer: takes what the file says, if servers can be asked whether it is true. Answers whether
/// that was done.
pub fn take(shared: &Arc<Shared>, path: &Path, stop: &CancellationToken) -> bool {
    let cluster = shared.settings().scope.whole().root();
    if !shared.prober.can_ask() {
        tracing::warn!(
            "the store does not answer, and without auth.user servers cannot be asked who leads"
        );
        return false;
    }
    let known = match read(path) {
        Ok(known) if known.is_of_use(&cluster) => known,
        Ok(_) => {
            tracing::warn!(path = %path.display(), "the store does not answer, and the file is about another cluster");
            return false;
        }
        Err(error) => {
            tracing::warn!(path = %path.display(), error = &error as &dyn std::error::Error, "the store does not answer, and no servers were noted");
            return false;
        }
    };
    let bars = known.groups.iter().map(|(id, group)| {
        let bar = Bar { identifier: group.system_identifier.clone(), timeline: group.timeline };
        (GroupId(*id), bar)
    });
    shared.bars.lock().extend(bars);
    let before = shared.topology();
    if !before.groups.is_empty() || !shared.replace_topology(&before, Arc::new(known.topology())) {
        return false;
    }
    tracing::warn!(path = %path.display(), "the store does not answer: asking the servers that were known last");
    let text = "the store has not answered since the start: servers that were known last are asked";
    shared.set_trouble("store", Some(text.to_owned()));
    // A handover needs the store: there is none that this proxy could miss.
    shared.registered.send_replace(true);
    tokio::spawn(stop.clone().run_until_cancelled_owned(seek(Arc::clone(shared), known)));
    true
}

/// Until the store answers: a leader that does not serve may have been succeeded while this proxy did not run.
async fn seek(shared: Arc<Shared>, known: Known) {
    while !shared.store_seen.load(SeqCst) {
        tokio::time::sleep(SEEK).await;
        for (id, group) in &known.groups {
            if shared.standings.borrow().serving(GroupId(*id)).is_err() {
                look_for_leader(&shared, GroupId(*id), group).await;
            }
        }
    }
}

async fn look_for_leader(shared: &Shared, id: GroupId, known: &KnownGroup) {
    let prober = &shared.prober;
    let looks = known.nodes.iter().map(async |(name, node)| {
        let at = Address { host: node.host.as_str().into(), port: node.port };
        let mut connected = prober.connect(&at, LOOK_LIMIT).await?;
        Ok::<_, DialError>((name.clone(), Prober::look(&mut connected, LOOK_LIMIT).await?))
    });
    let said: BTreeMap<String, Facts> = join_all(looks).await.into_iter().flatten().collect();
    let before = shared.topology();
    let Some((leader, epoch)) = before.groups.get(&id).and_then(|group| group.leader.clone())
    else {
        return;
    };
    let last = Accepted {
        name: leader.clone(),
        timeline: known.timeline,
        identifier: known.system_identifier.clone(),
    };
    match find(&said, Some(&last)) {
        Finding::Primary(name) if name != leader => {
            tracing::info!(node = %name, group = id.0, "another server leads by now");
            let mut now = Topology::clone(&before);
            if let Some(group) = now.groups.get_mut(&id) {
                let group = Arc::make_mut(group);
                for node in group.nodes.values_mut() {
                    let leads = node.name == name;
                    node.role = if leads { NodeRole::Primary } else { NodeRole::Standby };
                    node.says_primary = leads;
                }
                group.leader = Some((name, epoch));
            }
            shared.replace_topology(&before, Arc::new(now));
        }
        Finding::Ambiguous(a, b) => {
            tracing::error!(node = %a, other = %b, "two servers accept writes on one timeline");
        }
        Finding::Primary(_) | Finding::Nobody => {}
    }
}

fn read(path: &Path) -> io::Result<Known> {
    let file = File::open(path)?;
    let found = file.metadata()?;
    let own = rustix::process::geteuid().as_raw();
    if found.uid() != own || found.mode() & 0o077 != 0 {
        return Err(io::Error::other(
            "it must belong to the proxy's account and be open to nobody else",
        ));
    }
    let mut text = String::new();
    file.take(MAX_BYTES).read_to_string(&mut text)?;
    serde_json::from_str(&text).map_err(io::Error::other)
}

/// Whole or not at all; a loss of power may leave the old one.
fn write(path: &Path, known: &Known) -> io::Result<()> {
    let text = serde_json::to_vec_pretty(known).map_err(io::Error::other)?;
    let new = path.with_extension("new");
    match fs::remove_file(&new) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&new)?;
    file.write_all(&text)?;
    fs::rename(&new, path)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node(name: &str, role: NodeRole) -> (String, Node) {
        let known = KnownNode {
            host: format!("{name}.example"),
            port: 5432,
            api_base: format!("http://{name}:8008"),
            noloadbalance: false,
            kornak: true,
        };
        (name.to_owned(), known.node(name, GroupId(0), role))
    }

    fn topology(leader: Option<&str>) -> Topology {
        let nodes = [node("a", NodeRole::Primary), node("b", NodeRole::Standby)].into();
        let leader =
            leader.map(|name| (name.to_owned(), Epoch { store: 3, revision: Revision(7) }));
        let group = Group { leader, nodes, system_identifier: Some("71".to_owned()) };
        Topology { groups: [(GroupId(0), Arc::new(group))].into(), ..Topology::default() }
    }

    #[test]
    fn what_was_known_is_read_again_and_an_absent_leader_key_forgets_nobody() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("proxy.known.json");
        let known =
            Known::next(None, "/service/demo/", &topology(Some("a")), &Standings::default());
        write(&path, &known).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o600);
        assert_eq!(read(&path).unwrap(), known);
        assert_eq!(known.topology().groups, topology(Some("a")).groups);
        assert!(known.is_of_use("/service/demo/") && !known.is_of_use("/service/other/"));
        let next =
            Known::next(Some(&known), "/service/demo/", &topology(None), &Standings::default());
        assert_eq!(next, known);
        let nobody = Known::next(None, "/service/demo/", &topology(None), &Standings::default());
        assert!(!nobody.is_of_use("/service/demo/"), "there is no bar for anybody's answer");
    }

    #[test]
    fn a_file_that_others_could_have_written_is_not_believed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("proxy.known.json");
        let known =
            Known::next(None, "/service/demo/", &topology(Some("a")), &Standings::default());
        write(&path, &known).unwrap();
        let open = std::os::unix::fs::PermissionsExt::from_mode(0o644);
        fs::set_permissions(&path, open).unwrap();
        assert!(read(&path).is_err());
    }
}

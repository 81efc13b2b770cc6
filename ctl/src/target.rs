//! The cluster that a verb is about: found in a configuration, by address, or as a running demo;
//! read from the store or by REST; changed by REST.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, anyhow, bail};
use clap::Args;
use hyper::Method;
use kornak_agent::peers::{Answer, PeerError, Peers};
use kornak_cluster::{CitusRegistration, FailoverRequest, GroupId, HistoryEntry, Scope};
use kornak_config::{Etcd3Settings, HostPort, OperatorSettings, Scheme, StoreSettings};
use kornak_dcs::keys::{self, Keys};
use kornak_dcs::{Compare, Dcs, Op, Txn};
use serde_json::{Map, Value};

use crate::cmd::is_patronictl;
use crate::demo_note;
use crate::view::{self, ClusterView, GroupView, MemberView};

/// The longest a question may take.
const QUICK: Duration = Duration::from_secs(10);

/// The longest an action may take: a switchover drains for a minute at most, a restart waits for
/// a checkpoint.
const ACTION: Duration = Duration::from_secs(600);

/// patronictl's options, before the verb.
#[derive(Debug, Clone, Args)]
pub struct Global {
    /// Configuration file: patronictl's, or an agent's.
    #[arg(short, long, env = "PATRONICTL_CONFIG_FILE", value_name = "FILE")]
    pub config_file: Option<PathBuf>,
    /// The store, such as etcd3://host:2379; wins over the configuration's.
    #[arg(short, long, alias = "dcs", env = "DCS_URL", value_name = "URL")]
    pub dcs_url: Option<String>,
    /// Accept any certificate of a REST API.
    #[arg(short = 'k', long)]
    pub insecure: bool,
}

/// The global options after the verb, where they win over those before it.
#[derive(Debug, Clone, Args)]
pub struct Here {
    /// Configuration file: patronictl's, or an agent's.
    #[arg(short, long, value_name = "FILE")]
    config_file: Option<PathBuf>,
    /// The store, such as etcd3://host:2379; wins over the configuration's.
    #[arg(short, long, alias = "dcs", value_name = "URL")]
    dcs_url: Option<String>,
    /// Accept any certificate of a REST API.
    #[arg(short = 'k', long)]
    insecure: bool,
}

impl Global {
    /// With what was said after the verb.
    pub fn at(self, here: Here) -> Self {
        Self {
            config_file: here.config_file.or(self.config_file),
            dcs_url: here.dcs_url.or(self.dcs_url),
            insecure: here.insecure || self.insecure,
        }
    }
}

/// A cluster, and how to reach it.
#[derive(Debug)]
pub struct Target {
    pub name: String,
    /// The Citus group that the configuration belongs to.
    pub own_group: Option<GroupId>,
    citus: bool,
    reach: Reach,
    rest: Peers,
    /// REST of the agent whose file was read.
    agent: Option<String>,
}

#[derive(Debug)]
enum Reach {
    Store {
        dcs: Arc<dyn Dcs>,
        scope: Scope,
    },
    /// By group; `None` in a plain cluster.
    Rest {
        groups: Vec<(Option<GroupId>, Vec<String>)>,
    },
}

impl Target {
    /// Finds the cluster: `--dcs-url`, a configuration, or the demo that runs.
    ///
    /// # Errors
    /// None of them names a store, or nothing names the cluster.
    pub fn find(global: &Global, cluster: Option<&str>) -> anyhow::Result<Self> {
        let mut settings = load(global)?;
        if let Some(url) = &global.dcs_url {
            let (store, namespace) = parse_dcs_url(url)?;
            settings.store = Some(store);
            settings.namespace = namespace.unwrap_or(settings.namespace);
        }
        settings.ctl.insecure |= global.insecure;
        let rest = Peers::new(&settings.ctl)?;
        let Some(store) = settings.store.take() else {
            if let Some(file) = &global.config_file {
                bail!("{} names no store; add etcd3, or use --dcs-url", file.display());
            }
            return Self::demo(cluster, rest);
        };
        let name = cluster.map(str::to_owned).or(settings.scope);
        let name = name.ok_or_else(|| {
            anyhow!("no cluster is named: give its name, or a configuration with a scope (-c FILE)")
        })?;
        Ok(Self {
            reach: Reach::Store {
                scope: Scope::new(&settings.namespace, &name, None),
                dcs: crate::store::connect(&StoreSettings::Etcd3(store))?,
            },
            name,
            own_group: settings.group,
            citus: settings.citus,
            rest,
            agent: settings.agent,
        })
    }

    fn demo(cluster: Option<&str>, rest: Peers) -> anyhow::Result<Self> {
        let path = demo_note::path();
        let note = demo_note::read(&path).ok_or_else(|| {
            anyhow!(
                "no configuration found and no demo runs: use -c FILE or --dcs-url, or start one \
                 with kornak demo"
            )
        })?;
        if !note.is_alive() {
            bail!(
                "no configuration found, and the demo that left {} has ended (process {}): use -c \
                 FILE or --dcs-url, or start it again",
                path.display(),
                note.pid
            );
        }
        if let Some(name) = cluster.filter(|name| *name != note.scope) {
            bail!("no configuration found; the running demo is called {}, not {name}", note.scope);
        }
        let citus = !note.groups.is_empty();
        let groups = match citus {
            true => note.groups.into_iter().map(|(id, api)| (Some(GroupId(id)), api)).collect(),
            false => vec![(None, note.api)],
        };
        let reach = Reach::Rest { groups };
        Ok(Self { name: note.scope, own_group: None, citus, reach, rest, agent: None })
    }

    /// Reads one group, or all of them.
    ///
    /// # Errors
    /// The store, or every node, is out of reach.
    pub async fn read(&self, group: Option<GroupId>) -> anyhow::Result<ClusterView> {
        match &self.reach {
            Reach::Store { dcs, scope } => {
                let view = dcs.range(&scope.root()).await.context("read the store")?;
                let found = keys::groups(scope, &view);
                let citus = self.citus || group.is_some() || found.iter().any(Option::is_some);
                let mut groups = found;
                groups.retain(|found| found.is_some() == citus);
                if let Some(group) = group {
                    groups = vec![Some(group)];
                } else if groups.is_empty() {
                    groups = vec![citus.then_some(GroupId::COORDINATOR)];
                }
                let drop_in = is_patronictl(std::env::args_os().next().as_deref());
                let read = |group: Option<GroupId>| {
                    let scope = Scope { group, ..scope.clone() };
                    let mut found = GroupView::from_state(group, &Keys::new(&scope).state(&view));
                    // patronictl does not know the mark, and its output is compared.
                    found.unfenced = found.unfenced.filter(|_| !drop_in);
                    found
                };
                let groups = groups.into_iter().map(read).collect();
                let registration = Keys::new(scope).state(&view).citus.filter(|_| citus);
                Ok(ClusterView { name: self.name.clone(), citus, groups, registration })
            }
            Reach::Rest { groups: known } => {
                let mut groups = Vec::new();
                let mut registration = None;
                let asked = known.iter().filter(|(id, _)| group.is_none() || *id == group);
                for (id, bases) in asked {
                    let (view, found) = self.read_by_rest(*id, bases).await?;
                    groups.push(view);
                    registration = registration.or(found);
                }
                let citus = self.citus;
                Ok(ClusterView { name: self.name.clone(), citus, groups, registration })
            }
        }
    }

    /// As this host's agent knows the cluster, with the agent's address: for when the store does not answer. `None`: there is
    /// no such agent, or it does not answer either.
    pub async fn as_the_agent_knows_it(&self) -> Option<(&str, ClusterView)> {
        let base = self.agent.as_deref()?;
        let (group, registration) =
            self.read_by_rest(self.own_group, &[base.to_owned()]).await.ok()?;
        let (name, citus, groups) = (self.name.clone(), self.citus, vec![group]);
        Some((base, ClusterView { name, citus, groups, registration }))
    }

    async fn read_by_rest(
        &self,
        group: Option<GroupId>,
        bases: &[String],
    ) -> anyhow::Result<(GroupView, Option<CitusRegistration>)> {
        let (base, cluster) = self.ask(bases, "/cluster").await?;
        let status = self.get(base, "/patroni").await;
        let identifier = status.ok().and_then(|status| {
            Some(status.get("database_system_identifier")?.as_str()?.to_owned())
        });
        let config = self.get(base, "/config").await.ok();
        let config = config.as_ref().and_then(Value::as_object).cloned();
        let registration = cluster.get("citus").cloned();
        let registration = registration.and_then(|citus| serde_json::from_value(citus).ok());
        let view = GroupView { group, ..GroupView::from_rest(&cluster, identifier, config) };
        Ok((view, registration))
    }

    /// Reads one group; in a Citus cluster it must be named.
    ///
    /// # Errors
    /// As [`Target::read`].
    pub async fn read_one(&self, group: Option<GroupId>) -> anyhow::Result<GroupView> {
        let cluster = self.read(group).await?;
        if cluster.citus && group.is_none() {
            bail!("For Citus clusters the --group must be specified");
        }
        cluster.groups.into_iter().next().ok_or_else(|| anyhow!("the cluster has no members"))
    }

    /// Members whose account of themselves does not say that maintenance mode is on, or off.
    ///
    /// # Errors
    /// As [`Target::read`].
    pub async fn unaware(&self, group: Option<GroupId>, on: bool) -> anyhow::Result<Vec<String>> {
        match &self.reach {
            Reach::Store { dcs, scope } => {
                let keys = Keys::new(&Scope { group, ..scope.clone() });
                let view = dcs.range(&scope.root()).await.context("read the store")?;
                let members = keys.state(&view).members.into_iter();
                Ok(members.filter(|(_, member)| member.pause != on).map(|(name, _)| name).collect())
            }
            Reach::Rest { .. } => {
                let mut unaware = Vec::new();
                for member in self.read_one(group).await?.members {
                    let status = self.status(&member).await.ok();
                    let paused = status.and_then(|status| status.get("pause")?.as_bool());
                    if paused.unwrap_or(false) != on {
                        unaware.push(member.name);
                    }
                }
                Ok(unaware)
            }
        }
    }

    /// Reads the past timelines.
    ///
    /// # Errors
    /// As [`Target::read`].
    pub async fn history(&self, group: Option<GroupId>) -> anyhow::Result<Vec<HistoryEntry>> {
        match &self.reach {
            Reach::Store { dcs, scope } => {
                let keys = Keys::new(&Scope { group, ..scope.clone() });
                let view = dcs.range(&scope.root()).await.context("read the store")?;
                Ok(keys.state(&view).history)
            }
            Reach::Rest { groups } => {
                let known = groups.iter().find(|(id, _)| *id == group || group.is_none());
                let bases = known.map(|(_, bases)| bases.as_slice()).unwrap_or_default();
                let (_, rows) = self.ask(bases, "/history").await?;
                Ok(view::history_from_rest(&rows.to_string()))
            }
        }
    }

    /// Replaces the dynamic configuration, if it is still the one that was read.
    ///
    /// # Errors
    /// Somebody else changed it meanwhile, or it cannot be written.
    pub async fn replace_config(
        &self,
        group: &GroupView,
        config: &Map<String, Value>,
    ) -> anyhow::Result<()> {
        let text = Value::Object(config.clone()).to_string();
        match &self.reach {
            Reach::Store { dcs, scope } => {
                let keys = Keys::new(&Scope { group: group.group, ..scope.clone() });
                let unchanged =
                    Compare::Modified { key: keys.config(), revision: group.config_revision };
                let txn = Txn::just(Op::put(keys.config(), text)).when(unchanged);
                if !dcs.txn(txn).await.context("write the store")?.succeeded {
                    bail!("Config modification aborted due to concurrent changes");
                }
                Ok(())
            }
            Reach::Rest { .. } => {
                let leader = group.leader().or(group.members.first());
                let leader = leader.ok_or_else(|| anyhow!("the cluster has no members"))?;
                let body = Value::Object(config.clone());
                let answer = self.act(leader, Method::PUT, "/config", Some(&body)).await?;
                match answer.status {
                    200 => Ok(()),
                    status => bail!("configuration not changed: {status}, {}", answer.text()),
                }
            }
        }
    }

    /// Deletes all keys of a cluster, or of one group.
    ///
    /// # Errors
    /// The store cannot be written, or the cluster was not found in one.
    pub async fn remove(&self, group: Option<GroupId>) -> anyhow::Result<()> {
        let Reach::Store { dcs, scope } = &self.reach else {
            bail!("the cluster is known by REST alone: name its store, with -c FILE or --dcs-url");
        };
        let prefix = Scope { group, ..scope.clone() }.base();
        dcs.txn(Txn::just(Op::DeletePrefix { prefix })).await.context("write the store")?;
        Ok(())
    }

    /// Leaves a request for a switchover or failover in the store, for agents to find. `false`
    /// without a store.
    ///
    /// # Errors
    /// The store cannot be written.
    pub async fn leave_request(
        &self,
        group: Option<GroupId>,
        request: &FailoverRequest,
    ) -> anyhow::Result<bool> {
        let Reach::Store { dcs, scope } = &self.reach else { return Ok(false) };
        let keys = Keys::new(&Scope { group, ..scope.clone() });
        let text = serde_json::to_string(request).context("print the request")?;
        dcs.txn(Txn::just(Op::put(keys.failover(), text))).await.context("write the store")?;
        Ok(true)
    }

    /// Asks a member to do something, and waits until it is done.
    ///
    /// # Errors
    /// The member gave no answer. An answer with any status is none.
    pub async fn act(
        &self,
        member: &MemberView,
        method: Method,
        path: &str,
        body: Option<&Value>,
    ) -> Result<Answer, PeerError> {
        self.rest.send(method, &format!("{}{path}", member.api), body, ACTION).await
    }

    /// A member's own account of itself.
    ///
    /// # Errors
    /// The member gave no usable answer.
    pub async fn status(&self, member: &MemberView) -> anyhow::Result<Value> {
        self.get(&member.api, "/patroni").await
    }

    async fn get(&self, base: &str, path: &str) -> anyhow::Result<Value> {
        let url = format!("{base}{path}");
        let answer = self.rest.send(Method::GET, &url, None, QUICK).await?;
        if answer.status != 200 {
            return Err(PeerError::Status(answer.status).into());
        }
        Ok(serde_json::from_slice(&answer.body).map_err(PeerError::Nonsense)?)
    }

    /// The first answer that any node gives.
    async fn ask<'b>(&self, bases: &'b [String], path: &str) -> anyhow::Result<(&'b str, Value)> {
        let mut failed = anyhow!("the demo's note names no node");
        for base in bases {
            match self.get(base, path).await {
                Ok(answer) => return Ok((base, answer)),
                Err(error) => failed = error.context(format!("ask {base}{path}")),
            }
        }
        Err(failed)
    }
}

/// The named file, else patronictl's usual one if it exists; Patroni's variables win over both.
fn load(global: &Global) -> anyhow::Result<OperatorSettings> {
    let environment: Vec<(String, String)> = std::env::vars().collect();
    let usual = std::env::home_dir().map(|home| home.join(".config/patroni/patronictl.yaml"));
    let usual = usual.filter(|path| path.is_file());
    let path: Option<&Path> = global.config_file.as_deref().or(usual.as_deref());
    if let Some(named) = path.filter(|path| std::fs::metadata(path).is_err()) {
        bail!(
            "Provided config file {} not existing or no read rights. Check the -c/--config-file \
             parameter",
            named.display()
        );
    }
    let settings = kornak_config::load_operator(path, &environment)?;
    Ok(settings.with_own_certificate(|key| std::fs::File::open(key).is_ok()))
}

/// `[etcd3://]host[:port][/namespace]`
fn parse_dcs_url(url: &str) -> anyhow::Result<(Etcd3Settings, Option<String>)> {
    let expected = || anyhow!("--dcs-url: expected etcd3://host:port, found {url:?}");
    let (scheme, rest) = url.split_once("://").unwrap_or(("etcd3", url));
    let protocol = match scheme {
        "etcd3" | "etcd" | "http" => Scheme::Http,
        "https" => Scheme::Https,
        _ => return Err(expected()),
    };
    let (hosts, namespace) = rest.split_once('/').unwrap_or((rest, ""));
    let hosts: Option<Vec<HostPort>> =
        hosts.split(',').map(|host| HostPort::parse(host, Some(2379))).collect();
    let store = Etcd3Settings { protocol, ..Etcd3Settings::new(hosts.ok_or_else(expected)?) };
    Ok((store, (!namespace.is_empty()).then(|| namespace.to_owned())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stores_may_be_named_by_address() {
        for (url, expected) in [
            ("etcd3://a:1", Some((vec!["http://a:1"], None))),
            ("a,b:7", Some((vec!["http://a:2379", "http://b:7"], None))),
            ("https://a:1/prod", Some((vec!["https://a:1"], Some("prod")))),
            ("zookeeper://a:1", None),
            ("etcd3://", None),
        ] {
            let found = parse_dcs_url(url).ok();
            let found = found.map(|(store, namespace)| (store.endpoints(), namespace));
            let expected = expected.map(|(endpoints, namespace)| {
                let endpoints: Vec<String> = endpoints.into_iter().map(str::to_owned).collect();
                (endpoints, namespace.map(str::to_owned))
            });
            assert_eq!(found, expected, "{url}");
        }
    }
}

//! `kornak demote-cluster` and `kornak promote-cluster`: to a standby cluster and back.

use std::time::Duration;

use anyhow::{anyhow, bail};
use clap::Args;
use hyper::Method;
use jiff::Zoned;
use serde_json::{Map, Value, json};

use crate::output::{confirm, say};
use crate::render::{self, Format};
use crate::target::{Global, Target};
use crate::when;

#[derive(Debug, Args)]
pub struct DemoteArgs {
    cluster_name: Option<String>,
    /// Ask nothing.
    #[arg(long)]
    force: bool,
    /// Address of the remote primary.
    #[arg(long)]
    host: Option<String>,
    /// Port of the remote primary.
    #[arg(long)]
    port: Option<u16>,
    /// Command that fetches WAL of the remote primary.
    #[arg(long)]
    restore_command: Option<String>,
    /// Replication slot on the remote primary.
    #[arg(long)]
    primary_slot_name: Option<String>,
}

#[derive(Debug, Args)]
pub struct PromoteArgs {
    cluster_name: Option<String>,
    /// Ask nothing.
    #[arg(long)]
    force: bool,
}

/// The longest a change may take: a standby leader may have to fetch and replay a lot.
const CHANGE_LIMIT: Duration = Duration::from_secs(3600);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Change {
    Demote,
    Promote,
}

impl Change {
    /// `demot`, which patronictl completes to `demote`, `demoted` and `demotion`.
    fn stem(self) -> &'static str {
        match self {
            Self::Demote => "demot",
            Self::Promote => "promot",
        }
    }

    fn wanted_role(self) -> &'static str {
        match self {
            Self::Demote => "standby_leader",
            Self::Promote => "primary",
        }
    }
}

/// Makes the cluster follow another one.
///
/// # Errors
/// The cluster does already, it has no leader, or the operator said no.
pub async fn demote(global: &Global, args: DemoteArgs) -> anyhow::Result<()> {
    let DemoteArgs { cluster_name, force, host, port, restore_command, primary_slot_name } = args;
    if host.is_none() && port.is_none() && restore_command.is_none() {
        bail!("At least --host, --port or --restore-command should be specified");
    }
    let settings = [
        ("host", host.map(Value::from)),
        ("port", port.map(Value::from)),
        ("primary_slot_name", primary_slot_name.map(Value::from)),
        ("restore_command", restore_command.map(Value::from)),
    ];
    let given = settings.into_iter().filter_map(|(key, value)| Some((key.to_owned(), value?)));
    let section = Value::Object(given.collect::<Map<String, Value>>());
    change(global, cluster_name.as_deref(), force, Change::Demote, section).await
}

/// Makes a standby cluster run on its own.
///
/// # Errors
/// As [`demote`].
pub async fn promote(global: &Global, args: PromoteArgs) -> anyhow::Result<()> {
    change(global, args.cluster_name.as_deref(), args.force, Change::Promote, Value::Null).await
}

async fn change(
    global: &Global,
    name: Option<&str>,
    force: bool,
    change: Change,
    section: Value,
) -> anyhow::Result<()> {
    let stem = change.stem();
    let target = Target::find(global, name)?;
    let cluster = target.read(None).await?;
    let group = cluster.groups.first();
    let leader = group.and_then(|group| group.leader()).cloned();
    let leader =
        leader.ok_or_else(|| anyhow!("Cluster has no leader, {stem}ion is not possible"))?;
    if (leader.role == "standby_leader") == (change == Change::Demote) {
        bail!("Cluster is already in the required state");
    }
    say("Current cluster topology");
    say(&render::members(&cluster, false, Format::Pretty));
    let name = &target.name;
    if !force && !confirm(&format!("Are you sure you want to {stem}e {name} cluster?"))? {
        bail!("Aborted cluster {stem}ion");
    }
    let failed = format!("Failed to {stem}e {name} cluster");
    let body = json!({"standby_cluster": section});
    match target.act(&leader, Method::PATCH, "/config", Some(&body)).await {
        Ok(answer) if answer.status == 200 => {}
        Ok(answer) => {
            bail!("{failed}: /config PATCH status code={}, ({})", answer.status, answer.text())
        }
        Err(error) => return Err(anyhow::Error::new(error).context(failed)),
    }
    match tokio::time::timeout(CHANGE_LIMIT, settled(&target, &leader.name, change)).await {
        Ok(outcome) => outcome?,
        Err(_) => bail!("{failed}: not done within {} s", CHANGE_LIMIT.as_secs()),
    }
    say(&format!("{} cluster is successfully {stem}ed", when::short_stamp(&Zoned::now())));
    say(&render::members(&target.read(None).await?, false, Format::Pretty));
    Ok(())
}

/// Until the leader has the wanted role, and the old one runs again.
async fn settled(target: &Target, old: &str, change: Change) -> anyhow::Result<()> {
    let text = |status: Option<&Value>, key: &str| {
        status.and_then(|status| status.get(key)?.as_str()).map(str::to_owned)
    };
    loop {
        let group = target.read_one(None).await?;
        let leader = group.leader();
        let status = match leader {
            Some(leader) => target.status(leader).await.ok(),
            None => None,
        };
        let (role, state) = (text(status.as_ref(), "role"), text(status.as_ref(), "state"));
        let before = match group.member(old) {
            Some(member) => text(target.status(member).await.ok().as_ref(), "state"),
            None => None,
        };
        let running = |state: &Option<String>| state.as_deref() == Some("running");
        let old_is_back = change == Change::Promote || running(&before);
        if role.as_deref() == Some(change.wanted_role()) && running(&state) && old_is_back {
            return Ok(());
        }
        let none = "None".to_owned();
        let mut line = format!(
            "{} cluster is unlocked: {}, leader role: {}, leader state: {}",
            when::short_stamp(&Zoned::now()),
            if leader.is_none() { "True" } else { "False" },
            role.unwrap_or_else(|| none.clone()),
            state.unwrap_or(none),
        );
        let moved = leader.is_some_and(|leader| leader.name != old);
        if let (Change::Demote, true, Some(before)) = (change, moved, before) {
            line.push_str(&format!(", previous leader state: '{before}'"));
        }
        say(&line);
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
}

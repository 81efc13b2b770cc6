//! Verbs about single members: restart, reload, reinit, flush.

use std::time::Duration;

use anyhow::{anyhow, bail};
use clap::{Args, ValueEnum};
use hyper::Method;
use jiff::Zoned;
use kornak_agent::peers::Answer;
use kornak_cluster::GroupId;
use serde_json::{Map, Value, json};

use crate::output::{confirm, prompt, say};
use crate::render::{self, Format};
use crate::target::{Global, Target};
use crate::view::{GroupView, MemberView};
use crate::when;

/// Members by role, `-r`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Role {
    #[value(alias = "leader", alias = "master")]
    Primary,
    #[value(alias = "standby_leader")]
    StandbyLeader,
    Replica,
    /// All but the leader.
    #[value(alias = "standby-replica")]
    Standby,
    Any,
}

impl Role {
    fn matches(self, member: &MemberView) -> bool {
        match self {
            Self::Primary => member.role == "leader",
            Self::StandbyLeader => member.role == "standby_leader",
            Self::Replica | Self::Standby => !member.is_leader(),
            Self::Any => true,
        }
    }
}

#[derive(Debug, Args)]
pub struct RestartArgs {
    cluster_name: Option<String>,
    member_names: Vec<String>,
    #[arg(long, value_parser = super::group)]
    group: Option<GroupId>,
    /// Members with this role.
    #[arg(short, long, value_enum)]
    role: Option<Role>,
    /// One of them, whichever.
    #[arg(long)]
    any: bool,
    /// When; default: now.
    #[arg(long)]
    scheduled: Option<String>,
    /// Only servers older than this version.
    #[arg(short = 'p', long = "pg-version")]
    pg_version: Option<String>,
    /// Only servers that wait for a restart.
    #[arg(long)]
    pending: bool,
    /// Seconds a primary may take before another takes over.
    #[arg(long)]
    timeout: Option<u64>,
    /// Ask nothing.
    #[arg(long)]
    force: bool,
}

#[derive(Debug, Args)]
pub struct ReloadArgs {
    cluster_name: Option<String>,
    member_names: Vec<String>,
    #[arg(long, value_parser = super::group)]
    group: Option<GroupId>,
    #[arg(short, long, value_enum)]
    role: Option<Role>,
    #[arg(long)]
    force: bool,
}

#[derive(Debug, Args)]
pub struct ReinitArgs {
    cluster_name: Option<String>,
    member_names: Vec<String>,
    #[arg(long, value_parser = super::group)]
    group: Option<GroupId>,
    /// Copy from the leader, even if another source is preferred.
    #[arg(long)]
    from_leader: bool,
    /// Wait until the members run again.
    #[arg(long)]
    wait: bool,
    #[arg(long)]
    force: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Event {
    Restart,
    Switchover,
}

#[derive(Debug, Args)]
pub struct FlushArgs {
    cluster_name: Option<String>,
    member_names: Vec<String>,
    /// What is to be discarded.
    #[arg(long, value_enum)]
    target: Event,
    #[arg(long, value_parser = super::group)]
    group: Option<GroupId>,
    #[arg(short, long, value_enum)]
    role: Option<Role>,
    #[arg(long)]
    force: bool,
}

/// Which members a verb is about.
struct Choice {
    target: Target,
    group: GroupView,
    members: Vec<MemberView>,
}

impl Choice {
    /// Reads the cluster, shows it, and finds the members by name or role, asking if neither was
    /// given.
    async fn make(
        global: &Global,
        cluster: Option<&str>,
        number: Option<GroupId>,
        names: &[String],
        role: Option<Role>,
        force: bool,
        verb: &str,
    ) -> anyhow::Result<Self> {
        let target = Target::find(global, cluster)?;
        let number = number.or(target.own_group);
        let shown = target.read(number).await?;
        say(&render::members(&shown, false, Format::Pretty));
        let group = target.read_one(number).await?;
        let mut names = names.to_vec();
        if names.is_empty() && role.is_none() && !force {
            let all: Vec<&str> = group.members.iter().map(|member| member.name.as_str()).collect();
            let question = format!("Which member do you want to {verb} [{}]?", all.join(", "));
            let answer = prompt(&question, Some(""))?;
            names = answer
                .split([',', ' '])
                .filter(|name| !name.is_empty())
                .map(str::to_owned)
                .collect();
        }
        if let Some(name) = names.iter().find(|name| group.member(name).is_none()) {
            bail!("{name} is not a member of cluster {}", target.name);
        }
        let role = role.unwrap_or(Role::Any);
        let wanted = |member: &&MemberView| {
            role.matches(member) && (names.is_empty() || names.contains(&member.name))
        };
        let members: Vec<MemberView> = group.members.iter().filter(wanted).cloned().collect();
        if members.is_empty() {
            bail!("No members found to {verb}");
        }
        Ok(Self { target, group, members })
    }

    fn confirm(&self, verb: &str, at: Option<&str>, force: bool) -> anyhow::Result<()> {
        let names: Vec<&str> = self.members.iter().map(|member| member.name.as_str()).collect();
        let names = names.join(", ");
        let question = match at {
            Some(at) => {
                format!("Are you sure you want to schedule {verb} of members {names} at {at}?")
            }
            None => format!("Are you sure you want to {verb} members {names}?"),
        };
        if !force && !confirm(&question)? {
            bail!("Aborted {verb}");
        }
        Ok(())
    }

    /// Asks every chosen member; `judge` says what an answer means.
    async fn all(
        &self,
        method: Method,
        path: &str,
        body: Option<&Value>,
        verb: &str,
        judge: impl Fn(&MemberView, &Answer) -> Option<String>,
    ) -> anyhow::Result<Vec<&MemberView>> {
        let mut good = Vec::new();
        let mut failed = 0;
        for member in &self.members {
            let name = &member.name;
            match self.target.act(member, method.clone(), path, body).await {
                Ok(answer) => match judge(member, &answer) {
                    Some(text) => {
                        say(&text);
                        good.push(member);
                    }
                    None => {
                        failed += 1;
                        say(&format!(
                            "Failed: {verb} for member {name}, status code={}, ({})",
                            answer.status,
                            answer.text()
                        ));
                    }
                },
                Err(error) => {
                    failed += 1;
                    say(&format!("Failed: {verb} for member {name}, ({:#})", anyhow!(error)));
                }
            }
        }
        match failed {
            0 => Ok(good),
            count => bail!("{verb} failed for {count} of {} members", self.members.len()),
        }
    }
}

/// Restarts servers, one after the other.
///
/// # Errors
/// One of them failed, or the operator said no.
pub async fn restart(global: &Global, args: RestartArgs) -> anyhow::Result<()> {
    let RestartArgs { cluster_name, member_names, group, role, .. } = &args;
    let force = args.force;
    let mut choice = Choice::make(
        global,
        cluster_name.as_deref(),
        *group,
        member_names,
        *role,
        force,
        "restart",
    )
    .await?;
    let now = Zoned::now();
    let text = match args.scheduled {
        Some(text) => text,
        None if force => "now".to_owned(),
        None => {
            let example = when::example(&now);
            prompt(&format!("When should the restart take place (e.g. {example}) "), Some("now"))?
        }
    };
    let at = when::parse(&text, &now)?;
    choice.confirm("restart", at.as_deref(), force)?;
    if args.any {
        let index = rand::random_range(0..choice.members.len());
        choice.members = choice.members.drain(..).skip(index).take(1).collect();
    }
    let version = match args.pg_version {
        Some(version) => version,
        None if force => String::new(),
        None => prompt(
            "Restart if the PostgreSQL version is less than provided (e.g. 9.5.2) ",
            Some(""),
        )?,
    };
    let mut body = Map::new();
    if args.pending {
        body.insert("restart_pending".to_owned(), true.into());
    }
    if !version.is_empty() {
        body.insert("postgres_version".to_owned(), version.into());
    }
    if let Some(at) = at {
        if choice.group.pause {
            bail!("Can't schedule restart in the paused state");
        }
        body.insert("schedule".to_owned(), at.into());
    }
    if let Some(timeout) = args.timeout {
        body.insert("timeout".to_owned(), timeout.into());
    }
    let body = Value::Object(body);
    choice
        .all(Method::POST, "/restart", Some(&body), "restart", |member, answer| {
            matches!(answer.status, 200 | 202)
                .then(|| format!("Success: restart on member {}", member.name))
        })
        .await?;
    Ok(())
}

/// Makes members read their files again.
///
/// # Errors
/// As [`restart`].
pub async fn reload(global: &Global, args: ReloadArgs) -> anyhow::Result<()> {
    let ReloadArgs { cluster_name, member_names, group, role, force } = args;
    let choice =
        Choice::make(global, cluster_name.as_deref(), group, &member_names, role, force, "reload")
            .await?;
    choice.confirm("reload", None, force)?;
    let loop_wait =
        choice.group.config.as_ref().and_then(|config| config.get("loop_wait")?.as_u64());
    let loop_wait = loop_wait.unwrap_or(10);
    choice
        .all(Method::POST, "/reload", None, "reload", |member, answer| match answer.status {
            200 => Some(format!("No changes to apply on member {}", member.name)),
            202 => Some(format!(
                "Reload request received for member {} and will be processed within {loop_wait} \
                 seconds",
                member.name
            )),
            _ => None,
        })
        .await?;
    Ok(())
}

/// The longest a copy may take while `--wait` watches.
const COPY_LIMIT: Duration = Duration::from_secs(24 * 3600);

/// Makes members throw their data away and copy it anew.
///
/// # Errors
/// As [`restart`].
pub async fn reinit(global: &Global, args: ReinitArgs) -> anyhow::Result<()> {
    let ReinitArgs { cluster_name, member_names, group, from_leader, wait, force } = args;
    let names = &member_names;
    if force && names.is_empty() {
        bail!("reinit destroys data: name the members");
    }
    let choice =
        Choice::make(global, cluster_name.as_deref(), group, names, None, force, "reinitialize")
            .await?;
    choice.confirm("reinitialize", None, force)?;
    let body = json!({"force": force, "from_leader": from_leader});
    let started = choice
        .all(Method::POST, "/reinitialize", Some(&body), "reinitialize", |member, answer| {
            (answer.status == 200)
                .then(|| format!("Success: reinitialize for member {}", member.name))
        })
        .await?;
    if !wait {
        return Ok(());
    }
    let names: Vec<&str> = started.iter().map(|member| member.name.as_str()).collect();
    say(&format!("Waiting for reinitialize to complete on: {}", names.join(", ")));
    for member in started {
        let done = async {
            loop {
                tokio::time::sleep(Duration::from_secs(1)).await;
                let status = choice.target.status(member).await;
                let state = status
                    .ok()
                    .and_then(|status| Some(status.get("state")?.as_str()? == "running"));
                if state == Some(true) {
                    return;
                }
            }
        };
        if tokio::time::timeout(COPY_LIMIT, done).await.is_err() {
            bail!("{} does not run after {} h", member.name, COPY_LIMIT.as_secs() / 3600);
        }
        say(&format!("Reinitialize is completed on: {}", member.name));
    }
    Ok(())
}

/// Discards what was scheduled.
///
/// # Errors
/// As [`restart`].
pub async fn flush(global: &Global, args: FlushArgs) -> anyhow::Result<()> {
    let FlushArgs { cluster_name, member_names, target: event, group, role, force } = args;
    let name = cluster_name.as_deref();
    match event {
        Event::Restart => {
            let choice =
                Choice::make(global, name, group, &member_names, role, force, "flush").await?;
            choice.confirm("flush", None, force)?;
            choice
                .all(
                    Method::DELETE,
                    "/restart",
                    None,
                    "flush scheduled restart",
                    |member, answer| match answer.status {
                        200 => Some(format!(
                            "Success: flush scheduled restart for member {}",
                            member.name
                        )),
                        404 => Some(format!("{}: no restart is scheduled", member.name)),
                        _ => None,
                    },
                )
                .await?;
        }
        Event::Switchover => {
            let target = Target::find(global, name)?;
            let group = target.read_one(group.or(target.own_group)).await?;
            if group.scheduled.is_none() {
                say("No pending scheduled switchover");
                return Ok(());
            }
            let leader = group.leader().or(group.members.first());
            let leader = leader.ok_or_else(|| anyhow!("the cluster has no members"))?;
            let answer = target.act(leader, Method::DELETE, "/switchover", None).await?;
            match answer.status {
                200 => say(&format!("Success: {}", answer.text())),
                404 => say("No pending scheduled switchover"),
                status => bail!("Failed: flush scheduled switchover, {status}, {}", answer.text()),
            }
        }
    }
    Ok(())
}

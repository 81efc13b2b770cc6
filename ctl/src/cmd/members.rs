//! Verbs about single members: restart, reload, reinit, flush.

use std::time::Duration;

use anyhow::{anyhow, bail};
use clap::{Args, ValueEnum};
use hyper::Method;
use jiff::Zoned;
use kornak_cluster::{FailoverRequest, GroupId, discard};
use serde_json::{Map, Value, json};

use crate::output::{Told, confirm, prompt, say};
use crate::render::{self, Format};
use crate::target::{Global, Target};
use crate::view::{GroupView, MemberView};
use crate::when;

/// Members by role, `-r`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Role {
    Leader,
    #[value(alias = "master")]
    Primary,
    #[value(alias = "standby_leader")]
    StandbyLeader,
    Replica,
    /// Alias of replica.
    Standby,
    Any,
}

impl Role {
    pub(super) fn matches(self, member: &MemberView) -> bool {
        match self {
            Self::Leader => member.is_leader(),
            Self::Primary => member.role == "leader",
            Self::StandbyLeader => member.role == "standby_leader",
            Self::Replica | Self::Standby => !member.is_leader(),
            Self::Any => true,
        }
    }

    /// Whether a server of this role is in recovery, where the role says.
    pub(super) fn in_recovery(self) -> Option<bool> {
        match self {
            Self::Leader | Self::Any => None,
            Self::Primary => Some(false),
            Self::StandbyLeader | Self::Replica | Self::Standby => Some(true),
        }
    }

    pub(super) fn word(self) -> String {
        self.to_possible_value().map(|value| value.get_name().to_owned()).unwrap_or_default()
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
    #[arg(long)]
    pg_version: Option<String>,
    /// Only servers that wait for a restart.
    #[arg(long)]
    pending: bool,
    /// Seconds a primary may take before another takes over.
    #[arg(long)]
    timeout: Option<String>,
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
    /// The cluster, members of it, and what is to be discarded: restart or switchover.
    #[arg(required = true, value_name = "CLUSTER_NAME [MEMBER_NAMES]... TARGET")]
    words: Vec<String>,
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

/// How members are chosen.
struct Wanted<'a> {
    cluster: Option<&'a str>,
    group: Option<GroupId>,
    names: &'a [String],
    role: Role,
    force: bool,
    verb: &'a str,
}

impl Choice {
    /// Reads the cluster, shows it, and finds the members by name and role; only for `reinitialize`
    /// they must be named, and are asked for.
    async fn make(global: &Global, wanted: Wanted<'_>) -> anyhow::Result<Self> {
        let Wanted { cluster, group: number, names, role, force, verb } = wanted;
        let target = Target::find(global, cluster)?;
        let number = number.or(target.own_group);
        let shown = target.read(number).await?;
        let group = target.read_one(number).await?;
        let members = group.members.iter().filter(|member| role.matches(member));
        let mut members: Vec<MemberView> = members.cloned().collect();
        if names.is_empty() && members.is_empty() {
            bail!("{} cluster doesn't have any members", target.name);
        }
        say(&render::members(&shown, false, Format::Pretty));
        let all: Vec<&str> = members.iter().map(|member| member.name.as_str()).collect();
        let mut names = names.to_vec();
        if !names.is_empty() {
            names.retain(|name| all.contains(&name.as_str()));
            if names.is_empty() {
                bail!("No '{}' among provided members", role.word());
            }
        } else if verb == "reinitialize" {
            if !force {
                let question = format!("Which member do you want to {verb} [{}]?", all.join(", "));
                names.push(prompt(&question, Some(""))?);
            }
        } else {
            names = all.iter().map(|name| (*name).to_owned()).collect();
        }
        if let Some(name) = names.iter().find(|name| !all.contains(&name.as_str())) {
            bail!("{name} is not a member of cluster");
        }
        members.retain(|member| names.contains(&member.name));
        Ok(Self { target, group, members })
    }

    fn names(&self) -> String {
        let names: Vec<&str> = self.members.iter().map(|member| member.name.as_str()).collect();
        names.join(", ")
    }

    fn confirm(&self, verb: &str, force: bool) -> anyhow::Result<()> {
        let question = format!("Are you sure you want to {verb} members {}?", self.names());
        if !force && !confirm(&question)? {
            bail!("Aborted {verb}");
        }
        Ok(())
    }

    /// Asks one member. `judge` says what an answer that is no failure means; a failure is printed,
    /// and answered with `None`.
    async fn ask(
        &self,
        member: &MemberView,
        request: (Method, &str, Option<&Value>),
        verb: &str,
        judge: impl Fn(u16) -> Option<String>,
    ) -> Option<()> {
        let (method, path, body) = request;
        let name = &member.name;
        let failed = match self.target.act(member, method, path, body).await {
            Ok(answer) => match judge(answer.status) {
                Some(text) => {
                    say(&text);
                    return Some(());
                }
                None if answer.status == 409 => {
                    format!("Failed: another {verb} is already scheduled on member {name}")
                }
                None => format!(
                    "Failed: {verb} for member {name}, status code={}, ({})",
                    answer.status,
                    answer.text()
                ),
            },
            Err(error) => format!("Failed: {verb} for member {name}, ({:#})", anyhow!(error)),
        };
        say(&failed);
        None
    }
}

/// Told already: some members failed.
fn all_or(verb: &str, failed: usize) -> anyhow::Result<()> {
    match failed {
        0 => Ok(()),
        count => Err(Told(format!("{verb} failed for {count} members")).into()),
    }
}

/// Restarts servers, one after the other.
///
/// # Errors
/// One of them failed, or the operator said no.
pub async fn restart(global: &Global, args: RestartArgs) -> anyhow::Result<()> {
    let RestartArgs { cluster_name, member_names, group, force, .. } = &args;
    let force = *force;
    let wanted = Wanted {
        cluster: cluster_name.as_deref(),
        group: *group,
        names: member_names,
        role: args.role.unwrap_or(Role::Any),
        force,
        verb: "restart",
    };
    let mut choice = Choice::make(global, wanted).await?;
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
    if args.pending && at.is_none() {
        choice.members.retain(|member| member.pending_restart);
    }
    if args.any && !choice.members.is_empty() {
        let index = rand::random_range(0..choice.members.len());
        choice.members = choice.members.drain(..).skip(index).take(1).collect();
    }
    confirm_restart(&choice, at.as_deref(), args.pending, force)?;
    let version = match args.pg_version {
        Some(version) => version,
        None if force => String::new(),
        None => prompt(
            "Restart if the PostgreSQL version is less than provided (e.g. 9.5.2) ",
            Some(""),
        )?,
    };
    if !version.is_empty() {
        kornak_agent::schedule::version_number(&version).map_err(anyhow::Error::msg)?;
    }
    let scheduled = at.is_some();
    if scheduled && choice.group.pause {
        bail!("Can't schedule restart in the paused state");
    }
    let body = restart_request(args.pending, version, at, args.timeout);
    let mut failed = 0;
    for member in &choice.members {
        if scheduled && force && member.scheduled_restart.is_some() {
            // Refused or not: whether the new one is taken is what counts.
            discard::goes_on_either_way(
                choice.target.act(member, Method::DELETE, "/restart", None).await,
            );
        }
        let request = (Method::POST, "/restart", Some(&body));
        let judge = |status| match status {
            200 => Some(format!("Success: restart on member {}", member.name)),
            202 => Some(format!("Success: restart scheduled on member {}", member.name)),
            _ => None,
        };
        failed += usize::from(choice.ask(member, request, "restart", judge).await.is_none());
    }
    all_or("restart", failed)
}

/// The body of the request for a restart.
fn restart_request(
    pending: bool,
    version: String,
    at: Option<String>,
    timeout: Option<String>,
) -> Value {
    let mut body = Map::new();
    if pending {
        body.insert("restart_pending".to_owned(), true.into());
    }
    if !version.is_empty() {
        body.insert("postgres_version".to_owned(), version.into());
    }
    if let Some(at) = at {
        body.insert("schedule".to_owned(), at.into());
    }
    if let Some(timeout) = timeout {
        body.insert("timeout".to_owned(), timeout.into());
    }
    Value::Object(body)
}

fn confirm_restart(
    choice: &Choice,
    at: Option<&str>,
    pending: bool,
    force: bool,
) -> anyhow::Result<()> {
    let Some(at) = at else { return choice.confirm("restart", force) };
    let question = if pending {
        "The nodes needing a restart will be identified at the scheduled time, and might be \
         different from the ones showing pending restart right now. Is this fine?"
            .to_owned()
    } else {
        // As Python prints a time.
        let at = at.replacen('T', " ", 1);
        format!("Are you sure you want to schedule restart of members {} at {at}?", choice.names())
    };
    if !force && !confirm(&question)? {
        bail!("Aborted scheduled restart");
    }
    Ok(())
}

/// Makes members read their files again.
///
/// # Errors
/// As [`restart`].
pub async fn reload(global: &Global, args: ReloadArgs) -> anyhow::Result<()> {
    let ReloadArgs { cluster_name, member_names, group, role, force } = args;
    let wanted = Wanted {
        cluster: cluster_name.as_deref(),
        group,
        names: &member_names,
        role: role.unwrap_or(Role::Any),
        force,
        verb: "reload",
    };
    let choice = Choice::make(global, wanted).await?;
    choice.confirm("reload", force)?;
    let loop_wait =
        choice.group.config.as_ref().and_then(|config| config.get("loop_wait")?.as_u64());
    let loop_wait = loop_wait.unwrap_or(10);
    let mut failed = 0;
    for member in &choice.members {
        let name = &member.name;
        let judge = |status| match status {
            200 => Some(format!("No changes to apply on member {name}")),
            202 => Some(format!(
                "Reload request received for member {name} and will be processed within \
                 {loop_wait} seconds"
            )),
            _ => None,
        };
        let request = (Method::POST, "/reload", None);
        failed += usize::from(choice.ask(member, request, "reload", judge).await.is_none());
    }
    all_or("reload", failed)
}

/// The longest a copy may take while `--wait` watches.
const COPY_LIMIT: Duration = Duration::from_secs(24 * 3600);

/// Makes members throw their data away and copy it anew.
///
/// # Errors
/// As [`restart`].
pub async fn reinit(global: &Global, args: ReinitArgs) -> anyhow::Result<()> {
    let ReinitArgs { cluster_name, member_names, group, from_leader, wait, force } = args;
    let wanted = Wanted {
        cluster: cluster_name.as_deref(),
        group,
        names: &member_names,
        role: Role::Replica,
        force,
        verb: "reinitialize",
    };
    let choice = Choice::make(global, wanted).await?;
    choice.confirm("reinitialize", force)?;
    let mut started = Vec::new();
    let mut failed = 0;
    for member in &choice.members {
        if start_copy(&choice, member, from_leader, force).await? {
            started.push(member);
        } else {
            failed += 1;
        }
    }
    if wait {
        await_copies(&choice.target, started).await?;
    }
    all_or("reinitialize", failed)
}

/// Asks for a copy; if one is under way, asks the operator whether to begin anew.
async fn start_copy(
    choice: &Choice,
    member: &MemberView,
    from_leader: bool,
    force: bool,
) -> anyhow::Result<bool> {
    let name = &member.name;
    let mut force = force;
    loop {
        let body = json!({"force": force, "from_leader": from_leader});
        let answer = choice.target.act(member, Method::POST, "/reinitialize", Some(&body)).await;
        let why = match answer {
            Ok(answer) if answer.status < 400 => {
                say(&format!("Success: reinitialize for member {name}"));
                return Ok(true);
            }
            Ok(answer) => {
                let text = answer.text();
                say(&format!(
                    "Failed: reinitialize for member {name}, status code={}, ({text})",
                    answer.status
                ));
                text
            }
            Err(error) => {
                say(&format!("Failed: reinitialize for member {name}, ({:#})", anyhow!(error)));
                return Ok(false);
            }
        };
        let busy = why.ends_with(" already in progress");
        if force || !busy || !confirm("Do you want to cancel it and reinitialize anyway?")? {
            return Ok(false);
        }
        force = true;
    }
}

async fn await_copies(target: &Target, mut open: Vec<&MemberView>) -> anyhow::Result<()> {
    let began = std::time::Instant::now();
    let mut told = 0;
    while !open.is_empty() {
        if told != open.len() {
            let names: Vec<&str> = open.iter().map(|member| member.name.as_str()).collect();
            say(&format!("Waiting for reinitialize to complete on: {}", names.join(", ")));
            told = open.len();
        }
        if began.elapsed() > COPY_LIMIT {
            bail!("not complete after {} h", COPY_LIMIT.as_secs() / 3600);
        }
        tokio::time::sleep(Duration::from_secs(2)).await;
        let mut left = Vec::new();
        for member in open {
            let status = target.status(member).await.ok();
            let state = status.as_ref().and_then(|status| status.get("state")?.as_str());
            // Between the old data's end and the copy's begin a node is stopped.
            if state
                .is_none_or(|state| matches!(state, "creating replica" | "stopped" | "stopping"))
            {
                left.push(member);
            } else {
                say(&format!("Reinitialize is completed on: {}", member.name));
            }
        }
        open = left;
    }
    Ok(())
}

/// Discards what was scheduled.
///
/// # Errors
/// As [`restart`].
pub async fn flush(global: &Global, args: FlushArgs) -> anyhow::Result<()> {
    let FlushArgs { mut words, group, role, force } = args;
    let word = words.pop().unwrap_or_default();
    let event = Event::from_str(&word, true)
        .map_err(|_| anyhow!("expected restart or switchover at the end, found {word:?}"))?;
    let names = words.split_off(words.len().min(1));
    let cluster = words.first().map(String::as_str);
    match event {
        Event::Restart => {
            let role = role.unwrap_or(Role::Any);
            let wanted = Wanted { cluster, group, names: &names, role, force, verb: "flush" };
            let choice = Choice::make(global, wanted).await?;
            choice.confirm("flush", force)?;
            let mut failed = 0;
            let verb = "flush scheduled restart";
            for member in &choice.members {
                let name = &member.name;
                if member.scheduled_restart.is_none() {
                    say(&format!("No scheduled restart for member {name}"));
                    continue;
                }
                let judge =
                    |status| (status < 400).then(|| format!("Success: {verb} for member {name}"));
                let request = (Method::DELETE, "/restart", None);
                failed += usize::from(choice.ask(member, request, verb, judge).await.is_none());
            }
            all_or(verb, failed)
        }
        Event::Switchover => flush_switchover(global, cluster, group).await,
    }
}

async fn flush_switchover(
    global: &Global,
    cluster: Option<&str>,
    group: Option<GroupId>,
) -> anyhow::Result<()> {
    let target = Target::find(global, cluster)?;
    let number = group.or(target.own_group);
    let group = target.read_one(number).await?;
    if group.scheduled.is_none() {
        say("No pending scheduled switchover");
        return Ok(());
    }
    let leader = group.leader();
    let others = group.members.iter().filter(|member| Some(*member) != leader);
    for member in leader.into_iter().chain(others).filter(|member| !member.api.is_empty()) {
        match target.act(member, Method::DELETE, "/switchover", None).await {
            Ok(answer) if answer.status == 200 => {
                say(&format!("Success: {}", answer.text()));
                return Ok(());
            }
            Ok(answer) if answer.status == 404 => {
                say(&format!("Failed: {}", answer.text()));
                return Err(Told(answer.text()).into());
            }
            Ok(answer) => say(&format!(
                "Failed: member={}, status_code={}, ({})",
                member.name,
                answer.status,
                answer.text()
            )),
            Err(error) => crate::output::complain(&format!(
                "Member {} is not accessible: {:#}",
                member.name,
                anyhow!(error)
            )),
        }
    }
    say(&format!(
        "{} Could not find any accessible member of cluster {}",
        when::stamp(&Zoned::now()),
        target.name
    ));
    target.leave_request(number, &FailoverRequest::default()).await?;
    Ok(())
}

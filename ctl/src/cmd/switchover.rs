//! `kornak switchover` and `kornak failover`: ask what is missing, refuse what cannot be, ask the
//! leader to do it. Questions, their order and their words are patronictl's.

use anyhow::{Context, anyhow, bail};
use clap::Args;
use hyper::Method;
use jiff::Zoned;
use kornak_agent::peers::{Answer, PeerError};
use kornak_cluster::{FailoverRequest, GroupId};
use serde_json::{Value, json};

use crate::output::{Told, confirm, prompt, say};
use crate::render::{self, Format};
use crate::target::{Global, Target};
use crate::view::GroupView;
use crate::when;

#[derive(Debug, Args)]
pub struct SwitchoverArgs {
    cluster_name: Option<String>,
    #[arg(long, value_parser = super::group)]
    group: Option<GroupId>,
    /// The current leader.
    #[arg(long, alias = "primary")]
    leader: Option<String>,
    /// Member that takes over; default: the best.
    #[arg(long)]
    candidate: Option<String>,
    /// When, such as 2027-01-01T10:00+01:00; default: now.
    #[arg(long)]
    scheduled: Option<String>,
    /// Ask nothing.
    #[arg(long)]
    force: bool,
}

#[derive(Debug, Args)]
pub struct FailoverArgs {
    cluster_name: Option<String>,
    #[arg(long, value_parser = super::group)]
    group: Option<GroupId>,
    #[arg(long, alias = "primary", hide = true)]
    leader: Option<String>,
    /// Member that takes over.
    #[arg(long)]
    candidate: Option<String>,
    /// Ask nothing.
    #[arg(long)]
    force: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Action {
    Switchover,
    Failover,
}

impl Action {
    fn word(self) -> &'static str {
        match self {
            Self::Switchover => "switchover",
            Self::Failover => "failover",
        }
    }

    fn title(self) -> &'static str {
        match self {
            Self::Switchover => "Switchover",
            Self::Failover => "Failover",
        }
    }
}

/// Hands over now or later.
///
/// # Errors
/// The switchover was refused, by the operator, by us or by the cluster.
pub async fn switchover(global: &Global, args: SwitchoverArgs) -> anyhow::Result<()> {
    run(global, Action::Switchover, args).await
}

/// Makes a standby leader.
///
/// # Errors
/// As [`switchover`].
pub async fn failover(global: &Global, args: FailoverArgs) -> anyhow::Result<()> {
    let FailoverArgs { cluster_name, group, leader, candidate, force } = args;
    let action = if leader.is_some() {
        say("Supplying a leader name using this command is deprecated and will be removed in a \
             future version of Patroni, change your scripts to use `switchover` instead.");
        say("Executing switchover!");
        Action::Switchover
    } else {
        Action::Failover
    };
    let args = SwitchoverArgs { cluster_name, group, leader, candidate, scheduled: None, force };
    run(global, action, args).await
}

async fn run(global: &Global, action: Action, args: SwitchoverArgs) -> anyhow::Result<()> {
    let target = Target::find(global, args.cluster_name.as_deref())?;
    let needs = || format!("a {} needs the store", action.word());
    let cluster = target.read(args.group).await.with_context(needs)?;
    say("Current cluster topology");
    say(&render::members(&cluster, false, Format::Pretty));
    let number = match (cluster.citus, args.group) {
        (true, None) if args.force => bail!("For Citus clusters the --group must be specified"),
        (true, None) => Some(ask_group()?),
        (_, group) => group,
    };
    let find = |group: &GroupView| number.is_none() || group.group == number;
    let group = cluster.groups.into_iter().find(find);
    let group = group.ok_or_else(|| anyhow!("the cluster has no such group"))?;

    let wish = ask(action, &args, &target.name, &group)?;
    let answer = send(&target, action, &group, &wish).await;
    report(&target, action, &wish, number, answer).await?;
    say(&render::members(&target.read(number).await?, false, Format::Pretty));
    Ok(())
}

fn ask_group() -> anyhow::Result<GroupId> {
    loop {
        let answer = prompt("Citus group", None)?;
        match GroupId::parse(&answer) {
            Some(group) => return Ok(group),
            None => say(&format!("Error: '{answer}' is not a valid integer.")),
        }
    }
}

/// A request, complete and confirmed.
struct Wish {
    leader: Option<String>,
    candidate: Option<String>,
    /// ISO 8601 with an offset.
    at: Option<String>,
}

fn ask(
    action: Action,
    args: &SwitchoverArgs,
    name: &str,
    group: &GroupView,
) -> anyhow::Result<Wish> {
    let current = group.leader().map(|member| member.name.as_str());
    let leader = match action {
        Action::Failover => None,
        Action::Switchover => Some(ask_leader(args, name, group, current)?),
    };
    let candidates = group.candidates();
    if candidates.is_empty() {
        bail!("No candidates found to {} to", action.word());
    }
    let candidate = match &args.candidate {
        Some(candidate) => candidate.clone(),
        None if args.force => String::new(),
        None => {
            let names: Vec<String> = candidates.iter().map(|name| format!("'{name}'")).collect();
            prompt(&format!("Candidate [{}]", names.join(", ")), Some(""))?
        }
    };
    let candidate = Some(candidate).filter(|candidate| !candidate.is_empty());
    match &candidate {
        None if action == Action::Failover => {
            bail!("Failover could be performed only to a specific candidate")
        }
        Some(candidate) if Some(candidate.as_str()) == current => {
            bail!("Member {candidate} is already the leader of cluster {name}")
        }
        Some(candidate) if !candidates.contains(&candidate.as_str()) => {
            bail!("Member {candidate} does not exist in cluster {name} or is tagged as nofailover")
        }
        Some(candidate)
            if action == Action::Failover
                && !args.force
                && group.is_unsafe_target(candidate)
                && !confirm(&format!(
                    "Are you sure you want to failover to the asynchronous node {candidate}?"
                ))? =>
        {
            bail!("Aborting failover")
        }
        _ => {}
    }
    let at = if action == Action::Switchover { ask_time(args, group)? } else { None };
    if !args.force {
        let demoting = current.map(|leader| format!(", demoting current leader {leader}"));
        let demoting = demoting.unwrap_or_default();
        let (question, what) = match &at {
            Some(at) => (
                format!("schedule switchover of cluster {name} at {at}{demoting}"),
                "scheduled switchover",
            ),
            None => (format!("{} cluster {name}{demoting}", action.word()), action.word()),
        };
        if !confirm(&format!("Are you sure you want to {question}?"))? {
            bail!("Aborting {what}");
        }
    }
    Ok(Wish { leader, candidate, at })
}

fn ask_leader(
    args: &SwitchoverArgs,
    name: &str,
    group: &GroupView,
    current: Option<&str>,
) -> anyhow::Result<String> {
    let current = current.ok_or_else(|| anyhow!("This cluster has no leader"))?;
    let leader = match &args.leader {
        Some(leader) => leader.clone(),
        None if args.force => current.to_owned(),
        None => {
            let word = if group.standby_cluster { "Standby Leader" } else { "Primary" };
            prompt(word, Some(current))?
        }
    };
    if leader != current {
        bail!("Member {leader} is not the leader of cluster {name}");
    }
    Ok(leader)
}

fn ask_time(args: &SwitchoverArgs, group: &GroupView) -> anyhow::Result<Option<String>> {
    let now = Zoned::now();
    let text = match &args.scheduled {
        Some(text) => text.clone(),
        None if args.force => "now".to_owned(),
        None => {
            let example = when::example(&now);
            let question = format!("When should the switchover take place (e.g. {example} ) ");
            prompt(&question, Some("now"))?
        }
    };
    let at = when::parse(&text, &now)?;
    if at.is_some() && group.pause {
        bail!("Can't schedule switchover in the paused state");
    }
    Ok(at)
}

/// Asks the leader; without one the candidate. Kornak's nodes pass it on to whom it concerns, so if
/// the first cannot be reached at all, the others are asked.
async fn send(
    target: &Target,
    action: Action,
    group: &GroupView,
    wish: &Wish,
) -> Result<Answer, PeerError> {
    let mut body = serde_json::Map::new();
    for (key, value) in
        [("leader", &wish.leader), ("candidate", &wish.candidate), ("scheduled_at", &wish.at)]
    {
        if let Some(value) = value {
            body.insert(key.to_owned(), json!(value));
        }
    }
    let body = Value::Object(body);
    let path = format!("/{}", action.word());
    let candidate = wish.candidate.as_deref().and_then(|name| group.member(name));
    let first = group.leader().or(candidate);
    let others = group.members.iter().filter(|member| Some(*member) != first);
    let mut outcome = Err(PeerError::Address(String::new()));
    for member in first.into_iter().chain(others) {
        outcome = target.act(member, Method::POST, &path, Some(&body)).await;
        match &outcome {
            // Nothing was sent.
            Err(PeerError::Connect(_) | PeerError::Address(_)) => {}
            _ => return outcome,
        }
    }
    outcome
}

async fn report(
    target: &Target,
    action: Action,
    wish: &Wish,
    group: Option<GroupId>,
    answer: Result<Answer, PeerError>,
) -> anyhow::Result<()> {
    let stamp = when::stamp(&Zoned::now());
    match answer {
        Ok(answer) if matches!(answer.status, 200 | 202) => {
            say(&format!("{stamp} {}", answer.text()));
            Ok(())
        }
        Ok(answer) => {
            let (title, text) = (action.title(), answer.text());
            let failed = format!("{title} failed, details: {}, {text}", answer.status);
            say(&failed);
            Err(Told(failed).into())
        }
        Err(error) if matches!(error, PeerError::Connect(_) | PeerError::Address(_)) => {
            say(&format!(
                "{stamp} Could not {} using Patroni api, falling back to DCS",
                action.word()
            ));
            let request = FailoverRequest {
                leader: wish.leader.clone(),
                member: wish.candidate.clone(),
                scheduled_at: wish.at.clone(),
            };
            match target.leave_request(group, &request).await? {
                true => Ok(()),
                false => Err(anyhow::Error::new(error).context("no node can be reached")),
            }
        }
        // It may be under way: a second request through the store could undo it.
        Err(error) => {
            Err(anyhow::Error::new(error).context(format!("{} status unknown", action.title())))
        }
    }
}

#[cfg(test)]
mod tests {
    use crate::view::MemberView;

    use super::*;

    fn group(leader: Option<&str>) -> GroupView {
        let member = |name: &str| MemberView {
            name: name.to_owned(),
            role: if leader == Some(name) { "leader" } else { "replica" }.to_owned(),
            ..MemberView::default()
        };
        GroupView { members: ["a", "b", "c"].map(member).into(), ..GroupView::default() }
    }

    fn forced(leader: Option<&str>, candidate: Option<&str>, at: Option<&str>) -> SwitchoverArgs {
        SwitchoverArgs {
            cluster_name: None,
            group: None,
            leader: leader.map(str::to_owned),
            candidate: candidate.map(str::to_owned),
            scheduled: at.map(str::to_owned),
            force: true,
        }
    }

    #[test]
    fn what_cannot_be_is_refused_in_patronictls_words() {
        let whole = group(Some("a"));
        let paused = GroupView { pause: true, ..group(Some("a")) };
        let mut alone = group(Some("a"));
        alone.members.truncate(1);
        let (switch, fail) = (Action::Switchover, Action::Failover);
        for (action, group, args, expected) in [
            (switch, &group(None), forced(None, None, None), "This cluster has no leader"),
            (
                switch,
                &whole,
                forced(Some("b"), None, None),
                "Member b is not the leader of cluster demo",
            ),
            (switch, &alone, forced(None, None, None), "No candidates found to switchover to"),
            (
                switch,
                &whole,
                forced(None, Some("a"), None),
                "Member a is already the leader of cluster demo",
            ),
            (
                switch,
                &whole,
                forced(None, Some("x"), None),
                "Member x does not exist in cluster demo or is tagged as nofailover",
            ),
            (
                switch,
                &paused,
                forced(None, Some("b"), Some("2099-01-01")),
                "Can't schedule switchover in the paused state",
            ),
            (
                fail,
                &whole,
                forced(None, None, None),
                "Failover could be performed only to a specific candidate",
            ),
        ] {
            let refusal = ask(action, &args, "demo", group).err().map(|error| error.to_string());
            assert_eq!(refusal.as_deref(), Some(expected));
        }
    }

    #[test]
    fn a_forced_switchover_asks_nothing() {
        let wish = ask(Action::Switchover, &forced(None, None, None), "demo", &group(Some("a")));
        let wish = wish.expect("nothing is wrong with it");
        assert_eq!((wish.leader.as_deref(), wish.candidate, wish.at), (Some("a"), None, None));
        let wish = ask(Action::Failover, &forced(None, Some("b"), None), "demo", &group(None));
        assert_eq!(wish.expect("nothing is wrong").candidate.as_deref(), Some("b"));
    }
}

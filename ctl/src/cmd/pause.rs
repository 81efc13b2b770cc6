//! `kornak pause` and `kornak resume`: maintenance mode, a key of the dynamic configuration.

use std::time::{Duration, Instant};

use anyhow::{anyhow, bail};
use clap::Args;
use hyper::Method;
use kornak_cluster::GroupId;
use serde_json::json;

use crate::output::{Told, complain, say};
use crate::target::{Global, Target};

#[derive(Debug, Args)]
pub struct PauseArgs {
    cluster_name: Option<String>,
    #[arg(long, value_parser = super::group)]
    group: Option<GroupId>,
    /// Wait until every member has noticed.
    #[arg(long)]
    wait: bool,
}

/// Between two looks at whether all members have noticed.
const LOOK: Duration = Duration::from_millis(200);

/// Turns maintenance mode on or off.
///
/// # Errors
/// Maintenance mode is on or off already, or no member could be asked.
pub async fn run(global: &Global, args: &PauseArgs, on: bool) -> anyhow::Result<()> {
    let target = Target::find(global, args.cluster_name.as_deref())?;
    let number = args.group.or(target.own_group);
    let group = target.read_one(number).await?;
    if group.pause == on {
        bail!("Cluster is {} paused", if on { "already" } else { "not" });
    }
    let body = json!({"pause": on.then_some(true)});
    let leader = group.leader();
    let others = group.members.iter().filter(|member| Some(*member) != leader);
    let word = if on { "pause" } else { "resume" };
    let mut answer = None;
    for member in leader.into_iter().chain(others).filter(|member| !member.api.is_empty()) {
        match target.act(member, Method::PATCH, "/config", Some(&body)).await {
            Ok(found) => {
                answer = Some(found);
                break;
            }
            Err(error) => complain(&format!(
                "Member {} is not accessible: {:#}",
                member.name,
                anyhow::Error::new(error)
            )),
        }
    }
    let answer = answer.ok_or_else(|| anyhow!("Can not find accessible cluster member"))?;
    if answer.status != 200 {
        let text = answer.text();
        let failed =
            format!("Failed: {word} cluster management status code={}, ({text})", answer.status);
        say(&failed);
        return Err(Told(failed).into());
    }
    if args.wait {
        say(&format!("'{word}' request sent, waiting until it is recognized by all nodes"));
        let loop_wait = group.config.as_ref().and_then(|config| config.get("loop_wait")?.as_u64());
        let loop_wait = loop_wait.unwrap_or(10);
        let unaware = wait(&target, number, on, Duration::from_secs(loop_wait + 1)).await?;
        if !unaware.is_empty() {
            let failed = format!(
                "{} members didn't recognized pause state after {loop_wait} seconds",
                unaware.join(", ")
            );
            say(&failed);
            return Err(Told(failed).into());
        }
    }
    say(&format!("Success: cluster management is {}", if on { "paused" } else { "resumed" }));
    Ok(())
}

/// Waits until all members have noticed; returns those that have not when the time is over.
async fn wait(
    target: &Target,
    number: Option<GroupId>,
    on: bool,
    limit: Duration,
) -> anyhow::Result<Vec<String>> {
    let began = Instant::now();
    loop {
        let unaware = target.unaware(number, on).await?;
        if unaware.is_empty() || began.elapsed() > limit {
            return Ok(unaware);
        }
        tokio::time::sleep(LOOK).await;
    }
}

//! `kornak remove`: deletes all that the store knows of a cluster, after three questions.

use anyhow::bail;
use clap::Args;
use kornak_cluster::GroupId;

use crate::output::{prompt, say};
use crate::render::{self, Format};
use crate::target::{Global, Target};

/// Text that the operator has to type.
const AWARE: &str = "Yes I am aware";

#[derive(Debug, Args)]
pub struct RemoveArgs {
    cluster_name: String,
    #[arg(long, value_parser = super::group)]
    group: Option<GroupId>,
    #[arg(short, long, value_enum, default_value_t)]
    format: Format,
}

/// Removes a cluster from the store. Its servers and their data stay as they are; agents that still
/// run would register again.
///
/// # Errors
/// An answer was not the expected one, or the store cannot be written.
pub async fn run(global: &Global, args: &RemoveArgs) -> anyhow::Result<()> {
    let name = &args.cluster_name;
    let target = Target::find(global, Some(name))?;
    let cluster = target.read(args.group).await?;
    if cluster.citus && args.group.is_none() {
        bail!("For Citus clusters the --group must me specified");
    }
    say(&render::members(&cluster, false, args.format));
    if prompt("Please confirm the cluster name to remove", None)? != *name {
        bail!("Cluster names specified do not match");
    }
    let question = format!(
        "You are about to remove all information in DCS for {name}, please type: \"{AWARE}\""
    );
    if prompt(&question, None)? != AWARE {
        bail!("You did not exactly type \"{AWARE}\"");
    }
    if let Some(leader) = cluster.groups.first().and_then(|group| group.leader()) {
        let question =
            "This cluster currently is healthy. Please specify the leader name to continue";
        if prompt(question, None)? != leader.name {
            bail!("You did not specify the current leader of the cluster");
        }
    }
    target.remove(args.group).await
}

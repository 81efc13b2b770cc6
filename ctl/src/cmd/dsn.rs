//! `kornak dsn`.

use anyhow::{anyhow, bail};
use clap::Args;
use kornak_cluster::GroupId;

use super::members::Role;
use crate::output::say;
use crate::target::{Global, Target};
use crate::view::{ClusterView, MemberView};

#[derive(Debug, Args)]
pub struct DsnArgs {
    cluster_name: Option<String>,
    #[arg(long, value_parser = super::group)]
    group: Option<GroupId>,
    /// Of the first member with this role; default: of the leader.
    #[arg(short, long, value_enum)]
    role: Option<Role>,
    /// Of this member.
    #[arg(short, long)]
    member: Option<String>,
}

/// Prints `host=… port=…`.
///
/// # Errors
/// No member is meant, or the cluster cannot be read.
pub async fn run(global: &Global, args: &DsnArgs) -> anyhow::Result<()> {
    let target = Target::find(global, args.cluster_name.as_deref())?;
    let cluster = target.read(args.group).await?;
    let member = choose(&cluster, args.role, args.member.as_deref())?;
    let member = member.ok_or_else(|| anyhow!("Can not find a suitable member"))?;
    say(&format!("host={} port={}", member.host, member.port.unwrap_or(5432)));
    Ok(())
}

/// The first member that is meant; without a role or a name the leader.
///
/// # Errors
/// Both were given.
pub fn choose<'c>(
    cluster: &'c ClusterView,
    role: Option<Role>,
    name: Option<&str>,
) -> anyhow::Result<Option<&'c MemberView>> {
    if name.is_some() && role.is_some() {
        bail!("--role and --member are mutually exclusive options");
    }
    let role = role.unwrap_or(if name.is_some() { Role::Any } else { Role::Leader });
    let mut members = cluster.groups.iter().flat_map(|group| &group.members);
    Ok(members.find(|member| role.matches(member) && name.is_none_or(|name| member.name == name)))
}

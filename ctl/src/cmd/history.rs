//! `kornak history`.

use clap::Args;
use kornak_cluster::GroupId;

use crate::output::say;
use crate::render::{self, Format};
use crate::target::{Global, Target};

#[derive(Debug, Args)]
pub struct HistoryArgs {
    cluster_name: Option<String>,
    #[arg(long, value_parser = super::group)]
    group: Option<GroupId>,
    #[arg(short, long, value_enum, default_value_t)]
    format: Format,
}

/// Prints the past timelines.
///
/// # Errors
/// The cluster cannot be found or read.
pub async fn run(global: &Global, args: &HistoryArgs) -> anyhow::Result<()> {
    let target = Target::find(global, args.cluster_name.as_deref())?;
    let entries = target.history(args.group.or(target.own_group)).await?;
    say(&render::history(&entries, args.format));
    Ok(())
}

//! `kornak list` and `kornak topology`.

use std::time::Duration;

use clap::Args;
use jiff::Zoned;
use kornak_cluster::GroupId;

use super::is_patronictl;
use crate::output::{clear, say};
use crate::render::{self, Format};
use crate::target::{Global, Target};
use crate::when;

#[derive(Debug, Args)]
pub struct ListArgs {
    /// Clusters; default: the configuration's.
    cluster_names: Vec<String>,
    /// Only this Citus group.
    #[arg(long, value_parser = super::group)]
    group: Option<GroupId>,
    /// Show all columns.
    #[arg(short, long)]
    extended: bool,
    /// Print the time first.
    #[arg(short, long)]
    timestamp: bool,
    #[arg(short, long, value_enum, default_value_t)]
    format: Format,
    #[command(flatten)]
    repeat: Repeat,
}

#[derive(Debug, Args)]
pub struct TopologyArgs {
    /// Clusters; default: the configuration's.
    cluster_names: Vec<String>,
    /// Only this Citus group.
    #[arg(long, value_parser = super::group)]
    group: Option<GroupId>,
    #[command(flatten)]
    repeat: Repeat,
}

#[derive(Debug, Args)]
struct Repeat {
    /// Update the screen every 2 seconds.
    #[arg(short = 'W')]
    keep_watching: bool,
    /// Update the screen every so many seconds.
    #[arg(short, long, value_name = "SECONDS")]
    watch: Option<f64>,
}

/// Prints the tables, once or for ever.
///
/// # Errors
/// The cluster cannot be found or read.
pub async fn run(global: &Global, args: &ListArgs) -> anyhow::Result<()> {
    let targets = if args.cluster_names.is_empty() {
        vec![Target::find(global, None)?]
    } else {
        let find = |name: &String| Target::find(global, Some(name));
        args.cluster_names.iter().map(find).collect::<Result<_, _>>()?
    };
    let pause = args.repeat.watch.or(args.repeat.keep_watching.then_some(2.0));
    loop {
        if pause.is_some() {
            clear();
        }
        if args.timestamp {
            say(&when::short_stamp(&Zoned::now()));
        }
        for target in &targets {
            match (target.read(args.group).await, pause) {
                (Ok(cluster), _) => say(&render::members(&cluster, args.extended, args.format)),
                // While watching, an outage is something to be watched.
                (Err(error), Some(_)) => say(&format!("{error:#}")),
                (Err(error), None) => return Err(without_store(target, args, error).await),
            }
        }
        let Some(seconds) = pause else { return Ok(()) };
        tokio::time::sleep(Duration::from_secs_f64(seconds.clamp(0.1, 86_400.0))).await;
    }
}

/// The store does not answer: this host's agent says what it knows, under our own name alone. It stays an error, for
/// what is printed may be old.
async fn without_store(target: &Target, args: &ListArgs, error: anyhow::Error) -> anyhow::Error {
    let drop_in = is_patronictl(std::env::args_os().next().as_deref());
    let of_another = args.group.is_some() && args.group != target.own_group;
    if drop_in || of_another {
        return error;
    }
    let Some((agent, cluster)) = target.as_the_agent_knows_it().await else { return error };
    say(&render::members(&cluster, args.extended, args.format));
    error.context(format!("the store does not answer, this is what the agent at {agent} knows"))
}

/// Prints who streams from whom, once or for ever.
///
/// # Errors
/// As [`run`].
pub async fn topology(global: &Global, args: TopologyArgs) -> anyhow::Result<()> {
    let TopologyArgs { cluster_names, group, repeat } = args;
    let format = Format::Topology;
    let list = ListArgs { cluster_names, group, extended: false, timestamp: false, format, repeat };
    run(global, &list).await
}

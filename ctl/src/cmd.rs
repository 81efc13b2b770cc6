//! The commands. Each module owns its options and its work; verbs of patronictl keep its names,
//! options, questions and answers.

pub mod agent;
pub mod check;
pub mod cluster_role;
pub mod completions;
pub mod config;
pub mod demo;
pub mod dsn;
pub mod generate;
pub mod history;
pub mod list;
pub mod members;
pub mod pause;
pub mod proxy;
pub mod query;
pub mod remove;
pub mod switchover;
pub mod version;

use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};

use clap::{Args, Parser, Subcommand};
use kornak_cluster::GroupId;

use crate::target::{Global, Here};

/// High availability for PostgreSQL and Citus: agent, proxy and operator's tool.
#[derive(Debug, Parser)]
#[command(name = "kornak", version, max_term_width = 100)]
pub struct Cli {
    #[command(flatten)]
    pub global: Global,
    #[command(subcommand)]
    pub command: Command,
}

/// Patroni's command line: what this program is if it is called by that name.
#[derive(Debug, Parser)]
#[command(name = "patronictl", max_term_width = 100, disable_help_subcommand = true)]
pub struct Patronictl {
    #[command(flatten)]
    pub global: Global,
    #[command(subcommand)]
    pub verb: Verb,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run the agent of a database node
    Agent(agent::AgentArgs),
    /// Run a proxy
    Proxy(proxy::ProxyArgs),
    /// Start a whole cluster on this machine, to try things out
    Demo(demo::DemoArgs),
    /// Say what is wrong with a configuration file
    Check(check::CheckArgs),
    /// Make a configuration file
    Config(generate::ConfigArgs),
    /// Print the completions of a shell
    Completions(completions::CompletionsArgs),
    /// Write manual pages into a folder
    Man(completions::ManArgs),
    #[command(flatten)]
    Verb(Verb),
}

/// patronictl's verbs.
#[derive(Debug, Subcommand)]
pub enum Verb {
    /// Demote a cluster to a standby cluster
    DemoteCluster(Located<cluster_role::DemoteArgs>),
    /// Print a connection string of a member
    Dsn(Located<dsn::DsnArgs>),
    /// Edit the dynamic configuration
    EditConfig(Located<config::EditArgs>),
    /// Make a standby leader, when the leader is lost
    Failover(Located<switchover::FailoverArgs>),
    /// Discard scheduled events
    Flush(Located<members::FlushArgs>),
    /// Show past changes of leadership
    History(Located<history::HistoryArgs>),
    /// List the members
    List(Located<list::ListArgs>),
    /// Turn automatic failover off
    Pause(Located<pause::PauseArgs>),
    /// Promote a standby cluster, so that it runs on its own
    PromoteCluster(Located<cluster_role::PromoteArgs>),
    /// Send SQL to a member
    Query(query::QueryArgs),
    /// Copy the data of members anew from the leader
    Reinit(Located<members::ReinitArgs>),
    /// Reload the configuration of members
    Reload(Located<members::ReloadArgs>),
    /// Remove all that the store knows of a cluster
    Remove(Located<remove::RemoveArgs>),
    /// Restart the servers of members
    Restart(Located<members::RestartArgs>),
    /// Turn automatic failover on
    Resume(Located<pause::PauseArgs>),
    /// Show the dynamic configuration
    ShowConfig(Located<config::ShowArgs>),
    /// Hand over from a healthy leader to a standby
    Switchover(Located<switchover::SwitchoverArgs>),
    /// List the members as a tree
    Topology(Located<list::TopologyArgs>),
    /// Print our version, or those of members
    Version(Located<version::VersionArgs>),
}

/// A verb that also takes the global options after itself. `query` does not: it has a `-c` and a
/// `-d` of its own.
#[derive(Debug, Args)]
pub struct Located<T: Args> {
    #[command(flatten)]
    here: Here,
    #[command(flatten)]
    args: T,
}

/// Patroni's own command line, for units and images that start it under that name.
#[derive(Debug, Parser)]
#[command(name = "patroni", version, max_term_width = 100)]
struct Patroni {
    /// Say what is wrong with the file, and end.
    #[arg(long)]
    validate_config: bool,
    /// Patroni's YAML, or a folder of such files; default: the variable PATRONI_CONFIGURATION.
    file: Option<PathBuf>,
}

/// Whether this command line is patronictl's.
pub fn is_patronictl(program: Option<&OsStr>) -> bool {
    program.is_some_and(|name| Path::new(name).file_stem() == Some(OsStr::new("patronictl")))
}

/// Parses the command line and runs what it says to its end. A mistake in it ends the process with
/// 2, as clap and click do.
///
/// # Errors
/// The message for the operator; the process ends with 1.
pub fn main(words: &[OsString]) -> anyhow::Result<()> {
    if is_patronictl(words.first().map(OsString::as_os_str)) {
        let Patronictl { global, verb } = Patronictl::parse_from(words);
        return operate(global, verb);
    }
    let called = words.first().map(Path::new).and_then(Path::file_stem);
    if called == Some(OsStr::new("patroni")) {
        let Patroni { validate_config, file } = Patroni::parse_from(words);
        return match (validate_config, file) {
            (true, Some(file)) => check::run(&check::CheckArgs::of(file)),
            (true, None) => anyhow::bail!("expected a file to check"),
            (false, file) => agent::run(&agent::AgentArgs::of(file)),
        };
    }
    let Cli { global, command } = Cli::parse_from(words);
    match command {
        Command::Agent(args) => agent::run(&args),
        Command::Proxy(args) => proxy::run(&args),
        Command::Demo(args) => demo::start(args),
        Command::Check(args) => check::run(&args),
        Command::Config(args) => generate::run(&args),
        Command::Completions(args) => completions::run(&args),
        Command::Man(args) => completions::man(&args),
        Command::Verb(verb) => operate(global, verb),
    }
}

fn operate(global: Global, verb: Verb) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(carry_out(global, verb))
}

async fn carry_out(global: Global, verb: Verb) -> anyhow::Result<()> {
    match verb {
        Verb::DemoteCluster(it) => cluster_role::demote(&global.at(it.here), it.args).await,
        Verb::Dsn(it) => dsn::run(&global.at(it.here), &it.args).await,
        Verb::EditConfig(it) => config::edit(&global.at(it.here), it.args).await,
        Verb::Failover(it) => switchover::failover(&global.at(it.here), it.args).await,
        Verb::Flush(it) => members::flush(&global.at(it.here), it.args).await,
        Verb::History(it) => history::run(&global.at(it.here), &it.args).await,
        Verb::List(it) => list::run(&global.at(it.here), &it.args).await,
        Verb::Pause(it) => pause::run(&global.at(it.here), &it.args, true).await,
        Verb::PromoteCluster(it) => cluster_role::promote(&global.at(it.here), it.args).await,
        Verb::Query(args) => query::run(&global, args).await,
        Verb::Reinit(it) => members::reinit(&global.at(it.here), it.args).await,
        Verb::Reload(it) => members::reload(&global.at(it.here), it.args).await,
        Verb::Remove(it) => remove::run(&global.at(it.here), &it.args).await,
        Verb::Restart(it) => members::restart(&global.at(it.here), it.args).await,
        Verb::Resume(it) => pause::run(&global.at(it.here), &it.args, false).await,
        Verb::ShowConfig(it) => config::show(&global.at(it.here), &it.args).await,
        Verb::Switchover(it) => switchover::switchover(&global.at(it.here), it.args).await,
        Verb::Topology(it) => list::topology(&global.at(it.here), it.args).await,
        Verb::Version(it) => version::run(&global.at(it.here), &it.args).await,
    }
}

/// Reads a group's number from the command line.
fn group(text: &str) -> Result<GroupId, String> {
    GroupId::parse(text).ok_or_else(|| "expected the number of a Citus group".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn under_patronis_name_it_takes_patronis_arguments() {
        let parse = |words: &[&str]| Patroni::try_parse_from(words).unwrap();
        assert_eq!(parse(&["patroni", "a.yml"]).file, Some("a.yml".into()));
        assert!(parse(&["patroni", "--validate-config", "a.yml"]).validate_config);
        assert_eq!(parse(&["patroni"]).file, None);
        let called =
            ["/usr/bin/patroni", "--validate-config", "/nonexistent.yml"].map(OsString::from);
        let error = main(&called).unwrap_err().to_string();
        assert!(error.contains("1 mistake"), "{error}");
    }

    #[test]
    fn a_folder_for_two_programs_is_two_configurations() {
        let folder = tempfile::tempdir().unwrap();
        let agent = "scope: a\nname: x\netcd3: {hosts: ['x:1']}\nrestapi: {listen: '127.0.0.1:1'}\n\
                     postgresql:\n  listen: 127.0.0.1:1\n  data_dir: /nowhere\n  \
                     authentication: {replication: {username: r}}\n";
        let proxy =
            "scope: b\netcd3: {hosts: ['x:1']}\nproxy: {auth: {user: k, password: p}, wrong: 1}\n";
        std::fs::write(folder.path().join("agent.yml"), agent).unwrap();
        std::fs::write(folder.path().join("proxy.yml"), proxy).unwrap();
        std::fs::write(folder.path().join("compose.yml"), "services: {}\n").unwrap();
        let called = ["kornak", "check"].map(OsString::from);
        let called: Vec<OsString> = called.into_iter().chain([folder.path().into()]).collect();
        let error = main(&called).unwrap_err().to_string();
        assert!(error.contains("1 mistake"), "{error}");
    }
}

//! The commands. Each module owns its options and its work; verbs of patronictl keep its names,
//! options, questions and answers.

pub mod agent;
pub mod check;
pub mod config;
pub mod demo;
pub mod history;
pub mod list;
pub mod members;
pub mod pause;
pub mod proxy;
pub mod switchover;

use clap::{Parser, Subcommand};
use kornak_cluster::GroupId;

use crate::target::Global;

/// High availability for PostgreSQL and Citus: agent, proxy and operator's tool.
#[derive(Debug, Parser)]
#[command(name = "kornak", version, max_term_width = 100)]
pub struct Cli {
    #[command(flatten)]
    pub global: Global,
    #[command(subcommand)]
    pub command: Command,
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
    /// List the members
    List(list::ListArgs),
    /// Hand over from a healthy leader to a standby
    Switchover(switchover::SwitchoverArgs),
    /// Make a standby leader, when the leader is lost
    Failover(switchover::FailoverArgs),
    /// Restart the servers of members
    Restart(members::RestartArgs),
    /// Reload the configuration of members
    Reload(members::ReloadArgs),
    /// Copy the data of members anew from the leader
    Reinit(members::ReinitArgs),
    /// Discard scheduled events
    Flush(members::FlushArgs),
    /// Turn automatic failover off
    Pause(pause::PauseArgs),
    /// Turn automatic failover on
    Resume(pause::PauseArgs),
    /// Show past changes of leadership
    History(history::HistoryArgs),
    /// Show the dynamic configuration
    ShowConfig(config::ShowArgs),
    /// Edit the dynamic configuration
    EditConfig(config::EditArgs),
}

/// Runs a command to its end.
///
/// # Errors
/// What is to be told to the operator; the process ends with 1.
pub fn run(cli: Cli) -> anyhow::Result<()> {
    let Cli { global, command } = cli;
    match command {
        Command::Agent(args) => agent::run(&args),
        Command::Proxy(args) => proxy::run(&args),
        Command::Demo(args) => demo::start(args),
        Command::Check(args) => check::run(&args),
        verb => {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            runtime.block_on(operate(&global, verb))
        }
    }
}

async fn operate(global: &Global, command: Command) -> anyhow::Result<()> {
    match command {
        Command::Agent(_) | Command::Proxy(_) | Command::Demo(_) | Command::Check(_) => Ok(()),
        Command::List(args) => list::run(global, &args).await,
        Command::Switchover(args) => switchover::switchover(global, args).await,
        Command::Failover(args) => switchover::failover(global, args).await,
        Command::Restart(args) => members::restart(global, args).await,
        Command::Reload(args) => members::reload(global, args).await,
        Command::Reinit(args) => members::reinit(global, args).await,
        Command::Flush(args) => members::flush(global, args).await,
        Command::Pause(args) => pause::run(global, &args, true).await,
        Command::Resume(args) => pause::run(global, &args, false).await,
        Command::History(args) => history::run(global, &args).await,
        Command::ShowConfig(args) => config::show(global, &args).await,
        Command::EditConfig(args) => config::edit(global, args).await,
    }
}

/// Reads a group's number from the command line.
fn group(text: &str) -> Result<GroupId, String> {
    GroupId::parse(text).ok_or_else(|| "expected the number of a Citus group".to_owned())
}

/// Answers SIGHUP for a service: looks at its file again and says what is wrong with it.
fn watch_file(
    file: Option<std::path::PathBuf>,
    stop: tokio_util::sync::CancellationToken,
) -> std::io::Result<()> {
    crate::signals::on_hangup(stop, move || {
        let Some(file) = &file else { return };
        let environment: Vec<(String, String)> = std::env::vars().collect();
        let findings = kornak_config::check(file, &environment);
        for finding in &findings {
            tracing::warn!(why = finding.text.as_str(), "configuration");
        }
        tracing::info!(
            findings = findings.len(),
            "configuration was looked at; a changed file takes effect with the next start"
        );
    })
}

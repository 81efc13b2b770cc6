//! `kornak demo`: a whole cluster on this machine, in one process: agents, a store and a proxy, with
//! PostgreSQL as the only thing that must be installed.
//!
//! For trying things out. With the store in memory (the default), the end of this process is the end
//! of the cluster's state; the servers are stopped and their data removed, unless a directory was
//! named. `--dcs etcd` starts a real etcd beside it.

#![allow(clippy::print_stdout, reason = "the demo talks to the person who started it")]

mod files;
mod ports;
mod progress;

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, bail};
use clap::{Args, ValueEnum};
use kornak_agent::Running;
use kornak_config::{Environment, load_agent, load_proxy};
use kornak_dcs::Dcs;
use kornak_dcs::memory::MemoryDcs;
use tokio_util::sync::CancellationToken;

use files::Secrets;
use ports::Ports;

/// Starts a PostgreSQL cluster with automatic failover on this machine.
#[derive(Debug, Args)]
pub struct DemoArgs {
    /// Database nodes.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u16).range(1..=9))]
    nodes: u16,
    /// Where the cluster's state is kept.
    #[arg(long, value_enum, default_value_t = DemoStore::Memory)]
    dcs: DemoStore,
    /// Work directory; it is kept. Default: a temporary one, removed at the end.
    #[arg(long)]
    dir: Option<PathBuf>,
    /// First port. Default: 5000 for the primary, 5002 for standbys, 7000 for the status page.
    #[arg(long, value_name = "PORT", value_parser = clap::value_parser!(u16).range(1024..=65000))]
    ports_from: Option<u16>,
    /// Acknowledge a commit only when a standby has it.
    #[arg(long)]
    synchronous: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum DemoStore {
    /// In this process, for one machine only.
    Memory,
    /// An etcd that is started beside it.
    Etcd,
}

/// How long the cluster may take to come up.
const START_LIMIT: Duration = Duration::from_secs(120);

/// The work directory; removed at the end if it was made for this run only.
struct WorkDir {
    path: PathBuf,
    temporary: bool,
}

impl Drop for WorkDir {
    fn drop(&mut self) {
        if self.temporary
            && let Err(error) = std::fs::remove_dir_all(&self.path)
        {
            tracing::warn!(error = %error, dir = %self.path.display(), "work directory not removed");
        }
    }
}

/// An etcd that ends with its owner.
struct Etcd(std::process::Child);

impl Drop for Etcd {
    fn drop(&mut self) {
        // Both fail only if it has ended already.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Runs a demo until Ctrl-C.
///
/// # Errors
/// A port is taken, a program is missing, or the cluster does not come up.
pub fn start(args: DemoArgs) -> anyhow::Result<()> {
    let prepared = prepare(&args)?;
    // The terminal is for the person.
    crate::logging::start(&kornak_config::LogSettings::default(), Some(&prepared.log))?;
    crate::store::install_tls();
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    runtime.block_on(async {
        let stop = crate::signals::stop_token()?;
        run(args, prepared, stop).await
    })
}

fn prepare(args: &DemoArgs) -> anyhow::Result<Prepared> {
    let ports = Ports::choose(args.ports_from, args.nodes, args.dcs == DemoStore::Etcd);
    ports.check()?;
    let dir = work_dir(args.dir.as_deref())?;
    let log = dir.path.join("kornak.log");
    Ok(Prepared { ports, dir, log })
}

/// A demo that can be started: its ports are free and its directory exists.
struct Prepared {
    ports: Ports,
    dir: WorkDir,
    log: PathBuf,
}

/// Runs the demo until `stop`.
///
/// # Errors
/// A port is taken, a program is missing, or the cluster does not come up; each says what to do.
async fn run(args: DemoArgs, prepared: Prepared, stop: CancellationToken) -> anyhow::Result<()> {
    let Prepared { ports, dir, log } = prepared;
    let bin_dir = files::postgres_bin_dir()?;
    let secrets = Secrets::of(&dir.path)?;
    let _note = files::leave_note(&dir.path, &ports)?;
    println!("Starting {} nodes below {}", args.nodes, dir.path.display());
    let (store, _etcd): (Arc<dyn Dcs>, _) = match args.dcs {
        DemoStore::Memory => (Arc::new(MemoryDcs::default()), None),
        DemoStore::Etcd => {
            let etcd = start_etcd(&dir.path, &ports)?;
            let settings = kornak_config::Etcd3Settings::new(vec![kornak_config::HostPort::new(
                "127.0.0.1",
                ports.etcd_client(),
            )]);
            (crate::store::connect(&kornak_config::StoreSettings::Etcd3(settings))?, Some(etcd))
        }
    };
    let environment: &Environment = &[];
    let mut halts = Vec::new();
    let mut nodes = Vec::new();
    for index in 1..=args.nodes {
        let file =
            files::write_node(&dir.path, &bin_dir, &ports, index, &secrets, args.synchronous)?;
        let settings = load_agent(Some(&file), environment)?.settings;
        let halt = CancellationToken::new();
        let node = kornak_agent::start(settings, Arc::clone(&store), None, halt.clone()).await?;
        nodes.push(node);
        halts.push(halt);
    }
    let file = files::write_proxy(&dir.path, &ports, &secrets)?;
    let settings = load_proxy(Some(&file), environment)?.settings;
    let proxy_halt = CancellationToken::new();
    let proxy = kornak_proxy::start(settings, Some(store), proxy_halt.clone()).await?;

    let up = progress::until_ready(&nodes, START_LIMIT, &stop).await;
    match up {
        progress::Start::Ready => {
            let passfile = files::write_passfile(&dir.path, &secrets)?;
            print_welcome(&ports, &passfile, &log, args.nodes);
            progress::tell_changes(&nodes, &stop).await;
        }
        progress::Start::Interrupted => {}
        progress::Start::TooSlow => {
            println!("The cluster did not come up within {START_LIMIT:?}; see {}", log.display());
        }
    }
    println!("Stopping");
    proxy_halt.cancel();
    stop_nodes(nodes, halts).await;
    if let Err(error) = proxy.join.await {
        tracing::warn!(error = %error, "the proxy ended unexpectedly");
    }
    if up == progress::Start::TooSlow {
        bail!("the cluster did not come up");
    }
    println!("Stopped everything that was started");
    Ok(())
}

/// Standbys first: a leader that stops while they run would hand over to one of them.
async fn stop_nodes(nodes: Vec<Running>, halts: Vec<CancellationToken>) {
    let (leading, following): (Vec<_>, Vec<_>) =
        nodes.into_iter().zip(halts).partition(|(node, _)| node.views.borrow().holds_lock);
    for nodes in [following, leading] {
        nodes.iter().for_each(|(_, halt)| halt.cancel());
        for (node, _) in nodes {
            match node.task.await {
                Ok(Ok(())) => {}
                Ok(Err(error)) => tracing::warn!(error = %error, "an agent failed"),
                Err(error) => tracing::warn!(error = %error, "an agent ended unexpectedly"),
            }
        }
    }
}

fn work_dir(wanted: Option<&Path>) -> anyhow::Result<WorkDir> {
    let (path, temporary) = match wanted {
        Some(path) => (std::path::absolute(path)?, false),
        None => {
            let name = format!("kornak-demo-{:08x}", rand::random::<u32>());
            (std::env::temp_dir().join(name), true)
        }
    };
    std::fs::create_dir_all(&path).with_context(|| {
        format!("make the work directory {}; choose another with --dir", path.display())
    })?;
    // Servers of another OS user must be able to enter it.
    use std::os::unix::fs::PermissionsExt;
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).with_context(|| {
        format!("open {} to the servers; choose another with --dir", path.display())
    })?;
    Ok(WorkDir { path, temporary })
}

fn start_etcd(dir: &Path, ports: &Ports) -> anyhow::Result<Etcd> {
    let client = format!("http://127.0.0.1:{}", ports.etcd_client());
    let peer = format!("http://127.0.0.1:{}", ports.etcd_peer());
    let log = std::fs::File::create(dir.join("etcd.log"))?;
    use std::os::unix::process::CommandExt;
    let child = std::process::Command::new("etcd")
        .arg("--data-dir")
        .arg(dir.join("etcd"))
        .args(["--name", "demo", "--listen-client-urls", &client])
        .args(["--advertise-client-urls", &client, "--listen-peer-urls", &peer])
        .args(["--initial-advertise-peer-urls", &peer])
        .args(["--initial-cluster", &format!("demo={peer}")])
        // Ctrl-C is for the demo, which still needs the store to stop in order.
        .process_group(0)
        .stdin(Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log)
        .spawn()
        .context("start etcd: install it (Debian: etcd-server), or leave --dcs etcd out")?;
    Ok(Etcd(child))
}

fn print_welcome(ports: &Ports, passfile: &Path, log: &Path, nodes: u16) {
    let psql = |port: u16| {
        format!(
            "psql \"host=127.0.0.1 port={port} user=postgres dbname=postgres passfile={}\"",
            passfile.display()
        )
    };
    println!();
    println!("Ready. Reads and writes, wherever the primary is:");
    println!("    {}", psql(ports.primary()));
    if nodes > 1 {
        println!("Reads, over the standbys:");
        println!("    {}", psql(ports.standbys()));
    }
    println!("Status page: http://127.0.0.1:{}/    log: {}", ports.status(), log.display());
    println!("In another terminal: kornak list, kornak switchover");
    println!("Ctrl-C stops everything.");
    println!();
}

//! `kornak demo`: a whole cluster on this machine, in one process: agents, a store and a proxy, with
//! PostgreSQL as the only thing that must be installed.
//!
//! For trying things out. With the store in memory (the default), the end of this process is the end
//! of the cluster's state; the servers are stopped and their data removed, unless a directory was
//! named. `--dcs etcd` starts a real etcd beside it.

#![allow(clippy::print_stdout, reason = "the demo talks to the person who started it")]

mod files;
mod layout;
mod ports;
mod progress;

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, bail};
use clap::{Args, ValueEnum};
use kornak_agent::Running;
use kornak_cluster::discard;
use kornak_config::{Environment, load_agent, load_proxy};
use kornak_dcs::Dcs;
use kornak_dcs::memory::MemoryDcs;
use tokio_util::sync::CancellationToken;

use files::Secrets;
use layout::Layout;
use ports::Ports;

/// Starts a PostgreSQL cluster with automatic failover on this machine.
#[derive(Debug, Args)]
pub struct DemoArgs {
    /// Database nodes of a plain cluster. Default: 3, or a Citus cluster if the extension is installed.
    #[arg(long, value_parser = clap::value_parser!(u16).range(1..=9))]
    nodes: Option<u16>,
    /// A Citus cluster: three coordinators and two groups of two workers.
    #[arg(long, conflicts_with = "nodes")]
    citus: bool,
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
            tracing::warn!(error = &error as &dyn std::error::Error, dir = %self.path.display(), "work directory not removed");
        }
    }
}

/// An etcd that ends with its owner.
struct Etcd(std::process::Child);

impl Drop for Etcd {
    fn drop(&mut self) {
        // Both fail only if it has ended already.
        discard::may_be_gone_already(self.0.kill());
        discard::may_be_gone_already(self.0.wait());
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
    let bin_dir = files::postgres_bin_dir()?;
    let layout = layout_for(args, &bin_dir)?;
    let ports = Ports::choose(args.ports_from, layout.len(), args.dcs == DemoStore::Etcd);
    ports.check()?;
    let dir = work_dir(args.dir.as_deref())?;
    let log = dir.path.join("kornak.log");
    Ok(Prepared { bin_dir, layout, ports, dir, log })
}

/// A kept directory keeps its layout; otherwise the extension decides what is shown.
fn layout_for(args: &DemoArgs, bin_dir: &Path) -> anyhow::Result<Layout> {
    let installed = layout::has_citus(bin_dir);
    let holds = |name: &str| args.dir.as_ref().is_some_and(|dir| dir.join(name).exists());
    match args.nodes {
        Some(nodes) => Ok(Layout::plain(nodes)),
        None if args.citus && !installed => {
            bail!("the Citus extension is not installed for {}", bin_dir.display())
        }
        None if args.citus => Ok(Layout::citus()),
        None if holds("node1.yml") => Ok(Layout::plain(3)),
        None if installed => {
            println!(
                "The Citus extension is installed: this is a Citus cluster (--nodes 3: a plain one)"
            );
            Ok(Layout::citus())
        }
        None => {
            println!("The Citus extension is not installed: this is a plain cluster");
            Ok(Layout::plain(3))
        }
    }
}

/// A demo that can be started: its ports are free and its directory exists.
struct Prepared {
    bin_dir: PathBuf,
    layout: Layout,
    ports: Ports,
    dir: WorkDir,
    log: PathBuf,
}

/// Runs the demo until `stop`.
///
/// # Errors
/// A port is taken, a program is missing, or the cluster does not come up; each says what to do.
async fn run(args: DemoArgs, prepared: Prepared, stop: CancellationToken) -> anyhow::Result<()> {
    let Prepared { bin_dir, layout, ports, dir, log } = prepared;
    let secrets = Secrets::of(&dir.path)?;
    let _note = files::leave_note(&dir.path, &ports, &layout)?;
    println!("Starting {} nodes below {}", layout.len(), dir.path.display());
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
    for node in &layout.nodes {
        let file =
            files::write_node(&dir.path, &bin_dir, &ports, node, &secrets, args.synchronous)?;
        let settings = load_agent(Some(&file), environment)?.settings;
        let halt = CancellationToken::new();
        let node = kornak_agent::start(
            settings,
            Arc::clone(&store),
            kornak_agent::Home::Shared,
            halt.clone(),
        )
        .await?;
        nodes.push(node);
        halts.push(halt);
    }
    let file = files::write_proxy(&dir.path, &ports, &secrets, &layout)?;
    let settings = load_proxy(Some(&file), environment)?.settings;
    let proxy_halt = CancellationToken::new();
    let proxy = kornak_proxy::start(settings, Some(store), proxy_halt.clone()).await?;

    let up = progress::until_ready(&nodes, &layout, START_LIMIT, &stop).await;
    match up {
        progress::Start::Ready => {
            let passfile = files::write_passfile(&dir.path, &secrets)?;
            print_welcome(&ports, &passfile, &log, &layout);
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
        tracing::warn!(error = &error as &dyn std::error::Error, "proxy ended unexpectedly");
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
                Ok(Err(error)) => {
                    tracing::warn!(error = &error as &dyn std::error::Error, "agent failed");
                }
                Err(error) => tracing::warn!(
                    error = &error as &dyn std::error::Error,
                    "agent ended unexpectedly"
                ),
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

fn print_welcome(ports: &Ports, passfile: &Path, log: &Path, layout: &Layout) {
    let citus = layout.is_citus();
    let database = if citus { files::CITUS_DATABASE } else { "postgres" };
    let psql = |port: u16| {
        format!(
            "psql \"host=127.0.0.1 port={port} user=postgres dbname={database} passfile={}\"",
            passfile.display()
        )
    };
    println!();
    let whose = if citus { "coordinator's primary" } else { "primary" };
    println!("Ready. Reads and writes, wherever the {whose} is:");
    println!("    {}", psql(ports.primary()));
    if layout.len() > 1 {
        println!("Reads, over the standbys:");
        println!("    {}", psql(ports.standbys()));
    }
    if citus {
        println!("Queries from any worker:");
        println!("    {}", psql(ports.workers()));
    }
    println!("Status page: http://127.0.0.1:{}/    log: {}", ports.status(), log.display());
    let group = if citus { " --group 2" } else { "" };
    println!("In another terminal: kornak list, kornak switchover{group}");
    println!("Ctrl-C stops everything.");
    println!();
}

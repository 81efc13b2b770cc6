//! Hosts that can lose their power: network namespaces on one bridge, each with an address of its own.
//!
//! A killed process is mourned by its kernel, which resets its connections at once. A host without
//! power says nothing, to nobody, for ever: who waits for its answer waits until a timer of his own
//! ends it. [`Host::cut_off`] does that. The neighbours keep its hardware address, so that nobody is
//! told either that there is no such host.
//!
//! All of it lies in a network namespace that is the test's own ([`on_a_lan`]), so that no name and no
//! address meets anything of this machine, and nothing is left whatever ends the test.

use std::fs;
use std::future::Future;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use parking_lot::Mutex;

use super::process::Process;
use super::scratch::Scratch;
use super::wait::until;

/// Where etcd, the proxies and the clients are.
pub const CENTRE: &str = "10.77.0.1";

/// Set in the process that has a network of its own.
const INSIDE: &str = "KORNAK_TEST_LAN";

/// Runs the test `name` of this binary in a network of its own, and there `test`. Says aloud that it does
/// nothing where no such network can be made: that takes root.
#[expect(clippy::print_stdout, reason = "a test that does nothing says so")]
pub fn on_a_lan<F: Future<Output = Result<()>>>(
    name: &str,
    test: impl FnOnce(Arc<Lan>) -> F,
) -> Result<()> {
    if is_inside() {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build()
            .context("start a runtime")?;
        return runtime.block_on(async {
            let lan = Arc::new(Lan::new()?);
            test(Arc::clone(&lan)).await?;
            lan.passed();
            Ok(())
        });
    }
    if !is_possible() {
        println!("SKIPPED: a network namespace cannot be made here");
        return Ok(());
    }
    run_inside([name, "--exact", "--nocapture"])
}

/// Whether this process may create network namespaces.
pub fn is_possible() -> bool {
    let tried = Command::new("unshare").args(["--net", "ip", "link", "set", "lo", "up"]).output();
    tried.is_ok_and(|output| output.status.success())
}

/// Whether this process runs in a network and a mount namespace of its own ([`run_inside`]).
pub fn is_inside() -> bool {
    std::env::var_os(INSIDE).is_some()
}

/// Runs this program again with other arguments, in a network and a mount namespace of its own.
pub fn run_inside<'a>(arguments: impl IntoIterator<Item = &'a str>) -> Result<()> {
    let me = std::env::current_exe().context("find this program's own file")?;
    let mut command = Command::new("unshare");
    command.args(["--net", "--mount"]).arg(me).args(arguments).env(INSIDE, "1");
    let ended = command.stdin(Stdio::null()).status().context("run unshare")?;
    ensure!(ended.success(), "the program in a network of its own: {ended}");
    Ok(())
}

/// The bridge, and who is on it.
#[derive(Debug)]
pub struct Lan {
    hosts: Mutex<Vec<Arc<Host>>>,
    scratch: Mutex<Scratch>,
}

/// A machine on the bridge.
#[derive(Debug)]
pub struct Host {
    number: usize,
    /// Keeps the namespace, which goes with its last process, and does nothing else.
    holder: Process,
}

impl Lan {
    /// Sets up the bridge. The process has to be in a network of its own ([`is_inside`]).
    pub fn new() -> Result<Self> {
        ip("link set lo up")?;
        ip("link add lan type bridge")?;
        ip(&format!("link set lan address {} up", hardware(1)))?;
        ip(&format!("address add {CENTRE}/24 dev lan"))?;
        Ok(Self { hosts: Mutex::default(), scratch: Mutex::new(Scratch::new("lan")) })
    }

    /// Says that the test has passed, so that nothing is printed or kept.
    pub fn passed(&self) {
        self.scratch.lock().passed();
    }

    /// Adds a host.
    ///
    /// # Panics
    /// When its namespace is not there within some seconds.
    pub async fn host(&self) -> Result<Arc<Host>> {
        let number = self.hosts.lock().len() + 11;
        let name = format!("host{number}");
        let (dir, log) = {
            let scratch = self.scratch.lock();
            (scratch.join(""), scratch.join(&format!("{name}.log")))
        };
        let mut command = Command::new("unshare");
        // It works in the directory, so that whoever clears that up finds it.
        command.args(["--net", "--mount", "--uts", "sleep", "infinity"]).current_dir(dir);
        let holder = Process::spawn(&name, command, &log)?;
        let network = |pid: &str| fs::read_link(format!("/proc/{pid}/ns/net"));
        let pid = holder.pid().to_string();
        until(Duration::from_secs(5), "a namespace", || async {
            let (theirs, ours) = (network(&pid), network("self"));
            let apart = theirs.is_ok_and(|theirs| ours.is_ok_and(|ours| ours != theirs));
            if apart { Ok(()) } else { Err("it is not made yet".to_owned()) }
        })
        .await;
        let host = Arc::new(Host { number, holder });
        ip(&format!("link add {name} type veth peer name eth0 netns {pid}"))?;
        ip(&format!("link set {name} master lan up"))?;
        host.ip("link set lo up")?;
        host.ip(&format!("link set eth0 address {} up", hardware(number)))?;
        host.ip(&format!("address add {}/24 dev eth0", host.address()))?;
        let known = |number: usize, device: &str| {
            let (address, hardware) = (address(number), hardware(number));
            format!("neighbour replace {address} lladdr {hardware} nud permanent dev {device}")
        };
        ip(&known(number, "lan"))?;
        host.ip(&known(1, "eth0"))?;
        for other in self.hosts.lock().iter() {
            host.ip(&known(other.number, "eth0"))?;
            other.ip(&known(number, "eth0"))?;
        }
        self.hosts.lock().push(Arc::clone(&host));
        Ok(host)
    }
}

impl Host {
    /// Packets from this host to `other` get lost without a word from now on; those of the other direction arrive.
    pub fn deafen(&self, other: &str) -> Result<()> {
        self.ip(&format!("neighbour replace {other} lladdr {NOBODY} nud permanent dev eth0"))
    }

    /// Packets from this host to `other` arrive again.
    pub fn undeafen(&self, other: &str) -> Result<()> {
        let number: usize = other.rsplit('.').next().unwrap_or_default().parse()?;
        let hardware = hardware(number);
        self.ip(&format!("neighbour replace {other} lladdr {hardware} nud permanent dev eth0"))
    }

    /// Delays and loses what this host sends, in the words of tc-netem(8); needs the kernel's `sch_netem`.
    pub fn disturb(&self, words: &str) -> Result<()> {
        self.tc(&format!("qdisc replace dev eth0 root netem {words}"))
    }

    /// Ends [`Self::disturb`].
    pub fn calm(&self) -> Result<()> {
        self.tc("qdisc del dev eth0 root")
    }

    fn tc(&self, words: &str) -> Result<()> {
        let mut command = Command::new("tc");
        command.args(words.split_whitespace()).env("PATH", PATH);
        done(self.run(&command), words)
    }

    /// The host's address; the others are in the same network of 24 bits.
    pub fn address(&self) -> String {
        address(self.number)
    }

    /// Runs a command on this host. Environment and directory are what `command` sets, and nothing
    /// else.
    pub fn run(&self, command: &Command) -> Command {
        let mut inside = Command::new("nsenter");
        inside.arg(format!("--net=/proc/{}/ns/net", self.holder.pid())).arg("--");
        inside.arg(command.get_program()).args(command.get_args()).env_clear();
        inside.envs(command.get_envs().filter_map(|(name, value)| Some((name, value?))));
        inside.current_dir(command.get_current_dir().map_or_else(|| "/".into(), PathBuf::from));
        inside
    }

    /// The process that keeps the host's namespaces: network, mounts and name.
    pub fn holder(&self) -> u32 {
        self.holder.pid()
    }

    /// Runs `script` with bash on this host, in its network, with its files and under its name.
    pub fn shell(&self, script: &str) -> Command {
        let mut inside = Command::new("nsenter");
        inside.args(["-t", &self.holder.pid().to_string(), "--net", "--mount", "--uts", "--"]);
        inside.args(["bash", "-ec", script]).env_clear().env("PATH", PATH).env("HOME", "/root");
        inside
    }

    /// From now on nothing comes from it, and nothing reaches it. If it is power that it has lost, the caller
    /// ends its processes.
    pub fn cut_off(&self) -> Result<()> {
        ip(&format!("link set host{} down", self.number))
    }

    /// Puts the host back on the network.
    pub fn reconnect(&self) -> Result<()> {
        ip(&format!("link set host{} up", self.number))
    }

    fn ip(&self, words: &str) -> Result<()> {
        let mut command = Command::new("ip");
        command.args(words.split_whitespace()).env("PATH", PATH);
        done(self.run(&command), words)
    }
}

/// A hardware address that no host has.
const NOBODY: &str = "02:4b:6f:72:ff:ff";

const PATH: &str = "/usr/sbin:/usr/bin:/sbin:/bin";

fn ip(words: &str) -> Result<()> {
    let mut command = Command::new("ip");
    command.args(words.split_whitespace());
    done(command, words)
}

fn done(mut command: Command, words: &str) -> Result<()> {
    let output = command.output().context("run ip or tc")?;
    let told = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{words}: {told}");
    Ok(())
}

fn address(number: usize) -> String {
    format!("10.77.0.{number}")
}

fn hardware(number: usize) -> String {
    format!("02:4b:6f:72:00:{number:02x}")
}

//! docs/tutorial.md, typed as it is printed: five hosts that are network namespaces with files of their own.
//!
//! tests/tutorial/bin stands for what a namespace does not have (systemd, ssh between hosts, a package archive) and for the
//! build. A block says in its first line where it is typed: `on=` hosts, `in=clone`; `retry=` seconds until it has to succeed;
//! `background` and `after-background`.

#![expect(clippy::print_stdout, reason = "a test says what it skips and what it saw")]

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use kornak_tests::run::kornak::binary;
use kornak_tests::run::lan::{Host, Lan, on_a_lan};
use kornak_tests::run::process::Process;
use kornak_tests::run::scratch::Scratch;
use kornak_tests::run::wait::until;

const SOON: Duration = Duration::from_secs(60);

/// The host where the reader sits comes last: the tutorial gives the others their addresses in this order.
const HOSTS: [&str; 5] = ["db1", "db2", "db3", "app1", "admin"];

/// One block of commands.
#[derive(Debug, Default, PartialEq, Eq)]
struct Block {
    line: usize,
    on: Vec<String>,
    in_clone: bool,
    retry: Option<u64>,
    background: bool,
    after_background: bool,
    script: String,
}

fn blocks(page: &str) -> Result<Vec<Block>> {
    let mut found = Vec::new();
    let mut current: Option<Block> = None;
    for (index, line) in page.lines().enumerate() {
        match (&mut current, line.strip_prefix("```")) {
            (None, Some(words)) => {
                let words = words.strip_prefix("sh ").with_context(|| {
                    format!("line {}: only blocks of commands are tested", index + 1)
                })?;
                current = Some(head(index + 1, words)?);
            }
            (Some(_), Some(_)) => found.extend(current.take()),
            (Some(block), None) => {
                block.script.push_str(line);
                block.script.push('\n');
            }
            (None, None) => {}
        }
    }
    Ok(found)
}

fn head(line: usize, words: &str) -> Result<Block> {
    let mut block = Block { line, ..Block::default() };
    for word in words.split_whitespace() {
        match word.split_once('=').unwrap_or((word, "")) {
            ("on", hosts) => block.on = hosts.split(',').map(str::to_owned).collect(),
            ("in", "clone") => block.in_clone = true,
            ("retry", seconds) => block.retry = Some(seconds.parse()?),
            ("background", "") => block.background = true,
            ("after-background", "") => block.after_background = true,
            _ => anyhow::bail!("line {line}: {word} is not known"),
        }
    }
    ensure!(!block.on.is_empty(), "line {line}: on which hosts?");
    Ok(block)
}

/// The hosts, by name.
struct Machines {
    hosts: BTreeMap<String, Arc<Host>>,
    scratch: Scratch,
    shims: PathBuf,
    passed: bool,
}

impl Drop for Machines {
    fn drop(&mut self) {
        if !self.passed {
            self.show_journals();
        }
        self.stop_services();
    }
}

impl Machines {
    async fn new(lan: &Lan) -> Result<Self> {
        let scratch = Scratch::new("tutorial");
        let root = Path::new(env!("CARGO_MANIFEST_DIR"));
        let shims = root.join("tutorial/bin");
        let mut machines = Self { hosts: BTreeMap::new(), scratch, shims, passed: false };
        fs::create_dir_all(machines.scratch.join("hosts"))?;
        for name in HOSTS {
            let host = lan.host().await?;
            fs::write(machines.scratch.join("hosts").join(name), host.holder().to_string())?;
            machines.hosts.insert(name.to_owned(), host);
            machines.run(name, &machines.files_of(name), "/").context("give a host its files")?;
        }
        let clone = machines.scratch.join("clone");
        let workspace = root.parent().context("the workspace")?;
        fs::create_dir_all(clone.join("target/release"))?;
        std::os::unix::fs::symlink(binary(), clone.join("target/release/kornak"))?;
        for part in ["Makefile", "deploy", "scripts"] {
            std::os::unix::fs::symlink(workspace.join(part), clone.join(part))?;
        }
        Ok(machines)
    }

    /// Folders that the tutorial writes to become the host's own; nothing reaches those of this machine.
    fn files_of(&self, name: &str) -> String {
        let base = self.scratch.join(name);
        let base = base.display();
        format!(
            "hostname {name}
             for folder in /etc /usr/bin /var/lib /root; do
               own={base}$folder; mkdir -p $own/upper $own/work
               mount -t overlay overlay -o lowerdir=$folder,upperdir=$own/upper,workdir=$own/work $folder
             done
             mount -t tmpfs -o mode=755 tmpfs /run
             install -d -o postgres -g postgres -m 2775 /run/postgresql
             rm -rf /var/lib/postgresql/15/kornak /etc/default/etcd
             printf '127.0.0.1 localhost\\n' >/etc/hosts"
        )
    }

    fn command(&self, host: &str, script: &str, folder: &str) -> Result<Command> {
        let host = self.hosts.get(host).with_context(|| format!("no host {host}"))?;
        let mut command = host.shell(&format!("cd {folder}\n{script}"));
        let path = format!("{}:/usr/sbin:/usr/bin:/sbin:/bin", self.shims.display());
        command.env("PATH", path).env("TUTORIAL_HOSTS", self.scratch.join("hosts"));
        command.stdin(Stdio::null());
        Ok(command)
    }

    fn run(&self, host: &str, script: &str, folder: &str) -> Result<String> {
        let output = self.command(host, script, folder)?.output().context("run nsenter")?;
        let said = format!(
            "{}{}",
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr)
        );
        ensure!(output.status.success(), "on {host}: {}:\n{script}\n{said}", output.status);
        Ok(said)
    }

    async fn run_block(&self, block: &Block) -> Result<()> {
        let clone = self.scratch.join("clone");
        let folder = if block.in_clone { clone.display().to_string() } else { "/root".to_owned() };
        for host in &block.on {
            let Some(seconds) = block.retry else {
                self.run(host, &block.script, &folder)
                    .with_context(|| format!("docs/tutorial.md, line {}", block.line))?;
                continue;
            };
            let what = format!("docs/tutorial.md, line {}", block.line);
            until(Duration::from_secs(seconds), &what, || async {
                self.run(host, &block.script, &folder).map_err(|error| format!("{error:#}"))
            })
            .await;
        }
        Ok(())
    }

    /// Shows the output of the services, for a person who looks at a failure.
    fn show_journals(&self) {
        for host in self.hosts.keys() {
            let script = "for log in /run/units/*.log; do echo \"== $(hostname) $log\"; tail -n 30 $log; done";
            match self.run(host, script, "/") {
                Ok(said) => println!("{said}"),
                Err(error) => println!("{error:#}"),
            }
        }
    }

    /// Shows the warnings that a reader of the logs would wonder about.
    fn show_warnings(&self) -> Result<()> {
        for host in ["db1", "db2", "db3", "app1"] {
            let said =
                self.run(host, "grep -hE ' (WARN|ERROR) ' /run/units/kornak-*.log || true", "/")?;
            println!("{host} warned of:\n{said}");
            ensure!(!said.contains(" ERROR "), "{host}: {said}");
        }
        Ok(())
    }

    fn stop_services(&self) {
        for host in HOSTS {
            let script = "for unit in kornak-proxy kornak-agent etcd; do systemctl stop $unit 2>&1 || true; done";
            if let Err(error) = self.run(host, script, "/") {
                println!("{error:#}");
            }
        }
    }
}

async fn read_aloud(machines: &Machines, page: &str) -> Result<()> {
    let mut writer: Option<Process> = None;
    for block in blocks(page)? {
        let began = Instant::now();
        if block.background {
            let host = block.on.first().context("one host")?;
            let command = machines.command(host, &block.script, "/root")?;
            writer = Some(Process::spawn("writer", command, &machines.scratch.join("writer.log"))?);
            let count = "runuser -u postgres -- psql -d app -XAtc 'SELECT count(*) > 50 FROM visits' | grep -x t";
            until(SOON, "the application writes", || async {
                machines.run("db1", count, "/").map_err(|error| format!("{error:#}"))
            })
            .await;
            continue;
        }
        if block.after_background {
            let mut writer = writer.take().context("a program in the background")?;
            ensure!(writer.exited().is_none(), "it ended before the primary was moved");
            let status = writer.exit(SOON).await;
            ensure!(status.success(), "the application saw an error:\n{}", writer.tail(20));
            ensure!(writer.tail(1).is_empty(), "it printed:\n{}", writer.tail(20));
        }
        machines.run_block(&block).await?;
        println!("line {}: {:.1?}", block.line, began.elapsed());
    }
    ensure!(writer.is_none(), "the program in the background was waited for");
    Ok(())
}

#[test]
fn the_tutorial_leads_to_a_cluster_whose_primary_moves_without_an_error() -> Result<()> {
    let name = "the_tutorial_leads_to_a_cluster_whose_primary_moves_without_an_error";
    if !Path::new("/usr/lib/postgresql/15/bin/postgres").exists() {
        println!("skipped: the tutorial is about Debian 12, whose PostgreSQL 15 is not installed");
        return Ok(());
    }
    on_a_lan(name, async |lan| {
        let page = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/tutorial.md");
        let page = fs::read_to_string(page).context("read the tutorial")?;
        let mut machines = Machines::new(&lan).await?;
        read_aloud(&machines, &page).await?;
        machines.show_warnings()?;
        machines.scratch.passed();
        machines.passed = true;
        Ok(())
    })
}

#[test]
fn each_block_of_the_tutorial_says_where_it_is_typed() -> Result<()> {
    let found = blocks("text\n```sh on=db1,db2 retry=30\nls\ndf\n```\nmore\n")?;
    let expected = Block {
        line: 2,
        on: vec!["db1".to_owned(), "db2".to_owned()],
        retry: Some(30),
        script: "ls\ndf\n".to_owned(),
        ..Block::default()
    };
    assert_eq!(found, [expected]);
    assert!(blocks("```sh\nls\n```\n").is_err(), "where?");
    assert!(blocks("```sh on=db1 sometimes\nls\n```\n").is_err(), "what is that?");
    Ok(())
}

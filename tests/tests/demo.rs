//! The demo, used as a stranger uses it: what it prints is what is typed.

use std::process::{Command, Output};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use kornak_tests::run::cluster::run;
use kornak_tests::run::kornak;
use kornak_tests::run::port::Port;
use kornak_tests::run::process::Process;
use kornak_tests::run::rest::Rest;
use kornak_tests::run::scratch::{Scratch, processes_below};
use kornak_tests::run::wait::until;
use rustix::process::Signal;

/// More than the demo uses: listeners, servers and REST APIs of up to nine nodes, etcd.
const PORTS: u16 = 40;

/// `kornak` with a folder of its own for the note that says where the demo is.
fn kornak_in(scratch: &Scratch, words: &[&str]) -> Command {
    let mut command = kornak::command(words.iter().copied());
    command.env("XDG_RUNTIME_DIR", scratch.path());
    command
}

struct Demo {
    process: Process,
}

impl Demo {
    /// `run` tells the logs of several runs apart.
    fn start(scratch: &Scratch, run: &str, ports: &[Port], options: &[&str]) -> Result<Self> {
        let first = first(ports).to_string();
        let mut command = kornak_in(scratch, &["demo", "--ports-from", &first]);
        command.args(options).arg("--dir").arg(scratch.join("work"));
        let process = Process::spawn("demo", command, &scratch.join(&format!("{run}.log")))?;
        Ok(Self { process })
    }

    /// The two command lines that it offers: for the primary and for the standbys.
    async fn ready(&mut self) -> [String; 2] {
        until(Duration::from_secs(90), "the demo is ready", || {
            let text = self.process.tail(1000);
            let ended = self.process.exited();
            async move {
                assert!(ended.is_none(), "the demo ended ({ended:?}):\n{text}");
                let mut offered = text.lines().map(str::trim).filter(|it| it.starts_with("psql "));
                match (offered.next(), offered.next(), text.contains("Ready.")) {
                    (Some(primary), Some(standbys), true) => {
                        Ok([primary.to_owned(), standbys.to_owned()])
                    }
                    _ => Err(text),
                }
            }
        })
        .await
    }

    /// Ctrl-C.
    async fn interrupt(mut self, scratch: &Scratch) -> Result<()> {
        self.process.signal(Signal::INT)?;
        let status = self.process.exit(Duration::from_secs(60)).await;
        ensure!(status.success(), "the demo ended with {status}:\n{}", self.process.tail(20));
        let left = processes_below(scratch.path());
        ensure!(
            left.is_empty(),
            "left behind: {:?}",
            left.into_iter().map(command_of).collect::<Vec<_>>()
        );
        Ok(())
    }
}

fn first(ports: &[Port]) -> u16 {
    ports.first().map_or(0, Port::number)
}

fn command_of(pid: u32) -> String {
    let words = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    String::from_utf8_lossy(&words).replace('\0', " ")
}

/// Types the offered line into a shell, with one statement; what it prints.
async fn psql(line: &str, sql: &str) -> Result<String> {
    let mut shell = Command::new("/bin/sh");
    shell.arg("-c").arg(format!("{line} -X -A -t -c \"{sql}\"")).env("PGCONNECT_TIMEOUT", "15");
    let output = run(shell).await?;
    ensure!(output.status.success(), "{line}: {}", text_of(&output));
    Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

fn text_of(output: &Output) -> String {
    format!(
        "{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    )
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stranger_gets_a_cluster_switches_over_and_leaves_nothing_behind() -> Result<()> {
    let mut scratch = Scratch::new("demo");
    let ports = Port::block(PORTS);
    // Where the Citus extension is installed, the default is a Citus cluster.
    let mut demo = Demo::start(&scratch, "demo", &ports, &["--nodes", "3"])?;
    let [primary, standbys] = demo.ready().await;
    psql(&primary, "CREATE TABLE words (word text)").await?;
    psql(&primary, "INSERT INTO words VALUES ('written')").await?;
    until(Duration::from_secs(15), "the row is read from a standby", || async {
        let sql = "SELECT pg_is_in_recovery(), string_agg(word, ',') FROM words";
        match psql(&standbys, sql).await {
            Ok(row) if row == "t|written" => Ok(()),
            Ok(row) => Err(row),
            Err(error) => Err(format!("{error:#}")),
        }
    })
    .await;

    // Started as root, it must not open the machine's watchdog.
    let mut agents = 0;
    for entry in std::fs::read_dir(scratch.join("work"))? {
        let path = entry?.path();
        let text = std::fs::read_to_string(&path).unwrap_or_default();
        if text.contains("\nbootstrap:\n") {
            assert!(text.contains("\nwatchdog:\n  mode: off\n"), "{}: {text}", path.display());
            agents += 1;
        }
    }
    assert!(agents >= 3, "{agents} agents have a file");

    let before = leader(&scratch).await?;
    let output = run(kornak_in(&scratch, &["switchover", "--force"])).await?;
    ensure!(output.status.success(), "switchover: {}", text_of(&output));
    let after = leader(&scratch).await?;
    assert_ne!(before, after, "{}", text_of(&output));
    psql(&primary, "INSERT INTO words VALUES ('again')").await?;
    assert_eq!(psql(&primary, "SELECT count(*) FROM words").await?, "2");

    let status = Rest::new(&ports.get(3).context("the status page's port")?.address());
    assert_eq!(status.code("/metrics").await?, 200);
    demo.interrupt(&scratch).await?;
    let output = run(kornak_in(&scratch, &["list"])).await?;
    assert!(!output.status.success(), "nothing is listed after the end: {}", text_of(&output));
    scratch.passed();
    Ok(())
}

/// The leader's name by `kornak list`, with nothing configured.
async fn leader(scratch: &Scratch) -> Result<String> {
    let output = run(kornak_in(scratch, &["list", "-f", "json"])).await?;
    ensure!(output.status.success(), "list: {}", text_of(&output));
    let members: serde_json::Value = serde_json::from_slice(&output.stdout)?;
    let members = members.as_array().context("a list")?;
    let leader = members.iter().find(|member| member["Role"] == "Leader");
    Ok(leader.with_context(|| format!("{members:?}"))?["Member"].to_string())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_taken_port_is_named_with_the_option_that_helps() -> Result<()> {
    let mut scratch = Scratch::new("taken");
    let ports = Port::block(PORTS);
    let first = first(&ports);
    let _somebody = tokio::net::TcpListener::bind(("127.0.0.1", first + 11)).await?;
    let mut command = kornak_in(&scratch, &["demo", "--ports-from", &first.to_string()]);
    command.arg("--dir").arg(scratch.join("work"));
    let output = run(command).await?;
    let text = text_of(&output);
    assert!(!output.status.success(), "it started: {text}");
    assert!(text.contains(&(first + 11).to_string()), "the port is not named: {text}");
    assert!(text.contains("--ports-from"), "the option is not named: {text}");
    assert_eq!(processes_below(scratch.path()), [0_u32; 0], "nothing was left running");
    scratch.passed();
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_demo_on_etcd_is_kept_in_its_directory_and_starts_again() -> Result<()> {
    let mut scratch = Scratch::new("kept");
    let ports = Port::block(PORTS);
    for round in ["first", "second"] {
        let mut demo = Demo::start(&scratch, round, &ports, &["--nodes", "2", "--dcs", "etcd"])?;
        let [primary, _] = demo.ready().await;
        let create = "CREATE TABLE IF NOT EXISTS rounds (name text)";
        psql(&primary, create).await?;
        psql(&primary, &format!("INSERT INTO rounds VALUES ('{round}')")).await?;
        if round == "second" {
            let names = psql(&primary, "SELECT string_agg(name, ',') FROM rounds").await?;
            assert_eq!(names, "first,second");
        }
        demo.interrupt(&scratch).await?;
    }
    scratch.passed();
    Ok(())
}

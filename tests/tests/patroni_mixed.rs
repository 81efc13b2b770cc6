//! Patroni's agents and Kornak's in one cluster, and either's command for both: what a team sees
//! while it changes from one to the other.

#![expect(clippy::print_stdout, reason = "a run shows what it did")]

use std::fs::{self, File};
use std::os::unix::fs::PermissionsExt;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use kornak_tests::run::cluster::{Cluster, ClusterSpec, run};
use kornak_tests::run::kornak;
use kornak_tests::run::patroni::Patroni;
use kornak_tests::run::postgres::SUPERUSER_PASSWORD;
use kornak_tests::run::wait::until;

const SOON: Duration = Duration::from_secs(60);

/// Patroni's smallest ttl.
const TTL: u32 = 20;

/// The output of a command, and how it ended.
#[derive(Debug, PartialEq, Eq)]
struct Said {
    code: Option<i32>,
    out: String,
    err: String,
}

/// The output without the time of day that some rows begin with.
fn timeless(text: &str) -> Vec<&str> {
    let bare = |line: &'_ str| match line.split_once('\t') {
        Some((time, _)) if time.len() == 19 && time.starts_with("20") => 20,
        _ => 0,
    };
    text.lines().map(|line| line.get(bare(line)..).unwrap_or(line)).collect()
}

/// Both commands, with the same file.
struct Tools<'c> {
    patroni: Patroni,
    cluster: &'c Cluster,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Tool {
    Patronictl,
    Kornak,
}

impl Tools<'_> {
    fn command(&self, tool: Tool, words: &[&str]) -> Result<Command> {
        let mut command = match tool {
            Tool::Patronictl => self.patroni.command("patronictl"),
            Tool::Kornak => Command::new(kornak::called_as("patronictl")?),
        };
        if tool == Tool::Kornak {
            command.current_dir("/").env_clear().env("TZ", "UTC").env("HOME", "/nonexistent");
        }
        command.env("PGPASSWORD", SUPERUSER_PASSWORD).env("PGUSER", "postgres");
        command.arg("-c").arg(self.cluster.nodes[0].file()).args(words);
        Ok(command)
    }

    async fn say(&self, tool: Tool, words: &[&str]) -> Result<Said> {
        self.run(self.command(tool, words)?).await
    }

    async fn run(&self, command: Command) -> Result<Said> {
        let output = run(command).await?;
        Ok(Said {
            code: output.status.code(),
            out: String::from_utf8_lossy(&output.stdout).into_owned(),
            err: String::from_utf8_lossy(&output.stderr).into_owned(),
        })
    }

    /// Succeeds, or the test fails with what it said.
    async fn succeed(&self, tool: Tool, words: &[&str]) -> Result<String> {
        let began = Instant::now();
        let said = self.say(tool, words).await?;
        println!("{tool:?} {words:?} took {:.1?}", began.elapsed());
        assert_eq!(said.code, Some(0), "{tool:?} {words:?}: {said:?}");
        assert!(!said.out.contains("Failed"), "{tool:?} {words:?}: {}", said.out);
        Ok(said.out)
    }

    /// Both print the same, byte by byte, and end alike. Positions move, so they may need a few tries.
    async fn same(&self, words: &[&str]) {
        until(Duration::from_secs(20), &format!("the same of {words:?}"), || async {
            let (patroni, kornak) =
                tokio::join!(self.say(Tool::Patronictl, words), self.say(Tool::Kornak, words));
            let patroni = patroni.map_err(|it| format!("{it:#}"))?;
            let kornak = kornak.map_err(|it| format!("{it:#}"))?;
            let same =
                (patroni.code, timeless(&patroni.out)) == (kornak.code, timeless(&kornak.out));
            if same { Ok(()) } else { Err(format!("\n{patroni:#?}\n{kornak:#?}")) }
        })
        .await;
    }

    /// Both ask the same questions and take the same answers; whatever was to be done, it is not.
    async fn ask_the_same(&self) -> Result<()> {
        let answers = self.cluster.path("answers");
        for (words, given) in [
            (&["switchover"][..], "\n\n\nmaybe\nn\n"),
            (&["switchover"], "node0\nnode1\n2099-01-01T10:00\nn\n"),
            (&["failover"], "nobody\n"),
            (&["failover"], "node2\nn\n"),
            (&["restart", "demo", "node1"], "2099-01-01T10:00\nn\n"),
            (&["restart", "demo", "node1"], "now\ny\n15\n"),
            (&["restart", "demo", "-r", "leader", "node1"], ""),
            (&["reinit", "demo", "node1"], "n\n"),
            (&["remove", "demo"], "\ndemo\nYes I am aware\nnobody\n"),
            (&["edit-config", "-s", "foo=bar"], "n\n"),
            (&["demote-cluster", "--host", "far"], "n\n"),
        ] {
            fs::write(&answers, given)?;
            let what = format!("the same of {words:?} answered {given:?}");
            until(Duration::from_secs(20), &what, || async {
                let asked = |tool| {
                    let mut command = self.command(tool, words)?;
                    command.stdin(File::open(&answers)?);
                    Ok::<_, anyhow::Error>(self.run(command))
                };
                let said = |tool| async move { asked(tool)?.await };
                let (patroni, kornak) = tokio::join!(said(Tool::Patronictl), said(Tool::Kornak));
                let (patroni, kornak) = (
                    patroni.map_err(|it| format!("{it:#}"))?,
                    kornak.map_err(|it| format!("{it:#}"))?,
                );
                if patroni == kornak { Ok(()) } else { Err(format!("\n{patroni:#?}\n{kornak:#?}")) }
            })
            .await;
        }
        Ok(())
    }

    /// The password comes from libpq's file, and what the server says of a wrong one is passed on.
    async fn log_in_the_same(&self) -> Result<()> {
        let (right, wrong) = (self.cluster.path("pgpass"), self.cluster.path("pgpass-wrong"));
        for (file, password) in [(&right, SUPERUSER_PASSWORD), (&wrong, "nonsense")] {
            fs::write(file, format!("*:*:postgres:postgres:{password}\n"))?;
            fs::set_permissions(file, fs::Permissions::from_mode(0o600))?;
        }
        let nothing = self.cluster.path("nothing");
        for (file, expected) in [
            (&right, "current_user\npostgres\n"),
            (&wrong, "password authentication failed for user \"postgres\""),
            (&nothing, "no password supplied"),
        ] {
            for tool in [Tool::Patronictl, Tool::Kornak] {
                let mut command = self.command(tool, &["query", "-c", "SELECT current_user"])?;
                command.env_remove("PGPASSWORD").env("PGPASSFILE", file);
                let said = self.run(command).await?;
                assert!(said.out.contains(expected), "{tool:?} {expected}: {said:?}");
                assert_eq!(said.code, Some(0), "{tool:?} {said:?}");
            }
        }
        Ok(())
    }

    /// All that only shows, or is refused.
    async fn show_the_same(&self) {
        for words in [
            &["list"][..],
            &["list", "-e"],
            &["list", "-f", "tsv"],
            &["list", "-f", "json"],
            &["list", "-f", "yaml"],
            &["list", "nosuch"],
            &["topology"],
            &["history", "-f", "json"],
            &["show-config"],
            &["dsn"],
            &["dsn", "-m", "nobody"],
            &["dsn", "-m", "node1", "-r", "replica"],
            &["version", "demo", "node1"],
            &["query", "-c", "SELECT 1 AS one, 'x' AS two, NULL AS three, true, 1.50, 2::float8"],
            &["query", "-r", "replica", "-c", "SELECT pg_is_in_recovery()"],
            &["query", "--format", "pretty", "-c", "SELECT 1 AS one, 'x' AS two"],
            &["query", "--format", "json", "-c", "SELECT 1 AS one, 'x' AS two, true AS three"],
            &["query", "-m", "nobody", "-c", "SELECT 1"],
            &["query", "-r", "primary", "-c", "SELECT pg_is_in_recovery()"],
            &["query", "-r", "standby-leader", "-c", "SELECT 1"],
            &["query", "-d", "template1", "--delimiter", "|", "-c", "SELECT current_database(), 2"],
            &["query", "-c", "SELEC 1"],
            &["switchover", "--force", "--candidate", "nobody"],
            &["failover", "--force"],
            &["restart", "demo", "nobody", "--force"],
            &["flush", "demo", "restart", "--force"],
            &["edit-config", "-s", "loop_wait=1", "--force"],
            &["resume"],
            &["demote-cluster", "--force"],
        ] {
            self.same(words).await;
        }
    }
}

async fn switch(cluster: &Cluster, tools: &Tools<'_>, tool: Tool, to: &str) -> Result<()> {
    let leader = cluster.leader().await?;
    let words = ["switchover", "--leader", &leader, "--candidate", to, "--force"];
    let out = tools.succeed(tool, &words).await?;
    assert!(out.contains(&format!("Successfully switched over to \"{to}\"")), "{out}");
    if to == "node1" {
        // Patroni's agent would leave it to its lease, and clients would wait for that.
        assert_eq!(cluster.key("kornak/handover").await?, "", "the record of the switchover");
    }
    cluster.healthy(SOON).await;
    assert_eq!(cluster.leader().await?, to);
    Ok(())
}

/// A parameter that needs a restart, set and put in force by each command.
async fn configuration(cluster: &Cluster, tools: &Tools<'_>) -> Result<()> {
    let (patronictl, kornak) = (Tool::Patronictl, Tool::Kornak);
    for (tool, value) in [(patronictl, "101"), (kornak, "102")] {
        let setting = format!("max_connections={value}");
        tools.succeed(tool, &["edit-config", "-p", &setting, "--force"]).await?;
        until(SOON, "all wait for a restart", || async {
            let out = tools.say(kornak, &["list"]).await.map_err(|it| it.to_string())?.out;
            let reason =
                format!("max_connections: 10{}->{value}", if value == "101" { 0 } else { 1 });
            if out.matches(&reason).count() == 3 { Ok(()) } else { Err(out) }
        })
        .await;
        tools.same(&["list"]).await;
        tools.same(&["list", "-f", "json"]).await;
        // A primary's max_connections must not be above a standby's: standbys first, for a rise.
        tools.succeed(tool, &["restart", "demo", "-r", "replica", "--pending", "--force"]).await?;
        // Patroni says so at its next heartbeat, and refuses a restart without need till then.
        until(SOON, "only the primary waits for a restart", || async {
            let out = tools.say(kornak, &["list"]).await.map_err(|it| it.to_string())?.out;
            if out.matches("max_connections: 10").count() == 1 { Ok(()) } else { Err(out) }
        })
        .await;
        tools.succeed(tool, &["restart", "demo", "--pending", "--force"]).await?;
        cluster.healthy(SOON).await;
        until(SOON, "nobody waits for a restart", || async {
            let out = tools.say(kornak, &["list"]).await.map_err(|it| it.to_string())?.out;
            if out.contains("Pending restart") { Err(out) } else { Ok(()) }
        })
        .await;
    }
    Ok(())
}

/// A restart and a switchover of the far future, made and discarded by each command.
async fn schedules(cluster: &Cluster, tools: &Tools<'_>) -> Result<()> {
    let (patronictl, kornak) = (Tool::Patronictl, Tool::Kornak);
    for tool in [patronictl, kornak] {
        let words = ["restart", "demo", "node0", "--scheduled", "2099-01-01T00:00:00Z", "--force"];
        tools.succeed(tool, &words).await?;
        let leader = cluster.leader().await?;
        let words =
            ["switchover", "--leader", &leader, "--scheduled", "2099-01-01T00:00", "--force"];
        tools.succeed(tool, &words).await?;
        until(SOON, "the restart is known", || async {
            let out = tools.say(kornak, &["list"]).await.map_err(|it| it.to_string())?.out;
            if out.contains("2099-01-01T00:00:00+00:00 |") { Ok(()) } else { Err(out) }
        })
        .await;
        tools.same(&["list", "-e"]).await;
        tools.same(&["list", "-f", "tsv"]).await;
        tools.succeed(tool, &["flush", "demo", "restart", "--force"]).await?;
        tools.succeed(tool, &["flush", "demo", "switchover", "--force"]).await?;
        tools.succeed(tool, &["reload", "demo", "--force"]).await?;
        until(SOON, "nothing is scheduled", || async {
            let out = tools.say(kornak, &["list"]).await.map_err(|it| it.to_string())?.out;
            if out.contains("cheduled") { Err(out) } else { Ok(()) }
        })
        .await;
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_leads_in_turn_and_obeys_the_others_command() -> Result<()> {
    let spec = ClusterSpec {
        name: "mixed",
        ttl: TTL,
        synchronous: false,
        patroni: &[1],
        ..Default::default()
    };
    let cluster = Cluster::start(spec).await?;
    let tools = Tools { patroni: Patroni::installed()?, cluster: &cluster };
    let (patronictl, kornak) = (Tool::Patronictl, Tool::Kornak);

    // Whoever began: from there through all of them, in both directions, by either command.
    if cluster.leader().await? != "node0" {
        switch(&cluster, &tools, kornak, "node0").await?;
    }
    tools.show_the_same().await;
    tools.ask_the_same().await?;
    tools.log_in_the_same().await?;
    switch(&cluster, &tools, patronictl, "node1").await?;
    switch(&cluster, &tools, kornak, "node2").await?;
    switch(&cluster, &tools, kornak, "node1").await?;
    for words in [
        &["list", "-e", "-f", "json"][..],
        &["topology"],
        &["history"],
        &["history", "-f", "yaml"],
        &["version", "demo"],
        &["dsn", "-r", "replica"],
    ] {
        tools.same(words).await;
    }

    for (tool, to) in [(kornak, "node0"), (patronictl, "node1"), (patronictl, "node2")] {
        let out = tools.succeed(tool, &["failover", "--candidate", to, "--force"]).await?;
        assert!(out.contains(&format!("Successfully failed over to \"{to}\"")), "{out}");
        cluster.healthy(SOON).await;
        assert_eq!(cluster.leader().await?, to);
    }

    configuration(&cluster, &tools).await?;

    for (tool, node) in [(patronictl, "node0"), (kornak, "node1")] {
        tools.succeed(tool, &["reinit", "demo", node, "--force", "--wait"]).await?;
        cluster.healthy(SOON).await;
    }

    for (one, other) in [(patronictl, kornak), (kornak, patronictl)] {
        let out = tools.succeed(one, &["pause", "--wait"]).await?;
        assert!(out.ends_with("Success: cluster management is paused\n"), "{out}");
        tools.same(&["list"]).await;
        tools.same(&["pause"]).await;
        let out = tools.succeed(other, &["resume", "--wait"]).await?;
        assert!(out.ends_with("Success: cluster management is resumed\n"), "{out}");
    }

    schedules(&cluster, &tools).await?;
    cluster.passed();
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_takes_over_when_the_other_is_lost() -> Result<()> {
    let spec = ClusterSpec {
        name: "lost",
        nodes: 2,
        ttl: TTL,
        synchronous: false,
        patroni: &[1],
        ..Default::default()
    };
    let mut cluster = Cluster::start(spec).await?;
    for _ in 0..2 {
        let leader = cluster.leader().await?;
        let began = Instant::now();
        cluster.node_mut(&leader)?.kill_all();
        let new = cluster.new_leader(&leader, SOON).await;
        println!("{leader} lost, {new} leads after {:.1?}", began.elapsed());
        cluster.node_mut(&leader)?.start_agent()?;
        cluster.healthy(SOON).await;
        let client = cluster.connect_to_leader().await?;
        client.batch_execute("CREATE TABLE IF NOT EXISTS seen (n int)").await.context("write")?;
    }
    cluster.passed();
    Ok(())
}

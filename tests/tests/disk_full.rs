//! The disk of the leader's data directory is full.

use std::fs::{self, OpenOptions};
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use kornak_tests::run::cluster::{Cluster, ClusterSpec};
use kornak_tests::run::postgres::describe;
use kornak_tests::run::wait::until;
use tokio_postgres::error::SqlState;

const LIMIT: Duration = Duration::from_secs(90);

/// A small file system of its own, taken away at the end.
struct Disk(PathBuf);

impl Disk {
    fn mount(dir: &Path, megabytes: u32) -> Result<Self> {
        fs::create_dir_all(dir)?;
        let options = format!("size={megabytes}m,mode=0755");
        let output = Command::new("mount")
            .args(["-t", "tmpfs", "-o", &options, "tmpfs"])
            .arg(dir)
            .output()
            .context("run mount")?;
        ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr).trim());
        Ok(Self(dir.to_owned()))
    }

    /// Takes what is left, but for `free` bytes; the file that does is to be removed.
    fn fill(&self, free: u64) -> Result<PathBuf> {
        let path = self.0.join("filler");
        let mut file = OpenOptions::new().create(true).append(true).open(&path)?;
        // Smaller and smaller, down to a page.
        for size in [1 << 20, 1 << 16, 1 << 12] {
            while file.write_all(&vec![1; size]).is_ok() {}
        }
        let taken = file.metadata()?.len();
        file.set_len(taken.saturating_sub(free))?;
        Ok(path)
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("--lazy").arg(&self.0).status();
    }
}

/// Runs a statement until it fails; how often it was confirmed, and what was said then.
async fn until_it_fails(
    cluster: &Cluster,
    statement: &str,
) -> Result<(i64, tokio_postgres::Error)> {
    let client = cluster.connect_to_leader().await?;
    let mut confirmed = 0;
    loop {
        match client.execute(statement, &[]).await {
            Ok(_) => confirmed += 1,
            Err(error) => return Ok((confirmed, error)),
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_leader_whose_disk_is_full_confirms_nothing_and_comes_back_when_there_is_space()
-> Result<()> {
    let spec = ClusterSpec {
        name: "disk-full",
        nodes: 1,
        parameters: vec!["max_wal_size: 48MB".to_owned(), "min_wal_size: 32MB".to_owned()],
        ..ClusterSpec::default()
    };
    // Unmounted when nothing runs on it any more.
    let mounted;
    let mut cluster = Cluster::start(spec).await?;
    mounted = Disk::mount(&cluster.path("node1"), 160);
    let disk = match &mounted {
        Ok(disk) => disk,
        Err(error) => {
            println!("SKIPPED: this machine lets nobody mount a file system: {error:#}");
            cluster.passed();
            return Ok(());
        }
    };
    let small = cluster.add_node(|_| ())?;
    cluster.healthy(LIMIT).await;
    cluster.switchover("node0", &small).await?;
    cluster.healthy(LIMIT).await;
    cluster.connect_to_leader().await?.batch_execute("CREATE TABLE t (big text)").await?;

    let filler = disk.fill(2 << 20)?;
    let row = "INSERT INTO t SELECT string_agg(md5(i::text || random()), '') \
               FROM generate_series(1, 200) AS i";
    let (confirmed, error) = until_it_fails(&cluster, row).await?;
    assert_eq!(error.code(), Some(&SqlState::DISK_FULL), "{}", describe(&error));
    ensure!(confirmed > 0, "there was some space");
    // A server that refuses writes and answers is left alone, as Patroni leaves it; without space for its
    // log it gives up.
    assert_eq!(cluster.leader().await?, small);
    let log = "SELECT pg_logical_emit_message(true, 'fill', repeat(md5(random()::text), 9999))";
    let (_, error) = until_it_fails(&cluster, log).await?;
    println!("{confirmed} rows; {}", describe(&error));
    assert_eq!(cluster.new_leader(&small, LIMIT).await, "node0");
    let client = cluster.connect_to_leader().await?;
    let rows: i64 = client.query_one("SELECT count(*) FROM t", &[]).await?.get(0);
    ensure!(rows >= confirmed, "{rows} rows of {confirmed} that were confirmed");
    client.batch_execute("SET synchronous_commit = local; INSERT INTO t VALUES ('x')").await?;

    fs::remove_file(filler)?;
    cluster.healthy(LIMIT).await;
    let full = cluster.node(&small)?;
    until(LIMIT, "the node that was full has everything", || async {
        let client = full.connect().await.map_err(|error| describe(&error))?;
        let row = client.query_one("SELECT count(*) FROM t", &[]).await;
        let found: i64 = row.map_err(|error| describe(&error))?.get(0);
        if found == rows + 1 { Ok(()) } else { Err(format!("{found} of {}", rows + 1)) }
    })
    .await;
    cluster.node_mut(&small)?.kill_all();
    drop(mounted);
    cluster.passed();
    Ok(())
}

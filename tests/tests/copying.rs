//! COPY, cursors WITH HOLD and what else a session holds for a moment, in planned switchovers: they are waited for as transactions are, on both
//! kinds of listeners, and nothing hangs.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use bytes::{BufMut, BytesMut};
use futures_util::future::join_all;
use kornak_protocol::frontend::{put_copy_done, put_sync};
use kornak_tests::run::cluster::{Cluster, ClusterSpec};
use kornak_tests::run::wait::until;
use kornak_tests::talk::{Talker, put_execution};
use tokio::time::sleep;

/// The client's pause between two messages of a COPY, or of a cursor.
const WORK: Duration = Duration::from_millis(30);

/// How long a round of it may wait for a switchover.
const LIMIT: Duration = Duration::from_secs(30);

#[derive(Debug, Clone, Copy)]
enum Habit {
    SimpleCopy,
    ExtendedCopy,
    /// The COPY fails, and the rest of it is sent all the same.
    FailedCopy,
    CopyOut,
    Cursor,
    /// By SQL.
    Prepare,
    TemporaryTable,
}

const HABITS: [Habit; 7] = [
    Habit::SimpleCopy,
    Habit::ExtendedCopy,
    Habit::FailedCopy,
    Habit::CopyOut,
    Habit::Cursor,
    Habit::Prepare,
    Habit::TemporaryTable,
];

fn copy_data(text: &str, out: &mut BytesMut) {
    out.put_u8(b'd');
    out.put_u32(text.len() as u32 + 4);
    out.put_slice(text.as_bytes());
}

async fn copy_in(client: &mut Talker, extended: bool, rows: &[&str]) -> Result<Vec<String>> {
    if extended {
        let mut out = BytesMut::new();
        put_execution("", Some("COPY t FROM STDIN"), &mut out);
        put_sync(&mut out);
        client.send(&out).await?;
    } else {
        client.query("COPY t FROM STDIN").await?;
    }
    loop {
        match client.next().await?.context("closed before the COPY")?.tag {
            b'G' => break,
            b'E' => anyhow::bail!("the COPY is refused"),
            _ => {}
        }
    }
    for row in rows {
        let mut out = BytesMut::new();
        copy_data(row, &mut out);
        client.send(&out).await?;
        sleep(WORK).await;
    }
    let mut out = BytesMut::new();
    put_copy_done(&mut out);
    if extended {
        put_sync(&mut out);
    }
    client.send(&out).await?;
    client.told(1).await
}

/// Statements one by one, each with what has to be among its answers.
async fn steps(client: &mut Talker, script: &[(&str, &str)]) -> Result<()> {
    for (sql, wanted) in script {
        let told = client.ask(sql).await?;
        ensure!(told.iter().any(|it| it == wanted), "{sql}: {told:?}");
        sleep(WORK).await;
    }
    Ok(())
}

/// One round; answers how many rows were written.
async fn round(client: &mut Talker, habit: Habit) -> Result<u64> {
    match habit {
        Habit::SimpleCopy | Habit::ExtendedCopy => {
            let extended = matches!(habit, Habit::ExtendedCopy);
            let told = copy_in(client, extended, &["1\n", "2\n"]).await?;
            ensure!(told == ["C COPY 2", "Z I"], "{habit:?}: {told:?}");
            return Ok(2);
        }
        Habit::FailedCopy => {
            let told = copy_in(client, true, &["no number\n", "1\n"]).await?;
            ensure!(told == ["E 22P02", "Z I"], "{habit:?}: {told:?}");
        }
        Habit::CopyOut => {
            let told = client.ask("COPY (SELECT generate_series(1, 2000)) TO STDOUT").await?;
            let rows = told.iter().filter(|it| it.starts_with('d')).count();
            ensure!(rows == 2000 && told.last().is_some_and(|it| it == "Z I"), "{rows}");
        }
        Habit::Cursor => {
            let sql = "DECLARE c CURSOR WITH HOLD FOR SELECT generate_series(1, 30)";
            let told = client.ask(sql).await?;
            ensure!(told == ["C DECLARE CURSOR", "Z I"], "{told:?}");
            for _ in 0..3 {
                sleep(WORK).await;
                let told = client.ask("FETCH 10 FROM c").await?;
                let rows = told.iter().filter(|it| it.starts_with('D')).count();
                ensure!(rows == 10, "{told:?}");
            }
            let told = client.ask("CLOSE c").await?;
            ensure!(told == ["C CLOSE CURSOR", "Z I"], "{told:?}");
        }
        Habit::Prepare => {
            let script = [
                ("PREPARE p AS SELECT 7", "C PREPARE"),
                ("EXECUTE p", "D 7"),
                ("DEALLOCATE p", "C DEALLOCATE"),
            ];
            steps(client, &script).await?;
        }
        Habit::TemporaryTable => {
            let script = [
                ("CREATE TEMP TABLE own (x int)", "C CREATE TABLE"),
                ("INSERT INTO own VALUES (7)", "C INSERT 0 1"),
                ("TABLE own", "D 7"),
                ("DROP TABLE own", "C DROP TABLE"),
            ];
            steps(client, &script).await?;
        }
    }
    Ok(0)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn copies_and_cursors_are_waited_for_and_nothing_hangs() -> Result<()> {
    let cluster = Cluster::start(ClusterSpec { name: "copying", ..Default::default() }).await?;
    let pooled = cluster.pooled_proxy(3).await?;
    let admin = cluster.app_on_leader().await?;
    admin.batch_execute("CREATE TABLE t (x int)").await?;
    let (stop, written) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
    let rounds: Arc<Vec<AtomicU64>> = Arc::new((0..14).map(|_| AtomicU64::new(0)).collect());
    let mut clients = Vec::new();
    for (number, (port, habit)) in [cluster.proxy.primary(), pooled.primary()]
        .into_iter()
        .flat_map(|port| HABITS.map(|habit| (port, habit)))
        .enumerate()
    {
        let (stop, written, rounds) = (stop.clone(), written.clone(), rounds.clone());
        clients.push(tokio::spawn(async move {
            let mut client = Talker::login(&Cluster::app_login(port)).await?;
            while !stop.load(Relaxed) {
                let done = tokio::time::timeout(LIMIT, round(&mut client, habit)).await;
                let done = done.with_context(|| format!("{habit:?} at {port} hangs"))?;
                written.fetch_add(done.with_context(|| format!("{habit:?} at {port}"))?, Relaxed);
                rounds[number].fetch_add(1, Relaxed);
                sleep(Duration::from_millis(10)).await;
            }
            Ok::<_, anyhow::Error>(())
        }));
    }
    let flows = || async {
        let before: Vec<u64> = rounds.iter().map(|it| it.load(Relaxed)).collect();
        until(LIMIT, "every client goes on", || async {
            let now = rounds.iter().map(|it| it.load(Relaxed));
            match before.iter().zip(now).all(|(before, now)| now > before + 1) {
                true => Ok(()),
                false => Err(format!("{rounds:?} after {before:?}")),
            }
        })
        .await;
    };
    for _ in 0..2 {
        flows().await;
        println!("{}", cluster.switchover_to_the_next().await?);
        flows().await;
        cluster.healthy(Duration::from_secs(60)).await;
    }
    stop.store(true, Relaxed);
    for client in join_all(clients).await {
        client??;
    }
    let row = cluster.app_on_leader().await?.query_one("SELECT count(*) FROM t", &[]).await?;
    assert_eq!(row.get::<_, i64>(0) as u64, written.load(Relaxed), "no row is lost or twice there");
    cluster.passed();
    Ok(())
}

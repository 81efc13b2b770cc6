//! A group of a Citus cluster that has lost its primary, with real servers without the extension and
//! the agents' part played by the test: who might reach it waits, and nobody sees an error.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test stops at what it did not expect")]

mod common;

use std::sync::Arc;
use std::time::Duration;

use common::{Load, Proxy, Scratch, Server, connect, memory, until};
use kornak_cluster::{
    CitusDatabase, CitusRegistration, Epoch, GroupId, Handover, HandoverPhase, Scope,
};
use kornak_config::proxy::ProxySettings;
use kornak_dcs::keys::Keys;
use kornak_dcs::memory::MemoryDcs;
use kornak_dcs::{Dcs, Op, Txn};

/// Clients of the coordinator.
const CLIENTS: usize = 4;

/// A coordinator, a worker group of two, and a proxy in front.
struct Cluster {
    store: Arc<dyn Dcs>,
    coordinator: Server,
    worker: Server,
    standby: Server,
    proxy: Proxy,
    _scratch: Scratch,
}

fn keys(group: u32) -> Keys {
    Keys::new(&Scope::new("service", "demo", Some(GroupId(group))))
}

impl Cluster {
    async fn start(change: impl FnOnce(&mut ProxySettings)) -> Self {
        let scratch = Scratch::new();
        let coordinator = Server::primary(&scratch, "c");
        let worker = Server::primary(&scratch, "w");
        let standby = worker.standby(&scratch, "x");
        let store: Arc<dyn Dcs> = Arc::new(MemoryDcs::new());
        let proxy = Proxy::start_with(memory(), Some(Arc::clone(&store)), change).await;
        let cluster = Self { store, coordinator, worker, standby, proxy, _scratch: scratch };
        cluster.leads(0, &cluster.coordinator).await;
        cluster.leads(1, &cluster.worker).await;
        cluster.registers(&cluster.worker, &[]).await;
        until("both serve", || async { cluster.serving(1).await.is_some() }).await;
        cluster
    }

    async fn put(&self, txn: Txn) {
        assert!(self.store.txn(txn).await.unwrap().succeeded);
    }

    async fn leads(&self, group: u32, server: &Server) {
        let keys = keys(group);
        let member = Op::put(keys.member(&server.name), server.member("primary"));
        self.put(Txn::just(Op::put(keys.leader(), &server.name)).and(member)).await;
    }

    /// The coordinator's leader says where the worker is, and who has not heard of it.
    async fn registers(&self, worker: &Server, behind: &[u32]) {
        let at = |server: &Server| format!("127.0.0.1:{}", server.port);
        let database = CitusDatabase {
            agrees: true,
            synced: behind.is_empty(),
            behind: behind.iter().copied().map(GroupId).collect(),
            groups: [GroupId(0), GroupId(1)].into(),
            primaries: [(GroupId(0), at(&self.coordinator)), (GroupId(1), at(worker))].into(),
            ..CitusDatabase::default()
        };
        let registration = CitusRegistration {
            member: self.coordinator.name.clone(),
            databases: [("citus".to_owned(), database)].into(),
        };
        let text = serde_json::to_string(&registration).unwrap();
        self.put(Txn::just(Op::put(keys(0).citus(), text))).await;
    }

    /// The record of a planned switchover of the worker group, which the leader key may follow.
    fn record(record: &Handover) -> Txn {
        let text = serde_json::to_string(record).unwrap();
        Txn::just(Op::put(keys(1).handover(), text))
    }

    async fn status(&self) -> serde_json::Value {
        let page = self.proxy.page("/status").await;
        serde_json::from_str(page.split("\r\n\r\n").nth(1).unwrap()).unwrap()
    }

    async fn serving(&self, group: u32) -> Option<String> {
        let status = self.status().await;
        status["groups"][group.to_string()]["serving"].as_str().map(str::to_owned)
    }

    /// Waits until every client of the load is held.
    async fn all_held(&self) {
        until("everybody waits", || async {
            let status = self.status().await;
            status["sessions"]["by_state"]["held"] == CLIENTS
        })
        .await;
        let gate = self.status().await["gate"].clone();
        assert_eq!((&gate["phase"], &gate["without_primary"][0]), (&"failover".into(), &1.into()));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn clients_of_the_coordinator_wait_until_a_lost_worker_has_a_registered_successor() {
    let cluster = Cluster::start(|_| {}).await;
    let load = Load::start(cluster.proxy.port(0), 2, 2, 0).await;
    load.more(20).await;
    cluster.worker.stop("immediate");
    cluster.all_held().await;
    let written = load.written();
    cluster.standby.promote();
    cluster.leads(1, &cluster.standby).await;
    until("it is proven", || async { cluster.serving(1).await.as_deref() == Some("x") }).await;
    cluster.all_held().await;
    assert_eq!(load.written(), written, "the coordinator would still go to the old address");
    // Workers that have not heard of it keep the workers' own clients waiting, and nobody else.
    cluster.registers(&cluster.standby, &[1]).await;
    load.more(20).await;
    cluster.registers(&cluster.standby, &[]).await;
    until("it is over", || async { cluster.status().await["gate"]["phase"] == "open" }).await;
    let account = load.finish().await;
    assert_eq!(*account.errors.lock(), Vec::<String>::new());
}

/// Citus acknowledges a transaction whose second phase a lost worker has not heard of.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nobody_reads_before_what_was_committed_is_seen() {
    let cluster = Cluster::start(|_| {}).await;
    let worker = cluster.worker.sql().await;
    let prepare = "BEGIN; CREATE TABLE half (); PREPARE TRANSACTION 'citus_0_1_1_1'";
    worker.batch_execute(prepare).await.unwrap();
    let others = "BEGIN; CREATE TABLE mine (); PREPARE TRANSACTION 'mine'";
    worker.batch_execute(others).await.unwrap();
    let written: String =
        worker.query_one("SELECT pg_current_wal_flush_lsn()::text", &[]).await.unwrap().get(0);
    let load = Load::start(cluster.proxy.port(0), 2, 2, 0).await;
    load.more(20).await;
    let standby = cluster.standby.sql().await;
    until("the standby has it", || async {
        let replayed = format!("SELECT pg_last_wal_replay_lsn() >= '{written}'");
        standby.query_one(&replayed, &[]).await.unwrap().get(0)
    })
    .await;
    cluster.worker.stop("immediate");
    cluster.all_held().await;
    cluster.standby.promote();
    cluster.leads(1, &cluster.standby).await;
    cluster.registers(&cluster.standby, &[]).await;
    until("it is proven", || async { cluster.serving(1).await.as_deref() == Some("x") }).await;
    cluster.all_held().await;
    let written = load.written();
    // Each of these is many looks of the proxy's.
    for _ in 0..20 {
        assert_eq!(cluster.status().await["groups"]["1"]["unfinished"], 1, "mine is mine");
        connect(cluster.standby.port).await.unwrap();
    }
    assert_eq!(load.written(), written, "somebody has begun");
    let began = std::time::Instant::now();
    standby.batch_execute("COMMIT PREPARED 'citus_0_1_1_1'").await.unwrap();
    load.more(20).await;
    assert!(began.elapsed() < Duration::from_secs(5), "they waited for {:?}", began.elapsed());
    let account = load.finish().await;
    assert_eq!(*account.errors.lock(), Vec::<String>::new());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_that_stays_away_holds_nobody_longer_than_hold_timeout() {
    let limit = Duration::from_secs(1);
    let cluster = Cluster::start(|settings| settings.limits.hold_timeout = limit).await;
    let load = Load::start(cluster.proxy.port(0), 2, 2, 0).await;
    load.more(20).await;
    cluster.worker.stop("immediate");
    cluster.all_held().await;
    load.more(20).await;
    let account = load.finish().await;
    assert_eq!(*account.errors.lock(), Vec::<String>::new(), "nobody was refused");
    let longest = *account.longest.lock();
    assert!(longest > limit / 2 && longest < limit * 3, "{longest:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_switchover_of_a_worker_group_is_over_with_its_record_though_nobody_saw_it_settle() {
    let cluster = Cluster::start(|_| {}).await;
    let load = Load::start(cluster.proxy.port(0), 2, 2, 0).await;
    load.more(20).await;
    let view = cluster.store.range(keys(1).root()).await.unwrap();
    let leader = view.get(&keys(1).leader()).unwrap();
    let mut record = Handover {
        v: 1,
        id: "h".to_owned(),
        attempt: 1,
        phase: HandoverPhase::Drain,
        group: Some(GroupId(1)),
        leader: "w".to_owned(),
        candidate: Some("x".to_owned()),
        epoch: Epoch { store: view.store, revision: leader.create_revision },
        max_hold_ms: 1000,
        switch_hold_ms: 5000,
        wal_end: None,
    };
    let phase = async |phase: &str| {
        until(phase, || async { cluster.status().await["gate"]["phase"] == phase }).await;
    };
    cluster.put(Cluster::record(&record)).await;
    phase("draining").await;
    record.phase = HandoverPhase::Switch;
    cluster.put(Cluster::record(&record)).await;
    phase("switching").await;
    cluster.worker.stop("fast");
    cluster.put(Txn::just(Op::delete(keys(1).leader()))).await;
    cluster.standby.promote();
    record.phase = HandoverPhase::Promote;
    let promoted = Cluster::record(&record).and(Op::put(keys(1).leader(), "x"));
    let member = Op::put(keys(1).member("x"), cluster.standby.member("primary"));
    cluster.put(promoted.and(member)).await;
    until("it is proven", || async { cluster.serving(1).await.as_deref() == Some("x") }).await;
    cluster.registers(&cluster.standby, &[]).await;
    cluster.put(Txn::just(Op::delete(keys(1).handover()))).await;
    let began = std::time::Instant::now();
    phase("open").await;
    load.more(20).await;
    assert!(began.elapsed() < Duration::from_secs(5), "held until {:?}", began.elapsed());
    let account = load.finish().await;
    assert_eq!(*account.errors.lock(), Vec::<String>::new());
}

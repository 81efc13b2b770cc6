//! A planned switchover between two real servers, with the agents' part played by the test: no
//! client sees an error.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test stops at what it did not expect")]

mod common;

use std::sync::Arc;
use std::time::{Duration, Instant};

use common::{Load, Proxy, Scratch, Server, memory, until};
use kornak_cluster::{Ack, Epoch, Handover, HandoverPhase, Scope};
use kornak_dcs::keys::Keys;
use kornak_dcs::memory::MemoryDcs;
use kornak_dcs::{Dcs, Op, Txn};

/// Plays the agents of both servers.
struct Agents {
    store: Arc<dyn Dcs>,
    keys: Keys,
}

impl Agents {
    async fn new(leader: &Server, other: &Server) -> Self {
        let store: Arc<dyn Dcs> = Arc::new(MemoryDcs::new());
        let keys = Keys::new(&Scope::new("service", "demo", None));
        let agents = Self { store, keys };
        let keys = &agents.keys;
        agents
            .put(
                Txn::just(Op::put(keys.member(&leader.name), leader.member("primary")))
                    .and(Op::put(keys.member(&other.name), other.member("replica")))
                    .and(Op::put(keys.leader(), &leader.name)),
            )
            .await;
        agents
    }

    async fn put(&self, txn: Txn) {
        assert!(self.store.txn(txn).await.unwrap().succeeded);
    }

    async fn get(&self, key: &str) -> Option<String> {
        let view = self.store.range(self.keys.root()).await.unwrap();
        view.get(key).map(|found| found.value.clone())
    }

    async fn epoch(&self) -> Epoch {
        let view = self.store.range(self.keys.root()).await.unwrap();
        let leader = view.get(&self.keys.leader()).unwrap();
        Epoch { store: view.store, revision: leader.create_revision }
    }

    async fn record(&self, record: &Handover) {
        let text = serde_json::to_string(record).unwrap();
        self.put(Txn::just(Op::put(self.keys.handover(), text))).await;
    }

    async fn acknowledged(&self, record: &Handover) -> bool {
        let view = self.store.range(self.keys.root()).await.unwrap();
        let prefix = self.keys.acks();
        let mut acks = view.below(&prefix);
        let proxies = self.keys.proxies();
        assert_eq!(view.below(&proxies).count(), 1, "the proxy is registered");
        let ack = Ack { id: record.id.clone(), attempt: record.attempt };
        acks.any(|(_, found)| serde_json::from_str(&found.value).ok() == Some(ack.clone()))
    }

    /// The whole switchover from `from` to `to`.
    async fn switch_over(&self, from: &Server, to: &Server) -> Duration {
        let mut record = Handover {
            v: 1,
            id: format!("h-{}", to.name),
            attempt: 1,
            phase: HandoverPhase::Prepare,
            group: None,
            leader: from.name.clone(),
            candidate: Some(to.name.clone()),
            epoch: self.epoch().await,
            max_hold_ms: 1000,
            switch_hold_ms: 5000,
            wal_end: None,
        };
        self.record(&record).await;
        for server in [from, to] {
            server.sql().await.batch_execute("CHECKPOINT").await.unwrap();
        }
        let began = Instant::now();
        record.phase = HandoverPhase::Drain;
        self.record(&record).await;
        until("acknowledged", || self.acknowledged(&record)).await;
        record.phase = HandoverPhase::Switch;
        self.record(&record).await;
        from.stop("fast");
        self.put(Txn::just(Op::delete(self.keys.leader()))).await;
        record.phase = HandoverPhase::Promote;
        let text = serde_json::to_string(&record).unwrap();
        self.put(
            Txn::just(Op::put(self.keys.leader(), &to.name))
                .and(Op::put(self.keys.handover(), text)),
        )
        .await;
        to.promote();
        self.put(
            Txn::just(Op::put(self.keys.member(&to.name), to.member("primary")))
                .and(Op::delete(self.keys.handover())),
        )
        .await;
        began.elapsed()
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_planned_switchover_costs_no_client_an_error() {
    let scratch = Scratch::new();
    let a = Server::primary(&scratch, "a");
    let b = a.standby(&scratch, "b");
    let agents = Agents::new(&a, &b).await;
    let proxy = Proxy::start(memory(), Some(Arc::clone(&agents.store))).await;
    let load = Load::start(proxy.port(0), 6, 3, 2).await;
    load.more(20).await;
    let took = agents.switch_over(&a, &b).await;
    load.more(20).await;
    let account = load.finish().await;
    let longest = *account.longest.lock();
    println!("switchover {took:?}, longest wait of a client {longest:?}");
    assert_eq!(*account.errors.lock(), Vec::<String>::new());
    let rows: i64 = b.sql().await.query_one("SELECT count(*) FROM load", &[]).await.unwrap().get(0);
    assert_eq!(rows as u64, account.acknowledged.load(std::sync::atomic::Ordering::SeqCst));
    assert!(agents.get(&agents.keys.handover()).await.is_none());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_drain_that_leads_to_nothing_holds_nobody_longer_than_it_says() {
    let scratch = Scratch::new();
    let a = Server::primary(&scratch, "a");
    let b = a.standby(&scratch, "b");
    let agents = Agents::new(&a, &b).await;
    let proxy = Proxy::start(memory(), Some(Arc::clone(&agents.store))).await;
    let load = Load::start(proxy.port(0), 2, 2, 0).await;
    load.more(10).await;
    let record = Handover {
        v: 1,
        id: "never".to_owned(),
        attempt: 1,
        phase: HandoverPhase::Drain,
        group: None,
        leader: "a".to_owned(),
        candidate: Some("b".to_owned()),
        epoch: agents.epoch().await,
        max_hold_ms: 300,
        switch_hold_ms: 5000,
        wal_end: None,
    };
    agents.record(&record).await;
    until("acknowledged", || agents.acknowledged(&record)).await;
    load.more(10).await;
    let account = load.finish().await;
    assert_eq!(*account.errors.lock(), Vec::<String>::new());
    let longest = *account.longest.lock();
    assert!(longest > Duration::from_millis(400), "{longest:?}: nobody was held");
    assert!(longest < Duration::from_millis(1500), "{longest:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn clients_outlive_the_crash_of_the_primary() {
    let scratch = Scratch::new();
    let a = Server::primary(&scratch, "a");
    let b = a.standby(&scratch, "b");
    let agents = Agents::new(&a, &b).await;
    let proxy = Proxy::start(memory(), Some(Arc::clone(&agents.store))).await;
    let load = Load::start(proxy.port(0), 6, 3, 0).await;
    load.more(20).await;
    a.stop("immediate");
    b.promote();
    agents
        .put(
            Txn::just(Op::put(agents.keys.leader(), "b"))
                .and(Op::put(agents.keys.member("b"), b.member("primary"))),
        )
        .await;
    load.more(20).await;
    let account = load.finish().await;
    let errors = account.errors.lock().clone();
    println!("errors {errors:?}, longest {:?}", *account.longest.lock());
    assert_eq!(account.lost.load(std::sync::atomic::Ordering::SeqCst), 0, "{errors:?}");
    assert!(errors.len() <= 9, "one for each unit in flight at most: {errors:?}");
    assert!(
        errors.iter().all(|code| ["08007", "40001", "57P03"].contains(&code.as_str())),
        "{errors:?}"
    );
}

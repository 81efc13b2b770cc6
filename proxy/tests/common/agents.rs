//! The agents of servers without agents: what a proxy sees of them is in the store.

use std::sync::Arc;
use std::time::{Duration, Instant};

use kornak_cluster::{Ack, Epoch, Handover, HandoverPhase, Scope};
use kornak_dcs::keys::Keys;
use kornak_dcs::memory::MemoryDcs;
use kornak_dcs::{Dcs, Op, Txn};

use super::{Server, until};

/// Plays the agents of both servers.
pub struct Agents {
    pub store: Arc<dyn Dcs>,
    pub keys: Keys,
}

impl Agents {
    pub async fn new(leader: &Server, other: &Server) -> Self {
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

    pub async fn put(&self, txn: Txn) {
        assert!(self.store.txn(txn).await.unwrap().succeeded);
    }

    pub async fn get(&self, key: &str) -> Option<String> {
        let view = self.store.range(self.keys.root()).await.unwrap();
        view.get(key).map(|found| found.value.clone())
    }

    pub async fn epoch(&self) -> Epoch {
        let view = self.store.range(self.keys.root()).await.unwrap();
        let leader = view.get(&self.keys.leader()).unwrap();
        Epoch { store: view.store, revision: leader.create_revision }
    }

    pub async fn record(&self, record: &Handover) {
        let text = serde_json::to_string(record).unwrap();
        self.put(Txn::just(Op::put(self.keys.handover(), text))).await;
    }

    pub async fn acknowledged(&self, record: &Handover) -> bool {
        let view = self.store.range(self.keys.root()).await.unwrap();
        let prefix = self.keys.acks();
        let mut acks = view.below(&prefix);
        let proxies = self.keys.proxies();
        assert_eq!(view.below(&proxies).count(), 1, "the proxy is registered");
        let ack = Ack { id: record.id.clone(), attempt: record.attempt };
        acks.any(|(_, found)| serde_json::from_str(&found.value).ok() == Some(ack.clone()))
    }

    /// The record of a switchover from `from` to `to`, in this phase.
    pub async fn begun(&self, from: &Server, to: &Server, phase: HandoverPhase) -> Handover {
        Handover {
            v: 1,
            id: format!("h-{}", to.name),
            attempt: 1,
            phase,
            group: None,
            leader: from.name.clone(),
            candidate: Some(to.name.clone()),
            epoch: self.epoch().await,
            max_hold_ms: 1000,
            switch_hold_ms: 5000,
            wal_end: None,
        }
    }

    /// The whole switchover from `from` to `to`.
    pub async fn switch_over(&self, from: &Server, to: &Server) -> Duration {
        let mut record = self.begun(from, to, HandoverPhase::Prepare).await;
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

//! A planned switchover between two real servers, with the agents' part played by the test: no
//! client sees an error.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test stops at what it did not expect")]

mod common;

use std::sync::Arc;
use std::time::Duration;

use common::agents::Agents;
use common::{Load, Proxy, Scratch, Server, memory, until};
use kornak_cluster::{Handover, HandoverPhase};
use kornak_dcs::{Op, Txn};

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

/// Backends of clients on a server, but for those that ask it what it is.
async fn clients_of(server: &Server) -> i64 {
    let count = "SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'client backend' \
        AND pid <> pg_backend_pid() AND application_name <> 'Kornak proxy'";
    server.sql().await.query_one(count, &[]).await.unwrap().get(0)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_is_at_work_logs_in_ahead_while_a_switchover_is_prepared() {
    let scratch = Scratch::new();
    let a = Server::primary(&scratch, "a");
    let b = a.standby(&scratch, "b");
    let agents = Agents::new(&a, &b).await;
    let proxy = Proxy::start(memory(), Some(Arc::clone(&agents.store))).await;
    let load = Load::start(proxy.port(0), 2, 2, 0).await;
    load.more(10).await;
    let mut record =
        Handover { id: "h".to_owned(), ..agents.begun(&a, &b, HandoverPhase::Prepare).await };
    agents.record(&record).await;
    until("all are there", || async { clients_of(&b).await == 4 }).await;
    // It is given up, and begun again.
    agents.put(Txn::just(Op::delete(agents.keys.handover()))).await;
    until("all have left", || async { clients_of(&b).await == 0 }).await;
    load.more(10).await;
    record.id = "again".to_owned();
    agents.record(&record).await;
    until("all are there", || async { clients_of(&b).await == 4 }).await;
    agents.switch_over(&a, &b).await;
    load.more(20).await;
    let account = load.finish().await;
    assert_eq!(*account.errors.lock(), Vec::<String>::new());
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
        id: "never".to_owned(),
        max_hold_ms: 300,
        ..agents.begun(&a, &b, HandoverPhase::Drain).await
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
    let units = errors.iter().filter(|code| *code != "25P02").count();
    assert!(units <= 9, "one for each unit in flight at most: {errors:?}");
    assert!(
        // 25P02: the driver had closed a statement without waiting, and that answer was the 40001.
        errors.iter().all(|code| ["08007", "40001", "57P03", "25P02"].contains(&code.as_str())),
        "{errors:?}"
    );
}

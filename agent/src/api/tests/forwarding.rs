//! A switchover or failover that reaches a node which does not lead.

use super::serving::{Served, served};
use super::*;

const SOON: Duration = Duration::from_secs(10);

/// The cluster with members at these addresses.
fn at(view: NodeView, addresses: &[(&str, SocketAddr)]) -> NodeView {
    within(view, |cluster| {
        for (name, address) in addresses {
            cluster.members.get_mut(*name).unwrap().api_url = format!("http://{address}/patroni");
        }
    })
}

fn password() -> BasicAuth {
    BasicAuth { username: "u".to_owned(), password: "p".to_owned().into() }
}

fn guarded() -> ApiSettings {
    let auth = password();
    ApiSettings { peers: peers(Some(&auth)), authentication: Some(auth), ..settings() }
}

/// A leader that says what it was asked to do.
async fn leader() -> Served {
    served(primary(), guarded(), |command| match command {
        Command::Switchover { candidate, answer } => {
            let candidate = candidate.unwrap_or_default();
            answer.send(Ok(format!("Successfully switched over to \"{candidate}\""))).unwrap();
        }
        Command::Failover { candidate, answer } => {
            answer.send(Ok(format!("Successfully failed over to \"{candidate}\""))).unwrap();
        }
        other => panic!("{other:?}"),
    })
    .await
}

async fn post(served: &Served, path: &str, body: &Value) -> (u16, String) {
    let url = format!("http://{}{path}", served.address);
    let auth = password();
    let answer = peers(Some(&auth)).post_json(&url, body, SOON).await.unwrap();
    (answer.status, answer.text())
}

#[tokio::test]
async fn the_leader_carries_out_what_a_standby_was_asked() {
    let leader = leader().await;
    let follower = served(standby(), guarded(), |command| panic!("{command:?}")).await;
    let addresses = [("pg0", follower.address), ("pg2", leader.address)];
    leader.views.send_replace(Arc::new(at(primary(), &addresses)));
    follower.views.send_replace(Arc::new(at(standby(), &addresses)));
    for node in [&leader, &follower] {
        let body = json!({"leader": "pg2", "candidate": "pg0"});
        let (status, text) = post(node, "/switchover", &body).await;
        assert_eq!((status, text.as_str()), (200, "Successfully switched over to \"pg0\""));
        let (status, text) = post(node, "/failover", &json!({"candidate": "pg0"})).await;
        assert_eq!((status, text.as_str()), (200, "Successfully failed over to \"pg0\""));
        // Any standby will do, and one of the two is there.
        let (status, _) = post(node, "/switchover", &json!({"leader": "pg2"})).await;
        assert_eq!(status, 200);
        let (status, text) = post(node, "/failover", &json!({"candidate": "pg1"})).await;
        let refusal = "failover is not possible: no good candidates have been found";
        assert_eq!((status, text.as_str()), (412, refusal));
    }
}

#[tokio::test]
async fn a_candidate_that_must_not_lead_is_refused() {
    let leader = leader().await;
    let follower = served(standby(), guarded(), |command| panic!("{command:?}")).await;
    let addresses = [("pg0", follower.address), ("pg2", leader.address)];
    leader.views.send_replace(Arc::new(at(primary(), &addresses)));
    let unfit = NodeView { tags: tags(json!({"nofailover": true})), ..standby() };
    follower.views.send_replace(Arc::new(at(unfit, &addresses)));
    let body = json!({"leader": "pg2", "candidate": "pg0"});
    assert_eq!(post(&leader, "/switchover", &body).await.0, 412);
}

#[tokio::test]
async fn a_request_is_passed_on_once_only() {
    // Each takes the other for the leader.
    let one = served(standby(), guarded(), |command| panic!("{command:?}")).await;
    let two = served(standby(), guarded(), |command| panic!("{command:?}")).await;
    one.views.send_replace(Arc::new(at(standby(), &[("pg2", two.address)])));
    two.views.send_replace(Arc::new(at(standby(), &[("pg2", one.address)])));
    let (status, text) = post(&one, "/switchover", &json!({"leader": "pg2"})).await;
    assert_eq!((status, text.as_str()), (503, "Switchover failed: the leader has just changed"));
}

#[tokio::test]
async fn a_failover_needs_no_leader_that_answers() {
    let record = |command| {
        let Command::Failover { candidate, answer } = command else { panic!("{command:?}") };
        answer.send(Ok(format!("failed over to {candidate}"))).unwrap();
    };
    let survivor = served(standby(), guarded(), record).await;
    let (status, text) = post(&survivor, "/failover", &json!({"candidate": "pg0"})).await;
    assert_eq!((status, text.as_str()), (200, "failed over to pg0"));
    let body = json!({"leader": "pg2", "candidate": "pg0"});
    let (status, text) = post(&survivor, "/switchover", &body).await;
    let refusal = "Switchover failed: the leader's REST API cannot be reached";
    assert_eq!((status, text.as_str()), (503, refusal));
}

#[tokio::test]
async fn a_switchover_is_answered_when_the_new_leader_shows() {
    let (begun, mut has_begun) = watch::channel(false);
    let carry_out = move |command| {
        let Command::Switchover { answer, .. } = command else { panic!("{command:?}") };
        begun.send_replace(true);
        answer.send(Ok("Successfully switched over".to_owned())).unwrap();
    };
    let leader = served(primary(), guarded(), carry_out).await;
    let follower = served(standby(), guarded(), |command| panic!("{command:?}")).await;
    let view = at(primary(), &[("pg0", follower.address)]);
    leader.views.send_replace(Arc::new(view.clone()));
    let body = json!({"leader": "pg2", "candidate": "pg0"});
    let mut answer = std::pin::pin!(post(&leader, "/switchover", &body));
    tokio::select! {
        early = &mut answer => panic!("{early:?} before anything was done"),
        begun = has_begun.wait_for(|begun| *begun) => assert!(begun.is_ok()),
    }
    let early = tokio::time::timeout(Duration::from_millis(100), &mut answer).await;
    assert!(early.is_err(), "{early:?} while this node still shows the former leader");
    leader.views.send_replace(Arc::new(within(view, |cluster| {
        cluster.leader.as_mut().unwrap().name = "pg0".to_owned();
    })));
    assert_eq!(answer.await.0, 200);
}

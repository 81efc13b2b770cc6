use std::future::IntoFuture;
use std::net::SocketAddr;

use axum::Router;
use axum::routing::{get, post};
use serde_json::json;

use super::*;

const SOON: Duration = Duration::from_secs(10);

fn peers(auth: Option<&BasicAuth>) -> Peers {
    let ctl = CtlSettings { authentication: auth.cloned(), ..CtlSettings::default() };
    Peers::new(&ctl).unwrap()
}

async fn serve(router: Router) -> SocketAddr {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(axum::serve(listener, router).into_future());
    address
}

/// An address at which nothing listens.
async fn nobody() -> SocketAddr {
    tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap()
}

fn member(api_url: &str) -> Member {
    serde_json::from_value(json!({"api_url": api_url, "state": "running", "role": "replica"}))
        .unwrap()
}

#[test]
fn a_patroni_primary_is_understood() {
    let status = PeerStatus::from_json(&json!({
        "state": "running", "role": "master", "server_version": 150_020,
        "xlog": {"location": 68_540_456_u64}, "timeline": 5, "dcs_last_seen": 1_795_385_397_u64,
        "tags": {"nofailover": true}, "database_system_identifier": "7711116309192622882",
        "patroni": {"version": "4.1.5", "scope": "demo", "name": "pg2"}
    }));
    assert_eq!(status.name.as_deref(), Some("pg2"));
    assert_eq!((status.server_version, status.dcs_last_seen), (Some(150_020), 1_795_385_397));
    let cluster = Identity { scope: "demo", system_identifier: Some("7711116309192622882") };
    let peer = status.of(&Asked { name: "pg2", cluster }).unwrap();
    assert!(peer.primary && peer.tags.nofailover() && peer.identified);
    assert_eq!((peer.position, peer.timeline), (Some(Lsn(68_540_456)), Timeline(5)));
}

#[test]
fn a_standbys_position_is_the_further_of_received_and_replayed() {
    for (xlog, position) in [
        (json!({"received_location": 7, "replayed_location": 5}), Some(Lsn(7))),
        (json!({"received_location": 0, "replayed_location": 5}), Some(Lsn(5))),
        (json!({"received_location": null, "replayed_location": 5}), Some(Lsn(5))),
        (json!({"received_location": u64::MAX}), Some(Lsn(u64::MAX))),
        (json!({"received_location": 0, "replayed_location": 0}), None),
        (json!(null), None),
    ] {
        let running = json!({"state": "running", "role": "replica", "xlog": xlog});
        let status = PeerStatus::from_json(&running);
        assert_eq!(status.position(), position, "{xlog}");
        assert!(!status.is_primary());
    }
}

/// A server that does not run has a position that nobody can know, and it is not 0.
#[test]
fn a_server_that_does_not_run_has_no_position() {
    for state in ["stopped", "starting", "crashed", "unknown", "creating replica", "restarting"] {
        let json = json!({"state": state, "role": "replica", "xlog": {"received_location": 7}});
        assert_eq!(PeerStatus::from_json(&json).position(), None, "{state}");
    }
}

#[test]
fn an_answer_counts_for_the_member_that_was_asked() {
    let cluster = Identity { scope: "demo", system_identifier: Some("71") };
    let says = |name, scope, system| {
        let json = json!({
            "state": "running", "role": "replica", "xlog": {"received_location": 7},
            "database_system_identifier": system, "patroni": {"scope": scope, "name": name}
        });
        let peer = PeerStatus::from_json(&json).of(&Asked { name: "b", cluster });
        peer.map(|peer| peer.identified)
    };
    let word = |word: &str| json!(word);
    assert_eq!(says(word("b"), word("demo"), word("71")), Some(true));
    assert_eq!(says(word("c"), word("demo"), word("71")), None, "another member");
    assert_eq!(says(word("b"), word("other"), word("71")), None, "another cluster's member");
    assert_eq!(says(word("b"), word("demo"), word("72")), None, "another cluster's data");
    // An answer that does not say who gives it may hold this node back, and proves nothing.
    assert_eq!(says(json!(null), word("demo"), word("71")), Some(false));
    assert_eq!(says(word("b"), json!(null), word("71")), Some(false));
    assert_eq!(says(word("b"), word("demo"), json!(null)), Some(false));
}

#[test]
fn a_member_that_would_not_lead_says_so() {
    for (json, stands_back) in [
        (json!({"watchdog_failed": true}), true),
        (json!({"stands_back": true}), true),
        (json!({"watchdog_failed": false}), false),
        (json!({"stands_back": "yes"}), false),
    ] {
        let cluster = Identity { scope: "demo", system_identifier: None };
        let peer = PeerStatus::from_json(&json).of(&Asked { name: "b", cluster }).unwrap();
        assert_eq!(peer.stands_back, stands_back, "{json}");
    }
}

#[test]
fn a_member_is_primary_by_its_position_or_by_its_word_while_it_may_run() {
    for (json, primary) in [
        (json!({"state": "running", "role": "primary"}), true),
        (json!({"state": "unknown", "role": "primary"}), true),
        (json!({"state": "stopped", "role": "primary"}), false),
        (json!({"state": "running", "role": "promoted"}), false),
        (json!({"state": "stopping", "role": "demoted", "xlog": {"location": 1}}), true),
        (json!("nonsense"), false),
        (json!({"state": 1, "role": [], "timeline": -1, "tags": 3, "xlog": "x"}), false),
    ] {
        assert_eq!(PeerStatus::from_json(&json).is_primary(), primary, "{json}");
    }
}

#[tokio::test]
async fn everybody_is_asked_and_silence_is_told_from_answers() {
    let status = || async { r#"{"state":"running","role":"replica","timeline":3}"# };
    let up = serve(Router::new().route("/patroni", get(status))).await;
    let silent = serve(Router::new().route("/patroni", get(std::future::pending::<&str>))).await;
    let wrong = serve(Router::new()).await;
    let members = BTreeMap::from([
        ("up".to_owned(), member(&format!("http://{up}/patroni"))),
        ("silent".to_owned(), member(&format!("http://{silent}/patroni"))),
        ("wrong".to_owned(), member(&format!("http://{wrong}/patroni"))),
        ("down".to_owned(), member(&format!("http://{}/patroni", nobody().await))),
        ("bad".to_owned(), member("nonsense")),
    ]);
    let cluster = Identity { scope: "demo", system_identifier: None };
    let answers = peers(None).ask_all(&members, cluster, Duration::from_millis(500)).await;
    assert_eq!(answers.len(), 5);
    let who: Vec<_> = answers.iter().filter(|(_, peer)| peer.is_some()).collect();
    assert_eq!(who.len(), 1);
    assert_eq!(answers["up"].as_ref().unwrap().timeline, Timeline(3));
}

#[tokio::test]
async fn failsafe_answers_carry_the_position_or_the_refusal() {
    let accept = || async { ([("lsn", "12345")], "Accepted") };
    let refuse = || async { (StatusCode::INTERNAL_SERVER_ERROR, "Running as a leader") };
    let yes = serve(Router::new().route("/failsafe", post(accept))).await;
    let no = serve(Router::new().route("/failsafe", post(refuse))).await;
    let client = peers(None);
    let body = json!({"name": "a"});
    let reply = client.post_failsafe(&format!("http://{yes}"), &body, SOON).await.unwrap();
    assert_eq!(reply, FailsafeReply::Accepted { lsn: Lsn(12345), promised: None });
    let reply = client.post_failsafe(&format!("http://{no}"), &body, SOON).await.unwrap();
    assert_eq!(reply, FailsafeReply::Refused(500));
}

#[tokio::test]
async fn posts_carry_the_password_and_only_forwarded_ones_the_mark() {
    let echo = |headers: HeaderMap| async move {
        let text = |name: &str| headers.get(name).and_then(|v| v.to_str().ok()).unwrap_or("-");
        format!("{} {}", text("authorization"), text(FORWARDED.as_str()))
    };
    let address = serve(Router::new().route("/x", post(echo))).await;
    let auth = BasicAuth { username: "u".to_owned(), password: "p".to_owned().into() };
    let url = format!("http://{address}/x");
    let client = peers(Some(&auth));
    let answer = client.post_json(&url, &json!({}), SOON).await.unwrap();
    assert_eq!(answer.text(), "Basic dTpw -");
    let answer = client.forward(&url, &json!({}), SOON).await.unwrap();
    assert_eq!(answer.text(), "Basic dTpw 1");
}

#[tokio::test]
async fn errors_tell_whether_anything_was_sent() {
    let client = peers(None);
    let down = format!("http://{}/patroni", nobody().await);
    assert!(matches!(client.get_status(&down, SOON).await, Err(PeerError::Connect(_))));
    for url in ["", "nonsense", "ftp://h/patroni", "/patroni"] {
        assert!(matches!(client.get_status(url, SOON).await, Err(PeerError::Address(_))), "{url}");
    }
    let text = serve(Router::new().route("/patroni", get(|| async { "hello" }))).await;
    let url = format!("http://{text}/patroni");
    assert!(matches!(client.get_status(&url, SOON).await, Err(PeerError::Nonsense(_))));
}

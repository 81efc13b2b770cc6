//! Health checks and everything else that is only looked at.

use super::*;

async fn check(view: NodeView, path: &str, status: u16) {
    let what = format!("{} {:?} {:?} {path}", view.name, view.role, view.state);
    let node = quiet(view);
    assert_eq!(node.get(path).await.status, status, "GET {what}");
    for method in ["HEAD", "OPTIONS"] {
        let reply = node.send(request(method, path, None)).await;
        assert_eq!((reply.status, reply.body.as_str()), (status, ""), "{method} {what}");
    }
}

#[tokio::test]
async fn the_leader_answers_to_all_of_its_names() {
    let leads = ["/", "/primary", "/master", "/read-write", "/leader", "/primary/", "/xmasterx"];
    let reads = ["/read-only", "/read-only-sync", "/read-only-quorum", "/health"];
    for path in leads.into_iter().chain(reads) {
        check(primary(), path, 200).await;
    }
    let standbys = ["/replica", "/sync", "/async", "/quorum", "/standby-leader", "/foo", "/patron"];
    for path in standbys {
        check(primary(), path, 503).await;
    }
}

#[tokio::test]
async fn a_standby_answers_to_its_own() {
    for path in ["/replica", "/read-only", "/async", "/asynchronous", "/health", "//replica"] {
        check(standby(), path, 200).await;
    }
    for path in ["/", "/primary", "/leader", "/sync", "/quorum", "/read-only-sync", "/read-write"] {
        check(standby(), path, 503).await;
    }
}

#[tokio::test]
async fn a_primary_that_is_dead_promoting_or_unproven_is_none() {
    let dead = NodeView { leads: false, state: MemberState::Crashed, ..primary() };
    let stopping = NodeView { leads: false, state: MemberState::Stopping, ..primary() };
    let promoting = NodeView { leads: false, role: MemberRole::Promoted, ..primary() };
    let unproven = NodeView { leads: false, holds_lock: false, ..primary() };
    // The agent is stuck and has not noticed: it is 100 s on the clock.
    let expired = NodeView { lease_until: Some(Moment::at_millis(100_000)), ..primary() };
    for view in [dead, stopping, promoting, unproven, expired] {
        for path in ["/", "/primary", "/leader", "/read-write", "/read-only", "/replica"] {
            check(view.clone(), path, 503).await;
        }
    }
}

#[tokio::test]
async fn a_standby_leader_is_a_leader_but_no_primary() {
    let view = || NodeView {
        leads: false,
        holds_lock: true,
        role: MemberRole::StandbyLeader,
        ..standby()
    };
    for path in ["/leader", "/standby-leader", "/standby_leader", "/read-only", "/health"] {
        check(view(), path, 200).await;
    }
    for path in ["/primary", "/", "/replica", "/read-write"] {
        check(view(), path, 503).await;
    }
}

#[tokio::test]
async fn synchronous_standbys_are_told_apart() {
    let with = |mode: &str| {
        let mode = format!(r#"{{"synchronous_mode":{mode}}}"#);
        within(standby(), |cluster| {
            cluster.config = config(&mode);
            cluster.sync = Some(SyncState::new("pg2", &["PG0".to_owned()]));
        })
    };
    for (mode, path, status) in [
        ("true", "/sync", 200),
        ("true", "/synchronous", 200),
        ("true", "/read-only-sync", 200),
        ("true", "/async", 503),
        ("true", "/quorum", 503),
        ("true", "/read-only-quorum", 503),
        ("\"quorum\"", "/quorum", 200),
        ("\"quorum\"", "/read-only-quorum", 200),
        ("\"quorum\"", "/sync", 503),
        ("\"quorum\"", "/async", 503),
        ("false", "/async", 200),
        ("false", "/sync", 503),
    ] {
        check(with(mode), path, status).await;
    }
    assert_eq!(quiet(with("true")).get("/patroni").await.json()["sync_standby"], json!(true));
    assert_eq!(quiet(with("\"quorum\"")).get("/x").await.json()["quorum_standby"], json!(true));
}

#[tokio::test]
async fn without_the_leaders_position_nobody_is_near_enough() {
    let mut cluster = (*standby().cluster).clone();
    cluster.status = None;
    let view =
        || NodeView { cluster: Arc::new(cluster.clone()), latest_end_lsn: None, ..standby() };
    check(view(), "/replica", 200).await;
    check(view(), "/replica?lag=100MB", 503).await;
    check(NodeView { latest_end_lsn: standby().latest_end_lsn, ..view() }, "/replica?lag=192", 200)
        .await;
}

#[tokio::test]
async fn lag_and_tags_narrow_the_choice() {
    let tagged = || NodeView {
        tags: tags(json!({"zone": "a", "clonefrom": true, "weight": 3})),
        ..standby()
    };
    for (path, status) in [
        ("/replica?lag=192", 200),
        ("/replica?lag=191", 503),
        ("/replica?lag=1kB", 200),
        ("/replica?lag=nonsense", 200),
        ("/replica?tag_zone=a&lag=1MB", 200),
        ("/replica?tag_zone=b", 503),
        ("/replica?tag_weight=3&tag_clonefrom=true", 200),
        ("/replica?tag_clonefrom=True", 503),
        ("/replica?tag_clonefrom=false", 503),
        ("/replica?tag_zone=a&tag_zone=b", 200),
        ("/replica?tag_zone=b&tag_zone=a", 503),
        ("/replica?tag_missing=", 200),
        ("/replica?lag=", 200),
        ("/read-only?lag=191", 503),
        ("/async?lag=191", 503),
        ("/async?lag=192&tag_zone=a", 200),
        ("/asynchronous?lag=191", 503),
        ("/health?lag=1", 200),
        ("/replica?tag_missing=x", 503),
        ("/async?tag_zone=b", 503),
        ("/health?tag_zone=b", 503),
    ] {
        check(tagged(), path, status).await;
    }
    check(NodeView { tags: tags(json!({"noloadbalance": true})), ..standby() }, "/replica", 503)
        .await;
    check(primary(), "/primary?tag_zone=b", 200).await;
}

#[tokio::test]
async fn a_standby_that_does_not_run_serves_nobody() {
    let view = || NodeView { state: MemberState::Starting, ..standby() };
    for path in ["/replica", "/read-only", "/async", "/health"] {
        check(view(), path, 503).await;
    }
}

#[tokio::test]
async fn readiness_is_for_the_leader_and_for_standbys_that_have_caught_up() {
    let get = async |view, path: &str| quiet(view).get(path).await.status;
    assert_eq!(get(primary(), "/readiness").await, 200);
    assert_eq!(get(standby(), "/readiness").await, 200);
    assert_eq!(get(standby(), "/readiness?lag=100").await, 503);
    assert_eq!(get(standby(), "/readiness?lag=100&mode=apply").await, 503);
    assert_eq!(get(standby(), "/readiness?lag=100&mode=write").await, 200);
    let allowing = |bytes: u32| {
        let allows = format!(r#"{{"maximum_lag_on_failover":{bytes}}}"#);
        within(standby(), |cluster| cluster.config = config(&allows))
    };
    assert_eq!(get(allowing(191), "/readiness").await, 503);
    assert_eq!(get(allowing(192), "/readiness").await, 200);
    assert_eq!(get(allowing(191), "/readiness?lag=192").await, 200);
    assert_eq!(get(allowing(191), "/readiness?lag=nonsense").await, 503);
    let behind = |view: NodeView| {
        let end = view.latest_end_lsn.map(|lsn| Lsn(lsn.0 + (1 << 20)));
        NodeView { latest_end_lsn: end, ..view }
    };
    let unconfigured = behind(within(standby(), |cluster| cluster.config = None));
    assert_eq!(get(unconfigured, "/readiness").await, 503, "Patroni's default counts");
    let archive = Some("in archive recovery".to_owned());
    let archive = NodeView { replication_state: archive, ..standby() };
    assert_eq!(get(archive, "/readiness").await, 503);
    let alone = NodeView { dcs_reachable: false, latest_end_lsn: None, ..standby() };
    assert_eq!(get(alone.clone(), "/readiness").await, 503);
    assert_eq!(get(NodeView { failsafe_active: true, ..alone }, "/readiness").await, 200);
    // Only GET has them; other methods are health checks of an unknown path.
    let node = quiet(primary());
    assert_eq!(node.send(request("HEAD", "/readiness", None)).await.status, 503);
}

#[tokio::test]
async fn liveness_fails_when_the_agent_is_stuck() {
    let get = async |view| quiet(view).get("/liveness").await.status;
    let stuck = |millis, view| NodeView { cycle_at: Moment::at_millis(millis), ..view };
    assert_eq!(get(stuck(60_001, primary())).await, 200);
    assert_eq!(get(stuck(59_999, primary())).await, 503);
    assert_eq!(get(stuck(59_999, standby())).await, 200);
    assert_eq!(get(stuck(29_999, standby())).await, 503);
    let paused =
        within(stuck(0, primary()), |cluster| cluster.config = config(r#"{"pause":true}"#));
    assert_eq!(get(paused).await, 200);
}

#[tokio::test]
async fn the_status_of_a_primary_is_patronis() {
    let view = NodeView { tags: tags(json!({"foo": "bar"})), ..primary() };
    let expected = concat!(
        r#"{"state":"running","postmaster_start_time":"2026-11-22 22:07:05.557757+00:00","#,
        r#""role":"primary","server_version":150020,"xlog":{"location":68540456},"timeline":5,"#,
        r#""replication":[{"usename":"replicator","application_name":"pg0","#,
        r#""client_addr":"127.0.0.1","state":"streaming","sync_state":"quorum","#,
        r#""sync_priority":1}],"dcs_last_seen":1795385397,"tags":{"foo":"bar"},"#,
        r#""database_system_identifier":"7711116309192622882","#,
        r#""patroni":{"version":"4.1.5","scope":"demo","name":"pg2"}}"#
    );
    let node = quiet(view);
    for path in ["/patroni", "/primary", "/replica", "/foo"] {
        let reply = node.get(path).await;
        assert_eq!(reply.body, expected, "{path}");
        assert_eq!(reply.headers[CONTENT_TYPE], "application/json");
    }
}

#[tokio::test]
async fn the_status_of_a_standby_is_patronis() {
    let expected = concat!(
        r#"{"state":"running","postmaster_start_time":"2026-11-22 22:07:05.557757+00:00","#,
        r#""role":"replica","server_version":150020,"xlog":{"received_location":68540456,"#,
        r#""replayed_location":68540264,"replayed_timestamp":"2026-11-22 22:08:34.711125+00:00","#,
        r#""paused":false},"timeline":5,"replication_state":"streaming","#,
        r#""dcs_last_seen":1795385397,"database_system_identifier":"7711116309192622882","#,
        r#""patroni":{"version":"4.1.5","scope":"demo","name":"pg0"}}"#
    );
    assert_eq!(quiet(standby()).get("/patroni").await.body, expected);
}

#[tokio::test]
async fn a_stopped_server_shows_no_position() {
    let view = within(NodeView { state: MemberState::Stopped, ..primary() }, |cluster| {
        cluster.leader = None;
        cluster.config = config(r#"{"pause":true}"#);
    });
    let view = NodeView {
        role: MemberRole::Demoted,
        failsafe_active: true,
        pending_restart: Some(json!({"max_connections": {"old_value": "5", "new_value": "6"}})),
        ..view
    };
    let expected = concat!(
        r#"{"state":"stopped","role":"demoted","cluster_unlocked":true,"#,
        r#""failsafe_mode_is_active":true,"dcs_last_seen":1795385397,"#,
        r#""database_system_identifier":"7711116309192622882","pending_restart":true,"#,
        r#""pending_restart_reason":{"max_connections":{"old_value":"5","new_value":"6"}},"#,
        r#""patroni":{"version":"4.1.5","scope":"demo","name":"pg2"},"pause":true}"#
    );
    let reply = quiet(view).get("/patroni").await;
    assert_eq!((reply.status, reply.body.as_str()), (200, expected));
}

#[tokio::test]
async fn a_server_that_does_not_answer_has_no_position() {
    let view = NodeView { xlog: XLog::default(), ..primary() };
    assert!(quiet(view).get("/patroni").await.json().get("xlog").is_none());
}

#[tokio::test]
async fn without_the_store_nobody_is_known_to_lead() {
    let node = quiet(NodeView { dcs_reachable: false, ..standby() });
    assert_eq!(node.get("/patroni").await.json()["cluster_unlocked"], json!(true));
    let line = r#"patroni_cluster_unlocked{scope="demo",name="pg0"} 1"#;
    assert!(node.get("/metrics").await.body.contains(line));
}

#[tokio::test]
async fn a_standby_clusters_leader_and_an_unfenced_one_are_shown() {
    let section = r#"{"standby_cluster":{"host":"far"},"pause":true}"#;
    let view = within(standby(), |cluster| {
        cluster.config = config(section);
        cluster.unfenced = Some(kornak_cluster::Unfenced {
            conn_url: None,
            member: "pg2".to_owned(),
            sysid: "1".to_owned(),
            timeline: Timeline(5),
        });
        let leader = cluster.members.get_mut("pg2").unwrap();
        leader.replication_state = Some("in archive recovery".to_owned());
        cluster.members.get_mut("pg0").unwrap().receive_lsn = Some(Lsn(0));
    });
    let shown = quiet(view).get("/cluster").await.json();
    let leader = &shown["members"][2];
    assert_eq!(leader["role"], "standby_leader");
    assert_eq!(leader["state"], "in archive recovery", "it follows as the others do");
    assert!(leader.get("lag").is_none());
    assert_eq!(shown["members"][0]["receive_lsn"], "unknown");
    assert_eq!(shown["unfenced"], "pg2");
}

#[tokio::test]
async fn the_cluster_is_shown_with_roles_and_lags() {
    let view = within(primary(), |cluster| {
        cluster.config = config(r#"{"synchronous_mode":"on","pause":true}"#);
        cluster.sync = Some(SyncState::new("pg2", &["pg0".to_owned()]));
        cluster.failover = FailoverRequest {
            leader: Some("pg2".to_owned()),
            member: None,
            scheduled_at: Some("2027-01-01T00:00:00+00:00".to_owned()),
        };
        let silent = cluster.members.get_mut("pg1").unwrap();
        silent.replay_lsn = None;
        silent.tags = tags(json!({"nosync": true}));
        silent.pending_restart = true;
    });
    let expected = concat!(
        r#"{"members":[{"name":"pg0","role":"sync_standby","state":"streaming","#,
        r#""api_url":"http://127.0.0.1:1/patroni","host":"127.0.0.1","port":25430,"timeline":5,"#,
        r#""receive_lag":0,"receive_lsn":"0/415D828","replay_lag":0,"replay_lsn":"0/415D828","#,
        r#""lag":0,"lsn":"0/415D828"},"#,
        r#"{"name":"pg1","role":"replica","state":"streaming","#,
        r#""api_url":"http://127.0.0.1:1/patroni","host":"127.0.0.1","port":25431,"timeline":5,"#,
        r#""tags":{"nosync":true},"pending_restart":true,"#,
        r#""receive_lag":456,"receive_lsn":"0/415D660","replay_lag":"unknown","#,
        r#""replay_lsn":"unknown","lag":456,"lsn":"0/415D660"},"#,
        r#"{"name":"pg2","role":"leader","state":"running","#,
        r#""api_url":"http://127.0.0.1:1/patroni","host":"127.0.0.1","port":25432,"timeline":5}],"#,
        r#""pause":true,"#,
        r#""scheduled_switchover":{"at":"2027-01-01T00:00:00+00:00","from":"pg2"},"scope":"demo"}"#
    );
    assert_eq!(quiet(view).get("/cluster").await.body, expected);
}

#[tokio::test]
async fn history_configuration_and_failsafe_members_are_shown() {
    let rows = r#"[[1,67553520,"no recovery target specified","2026-11-22T22:05:55.8+00:00","a"]]"#;
    let view = within(primary(), |cluster| {
        cluster.history = kornak_cluster::HistoryEntry::parse_list(rows);
    });
    let node = quiet(view);
    assert_eq!(node.get("/history").await.body, rows);
    assert_eq!(node.get("/config").await.body, r#"{"ttl":30,"failsafe_mode":true}"#);
    assert_eq!(node.get("/failsafe").await.body, r#"{"pg0":"http://h:1/patroni"}"#);
    let bare = within(primary(), |cluster| *cluster = ClusterState::default());
    let node = quiet(bare);
    assert_eq!(node.get("/history").await.body, "[]");
    assert_eq!(node.get("/config").await.status, 502);
    assert_eq!(node.get("/failsafe").await.status, 502);
    assert_eq!(node.get("/patroni").await.json()["cluster_unlocked"], json!(true));
}

#[tokio::test]
async fn an_operator_sees_what_the_agent_does_and_why() {
    let view = NodeView {
        action: Action::Clone { from: "pg1".to_owned() },
        why: Why::BusyWith(crate::ha::Job::Clone),
        ..primary()
    };
    let shown = quiet(view).get("/kornak/node").await.json();
    assert_eq!(shown["action"], "clone");
    assert_eq!((&shown["why"], &shown["job"]), (&json!("a step is under way"), &json!("clone")));
    assert_eq!(shown["lease_left_seconds"], 25.5);
    assert_eq!((&shown["cycles"], &shown["last_cycle_age_seconds"]), (&json!(42), &json!(1.0)));
    assert_eq!(shown["epoch"], json!({"store": 1, "revision": 10}));
}

#[tokio::test]
async fn metrics_have_patronis_names_and_labels() {
    let reply = quiet(standby()).get("/metrics").await;
    assert_eq!(reply.headers[CONTENT_TYPE], "text/plain; version=0.0.4");
    for line in [
        r#"patroni_version{scope="demo",name="pg0"} 040105"#,
        r#"patroni_replica{scope="demo",name="pg0"} 1"#,
        r#"patroni_primary{scope="demo",name="pg0"} 0"#,
        r#"patroni_xlog_replayed_location{scope="demo",name="pg0"} 68540264"#,
        r#"patroni_postgres_state{scope="demo",name="pg0"} 5"#,
    ] {
        assert!(reply.body.lines().any(|found| found == line), "{line} in {}", reply.body);
    }
}

/// Members compare by this answer how much they have when nobody leads.
#[tokio::test]
async fn where_a_member_stands_is_looked_at_for_each_question() {
    let old = NodeView { observed_at: Moment::at_millis(99_999), ..standby() };
    let (views, seen) = watch::channel(Arc::new(old.clone()));
    let (commands, mut queue) = mpsc::channel(COMMAND_QUEUE);
    let node = Node {
        router: router(Arc::new(Api::new(seen, commands, settings()))),
        _views: views.clone(),
    };
    let looks = tokio::spawn(async move {
        let command = queue.recv().await;
        assert!(matches!(command, Some(Command::Look)), "{command:?}");
        let xlog = XLog { received_location: Some(Lsn(68_999_999)), ..standby().xlog };
        views.send_replace(Arc::new(NodeView { xlog, ..standby() }));
        queue
    });
    assert_eq!(node.get("/replica").await.status, 200, "a health check waits for nobody");
    let said = node.get("/patroni").await.json();
    assert_eq!(said.pointer("/xlog/received_location"), Some(&json!(68_999_999)));

    // The next look does not come: nothing is said that could be taken for proof.
    let _queue = looks.await.unwrap();
    node._views.send_replace(Arc::new(old));
    let said = node.get("/patroni").await.json();
    assert_eq!(
        (&said["state"], said.get("xlog"), said.get("timeline")),
        (&json!("unknown"), None, None)
    );
    assert_eq!(said["role"], json!("replica"));
}

#[tokio::test]
async fn a_standby_that_has_not_read_its_own_log_tells_no_position() {
    let view = NodeView { wal_known: false, ..standby() };
    let said = quiet(view).get("/patroni").await.json();
    assert_eq!((&said["state"], said.get("xlog")), (&json!("running"), None));
}

//! Requests that change something: who may make them, how they are read, what is answered.

use std::sync::Mutex;

use super::*;

/// Answers every command with success and remembers it.
fn obedient(view: NodeView, settings: ApiSettings) -> (Node, Arc<Mutex<Vec<String>>>) {
    let log = Arc::new(Mutex::new(Vec::new()));
    let seen = Arc::clone(&log);
    let driver = move |command| {
        let (what, done) = describe(command);
        seen.lock().unwrap().push(what);
        done();
    };
    (node(view, settings, driver), log)
}

type Done = Box<dyn FnOnce()>;

fn say(answer: oneshot::Sender<crate::node::CommandResult>, text: &'static str) -> Done {
    Box::new(move || drop(answer.send(Ok(text.to_owned()))))
}

fn describe(command: Command) -> (String, Done) {
    match command {
        Command::Switchover { candidate, answer } => {
            (format!("switchover {candidate:?}"), say(answer, "Successfully switched over"))
        }
        Command::Failover { candidate, answer } => {
            (format!("failover {candidate}"), say(answer, "Successfully failed over"))
        }
        Command::Restart { timeout, answer } => {
            (format!("restart {timeout:?}"), say(answer, "restarted successfully"))
        }
        Command::Reload { answer } => ("reload".to_owned(), say(answer, "reloaded")),
        Command::Reinitialize { force, from_leader, answer } => {
            (format!("reinitialize {force} {from_leader}"), say(answer, "reinitialize started"))
        }
        Command::Configure { change, replace, answer } => {
            let what = format!("configure {} {replace}", Value::Object(change.clone()));
            (what, Box::new(move || drop(answer.send(Ok(change)))))
        }
        Command::Schedule { request, answer } => {
            let request = request.map(|request| json!(request).to_string());
            (format!("schedule {}", request.unwrap_or_default()), say(answer, "written"))
        }
        Command::Failsafe { leader, answer, .. } => {
            let accepted =
                FailsafeAnswer::Accepted { lsn: Lsn(77), promised: Duration::from_secs(30) };
            (format!("failsafe {leader}"), Box::new(move || answer.send(accepted).unwrap()))
        }
        Command::Look => ("look".to_owned(), Box::new(|| {})),
        Command::Checkpoint { answer } => ("checkpoint".to_owned(), say(answer, "done")),
    }
}

#[tokio::test]
async fn each_request_becomes_its_command() {
    let paused = || {
        within(standby(), |cluster| {
            cluster.failover.scheduled_at = Some("2027-01-01T00:00:00+00:00".to_owned());
        })
    };
    for (method, path, body, status, answer, command) in [
        ("POST", "/restart", "", 200, "restarted successfully", "restart None"),
        (
            "POST",
            "/restart",
            r#"{"timeout":"2min","role":"replica"}"#,
            200,
            "restarted successfully",
            "restart Some(120s)",
        ),
        ("POST", "/restart/now", "{}", 200, "restarted successfully", "restart None"),
        ("POST", "/reload", "", 202, "reload scheduled", "reload"),
        (
            "POST",
            "/reinitialize",
            r#"{"force":true}"#,
            200,
            "reinitialize started",
            "reinitialize true false",
        ),
        ("POST", "/reinitialize", "", 200, "reinitialize started", "reinitialize false false"),
        (
            "POST",
            "/reinitialize",
            r#"{"force":"on","from_leader":"True"}"#,
            200,
            "reinitialize started",
            "reinitialize true true",
        ),
        (
            "PATCH",
            "/config",
            r#"{"ttl":null}"#,
            200,
            r#"{"ttl":null}"#,
            r#"configure {"ttl":null} false"#,
        ),
        ("PUT", "/config", r#"{"ttl":20}"#, 200, r#"{"ttl":20}"#, r#"configure {"ttl":20} true"#),
        ("DELETE", "/switchover", "", 200, "scheduled switchover deleted", "schedule "),
        ("POST", "/failsafe", r#"{"name":"pg2"}"#, 200, "Accepted", "failsafe pg2"),
        ("POST", "/kornak/checkpoint", "", 200, "done", "checkpoint"),
    ] {
        let (node, log) = obedient(paused(), settings());
        let body = (!body.is_empty()).then(|| body.to_owned());
        let reply = node.send(request(method, path, body)).await;
        assert_eq!((reply.status, reply.body.as_str()), (status, answer), "{method} {path}");
        assert_eq!(*log.lock().unwrap(), [command], "{method} {path}");
    }
}

#[tokio::test]
async fn an_accepted_failsafe_request_tells_the_position() {
    let (node, _) = obedient(standby(), settings());
    let reply = node.post("/failsafe", &json!({"name": "pg2", "slots": {}})).await;
    assert_eq!(reply.headers["lsn"], "77");
    assert_eq!(reply.headers["x-kornak-promised-ms"], "30000");
    let asked = json!({"name": "pg2", "kornak": {"scope": "demo", "member": "pg0"}});
    let mistaken = json!({"name": "pg2", "kornak": {"scope": "demo", "member": "pg1"}});
    let of_another = json!({"name": "pg2", "kornak": {"scope": "other", "member": "pg0"}});
    for (body, status) in [(asked, 200), (mistaken, 421), (of_another, 421)] {
        assert_eq!(node.post("/failsafe", &body).await.status, status, "{body}");
    }
    let answers = [
        (FailsafeAnswer::Leading, 500),
        (FailsafeAnswer::Off, 502),
        (FailsafeAnswer::NotTheLeader, 403),
    ];
    for (answer, status) in answers {
        let node = super::node(standby(), settings(), move |command| {
            let Command::Failsafe { answer: to, .. } = command else { panic!("{command:?}") };
            to.send(answer).unwrap();
        });
        assert_eq!(node.post("/failsafe", &json!({"name": "pg2"})).await.status, status);
    }
}

async fn refused(view: NodeView, action: &str, body: Value, status: u16, text: &str) {
    let reply = quiet(view).post(&format!("/{action}"), &body).await;
    assert_eq!((reply.status, reply.body.as_str()), (status, text), "{action} {body}");
}

#[tokio::test]
async fn requests_that_make_no_sense_are_refused_in_patronis_words() {
    let target = json!({"leader": "pg2", "candidate": "pg2"});
    let at = |at: &str| json!({"leader": "pg2", "scheduled_at": at});
    let later = "2099-01-01T00:00Z";
    let scheduled = json!({"candidate": "pg0", "scheduled_at": later});
    for (action, body, status, text) in [
        (
            "switchover",
            json!({"candidate": "pg0"}),
            400,
            "Switchover could be performed only from a specific leader",
        ),
        (
            "failover",
            json!({"leader": "pg2"}),
            400,
            "Failover could be performed only to a specific candidate",
        ),
        ("failover", scheduled, 400, "Failover can't be scheduled"),
        ("switchover", target, 400, "Switchover target and source are the same"),
        (
            "switchover",
            at("2099-01-01T00:00:00"),
            400,
            "Timezone information is mandatory for the scheduled switchover",
        ),
        ("switchover", at("2001-01-01T00:00Z"), 422, "Cannot schedule switchover in the past"),
        (
            "switchover",
            at("soon"),
            422,
            "Unable to parse scheduled timestamp. It should be in an unambiguous format, e.g. ISO \
             8601",
        ),
    ] {
        refused(primary(), action, body, status, text).await;
    }
    let paused = || within(primary(), |cluster| cluster.config = config(r#"{"pause":true}"#));
    let text = "Can't schedule switchover in the paused state";
    refused(paused(), "switchover", at(later), 400, text).await;
    let text = "Switchover is possible only to a specific candidate in a paused state";
    refused(paused(), "switchover", json!({"leader": "pg2"}), 400, text).await;
}

#[tokio::test]
async fn what_the_cluster_does_not_allow_is_refused_in_patronis_words() {
    let from = |leader: &str| json!({"leader": leader});
    let to = |candidate: &str| json!({"leader": "pg2", "member": candidate});
    let with = |sync: &'static [&str]| {
        let standbys: Vec<String> = sync.iter().map(|&name| name.to_owned()).collect();
        within(primary(), move |cluster| {
            cluster.config = config(r#"{"synchronous_mode":true}"#);
            cluster.sync = Some(SyncState::new("pg2", &standbys));
        })
    };
    let text = "leader name does not match";
    refused(primary(), "switchover", from("pg9"), 412, text).await;
    let other = json!({"leader": "pg9", "candidate": "pg0"});
    refused(primary(), "failover", other, 412, text).await;
    refused(primary(), "switchover", to("pg9"), 412, "candidate does not exists").await;
    let text = "candidate name does not match with sync_standby";
    refused(with(&["pg0"]), "switchover", to("pg1"), 412, text).await;
    let text = "switchover is not possible: can not find sync_standby";
    refused(with(&[]), "switchover", from("pg2"), 412, text).await;
    let text = "switchover is not possible: no good candidates have been found";
    refused(primary(), "switchover", to("pg0"), 412, text).await;
    let none_synchronous = within(primary(), |cluster| {
        cluster.config = config(r#"{"synchronous_mode":true,"standby_cluster":{"port":1}}"#);
    });
    refused(none_synchronous, "switchover", to("pg0"), 412, text).await;
    let text = "failover is not possible: no good candidates have been found";
    refused(with(&["pg0"]), "failover", json!({"candidate": "pg1"}), 412, text).await;
    let away = || NodeView { dcs_reachable: false, ..primary() };
    let text = "switchover is not possible: the store does not answer";
    refused(away(), "switchover", to("pg0"), 412, text).await;
    let alone = within(primary(), |cluster| cluster.members.retain(|name, _| name == "pg2"));
    let text = "switchover is not possible: cluster does not have members except leader";
    refused(alone, "switchover", from("pg2"), 412, text).await;
}

#[tokio::test]
async fn a_scheduled_switchover_is_written_as_patroni_prints_times() {
    for (at, written) in [
        ("2099-01-01T02:00:00+02:00", "2099-01-01T02:00:00+02:00"),
        ("2099-01-01 00:00:00+00", "2099-01-01T00:00:00+00:00"),
        ("2099-01-01T00:00Z", "2099-01-01T00:00:00+00:00"),
        ("2099-01-01T00:00:00.5-0330", "2099-01-01T00:00:00.500000-03:30"),
    ] {
        let (node, log) = obedient(primary(), settings());
        let body = json!({"leader": "pg2", "candidate": "pg0", "scheduled_at": at});
        let reply = node.post("/switchover", &body).await;
        assert_eq!((reply.status, reply.body.as_str()), (202, "Switchover scheduled"), "{at}");
        let record = json!({"leader": "pg2", "member": "pg0", "scheduled_at": written});
        assert_eq!(*log.lock().unwrap(), [format!("schedule {record}")]);
    }
}

#[tokio::test]
async fn nothing_scheduled_is_nothing_to_delete() {
    let node = quiet(primary());
    let reply = node.send(request("DELETE", "/switchover", None)).await;
    assert_eq!((reply.status, reply.body.as_str()), (404, "no switchover is scheduled"));
    let reply = node.send(request("DELETE", "/restart", None)).await;
    assert_eq!((reply.status, reply.body.as_str()), (404, "no restarts are scheduled"));
}

#[tokio::test]
async fn a_restart_is_refused_or_planned_by_its_conditions() {
    let later = "2099-01-01T00:00:00+00:00";
    let node = quiet(standby());
    let unmet = "restart conditions are not satisfied";
    let timeout = "Timeout should be a positive number of seconds";
    for (body, status, said) in [
        (json!({"role": "primary"}), 503, unmet),
        (json!({"role": "standby_leader"}), 503, unmet),
        (json!({"postgres_version": "15.20"}), 503, unmet),
        (json!({"restart_pending": true}), 503, unmet),
        (json!({"restart_pending": "on", "role": "replica"}), 503, unmet),
        (
            json!({"role": "captain"}),
            400,
            "PostgreSQL role should be either primary, standby_leader, or replica",
        ),
        (
            json!({"postgres_version": "15"}),
            400,
            "Invalid PostgreSQL version format: X.Y or X.Y.Z is accepted: 15",
        ),
        (
            json!({"postgres_version": "9.6"}),
            400,
            "Invalid PostgreSQL version format: X.Y or X.Y.Z is accepted: 9.6",
        ),
        (json!({"postgres_version": "a.b"}), 400, "Invalid PostgreSQL version: a.b"),
        (json!({"timeout": -1}), 400, timeout),
        (json!({"timeout": "soon"}), 400, timeout),
        (json!({"timeout": "1ms"}), 400, timeout),
        (json!({"unknown": 1}), 400, "Unknown filter for the scheduled restart: unknown"),
        (json!({"schedule": "2001-01-01T00:00:00Z"}), 422, "Cannot schedule restart in the past"),
        (
            json!({"schedule": "2099-01-01T00:00:00"}),
            400,
            "Timezone information is mandatory for the scheduled restart",
        ),
        (
            json!({"schedule": later, "role": "replica", "timeout": "2min"}),
            202,
            "Restart scheduled",
        ),
        (json!({"schedule": later}), 409, "Another restart is already scheduled"),
    ] {
        let reply = node.post("/restart", &body).await;
        assert_eq!((reply.status, reply.body.as_str()), (status, said), "{body}");
    }
    let shown = node.get("/patroni").await.json();
    let plan = json!({"schedule": later, "role": "replica", "timeout": 120});
    assert_eq!(shown["scheduled_restart"], plan);
    let reply = node.send(request("DELETE", "/restart", None)).await;
    assert_eq!((reply.status, reply.body.as_str()), (200, "scheduled restart deleted"));
    assert!(node.get("/patroni").await.json().get("scheduled_restart").is_none());
    let paused = within(standby(), |cluster| cluster.config = config(r#"{"pause":true}"#));
    let reply = quiet(paused).post("/restart", &json!({"schedule": later, "role": "?"})).await;
    let text = "Can't schedule restart in the paused state";
    assert_eq!((reply.status, reply.body.as_str()), (500, text));
    let (node, log) = obedient(standby(), settings());
    let older = json!({"postgres_version": "15.21"});
    assert_eq!(node.post("/restart", &older).await.status, 200);
    assert_eq!(*log.lock().unwrap(), ["restart None"]);
}

#[tokio::test]
async fn a_leader_is_not_reinitialized() {
    let reply = quiet(primary()).post("/reinitialize", &json!({})).await;
    assert_eq!(reply.body, "I am the leader, can not reinitialize");
    let leaderless = within(standby(), |cluster| cluster.leader = None);
    let reply = quiet(leaderless).post("/reinitialize", &json!({})).await;
    let text = "Cluster has no leader, can not reinitialize";
    assert_eq!((reply.status, reply.body.as_str()), (503, text));
}

#[tokio::test]
async fn failures_of_the_driver_become_statuses() {
    let refuse = |command| match command {
        Command::Switchover { answer, .. } => {
            let why = CommandError::NotPossible("candidate is behind".to_owned());
            answer.send(Err(why)).unwrap();
        }
        Command::Failover { answer, .. } => drop(answer),
        Command::Restart { answer, .. } => {
            answer.send(Err(CommandError::Failed("restart failed".to_owned()))).unwrap();
        }
        Command::Configure { answer, replace: true, .. } => {
            answer.send(Err(ConfigureError::Store("timeout".to_owned()))).unwrap();
        }
        Command::Configure { answer, .. } => answer.send(Err(ConfigureError::Conflict)).unwrap(),
        other => panic!("{other:?}"),
    };
    // This node is the candidate itself, so nobody has to be asked.
    let view = within(standby(), |cluster| cluster.leader = None);
    let node = node(view, settings(), refuse);
    let reply = node.post("/failover", &json!({"candidate": "pg0"})).await;
    assert_eq!((reply.status, reply.body.as_str()), (503, "Failover status unknown"));
    let reply = node.post("/restart", &json!({})).await;
    assert_eq!((reply.status, reply.body.as_str()), (503, "restart failed"));
    let body = r#"{"ttl":20}"#;
    let send = async |method| node.send(request(method, "/config", Some(body.to_owned()))).await;
    assert_eq!(send("PATCH").await.status, 409);
    assert_eq!(send("PUT").await.status, 502);
}

#[tokio::test]
async fn bodies_that_make_no_sense_are_refused() {
    let node = quiet(primary());
    let patch = |body: &str| request("PATCH", "/config", Some(body.to_owned()));
    for body in ["", "nonsense", "[1]", "1", "{\"a\":", "{}"] {
        assert_eq!(node.send(patch(body)).await.status, 400, "{body:?}");
    }
    // An empty configuration would take everything away.
    assert_eq!(node.send(request("PUT", "/config", Some("{}".to_owned()))).await.status, 400);
    for path in ["/switchover", "/failover", "/failsafe", "/citus", "/mpp"] {
        assert_eq!(node.post(path, &json!({})).await.status, 400, "{path}");
    }
    assert_eq!(node.send(request("PATCH", "/config", None)).await.status, 411);
    let huge = format!("{{\"a\":\"{}\"}}", "x".repeat(BODY_LIMIT));
    assert_eq!(node.send(patch(&huge)).await.status, 413);
    for (method, path) in [("POST", "/nothing"), ("PUT", "/restart"), ("POST", "/kornak/node")] {
        assert_eq!(node.send(request(method, path, None)).await.status, 501, "{method} {path}");
    }
}

#[tokio::test]
async fn only_who_knows_the_password_may_change_something() {
    let auth = BasicAuth { username: "admin".to_owned(), password: "secret".to_owned().into() };
    let settings = ApiSettings { authentication: Some(auth), ..settings() };
    let (node, log) = obedient(standby(), settings);
    let send = async |header: Option<&str>| {
        let mut request = request("POST", "/reload", None);
        if let Some(header) = header {
            request.headers_mut().insert("authorization", header.parse().unwrap());
        }
        node.send(request).await
    };
    let reply = send(None).await;
    assert_eq!((reply.status, reply.body.as_str()), (401, "no auth header received"));
    assert!(reply.headers[WWW_AUTHENTICATE].to_str().unwrap().starts_with("Basic realm="));
    for wrong in ["Basic YWRtaW46c2VjcmV", "Basic", "", "Bearer YWRtaW46c2VjcmV0"] {
        let reply = send(Some(wrong)).await;
        assert_eq!((reply.status, reply.body.as_str()), (401, "not authenticated"), "{wrong}");
    }
    assert!(log.lock().unwrap().is_empty());
    assert_eq!(send(Some("Basic YWRtaW46c2VjcmV0")).await.status, 202);
    assert_eq!(node.get("/patroni").await.status, 200);
}

#[tokio::test]
async fn only_listed_addresses_may_change_something() {
    let from = |address: &str, path: &str| {
        let mut request = request("POST", path, Some(r#"{"name":"x"}"#.to_owned()));
        request
            .extensions_mut()
            .insert(Client { address: address.parse().unwrap(), certified: false });
        request
    };
    let listed = ApiSettings { allowlist: vec!["10.1.0.0/16".to_owned()], ..settings() };
    let (node, _) = obedient(standby(), listed.clone());
    assert_eq!(node.send(from("10.1.2.3", "/reload")).await.status, 202);
    assert_eq!(node.send(from("::ffff:10.1.2.3", "/reload")).await.status, 202);
    let reply = node.send(from("127.0.0.1", "/reload")).await;
    assert_eq!((reply.status, reply.body.as_str()), (403, "Access is denied"));
    // Without an address there is nothing that could be on the list.
    assert_eq!(node.send(request("POST", "/reload", None)).await.status, 403);
    // The members of the fabricated cluster are all at 127.0.0.1.
    let (node, _) = obedient(standby(), ApiSettings { allowlist_include_members: true, ..listed });
    assert_eq!(node.send(from("127.0.0.1", "/reload")).await.status, 202);
    assert_eq!(node.send(from("127.0.0.1", "/failsafe")).await.status, 403);
    assert_eq!(node.send(from("127.0.0.2", "/reload")).await.status, 403);
    // A Citus cluster's coordinator lets the workers' members in: they tell it of their switchovers.
    let desk = Arc::new(crate::citus::Desk::new(&[]));
    desk.hosts.send_replace(["127.0.0.2".to_owned()].into());
    for (group, status) in [(0, 202), (1, 403)] {
        let scope = Scope::new("service", "demo", Some(GroupId(group)));
        let citus = Some(Arc::clone(&desk));
        let settings = ApiSettings { allowlist_include_members: true, citus, ..settings() };
        let (node, _) = obedient(NodeView { scope, ..standby() }, settings);
        assert_eq!(node.send(from("127.0.0.2", "/reload")).await.status, status, "{group}");
    }
}

#[tokio::test]
async fn extra_headers_are_on_every_answer() {
    let header = ("x-frame-options".parse().unwrap(), "DENY".parse().unwrap());
    let (node, _) = obedient(standby(), ApiSettings { extra_headers: vec![header], ..settings() });
    assert_eq!(node.get("/replica").await.headers["x-frame-options"], "DENY");
    assert_eq!(node.get("/metrics").await.headers["x-frame-options"], "DENY");
}

//! A holder of the key serves or gives it up: every state that a holder can be in, with every outcome
//! of every step, followed until it serves or has released.

use super::*;

/// Everything below ends within this: a start that takes too long twice, and what lies between.
const BOUND: Duration = Duration::from_secs(700);

const STEP: Duration = Duration::from_secs(10);

fn servers() -> Vec<Server> {
    let since = now();
    vec![
        Server::Stopped,
        Server::Leftovers,
        Server::Starting { since },
        Server::Silent { since },
        Server::Stopping { since },
        Server::Closed { since },
        Server::Standby(standby_facts()),
        Server::Primary(primary_facts()),
    ]
}

fn directories() -> Vec<DataDir> {
    let stopped = |was_primary| {
        let DataDir::Initialized(control) = control(was_primary) else { panic!("a control file") };
        DataDir::Initialized(Control { clean: true, ..control })
    };
    let DataDir::Initialized(copied) = control(true) else { panic!("a control file") };
    let foreign = Control { system_identifier: "42".to_owned(), ..copied.clone() };
    let begun = |filling| DataDir::Begun { control: copied.clone(), filling };
    vec![
        DataDir::Empty,
        begun(false),
        begun(true),
        DataDir::Foreign { reason: "run pg_controldata: no such file".to_owned() },
        control(true),
        control(false),
        stopped(true),
        stopped(false),
        DataDir::Initialized(Control { standby_signal: true, ..copied.clone() }),
        DataDir::Initialized(foreign),
    ]
}

/// The server accepts writes, or lets in everybody but the agent.
fn serves(s: &Snapshot) -> bool {
    match &s.server {
        Server::Primary(_) => decide(s).action == Action::Lead,
        Server::Closed { .. } => {
            let data = match &s.data {
                DataDir::Initialized(control) | DataDir::Begun { control, filling: true } => {
                    Some(control)
                }
                _ => None,
            };
            data.is_some_and(Control::is_primarys) && s.cluster.initialize.as_deref() == Some(SYSID)
        }
        _ => false,
    }
}

/// The states that may follow a step.
fn outcomes(s: &Snapshot) -> Option<Vec<Snapshot>> {
    let later = |s: &Snapshot| {
        let now = s.now + STEP;
        // The keeper goes on proving the lease.
        let lease = Lease::Mine { epoch: EPOCH, until: now + seconds(25) };
        Snapshot { now, lease, ..s.clone() }
    };
    let next = later(s);
    let since = next.now;
    let failed =
        Snapshot { server: Server::Stopped, failed_starts: s.failed_starts + 1, ..next.clone() };
    match decide(s).action {
        // The job behind it releases the key.
        Action::Release | Action::Demote { immediate: true } => None,
        // The server ends; the key may stay.
        Action::Demote { immediate: false } | Action::DemoteCluster => {
            let server = Server::Stopped;
            (decide(s).why == Why::StillStopping).then(|| vec![Snapshot { server, ..next }])
        }
        // It gives the key up itself if the server does not come up.
        Action::StartPrimary => {
            let server = Server::Primary(primary_facts());
            Some(vec![Snapshot { server, data: control(true), ..next }])
        }
        Action::Rejoin { leader: None } => Some(vec![
            failed,
            Snapshot { server: Server::Starting { since }, ..next.clone() },
            Snapshot { server: Server::Silent { since }, ..next.clone() },
            Snapshot { server: Server::Closed { since }, ..next.clone() },
            Snapshot { server: Server::Standby(standby_facts()), ..next },
        ]),
        Action::Promote => Some(vec![
            Snapshot { server: Server::Primary(primary_facts()), ..next.clone() },
            Snapshot { race_not_before: Some(since + seconds(60)), ..next.clone() },
            Snapshot { server: Server::Stopped, ..failed },
        ]),
        Action::Wait | Action::Look => Some(vec![next]),
        action => panic!("{action:?} by the holder of the key in {s:?}"),
    }
}

fn follow_up(s: &Snapshot, start: &str) {
    let mut open = vec![s.clone()];
    while let Some(s) = open.pop() {
        if serves(&s) {
            continue;
        }
        let waited = s.now.since(now());
        let Decision { action, why, .. } = decide(&s);
        assert!(
            waited <= BOUND,
            "{start}: neither serves nor releases: {action:?}, {why:?}, {s:?}"
        );
        open.extend(outcomes(&s).unwrap_or_default());
    }
}

#[test]
fn whoever_holds_the_key_serves_or_gives_it_up() {
    let mut states = 0;
    for synchronous_mode in [false, true] {
        let cluster = with(led_by(Some("a")), |c| {
            if synchronous_mode {
                synchronous(c, "a", &["b"]);
            }
        });
        for server in servers() {
            for data in directories() {
                for store in [Store::Live, Store::Lost { since: now() }] {
                    for failed_starts in [0, 1, 9] {
                        for left in [25, 0] {
                            let start = format!("{server:?}, {data:?}, {store:?}, {failed_starts}");
                            let s = Snapshot {
                                cluster: Arc::clone(&cluster),
                                server: server.clone(),
                                data: data.clone(),
                                lease: mine(left),
                                store,
                                failed_starts,
                                ..primary()
                            };
                            follow_up(&s, &start);
                            states += 1;
                        }
                    }
                }
            }
        }
    }
    assert_eq!(states, 2 * 8 * 10 * 2 * 3 * 2);
}

#[test]
fn a_leader_whose_disk_is_gone_gives_the_key_up_at_once() {
    let data = DataDir::Foreign { reason: "pg_control: permission denied".into() };
    let s = Snapshot { data, ..crashed_leader() };
    check(&s, Action::Release, Why::DataDirUnusable);
    let left = Snapshot { server: Server::Leftovers, ..s.clone() };
    check(&left, STOP_NOW, Why::ProcessesLeft);
    let silent = |ago| Server::Silent { since: now().minus(seconds(ago)) };
    check(&Snapshot { server: silent(29), ..s.clone() }, Action::Wait, Why::ServerSilent);
    check(&Snapshot { server: silent(30), ..s.clone() }, STOP_NOW, Why::DataDirUnusable);
    check(&Snapshot { lease: Lease::None, ..s }, Action::Refuse, Why::DataDirUnusable);
}

#[test]
fn a_leader_that_serves_goes_on_whatever_the_store_says_of_its_identity() {
    let cluster = with(led_by(Some("a")), |c| c.initialize = Some("42".into()));
    let s = Snapshot { cluster, ..primary() };
    check(&s, Action::Lead, Why::WrongSystemIdentifier);
    let late = Snapshot { lease: mine(1), ..s.clone() };
    check(&late, Action::Demote { immediate: false }, Why::LeaseUnproven);
    check(
        &Snapshot { server: Server::Stopped, ..s.clone() },
        Action::Release,
        Why::WrongSystemIdentifier,
    );
    // Without the key it is another cluster's primary, and none of our business.
    check(&Snapshot { lease: Lease::None, ..s }, Action::Refuse, Why::WrongSystemIdentifier);
}

#[test]
fn a_silent_leader_is_replaced_only_by_somebody_who_can_lead() {
    let silent =
        |ago| Snapshot { server: Server::Silent { since: now().minus(seconds(ago)) }, ..primary() };
    check(&silent(29), Action::Wait, Why::ServerSilent);
    check(&silent(30), STOP_NOW, Why::SilentTooLong);
    let alone = with(led_by(Some("a")), |c| c.members.retain(|name, _| name == "a"));
    check(&Snapshot { cluster: alone, ..silent(3000) }, Action::Wait, Why::ServerSilent);
    let patient = with(led_by(Some("a")), |c| c.config = Some(config(json!({"ttl": 120}))));
    check(&Snapshot { cluster: patient, ..silent(119) }, Action::Wait, Why::ServerSilent);
    let paused = with(led_by(Some("a")), |c| c.config = Some(config(json!({"pause": true}))));
    check(&Snapshot { cluster: paused, ..silent(3000) }, Action::Wait, Why::ServerSilent);
}

#[test]
fn a_leader_that_starts_has_the_time_that_was_set() {
    let starts = |ago| Snapshot {
        server: Server::Starting { since: now().minus(seconds(ago)) },
        ..primary()
    };
    check(&starts(299), Action::Wait, Why::ServerStarting);
    check(&starts(300), STOP_NOW, Why::StartsTooLong);
    let alone = with(led_by(Some("a")), |c| c.members.retain(|name, _| name == "a"));
    check(&Snapshot { cluster: alone, ..starts(3000) }, Action::Wait, Why::ServerStarting);
}

#[test]
fn a_winner_whose_server_does_not_come_up_gives_the_key_up() {
    let s = Snapshot { server: Server::Stopped, failed_starts: 1, ..winner() };
    check(&s, rejoin(None), Why::KeyIsOursServerIsDown);
    check(&Snapshot { failed_starts: 2, ..s }, Action::Release, Why::DoesNotStart);
    let crashed = Snapshot { failed_starts: 2, ..crashed_leader() };
    check(&crashed, Action::Release, Why::DoesNotStart);
    let alone = with(led_by(Some("a")), |c| c.members.retain(|name, _| name == "a"));
    check(
        &Snapshot { cluster: alone, ..crashed },
        Action::StartPrimary,
        Why::KeyIsOursServerIsDown,
    );
}

#[test]
fn a_server_that_lets_the_agent_not_in_is_left_alone_while_it_may_serve() {
    let since = now().minus(seconds(3000));
    let s = Snapshot { server: Server::Closed { since }, ..primary() };
    check(&s, Action::Wait, Why::ServerClosed);
    check(&Snapshot { data: control(false), ..s }, STOP_NOW, Why::SilentTooLong);
}

#[test]
fn an_answer_that_is_missing_says_nothing_of_a_server_that_starts_as_a_standby() {
    // Its control file is a copy of the primary's: "in production".
    let DataDir::Initialized(copied) = control(true) else { panic!("a control file") };
    let data = DataDir::Initialized(Control { standby_signal: true, ..copied });
    for server in [Server::Silent { since: now() }, Server::Closed { since: now() }] {
        let s = Snapshot { server: server.clone(), data: data.clone(), ..standby() };
        let Decision { action, .. } = decide(&s);
        assert_eq!(action, Action::Wait, "{server:?}");
        let primary = Snapshot { data: control(true), ..s };
        check(&primary, STOP_NOW, Why::OtherLeads);
    }
}

#[test]
fn what_a_clean_shutdown_leaves_behind_is_ended() {
    let DataDir::Initialized(stopped) = control(true) else { panic!("a control file") };
    let data = DataDir::Initialized(Control { clean: true, ..stopped });
    let server = Server::Stopping { since: now() };
    let s = Snapshot { server, data, ..standby() };
    check(&s, Action::Demote { immediate: false }, Why::StillStopping);
    let paused = |leader| with(led_by(leader), |c| c.config = Some(config(json!({"pause": true}))));
    let operators = Snapshot { cluster: paused(Some("a")), lease: mine(25), ..s.clone() };
    check(&operators, Action::Wait, Why::ServerSilent);
    let handed_over = Snapshot { cluster: paused(Some("b")), ..s.clone() };
    check(&handed_over, Action::Demote { immediate: false }, Why::StillStopping);
    let writes = Snapshot { data: control(true), ..s };
    check(&writes, STOP_NOW, Why::OtherLeads);
}

#[test]
fn a_standby_that_ended_is_started_whoever_leads() {
    let down = |cluster: ClusterState| Snapshot {
        cluster: Arc::new(cluster),
        server: Server::Stopped,
        ..standby()
    };
    check(&down(led_by(Some("b"))), rejoin(Some("b")), Why::ServerDown);
    check(&down(led_by(Some("a"))), rejoin(None), Why::ServerDown);
    check(&down(led_by(None)), rejoin(None), Why::WaitingForLeader);
}

#[test]
fn a_leader_that_does_not_see_the_store_change_does_not_keep_the_key_for_ever() {
    let lost = |ago| Store::Lost { since: now().minus(seconds(ago)) };
    let s = |ago| Snapshot { store: lost(ago), ..crashed_leader() };
    check(&s(29), Action::StartPrimary, Why::KeyIsOursServerIsDown);
    check(&s(30), Action::Release, Why::StoreLost);
    check(&Snapshot { lease: mine(1), ..s(30) }, rejoin(None), Why::ServerDown);
    // Failsafe mode: the members have moved its deadline, and nobody of them races.
    let confirmed = Snapshot { confirmed: true, ..s(300) };
    check(&confirmed, Action::StartPrimary, Why::KeyIsOursServerIsDown);
    let standby = Snapshot { store: lost(30), ..winner() };
    check(&standby, Action::Release, Why::StoreLost);
}

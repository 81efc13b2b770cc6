use kornak_cluster::Revision;

use super::*;
use crate::citus::plan::Group;
use crate::citus::seen::Leader;

fn at(host: &str) -> Address {
    Address { host: host.to_owned(), port: 5432 }
}

fn ms(millis: u64) -> Moment {
    Moment::at_millis(millis)
}

/// The facts of one test: a coordinator `c`, group 1 with primary `a` (row 4) and standby `b` (row
/// 5).
struct World {
    now: Moment,
    leads: bool,
    rows: Option<Vec<Row>>,
    read_at: Moment,
    behind_since: Option<Moment>,
    seen: Seen,
    flight: Flight,
    requests: Vec<Request>,
    hopeless: BTreeSet<Address>,
    not_before: Moment,
}

fn row(node: i32, group: u32, host: &str, role: Role) -> Row {
    Row { node, group: GroupId(group), address: at(host), role, synced: true }
}

fn leader(name: &str) -> Leader {
    Leader { name: name.to_owned(), address: Some(at(name)), api: None, kornak: true }
}

fn world() -> World {
    let mut seen = Seen { revision: Revision(100), ..Seen::default() };
    let secondaries = BTreeSet::from([at("b")]);
    seen.wanted.insert(GroupId(0), Group { primary: Some(at("c")), ..Group::default() });
    seen.wanted
        .insert(GroupId(1), Group { primary: Some(at("a")), secondaries, ..Group::default() });
    seen.leaders.insert(GroupId(0), leader("c"));
    seen.leaders.insert(GroupId(1), leader("a"));
    World {
        now: ms(10_000),
        leads: true,
        rows: Some(vec![
            row(1, 0, "c", Role::Primary),
            row(4, 1, "a", Role::Primary),
            row(5, 1, "b", Role::Secondary),
        ]),
        read_at: ms(10_000),
        behind_since: None,
        seen,
        flight: Flight::Grounded,
        requests: Vec::new(),
        hopeless: BTreeSet::new(),
        not_before: ms(0),
    }
}

impl World {
    fn asked(mut self, event: Event, leader: &str) -> Self {
        self.requests.push(Request {
            event,
            group: GroupId(1),
            leader: leader.to_owned(),
            received: ms(10_000),
            timeout: Duration::from_secs(30),
            cooldown: Duration::from_secs(10),
            hold: Some(Duration::from_millis(800)),
            record: Revision(90),
        });
        self
    }

    fn of_patroni(mut self) -> Self {
        for request in &mut self.requests {
            (request.hold, request.record) = (None, Revision::NONE);
        }
        self
    }

    /// The rename has been done for group 1.
    fn renamed(mut self, record: u64) -> Self {
        let flight = Flight::Open {
            group: GroupId(1),
            former: at("a"),
            until: ms(40_000),
            record: Revision(record),
        };
        self.flight = flight;
        if let Some(row) = self.rows.iter_mut().flatten().find(|row| row.node == 4) {
            row.address = at("a-demoted");
        }
        self
    }

    /// The store says that this member leads group 1, and that it is primary if it says so.
    fn led_by(mut self, name: &str, says_primary: bool) -> Self {
        self.seen.leaders.insert(GroupId(1), leader(name));
        self.seen.wanted.entry(GroupId(1)).or_default().primary = says_primary.then(|| at(name));
        self
    }

    fn leaderless(mut self) -> Self {
        self.seen.leaders.remove(&GroupId(1));
        self.seen.wanted.entry(GroupId(1)).or_default().primary = None;
        self
    }

    fn switching(mut self) -> Self {
        let text = r#"{"v":1,"id":"h","attempt":1,"phase":"switch","group":1,"leader":"a","epoch":{"store":1,"revision":2},"max_hold_ms":1000,"switch_hold_ms":5000}"#;
        self.seen.handover = serde_json::from_str(text).ok();
        self
    }

    fn at(mut self, millis: u64) -> Self {
        self.now = ms(millis);
        self
    }

    fn next(&self) -> Next {
        next(&Facts {
            now: self.now,
            leads: self.leads,
            rows: self.rows.as_deref(),
            read_at: self.read_at,
            behind_since: self.behind_since,
            seen: &self.seen,
            flight: &self.flight,
            requests: &self.requests,
            hopeless: &self.hopeless,
            not_before: self.not_before,
        })
    }
}

fn check(world: &World, expected: &Next) {
    assert_eq!(world.next(), *expected);
}

fn moved(steps: &[(i32, &str)]) -> Vec<Step> {
    steps.iter().map(|(node, host)| Step::Update { node: *node, to: at(host) }).collect()
}

fn commit(steps: &[(i32, &str)], request: Option<usize>) -> Next {
    Next::Commit { steps: moved(steps), request }
}

fn answer(answer: Answer) -> Next {
    Next::Answer { request: 0, answer }
}

#[test]
fn what_agrees_rests_until_the_rows_are_read_again() {
    check(&world(), &Next::Rest { until: ms(15_000) });
    check(&world().at(15_000), &Next::Load);
    check(&World { rows: None, ..world() }, &Next::Load);
}

#[test]
fn before_a_switchover_the_row_is_renamed_and_the_transaction_stays_open() {
    let step = Step::Update { node: 4, to: at("a-demoted") };
    let open = Next::Open { request: 0, step, former: at("a") };
    check(&world().asked(Event::BeforeDemote, "a"), &open);
    check(&world().asked(Event::BeforeDemote, "a").of_patroni(), &open);
    // Until the new primary says that it is there, nothing is done, whatever else is to be done.
    check(&world().switching().renamed(90), &Next::Rest { until: ms(40_000) });
    check(&world().switching().renamed(90).leaderless(), &Next::Rest { until: ms(40_000) });
    check(&world().switching().renamed(90).led_by("b", false), &Next::Rest { until: ms(40_000) });
}

#[test]
fn the_new_primarys_word_ends_the_transaction() {
    let new = world().switching().renamed(90).led_by("b", false).asked(Event::AfterPromote, "b");
    check(&new, &commit(&[(5, "a"), (4, "b")], Some(0)));
    let patroni =
        world().renamed(0).led_by("b", false).asked(Event::AfterPromote, "b").of_patroni();
    check(&patroni, &commit(&[(5, "a"), (4, "b")], Some(0)));
}

#[test]
fn a_switchover_that_came_to_nothing_gives_the_old_address_back() {
    let back = world().renamed(90).asked(Event::AfterPromote, "a");
    check(&back, &commit(&[(4, "a")], Some(0)));
}

#[test]
fn a_lost_notification_is_made_up_for_by_the_store() {
    check(&world().switching().renamed(90).led_by("b", true), &commit(&[(5, "a"), (4, "b")], None));
    check(&world().renamed(0).led_by("b", true), &commit(&[(5, "a"), (4, "b")], None));
    // The record is gone and the old leader leads: it went back.
    check(&world().renamed(90), &commit(&[(4, "a")], None));
    // The store has not shown the record yet.
    check(&world().renamed(101), &Next::Rest { until: ms(40_000) });
    // A Patroni leader writes no record: its own word, another leader, or the deadline.
    check(&world().renamed(0), &Next::Rest { until: ms(40_000) });
}

#[test]
fn a_transaction_that_nobody_ends_is_rolled_back_at_its_deadline() {
    check(&world().renamed(0).at(40_000), &Next::Rollback);
    check(&world().renamed(90).leaderless().at(40_000), &Next::Rollback);
    let other = world().renamed(0).leaderless().led_by("b", true).at(40_000);
    check(&other, &commit(&[(5, "a"), (4, "b")], None));
}

#[test]
fn while_one_groups_transaction_is_open_others_wait_or_are_refused() {
    let mut busy = world().renamed(0).asked(Event::BeforeDemote, "x");
    busy.requests[0].group = GroupId(2);
    check(&busy, &answer(Answer::Busy));
    busy.requests[0].hold = None;
    check(&busy, &Next::Rest { until: ms(40_000) });
    check(&world().renamed(0).asked(Event::BeforeDemote, "a"), &answer(Answer::Done));
    check(&world().renamed(0).asked(Event::BeforePromote, "b"), &answer(Answer::Done));
}

#[test]
fn after_a_failover_nobody_announced_the_row_follows_the_leader_key() {
    check(&world().led_by("b", true), &commit(&[(4, "a-demoted"), (5, "a"), (4, "b")], None));
    // Somebody has the key and is not primary yet: the row stays.
    check(&world().led_by("b", false), &Next::Rest { until: ms(15_000) });
    let told = world().led_by("b", false).asked(Event::AfterPromote, "b");
    check(&told, &commit(&[(4, "a-demoted"), (5, "a"), (4, "b")], Some(0)));
}

#[test]
fn who_is_not_the_leader_by_the_store_is_waited_for_and_then_ignored() {
    let early = world().asked(Event::AfterPromote, "b");
    check(&early, &Next::Rest { until: ms(12_000) });
    check(&early.at(12_000), &answer(Answer::Late));
    let stranger = world().asked(Event::BeforeDemote, "b");
    check(&stranger, &Next::Rest { until: ms(10_800) });
    check(&stranger.at(10_800), &answer(Answer::Late));
}

#[test]
fn who_says_what_is_known_is_told_so() {
    check(&world().asked(Event::AfterPromote, "a"), &answer(Answer::Done));
    check(&world().asked(Event::BeforePromote, "a"), &answer(Answer::Done));
    let mut unregistered = world().asked(Event::BeforeDemote, "a");
    unregistered.rows = Some(vec![row(1, 0, "c", Role::Primary)]);
    check(&unregistered, &answer(Answer::Done));
}

#[test]
fn rows_are_added_only_when_every_node_has_the_metadata() {
    let mut grown = world();
    grown.seen.wanted.entry(GroupId(1)).or_default().secondaries.insert(at("d"));
    let add = Step::Add { group: GroupId(1), address: at("d"), role: Role::Secondary };
    check(&grown, &Next::Member(add));
    grown = grown.switching();
    check(&grown, &Next::Rest { until: ms(15_000) });
    grown.seen.handover = None;
    grown.rows.iter_mut().flatten().for_each(|row| row.synced = row.node != 4);
    check(&grown, &Next::Rest { until: ms(10_100) });
    check(&grown.at(10_100), &Next::Load);
}

#[test]
fn a_node_that_stays_behind_is_looked_at_once_a_second() {
    let behind = |since: u64, switches: bool| {
        let mut world = World { behind_since: Some(ms(since)), ..world() };
        world.rows.iter_mut().flatten().for_each(|row| row.synced = row.node != 4);
        if switches { world.switching() } else { world }
    };
    for (since, switches, until) in [
        (10_000, false, 10_100),
        (9_000, true, 10_010),
        (4_000, false, 11_000),
        (4_000, true, 10_100),
    ] {
        check(&behind(since, switches), &Next::Rest { until: ms(until) });
    }
}

#[test]
fn a_failed_attempt_is_not_repeated_at_once() {
    let tired = World { rows: None, not_before: ms(10_200), ..world() };
    check(&tired, &Next::Rest { until: ms(10_200) });
    check(&tired.at(10_200), &Next::Load);
}

#[test]
fn who_does_not_lead_the_coordinator_lets_go_of_everything() {
    let deposed = |world: World| World { leads: false, ..world };
    check(&deposed(world().renamed(90)), &Next::StandDown);
    check(&deposed(world()), &Next::StandDown);
    check(&deposed(world().asked(Event::BeforeDemote, "a")), &answer(Answer::NotHere));
    let nothing = World { rows: None, ..deposed(world()) };
    check(&nothing, &Next::Rest { until: ms(15_000) });
}

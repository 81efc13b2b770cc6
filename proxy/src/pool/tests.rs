//! One listener with two threads; every row says who comes, and what is done.

use super::*;

const LIMITS: Limits = Limits {
    pool_size: 2,
    max_servers: 3,
    wait_timeout: Duration::from_secs(100),
    hold_timeout: Duration::from_secs(10),
    notice_after: Some(Duration::from_secs(5)),
    idle_timeout: Some(Duration::from_secs(60)),
};

fn name(text: &str) -> Bytes {
    Bytes::copy_from_slice(text.as_bytes())
}

/// A story: events with their times, and the effects so far.
struct Story {
    pools: Pools,
    now: Moment,
    out: Vec<Effect>,
    lifetime: Duration,
}

impl Story {
    fn new(limits: Limits) -> (Self, KindId) {
        let mut pools = Pools::new(2, [limits]);
        let pool = pools.add_pool(0, &name("app"), &name("shop"));
        let kind = pools.add_kind(pool);
        pools.join(kind);
        let lifetime = Duration::from_secs(3600);
        (Self { pools, now: Moment::default(), out: Vec::new(), lifetime }, kind)
    }

    fn another_kind(&mut self) -> KindId {
        self.kind_of(0, "other", "shop")
    }

    fn kind_of(&mut self, listener: usize, user: &str, database: &str) -> KindId {
        let pool = self.pools.add_pool(listener, &name(user), &name(database));
        self.pools.add_kind(pool)
    }

    fn at(&mut self, seconds: u64) -> &mut Self {
        self.now = Moment::at_millis(seconds * 1000);
        self
    }

    fn on(&mut self, event: Event) -> &mut Self {
        self.pools.on(event, self.now, &mut self.out);
        self
    }

    fn ask(&mut self, member: u32, kind: KindId) -> &mut Self {
        self.ask_on(member, kind, 0)
    }

    fn ask_on(&mut self, member: u32, kind: KindId, lane: usize) -> &mut Self {
        self.on(Event::Ask { member: MemberId(member), kind, lane })
    }

    fn opened(&mut self, slot: u32) -> &mut Self {
        let expires = self.now + self.lifetime;
        self.on(Event::Opened { slot: SlotId(slot), expires })
    }

    fn released(&mut self, slot: u32) -> &mut Self {
        self.on(Event::Released { slot: SlotId(slot) })
    }

    fn check(&mut self, expected: &[Effect]) -> &mut Self {
        self.out.retain(|effect| !matches!(effect, Effect::Look { .. }));
        assert_eq!(self.out, expected);
        self.out.clear();
        self
    }
}

fn open(slot: u32, kind: KindId) -> Effect {
    Effect::Open { slot: SlotId(slot), kind, lane: 0 }
}

fn give(slot: u32, member: u32) -> Effect {
    Effect::Give { slot: SlotId(slot), member: MemberId(member) }
}

fn close(slot: u32) -> Effect {
    Effect::Close { slot: SlotId(slot) }
}

#[test]
fn the_first_client_has_a_connection_opened_and_the_next_gets_the_same_one() {
    let (mut story, kind) = Story::new(LIMITS);
    story.ask(1, kind).check(&[open(0, kind)]);
    story.opened(0).check(&[give(0, 1)]);
    story.released(0).check(&[]);
    story.ask(2, kind).check(&[give(0, 2)]);
}

#[test]
fn no_more_are_opened_than_the_pool_may_have_and_clients_are_served_in_order() {
    let (mut story, kind) = Story::new(LIMITS);
    story.ask(1, kind).ask(2, kind).ask(3, kind).ask(4, kind);
    story.check(&[open(0, kind), open(1, kind)]);
    story.opened(1).opened(0).check(&[give(1, 1), give(0, 2)]);
    story.released(0).released(1).check(&[give(0, 3), give(1, 4)]);
}

#[test]
fn a_client_that_leaves_the_queue_is_passed_over() {
    let (mut story, kind) = Story::new(LIMITS);
    story.ask(1, kind).ask(2, kind).opened(0).opened(1).ask(3, kind).ask(4, kind);
    story.on(Event::Withdraw { member: MemberId(3), kind }).out.clear();
    story.released(0).check(&[give(0, 4)]);
}

#[test]
fn the_connection_used_last_is_used_next_so_that_the_others_age() {
    let (mut story, kind) = Story::new(LIMITS);
    story.ask(1, kind).ask(2, kind).opened(0).opened(1).released(0).released(1).out.clear();
    story.ask(3, kind).check(&[give(1, 3)]);
}

#[test]
fn a_connection_stays_on_its_thread_unless_another_threads_client_waits_much_longer() {
    let (mut story, kind) = Story::new(Limits { pool_size: 1, ..LIMITS });
    story.ask(1, kind).opened(0).out.clear();
    story.ask_on(2, kind, 1);
    story.now = Moment::at_millis(1);
    story.ask_on(3, kind, 0);
    story.released(0).check(&[give(0, 3)]);
    story.now = Moment::at_millis(2) + LANE_PATIENCE;
    story.ask_on(4, kind, 0);
    story.released(0).check(&[give(0, 2)]);
}

#[test]
fn an_idle_connection_of_another_role_makes_room() {
    let (mut story, kind) = Story::new(Limits { pool_size: 1, max_servers: 1, ..LIMITS });
    let other = story.another_kind();
    story.ask(1, kind).opened(0).released(0).out.clear();
    story.ask(2, other).check(&[close(0), open(0, other)]);
}

#[test]
fn a_role_without_a_connection_is_not_starved_by_one_that_never_rests() {
    let (mut story, kind) = Story::new(Limits { pool_size: 3, max_servers: 2, ..LIMITS });
    let other = story.another_kind();
    story.ask(1, kind).ask(2, kind).opened(0).opened(1).out.clear();
    story.at(1).ask(3, other).at(2).ask(4, kind).ask(5, kind).check(&[]);
    story.released(0).check(&[close(0), open(0, other)]);
    // From now on they have as many each, and everybody keeps to its own.
    story.opened(0).ask(6, other).released(1).released(0).check(&[
        give(0, 3),
        give(1, 4),
        give(0, 6),
    ]);
}

#[test]
fn who_waits_is_told_and_refused_when_its_time_is_up() {
    let (mut story, kind) = Story::new(Limits { pool_size: 1, ..LIMITS });
    story.ask(1, kind).opened(0).ask(2, kind).at(1).ask(3, kind).out.clear();
    let notice = |member, ahead| Effect::Notice { member: MemberId(member), ahead };
    story.at(5).on(Event::Tick).check(&[notice(2, 0)]);
    story.at(6).on(Event::Tick).check(&[notice(3, 1)]);
    story.at(7).on(Event::Tick).check(&[]);
    let expire = |member, why| Effect::Expire { member: MemberId(member), why };
    story.at(100).on(Event::Tick).check(&[expire(2, Expired::Busy)]);
    // The connection is lost, and none can be opened: patience is shorter then.
    story.on(Event::Gone { slot: SlotId(0) }).check(&[open(0, kind)]);
    story.on(Event::Tick).check(&[expire(3, Expired::NoServer)]);
}

#[test]
fn who_waits_for_long_looks_whether_somebody_is_there() {
    let (mut story, kind) = Story::new(Limits { pool_size: 1, ..LIMITS });
    story.ask(1, kind).opened(0).ask(2, kind).out.clear();
    for (second, looks) in [(0, 0), (1, 1), (1, 0), (2, 1)] {
        story.at(second).on(Event::Tick);
        let look = |effect: &Effect| *effect == Effect::Look { member: MemberId(2) };
        let found = std::mem::take(&mut story.out).iter().filter(|effect| look(effect)).count();
        assert_eq!(found, looks, "second {second}");
    }
}

#[test]
fn a_login_that_fails_is_told_to_one_client_and_tried_again_for_the_next() {
    let (mut story, kind) = Story::new(Limits { pool_size: 1, ..LIMITS });
    story.ask(1, kind).ask(2, kind).check(&[open(0, kind)]);
    story.on(Event::Failed { slot: SlotId(0) });
    let refuse = Effect::Refuse { member: MemberId(1), slot: SlotId(0) };
    story.check(&[refuse, open(0, kind)]);
}

#[test]
fn a_login_that_fails_beside_others_that_work_costs_nobody_an_error() {
    let (mut story, kind) = Story::new(LIMITS);
    story.ask(1, kind).opened(0).ask(2, kind).out.clear();
    story.on(Event::Failed { slot: SlotId(1) }).check(&[]);
    story.on(Event::Tick).check(&[]);
    story.at(2).on(Event::Tick).check(&[open(1, kind)]);
}

#[test]
fn old_and_unused_connections_are_closed_when_they_rest() {
    let (mut story, kind) = Story::new(LIMITS);
    story.lifetime = Duration::from_secs(30);
    story.ask(1, kind).opened(0).out.clear();
    story.at(31).released(0).check(&[close(0)]);
    story.lifetime = Duration::from_secs(3600);
    story.ask(1, kind).opened(0).released(0).out.clear();
    story.at(90).on(Event::Tick).check(&[]);
    story.at(91).on(Event::Tick).check(&[close(0)]);
    story.ask(2, kind).check(&[open(0, kind)]);
}

#[test]
fn no_more_connections_are_kept_than_clients_when_a_database_changes() {
    let (mut story, kind) = Story::new(LIMITS);
    story.ask(1, kind).opened(0).ask(2, kind).opened(1).out.clear();
    story.released(1).on(Event::Spare).check(&[close(1)]);
    story.released(0).on(Event::Spare).check(&[]);
    story.pools.leave(kind);
    story.on(Event::Spare).check(&[close(0)]);
}

#[test]
fn what_is_empty_is_forgotten() {
    let (mut story, kind) = Story::new(LIMITS);
    story.ask(1, kind).opened(0);
    assert_eq!(story.pools.leave(kind), Forgotten::Nothing, "its connection is still there");
    story.released(0).on(Event::Gone { slot: SlotId(0) });
    assert_eq!(story.pools.forget_if_empty(kind), Forgotten::KindAndPool);
}

/// Whatever happens in whatever order: no bound is broken, nobody has two connections or none that
/// was given, and when all is quiet nobody waits who could be served.
#[test]
fn bounds_hold_and_nobody_is_forgotten_in_any_order_of_events() {
    for seed in 0..300u64 {
        let mut dice = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        let mut roll = |n: u64| {
            dice ^= dice << 13;
            dice ^= dice >> 7;
            dice ^= dice << 17;
            dice % n
        };
        let (mut story, first) = Story::new(LIMITS);
        let kinds = [first, story.another_kind(), story.another_kind()];
        let (mut asking, mut holding) = (Vec::<(u32, KindId)>::new(), Vec::<(u32, SlotId)>::new());
        let (mut opening, mut next) = (Vec::new(), 0);
        for step in 0..400u64 {
            story.now = Moment::at_millis(step * 7);
            match roll(8) {
                0..=2 => {
                    next += 1;
                    let kind = kinds[roll(3) as usize];
                    asking.push((next, kind));
                    story.ask_on(next, kind, roll(2) as usize);
                }
                3 if !opening.is_empty() => {
                    let slot: SlotId = opening.remove(roll(opening.len() as u64) as usize);
                    if roll(4) == 0 {
                        story.on(Event::Failed { slot });
                    } else {
                        story.opened(slot.0);
                    }
                }
                4 | 5 if !holding.is_empty() => {
                    let (_, slot) = holding.remove(roll(holding.len() as u64) as usize);
                    if roll(5) == 0 {
                        story.on(Event::Gone { slot });
                    } else {
                        story.released(slot.0);
                    }
                }
                6 if !asking.is_empty() => {
                    let (member, kind) = asking.remove(roll(asking.len() as u64) as usize);
                    story.on(Event::Withdraw { member: MemberId(member), kind });
                }
                _ => {
                    story.on(Event::Tick);
                }
            }
            for effect in std::mem::take(&mut story.out) {
                match effect {
                    Effect::Give { slot, member } => {
                        let at = asking.iter().position(|(asked, _)| *asked == member.0);
                        asking.remove(at.expect("given to somebody who asked"));
                        assert!(holding.iter().all(|(_, held)| *held != slot), "given twice");
                        holding.push((member.0, slot));
                    }
                    Effect::Open { slot, .. } => opening.push(slot),
                    Effect::Close { slot } => {
                        assert!(holding.iter().all(|(_, held)| *held != slot), "closed while lent");
                    }
                    Effect::Refuse { member, .. } | Effect::Expire { member, .. } => {
                        asking.retain(|(asked, _)| *asked != member.0);
                    }
                    Effect::Notice { .. } | Effect::Look { .. } => {}
                }
            }
            assert!(holding.len() + opening.len() <= LIMITS.max_servers, "seed {seed}");
            let waits = story.pools.listeners[0].waiting;
            assert_eq!(waits, asking.len(), "seed {seed}");
            let busy = holding.len() + opening.len();
            assert!(asking.is_empty() || busy > 0, "seed {seed}: somebody waits for nothing");
        }
    }
}

/// Two listeners, and at most two connections of a role on both.
fn shared(per_user: Option<usize>, per_database: Option<usize>) -> (Story, KindId) {
    let pools = Pools::new(1, [LIMITS, LIMITS]).with_shares(Shares::new(per_user, per_database));
    let lifetime = Duration::from_secs(3600);
    let mut story = Story { pools, now: Moment::default(), out: Vec::new(), lifetime };
    let kind = story.kind_of(0, "app", "shop");
    (story, kind)
}

fn opens(story: &mut Story) -> Vec<u32> {
    let opened = story.out.drain(..).filter_map(|effect| match effect {
        Effect::Open { kind, .. } => Some(kind.0),
        _ => None,
    });
    opened.collect()
}

#[test]
fn a_roles_connections_are_bound_on_all_listeners_together() {
    let (mut story, first) = shared(Some(2), None);
    let second = story.kind_of(1, "app", "other");
    let third = story.kind_of(1, "joe", "other");
    story.ask(1, first).ask(2, first).ask(3, second).ask(4, third);
    assert_eq!(opens(&mut story), [first.0, first.0, third.0], "two of app, and joe's");
    story.opened(0).opened(1).out.clear();
    // One ends: the other listener's client of the role is next.
    story.on(Event::Gone { slot: SlotId(0) });
    assert_eq!(opens(&mut story), [second.0]);
    // An idle one makes room for another pool of the role, and not for one of another.
    let (mut story, first) = shared(Some(1), None);
    let second = story.kind_of(1, "app", "other");
    story.ask(1, first).opened(0).released(0).out.clear();
    story.ask(2, second);
    assert_eq!(story.out[0], Effect::Close { slot: SlotId(0) });
    assert_eq!(opens(&mut story), [second.0]);
}

#[test]
fn a_released_connection_goes_to_who_waits_longer_for_the_same_bound() {
    let (mut story, first) = shared(None, Some(2));
    let second = story.kind_of(1, "joe", "shop");
    story.ask(1, first).ask(2, first).opened(0).opened(1);
    story.at(1).ask(3, second).at(2).ask(4, first).out.clear();
    story.at(3).released(0);
    assert_eq!(story.out[0], Effect::Close { slot: SlotId(0) });
    assert_eq!(opens(&mut story), [second.0]);
}

#[test]
fn clients_with_a_connection_to_themselves_count_as_well() {
    let (mut story, first) = shared(Some(2), Some(3));
    let owner = Owner { user: name("app"), database: name("shop") };
    let mut out = Vec::new();
    assert!(story.pools.take_own(&owner, &mut out) && out.is_empty());
    story.ask(1, first).ask(2, first);
    assert_eq!(opens(&mut story), [first.0], "one is left for the pool");
    assert!(!story.pools.take_own(&owner, &mut out), "nothing is idle");
    story.pools.give_back_own(&owner, Moment::default(), &mut out);
    assert!(matches!(out[..], [Effect::Open { .. }]), "{out:?}");
    out.clear();
    // An idle one of the pool makes room.
    story.opened(0).opened(1).released(0).out.clear();
    assert!(story.pools.take_own(&owner, &mut out));
    assert_eq!(out, [Effect::Close { slot: SlotId(0) }]);
    story.pools.take_own_anyhow(&owner);
    out.clear();
    story.pools.give_back_own(&owner, Moment::default(), &mut out);
    assert!(out.is_empty());
    assert!(!story.pools.take_own(&owner, &mut out), "the one that was let in anyhow counts");
}

#[test]
fn other_bounds_hold_from_now_on() {
    let (mut story, first) = Story::new(LIMITS);
    story.ask(1, first).ask(2, first).ask(3, first).opened(0).opened(1).out.clear();
    story.pools.set_limits([Limits { pool_size: 3, ..LIMITS }], None, None);
    story.on(Event::Tick);
    assert_eq!(opens(&mut story), [first.0], "there is room for who waits");
    story.opened(2).out.clear();
    // One more than a role may have now is closed when it is given back, and only that one.
    story.pools.set_limits([Limits { pool_size: 3, ..LIMITS }], Some(2), None);
    story.released(0).released(1);
    assert_eq!(story.out, [Effect::Close { slot: SlotId(0) }]);
    // One that rests already ends as well.
    story.out.clear();
    story.pools.set_limits([Limits { pool_size: 1, ..LIMITS }], None, None);
    story.on(Event::Tick);
    assert_eq!(story.out, [Effect::Close { slot: SlotId(1) }]);
}

//! The effects on waiting clients and idle connections when time passes, or when a database is
//! changed as a whole.

use std::time::Duration;

use kornak_cluster::Moment;

use super::{Effect, Expired, Kind, KindId, Limits, Pools, SlotId, SlotState, Waiting};

/// How often a client that waits looks whether somebody is still there for whom it does.
const LOOK_PAUSE: Duration = Duration::from_secs(1);

impl Pools {
    pub(super) fn tick(&mut self, now: Moment, out: &mut Vec<Effect>) {
        let ids: Vec<KindId> = self.kinds.iter().map(|(id, _)| KindId(id as u32)).collect();
        for id in ids {
            let Some(limits) = self.limits_of(id) else { continue };
            self.close_old(id, limits, now, out);
            let Some(kind) = self.kinds.get_mut(id.0 as usize) else { continue };
            let (limit, why) = match kind.ready {
                0 => (limits.hold_timeout, Expired::NoServer),
                _ => (limits.wait_timeout, Expired::Busy),
            };
            let mut expired = 0;
            for queue in &mut kind.queues {
                while queue.front().is_some_and(|front| now.since(front.since) >= limit) {
                    let Some(front) = queue.pop_front() else { break };
                    out.push(Effect::Expire { member: front.member, why });
                    expired += 1;
                }
                let due = |waiting: &&mut Waiting| now.since(waiting.looked) >= LOOK_PAUSE;
                for waiting in queue.iter_mut().filter(due) {
                    waiting.looked = now;
                    out.push(Effect::Look { member: waiting.member });
                }
                let Some(after) = limits.notice_after else { continue };
                let late = queue.iter_mut().take_while(|it| now.since(it.since) >= after);
                for (ahead, waiting) in late.enumerate().filter(|(_, it)| !it.noticed) {
                    waiting.noticed = true;
                    out.push(Effect::Notice { member: waiting.member, ahead });
                }
            }
            for _ in 0..expired {
                self.count_waiting(id, false);
            }
            self.grow(id, now, out);
        }
    }

    pub(super) fn spare(&mut self, now: Moment, out: &mut Vec<Effect>) {
        let surplus = |kind: &Kind| kind.ready.saturating_sub(kind.clients);
        let idle = self.kinds.iter().flat_map(|(_, kind)| {
            kind.idle.iter().flatten().copied().take(surplus(kind)).collect::<Vec<_>>()
        });
        for slot in idle.collect::<Vec<_>>() {
            out.push(Effect::Close { slot });
            self.gone(slot, now, out);
        }
    }

    fn close_old(&mut self, id: KindId, limits: Limits, now: Moment, out: &mut Vec<Effect>) {
        let Some(kind) = self.kinds.get(id.0 as usize) else { return };
        let idle: Vec<SlotId> = kind.idle.iter().flatten().copied().collect();
        for slot in idle {
            let Some(known) = self.slots.get(slot.0 as usize) else { continue };
            let SlotState::Idle { since } = known.state else { continue };
            let bored = limits.idle_timeout.is_some_and(|limit| now.since(since) >= limit);
            if bored || now >= known.expires || self.is_beyond(id) {
                out.push(Effect::Close { slot });
                self.gone(slot, now, out);
            }
        }
    }
}

//! How long an agent may be silent before its guard ends it and starts another: arithmetic alone.

use std::time::Duration;

use kornak_cluster::Moment;

/// A look counts for so much at most: while the guard itself stood still, so perhaps did the host, and then the
/// agent has missed nothing.
const LONGEST_LOOK: Duration = Duration::from_secs(1);
/// After this time of heartbeats an agent that was started is one that works.
const WORKS: Duration = Duration::from_secs(60);
/// Waits are doubled no further than this, which is longer than any lease is meant to last.
const MAX_DOUBLINGS: u32 = 6;

/// The guard's next act about its agent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Do {
    Nothing,
    /// The process is there and says nothing.
    Kill,
    /// There is none.
    Start,
}

/// How the agent was heard lately.
#[derive(Debug, Clone)]
pub(super) struct Patience {
    timeout: Duration,
    /// As the guard has lived through it.
    silent: Duration,
    /// Since when heartbeats have come without a silence of the timeout.
    beating_since: Option<Moment>,
    last_look: Moment,
    /// The agent's last word was that it leads and that its server is a primary.
    leads: bool,
    /// Agents started in a row without one that works.
    started: u32,
}

impl Patience {
    pub(super) fn new(timeout: Duration, now: Moment) -> Self {
        Self {
            timeout,
            silent: Duration::ZERO,
            beating_since: None,
            last_look: now,
            leads: false,
            started: 0,
        }
    }

    /// The agent, perhaps another one than before, has other settings.
    pub(super) fn allow(&mut self, timeout: Duration) {
        self.timeout = timeout;
    }

    pub(super) fn beat(&mut self, leads: bool, now: Moment) {
        self.silent = Duration::ZERO;
        self.last_look = now;
        self.leads = leads;
        let since = *self.beating_since.get_or_insert(now);
        if now.since(since) >= WORKS {
            self.started = 0;
        }
    }

    /// `may_lead`: the server runs and its lease has time left. `lives`: the agent's process is there.
    pub(super) fn look(&mut self, now: Moment, may_lead: bool, lives: bool) -> Do {
        self.silent += now.since(self.last_look).min(LONGEST_LOOK);
        self.last_look = now;
        if self.silent < self.wait() {
            return Do::Nothing;
        }
        self.beating_since = None;
        match (self.leads && may_lead, lives) {
            (false, _) => Do::Nothing,
            (true, true) => Do::Kill,
            (true, false) => Do::Start,
        }
    }

    /// An agent has been started, or could not be; the next attempt is later than this one was.
    pub(super) fn has_started(&mut self) {
        self.silent = Duration::ZERO;
        self.started = self.started.saturating_add(1);
    }

    fn wait(&self) -> Duration {
        self.timeout * 2_u32.pow(self.started.min(MAX_DOUBLINGS))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TIMEOUT: Duration = Duration::from_secs(3);

    fn at(millis: u64) -> Moment {
        Moment::at_millis(millis)
    }

    /// Looks each half second from `from` until something is to be done.
    fn until_done(patience: &mut Patience, from: u64, lives: bool) -> (u64, Do) {
        (1..1000)
            .map(|step| from + step * 500)
            .map(|now| (now, patience.look(at(now), true, lives)))
            .find(|(_, what)| *what != Do::Nothing)
            .expect("it ends")
    }

    fn leading() -> Patience {
        let mut patience = Patience::new(TIMEOUT, at(0));
        patience.beat(true, at(0));
        patience
    }

    #[test]
    fn a_silent_agent_is_ended_and_one_that_is_gone_replaced() {
        assert_eq!(until_done(&mut leading(), 0, true), (3000, Do::Kill));
        assert_eq!(until_done(&mut leading(), 0, false), (3000, Do::Start));
        let mut beating = leading();
        for now in (0..20_000).step_by(250) {
            beating.beat(true, at(now));
            assert_eq!(beating.look(at(now), true, true), Do::Nothing);
        }
    }

    #[test]
    fn who_does_not_lead_or_has_no_time_left_is_left_alone() {
        let mut standby = Patience::new(TIMEOUT, at(0));
        standby.beat(false, at(0));
        let mut late = leading();
        for now in (0..60_000).step_by(500) {
            assert_eq!(standby.look(at(now), true, true), Do::Nothing);
            assert_eq!(late.look(at(now), false, true), Do::Nothing);
        }
    }

    #[test]
    fn a_host_that_stood_still_is_no_silence() {
        let mut patience = leading();
        assert_eq!(patience.look(at(60_000), true, true), Do::Nothing);
        patience.beat(true, at(60_250));
        assert_eq!(until_done(&mut patience, 60_250, true), (63_250, Do::Kill));
    }

    #[test]
    fn an_agent_that_ends_again_and_again_is_started_ever_more_rarely() {
        let mut patience = leading();
        let mut now = 0;
        let mut waits = Vec::new();
        for _ in 0..8 {
            let (then, what) = until_done(&mut patience, now, false);
            assert_eq!(what, Do::Start);
            waits.push((then - now) / 1000);
            patience.has_started();
            // It lives for a moment.
            patience.beat(true, at(then));
            now = then;
        }
        assert_eq!(waits, [3, 6, 12, 24, 48, 96, 192, 192]);
        for beat in 0..=300 {
            patience.beat(true, at(now + beat * 250));
        }
        let now = now + 75_000;
        assert_eq!(until_done(&mut patience, now, false), (now + 3000, Do::Start), "it worked");
    }
}

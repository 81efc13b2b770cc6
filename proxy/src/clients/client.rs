//! One client's task: moves bytes, and between transactions waits, moves to another server, or ends.
//!
//! ```text
//! forward ── has something to say, no way ──► obtain: gate, route, dial, replay ──► forward
//!    ├─ server lost ──► tell what is true ([`Session::lose_server`]) ──► forward
//!    ├─ flagged: recheck the connection, cancel, stop
//!    └─ client gone, garbage, pinned ──► orderly end
//! ```

mod absent;
mod ahead;
mod dial;
pub mod examine;
mod listening;
mod nearby;
mod obtain;
mod pooled;
mod secondary;
mod time;
pub mod together;

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use kornak_cluster::{GroupId, HandoverPhase, discard};
use kornak_config::proxy::{ListenerSettings, Target};
use kornak_protocol::error::ErrorFields;
use kornak_protocol::sqlstate::ADMIN_SHUTDOWN;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::admission::identity::Identity;
use crate::clients::forward::{Conversation, LastWords, Presence, Stop};
use crate::cluster::route::{self, AtHome, Candidate};
use crate::cluster::standing::{Proof, Term};
use crate::metrics::count;
use crate::net::backend::{Address, DialError};
use crate::net::stream::Stream;
use crate::pool::link::{Link, Opened};
use crate::registry::Flags;
use crate::session::Aftermath;
use crate::session::answers::Verdict;
use crate::session::journal::Pin;
use crate::session::words::About;
use crate::shared::Shared;
use crate::waiting::gate::Side;

/// How long a client may take to read our last words before the socket is closed under it.
const LAST_WORDS_WAIT: Duration = Duration::from_secs(1);

/// How long a session on a worker waits for its own group's leader before another group will do.
const HOME_PATIENCE: Duration = Duration::from_secs(2);

/// Pause before a server is tried again that refused without a change of leadership in sight.
const RETRY_PAUSE: Duration = Duration::from_millis(50);

/// When a session may have a server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    /// When the gate is open.
    Gate,
    /// Before, as soon as the server has proven itself: it has to listen before anybody writes.
    Early,
}

/// How a session ended.
#[derive(Debug)]
pub enum End {
    /// The client left.
    Gone,
    /// With a FATAL of ours.
    Told(ErrorFields),
    /// With a message of the server's.
    Passed(Bytes),
    /// Without a word.
    Broken,
}

/// Which side of the gate a listener's sessions are on before they have a server.
pub fn side_of(target: &Target) -> Side {
    match target {
        Target::Primary => Side::Leading,
        Target::Workers => Side::Workers,
        Target::Standbys | Target::Any | Target::Member(_) => Side::Following,
    }
}

/// The side of a session that is on this server.
fn side_on(listener: &ListenerSettings, candidate: &Candidate) -> Side {
    match side_of(&listener.target) {
        Side::Following if candidate.leading => Side::Leading,
        side => side,
    }
}

/// Waits for a standing that ends this term; for ever if the server is used as a follower.
async fn term_ends(shared: &Shared, candidate: &Candidate, term: Term) {
    if !candidate.leading {
        return std::future::pending().await;
    }
    let (mut watching, group) = (shared.standings.subscribe(), candidate.group);
    // The sender lives as long as the proxy.
    discard::sender_outlives_waiters(watching.wait_for(|now| now.term(group) != term).await);
}

/// Finds a server for a session and logs in, or only dials if there is no identity yet (the client
/// will be authenticated by the server). Waits as long as it takes: the caller has the deadline.
pub async fn open(
    shared: &Shared,
    listener: &ListenerSettings,
    identity: Option<&Identity>,
    home: Option<GroupId>,
    way: Way,
) -> Result<Opened, DialError> {
    let since = Instant::now();
    let mut standings = shared.standings.subscribe();
    let mut topology = shared.topology.subscribe();
    let mut refused: Vec<Arc<str>> = Vec::new();
    let mut registered = shared.registered.subscribe();
    // The sender lives as long as the proxy.
    discard::sender_outlives_waiters(registered.wait_for(|registered| *registered).await);
    loop {
        let known = Arc::clone(&standings.borrow_and_update());
        let cluster = Arc::clone(&topology.borrow_and_update());
        let generation = shared.generation();
        let mut found = route::candidates(listener, &cluster, &known, &refused);
        let away =
            home.is_some_and(|home| route::at_home(&mut found, home, &cluster) == AtHome::Away);
        if away && since.elapsed() < HOME_PATIENCE {
            tokio::select! {
                _ = standings.changed() => {}
                _ = topology.changed() => {}
                () = tokio::time::sleep(HOME_PATIENCE) => {}
            }
            continue;
        }
        let Ok(found) = found else {
            let pause = async {
                match refused.is_empty() {
                    true => std::future::pending().await,
                    false => tokio::time::sleep(RETRY_PAUSE).await,
                }
            };
            tokio::select! {
                _ = standings.changed() => {}
                _ = topology.changed() => {}
                () = pause => refused.clear(),
            }
            continue;
        };
        // Counting everybody is for a choice only.
        let sessions = if found.len() > 1 { shared.registry.by_node() } else { Default::default() };
        let startup = identity.filter(|_| found.len() > 1).map(|identity| &identity.startup[..]);
        let candidate = together::with_family(&shared.registry, startup, &found)
            .or_else(|| route::choose(&found, listener.balance, &sessions, shared.dice()));
        let Some(candidate) = candidate else { continue };
        let side = side_on(listener, &candidate);
        if candidate.leading && way == Way::Gate && shared.gate.is_closed(side) {
            shared.gate.wait_open(side).await;
            continue;
        }
        let term = known.term(candidate.group);
        let proof = known.proof(candidate.group);
        let address = Address::from(&*candidate.node);
        let reads = !candidate.leading && candidate.group == GroupId::COORDINATOR;
        let source = (reads && cluster.groups.len() > 1).then(|| shared.source());
        let dialled = tokio::select! {
            dialled = dial::dial(shared, &candidate, &address, identity, source) => dialled,
            // Somebody else leads now: a host that vanished may keep us waiting for seconds.
            () = term_ends(shared, &candidate, term) => continue,
        };
        match dialled {
            Ok(connected)
                if candidate.leading && connected.params.in_hot_standby() == Some(true) =>
            {
                tracing::warn!(server = %candidate.name, "leader says that it is a standby");
                doubt_and_wait(shared, &candidate, proof, &mut standings).await;
            }
            Ok(connected) => {
                count(&shared.metrics.dialled);
                shared.set_trouble("dial", None);
                let server =
                    Opened { connected, candidate, address, side, term, generation, source };
                return Ok(server);
            }
            // No fact about the server, and no refusal of this login.
            Err(error) if error.is_ours() => dial::pause_for_want(shared, &error).await,
            Err(error) if error.is_about_server() => {
                count(&shared.metrics.dial_failures);
                if candidate.leading {
                    doubt_and_wait(shared, &candidate, proof, &mut standings).await;
                } else {
                    let single = matches!(listener.target, Target::Member(_));
                    if single {
                        tokio::time::sleep(RETRY_PAUSE).await;
                    }
                    refused.push(Arc::clone(&candidate.name));
                }
            }
            Err(error) => {
                count(&shared.metrics.dial_failures);
                return Err(error);
            }
        }
    }
}

/// The leader could not be used although it was proven: waits for a newer proof.
async fn doubt_and_wait(
    shared: &Shared,
    candidate: &Candidate,
    proof: Proof,
    standings: &mut tokio::sync::watch::Receiver<Arc<crate::cluster::standing::Standings>>,
) {
    shared.doubt(candidate.group, proof);
    // The sender lives as long as the proxy.
    discard::sender_outlives_waiters(
        standings.wait_for(|now| now.proof(candidate.group) != proof).await,
    );
}

/// A session's task, from login to end.
pub struct Client {
    pub talk: Conversation,
    pub identity: Arc<Identity>,
    pub listener: Arc<ListenerSettings>,
    pub scratch: Rc<RefCell<Box<[u8]>>>,
    /// On the workers' listener: the group that the session is on, through a change of its leader.
    pub home: Option<GroupId>,
}

impl Client {
    /// Takes a fresh server connection.
    pub fn link(&mut self, opened: Opened) {
        let (link, _) = Link::new(opened, &self.listener);
        self.home = (self.listener.target == Target::Workers).then_some(link.group);
        self.talk.handle.set_term(link.term);
        self.talk.handle.set_server(&link.node, link.target.clone());
        self.talk.side = link.side;
        self.talk.link = Some(link);
    }

    /// Runs the session to its end.
    pub async fn run(&mut self) -> End {
        loop {
            if self.must_listen()
                && let Err(end) = Box::pin(self.obtain()).await
            {
                return end;
            }
            let stop = match self.talk.presence {
                Presence::Ended => Box::pin(self.depart()).await,
                Presence::There | Presence::Listens => self.forward().await,
            };
            let step = match stop {
                // Boxed: an idle session keeps no room for it.
                Stop::Wants => Box::pin(self.obtain()).await,
                Stop::ServerLost(words) => Box::pin(self.lost(words)).await,
                Stop::Flagged => Box::pin(self.flagged()).await,
                // It has shut its sending side, and may still read.
                Stop::ClientGone if self.talk.presence == Presence::Ended => Err(End::Broken),
                Stop::ClientGone => Err(End::Gone),
                Stop::ClientEnded => Ok(()),
                Stop::HungUp => Box::pin(self.hung_up()).await,
                Stop::ClientGarbage(error) => {
                    count(&self.talk.shared.metrics.malformed);
                    Err(self.told(Verdict::Garbage(error)))
                }
                Stop::ServerGarbage => self.after_loss(),
                Stop::Unfit => Box::pin(self.make_fit()).await,
                Stop::Examine => Box::pin(self.examine()).await,
                Stop::Reset => Box::pin(self.part()).await,
                Stop::Denied(denied) => self.denied(&denied),
            };
            if let Err(end) = step {
                return end;
            }
        }
    }

    async fn forward(&mut self) -> Stop {
        let Self { talk, scratch, .. } = self;
        let mut moving =
            std::pin::pin!(std::future::poll_fn(|cx| { talk.poll(cx, &mut scratch.borrow_mut()) }));
        moving.as_mut().await
    }

    fn told(&self, verdict: Verdict) -> End {
        self.talk.shared.metrics.error(verdict.sqlstate());
        End::Told(verdict.fields())
    }

    /// Restores what the session held, and tells the client what the new server reports otherwise.
    async fn move_to(&mut self, mut opened: Opened) -> Result<(), End> {
        if !self.talk.session.is_clean() {
            let mut replay = BytesMut::new();
            let owed = self.talk.session.put_replay(&mut replay);
            let limit = self.talk.shared.settings().limits.connect_timeout;
            let replayed =
                tokio::time::timeout(limit, opened.connected.replay(&replay, owed)).await;
            match replayed {
                Ok(Ok(0)) => {}
                Ok(Ok(_)) => return Err(self.state_refused()),
                // The new server broke: the request is still held, the next round finds another.
                Ok(Err(_)) | Err(_) => return Ok(()),
            }
        }
        if !self.restore_unnamed(&mut opened).await {
            return Ok(());
        }
        self.talk.session.moved(&opened.connected.params, &mut self.talk.to_client);
        count(&self.talk.shared.metrics.moved);
        self.link(opened);
        self.listens_again();
        Ok(())
    }

    /// A server does not take what the session holds: without it, it must not go on.
    fn state_refused(&self) -> End {
        tracing::warn!(
            session = self.talk.handle.id,
            "server refuses the settings that a session holds"
        );
        let text = "what the session holds cannot be restored on another server connection";
        self.talk.shared.metrics.error(ADMIN_SHUTDOWN);
        End::Told(ErrorFields::fatal(ADMIN_SHUTDOWN, text).hint(
            "The role, a parameter or a table of a prepared statement may be gone; reconnect.",
        ))
    }

    /// A server connection that must not be used any more is closed; between transactions the
    /// session lives on, unless it is pinned.
    async fn drop_stale_link(&mut self) -> Result<(), End> {
        if self.talk.link.is_none() || self.talk.may_use_link() {
            return Ok(());
        }
        if !self.talk.is_quiet() {
            return self.after_loss();
        }
        let shared = &self.talk.shared;
        let lost = |link: &Link| !link.stands_in && !shared.is_current(link);
        if self.is_sudden() && self.talk.link.as_deref().is_some_and(lost) {
            // Nobody was asked what it holds: as if the server had been lost.
            return self.after_loss();
        }
        self.check_pin()?;
        if let Some(mut link) = self.talk.link.take() {
            self.take_leave(&mut link).await;
        }
        self.talk.session.detached();
        self.talk.handle.set_server(&self.talk.shared.nobody, None);
        Ok(())
    }

    /// Whether nobody had announced that the server goes.
    fn is_sudden(&self) -> bool {
        let topology = self.talk.shared.topology.borrow();
        let record = topology.handover.as_ref();
        !record.is_some_and(|record| {
            matches!(record.phase, HandoverPhase::Switch | HandoverPhase::Promote)
        })
    }

    fn check_pin(&mut self) -> Result<(), End> {
        if self.talk.handle.holds_advisory_locks() {
            self.talk.session.pin(Pin::Advisory);
        }
        match self.talk.session.pinned() {
            None => Ok(()),
            Some(pin) => Err(self.pinned_end(pin)),
        }
    }

    fn pinned_end(&self, pin: Pin) -> End {
        self.talk.shared.metrics.pinned_closed(pin.as_str());
        self.told(Verdict::Ends(Some(pin)))
    }

    async fn flagged(&mut self) -> Result<(), End> {
        let flags = self.talk.handle.take_flags();
        self.talk.handle.set_pin(self.talk.session.pinned());
        if flags.has(Flags::STOP_NOW) || (flags.has(Flags::STOP) && self.talk.is_quiet()) {
            return Err(self.told(Verdict::Shutdown));
        }
        if flags.has(Flags::CANCEL)
            && let Some(done) = self.cancelled()
        {
            return done;
        }
        if flags.has(Flags::TIME) {
            self.look_at_time()?;
        }
        if flags.has(Flags::EXAMINE) {
            let asked = if self.talk.may_ask() { self.examine().await } else { Ok(()) };
            self.talk.handle.has_asked();
            asked?;
        } else if flags.has(Flags::SUSPECT) && self.talk.may_ask_late() {
            self.examine().await?;
        }
        self.talk.leave_if_idle();
        self.drop_stale_link().await
    }

    /// The server connection is gone. A FATAL that was meant for this session alone is passed on; one
    /// of a server that goes down is kept from the client (docs/safety.md A15).
    async fn lost(&mut self, words: Option<LastWords>) -> Result<(), End> {
        let shared = Arc::clone(&self.talk.shared);
        if self.talk.session.is_terminated() {
            // It has said good-bye behind its last request, and gets what is answered to that.
            let words = words.map(|words| words.message).unwrap_or_default();
            return Err(if words.is_empty() { End::Broken } else { End::Passed(words) });
        }
        count(&shared.metrics.servers_lost);
        // Nobody's connection was ended: it was not this session's any more, or not yet.
        let was_resting = self.talk.member.is_some() && self.talk.session.is_quiet();
        if let Some(words) = words.filter(|_| !was_resting || self.talk.session.pinned().is_some())
        {
            let general = match words.about() {
                About::Server => true,
                About::Either => self.is_server_going(&shared).await,
                About::Session => false,
            };
            if !general && !words.message.is_empty() {
                return Err(End::Passed(words.message));
            }
        }
        if let Some(link) = &self.talk.link
            && link.leading
        {
            let proof = shared.standings.borrow().proof(link.group);
            shared.losses.note();
            shared.doubt(link.group, proof);
        }
        self.after_loss()
    }

    async fn is_server_going(&self, shared: &Shared) -> bool {
        let Some(link) = &self.talk.link else { return true };
        if !shared.is_current(link) || shared.topology.borrow().handover.is_some() {
            return true;
        }
        let limit = shared.settings().limits.connect_timeout;
        shared.prober.is_going_down(&link.address, limit).await
    }

    fn after_loss(&mut self) -> Result<(), End> {
        let sudden = self.is_sudden();
        match self.talk.lose_server(sudden) {
            Aftermath::Lives => Ok(()),
            Aftermath::Ends(verdict) => {
                if let Verdict::Ends(Some(pin)) = verdict {
                    self.talk.shared.metrics.pinned_closed(pin.as_str());
                }
                Err(End::Told(verdict.fields()))
            }
            Aftermath::Breaks => Err(End::Broken),
        }
    }

    /// Ends the session in order: the last message, what is still to be written, and a moment for
    /// the client to read it, so that no reset destroys it.
    pub async fn finish(mut self: Box<Self>, end: End) {
        if let Some(link) = self.talk.link.take() {
            self.leave_link(link).await;
        }
        let mut out = std::mem::take(&mut self.talk.to_client);
        match &end {
            End::Gone => return,
            End::Broken => {}
            End::Told(fields) => fields.put(&mut out),
            End::Passed(message) => out.extend_from_slice(message),
        }
        close(self.talk.client, &out).await;
    }
}

/// Writes what is left, shuts the write side, and reads until the client closes or time is up.
pub async fn close(mut client: Stream, out: &[u8]) {
    let ending = async {
        client.write_all(out).await?;
        client.shutdown().await?;
        let mut nothing = [0u8; 512];
        while client.read(&mut nothing).await? > 0 {}
        Ok::<_, std::io::Error>(())
    };
    discard::goes_on_either_way(tokio::time::timeout(LAST_WORDS_WAIT, ending).await);
}

//! The waits of a session whose server connections change hands: a connection that must be
//! told its settings first, and its turn.

use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::{BufMut, Bytes, BytesMut};
use kornak_cluster::discard;
use kornak_config::proxy::PoolReset;
use kornak_protocol::params::Parameters;
use kornak_protocol::{backend, frontend};

use super::{Client, End, absent};
use crate::clients::forward::Denied;
use crate::clients::forward::pooled::hand_over;
use crate::metrics::count;
use crate::net::backend::{DialError, next_frame, say_good_bye};
use crate::net::stream::write_all;
use crate::pool::link::Link;
use crate::pool::settled::Returned;
use crate::registry::Doing;
use crate::session::answers::Verdict;

/// Makes a connection as good as new, as far as a server can.
const DISCARD: &[u8] = b"DISCARD ALL";

/// Clears a connection but keeps the statements that are prepared on it, which are all ours.
/// Between transactions, in one of its own.
const RESET: &[u8] = b"RESET SESSION AUTHORIZATION; RESET ROLE; RESET ALL; CLOSE ALL; UNLISTEN *; \
    DISCARD TEMP; DISCARD SEQUENCES; SELECT pg_catalog.pg_advisory_unlock_all()";

impl Client {
    /// The connection in hand lacks what the session has set: all of it, or, of a session that keeps it, what
    /// a RESET has taken from it.
    pub(super) async fn make_fit(&mut self) -> Result<(), End> {
        let Some(mut link) = self.talk.link.take() else { return Ok(()) };
        let Some(lease) = &link.lease else { return Ok(()) };
        let mut out = BytesMut::new();
        let is_kept = lease.state.prepared.is_none();
        let owed = match is_kept {
            true => self.talk.session.put_base(&mut out),
            false => self.talk.session.put_fit(&lease.state, &mut out),
        };
        let mut reported = match is_kept {
            true => self.talk.session.told().clone(),
            false => Parameters::clone(&lease.state.params),
        };
        let limit = self.talk.shared.settings().limits.connect_timeout;
        let told = tell(&mut link, &out, owed, &mut reported, limit).await;
        match told {
            Ok(answers) if answers.failed == 0 => {
                self.talk.to_client.extend_from_slice(&answers.aside);
                count(&self.talk.shared.metrics.pool_fitted);
                if is_kept {
                    self.talk.session.moved(&reported, &mut self.talk.to_client);
                } else if let Some(lease) = &mut link.lease {
                    lease.state.params = reported.into();
                    self.talk.session.made_fit(&mut lease.state);
                    self.talk.session.attach(&mut lease.state, &mut self.talk.to_client);
                }
                self.talk.link = Some(link);
                Ok(())
            }
            Ok(_) => Err(self.state_refused()),
            // It broke: nothing was forwarded, the request asks again.
            Err(_) => {
                self.talk.handle.set_server(&self.talk.shared.nobody, None);
                Ok(())
            }
        }
    }

    /// The session needs its connection no more: gives it back, made as new if the settings say so.
    pub(super) async fn part(&mut self) -> Result<(), End> {
        if self.talk.shared.settings().pool.reset == PoolReset::Known {
            self.talk.give_back();
            return Ok(());
        }
        let link = self.talk.link.take_if(|link| link.lease.is_some());
        let Some(link) = link else { return Ok(()) };
        let mut laden = match self.talk.returned(link) {
            Returned::Settled(settled) => settled.into_laden(),
            Returned::Laden(laden) => laden,
            Returned::Unsettled(link) => {
                self.talk.link = Some(link);
                return Ok(());
            }
        };
        self.talk.handle.set_server(&self.talk.shared.nobody, None);
        let shared = Arc::clone(&self.talk.shared);
        let limit = shared.settings().limits.connect_timeout;
        let mut out = BytesMut::new();
        // A constant text always fits.
        discard::message_fits(frontend::put_query(RESET, &mut out));
        let mut reported = laden.reported();
        // A connection that does not take it is of no use to anybody.
        let told = tell(laden.link_mut(), &out, 1, &mut reported, limit).await;
        let Ok(answers) = told else { return Ok(()) };
        self.talk.to_client.extend_from_slice(&answers.aside);
        if let Some(settled) = laden.was_reset(answers.failed, reported) {
            count(&shared.metrics.pool_resets);
            hand_over(&shared, settled);
        }
        Ok(())
    }

    /// The pool has nothing for the request.
    pub(super) fn denied(&mut self, denied: &Denied) -> Result<(), End> {
        match denied {
            Denied::Busy => self.refuse(Verdict::Busy),
            Denied::NoServer => self.refuse(Verdict::NoServer),
            Denied::Login(error) => Err(self.cannot_move(error)),
        }
    }

    /// The gate is closed, or the session's place with it: waits without a connection.
    pub(super) async fn wait_at_gate(&mut self) -> Result<(), End> {
        let shared = Arc::clone(&self.talk.shared);
        if self.talk.link.is_some() && !self.talk.session.must_keep() {
            self.part().await?;
        }
        self.talk.handle.set_doing(Doing::Held);
        let since = Instant::now();
        let patience = shared.settings().limits.hold_timeout;
        let handle = Arc::clone(&self.talk.handle);
        let waited = tokio::select! {
            () = shared.gate.wait_open(self.talk.side) => Some(true),
            () = absent::hangs_up(&self.talk) => return self.hung_up().await,
            () = handle.flagged() => None,
            () = tokio::time::sleep(patience) => Some(false),
        };
        shared.metrics.hold.record(since.elapsed());
        match waited {
            Some(true) if self.talk.has_hung_up() => self.hung_up().await,
            Some(true) => Ok(()),
            Some(false) => self.refuse(Verdict::NoServer),
            None => Box::pin(self.flagged()).await,
        }
    }

    /// The client wants its request cancelled: if that waits here it is answered, and otherwise
    /// there is none any more.
    pub(super) fn cancelled(&mut self) -> Option<Result<(), End>> {
        let member = self.talk.member.as_mut()?;
        if self.talk.handle.doing() != Doing::Held {
            return None;
        }
        member.withdraw();
        Some(self.refuse(Verdict::Cancelled))
    }

    /// The client has left: its connection is made as new for the next one, or ended if it is in the
    /// middle of something. What may still commit runs to its end, as it would without a pool.
    pub(super) async fn leave_link(&mut self, mut link: Box<Link>) {
        if link.lease.is_none() {
            say_good_bye(&mut link.stream);
            return;
        }
        let shared = Arc::clone(&self.talk.shared);
        let limit = shared.settings().limits.connect_timeout;
        let resets = shared.settings().pool.reset == PoolReset::Always;
        let mut laden = match self.talk.returned(link) {
            Returned::Settled(settled) if !resets => {
                return hand_over(&shared, settled);
            }
            Returned::Settled(settled) => settled.into_laden(),
            Returned::Laden(laden) => laden,
            Returned::Unsettled(mut link) => {
                count(&shared.metrics.pool_dirty);
                if let (true, Some(target)) =
                    (self.talk.session.cannot_commit(), link.target.take())
                {
                    // Whoever waits for its locks should not wait for a query that nobody reads.
                    let cancel = crate::net::backend::cancel(
                        &target.address,
                        shared.prober.tls(),
                        &target.key,
                    );
                    discard::goes_on_either_way(tokio::time::timeout(limit, cancel).await);
                }
                say_good_bye(&mut link.stream);
                return;
            }
        };
        let mut out = BytesMut::new();
        // A constant text always fits.
        discard::message_fits(frontend::put_query(DISCARD, &mut out));
        let mut reported = laden.reported();
        let told = tell(laden.link_mut(), &out, 1, &mut reported, limit).await;
        let Ok(answers) = told else { return };
        if let Some(settled) = laden.discarded(answers.failed, reported) {
            count(&shared.metrics.pool_resets);
            hand_over(&shared, settled);
        }
    }
}

/// The answers of a server to statements of ours.
#[derive(Debug, Default)]
pub(super) struct Answers {
    pub(super) failed: usize,
    pub(super) rows: Vec<Bytes>,
    /// Notifications, which are the client's.
    pub(super) aside: BytesMut,
}

/// Sends statements of ours between transactions and takes the answers, so many ReadyForQuery.
/// After an error the connection is of no use any more.
pub(super) async fn tell(
    link: &mut Link,
    bytes: &[u8],
    mut owed: usize,
    reported: &mut Parameters,
    limit: Duration,
) -> Result<Answers, DialError> {
    let mut answers = Answers::default();
    let mut buf = BytesMut::from(&*std::mem::take(&mut link.tail));
    let talking = async {
        write_all(&mut link.stream, bytes).await?;
        while owed > 0 {
            let frame = next_frame(&mut link.stream, &mut buf).await?;
            match frame.tag {
                b'Z' => owed -= 1,
                b'E' => answers.failed += 1,
                b'D' => answers.rows.push(frame.body),
                b'A' => {
                    answers.aside.put_u8(frame.tag);
                    answers.aside.put_u32(frame.body.len() as u32 + 4);
                    answers.aside.put_slice(&frame.body);
                }
                b'S' => {
                    let (name, value) = backend::parameter_status(&frame.body)?;
                    // More than the bound were refused at login already.
                    discard::parameter_is_within_bound(reported.set(name, value));
                }
                _ => {}
            }
        }
        Ok::<_, DialError>(())
    };
    match tokio::time::timeout(limit, talking).await {
        Ok(done) => done?,
        Err(_) => return Err(DialError::Timeout),
    }
    link.tail = buf.to_vec();
    Ok(answers)
}

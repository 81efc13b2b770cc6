//! What a session whose server connections change hands has to wait for: a connection that must be
//! told its settings first, and the question whether it still holds what pinned it.

use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::{BufMut, Bytes, BytesMut};
use kornak_protocol::params::Parameters;
use kornak_protocol::{backend, frontend};

use super::{Client, End};
use crate::backend::{DialError, next_frame};
use crate::forward::pooled::hand_over;
use crate::forward::{Denied, Link};
use crate::metrics::count;
use crate::registry::Doing;
use crate::session::Session;
use crate::session::answers::Verdict;
use crate::session::journal::{Examined, Pin};
use crate::stream::write_all;

/// What a session may hold that keeps its connection from others, one row: advisory locks, temporary
/// relations, channels, statements of SQL PREPARE, cursors WITH HOLD, its settings as the
/// statements that would make them again, and who it is.
const EXAMINE: &str = "\
    SELECT EXISTS (SELECT FROM pg_catalog.pg_locks \
                   WHERE locktype = 'advisory' AND pid = pg_catalog.pg_backend_pid()), \
           EXISTS (SELECT FROM pg_catalog.pg_class \
                   WHERE relnamespace = pg_catalog.pg_my_temp_schema()), \
           EXISTS (SELECT FROM pg_catalog.pg_listening_channels()), \
           EXISTS (SELECT FROM pg_catalog.pg_prepared_statements WHERE from_sql), \
           EXISTS (SELECT FROM pg_catalog.pg_cursors WHERE is_holdable), \
           (SELECT pg_catalog.string_agg(pg_catalog.format(\
                E'%s\\x02SELECT pg_catalog.set_config(%L, %L, false)', name, name, setting), \
                E'\\x01' ORDER BY turn) \
            FROM (SELECT name, setting, 1 FROM pg_catalog.pg_settings WHERE source = 'session' \
                  UNION ALL \
                  SELECT 'role', pg_catalog.current_setting('role'), 2 \
                  WHERE pg_catalog.current_setting('role') <> 'none') AS s (name, setting, turn)), \
           session_user";

/// What makes a connection as good as new, as far as a server can.
const DISCARD: &[u8] = b"DISCARD ALL";

impl Client {
    /// The connection in hand lacks what the session has set.
    pub(super) async fn make_fit(&mut self) -> Result<(), End> {
        let Some(mut link) = self.talk.link.take() else { return Ok(()) };
        let Some(lease) = &link.lease else { return Ok(()) };
        let mut out = BytesMut::new();
        let owed = self.talk.session.put_fit(lease, &mut out);
        let mut reported = Parameters::clone(&lease.params);
        let limit = self.talk.shared.settings.limits.connect_timeout;
        let told = tell(&mut link, &out, owed, &mut reported, limit).await;
        match told {
            Ok(answers) if answers.failed == 0 => {
                self.talk.to_client.extend_from_slice(&answers.aside);
                count(&self.talk.shared.metrics.pool_fitted);
                if let Some(lease) = &mut link.lease {
                    lease.params = reported.into();
                    self.talk.session.made_fit(lease);
                    self.talk.session.attach(lease, &mut self.talk.to_client);
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

    /// Asks the server what the session holds.
    pub(super) async fn examine(&mut self) -> Result<(), End> {
        let Some(mut link) = self.talk.link.take() else { return Ok(()) };
        let limit = self.talk.shared.settings.limits.connect_timeout;
        let Some(lease) = &mut link.lease else { return Ok(()) };
        let mut reported = Parameters::clone(&lease.params);
        let mut out = BytesMut::new();
        // A constant text always fits.
        let _ = frontend::put_query(EXAMINE.as_bytes(), &mut out);
        let told = tell(&mut link, &out, 1, &mut reported, limit).await;
        self.talk.link = Some(link);
        let Ok(answers) = told else { return self.after_loss() };
        self.talk.to_client.extend_from_slice(&answers.aside);
        self.talk.session.moved(&reported, &mut self.talk.to_client);
        let row = answers.rows.first().and_then(|row| backend::data_row(row).ok());
        let row = row.unwrap_or_default();
        let held = |at: usize| row.get(at).copied().flatten().is_none_or(|value| *value == *b"t");
        let settings = row.get(5).copied().flatten();
        self.talk.session.examined(&Examined {
            locks: held(0),
            temporary: held(1),
            listens: held(2),
            prepared: held(3),
            hold_cursor: held(4),
            settings: settings.unwrap_or_default(),
            is_itself: row.get(6).copied().flatten() == Some(&self.identity.user),
        });
        let pin = self.talk.session.pinned();
        self.talk.handle.set_pin(pin);
        if pin.is_none() {
            self.talk.give_back();
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
        if self.talk.link.is_some() && self.talk.session.pinned().is_none() {
            self.talk.give_back();
        }
        self.talk.handle.set_doing(Doing::Held);
        let since = Instant::now();
        let handle = Arc::clone(&self.talk.handle);
        let waited = tokio::select! {
            () = shared.gate.open(self.talk.side) => Some(true),
            () = handle.flagged() => None,
            () = tokio::time::sleep(shared.settings.limits.hold_timeout) => Some(false),
        };
        shared.metrics.hold.record(since.elapsed());
        match waited {
            Some(true) => Ok(()),
            Some(false) => self.refuse(Verdict::NoServer),
            None => self.flagged(),
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

    /// The client has left: its connection is made as new for the next one, or ended if a
    /// transaction is open on it.
    pub(super) async fn leave_link(&mut self, mut link: Box<Link>) {
        let is_quiet = self.talk.session.is_quiet()
            && link.scanner.at_boundary()
            && link.tail.is_empty()
            && link.to_server.is_empty();
        let Some(lease) = &mut link.lease else {
            super::say_good_bye(&mut link.stream);
            return;
        };
        let shared = Arc::clone(&self.talk.shared);
        if !is_quiet || self.talk.session.pinned() == Some(Pin::Lost) {
            count(&shared.metrics.pool_dirty);
            if let (true, Some(target)) = (self.talk.ticket.is_inside(), link.target.take()) {
                // Whoever waits for its place should not wait for a query that nobody reads.
                let limit = shared.settings.limits.connect_timeout;
                let cancel =
                    crate::backend::cancel(&target.address, shared.prober.tls(), &target.key);
                let _ = tokio::time::timeout(limit, cancel).await;
            }
            super::say_good_bye(&mut link.stream);
            return;
        }
        self.talk.session.detach(lease);
        if self.talk.session.pinned().is_some() {
            let limit = shared.settings.limits.connect_timeout;
            let mut out = BytesMut::new();
            // A constant text always fits.
            let _ = frontend::put_query(DISCARD, &mut out);
            let mut reported = Parameters::clone(&lease.params);
            match tell(&mut link, &out, 1, &mut reported, limit).await {
                Ok(answers) if answers.failed == 0 => count(&shared.metrics.pool_resets),
                Ok(_) | Err(_) => return,
            }
            let Some(lease) = &mut link.lease else { return };
            lease.params = reported.into();
            Session::discarded(lease);
        }
        hand_over(&shared, link);
    }
}

/// What a server answered to statements of ours.
#[derive(Debug, Default)]
struct Answers {
    failed: usize,
    rows: Vec<Bytes>,
    /// Notifications, which are the client's.
    aside: BytesMut,
}

/// Sends statements of ours between transactions and takes the answers, so many ReadyForQuery.
/// After an error the connection is of no use any more.
async fn tell(
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
                    let _ = reported.set(name, value);
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

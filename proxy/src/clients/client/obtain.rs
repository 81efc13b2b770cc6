//! A client has spoken and there is no way to a server: its request waits, and is forwarded, refused, or
//! dropped with its client.

use std::sync::Arc;
use std::time::Instant;

use bytes::BytesMut;
use kornak_protocol::error::ErrorFields;
use kornak_protocol::sqlstate::ADMIN_SHUTDOWN;

use super::{Client, End, Way, absent, ahead, open};
use crate::net::backend::DialError;
use crate::pool::link::Opened;
use crate::registry::{Doing, Flags};
use crate::session::answers::Verdict;
use crate::session::journal::Pin;
use crate::shared::losses;

impl Client {
    /// The client has spoken: waits for the gate and for a server.
    pub(super) async fn obtain(&mut self) -> Result<(), End> {
        let since = Instant::now();
        let shared = Arc::clone(&self.talk.shared);
        let give_up = tokio::time::Instant::now() + shared.settings().limits.hold_timeout;
        self.drop_stale_link().await?;
        if self.talk.member.is_some() {
            return self.wait_at_gate().await;
        }
        self.talk.handle.set_doing(Doing::Held);
        let way = loop {
            let handle = Arc::clone(&self.talk.handle);
            let (side, linked) = (self.talk.side, self.talk.link.is_some());
            let leads = self.talk.link.as_ref().filter(|it| it.leading).map(|it| it.group);
            let way = if self.talk.session.listens() { Way::Early } else { Way::Gate };
            let opening = async {
                if linked {
                    shared.gate.wait_open(side).await;
                    if let Some(group) = leads {
                        losses::verdict(&shared, group).await;
                    }
                    return Ok(None);
                }
                let opened = {
                    let (listener, id) = (&self.listener, handle.id);
                    ahead::open(&shared, listener, &self.identity, id, side, way).await
                };
                match opened {
                    Some(opened) => Ok(Some(opened)),
                    None => {
                        let identity = Some(&*self.identity);
                        open(&shared, &self.listener, identity, self.home, way).await.map(Some)
                    }
                }
            };
            let client = &self.talk;
            let way = tokio::select! {
                opened = opening => Some(opened),
                () = absent::hangs_up(client) => {
                    self.hung_up().await?;
                    continue;
                }
                () = handle.flagged() => None,
                () = tokio::time::sleep_until(give_up) => Some(Err(DialError::Timeout)),
            };
            match way {
                Some(way) => break way,
                None => {
                    // A connection that is being opened is given up; it costs one login.
                    let flags = self.talk.handle.take_flags();
                    // There is nobody to ask.
                    self.talk.handle.has_asked();
                    if flags.has(Flags::CANCEL) {
                        return self.refuse(Verdict::Cancelled);
                    }
                    if flags.has(Flags::STOP) || flags.has(Flags::STOP_NOW) {
                        return Err(self.told(Verdict::Shutdown));
                    }
                    self.drop_stale_link().await?;
                }
            }
        };
        shared.metrics.hold.record(since.elapsed());
        if self.talk.has_hung_up() {
            // Nobody is there for whom it would be executed.
            self.hung_up().await?;
        }
        self.go_on_with(way).await
    }

    /// Goes on with what came of the wait: `None` is the connection that the session has.
    async fn go_on_with(&mut self, way: Result<Option<Opened>, DialError>) -> Result<(), End> {
        match way {
            Ok(None) => Ok(()),
            Ok(Some(opened)) => self.move_to(opened).await,
            // Whoever listens nowhere must not believe that it does.
            Err(DialError::Timeout) if self.must_listen() => Err(self.pinned_end(Pin::Listen)),
            Err(DialError::Timeout) => self.refuse(Verdict::NoServer),
            Err(error) => Err(self.cannot_move(&error)),
        }
    }

    pub(super) fn refuse(&mut self, verdict: Verdict) -> Result<(), End> {
        self.talk.handle.set_doing(Doing::Idle);
        self.talk.refuse_held(verdict).map_err(|error| self.told(Verdict::Garbage(error)))
    }

    pub(super) fn cannot_move(&self, error: &DialError) -> End {
        tracing::warn!(
            session = self.talk.handle.id,
            error = error as &dyn std::error::Error,
            "session cannot log in again"
        );
        match error {
            DialError::Refused { body, .. } => {
                let mut message = BytesMut::with_capacity(body.len() + 5);
                message.extend_from_slice(b"E");
                message.extend_from_slice(&(body.len() as u32 + 4).to_be_bytes());
                message.extend_from_slice(body);
                End::Passed(message.freeze())
            }
            _ => {
                let text = "terminating connection: the proxy cannot log in to a server again";
                self.talk.shared.metrics.error(ADMIN_SHUTDOWN);
                let fields = ErrorFields::fatal(ADMIN_SHUTDOWN, text).detail(error.to_string());
                End::Told(fields.hint("The request was not executed; reconnect."))
            }
        }
    }
}

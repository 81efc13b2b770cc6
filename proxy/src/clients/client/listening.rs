//! A session that listens and moves: it listens on the new server before anybody may write there
//! through this proxy, and is told that it was moved (docs/safety.md A11).

use std::time::Duration;

use bytes::BytesMut;
use kornak_cluster::discard;
use kornak_protocol::error::{ErrorFields, Severity};
use kornak_protocol::frontend;
use kornak_protocol::sqlstate::SUCCESSFUL_COMPLETION;

use super::Client;
use crate::net::backend::say_good_bye;
use crate::net::backend::{next_frame, put_frame};
use crate::net::stream::write_all;
use crate::pool::link::Link;
use crate::registry::Doing;

/// How long a server that is left may take to say what it has still to say.
const LEAVE_WAIT: Duration = Duration::from_millis(200);

impl Client {
    /// Whether it has to have a server although its client says nothing.
    pub(super) fn must_listen(&self) -> bool {
        self.talk.link.is_none() && self.talk.session.listens() && self.talk.session.is_quiet()
    }

    /// Leaves a server. What it had sent to a session that listens is the client's.
    pub(super) async fn take_leave(&mut self, link: &mut Link) {
        if !self.talk.session.listens() {
            say_good_bye(&mut link.stream);
            return;
        }
        let mut buf = BytesMut::from(&*std::mem::take(&mut link.tail));
        let out = &mut self.talk.to_client;
        let hearing = async {
            let mut bye = BytesMut::new();
            // Answered once everything before it was sent.
            frontend::put_sync(&mut bye);
            write_all(&mut link.stream, &bye).await?;
            loop {
                let frame = next_frame(&mut link.stream, &mut buf).await?;
                match frame.tag {
                    b'A' => put_frame(&frame, out),
                    b'Z' | b'E' => return Ok::<_, crate::net::backend::DialError>(()),
                    _ => {}
                }
            }
        };
        // It may be gone already.
        discard::goes_on_either_way(tokio::time::timeout(LEAVE_WAIT, hearing).await);
        say_good_bye(&mut link.stream);
    }

    /// Notes that the session listens on its new server.
    pub(super) fn listens_again(&mut self) {
        if !self.talk.session.listens() {
            return;
        }
        self.talk.shared.listens_again.notify_waiters();
        self.talk.handle.set_doing(Doing::Idle);
        ErrorFields::new(
            Severity::Notice,
            SUCCESSFUL_COMPLETION,
            "the session was moved to another server and listens there",
        )
        .hint("Notifications that were sent during the switchover may have been missed.")
        .put(&mut self.talk.to_client);
    }
}

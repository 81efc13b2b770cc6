//! Clients that have closed their side: those that wait are not executed, those that have asked get their
//! answers, and whether a client has closed the whole connection or can still read is found out.
//!
//! The kernel does not tell one from the other until something is sent, which a closed connection answers
//! with a reset. So the client is told a parameter that it knows.

use std::time::Duration;

use super::{Client, End};
use crate::clients::forward::{Conversation, Presence, Stop};
use crate::net::stream::HungUp;

/// How often a client that waits, or is owed answers after its last word, is looked at.
const LOOK_PAUSE: Duration = Duration::from_millis(250);

/// After so many looks a client that is there is told something again.
const LOOKS_EACH: u32 = 20;

/// How long a reset may take to come back.
const RESET_WAIT: Duration = Duration::from_millis(250);

/// How often it is looked for meanwhile.
const RESET_PAUSE: Duration = Duration::from_millis(5);

/// Completes when the client has closed its side.
pub(super) async fn hangs_up(talk: &Conversation) {
    loop {
        tokio::time::sleep(LOOK_PAUSE).await;
        if talk.has_hung_up() {
            return;
        }
    }
}

impl Client {
    /// The client, whose request waits, has closed its side: if all of it, nothing is executed any more.
    pub(super) async fn hung_up(&mut self) -> Result<(), End> {
        if self.talk.client.hung_up() == HungUp::Whole || self.has_left().await {
            if let Some(member) = &mut self.talk.member {
                member.withdraw();
            }
            return Err(End::Gone);
        }
        self.talk.presence = Presence::Listens;
        Ok(())
    }

    /// Whether nobody is there who could read an answer.
    async fn has_left(&mut self) -> bool {
        if !self.talk.tell_something_known() {
            return false;
        }
        let told = std::mem::take(&mut self.talk.to_client);
        let looking = async {
            if crate::net::stream::write_all(&mut self.talk.client, &told).await.is_err() {
                return;
            }
            while self.talk.client.hung_up() != HungUp::Whole {
                tokio::time::sleep(RESET_PAUSE).await;
            }
        };
        tokio::time::timeout(RESET_WAIT, looking).await.is_ok()
    }

    /// Serves a client that says nothing more until it has its answers, or is not there to get them.
    pub(super) async fn depart(&mut self) -> Stop {
        let mut due = 0;
        loop {
            if let Ok(stop) = tokio::time::timeout(LOOK_PAUSE, self.forward()).await {
                return stop;
            }
            if self.talk.client.hung_up() == HungUp::Whole {
                return Stop::ClientGone;
            }
            // Written with the next poll.
            due = match due {
                0 if self.talk.tell_something_known() => LOOKS_EACH,
                left => u32::saturating_sub(left, 1),
            };
        }
    }
}

//! Questions to a session whose client leaves, or that gives its connection up.

use kornak_protocol::frame::Seen;
use kornak_protocol::pipeline::{Loss, Sent};

use super::Session;
use super::malformed::is_ignored;

impl Session {
    /// Whether the server would ignore this message: what is left of a COPY that is over, and Flush
    /// when nothing is owed.
    #[inline]
    pub fn ignores(&self, seen: &Seen<'_>) -> bool {
        is_ignored(seen) && self.is_quiet()
    }

    /// Whether the server answers what it was sent without another word of the client.
    pub fn will_answer(&self) -> bool {
        self.pipeline.will_answer()
    }

    /// Whether the server waits for the client's COPY data.
    pub fn is_copying_in(&self) -> bool {
        self.pipeline.copy().swallows_sync()
    }

    /// Whether both sides stream, as in replication: no transaction, but without an end.
    #[inline]
    pub fn is_streaming(&self) -> bool {
        self.pipeline.is_streaming()
    }

    /// Whether anything is in flight.
    pub fn in_flight(&self) -> bool {
        self.pipeline.in_flight()
    }

    /// Whether what is in flight cannot commit anything, so that it may be cancelled.
    pub fn cannot_commit(&self) -> bool {
        self.pipeline.in_flight() && self.pipeline.loss() == Loss::Retry
    }

    /// Whether no request may be forwarded before it is settled how many answers are owed.
    #[inline]
    pub fn must_settle(&self) -> bool {
        self.pipeline.must_settle()
    }

    /// Whether a marker would settle that now.
    #[inline]
    pub fn is_doubtful(&self) -> bool {
        self.pipeline.is_doubtful()
    }

    /// Notes that a marker was sent: a Close of a statement that nobody has, and Sync.
    pub fn marked(&mut self) {
        self.pipeline.sent(Sent::Marker);
    }

    /// The client has gone behind what it has asked: the server was told so.
    pub fn terminated(&mut self) {
        self.pipeline.sent(Sent::Terminate);
    }

    /// Whether DISCARD ALL takes away whatever it holds.
    pub fn may_be_discarded(&self) -> bool {
        !self.pipeline.is_lost() && self.journal.may_be_discarded()
    }
}

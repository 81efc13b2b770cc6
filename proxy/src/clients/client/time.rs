//! Ends or warns a client that has exceeded a limit of time.

use std::time::Instant;

use super::{Client, End};
use crate::clients::serve::patience::{self, Verdict};

impl Client {
    /// Looks whether a bound of the client's time is reached.
    pub(super) fn look_at_time(&mut self) -> Result<(), End> {
        let now = Instant::now();
        let verdict = patience::look(&self.talk.shared.settings().limits, &self.talk.times(), now);
        match verdict {
            Verdict::LookAt(next) => {
                self.talk.handle.set_next_look(next);
                Ok(())
            }
            Verdict::Ends(why) => {
                let fields = why.fields();
                self.talk.shared.metrics.error(fields.sqlstate);
                Err(End::Told(fields))
            }
        }
    }
}

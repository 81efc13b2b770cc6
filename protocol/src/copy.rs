//! The COPY sub-protocol: which side streams, and whether the client has finished.
//!
//! While a server copies in, it ignores Flush and Sync, and takes anything but CopyData,
//! CopyDone and CopyFail for an error (`CopyGetData` of `src/backend/commands/copyfromparse.c`).
//! [`crate::pipeline`] leans on this to know how many answers are owed.
//!
//! Flow: `/docs/current/protocol-flow.html#PROTOCOL-COPY`.

/// Where a COPY stands.
///
/// ```text
/// None ── G ──► In { client_done: false } ── CopyDone, CopyFail ──► In { client_done: true }
///      ── H ──► Out                                │ C or E                │ C or E
///      ── W ──► Both                               ▼                       ▼
///        all back to None with the command's CommandComplete or ErrorResponse
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum CopyState {
    /// No COPY runs.
    #[default]
    None,
    /// `COPY … FROM STDIN`: the client streams.
    In {
        /// Whether the client has sent CopyDone or CopyFail.
        client_done: bool,
    },
    /// `COPY … TO STDOUT`: the server streams.
    Out,
    /// Replication: both stream. Such a session is never moved.
    Both {
        /// The client has sent CopyDone.
        client_done: bool,
    },
}

impl CopyState {
    /// The state that a server's message opens: `G`, `H` or `W`.
    pub fn opened_by(tag: u8) -> Option<Self> {
        match tag {
            b'G' => Some(Self::In { client_done: false }),
            b'H' => Some(Self::Out),
            b'W' => Some(Self::Both { client_done: false }),
            _ => None,
        }
    }

    /// Whether a COPY runs.
    pub fn is_active(self) -> bool {
        self != Self::None
    }

    /// Whether the server takes what the client sends for the COPY's data: Sync and Flush are
    /// then ignored.
    pub fn swallows_sync(self) -> bool {
        matches!(self, Self::In { client_done: false } | Self::Both { client_done: false })
    }

    /// The client has sent CopyDone or CopyFail.
    pub fn client_finished(&mut self) {
        match self {
            Self::In { client_done } | Self::Both { client_done } => *client_done = true,
            Self::None | Self::Out => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn syncs_are_swallowed_until_the_client_has_finished() {
        for tag in [b'G', b'W'] {
            let mut state = CopyState::opened_by(tag).unwrap();
            assert!(state.swallows_sync());
            state.client_finished();
            assert!(state.is_active() && !state.swallows_sync());
        }
        let out = CopyState::opened_by(b'H').unwrap();
        assert!(out.is_active() && !out.swallows_sync());
        assert_eq!(CopyState::opened_by(b'C'), None);
    }
}

//! The journal of a session whose server connections change hands: what a connection must be told to
//! fit, and what a server says of the session when it is asked.

use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use kornak_protocol::frontend::{self, StatementKind};
use kornak_protocol::pipeline::Fate;

use super::{Journal, MAX_SETTINGS, Pin, Settings, Statement, remembered};
use crate::pool::statements::{Content, Statements};

/// What a server says that a session holds.
#[derive(Debug)]
pub struct Examined<'a> {
    pub locks: bool,
    pub temporary: bool,
    pub listens: bool,
    /// How many channels, `\x02` and their names, separated by `\x01`.
    pub channels: &'a [u8],
    pub prepared: bool,
    pub hold_cursor: bool,
    /// Name, `\x02` and the statement that sets it again, separated by `\x01`.
    pub settings: &'a [u8],
    /// Nobody else's authorization was taken on.
    pub is_itself: bool,
}

impl Journal {
    /// Of a session whose connections change hands; `base` is set from the beginning.
    pub fn pooled(statements: Statements, base: Settings) -> Self {
        let settings = base.clone();
        Self { statements: Some(Box::new(statements)), base, settings, ..Self::default() }
    }

    /// Content of a statement, to be shared.
    pub(in crate::session) fn content(parse: frontend::ParseMessage<'_>, body: Bytes) -> Content {
        let statement = Statement::of(parse.sql, parse.is_whole);
        let is_temp = statement.kind == StatementKind::CreateTemp;
        let is_opaque = !is_temp && frontend::may_touch_session_state(parse.sql);
        Content {
            body,
            statement,
            note: remembered(statement, parse.sql, parse.is_whole),
            is_opaque,
        }
    }

    /// A Bind of a shared statement is forwarded, or of one that the server will not know.
    pub(in crate::session) fn bind_content(
        &mut self,
        portal: &[u8],
        content: Option<&Arc<Content>>,
    ) {
        let bound = match content {
            None => (Statement::UNKNOWN, None),
            Some(content) => {
                if content.is_opaque {
                    self.opaque(&content.body, true);
                }
                if content.statement.kind == StatementKind::CreateTemp
                    && content.statement.fate == Fate::Unknown
                {
                    self.pins.add(Pin::Temporary);
                }
                (content.statement, content.note.clone())
            }
        };
        self.bind_as(portal, bound);
    }

    /// What is set; `None` if the server connection may hold something else.
    pub fn settings(&mut self) -> Option<&Settings> {
        match std::mem::take(&mut self.unfit) {
            true => None,
            false => Some(&self.settings),
        }
    }

    /// The server connection holds `settings` for certain.
    pub fn made_fit(&mut self) -> Settings {
        self.unfit = false;
        self.settings.clone()
    }

    /// Whether a connection on which this is set needs to be told anything.
    #[inline]
    pub fn fits(&self, there: Option<&Settings>) -> bool {
        there.is_some_and(|there| *there == self.settings)
    }

    /// Appends what makes a connection fit on which this is set, each as a query of its own, and
    /// answers how many ReadyForQuery that makes.
    pub fn put_fit(&self, there: Option<&Settings>, out: &mut BytesMut) -> usize {
        let mut owed = 0;
        let mut tell = |text: &[u8]| {
            if frontend::put_query(text, out).is_ok() {
                owed += 1;
            }
        };
        let wanted = |name: &[u8]| self.settings.iter().any(|(known, _)| **known == *name);
        let known = there.filter(|there| there.iter().all(|(name, _)| wanted(name)));
        if known.is_none() {
            for text in [&b"RESET SESSION AUTHORIZATION"[..], b"RESET ROLE", b"RESET ALL"] {
                tell(text);
            }
        }
        for setting in &self.settings {
            if known.is_none_or(|known| !known.contains(setting)) {
                tell(&setting.1);
            }
        }
        owed
    }

    /// Whether something was done since the last call that may change what pins.
    pub fn take_doubt(&mut self) -> bool {
        std::mem::take(&mut self.pins.1)
    }

    /// The server has said what the session holds.
    pub fn examined(&mut self, found: &Examined<'_>) {
        let moves = self.adopt_channels(found.channels);
        self.cursors.examined(found.hold_cursor);
        let pins = [
            (Pin::Advisory, found.locks),
            (Pin::Temporary, found.temporary),
            (Pin::Listen, found.listens && !moves),
            (Pin::SqlPrepare, found.prepared),
            (Pin::HoldCursor, found.hold_cursor),
        ];
        for (pin, held) in pins {
            if held {
                self.pins.add(pin);
            } else {
                self.pins.remove(pin);
            }
        }
        if found.is_itself && self.adopt(found.settings) {
            self.pins.remove(Pin::Setting);
            if !found.locks && !self.unseen {
                self.pins.remove(Pin::Opaque);
            }
        }
        self.pins.1 = false;
    }

    fn adopt_channels(&mut self, channels: &[u8]) -> bool {
        self.channels_move && self.channels.adopt(channels)
    }

    /// Takes over what a server says is set. Answers false if that is too much.
    fn adopt(&mut self, settings: &[u8]) -> bool {
        let mut found = Settings::new();
        for item in settings.split(|byte| *byte == 1).filter(|item| !item.is_empty()) {
            let Some(at) = memchr::memchr(2, item) else { return false };
            let (name, text) = item.split_at_checked(at).unwrap_or_default();
            if found.len() >= MAX_SETTINGS {
                return false;
            }
            // As statements name it; servers write some with capitals.
            let name = name.to_ascii_lowercase().into();
            found.push((name, Bytes::copy_from_slice(text.get(1..).unwrap_or_default())));
        }
        self.settings = found;
        true
    }
}

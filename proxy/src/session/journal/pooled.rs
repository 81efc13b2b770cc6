//! The journal of a session whose server connections change hands: what a connection must be told to
//! fit, and what a server says of the session when it is asked.

use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::Relaxed;

use bytes::{Bytes, BytesMut};
use kornak_protocol::frontend::{self, StatementKind};
use kornak_protocol::pipeline::Fate;

use super::context::Context;
use super::settings::AUTHORIZATION;
use super::{Bound, Journal, MAX_SETTINGS, Pin, Settings, Statement, custom, remembered};
use crate::sabotage::{self, Sabotage};
use crate::session::statements::{Content, Statements};

/// A server's answer about what a session holds.
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
    /// Whose authorization was taken on, if it is not the session's own; empty if that is not known.
    pub acts_as: Option<&'a [u8]>,
}

impl Journal {
    /// Of a session whose connections change hands; `base` is set from the beginning.
    pub fn pooled(statements: Statements, base: Settings) -> Self {
        static LAST: AtomicU64 = AtomicU64::new(0);
        let settings = base.clone();
        let id = LAST.fetch_add(1, Relaxed) + 1;
        let mut context = Context::default();
        context.settle(&settings);
        Self {
            statements: Some(Box::new(statements)),
            base,
            settings,
            context,
            id,
            ..Self::default()
        }
    }

    /// Content of a statement, to be shared.
    pub(in crate::session) fn content(parse: frontend::ParseMessage<'_>, body: Bytes) -> Content {
        let statement = Statement::of(parse.sql, parse.is_whole);
        let is_temp = statement.kind == StatementKind::CreateTemp;
        let is_opaque = !is_temp
            && (statement.kind == StatementKind::Do
                || frontend::may_touch_session_state(parse.sql));
        let calls = statement.kind == StatementKind::Call || frontend::calls_unknown(parse.sql);
        Content {
            body,
            statement,
            note: remembered(statement, parse.sql, parse.is_whole),
            is_opaque,
            calls,
        }
    }

    /// A Bind of a shared statement is forwarded, or of one that the server will not know. `retag`: its
    /// execution is answered as DEALLOCATE.
    pub(in crate::session) fn bind_content(
        &mut self,
        portal: &[u8],
        content: Option<&Arc<Content>>,
        retag: bool,
    ) {
        let bound = match content {
            None => {
                // A long one, of which not all was seen.
                self.calls();
                Bound::UNKNOWN
            }
            Some(content) => {
                if content.is_opaque || content.calls {
                    self.suspect(content);
                }
                if content.statement.kind == StatementKind::CreateTemp
                    && content.statement.fate == Fate::Unknown
                {
                    self.pins.add(Pin::Temporary);
                }
                let Content { statement, note, .. } = &**content;
                Bound { statement: *statement, note: note.clone(), retag }
            }
        };
        self.bind_as(portal, bound);
    }

    #[cold]
    fn suspect(&mut self, content: &Content) {
        let sql = frontend::query_prefix(&content.body).0;
        if content.is_opaque && !custom::is_of_transaction(sql) {
            self.opaque(sql, true);
            if content.statement.kind == StatementKind::Do {
                self.note_executed(sql);
            }
        } else if content.is_opaque && custom::reads_otherwise(sql) {
            self.blur();
        }
        if content.calls {
            self.calls();
        }
    }

    /// Parse or Bind is forwarded: what settings its text is read with.
    #[inline]
    pub(in crate::session) fn context(&self) -> u64 {
        self.context.number()
    }

    /// Whether functions may have left something in the session of which the server was not asked.
    #[inline]
    pub fn must_be_asked(&self) -> bool {
        self.called && !sabotage::is(Sabotage::Functions)
    }

    /// The server did not say what the session holds.
    pub fn not_examined(&mut self) {
        self.pins.add(Pin::Opaque);
        self.called = false;
        self.pins.1 = false;
    }

    /// Notes that the session's last statement that is too long to be kept was closed.
    pub(in crate::session) fn closed_long(&mut self) {
        self.pins.remove(Pin::LongStatement);
    }

    /// Whether what the session is told of itself is not so on its connection.
    pub fn is_unfit(&self) -> bool {
        self.unfit
    }

    /// Whether a RESET took a parameter, which the client has from its login, from the connection, and nothing that was
    /// answered since has set it.
    pub fn was_reset(&self, name: &[u8]) -> bool {
        self.block.resets(name).unwrap_or_else(|| {
            self.unfit && self.base.iter().any(|it| *it.0 == *name && self.settings.contains(it))
        })
    }

    /// Appends what the session began with and has again, as queries; answers how many.
    pub fn put_base(&mut self, out: &mut BytesMut) -> usize {
        self.unfit = false;
        let base = self.base.iter().filter(|setting| self.settings.contains(setting));
        base.filter(|(_, text)| frontend::put_query(text, out).is_ok()).count()
    }

    /// The settings of the session; `None` if the server connection may hold something else.
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
    pub fn fits(&self, there: Option<&Settings>, left_by: Option<u64>) -> bool {
        left_by.is_none_or(|id| id == self.id) && there.is_some_and(|there| *there == self.settings)
            || sabotage::is(Sabotage::Settings)
    }

    /// Whose functions may have left something on a connection that had this, now that the session
    /// gives it back, or has made it fit.
    pub fn left_by(&mut self, before: Option<u64>) -> Option<u64> {
        let mine = std::mem::take(&mut self.leftovers) || before == Some(self.id);
        mine.then_some(self.id).filter(|_| !sabotage::is(Sabotage::Untraced))
    }

    /// Appends what makes a connection fit on which this is set, each as a query of its own, and
    /// answers how many ReadyForQuery that makes.
    pub fn put_fit(
        &self,
        there: Option<&Settings>,
        left_by: Option<u64>,
        out: &mut BytesMut,
    ) -> usize {
        let mut owed = 0;
        let mut tell = |text: &[u8]| {
            if frontend::put_query(text, out).is_ok() {
                owed += 1;
            }
        };
        let wanted = |name: &[u8]| self.settings.iter().any(|(known, _)| **known == *name);
        // Who the session acts as decides what it may set, and in which order.
        let acts = |list: &Settings| {
            list.iter().any(|(name, _)| **name == *b"role" || **name == *AUTHORIZATION)
        };
        let known = there
            .filter(|there| there.iter().all(|(name, _)| wanted(name)))
            .filter(|there| !acts(there) && !acts(&self.settings))
            .filter(|_| left_by.is_none_or(|id| id == self.id));
        if known.is_none() && !sabotage::is(Sabotage::Leftovers) {
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

    /// Whether [`Journal::take_doubt`] would answer that.
    pub fn has_doubt(&self) -> bool {
        self.pins.1
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
        if self.adopt(found.acts_as, found.settings) {
            self.pins.remove(Pin::Setting);
            if !found.locks && !self.unseen {
                self.pins.remove(Pin::Opaque);
            }
            self.context.settle(&self.settings);
        } else {
            self.pins.add(Pin::Setting);
        }
        self.called = false;
        self.pins.1 = false;
    }

    fn adopt_channels(&mut self, channels: &[u8]) -> bool {
        self.channels_move && self.channels.adopt(channels)
    }

    /// Takes over what a server says is set. Answers false if that is too much.
    fn adopt(&mut self, acts_as: Option<&[u8]>, settings: &[u8]) -> bool {
        let mut found = Settings::new();
        if let Some(role) = acts_as {
            let mut text = b"SET SESSION AUTHORIZATION \"".to_vec();
            for byte in role {
                if *byte == b'"' {
                    text.push(*byte);
                }
                text.push(*byte);
            }
            text.push(b'"');
            found.push((AUTHORIZATION.into(), text.into()));
        }
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

//! Statements of the protocol that SQL names: `DEALLOCATE s1`, `EXECUTE s1(1)`, `PREPARE s1 AS …`.
//!
//! The server knows them under our names. DEALLOCATE must not take a statement from others that share it:
//! a statement that does nothing is sent in its place, which fails where DEALLOCATE would fail (in a block that
//! has failed), and is answered as DEALLOCATE.

use std::collections::HashSet;
use std::sync::Arc;

use kornak_protocol::frontend::{self, StatementKind, statement_kind};
use kornak_protocol::pipeline::Fate;

use super::prepared::Key;
use super::wire::name_of;
use super::{Change, Content, Injected, Meaning, PREFIX, Statements};
use crate::sabotage::{self, Sabotage};
use crate::session::journal::{Named, executed, prepared};

/// As short as the shortest DEALLOCATE, so that positions in what follows stay what they are.
const NOTHING: &[u8] = b"UNLISTEN _k0";

/// The message of ours that may be put in front of a statement.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Front {
    #[default]
    Nothing,
    /// A batch of its own, whose error is not the client's.
    Batch,
    /// A message of the client's batch.
    Message,
}

/// The text for the server in place of a statement that names another one.
#[derive(Debug, PartialEq, Eq)]
pub struct Rewritten {
    pub text: Vec<u8>,
    /// The mark that the statement's answer confirms; 0 for none.
    pub mark: u32,
    /// The statement is answered as DEALLOCATE.
    pub retag: bool,
}

impl Statements {
    /// A statement of a Query is forwarded. `None`: as it is. What has to be there first is appended to `out`.
    pub fn by_sql(
        &mut self,
        text: &[u8],
        front: Front,
        injected: &mut Vec<Injected>,
        out: &mut Vec<u8>,
    ) -> Option<Rewritten> {
        let kind = statement_kind(text);
        if kind == StatementKind::Deallocate {
            let is_ours = self.is_ours(text);
            let mark = self.deallocate(text);
            return is_ours.then(|| Rewritten { text: nothing(text), mark, retag: true });
        }
        let (name, span) = match kind {
            StatementKind::Execute | StatementKind::Prepare => {
                let (Named::One(name), span) = prepared(text)? else { return None };
                (name, span)
            }
            _ => executed(text)?,
        };
        let meaning = self.names.get(&name).filter(|_| self.has(&name))?;
        let key = (meaning.context, meaning.content.body.clone());
        let number = match self.find(&key) {
            Some(number) => number,
            None if front == Front::Nothing => return None,
            None => {
                let number = self.present(&name, injected, out);
                if let (Front::Batch, Some(Injected::Parse(mark)), Some(ahead)) =
                    (front, injected.last_mut(), self.ahead.back_mut())
                {
                    *mark |= super::SILENT;
                    ahead.mark = *mark;
                }
                number
            }
        };
        self.executed = Some((number, name));
        let mut edited = text.get(..span.start)?.to_vec();
        edited.push(b'"');
        edited.extend_from_slice(&name_of(number));
        edited.push(b'"');
        edited.extend_from_slice(text.get(span.end..)?);
        Some(Rewritten { text: edited, mark: 0, retag: false })
    }

    /// Whether executing a statement drops one of the protocol's, so that the server is told something that does
    /// nothing, answered as DEALLOCATE. At each Bind anew: the next time the name may mean another or nothing.
    pub fn is_retagged(&self, content: &Content) -> bool {
        let statement = content.statement;
        statement.kind == StatementKind::Deallocate
            && statement.fate != Fate::Unknown
            && self.is_ours(frontend::query_prefix(&content.body).0)
    }

    /// The number under which the connection has what stands in place of a statement that names another, as
    /// long as that means one of the protocol's.
    pub(super) fn in_place_of(
        &mut self,
        name: &[u8],
        injected: &mut Vec<Injected>,
        out: &mut Vec<u8>,
    ) -> Option<u32> {
        let content = Arc::clone(self.get(name)?);
        let statement = content.statement;
        let sql = frontend::query_prefix(&content.body).0;
        let types = content.body.get(sql.len()..)?;
        let body = match statement.kind {
            StatementKind::Deallocate if self.is_retagged(&content) => {
                [&nothing(sql), types].concat()
            }
            StatementKind::Execute | StatementKind::Prepare if statement.fate != Fate::Unknown => {
                [&self.by_sql(sql, Front::Message, injected, out)?.text, types].concat()
            }
            _ => return None,
        };
        Some(self.present_text(&body.into(), injected, out))
    }

    /// Whether a DEALLOCATE names a statement that was prepared by the protocol, or one of ours.
    pub fn is_ours(&self, text: &[u8]) -> bool {
        match prepared(text) {
            Some(_) if sabotage::is(Sabotage::Deallocate) => false,
            Some((Named::One(name), _)) => {
                !self.by_sql.contains(&name)
                    && (self.has(&name) || name.starts_with(PREFIX.as_bytes()))
            }
            _ => false,
        }
    }

    /// A DEALLOCATE is executed: the name is the client's no more if it succeeds. Answers the mark of
    /// that, 0 for none.
    pub fn deallocate(&mut self, text: &[u8]) -> u32 {
        let Some((Named::One(name), _)) = prepared(text) else { return 0 };
        if !self.has(&name) || self.by_sql.contains(&name) {
            return 0;
        }
        let before = self.set(name.clone(), None);
        self.mark(0, Change::Name { name, before, sent: None })
    }

    /// Notes that a statement that drops all statements is forwarded: for what follows in its
    /// batch, earlier ones are gone.
    pub fn drop_all(&mut self) {
        self.dropping = Some(self.batch);
        self.made_since.clear();
    }

    /// Notes that a statement that drops all statements was answered.
    pub fn dropped_all(&mut self) {
        self.dropping = None;
        self.made_since = HashSet::new();
    }

    /// Whether the client has a statement of this name, if what was forwarded comes true.
    pub(super) fn has(&self, name: &[u8]) -> bool {
        self.names.contains_key(name) && (self.dropping.is_none() || self.made_since.contains(name))
    }

    /// SQL's PREPARE is executed by a message of the batch. What the batch says behind it is heard only if it has
    /// succeeded.
    pub fn prepares(&mut self, text: &[u8]) {
        self.named_by_sql();
        if let Some((Named::One(name), _)) = prepared(text) {
            self.preparing = Some(name);
        }
    }

    /// Whether a message of this batch has SQL's PREPARE make this name, as the last one that it makes or drops.
    pub(super) fn is_preparing(&self, name: &[u8]) -> bool {
        self.preparing.as_deref() == Some(name)
    }

    /// SQL's PREPARE has made a statement.
    pub fn prepared_by_sql(&mut self, text: &[u8]) {
        if let Some((Named::One(name), _)) = prepared(text) {
            self.by_sql.insert(name);
        }
    }

    /// A DEALLOCATE that the server has executed as it was.
    pub fn deallocated_by_sql(&mut self, text: &[u8]) {
        if let Some((Named::One(name), _)) = prepared(text) {
            self.by_sql.remove(&name);
            self.long.remove(&name);
        }
    }

    /// Whether statements are there that are too long to be kept.
    pub fn has_long(&self) -> bool {
        !self.long.is_empty()
    }

    /// An error or notice with the client's names in place of ours; `None` if there are none of ours in it.
    pub fn with_own_names(&self, body: &[u8]) -> Option<Vec<u8>> {
        let prefix = PREFIX.as_bytes();
        memchr::memmem::find(body, prefix).filter(|_| !sabotage::is(Sabotage::Names))?;
        let mut out = Vec::with_capacity(body.len());
        let mut rest = body;
        while let Some(at) = memchr::memmem::find(rest, prefix) {
            let (before, ours) = rest.split_at_checked(at)?;
            let digits = ours.get(prefix.len()..)?;
            let len = digits.iter().take_while(|byte| byte.is_ascii_digit()).count();
            let (digits, after) = digits.split_at_checked(len)?;
            let number = std::str::from_utf8(digits).ok().and_then(|it| it.parse().ok());
            let (name, before, after) = match (number.unwrap_or(0), &self.nobody) {
                (0, Some(name)) => (Some(name.to_vec()), before, after),
                (0, None) => {
                    // As the server says it of the unnamed statement.
                    let before = before.strip_suffix(b"prepared statement \"").unwrap_or(before);
                    let after = after.strip_prefix(b"\"").unwrap_or(after);
                    (Some(b"unnamed prepared statement".to_vec()), before, after)
                }
                (number, _) => (self.name_of_number(number), before, after),
            };
            out.extend_from_slice(before);
            match name {
                Some(name) => out.extend_from_slice(&name),
                None => {
                    out.extend_from_slice(prefix);
                    out.extend_from_slice(digits);
                }
            }
            rest = after;
        }
        out.extend_from_slice(rest);
        Some(out)
    }

    /// Numbers of ours in an error.
    pub fn numbers_in(body: &[u8]) -> impl Iterator<Item = u32> {
        memchr::memmem::find_iter(body, PREFIX.as_bytes()).filter_map(|at| {
            let digits = body.get(at + PREFIX.len()..)?;
            let len = digits.iter().take_while(|byte| byte.is_ascii_digit()).count();
            std::str::from_utf8(digits.get(..len)?).ok()?.parse().ok()
        })
    }

    fn name_of_number(&self, number: u32) -> Option<Vec<u8>> {
        if let Some((executed, name)) = &self.executed
            && *executed == number
        {
            return Some(name.to_vec());
        }
        if let Some((_, name)) = self.named.iter().rev().find(|(known, _)| *known == number) {
            return Some(name.to_vec());
        }
        let known = &self.server.as_ref()?.known;
        let (key, _) = known.iter().find(|(_, entry)| entry.number == number)?;
        self.name_of_key(key).map(<[u8]>::into_vec)
    }

    /// The client's name of what the connection knows by this.
    pub(super) fn name_of_key(&self, key: &Key) -> Option<Box<[u8]>> {
        let is_it = |meaning: &Meaning| meaning.content.body == key.1 && meaning.context == key.0;
        let theirs = self.names.iter().find(|(_, meaning)| is_it(meaning)).map(|(name, _)| name);
        // A Close or DEALLOCATE of it may have been forwarded since.
        let before = self.ahead.iter().find_map(|ahead| match &ahead.change {
            Change::Name { name, before: Some(meaning), .. } if is_it(meaning) => Some(name),
            _ => None,
        });
        before.or(theirs).cloned()
    }
}

/// A statement that does nothing, as long as this one.
fn nothing(text: &[u8]) -> Vec<u8> {
    let mut nothing = NOTHING.to_vec();
    nothing.resize(text.len().max(NOTHING.len()), b' ');
    nothing
}

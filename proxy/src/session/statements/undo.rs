//! Changes that were made ahead of the server's answers and did not come true, and what a client drops all
//! at once.

use std::collections::{HashSet, VecDeque};
use std::sync::Arc;

use super::batches::is_past;
use super::prepared::Entry;
use super::{Ahead, Change, Content, Meaning, Sent, Statements};

impl Statements {
    /// The client has dropped all of its statements by SQL; the connection's are gone with them. What was
    /// forwarded behind that is not answered yet, and stands.
    pub fn forget_all(&mut self) {
        let mut numbers = HashSet::new();
        let mut names: HashSet<Box<[u8]>> = HashSet::new();
        for ahead in &mut self.ahead {
            match &mut ahead.change {
                Change::Name { name, before, sent } => {
                    if names.insert(name.clone()) {
                        *before = None;
                    }
                    if let Some(sent) = sent {
                        sent.replaced = None;
                        numbers.insert(sent.number);
                    }
                }
                Change::Sent(sent) => {
                    sent.replaced = None;
                    numbers.insert(sent.number);
                }
                _ => {}
            }
        }
        let gone: Vec<_> =
            self.names.keys().filter(|name| !names.contains(*name)).cloned().collect();
        for name in gone {
            let meaning = self.set(name.clone(), None);
            let known = self.server.as_ref().map(|server| &server.known);
            let entry = meaning.zip(known).and_then(|(meaning, known)| {
                known.get(&(meaning.context, meaning.content.body.clone()))
            });
            self.named.extend(entry.map(|entry| (entry.number, name)));
        }
        self.long.clear();
        self.by_sql.clear();
        self.unnamed_there &=
            self.ahead.iter().any(|it| matches!(it.change, Change::Unnamed { .. }));
        if let Some(server) = &mut self.server {
            server.known.retain(|_, entry| numbers.contains(&entry.number));
            server.to_close.clear();
        }
    }

    /// Takes back what batches before this one did not confirm.
    pub(super) fn undo_until(&mut self, batch: u32) {
        let n = self.ahead.iter().take_while(|ahead| is_past(ahead.batch, batch)).count();
        for at in (0..n).rev() {
            let Some(Ahead { change, .. }) = self.ahead.remove(at) else { continue };
            match change {
                Change::Name { name, before, sent } => {
                    if let Some(sent) = sent {
                        self.undo_sent(sent);
                    }
                    self.undo_name(at, name, before);
                }
                Change::Unnamed { before, there, .. } => self.undo_unnamed(at, before, there),
                Change::Sent(sent) => self.undo_sent(sent),
                Change::Refused { .. } | Change::TooMuch | Change::Raw { .. } => {}
                Change::Closed { number } => {
                    if let Some(server) = &mut self.server {
                        server.to_close.push(number);
                    }
                }
            }
        }
    }

    fn undo_unnamed(&mut self, from: usize, before: Option<Arc<Content>>, there: bool) {
        let later = self.ahead.iter_mut().skip(from).find_map(|ahead| match &mut ahead.change {
            Change::Unnamed { before, there, .. } => Some((before, there)),
            _ => None,
        });
        match later {
            Some((theirs, is_there)) => (*theirs, *is_there) = (before, there),
            None => (self.unnamed, self.unnamed_there) = (before, there),
        }
    }

    fn undo_sent(&mut self, sent: Sent) {
        let Some(server) = &mut self.server else { return };
        if server.known.get(&sent.key).is_some_and(|entry| entry.number == sent.number) {
            server.known.remove(&sent.key);
            if let Some(entry) = sent.replaced {
                server.known.insert(sent.key, entry);
            }
            return;
        }
        // A later one stands in its place, and takes that of what this one would have replaced.
        let later = self.ahead.iter_mut().find_map(|ahead| sent_of(ahead, sent.number));
        match later {
            Some(theirs) => theirs.replaced = sent.replaced,
            None => server.to_close.extend(sent.replaced.map(|entry| entry.number)),
        }
    }

    /// A later batch that changed the same name did so on top of what never was.
    fn undo_name(&mut self, from: usize, name: Box<[u8]>, before: Option<Meaning>) {
        let later = self.ahead.iter_mut().skip(from).find_map(|ahead| match &mut ahead.change {
            Change::Name { name: theirs, before, .. } if *theirs == name => Some(before),
            _ => None,
        });
        match later {
            Some(theirs) => *theirs = before,
            None => {
                self.set(name, before);
            }
        }
    }
}

/// The text that was sent in place of the one with this number.
fn sent_of(ahead: &mut Ahead, number: u32) -> Option<&mut Sent> {
    match &mut ahead.change {
        Change::Name { sent: Some(sent), .. } | Change::Sent(sent) => {
            sent.replaced.as_ref().is_some_and(|entry| entry.number == number).then_some(sent)
        }
        _ => None,
    }
}

/// The entry of this number that a later one stands in for.
pub(super) fn standing_in(ahead: &mut VecDeque<Ahead>, number: u32) -> Option<&mut Entry> {
    ahead.iter_mut().find_map(|ahead| sent_of(ahead, number))?.replaced.as_mut()
}

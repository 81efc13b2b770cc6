//! A transaction whose server is gone, answered by the proxy until the client ends it.
//!
//! ```text
//! Untold ── any request: 40001 ──► Told ── ROLLBACK, COMMIT ──► over
//!    └───── ROLLBACK: tag ROLLBACK, no error needed ─────────────┘
//! ```
//! Every statement until then gets 40001: drivers swallow errors of statements of their own (a
//! DEALLOCATE, a RELEASE), and a caller has to see that the whole is to be run again. A transaction that had
//! failed by its client's own fault gets 25P02, as from PostgreSQL. ROLLBACK TO and AND CHAIN must not
//! revive it (docs/safety.md A10).

use bytes::BytesMut;
use kornak_cluster::discard;
use kornak_protocol::backend;
use kornak_protocol::frame::Seen;
use kornak_protocol::frontend::{self, Target};
use kornak_protocol::pipeline::Fate;
use kornak_protocol::txn::TransactionStatus::{Failed, Idle};

use super::answers::Verdict;
use super::journal::Journal;
use super::malformed::put_malformed;

/// A dead transaction.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeadTransaction {
    told: bool,
    /// The verdict that every statement gets.
    again: Verdict,
    /// An error was answered in this batch: everything is ignored until its Sync.
    skipping: bool,
    /// The batch has executed the transaction's end.
    ended: bool,
    /// The fate of a transaction if the unnamed portal is executed.
    portal: Fate,
}

/// The effect of a message in a dead transaction.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum After {
    /// Still dead.
    Stay,
    /// The client has ended it: the session is idle.
    Over,
}

impl DeadTransaction {
    /// `told`: the client has had its error already; `again` is what its next statements are told.
    pub fn new(told: bool, skipping: bool, again: Verdict) -> Self {
        Self { told, again, skipping, ended: false, portal: Fate::Unknown }
    }

    /// Answers one message. The second value counts errors.
    pub fn on(
        &mut self,
        seen: &Seen<'_>,
        journal: &mut Journal,
        out: &mut BytesMut,
    ) -> (After, Option<Verdict>) {
        if frontend::is_malformed(seen) && (seen.tag == b'S' || !self.skipping) {
            self.skipping = put_malformed(seen.tag, Failed, out);
            return (After::Stay, Some(Verdict::Malformed));
        }
        match seen.tag {
            b'S' => {
                self.skipping = false;
                let status = if self.ended { Idle } else { Failed };
                backend::put_ready_for_query(status, out);
                (if self.ended { After::Over } else { After::Stay }, None)
            }
            _ if self.skipping => (After::Stay, None),
            b'Q' => self.query(seen, out),
            b'F' => {
                let error = self.refuse(self.again, out);
                backend::put_ready_for_query(Failed, out);
                (After::Stay, Some(error))
            }
            _ => (After::Stay, self.extended(seen, journal, out)),
        }
    }

    fn query(&mut self, seen: &Seen<'_>, out: &mut BytesMut) -> (After, Option<Verdict>) {
        let (sql, is_whole) = frontend::query_prefix(seen.body);
        let fate = if is_whole { frontend::fate_of(sql) } else { Fate::Unknown };
        let ends = match fate {
            Fate::RollsBack => true,
            Fate::Commits => self.told,
            _ => false,
        };
        if ends {
            // A constant tag always fits.
            discard::message_fits(backend::put_command_complete("ROLLBACK", out));
            backend::put_ready_for_query(Idle, out);
            return (After::Over, None);
        }
        if fate == Fate::Commits {
            // It failed, and so the block is over.
            let error = self.refuse(Verdict::Retry, out);
            backend::put_ready_for_query(Idle, out);
            return (After::Over, Some(error));
        }
        let error = self.refuse(self.dead(fate), out);
        backend::put_ready_for_query(Failed, out);
        (After::Stay, Some(error))
    }

    fn extended(
        &mut self,
        seen: &Seen<'_>,
        journal: &mut Journal,
        out: &mut BytesMut,
    ) -> Option<Verdict> {
        match seen.tag {
            b'P' => {
                let parse = frontend::ParseMessage::parse(seen.body).ok()?;
                let fate =
                    if parse.is_whole { frontend::fate_of(parse.sql) } else { Fate::Unknown };
                if !self.may_end(fate) {
                    return Some(self.skip(self.dead(fate), out));
                }
                journal.parse_unforwarded(parse, seen.is_whole().then_some(seen.body));
                backend::put_parse_complete(out);
            }
            b'B' => {
                let bind = frontend::Bind::parse(seen.body).ok()?;
                let fate = journal.kind_of(bind.statement).map_or(Fate::Unknown, |s| s.fate);
                if !self.may_end(fate) || !bind.portal.is_empty() {
                    return Some(self.skip(self.dead(fate), out));
                }
                self.portal = fate;
                backend::put_bind_complete(out);
            }
            b'D' => match Target::parse(seen.body) {
                Ok(Target::Portal(_)) => backend::put_no_data(out),
                _ => return Some(self.skip(self.again, out)),
            },
            b'C' => {
                if let Ok(Target::Statement(name)) = Target::parse(seen.body) {
                    journal.close_unforwarded(name);
                }
                backend::put_close_complete(out);
            }
            b'E' if self.may_end(self.portal) => {
                if self.portal == Fate::Commits && !self.told {
                    let error = self.refuse(Verdict::Retry, out);
                    self.skipping = true;
                    self.ended = true;
                    return Some(error);
                }
                discard::message_fits(backend::put_command_complete("ROLLBACK", out));
                self.ended = true;
            }
            b'E' => return Some(self.skip(self.again, out)),
            _ => {}
        }
        None
    }

    fn may_end(&self, fate: Fate) -> bool {
        matches!(fate, Fate::RollsBack | Fate::Commits)
    }

    /// The verdict about a request. A framework that goes back to a savepoint shows its caller what that is
    /// answered with, and there is none to go back to.
    fn dead(&self, fate: Fate) -> Verdict {
        if fate == Fate::Revives { Verdict::Retry } else { self.again }
    }

    fn skip(&mut self, verdict: Verdict, out: &mut BytesMut) -> Verdict {
        self.skipping = true;
        self.refuse(verdict, out)
    }

    /// The first error of a dead transaction says that it is to be run again.
    fn refuse(&mut self, verdict: Verdict, out: &mut BytesMut) -> Verdict {
        let first = !std::mem::replace(&mut self.told, true);
        let verdict = if first { Verdict::Retry } else { verdict };
        verdict.put(out);
        verdict
    }
}

//! A model of how a server reads its input (`PostgresMain` and `CopyGetData`), against which the
//! bookkeeping is checked under any interleaving.

use std::collections::VecDeque;

use proptest::prelude::*;

use super::super::*;

/// How a server deals with one message.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Outcome {
    Good,
    Fails,
    CopiesIn,
    CopiesOut,
    Suspends,
    Empty,
}

#[derive(Debug, Default)]
struct Server {
    ignoring: bool,
    /// A COPY is read; of the extended protocol if true.
    copying: Option<bool>,
    /// Something of the extended protocol was read behind the last Sync.
    unsynced: bool,
}

impl Server {
    fn read(&mut self, sent: Sent, outcome: Outcome, out: &mut VecDeque<u8>) {
        if let Some(extended) = self.copying {
            match (sent, outcome) {
                (Sent::Flush | Sent::Sync, _) => {}
                (Sent::CopyData, outcome) if outcome != Outcome::Fails => {}
                (Sent::CopyDone, outcome) if outcome != Outcome::Fails => {
                    self.copying = None;
                    out.push_back(b'C');
                    if !extended {
                        out.push_back(b'Z');
                    }
                }
                _ => {
                    self.copying = None;
                    out.push_back(b'E');
                    if extended {
                        self.ignoring = true;
                    } else {
                        out.push_back(b'Z');
                    }
                }
            }
            return;
        }
        if self.ignoring && sent != Sent::Sync {
            assert!(sent != Sent::Marker, "nothing is said into what the server skips");
            return;
        }
        let fails = outcome == Outcome::Fails;
        match sent {
            Sent::Sync | Sent::OwnSync(_) | Sent::Query(_) | Sent::FunctionCall(_) => {
                self.unsynced = false;
            }
            Sent::Flush | Sent::CopyData | Sent::CopyDone | Sent::CopyFail => {}
            Sent::Terminate | Sent::Marker => {}
            _ => self.unsynced = true,
        }
        match sent {
            Sent::Query(_) => match outcome {
                Outcome::CopiesIn => {
                    out.push_back(b'G');
                    self.copying = Some(false);
                }
                Outcome::CopiesOut => out.extend(b"HddcCZ"),
                Outcome::Empty => out.extend(b"IZ"),
                Outcome::Fails => out.extend(b"TDEZ"),
                _ => out.extend(b"TDDCCZ"),
            },
            Sent::FunctionCall(_) => out.extend(if fails { b"EZ" } else { b"VZ" }),
            Sent::Sync | Sent::OwnSync(_) => {
                self.ignoring = false;
                out.extend(if fails { &b"EZ"[..] } else { b"Z" });
            }
            Sent::Flush | Sent::CopyData | Sent::CopyDone | Sent::CopyFail => {}
            Sent::Terminate => {}
            Sent::Marker => out.extend(b"3Z"),
            _ if fails => {
                self.ignoring = true;
                out.push_back(b'E');
            }
            Sent::Parse(_) => out.push_back(b'1'),
            Sent::Bind(_) => out.push_back(b'2'),
            Sent::Close(_) => out.push_back(b'3'),
            Sent::Describe(_) => {
                out.extend(if outcome == Outcome::Empty { b"tn" } else { b"tT" });
            }
            Sent::Execute(_) => match outcome {
                Outcome::CopiesIn => {
                    out.push_back(b'G');
                    self.copying = Some(true);
                }
                Outcome::CopiesOut => out.extend(b"HdcC"),
                Outcome::Suspends => out.extend(b"Ds"),
                Outcome::Empty => out.push_back(b'I'),
                _ => out.extend(b"DDC"),
            },
        }
    }

    fn is_idle(&self) -> bool {
        !self.ignoring && self.copying.is_none() && !self.unsynced
    }
}

fn outcome() -> impl Strategy<Value = Outcome> {
    prop_oneof![
        8 => Just(Outcome::Good),
        2 => Just(Outcome::Fails),
        2 => Just(Outcome::CopiesIn),
        1 => Just(Outcome::CopiesOut),
        1 => Just(Outcome::Suspends),
        1 => Just(Outcome::Empty),
    ]
}

fn any_message() -> impl Strategy<Value = Sent> {
    let unit = Unit { fate: Fate::Stays, token: 0 };
    prop::sample::select(vec![
        Sent::Query(unit),
        Sent::FunctionCall(unit),
        Sent::Parse(0),
        Sent::Bind(0),
        Sent::Describe(0),
        Sent::Close(0),
        Sent::Execute(unit),
        Sent::Execute(unit),
        Sent::Sync,
        Sent::Sync,
        Sent::Flush,
        Sent::CopyData,
        Sent::CopyDone,
        Sent::CopyFail,
    ])
}

/// Batches as real drivers send them.
fn driver_batch() -> impl Strategy<Value = Vec<Sent>> {
    let unit = Unit { fate: Fate::Stays, token: 0 };
    let (q, e) = (Sent::Query(unit), Sent::Execute(unit));
    let (p, b, d, s) = (Sent::Parse(0), Sent::Bind(0), Sent::Describe(0), Sent::Sync);
    let (data, done, fail) = (Sent::CopyData, Sent::CopyDone, Sent::CopyFail);
    prop::sample::select(vec![
        vec![q],
        vec![p, b, d, e, s],
        vec![p, d, s],
        vec![b, e, b, e, b, e, s],
        vec![p, Sent::Flush, b, e, s],
        vec![q, data, data, done],
        vec![q, data, fail],
        vec![p, b, e, data, done, s],
        vec![p, b, e, s, data, done, s],
        vec![Sent::Close(0), s],
        vec![Sent::FunctionCall(unit)],
    ])
}

#[derive(Debug, Clone, Copy)]
enum Turn {
    Send,
    Serve,
    Deliver,
}

fn turns() -> impl Strategy<Value = Vec<Turn>> {
    prop::collection::vec(
        prop::sample::select(vec![Turn::Send, Turn::Serve, Turn::Deliver, Turn::Deliver]),
        0..120,
    )
}

/// Runs everything to its end, in the order that `turns` says as long as it says something.
/// Answers whether the count was lost.
/// `patient`: nothing is sent before a doubt is settled.
fn run(messages: &[(Sent, Outcome)], turns: &[Turn], patient: bool) -> bool {
    let mut pipeline = Pipeline::new(TransactionStatus::Idle);
    let mut server = Server::default();
    let (mut sent, mut served) = (0, 0);
    let mut answers = VecDeque::new();
    let mut messages = messages.to_vec();
    let finish = [Turn::Send, Turn::Serve, Turn::Deliver].into_iter().cycle().take(3000);
    for turn in turns.iter().copied().chain(finish) {
        match turn {
            Turn::Send if pipeline.is_doubtful() && !pipeline.is_lost() => {
                pipeline.sent(Sent::Marker);
                messages.insert(sent, (Sent::Marker, Outcome::Good));
                sent += 1;
            }
            Turn::Send if pipeline.must_settle() && patient => {}
            Turn::Send => {
                if let Some((message, _)) = messages.get(sent) {
                    pipeline.sent(*message);
                    sent += 1;
                }
            }
            Turn::Serve if served < sent => {
                let (message, outcome) = messages[served];
                server.read(message, outcome, &mut answers);
                served += 1;
            }
            Turn::Serve => {}
            Turn::Deliver => {
                let Some(tag) = answers.pop_front() else { continue };
                let got = pipeline.received(tag, b"I");
                assert!(got.is_ok(), "{} at {served}: {got:?} {pipeline:?}", tag as char);
            }
        }
        let quiet = served == sent && answers.is_empty();
        if pipeline.movable() {
            // Ends of COPY that found none are discarded by the server whenever it comes to them.
            let rest = &messages[served..sent];
            let harmless = |s: &Sent| {
                matches!(s, Sent::CopyData | Sent::CopyDone | Sent::CopyFail | Sent::Flush)
            };
            assert!(rest.iter().all(|(s, _)| harmless(s)) && answers.is_empty(), "{pipeline:?}");
            assert!(server.is_idle(), "{pipeline:?}");
        } else if quiet && !pipeline.is_lost() && server.is_idle() && !pipeline.is_doubtful() {
            assert!(pipeline.in_flight(), "{pipeline:?}");
            panic!("the server owes nothing: {pipeline:?}");
        }
    }
    assert!(sent == messages.len() && served == sent && answers.is_empty());
    pipeline.is_lost()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn any_conversation_is_followed_or_known_to_be_lost(
        messages in prop::collection::vec((any_message(), outcome()), 1..30),
        turns in turns(),
    ) {
        run(&messages, &turns, false);
        run(&messages, &turns, true);
    }

    #[test]
    fn what_drivers_send_is_followed(
        batches in prop::collection::vec(driver_batch(), 1..8),
        outcomes in prop::collection::vec(outcome(), 1..60),
        turns in turns(),
    ) {
        // Only a COPY may answer with a COPY: of batches without its data none does.
        let messages: Vec<_> = batches
            .iter()
            .flat_map(|batch| {
                let copies = batch.iter().any(|s| matches!(s, Sent::CopyDone | Sent::CopyFail));
                batch.iter().map(move |s| (*s, copies))
            })
            .zip(outcomes.iter().cycle())
            .map(|((sent, copies), outcome)| match outcome {
                Outcome::CopiesIn if !copies => (sent, Outcome::Good),
                outcome => (sent, *outcome),
            })
            .collect();
        run(&messages, &turns, true);
    }
}

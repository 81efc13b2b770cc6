//! Clients that share servers, against the same clients with a server each: what every message is
//! answered must be the same, whatever fails, however deep the pipeline and whoever has which
//! connection.

use super::*;
use bytes::BytesMut;
use kornak_protocol::frame::take_frame;
use kornak_protocol::frontend::{Bind, ParseMessage, StatementKind};
use kornak_protocol::pipeline::Fate;

/// A server's statements, and whether it skips to the next Sync.
#[derive(Default)]
struct Server {
    named: HashMap<Vec<u8>, Vec<u8>>,
    unnamed: Option<Vec<u8>>,
    skips: bool,
}

/// The parts of a server's answer that matter here.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Said {
    Parsed,
    /// This text was bound.
    Bound(Vec<u8>),
    Closed,
    Error,
    Ready,
}

impl Server {
    fn hear(&mut self, tag: u8, body: &[u8]) -> Option<Said> {
        if tag == b'S' {
            self.skips = false;
            return Some(Said::Ready);
        }
        if self.skips {
            return None;
        }
        let said = match tag {
            b'Q' => {
                self.unnamed = None;
                Said::Ready
            }
            b'P' => self.parse(body),
            b'B' => {
                let name = Bind::parse(body).unwrap().statement;
                let known = match name {
                    b"" => self.unnamed.as_ref(),
                    name => self.named.get(name),
                };
                known.map_or(Said::Error, |text| Said::Bound(text.clone()))
            }
            _ => {
                let Target::Statement(name) = Target::parse(body).unwrap() else { panic!() };
                match name {
                    b"" => self.unnamed = None,
                    name => drop(self.named.remove(name)),
                }
                Said::Closed
            }
        };
        self.skips = said == Said::Error;
        Some(said)
    }

    fn parse(&mut self, body: &[u8]) -> Said {
        let parse = ParseMessage::parse(body).unwrap();
        if parse.statement.is_empty() {
            self.unnamed = None;
        }
        if parse.sql == b"bad" || self.named.contains_key(parse.statement) {
            return Said::Error;
        }
        match parse.statement {
            b"" => self.unnamed = Some(parse.sql.to_vec()),
            name => drop(self.named.insert(name.to_vec(), parse.sql.to_vec())),
        }
        Said::Parsed
    }
}

/// A client with its place in the pool, and the server it would have alone.
struct Client {
    shared: Statements,
    alone: Server,
    /// Marks of the messages that were sent, to be met by the server's answers; `None` is a Sync.
    sent: VecDeque<Option<u32>>,
    /// The bytes that the server will receive.
    wire: BytesMut,
    expected: Vec<Said>,
}

impl Client {
    fn new() -> Self {
        Self {
            shared: Statements::new(3),
            alone: Server::default(),
            sent: VecDeque::new(),
            wire: BytesMut::new(),
            expected: Vec::new(),
        }
    }

    fn owed(&self) -> usize {
        self.sent.iter().filter(|mark| mark.is_none()).count()
    }

    fn say(&mut self, message: &[u8]) {
        let mut copy = BytesMut::from(message);
        let frame = take_frame(&mut copy, 1000).unwrap().unwrap();
        self.expected.extend(self.alone.hear(frame.tag, &frame.body));
        let (mut injected, mut out) = (Vec::new(), Vec::new());
        let len = message.len();
        let (treatment, mark) = match frame.tag {
            b'P' => {
                let parse = ParseMessage::parse(&frame.body).unwrap();
                let body = Bytes::copy_from_slice(content_of(&frame.body).unwrap());
                let statement = Statement { fate: Fate::Stays, kind: StatementKind::Select };
                let content =
                    Content { body, statement, note: None, is_opaque: false, calls: false };
                let content = Some(Arc::new(content));
                let done =
                    self.shared.parse(parse.statement, content, len, &mut injected, &mut out);
                (done.0, mark_of(done.1))
            }
            b'B' => {
                let bind = Bind::parse(&frame.body).unwrap();
                (self.shared.bind(bind, frame.body.len(), &mut injected, &mut out), 0)
            }
            b'C' => {
                let target = Target::parse(&frame.body).unwrap();
                let (treatment, counts) = self.shared.close(target, len, &mut out);
                (treatment, mark_of(counts))
            }
            tag => {
                self.wire.extend_from_slice(message);
                if tag == b'Q' {
                    self.shared.query();
                }
                self.sent.push_back(None);
                self.shared.end_batch();
                return;
            }
        };
        for injected in injected {
            let (Injected::Parse(mark) | Injected::Close(mark)) = injected;
            self.sent.push_back(Some(mark));
        }
        self.sent.push_back(Some(mark));
        self.wire.extend_from_slice(&out);
        let skip = match treatment {
            Treatment::Head { skip } => skip,
            Treatment::ClosedLong { skip } => skip,
            Treatment::AsIs | Treatment::TooLong => 0,
        };
        self.wire.extend_from_slice(&message[skip..]);
    }

    /// The server answers all batches that are complete.
    fn hear_until_sync(&mut self, server: &mut Server, story: &str) {
        let unfinished = self.sent.iter().rev().take_while(|mark| mark.is_some()).count();
        let whole = self.sent.len() - unfinished;
        let mut told = Vec::new();
        for _ in 0..whole {
            told.extend(self.hear_one(server));
        }
        let rest = self.expected.split_off(told.len());
        assert_eq!(told, self.expected, "{story}");
        self.expected = rest;
    }

    /// The server answers everything.
    fn hear(&mut self, server: &mut Server, story: &str) {
        let mut told = Vec::new();
        while !self.wire.is_empty() {
            told.extend(self.hear_one(server));
        }
        assert_eq!(told, self.expected, "{story}");
        self.expected.clear();
    }

    fn hear_one(&mut self, server: &mut Server) -> Option<Said> {
        let frame = take_frame(&mut self.wire, 1000).unwrap().unwrap();
        let mark = self.sent.pop_front().unwrap();
        let said = server.hear(frame.tag, &frame.body)?;
        match (mark, said) {
            (None, said) => {
                if frame.tag == b'Q' {
                    self.shared.query_ran(self.owed() + 1);
                }
                self.shared.ready(self.owed());
                Some(said)
            }
            (Some(mark), said @ (Said::Parsed | Said::Closed)) if Statements::is_mark(mark) => {
                match self.shared.answered(mark) {
                    Answer::Pass => Some(said),
                    Answer::Swallow => None,
                }
            }
            (Some(mark), said) => {
                if Statements::is_mark(mark) {
                    self.shared.failed(mark);
                }
                Some(said)
            }
        }
    }
}

fn query() -> BytesMut {
    let mut out = BytesMut::new();
    frontend::put_query(b"SELECT 1", &mut out).unwrap();
    out
}

fn mark_of(counts: Counts) -> u32 {
    let (Counts::Parse(mark) | Counts::Close(mark)) = counts;
    mark
}

fn parse(name: &str, text: &str) -> Vec<u8> {
    let mut out = BytesMut::new();
    frontend::put_parse(name.as_bytes(), text.as_bytes(), &[], &mut out).unwrap();
    out.to_vec()
}

fn bind(name: &str) -> Vec<u8> {
    let mut out = BytesMut::new();
    frontend::put_bind(b"", name.as_bytes(), &[Some(b"x")], &mut out).unwrap();
    out.to_vec()
}

fn close(name: &str) -> Vec<u8> {
    let mut out = BytesMut::new();
    frontend::put_close(Target::Statement(name.as_bytes()), &mut out).unwrap();
    out.to_vec()
}

fn sync() -> Vec<u8> {
    let mut out = BytesMut::new();
    frontend::put_sync(&mut out);
    out.to_vec()
}

#[test]
fn sharing_is_not_to_be_noticed_in_any_conversation() {
    for seed in 1..400u64 {
        let mut dice = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        let mut roll = |n: u64| {
            dice ^= dice << 13;
            dice ^= dice >> 7;
            dice ^= dice << 17;
            (dice % n) as usize
        };
        let mut servers = [Server::default(), Server::default()];
        let mut prepared = [Some(Box::default()), Some(Box::<Prepared>::default())];
        let mut clients = [Client::new(), Client::new(), Client::new()];
        let mut story = format!("seed {seed}:");
        for _ in 0..30 {
            let (client, at) = (&mut clients[roll(3)], roll(2));
            client.shared.attach(prepared[at].take().unwrap());
            for _ in 0..1 + roll(3) {
                for _ in 0..roll(5) {
                    let name = ["", "a", "b", "_kornak:1"][roll(4)];
                    let text = ["one", "two", "three", "four", "bad"][roll(5)];
                    let message = match roll(5) {
                        0 | 1 => parse(name, text),
                        2 | 3 => bind(name),
                        _ => close(name),
                    };
                    story += &format!(" {}({name},{text})", message[0] as char);
                    if client.shared.must_wait(message[0], name.as_bytes()) {
                        story += "w";
                        client.hear_until_sync(&mut servers[at], &story);
                    }
                    client.say(&message);
                }
                if roll(4) == 0 {
                    story += " Q";
                    client.say(&query());
                    continue;
                }
                story += " S";
                client.say(&sync());
                if roll(3) == 0 {
                    client.hear(&mut servers[at], &story);
                }
            }
            client.say(&sync());
            client.hear(&mut servers[at], &story);
            let back = client.shared.detach().unwrap();
            assert!(back.len() <= 3 + 5, "{story}: {} are kept", back.len());
            prepared[at] = Some(back);
            story += &format!(" |{at}|");
        }
    }
}

#[test]
fn a_text_is_prepared_once_on_a_connection_whoever_uses_it() {
    let (mut a, mut b) = (Client::new(), Client::new());
    let mut server = Server::default();
    a.shared.attach(Box::default());
    for message in [parse("a", "one"), bind("a"), sync()] {
        a.say(&message);
    }
    a.hear(&mut server, "a");
    b.shared.attach(a.shared.detach().unwrap());
    for message in [parse("b", "one"), bind("b"), sync()] {
        b.say(&message);
    }
    b.hear(&mut server, "b");
    // The client's Parse is the server's to judge; the statement before is closed with the next Parse.
    assert_eq!(b.shared.detach().unwrap().len(), 1);
    assert_eq!(server.named.len(), 2);
}

#[test]
fn a_bind_behind_the_names_goes_as_it_came() {
    let mut a = Client::new();
    a.shared.attach(Box::default());
    a.say(&parse("a", "one"));
    a.wire.clear();
    a.say(&bind("a"));
    let frame = take_frame(&mut a.wire, 1000).unwrap().unwrap();
    assert!(a.wire.is_empty());
    let theirs = bind("a");
    let tail = &theirs[5 + 1 + 2..];
    assert!(frame.body.ends_with(tail));
    assert_eq!(Bind::parse(&frame.body).unwrap().statement, b"_kornak:1");
}

#[test]
fn what_drops_all_is_not_answered_with_the_batch_before() {
    let (mut client, mut server) = (Client::new(), Server::default());
    client.shared.attach(Box::default());
    client.say(&parse("a", "one"));
    client.say(&sync());
    client.hear(&mut server, "a");
    client.say(&bind("nobody"));
    client.say(&sync());
    client.shared.drop_all();
    assert!(!client.shared.is_uncertain(), "for what follows in its batch");
    client.hear(&mut server, "nobody");
    assert!(!client.shared.has(b"a"), "it will be gone");
    client.say(&sync());
    assert!(client.shared.is_dropping_before(), "for the next batch");
    client.hear(&mut server, "it was not executed");
    assert!(client.shared.has(b"a"));
}

#[test]
fn an_error_of_a_statement_that_was_replaced_since_has_the_clients_name() {
    let (mut client, mut server) = (Client::new(), Server::default());
    client.shared.attach(Box::default());
    client.say(&parse("a", "one"));
    client.say(&sync());
    client.hear(&mut server, "a");
    let rested = client.shared.detach().unwrap();
    client.shared.attach(rested);
    for message in [bind("a"), close("a"), parse("a", "one"), sync()] {
        client.say(&message);
    }
    let told = client.shared.with_own_names(b"statement \"_kornak:1\" requires 0").unwrap();
    assert_eq!(told, b"statement \"a\" requires 0");
}

#[test]
fn deallocate_is_judged_at_each_bind() {
    let content = |sql: &str| {
        let kind = frontend::statement_kind(sql.as_bytes());
        let statement = Statement { fate: Fate::Stays, kind };
        let body = format!("{sql}\0\0\0").into_bytes().into();
        Arc::new(Content { body, statement, note: None, is_opaque: false, calls: false })
    };
    let mut client = Statements::new(10);
    client.attach(Box::default());
    let (mut injected, mut out) = (Vec::new(), Vec::new());
    let mut parse = |client: &mut Statements, name: &[u8], sql| {
        client.parse(name, Some(content(sql)), 0, &mut injected, &mut out);
    };
    let is_ours = |client: &Statements| client.is_retagged(client.get(b"d").unwrap());
    parse(&mut client, b"d", "DEALLOCATE s1");
    assert!(!is_ours(&client), "the server says that there is no such statement");
    parse(&mut client, b"s1", "SELECT 1");
    assert!(is_ours(&client));
    client.deallocate(b"DEALLOCATE s1");
    assert!(!is_ours(&client), "the second time there is none");
    parse(&mut client, b"s1", "SELECT 2");
    assert!(is_ours(&client));
    client.drop_all();
    assert!(!is_ours(&client), "it will be gone with all others");
}

#[test]
fn a_name_of_sql_that_is_gone_leaves_no_statement_to_others() {
    let (mut client, mut server) = (Client::new(), Server::default());
    client.shared.attach(Box::default());
    client.shared.named_by_sql();
    assert!(!client.shared.is_dropping_before(), "nothing can wait within a batch");
    client.say(&query());
    assert!(client.shared.is_dropping_before(), "whether there is a statement of this name");
    client.hear(&mut server, "PREPARE a");
    assert!(!client.shared.is_dropping_before());
    client.shared.prepared_by_sql(b"PREPARE a AS SELECT 1");
    // A function has dropped it since.
    client.say(&parse("a", "one"));
    client.say(&sync());
    client.hear(&mut server, "a");
    assert!(client.shared.take_raw(), "the connection has it under the client's name");
    assert!(client.shared.has_long());
}

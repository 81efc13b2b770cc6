//! Compares a conversation with a server and the same one through the proxy: a client must not
//! be able to tell one from the other by any byte, but for the secret of its cancel requests.
//!
//! Conversations are made from a seed ([`conversation`]), so a failure is a number. Each lane has two
//! databases with equal contents, copied from one template, so that even OIDs are the same. When two
//! answers differ, conversations and steps are left out as long as they still differ; what is left is
//! printed.
//!
//! Not here: failovers ([`crate::talk`] and the tests that use it), and login ways other than SCRAM.

pub mod conversation;
pub mod many;
mod statements;

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::io::Write as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context, Result};
use kornak_protocol::error::ErrorView;
use kornak_protocol::frame::Frame;
use kornak_protocol::sqlstate::{PROTOCOL_VIOLATION, QUERY_CANCELED};

use crate::run::postgres::{Postgres, connect, superuser};
use crate::run::proxy::Proxy;
use crate::sim::rng::Rng;
use crate::talk::{Login, PATIENCE, Talker, show};
use conversation::{Conversation, Step, Wait, make};

/// Conversations on one connection: a login costs as much as some fifty of them.
const PER_CONNECTION: u64 = 200;

/// Pause between two cancel requests for the same statement.
const CANCEL_PAUSE: Duration = Duration::from_millis(50);

/// How long an answer may take once it is known that something is wrong.
const SHRINKING_PATIENCE: Duration = Duration::from_secs(2);

/// Role of the clients and its password.
const APP: &str = "app";
const PASSWORD: &str = "an-app's-password";

/// The role's verifier with one round of hashing, for logins are many and not what is tested here.
const VERIFIER: &str = "SCRAM-SHA-256$1:c2l4dGVlbiBieXRlcyBpdA==\
    $glAwfup1dEL3jXqLi4E1Jlj/+fOVUubVMtmIBTKJcLE=:DPwYGZlfQxTx4auG1vMCs/mhJeSrM+769L29ID3FES4=";

/// How much is said.
#[derive(Debug, Clone, Copy)]
pub struct Plan {
    pub seed: u64,
    pub conversations: u64,
    /// Pairs of connections at once.
    pub lanes: u64,
}

impl Plan {
    /// From `KORNAK_DIFFERENTIAL_SEED` and `KORNAK_DIFFERENTIAL_CONVERSATIONS`.
    pub fn from_environment(conversations: u64) -> Self {
        let number = |name: &str, default| {
            std::env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(default)
        };
        Self {
            seed: number("KORNAK_DIFFERENTIAL_SEED", 1),
            conversations: number("KORNAK_DIFFERENTIAL_CONVERSATIONS", conversations),
            lanes: 6,
        }
    }
}

/// Two ways to one server, with a pair of databases for each lane.
#[derive(Debug)]
pub struct Stage {
    pub server: Postgres,
    pub proxy: Proxy,
}

/// A way to a database of a lane.
#[derive(Debug, Clone)]
struct Pair {
    direct: Login,
    proxied: Login,
    server: u16,
}

impl Stage {
    /// Makes roles and databases.
    pub async fn prepare(&self, lanes: u64) -> Result<()> {
        let admin = self.server.connect().await?;
        let roles = format!(
            "CREATE ROLE {APP} LOGIN PASSWORD '{VERIFIER}'; CREATE ROLE other; GRANT other TO {APP}"
        );
        admin.batch_execute(&roles).await?;
        admin.batch_execute("CREATE DATABASE model").await?;
        let model = connect(&self.superuser_in("model")).await?;
        model.batch_execute(statements::SCHEMA).await.context("make the template")?;
        drop(model);
        for lane in 0..lanes {
            for side in ["direct", "proxied"] {
                let create = format!("CREATE DATABASE {side}_{lane} TEMPLATE model");
                // The template's connection needs a moment to end.
                crate::run::wait::until(PATIENCE, "a copy of the template", || async {
                    admin.batch_execute(&create).await.map_err(|error| error.to_string())
                })
                .await;
            }
        }
        Ok(())
    }

    fn superuser_in(&self, database: &str) -> String {
        superuser(self.server.port()).replace("dbname=postgres", &format!("dbname={database}"))
    }

    fn pair(&self, lane: u64) -> Pair {
        let login = |port, side| Login::new(port, APP, PASSWORD, &format!("{side}_{lane}"));
        Pair {
            direct: login(self.server.port(), "direct"),
            proxied: login(self.proxy.primary(), "proxied"),
            server: self.server.port(),
        }
    }

    /// Says everything. The error tells the smallest thing on which the two differ.
    pub async fn run(&self, plan: Plan) -> Result<(), String> {
        let stop = Arc::new(AtomicBool::new(false));
        let mut lanes = tokio::task::JoinSet::new();
        for lane in 0..plan.lanes {
            lanes.spawn(run_lane(self.pair(lane), plan, lane, Arc::clone(&stop)));
        }
        let mut failures = Vec::new();
        while let Some(ended) = lanes.join_next().await {
            if let Err(failure) = ended.map_err(|error| error.to_string()).and_then(|it| it) {
                stop.store(true, Ordering::Relaxed);
                failures.push(failure);
            }
        }
        if failures.is_empty() { Ok(()) } else { Err(failures.join("\n\n")) }
    }
}

/// One lane's share, connection by connection.
async fn run_lane(pair: Pair, plan: Plan, lane: u64, stop: Arc<AtomicBool>) -> Result<(), String> {
    let rng = |number| Rng::new(plan.seed.wrapping_mul(0x1_0000_0001).wrapping_add(number));
    let mut next = lane;
    while next < plan.conversations && !stop.load(Ordering::Relaxed) {
        let first = next;
        let numbers = (0..PER_CONNECTION).map(|n| first + n * plan.lanes);
        let numbers = numbers.take_while(|number| *number < plan.conversations);
        let said: Vec<_> = numbers.map(|number| make(&rng(number), true)).collect();
        let talk = Talk { pair: &pair, params: startup_parameters(&rng(first)) };
        match talk.compare(&said, false).await {
            Ok(done) => next += plan.lanes * done.max(1) as u64,
            Err(found) => {
                let seed = plan.seed;
                let smallest = talk.shrink(said, found).await;
                return Err(format!(
                    "lane {lane}, connection that begins with conversation {first} of \
                     KORNAK_DIFFERENTIAL_SEED={seed}:\n{smallest}"
                ));
            }
        }
    }
    Ok(())
}

/// Parameters of one connection's startup packet.
fn startup_parameters(rng: &Rng) -> Vec<(String, String)> {
    let all: [(&str, &str); 11] = [
        (
            "application_name",
            "longer than a name may be, so the server cuts it and says so, in a notice",
        ),
        ("application_name", "different 'names' \\ here"),
        ("client_encoding", "LATIN1"),
        ("client_encoding", "UTF8"),
        ("DateStyle", "German"),
        ("TimeZone", "Asia/Tokyo"),
        ("extra_float_digits", "2"),
        ("options", "-c work_mem=7MB -c search_path=public,pg_catalog"),
        ("search_path", "public"),
        ("kornak.custom", "x"),
        ("client_min_messages", "debug1"),
    ];
    let picked = all.iter().filter(|_| rng.chance(150));
    picked.map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
}

/// Where the two sides said different things.
#[derive(Debug)]
enum Difference {
    /// Before anything was said.
    Login(String),
    /// In this conversation.
    In { conversation: usize, what: String },
}

struct Talk<'a> {
    pair: &'a Pair,
    params: Vec<(String, String)>,
}

impl Talk<'_> {
    /// Says the conversations on a fresh pair of connections, until one of them closes it; answers how
    /// many were said. `restore`: on the contents of the template, as far as rows go.
    async fn compare(&self, said: &[Conversation], restore: bool) -> Result<usize, Difference> {
        if restore {
            self.restore().await.map_err(|error| Difference::Login(format!("{error:#}")))?;
        }
        let login = |login: &Login| Login { params: self.params.clone(), ..login.clone() };
        let (direct, proxied) = (login(&self.pair.direct), login(&self.pair.proxied));
        let (direct, proxied) = tokio::join!(Talker::login(&direct), Talker::login(&proxied));
        let (direct, proxied) = match (direct, proxied) {
            (Ok(direct), Ok(proxied)) => (direct, proxied),
            (Err(direct), Err(proxied)) if direct.to_string() == proxied.to_string() => {
                return Ok(1);
            }
            (direct, proxied) => {
                let text =
                    |it: Result<Talker>| it.map_or_else(|e| format!("{e:#}"), |_| "ok".into());
                let what = format!("direct: {}\nproxied: {}", text(direct), text(proxied));
                return Err(Difference::Login(what));
            }
        };
        // Servers have no order for their reports.
        let set = |talker: &Talker| talker.reported.iter().cloned().collect::<BTreeSet<_>>();
        if set(&direct) != set(&proxied) {
            let what = format!("{:?}\n{:?}", direct.reported, proxied.reported);
            return Err(Difference::Login(what));
        }
        if direct.noticed != proxied.noticed {
            let what = format!("{:?}\n{:?}", direct.noticed, proxied.noticed);
            return Err(Difference::Login(what));
        }
        // A difference that is a silence is looked at many times.
        let patience = if restore { SHRINKING_PATIENCE } else { PATIENCE };
        let (mut direct, mut proxied) = (Side::new(direct), Side::new(proxied));
        for (conversation, talk) in said.iter().enumerate() {
            let (left, right) =
                tokio::join!(direct.say(talk, patience), proxied.say(talk, patience));
            let (left, right) =
                (left.map_err(|e| format!("{e:#}")), right.map_err(|e| format!("{e:#}")));
            // A reset takes with it what was not read yet; the proxy has read it.
            let both_ended = direct.end == End::Reset && proxied.end != End::Open;
            if both_ended && right.is_ok() && proxied.heard.starts_with(&direct.heard) {
                return Ok(conversation + 1);
            }
            if let Some(what) = difference(&direct.heard, &proxied.heard, &left, &right) {
                return Err(Difference::In { conversation, what });
            }
            if let Err(what) = left {
                // Both alike, but not what was to be: the conversation waits for what never comes.
                return Err(Difference::In { conversation, what });
            }
            if direct.end != End::Open {
                return Ok(conversation + 1);
            }
        }
        Ok(said.len())
    }

    async fn restore(&self) -> Result<()> {
        for login in [&self.pair.direct, &self.pair.proxied] {
            let name = format!("dbname={}", login.database);
            let conninfo = superuser(self.pair.server).replace("dbname=postgres", &name);
            let admin = connect(&conninfo).await?;
            admin.batch_execute(statements::RESTORE).await?;
        }
        Ok(())
    }

    /// Leaves out what is not needed for the difference, and describes the rest.
    async fn shrink(&self, mut said: Vec<Conversation>, found: Difference) -> String {
        let (at, mut what) = match found {
            Difference::Login(what) => return format!("at login with {:?}:\n{what}", self.params),
            Difference::In { conversation, what } => (conversation, what),
        };
        said.truncate(at + 1);
        let _ = writeln!(std::io::stderr(), "the two differ; looking for less that does:\n{what}");
        if self.compare(&said, true).await.is_ok() {
            let last = said.pop().unwrap_or_default();
            return format!("(not seen again)\n{last}{what}");
        }
        // The last one alone is the usual case.
        let alone = said.split_off(at);
        match self.compare(&alone, true).await {
            Err(Difference::In { what: it, .. }) => (said, what) = (alone, it),
            _ => said.extend(alone),
        }
        let mut index = 0;
        while index + 1 < said.len() {
            let mut fewer = said.clone();
            fewer.remove(index);
            match self.compare(&fewer, true).await {
                Err(Difference::In { what: it, .. }) => (said, what) = (fewer, it),
                _ => index += 1,
            }
        }
        for index in 0..said.len() {
            let mut step = 0;
            while step < said[index].steps.len() {
                match self.without(&said, index, step).await {
                    Some((fewer, it)) => (said, what) = (fewer, it),
                    None => step += 1,
                }
            }
        }
        let mut text = String::new();
        for talk in &said {
            let _ = writeln!(text, "{talk}");
        }
        format!("{text}{what}\nparameters {:?}", self.params)
    }

    async fn without(
        &self,
        said: &[Conversation],
        index: usize,
        step: usize,
    ) -> Option<(Vec<Conversation>, String)> {
        let mut fewer = said.to_vec();
        let steps = &mut fewer[index].steps;
        // The end brings a conversation back to where the next one begins.
        if step + 1 == steps.len() {
            return None;
        }
        steps.remove(step);
        match self.compare(&fewer, true).await {
            Err(Difference::In { what, .. }) => Some((fewer, what)),
            _ => None,
        }
    }
}

/// One of the two connections, with what it heard in the conversation that runs.
struct Side {
    talker: Talker,
    heard: Vec<Frame>,
    end: End,
    /// The connection takes nothing any more. The kernel tells of a reset once: to who writes, if that is
    /// first, and whoever reads then sees an end, be it in the middle of a message.
    refuses: bool,
    since: Since,
}

/// Whether a connection goes on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum End {
    Open,
    Closed,
    /// With bytes of ours that the server did not read; what we did not read is lost.
    Reset,
}

/// The messages since the last wait ended.
#[derive(Debug, Default)]
struct Since {
    ready: usize,
    tags: Vec<u8>,
    /// An error, and no ReadyForQuery behind it; an earlier wait's error counts as well.
    failed: bool,
    /// The last two tags, but for those of what a server says unasked.
    last: [u8; 2],
}

impl Since {
    fn hear(&mut self, tag: u8) {
        self.ready += usize::from(tag == b'Z');
        if !self.tags.contains(&tag) {
            self.tags.push(tag);
        }
        match tag {
            b'E' => self.failed = true,
            b'Z' => self.failed = false,
            _ => {}
        }
        if !b"SAN".contains(&tag) {
            self.last = [self.last[1], tag];
        }
    }

    fn meets(&self, wait: Wait) -> bool {
        match wait {
            Wait::None => true,
            Wait::Ready(count) => self.ready >= count,
            Wait::Tag(tags) => self.failed || tags.iter().any(|tag| self.tags.contains(tag)),
            Wait::Marker => self.last == *b"IZ",
            Wait::End => false,
        }
    }
}

impl Side {
    fn new(talker: Talker) -> Self {
        Self { talker, heard: Vec::new(), end: End::Open, refuses: false, since: Since::default() }
    }

    async fn say(&mut self, talk: &Conversation, patience: Duration) -> Result<()> {
        self.heard.clear();
        self.since = Since::default();
        for step in &talk.steps {
            // What cannot be written is explained by what is read.
            self.refuses |= self.write(step).await.is_err();
            let waiting = self.wait(step);
            tokio::time::timeout(patience, waiting)
                .await
                .with_context(|| format!("no answer, waiting for {:?}", step.wait))??;
            self.since = Since { failed: self.since.failed, ..Since::default() };
        }
        Ok(())
    }

    async fn write(&mut self, step: &Step) -> Result<()> {
        let mut rest = step.bytes.as_slice();
        for piece in &step.pieces {
            let (now, later) = rest.split_at((*piece).min(rest.len()));
            self.talker.send(now).await?;
            tokio::task::yield_now().await;
            rest = later;
        }
        self.talker.send(rest).await
    }

    async fn wait(&mut self, step: &Step) -> Result<()> {
        while self.end == End::Open && !self.since.meets(step.wait) {
            if step.cancels {
                self.talker.cancel().await?;
                match tokio::time::timeout(CANCEL_PAUSE, self.listen(step.wait)).await {
                    Ok(ended) => ended?,
                    Err(_) => continue,
                }
            } else {
                self.listen(step.wait).await?;
            }
        }
        Ok(())
    }

    async fn listen(&mut self, wait: Wait) -> Result<()> {
        while self.end == End::Open && !self.since.meets(wait) {
            match self.talker.next().await {
                Ok(Some(frame)) => {
                    self.since.hear(frame.tag);
                    self.heard.push(self.comparable(frame));
                }
                Ok(None) | Err(_) if self.refuses => self.end = End::Reset,
                Ok(None) => self.end = End::Closed,
                // A server that ends a session with unread bytes of it resets the connection; the
                // proxy closes it in order.
                Err(error) if is_reset(&error) => self.end = End::Reset,
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Without what is not the same twice: a notification of our own names our own process, and a
    /// cancel request arrives in one place of a function or the next. The proxy refuses messages that no
    /// server knows itself, in a server's words, and names no place in a server's source.
    fn comparable(&self, frame: Frame) -> Frame {
        let own = self.talker.key.pid.to_be_bytes();
        match (frame.tag, frame.body.strip_prefix(&own)) {
            (b'A', Some(rest)) => Frame { tag: b'A', body: [b"own:", rest].concat().into() },
            (b'E', _)
                if [QUERY_CANCELED, PROTOCOL_VIOLATION]
                    .contains(&ErrorView::parse_prefix(&frame.body).sqlstate()) =>
            {
                let fields = frame.body.split(|byte| *byte == 0);
                let kept =
                    fields.filter(|field| b"SVCM".iter().any(|it| field.first() == Some(it)));
                Frame { tag: b'E', body: kept.collect::<Vec<_>>().join(&0).into() }
            }
            _ => frame,
        }
    }
}

fn is_reset(error: &anyhow::Error) -> bool {
    let cause = error.downcast_ref::<std::io::Error>();
    cause.is_some_and(|cause| cause.kind() == std::io::ErrorKind::ConnectionReset)
}

/// The first difference between the two sides, if there is one.
fn difference(
    direct: &[Frame],
    proxied: &[Frame],
    left: &Result<(), String>,
    right: &Result<(), String>,
) -> Option<String> {
    if direct == proxied && left == right {
        return None;
    }
    let same = direct.iter().zip(proxied).take_while(|(a, b)| a == b).count();
    let mut text = format!("the first {same} messages are equal, then:\n");
    for (side, heard, end) in [("direct", direct, left), ("proxied", proxied, right)] {
        let _ = writeln!(text, "  {side}:");
        let around = heard.iter().enumerate().skip(same.saturating_sub(3)).take(12);
        for (at, frame) in around {
            let most = if at == same { 2000 } else { 150 };
            let line = show(frame);
            let line = line.get(..line.len().min(most)).unwrap_or(&line);
            let body = frame.body.escape_ascii().to_string();
            let body = body.get(..body.len().min(most)).unwrap_or_default();
            let _ = writeln!(text, "    {line}    [{body}]");
        }
        if let Err(error) = end {
            let _ = writeln!(text, "    {error}");
        }
    }
    Some(text)
}

//! Many clients of one role over fewer server connections, and the same scripts directly, each client with a
//! connection of its own: a client must not be able to tell the one from the other, and so sees nothing of
//! anybody else's session.
//!
//! A round is played in segments. In each, every client says its part at the same time as the others; between
//! two segments somebody else changes tables that all read. Clients leave in the middle of messages, and
//! others take their place. At most `KEEPERS` clients keep a connection from the rest at a time, so that
//! nobody waits for ever.
//!
//! When answers differ, clients, segments, parts and steps are left out as long as they still do.

mod comparing;
mod script;
mod words;

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use kornak_protocol::backend;
use kornak_protocol::frame::Frame;
use tokio_postgres::Client;

use super::{APP, End, PASSWORD, Plan, Side, VERIFIER, difference};
use crate::run::postgres::{Postgres, connect, superuser};
use crate::run::wait::until;
use crate::sim::rng::Rng;
use crate::talk::{Login, PATIENCE, Talker};
use comparing::{comparable, describes_nothing_in_failed_transactions};
use script::{Leave, Part, part};
use words::Speaker;

/// Clients at once.
const CLIENTS: usize = 6;

/// Server connections that a pool needs for them at least, one more than `KEEPERS`.
pub const POOL_SIZE: usize = 3;

/// Clients that may keep a connection from one segment to the next.
const KEEPERS: usize = 2;

/// Segments of a round, so that a round is 48 conversations.
const SEGMENTS: usize = 8;

/// A superuser that logs in, for it may act as anybody.
const BOSS: &str = "boss";

/// How long a silence is looked at when it is known that something is wrong.
const SHRINKING_PATIENCE: Duration = Duration::from_secs(3);

/// For how long less is looked for that differs as well.
const SHRINKING: Duration = Duration::from_secs(60);

/// A way to the server.
#[derive(Debug, Clone, Copy)]
pub struct Way {
    pub name: &'static str,
    pub port: u16,
}

/// A server, and ways to it that are compared with it.
#[derive(Debug)]
pub struct Crowd<'a> {
    pub server: &'a Postgres,
    pub ways: Vec<Way>,
}

impl Crowd<'_> {
    /// Makes roles, and two databases with equal contents for each way.
    pub async fn prepare(&self) -> Result<()> {
        let admin = self.server.connect().await?;
        admin
            .batch_execute(&format!(
                "CREATE ROLE {APP} LOGIN PASSWORD '{VERIFIER}'; \
                 CREATE ROLE {BOSS} LOGIN SUPERUSER PASSWORD '{VERIFIER}'; \
                 CREATE ROLE one; CREATE ROLE two; GRANT one, two TO {APP}"
            ))
            .await?;
        admin.batch_execute("CREATE DATABASE crowd").await?;
        let model = connect(&self.superuser_in("crowd")).await?;
        model.batch_execute(&words::schema(CLIENTS)).await.context("make the template")?;
        drop(model);
        for (at, side) in (0..self.ways.len()).flat_map(|at| [(at, "direct"), (at, "proxied")]) {
            let create = format!("CREATE DATABASE crowd_{side}_{at} TEMPLATE crowd");
            until(PATIENCE, "a copy of the template", || async {
                admin.batch_execute(&create).await.map_err(|error| error.to_string())
            })
            .await;
        }
        Ok(())
    }

    fn superuser_in(&self, database: &str) -> String {
        superuser(self.server.port()).replace("dbname=postgres", &format!("dbname={database}"))
    }

    async fn lane(&self, at: usize) -> Result<Lane> {
        let way = self.ways[at];
        let (direct, proxied) = (format!("crowd_direct_{at}"), format!("crowd_proxied_{at}"));
        Ok(Lane {
            way,
            admins: [
                connect(&self.superuser_in(&direct)).await?,
                connect(&self.superuser_in(&proxied)).await?,
            ],
            logins: [
                Login::new(self.server.port(), APP, PASSWORD, &direct),
                Login::new(way.port, APP, PASSWORD, &proxied),
            ],
        })
    }

    /// Plays so many conversations. The error tells the smallest round on which the two differ.
    pub async fn run(&self, plan: Plan) -> Result<(), String> {
        let stop = Arc::new(AtomicBool::new(false));
        let mut lanes = tokio::task::JoinSet::new();
        for at in 0..self.ways.len() {
            let lane = self.lane(at).await.map_err(|error| format!("{error:#}"))?;
            lanes.spawn(lane.run(plan, at, self.ways.len(), Arc::clone(&stop)));
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

/// A way and its two databases.
struct Lane {
    way: Way,
    admins: [Client; 2],
    logins: [Login; 2],
}

/// A round: in each segment a change of the database first, then every client's part.
#[derive(Debug, Clone)]
struct Round {
    user: &'static str,
    params: Vec<(String, String)>,
    segments: Vec<Segment>,
}

#[derive(Debug, Clone)]
struct Segment {
    change: Option<&'static str>,
    parts: Vec<Option<Part>>,
}

impl Round {
    fn make(rng: &Rng) -> Self {
        let all = [
            ("client_encoding", "LATIN1"),
            ("DateStyle", "German"),
            ("TimeZone", "Asia/Tokyo"),
            ("options", "-c work_mem=7MB -c my.other=o"),
            ("search_path", "public"),
            ("application_name", "first's \\ name"),
        ];
        let params = all.iter().filter(|_| rng.chance(120));
        let params = params.map(|(name, value)| ((*name).to_owned(), (*value).to_owned()));
        let mut sessions = CLIENTS;
        let mut who: Vec<_> = (0..CLIENTS).collect();
        let mut segments = Vec::new();
        let (user, params) = (if rng.chance(300) { BOSS } else { APP }, params.collect());
        for _ in 0..SEGMENTS {
            let change = rng.chance(300).then(|| words::CHANGES[rng.below(words::CHANGES.len())]);
            let mut parts = Vec::new();
            for (slot, session) in who.iter_mut().enumerate() {
                let speaker = Speaker { slot, session: *session, writes: true };
                let part = part(rng, speaker, slot < KEEPERS);
                if part.leaves != Leave::No {
                    *session = sessions;
                    sessions += 1;
                }
                parts.push(Some(part));
            }
            segments.push(Segment { change, parts });
        }
        Self { user, params, segments }
    }

    fn without_slot(&self, slot: usize) -> Self {
        let mut fewer = self.clone();
        fewer.segments.iter_mut().for_each(|segment| segment.parts[slot] = None);
        fewer
    }
}

impl fmt::Display for Round {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "as {} with {:?}", self.user, self.params)?;
        for segment in &self.segments {
            if let Some(change) = segment.change {
                writeln!(f, "somebody else: {change}")?;
            }
            for (slot, part) in segment.parts.iter().enumerate() {
                let Some(part) = part else { continue };
                writeln!(f, "client {slot}, {:?} leaves:\n{}", part.leaves, part.says)?;
            }
            writeln!(f, "----")?;
        }
        Ok(())
    }
}

/// One client with a session on each side.
struct Pair([Side; 2]);

impl Lane {
    async fn run(
        mut self,
        plan: Plan,
        at: usize,
        lanes: usize,
        stop: Arc<AtomicBool>,
    ) -> Result<(), String> {
        let per_round = (SEGMENTS * CLIENTS) as u64;
        let rounds = plan.conversations.div_ceil(per_round);
        for number in (at as u64..rounds).step_by(lanes) {
            if stop.load(Ordering::Relaxed) {
                break;
            }
            let rng = Rng::new(plan.seed.wrapping_mul(0x1_0000_0003).wrapping_add(number));
            let round = Round::make(&rng);
            if let Err(what) = self.play(&round, PATIENCE).await {
                let smallest = self.shrink(round, what).await;
                let (name, seed) = (self.way.name, plan.seed);
                return Err(format!("{name}, round {number} of seed {seed}:\n{smallest}"));
            }
        }
        Ok(())
    }

    /// The database as it was made, and no connection from before.
    async fn begin(&self) -> Result<()> {
        let end = format!(
            "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity \
             WHERE datname = current_database() AND usename IN ('{APP}', '{BOSS}')"
        );
        for admin in &self.admins {
            until(PATIENCE, "the end of all sessions", || async {
                let row = admin.query_one(&end, &[]).await.map_err(|error| error.to_string())?;
                match row.get::<_, i64>(0) {
                    0 => Ok(()),
                    left => Err(format!("{left} are left")),
                }
            })
            .await;
            admin.batch_execute(&words::restore(CLIENTS)).await?;
        }
        Ok(())
    }

    /// Plays a round on both sides; the error tells where they differ.
    async fn play(&mut self, round: &Round, patience: Duration) -> Result<(), String> {
        self.begin().await.map_err(|error| format!("{error:#}"))?;
        for login in &mut self.logins {
            round.user.clone_into(&mut login.user);
            login.params.clone_from(&round.params);
        }
        let mut pairs: Vec<Option<Pair>> = (0..CLIENTS).map(|_| None).collect();
        for (number, segment) in round.segments.iter().enumerate() {
            if let Some(change) = segment.change {
                for admin in &self.admins {
                    let changed = admin.batch_execute(change).await;
                    changed.map_err(|error| format!("{change}: {error:?}"))?;
                }
            }
            let parts = segment.parts.iter().zip(&mut pairs).enumerate();
            let saying = parts.filter_map(|(slot, (part, pair))| {
                let part = part.as_ref()?;
                let logins = &self.logins;
                Some(async move {
                    let said = say(logins, pair, part, patience).await;
                    said.map_err(|what| format!("segment {number}, client {slot}: {what}"))
                })
            });
            let said = futures_util::future::join_all(saying).await;
            said.into_iter().collect::<Result<Vec<()>, _>>()?;
        }
        Ok(())
    }

    /// Leaves out what is not needed for the difference, and describes the rest.
    async fn shrink(&mut self, round: Round, what: String) -> String {
        use std::io::Write as _;
        let _ = writeln!(std::io::stderr(), "a client can tell; looking for less:\n{what}");
        if std::env::var("KORNAK_DIFFERENTIAL_SHRINK").is_ok_and(|it| it == "0") {
            return what;
        }
        let until = Instant::now() + SHRINKING;
        let (mut round, mut what, mut again) = (round, what, false);
        for _ in 0..3 {
            if let Err(it) = self.play(&round, SHRINKING_PATIENCE).await {
                (what, again) = (it, true);
                break;
            }
        }
        if !again {
            return format!("(not seen again)\n{what}\n{round}");
        }
        for at in (0..round.segments.len()).rev() {
            let mut fewer = round.clone();
            fewer.segments.remove(at);
            self.try_less(&mut round, &mut what, Some(fewer), until).await;
        }
        for slot in 0..CLIENTS {
            let fewer = round.without_slot(slot);
            self.try_less(&mut round, &mut what, Some(fewer), until).await;
        }
        for segment in 0..round.segments.len() {
            let mut fewer = round.clone();
            fewer.segments[segment].change = None;
            self.try_less(&mut round, &mut what, Some(fewer), until).await;
            for slot in 0..CLIENTS {
                let mut fewer = round.clone();
                if fewer.segments[segment].parts[slot].take().is_some() {
                    self.try_less(&mut round, &mut what, Some(fewer), until).await;
                }
                let mut step = 0;
                while let Some(fewer) = without_step(&round, segment, slot, step) {
                    if !self.try_less(&mut round, &mut what, Some(fewer), until).await {
                        step += 1;
                    }
                }
            }
        }
        format!("{round}\n{what}")
    }

    async fn try_less(
        &mut self,
        round: &mut Round,
        what: &mut String,
        fewer: Option<Round>,
        until: Instant,
    ) -> bool {
        let Some(fewer) = fewer.filter(|_| Instant::now() < until) else { return false };
        match self.play(&fewer, SHRINKING_PATIENCE).await {
            Ok(()) => false,
            Err(it) => {
                (*round, *what) = (fewer, it);
                true
            }
        }
    }
}

/// Without one step of a part, but for its last; `None` if there is no such step.
fn without_step(round: &Round, segment: usize, slot: usize, step: usize) -> Option<Round> {
    let mut fewer = round.clone();
    let steps = &mut fewer.segments[segment].parts[slot].as_mut()?.says.steps;
    if step + 1 >= steps.len() {
        return None;
    }
    steps.remove(step);
    Some(fewer)
}

/// Says a client's part on both sides; whoever is not there logs in first.
async fn say(
    logins: &[Login; 2],
    pair: &mut Option<Pair>,
    part: &Part,
    patience: Duration,
) -> Result<(), String> {
    if pair.is_none() {
        let (left, right) = tokio::join!(Talker::login(&logins[0]), Talker::login(&logins[1]));
        let side = |talker: Result<Talker>| talker.map_err(|error| format!("login: {error:#}"));
        let (left, right) = (side(left)?, side(right)?);
        let told = |talker: &Talker| talker.reported.iter().cloned().collect::<BTreeMap<_, _>>();
        if told(&left) != told(&right) {
            return Err(format!("login: {:?}\n{:?}", left.reported, right.reported));
        }
        *pair = Some(Pair([Side::new(left), Side::new(right)]));
    }
    let Some(Pair([direct, proxied])) = pair else { return Ok(()) };
    let (left, right) =
        tokio::join!(direct.say(&part.says, patience), proxied.say(&part.says, patience));
    let (left, right) = (left.map_err(|e| format!("{e:#}")), right.map_err(|e| format!("{e:#}")));
    let (told, mut wanted) = (heard(proxied), heard(direct));
    describes_nothing_in_failed_transactions(&mut wanted.0, &told.0);
    if told.1 != wanted.1 {
        return Err(format!("parameters:\n  direct {:?}\n  proxied {:?}", wanted.1, told.1));
    }
    if let Some(what) = difference(&wanted.0, &told.0, &left, &right) {
        return Err(what);
    }
    left?;
    if part.leaves != Leave::No || direct.end != End::Open {
        *pair = None;
    }
    Ok(())
}

/// The messages of a side, as far as they can be compared, and its parameters.
fn heard(side: &mut Side) -> (Vec<Frame>, BTreeMap<String, String>) {
    let mut frames = Vec::new();
    for frame in std::mem::take(&mut side.heard) {
        match frame.tag {
            b'S' => {
                if let Ok((name, value)) = backend::parameter_status(&frame.body) {
                    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
                    let known = &mut side.talker.reported;
                    known.retain(|(it, _)| it.as_bytes() != name);
                    known.push((text(name), text(value)));
                }
            }
            _ => frames.push(comparable(frame)),
        }
    }
    (frames, side.talker.reported.iter().cloned().collect())
}

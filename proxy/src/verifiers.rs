//! What the servers have stored of a role's password.
//!
//! Each login asks: a changed password works at once and the old one fails at once, and nothing is
//! used longer than `VALID UNTIL` says. Logins of one moment share a question, if it was asked after
//! they came. What was answered is remembered for the time when no server answers, so that a
//! failover refuses nobody. Unknown roles get a made-up verifier and the same work (DESIGN.md §7).
//!
//! The question goes over connections of the proxy's own, whose startup packet no client has a say
//! in (CVE-2025-12819).

use std::collections::HashMap;
use std::hash::{BuildHasher, RandomState};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};
use std::time::{Duration, Instant};

use bytes::Bytes;
use kornak_cluster::GroupId;
use kornak_config::proxy::AuthSettings;
use kornak_protocol::auth::StoredPassword;
use kornak_protocol::auth::scram::Verifier;
use parking_lot::Mutex;
use secrecy::ExposeSecret;
use sha2::{Digest, Sha256};
use zeroize::Zeroizing;

use crate::backend::{Address, Connected, DialError};
use crate::probe::Prober;

/// How long an answer is used when nobody answers.
const STALE: Duration = Duration::from_secs(600);

/// Roles remembered. 4,096 are less than 1 MB; names come from strangers, so there is a bound.
const MAX_ROLES: usize = 4096;

/// Questions under way, and connections kept open for them. Roles are spread over them by a hash, so
/// one role's logins wait for each other, and a flood of strangers opens no more than these.
const LANES: usize = 4;

/// How long asking one server may take.
const ASK_LIMIT: Duration = Duration::from_secs(5);

/// How long all of it may take if there is an answer of before.
const PATIENCE: Duration = Duration::from_millis(500);

/// Rounds of PBKDF2 that PostgreSQL uses unless `scram_iterations` says otherwise.
const USUAL_ITERATIONS: u32 = 4096;

/// What is known of a role.
#[derive(Debug, Clone)]
pub struct Known {
    /// `None`: there is no such role, or it has no password, or its time is over.
    pub stored: Option<StoredPassword>,
}

#[derive(Debug, Clone)]
struct Answer {
    /// When it was asked for.
    asked: Instant,
    stored: Option<StoredPassword>,
    /// `VALID UNTIL`, if it can be reached.
    ends: Option<Instant>,
}

impl Answer {
    fn known(&self) -> Known {
        let over = self.ends.is_some_and(|ends| Instant::now() >= ends);
        Known { stored: self.stored.clone().filter(|_| !over) }
    }
}

/// The group whose servers are asked, and the role: groups of a Citus cluster may have different verifiers
/// for one password. `None`: any server would do.
pub type Role = (Option<GroupId>, Bytes);

/// A place for one question at a time, with the connection that asked last.
type Lane = tokio::sync::Mutex<Option<(Address, Connected)>>;

/// The cache and those who fill it.
pub struct Verifiers {
    query: String,
    prober: Arc<Prober>,
    known: Mutex<HashMap<Role, Answer>>,
    lanes: [Lane; LANES],
    lane_of: RandomState,
    /// Makes the salts of roles that do not exist.
    secret: Zeroizing<Vec<u8>>,
    /// As the server that was asked last reports it.
    iterations: AtomicU32,
}

impl std::fmt::Debug for Verifiers {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Verifiers").field("query", &self.query).finish_non_exhaustive()
    }
}

impl Verifiers {
    /// An empty cache.
    pub fn new(auth: &AuthSettings, prober: Arc<Prober>) -> Self {
        // Every proxy of a cluster, and every run of it, must answer a stranger alike, or asking
        // twice would tell which roles exist. What they share and nobody else knows is the password.
        let secret = match &auth.password {
            Some(password) => Sha256::new()
                .chain_update(b"kornak: salts of roles that do not exist\0")
                .chain_update(password.expose_secret().as_bytes())
                .finalize()
                .to_vec(),
            None => rand::random::<[u8; 32]>().to_vec(),
        };
        Self {
            query: auth.query.clone(),
            prober,
            known: Mutex::new(HashMap::new()),
            lanes: std::array::from_fn(|_| Lane::default()),
            lane_of: RandomState::new(),
            secret: Zeroizing::new(secret),
            iterations: AtomicU32::new(USUAL_ITERATIONS),
        }
    }

    /// A verifier for a role that has none.
    pub fn mock(&self, role: &[u8]) -> Verifier {
        Verifier::mock(&self.secret, role, self.iterations.load(Relaxed))
    }

    /// Looks a role up at the servers, in this order; if none answers, in the cache.
    pub async fn find(&self, role: &Role, servers: &[Address]) -> Result<Known, DialError> {
        let came = Instant::now();
        let limit = match self.remembered(role) {
            Some(_) => PATIENCE,
            None => ASK_LIMIT * u32::try_from(servers.len()).unwrap_or(1).max(1),
        };
        let asked = tokio::time::timeout(limit, self.ask(role, servers, came)).await;
        match asked.unwrap_or(Err(DialError::Timeout)) {
            Ok(answer) => Ok(answer.known()),
            Err(error) => self.remembered(role).map(|answer| answer.known()).ok_or(error),
        }
    }

    fn remembered(&self, role: &Role) -> Option<Answer> {
        let known = self.known.lock();
        known.get(role).filter(|answer| answer.asked.elapsed() < STALE).cloned()
    }

    fn remember(&self, role: &Role, answer: Answer) {
        let mut known = self.known.lock();
        if known.len() >= MAX_ROLES && !known.contains_key(role) {
            known.retain(|_, old| old.stored.is_some() && old.asked.elapsed() < STALE);
            if known.len() >= MAX_ROLES {
                return;
            }
        }
        known.insert(role.clone(), answer);
    }

    async fn ask(
        &self,
        role: &Role,
        servers: &[Address],
        came: Instant,
    ) -> Result<Answer, DialError> {
        let lane = self.lane_of.hash_one(role) as usize % LANES;
        let Some(lane) = self.lanes.get(lane) else { return Err(DialError::Timeout) };
        let mut lane = lane.lock().await;
        // Somebody may have asked after we came, while we waited for our turn.
        if let Some(answer) = self.remembered(role).filter(|answer| answer.asked >= came) {
            return Ok(answer);
        }
        let mut last = DialError::Timeout;
        for server in servers {
            let asked = Instant::now();
            match tokio::time::timeout(ASK_LIMIT, self.ask_one(&role.1, server, &mut lane)).await {
                Ok(Ok((stored, ends))) => {
                    let answer = Answer { asked, stored, ends };
                    self.remember(role, answer.clone());
                    return Ok(answer);
                }
                Ok(Err(error)) => last = error,
                Err(_) => last = DialError::Timeout,
            }
        }
        Err(last)
    }

    async fn ask_one(
        &self,
        role: &Bytes,
        server: &Address,
        lane: &mut Option<(Address, Connected)>,
    ) -> Result<(Option<StoredPassword>, Option<Instant>), DialError> {
        // Taken out, so that a question that is given up takes its connection with it.
        if let Some((_, mut connected)) = lane.take().filter(|(address, _)| address == server)
            && let Ok(found) = self.query(&mut connected, role).await
        {
            *lane = Some((server.clone(), connected));
            return Ok(found);
        }
        let mut connected = self.prober.connect(server, ASK_LIMIT).await?;
        let rounds = connected.params.get("scram_iterations");
        let rounds = rounds.and_then(|text| std::str::from_utf8(text).ok()?.parse().ok());
        // Reported since PostgreSQL 16.
        self.iterations.store(rounds.unwrap_or(USUAL_ITERATIONS), Relaxed);
        let found = self.query(&mut connected, role).await?;
        *lane = Some((server.clone(), connected));
        Ok(found)
    }

    async fn query(
        &self,
        connected: &mut Connected,
        role: &Bytes,
    ) -> Result<(Option<StoredPassword>, Option<Instant>), DialError> {
        let rows = connected.query(&self.query, &[Some(role)]).await?;
        let row = rows.first().map(Vec::as_slice).unwrap_or_default();
        let stored = row.get(1).and_then(Option::as_ref);
        let stored = stored.and_then(|stored| StoredPassword::parse(stored).ok());
        let left = row.get(2).and_then(Option::as_ref);
        let left = left.and_then(|text| std::str::from_utf8(text).ok()?.parse::<f64>().ok());
        // `infinity` never comes.
        let left = left.and_then(|seconds| Duration::try_from_secs_f64(seconds.max(0.0)).ok());
        Ok((stored, left.and_then(|left| Instant::now().checked_add(left))))
    }
}

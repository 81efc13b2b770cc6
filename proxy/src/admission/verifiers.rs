//! Password verifiers of roles, as the servers have stored them.
//!
//! Each login asks: a changed password works at once and the old one fails at once, and nothing is
//! used longer than `VALID UNTIL` says. Logins of one moment share a question, if it was asked after
//! they came. What was answered is remembered for the time when no server answers, so that a
//! failover refuses nobody. Unknown roles get a made-up verifier and the same work, so
//! that neither the answer nor its delay tells whether a role exists.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};
use std::time::{Duration, Instant};

use bytes::Bytes;
use kornak_cluster::GroupId;
use kornak_config::proxy::AuthSettings;
use kornak_protocol::auth::scram::Verifier;
use kornak_protocol::auth::{Credentials, StoredPassword};
use parking_lot::Mutex;
use secrecy::ExposeSecret;
use sha2::{Digest, Sha256};
use zeroize::Zeroizing;

use crate::admission::lanes::{Lanes, Turn};
use crate::net::backend::{Address, DialError};

/// How long an answer is used when nobody answers.
const STALE: Duration = Duration::from_secs(600);

/// Roles remembered. 4,096 are less than 1 MB; names come from strangers, so there is a bound.
const MAX_ROLES: usize = 4096;

/// Rounds of PBKDF2 that PostgreSQL uses unless `scram_iterations` says otherwise.
const USUAL_ITERATIONS: u32 = 4096;

/// The verifiers that are known of a role.
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

/// The cache and those who fill it.
pub struct Verifiers {
    query: String,
    lanes: Arc<Lanes>,
    known: Mutex<HashMap<Role, Answer>>,
    /// Keys of the last login of each role that has proved itself by SCRAM.
    newest: Mutex<HashMap<Bytes, Credentials>>,
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
    /// A client has proved itself: servers take these keys as long as the password is not set again.
    pub fn remember_keys(&self, user: &Bytes, credentials: &Credentials) {
        let Credentials::Scram(_) = credentials else { return };
        let mut newest = self.newest.lock();
        if newest.len() < MAX_ROLES || newest.contains_key(user) {
            newest.insert(user.clone(), credentials.clone());
        }
    }

    /// The keys of the role's last login.
    pub fn newest_keys(&self, user: &Bytes) -> Option<Credentials> {
        self.newest.lock().get(user).cloned()
    }

    /// An empty cache.
    pub fn new(auth: &AuthSettings, lanes: Arc<Lanes>) -> Self {
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
            lanes,
            known: Mutex::new(HashMap::new()),
            newest: Mutex::new(HashMap::new()),
            secret: Zeroizing::new(secret),
            iterations: AtomicU32::new(USUAL_ITERATIONS),
        }
    }

    /// A verifier for a role that has none.
    pub fn mock(&self, role: &[u8]) -> Verifier {
        Verifier::mock(&self.secret, role, self.iterations.load(Relaxed))
    }

    /// Looks a role up at the servers, in this order. The caller has the deadline.
    pub async fn find(&self, role: &Role, servers: &[Address]) -> Result<Known, DialError> {
        let answer = self.ask(role, servers, Instant::now()).await?;
        Ok(answer.known())
    }

    /// The last answer about a role; for a role that was not asked about, that it has no password.
    pub fn remembered_of(&self, role: &Role) -> Known {
        self.remembered(role).map_or(Known { stored: None }, |answer| answer.known())
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
        let mut turn = self.lanes.turn(role).await?;
        // Somebody may have asked after we came, while we waited for our turn.
        if let Some(answer) = self.remembered(role).filter(|answer| answer.asked >= came) {
            return Ok(answer);
        }
        let mut last = DialError::Timeout;
        for server in servers {
            let asked = Instant::now();
            match self.ask_one(&role.1, server, &mut turn).await {
                Ok((stored, ends)) => {
                    let answer = Answer { asked, stored, ends };
                    self.remember(role, answer.clone());
                    return Ok(answer);
                }
                Err(error) => last = error,
            }
        }
        Err(last)
    }

    async fn ask_one(
        &self,
        role: &Bytes,
        server: &Address,
        turn: &mut Turn<'_>,
    ) -> Result<(Option<StoredPassword>, Option<Instant>), DialError> {
        let rows = turn.ask(server, &self.query, &[Some(role)]).await?;
        // Reported since PostgreSQL 16.
        let rounds = turn.reported("scram_iterations");
        let rounds = rounds.and_then(|text| std::str::from_utf8(text).ok()?.parse().ok());
        self.iterations.store(rounds.unwrap_or(USUAL_ITERATIONS), Relaxed);
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

//! Roles' password verifiers, asked of the servers and kept for a short while.
//!
//! A login that meets a cached verifier and fails asks again before it is refused, so a changed
//! password works at once; while no server answers, a cached one serves longer, so that a failover
//! refuses nobody. Unknown roles get a made-up verifier and the same work (DESIGN.md §7).

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use kornak_config::proxy::AuthSettings;
use kornak_protocol::auth::StoredPassword;
use kornak_protocol::auth::scram::Verifier;
use parking_lot::Mutex;

use crate::backend::{Address, Connected, DialError};
use crate::probe::Prober;

/// How long a verifier is used without asking.
const FRESH: Duration = Duration::from_secs(30);

/// How long it is used when nobody answers.
const STALE: Duration = Duration::from_secs(600);

/// Roles remembered. 4,096 are less than 1 MB; names come from strangers, so there is a bound.
const MAX_ROLES: usize = 4096;

/// Connections kept open for asking.
const MAX_IDLE: usize = 2;

/// How long asking may take.
const ASK_LIMIT: Duration = Duration::from_secs(5);

/// Rounds of PBKDF2 that PostgreSQL uses unless `scram_iterations` says otherwise.
const USUAL_ITERATIONS: u32 = 4096;

/// What is known of a role.
#[derive(Debug, Clone)]
pub struct Known {
    /// `None`: there is no such role, or it has no password.
    pub stored: Option<StoredPassword>,
    /// It was asked for this login, not remembered.
    pub is_fresh: bool,
}

/// The cache and those who fill it.
#[derive(Debug)]
pub struct Verifiers {
    query: String,
    prober: Arc<Prober>,
    known: Mutex<HashMap<Bytes, (Instant, Option<StoredPassword>)>>,
    idle: Mutex<Vec<(Address, Connected)>>,
    /// Makes the salts of roles that do not exist; the same for one name as long as we live.
    secret: [u8; 32],
}

impl Verifiers {
    /// An empty cache.
    pub fn new(auth: &AuthSettings, prober: Arc<Prober>) -> Self {
        Self {
            query: auth.query.clone(),
            prober,
            known: Mutex::new(HashMap::new()),
            idle: Mutex::new(Vec::new()),
            secret: rand::random(),
        }
    }

    /// A verifier for a role that has none.
    pub fn mock(&self, role: &[u8]) -> Verifier {
        Verifier::mock(&self.secret, role, USUAL_ITERATIONS)
    }

    /// Looks a role up: in the cache unless `again`, then at the servers in this order.
    pub async fn find(
        &self,
        role: &Bytes,
        again: bool,
        servers: &[Address],
    ) -> Result<Known, DialError> {
        let cached = self.known.lock().get(role).cloned();
        if let Some((when, stored)) = &cached
            && !again
            && when.elapsed() < FRESH
        {
            return Ok(Known { stored: stored.clone(), is_fresh: false });
        }
        match self.ask(role, servers).await {
            Ok(stored) => {
                self.remember(role, stored.clone());
                Ok(Known { stored, is_fresh: true })
            }
            Err(error) => match cached {
                Some((when, stored)) if when.elapsed() < STALE => {
                    Ok(Known { stored, is_fresh: again })
                }
                _ => Err(error),
            },
        }
    }

    fn remember(&self, role: &Bytes, stored: Option<StoredPassword>) {
        let mut known = self.known.lock();
        if known.len() >= MAX_ROLES && !known.contains_key(role) {
            known.retain(|_, (when, stored)| stored.is_some() && when.elapsed() < FRESH);
            if known.len() >= MAX_ROLES {
                return;
            }
        }
        known.insert(role.clone(), (Instant::now(), stored));
    }

    async fn ask(
        &self,
        role: &Bytes,
        servers: &[Address],
    ) -> Result<Option<StoredPassword>, DialError> {
        let mut last = DialError::Timeout;
        for server in servers {
            match tokio::time::timeout(ASK_LIMIT, self.ask_one(role, server)).await {
                Ok(Ok(stored)) => return Ok(stored),
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
    ) -> Result<Option<StoredPassword>, DialError> {
        if let Some(mut connected) = self.take_idle(server)
            && let Ok(stored) = self.query(&mut connected, role).await
        {
            self.keep(server, connected);
            return Ok(stored);
        }
        let mut connected = self.prober.connect(server, ASK_LIMIT).await?;
        let stored = self.query(&mut connected, role).await?;
        self.keep(server, connected);
        Ok(stored)
    }

    async fn query(
        &self,
        connected: &mut Connected,
        role: &Bytes,
    ) -> Result<Option<StoredPassword>, DialError> {
        let rows = connected.query(&self.query, &[Some(role)]).await?;
        let row = rows.first().map(Vec::as_slice).unwrap_or_default();
        let stored = row.get(1).and_then(Option::as_ref);
        Ok(stored.and_then(|stored| StoredPassword::parse(stored).ok()))
    }

    fn take_idle(&self, server: &Address) -> Option<Connected> {
        let mut idle = self.idle.lock();
        let at = idle.iter().position(|(address, _)| address == server)?;
        Some(idle.swap_remove(at).1)
    }

    fn keep(&self, server: &Address, connected: Connected) {
        let mut idle = self.idle.lock();
        if idle.len() >= MAX_IDLE {
            idle.remove(0);
        }
        idle.push((server.clone(), connected));
    }
}

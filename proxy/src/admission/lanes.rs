//! The proxy's own connections for questions about logins.
//!
//! The startup packet of such a connection is ours and no client has a say in it (CVE-2025-12819).

use std::hash::{BuildHasher, Hash, RandomState};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::MutexGuard;

use crate::cluster::probe::Prober;
use crate::net::backend::{Address, Connected, DialError};

/// Questions under way, and connections kept open for them. Roles are spread over them by a hash, so
/// one role's logins wait for each other, and a flood of strangers opens no more than these.
const LANES: usize = 4;

/// How long asking one server may take.
pub const ASK_LIMIT: Duration = Duration::from_secs(5);

/// A place for one question at a time, with the connection that asked last.
type Lane = tokio::sync::Mutex<Option<(Address, Connected)>>;

/// Rows of text.
pub type Rows = Vec<Vec<Option<Bytes>>>;

/// All of them.
pub struct Lanes {
    prober: Arc<Prober>,
    lanes: [Lane; LANES],
    lane_of: RandomState,
}

impl std::fmt::Debug for Lanes {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Lanes").finish_non_exhaustive()
    }
}

/// The right to ask.
#[derive(Debug)]
pub struct Turn<'l> {
    prober: &'l Prober,
    lane: MutexGuard<'l, Option<(Address, Connected)>>,
}

impl Lanes {
    /// Nothing is open yet.
    pub fn new(prober: Arc<Prober>) -> Self {
        Self {
            prober,
            lanes: std::array::from_fn(|_| Lane::default()),
            lane_of: RandomState::new(),
        }
    }

    /// Waits for whoever asks about the same, and for some others.
    pub async fn turn(&self, about: &impl Hash) -> Result<Turn<'_>, DialError> {
        let lane = self.lane_of.hash_one(about) as usize % LANES;
        let lane = self.lanes.get(lane).ok_or(DialError::Timeout)?.lock().await;
        Ok(Turn { prober: &self.prober, lane })
    }
}

impl Turn<'_> {
    /// Asks one server, over the open connection if it leads there.
    pub async fn ask(
        &mut self,
        server: &Address,
        sql: &str,
        values: &[Option<&[u8]>],
    ) -> Result<Rows, DialError> {
        let asking = self.ask_patiently(server, sql, values);
        tokio::time::timeout(ASK_LIMIT, asking).await.map_err(|_| DialError::Timeout)?
    }

    async fn ask_patiently(
        &mut self,
        server: &Address,
        sql: &str,
        values: &[Option<&[u8]>],
    ) -> Result<Rows, DialError> {
        // Taken out, so that a question that is given up takes its connection with it.
        if let Some((_, mut connected)) = self.lane.take().filter(|(address, _)| address == server)
            && let Ok(rows) = connected.query(sql, values).await
        {
            *self.lane = Some((server.clone(), connected));
            return Ok(rows);
        }
        let mut connected = self.prober.connect(server, ASK_LIMIT).await?;
        let rows = connected.query(sql, values).await?;
        *self.lane = Some((server.clone(), connected));
        Ok(rows)
    }

    /// The value of a parameter as the server reports it that was asked last.
    pub fn reported(&self, name: &str) -> Option<&[u8]> {
        self.lane.as_ref()?.1.params.get(name)
    }
}

//! Counts and bounds of a proxy's clients, before and after they have proven who they are.
//!
//! ```text
//! stranger ── has said who it wants to be ──► asking ── has proven it ──► client
//!    └─ makes room for the next one             └─ refused if there are too many
//! ```
//! Whoever has proven nothing must not keep others out. A stranger on whom the proxy waits can always
//! be sent away, and is, the oldest first, when another one comes; one that waits for the proxy (no
//! server answers) counts with the clients. Not here: sockets, and what the refused are told.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use arc_swap::ArcSwap;
use bytes::Bytes;
use kornak_config::proxy::LimitSettings;
use kornak_protocol::error::ErrorFields;
use kornak_protocol::sqlstate::TOO_MANY_CONNECTIONS;
use parking_lot::Mutex;
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

/// The user, database and address of a client.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Who {
    pub user: Bytes,
    pub database: Bytes,
    pub address: SocketAddr,
}

/// Which bound keeps a client out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Full {
    Clients,
    User,
    Database,
    Address,
    /// Server connections of the role or of the database.
    Servers,
}

impl Full {
    /// The error for the client, in PostgreSQL's words where PostgreSQL has some.
    pub fn fields(self, who: &Who) -> ErrorFields {
        let name = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        let (text, limit) = match self {
            Self::Clients => ("sorry, too many clients already".to_owned(), "max_clients"),
            Self::User => (
                format!("too many connections for role \"{}\"", name(&who.user)),
                "max_user_client_connections",
            ),
            Self::Database => (
                format!("too many connections for database \"{}\"", name(&who.database)),
                "max_db_client_connections",
            ),
            Self::Servers => (
                format!(
                    "too many server connections for role \"{}\" or database \"{}\"",
                    name(&who.user),
                    name(&who.database)
                ),
                "max_user_connections or max_db_connections",
            ),
            Self::Address => (
                format!("too many connections from {}", who.address.ip()),
                "max_address_client_connections",
            ),
        };
        ErrorFields::fatal(TOO_MANY_CONNECTIONS, text)
            .hint(format!("The proxy's limit {limit} is reached."))
    }
}

/// All counts of one proxy.
#[derive(Debug)]
pub struct Doors {
    bounds: ArcSwap<LimitSettings>,
    inner: Mutex<Inner>,
    /// Notified when somebody who was sent away has gone.
    gone: Notify,
}

#[derive(Debug, Default)]
struct Inner {
    /// Number of the connection that came last.
    last: u64,
    /// In the order in which they came.
    strangers: BTreeMap<u64, Stranger>,
    by_origin: HashMap<IpAddr, BTreeSet<u64>>,
    /// Sent away, and not gone yet: their sockets are still open.
    leaving: usize,
    asking: usize,
    clients: usize,
    users: HashMap<Bytes, usize>,
    databases: HashMap<Bytes, usize>,
    addresses: HashMap<IpAddr, usize>,
}

#[derive(Debug)]
struct Stranger {
    /// `None`: behind a balancer, and it is not known yet.
    origin: Option<IpAddr>,
    sent_away: CancellationToken,
}

#[derive(Debug)]
enum Stage {
    Stranger,
    Asking,
    Client(Who),
}

/// A connection, from accept to its end.
#[derive(Debug)]
pub struct Visit {
    doors: Arc<Doors>,
    number: u64,
    stage: Stage,
    origin: Option<IpAddr>,
    sent_away: CancellationToken,
}

impl Doors {
    /// With nobody there.
    pub fn new(bounds: &LimitSettings) -> Self {
        let bounds = ArcSwap::from_pointee(bounds.clone());
        Self { bounds, inner: Mutex::default(), gone: Notify::new() }
    }

    /// Other bounds hold from now on; who is in stays.
    pub fn set_bounds(&self, bounds: &LimitSettings) {
        self.bounds.store(Arc::new(bounds.clone()));
        // Whoever waits for room may have it now.
        self.gone.notify_waiters();
    }

    /// Somebody has connected. `origin`: from there, unless only a balancer knows.
    pub fn knock(self: &Arc<Self>, origin: Option<IpAddr>) -> Visit {
        let mut inner = self.inner.lock();
        inner.last += 1;
        let number = inner.last;
        let sent_away = CancellationToken::new();
        inner.make_room(origin, &self.bounds.load());
        inner.put(number, Stranger { origin, sent_away: sent_away.clone() });
        drop(inner);
        Visit { doors: Arc::clone(self), number, stage: Stage::Stranger, origin, sent_away }
    }

    /// Waits until no more of those sent away are still there than strangers may be: whoever accepts
    /// faster than others go would run out of file descriptors.
    pub async fn room(&self) {
        loop {
            let mut gone = std::pin::pin!(self.gone.notified());
            // Before the look, so that nobody goes unnoticed between the look and the wait.
            gone.as_mut().enable();
            if self.inner.lock().leaving < self.bounds.load().max_unauthenticated {
                return;
            }
            gone.await;
        }
    }

    /// A stranger is one no more: it has gone, or has come in although it was sent away.
    fn ends(&self, inner: &mut Inner, number: u64) {
        if inner.take(number).is_none() {
            inner.leaving -= 1;
            self.gone.notify_waiters();
        }
    }

    /// Connections that have proven nothing, and clients.
    pub fn counts(&self) -> (usize, usize) {
        let inner = self.inner.lock();
        (inner.strangers.len() + inner.asking, inner.clients)
    }
}

impl Inner {
    fn put(&mut self, number: u64, stranger: Stranger) {
        if let Some(origin) = stranger.origin {
            self.by_origin.entry(origin).or_default().insert(number);
        }
        self.strangers.insert(number, stranger);
    }

    fn take(&mut self, number: u64) -> Option<Stranger> {
        let stranger = self.strangers.remove(&number)?;
        if let Some(origin) = stranger.origin
            && let Some(of_origin) = self.by_origin.get_mut(&origin)
        {
            of_origin.remove(&number);
            if of_origin.is_empty() {
                self.by_origin.remove(&origin);
            }
        }
        Some(stranger)
    }

    /// Sends the oldest of an origin away that has its share, and if there are too many in all the
    /// oldest of whoever has most.
    fn make_room(&mut self, origin: Option<IpAddr>, bounds: &LimitSettings) {
        if let Some(of_origin) = origin.and_then(|origin| self.by_origin.get(&origin))
            && of_origin.len() >= bounds.max_unauthenticated_per_address
        {
            let oldest = of_origin.first().copied();
            self.send_away(oldest);
        }
        if self.strangers.len() >= bounds.max_unauthenticated {
            let most = self.by_origin.values().max_by_key(|of_origin| of_origin.len());
            let oldest = most.and_then(|of_origin| of_origin.first());
            let oldest = oldest.or_else(|| self.strangers.keys().next()).copied();
            self.send_away(oldest);
        }
    }

    fn send_away(&mut self, number: Option<u64>) {
        if let Some(stranger) = number.and_then(|number| self.take(number)) {
            stranger.sent_away.cancel();
            self.leaving += 1;
        }
    }

    /// Which bound another client would break.
    fn full(&self, who: &Who, bounds: &LimitSettings, is_superuser: bool) -> Option<Full> {
        let reserve = if is_superuser { bounds.superuser_reserved_connections } else { 0 };
        if self.clients >= bounds.max_clients.saturating_add(reserve) {
            return Some(Full::Clients);
        }
        // As in PostgreSQL, a superuser is counted and not bound.
        if is_superuser {
            return None;
        }
        let reached = |bound: Option<usize>, count: Option<&usize>| {
            bound.is_some_and(|bound| count.copied().unwrap_or(0) >= bound)
        };
        let address = who.address.ip();
        if reached(bounds.max_user_client_connections, self.users.get(&who.user)) {
            Some(Full::User)
        } else if reached(bounds.max_db_client_connections, self.databases.get(&who.database)) {
            Some(Full::Database)
        } else if reached(bounds.max_address_client_connections, self.addresses.get(&address)) {
            Some(Full::Address)
        } else {
            None
        }
    }

    fn count(&mut self, who: &Who) {
        self.clients += 1;
        *self.users.entry(who.user.clone()).or_insert(0) += 1;
        *self.databases.entry(who.database.clone()).or_insert(0) += 1;
        *self.addresses.entry(who.address.ip()).or_insert(0) += 1;
    }

    fn discount(&mut self, who: &Who) {
        fn less<K: std::hash::Hash + Eq>(counts: &mut HashMap<K, usize>, key: &K) {
            if let Some(count) = counts.get_mut(key) {
                *count -= 1;
                if *count == 0 {
                    counts.remove(key);
                }
            }
        }
        self.clients -= 1;
        less(&mut self.users, &who.user);
        less(&mut self.databases, &who.database);
        less(&mut self.addresses, &who.address.ip());
    }
}

impl Visit {
    /// A balancer has said where it comes from.
    pub fn comes_from(&mut self, origin: IpAddr) {
        self.origin = Some(origin);
        let mut inner = self.doors.inner.lock();
        let Some(stranger) = inner.take(self.number) else { return };
        inner.make_room(self.origin, &self.doors.bounds.load());
        inner.put(self.number, Stranger { origin: self.origin, ..stranger });
    }

    /// Cancelled when it has to make room for others.
    pub fn sent_away(&self) -> CancellationToken {
        self.sent_away.clone()
    }

    /// The proxy has to find something out; the visitor waits and is not to blame.
    ///
    /// # Errors
    /// Too many wait already.
    pub fn asks(&mut self) -> Result<(), Full> {
        let bounds = self.doors.bounds.load();
        let mut inner = self.doors.inner.lock();
        let room = bounds.max_clients.saturating_add(bounds.max_unauthenticated);
        if inner.clients + inner.asking >= room {
            return Err(Full::Clients);
        }
        if inner.take(self.number).is_some() {
            inner.asking += 1;
            self.stage = Stage::Asking;
        }
        Ok(())
    }

    /// Notes that the proxy waits for the visitor again.
    pub fn listens(&mut self) {
        if !matches!(self.stage, Stage::Asking) {
            return;
        }
        self.stage = Stage::Stranger;
        let mut inner = self.doors.inner.lock();
        inner.asking -= 1;
        inner.make_room(self.origin, &self.doors.bounds.load());
        let stranger = Stranger { origin: self.origin, sent_away: self.sent_away.clone() };
        inner.put(self.number, stranger);
    }

    /// Counts a visitor as a client: the visitor has proven who it is.
    ///
    /// # Errors
    /// The bound that keeps it out; it stays what it was.
    pub fn enter(&mut self, who: Who, is_superuser: bool) -> Result<(), Full> {
        let mut inner = self.doors.inner.lock();
        if let Some(full) = inner.full(&who, &self.doors.bounds.load(), is_superuser) {
            return Err(full);
        }
        match self.stage {
            Stage::Stranger => self.doors.ends(&mut inner, self.number),
            Stage::Asking => inner.asking -= 1,
            Stage::Client(_) => return Ok(()),
        }
        inner.count(&who);
        self.stage = Stage::Client(who);
        Ok(())
    }

    /// The user, database and address of the visitor, once it has entered.
    pub fn who(&self) -> Option<&Who> {
        match &self.stage {
            Stage::Client(who) => Some(who),
            Stage::Stranger | Stage::Asking => None,
        }
    }
}

impl Drop for Visit {
    fn drop(&mut self) {
        let mut inner = self.doors.inner.lock();
        match &self.stage {
            Stage::Stranger => self.doors.ends(&mut inner, self.number),
            Stage::Asking => inner.asking -= 1,
            Stage::Client(who) => inner.discount(who),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn doors(change: impl FnOnce(&mut LimitSettings)) -> Arc<Doors> {
        let mut bounds = LimitSettings {
            max_clients: 2,
            superuser_reserved_connections: 1,
            max_unauthenticated: 4,
            max_unauthenticated_per_address: 3,
            ..LimitSettings::default()
        };
        change(&mut bounds);
        Arc::new(Doors::new(&bounds))
    }

    fn from(last: u8) -> Option<IpAddr> {
        Some(IpAddr::from([10, 0, 0, last]))
    }

    fn who(user: &str, database: &str, last: u8) -> Who {
        let address = SocketAddr::from(([10, 0, 0, last], 5));
        Who {
            user: Bytes::copy_from_slice(user.as_bytes()),
            database: Bytes::copy_from_slice(database.as_bytes()),
            address,
        }
    }

    fn gone(visits: &[Visit]) -> Vec<usize> {
        let gone = visits.iter().enumerate().filter(|(_, visit)| visit.sent_away.is_cancelled());
        gone.map(|(at, _)| at).collect()
    }

    #[test]
    fn strangers_make_room_for_strangers_and_keep_nobody_out() {
        let doors = doors(|_| ());
        let mut visits: Vec<Visit> = (0..3).map(|_| doors.knock(from(1))).collect();
        assert_eq!(gone(&visits), [0; 0]);
        visits.push(doors.knock(from(1)));
        assert_eq!(gone(&visits), [0], "the oldest of its address");
        visits.push(doors.knock(from(2)));
        assert_eq!(gone(&visits), [0], "another address has room");
        visits.push(doors.knock(from(3)));
        assert_eq!(gone(&visits), [0, 1], "the oldest of whoever has most");
        assert!(visits[5].enter(who("app", "db", 3), false).is_ok());
        assert_eq!(doors.counts(), (3, 1));
        drop(visits);
        assert_eq!(doors.counts(), (0, 0));
    }

    #[test]
    fn who_waits_for_the_proxy_is_not_sent_away() {
        let doors = doors(|_| ());
        let mut waiting = doors.knock(from(1));
        waiting.asks().unwrap();
        let visits: Vec<Visit> = (0..9).map(|_| doors.knock(from(1))).collect();
        assert!(!waiting.sent_away.is_cancelled());
        assert_eq!(gone(&visits).len(), 6);
        waiting.listens();
        assert_eq!(gone(&visits).len(), 7, "among strangers it is one of them, and the newest");
        assert!(!waiting.sent_away.is_cancelled());
        // Bounded all the same: two clients and four strangers.
        let asking: Vec<(Visit, bool)> = (0..7)
            .map(|_| {
                let mut visit = doors.knock(from(2));
                let full = visit.asks().is_err();
                (visit, full)
            })
            .collect();
        assert_eq!(asking.iter().filter(|(_, full)| *full).count(), 1);
    }

    #[test]
    fn nobody_is_accepted_while_too_many_are_still_leaving() {
        use futures_util::FutureExt as _;
        let doors = doors(|_| ());
        let has_room = || doors.room().now_or_never().is_some();
        let mut visits: Vec<Visit> = (0..6).map(|_| doors.knock(from(1))).collect();
        assert!(has_room(), "three of four may be leaving");
        visits.push(doors.knock(from(1)));
        assert!(!has_room());
        let mut waits = Box::pin(doors.room());
        assert!(waits.as_mut().now_or_never().is_none());
        drop(visits.remove(0));
        assert!(waits.now_or_never().is_some(), "one of them has gone");
        visits.push(doors.knock(from(1)));
        assert!(!has_room());
        assert!(visits[0].enter(who("app", "db", 1), false).is_ok());
        assert!(has_room(), "one of them has come in all the same");
        drop(visits);
        assert_eq!(doors.inner.lock().leaving, 0);
    }

    #[test]
    fn behind_a_balancer_an_origin_counts_from_when_it_is_known() {
        let doors = doors(|bounds| bounds.max_unauthenticated = 9);
        let mut visits: Vec<Visit> = (0..5).map(|_| doors.knock(None)).collect();
        assert_eq!(gone(&visits), [0; 0]);
        for visit in visits.iter_mut().take(4) {
            visit.comes_from(IpAddr::from([10, 0, 0, 7]));
        }
        assert_eq!(gone(&visits), [0]);
    }

    #[test]
    fn clients_are_bound_in_all_and_by_what_they_are() {
        let doors = doors(|bounds| {
            bounds.max_clients = 5;
            bounds.max_user_client_connections = Some(2);
            bounds.max_db_client_connections = Some(3);
            bounds.max_address_client_connections = Some(3);
        });
        let mut kept = Vec::new();
        let mut enter = |user, database, last, superuser| {
            let mut visit = doors.knock(from(last));
            let entered = visit.enter(who(user, database, last), superuser);
            if entered.is_ok() {
                kept.push(visit);
            }
            entered
        };
        assert_eq!(enter("a", "x", 1, false), Ok(()));
        assert_eq!(enter("a", "x", 2, false), Ok(()));
        assert_eq!(enter("a", "y", 3, false), Err(Full::User));
        assert_eq!(enter("b", "x", 1, false), Ok(()));
        assert_eq!(enter("c", "x", 3, false), Err(Full::Database));
        assert_eq!(enter("boss", "x", 1, true), Ok(()));
        assert_eq!(enter("c", "y", 1, false), Err(Full::Address));
        assert_eq!(enter("c", "y", 9, false), Ok(()));
        assert_eq!(enter("d", "z", 9, false), Err(Full::Clients));
        assert_eq!(enter("boss", "x", 1, true), Ok(()), "the reserve");
        assert_eq!(enter("boss", "x", 1, true), Err(Full::Clients), "and no more than it");
        kept.clear();
        assert_eq!(doors.counts(), (0, 0));
        assert!(doors.inner.lock().users.is_empty());
        let text = format!("{:?}", Full::User.fields(&who("a\"b", "x", 1)));
        assert!(text.contains("53300") || text.contains("too many connections"), "{text}");
    }
}

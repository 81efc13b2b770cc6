//! Asking a server what it is: alive, writable, which run of which cluster.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};
use std::time::{Duration, Instant};

use bytes::Bytes;
use kornak_cluster::{Lsn, Timeline};
use kornak_config::proxy::{AuthSettings, RequireAuth};
use kornak_protocol::auth::Credentials;
use kornak_protocol::sqlstate::SqlState;
use parking_lot::Mutex;
use secrecy::ExposeSecret;
use tokio::net::TcpStream;
use zeroize::Zeroizing;

use crate::cluster::standing::Instance;
use crate::net::backend::{self, Account, Address, Connected, DialError};
use crate::net::tls::ServerTls;

/// `application_name` of connections that ask servers what they are; agents leave it out when they
/// count who is busy.
const PROBE_NAME: &str = "Kornak proxy";

/// How long one answer to "does this server take logins" serves every session (docs/safety.md A15).
const EVIDENCE_LASTS: Duration = Duration::from_secs(1);

const LOOK: &str = "SELECT r::text, \
    CASE WHEN r THEN NULL ELSE substr(pg_walfile_name(pg_current_wal_lsn()), 1, 8) END, \
    pg_postmaster_start_time()::text, \
    (SELECT system_identifier::text FROM pg_control_system()), \
    (CASE WHEN r THEN coalesce(pg_last_wal_replay_lsn(), '0/0') ELSE pg_current_wal_lsn() END)::text, \
    (SELECT string_agg(gid, ' ') FROM (SELECT gid FROM pg_prepared_xacts \
        WHERE starts_with(gid, 'citus_') LIMIT 1000) AS p) \
    FROM (SELECT pg_is_in_recovery() AS r) AS s";

/// The state of a server, in its own words.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Facts {
    pub in_recovery: bool,
    pub instance: Instance,
    /// Written on a primary, replayed on a standby.
    pub lsn: Option<Lsn>,
    /// Names of the distributed transactions of Citus that are prepared on it, a thousand at most.
    pub prepared: BTreeSet<String>,
}

/// When a server was asked last and whether it was going down; locked while somebody asks.
type Evidence = Arc<tokio::sync::Mutex<Option<(Instant, bool)>>>;

/// Asks servers, with the role of `auth.user`.
#[derive(Debug)]
pub struct Prober {
    tls: ServerTls,
    user: Option<String>,
    password: Credentials,
    database: String,
    require_auth: RequireAuth,
    /// Major version of the server that was logged in to last; 0: of none.
    major: AtomicU32,
    evidence: Mutex<HashMap<Address, Evidence>>,
}

impl Prober {
    /// From `proxy.auth`.
    pub fn new(auth: &AuthSettings, tls: ServerTls) -> Self {
        let secret = |p: &secrecy::SecretString| p.expose_secret().as_bytes().to_vec();
        let password = match &auth.password {
            Some(password) => Credentials::Password(Zeroizing::new(secret(password))),
            None => Credentials::None,
        };
        Self {
            tls,
            user: auth.user.clone(),
            password,
            database: auth.database.clone(),
            require_auth: auth.require_auth,
            major: AtomicU32::new(0),
            evidence: Mutex::new(HashMap::new()),
        }
    }

    /// Whether there is a role to ask with. Without one, a server that takes connections and leads
    /// by the store counts as proven.
    pub fn can_ask(&self) -> bool {
        self.user.is_some()
    }

    /// TLS of server connections.
    pub fn tls(&self) -> &ServerTls {
        &self.tls
    }

    /// Logs in.
    pub async fn connect(&self, at: &Address, limit: Duration) -> Result<Connected, DialError> {
        self.connect_to(at, &self.database, limit).await
    }

    /// Connects to this database of a server and logs in with the proxy's own role.
    pub async fn connect_to(
        &self,
        at: &Address,
        database: &str,
        limit: Duration,
    ) -> Result<Connected, DialError> {
        let user = self.user.as_deref().unwrap_or("postgres");
        let startup = backend::own_startup(user, database, PROBE_NAME)?;
        let account = Account {
            startup: &startup,
            user: user.as_bytes(),
            credentials: &self.password,
            own: Some(self.require_auth),
        };
        let connected = backend::connect(at, &self.tls, account, limit).await?;
        self.heard_version(connected.params.get("server_version"));
        Ok(connected)
    }

    /// A server has said which version it is of.
    pub fn heard_version(&self, said: Option<&[u8]>) {
        let said = said.and_then(|text| std::str::from_utf8(text).ok()).unwrap_or_default();
        let digits = said.split(|letter: char| !letter.is_ascii_digit()).next();
        if let Some(major) = digits.and_then(|digits| digits.parse().ok()) {
            self.major.store(major, Relaxed);
        }
    }

    /// Whether servers cut names that are too long in a startup packet, as they did before
    /// PostgreSQL 17. Also said of servers that nobody has heard of yet: what they are sent has been
    /// cut by us then, so the names that were judged are the ones that count.
    pub fn cuts_names(&self) -> bool {
        self.major.load(Relaxed) < 17
    }

    /// Only whether somebody listens.
    pub async fn knock(&self, at: &Address, limit: Duration) -> Result<(), DialError> {
        let dial = TcpStream::connect((&*at.host, at.port));
        tokio::time::timeout(limit, dial).await.map_err(|_| DialError::Timeout)??;
        Ok(())
    }

    /// Asks over a connection that is open.
    pub async fn look(connected: &mut Connected, limit: Duration) -> Result<Facts, DialError> {
        let rows = tokio::time::timeout(limit, connected.query(LOOK, &[]));
        let rows = rows.await.map_err(|_| DialError::Timeout)??;
        let row = rows.first().map(Vec::as_slice).unwrap_or_default();
        let text = |n: usize| -> Option<String> {
            let value: &Bytes = row.get(n)?.as_ref()?;
            Some(String::from_utf8_lossy(value).into_owned())
        };
        let in_recovery = match text(0).as_deref() {
            Some("true") => true,
            Some("false") => false,
            _ => {
                let what = "no answer to pg_is_in_recovery".to_owned();
                return Err(DialError::Protocol { what });
            }
        };
        let timeline = text(1).and_then(|hex| u32::from_str_radix(&hex, 16).ok());
        let instance = Instance {
            timeline: timeline.map(Timeline),
            started: text(2),
            system_identifier: text(3),
        };
        let lsn = text(4).and_then(|lsn| lsn.parse().ok());
        let prepared = text(5).unwrap_or_default();
        let prepared = prepared.split_ascii_whitespace().map(str::to_owned).collect();
        Ok(Facts { in_recovery, instance, lsn, prepared })
    }

    /// Whether the server is going down, as far as one login tells; shared by all sessions.
    pub async fn is_going_down(&self, at: &Address, limit: Duration) -> bool {
        let cell = Arc::clone(self.evidence.lock().entry(at.clone()).or_default());
        let mut known = cell.lock().await;
        if let Some((when, down)) = *known
            && when.elapsed() < EVIDENCE_LASTS
        {
            return down;
        }
        let down = match self.connect(at, limit).await {
            Ok(_) => false,
            Err(DialError::Refused { sqlstate, .. }) => is_shutdown(sqlstate),
            Err(error) => error.is_about_server(),
        };
        *known = Some((Instant::now(), down));
        down
    }
}

fn is_shutdown(sqlstate: SqlState) -> bool {
    sqlstate.class() == *b"57"
}

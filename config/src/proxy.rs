//! Settings of one proxy: the head of an agent's file and a `proxy:` section.
//!
//! Every type here is plain data that has passed its checks; how text becomes it is in
//! the readers of this crate.

use std::path::PathBuf;
use std::time::Duration;

use kornak_cluster::Scope;
use secrecy::SecretString;

use crate::address::{HostPort, Listen};
use crate::agent::BasicAuth;
use crate::log::LogSettings;
use crate::rules::{Method, Network, Rule, Rules};
use crate::store::StoreSettings;

/// All that a proxy needs to know.
#[derive(Debug, Clone)]
pub struct ProxySettings {
    /// The whole cluster; `group` is always `None`.
    pub scope: Scope,
    /// Names this proxy in the store. Default: host name and process id, chosen at start.
    pub name: Option<String>,
    pub source: Source,
    /// Where other proxies of the cluster reach a listener of this one, for cancel requests. `None`:
    /// found out at start.
    pub connect_address: Option<HostPort>,
    /// Never empty; names and addresses are unique.
    pub listeners: Vec<ListenerSettings>,
    /// Status page, `/metrics` and JSON; `None` (written `false`): off.
    pub status: Option<StatusSettings>,
    pub auth: AuthSettings,
    pub tls: ProxyTls,
    pub limits: LimitSettings,
    pub failover: FailoverSettings,
    pub pool: PoolSettings,
    /// Every client that logs in is a line of the log.
    pub log_connections: bool,
    /// Every client that leaves is one.
    pub log_disconnections: bool,
    /// A session's `application_name` on the server says where its client is.
    pub application_name_add_host: bool,
    /// Where the servers of the cluster are noted, for a start without the store.
    pub state_file: Option<PathBuf>,
    /// Worker threads; `None`: one per core.
    pub threads: Option<usize>,
    pub log: LogSettings,
}

/// Where the proxy learns who is primary.
#[derive(Debug, Clone)]
pub enum Source {
    Dcs(StoreSettings),
    /// Asks the servers themselves.
    Static {
        members: Vec<StaticMember>,
    },
    /// Asks Patroni's REST API of these members, `http://host:port`.
    Rest {
        members: Vec<String>,
    },
}

/// A server known by configuration alone.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StaticMember {
    pub name: String,
    pub host: String,
    /// Default 5432.
    pub port: u16,
}

/// Which servers a listener leads to.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Target {
    /// The leader; in a Citus cluster the coordinator's. Also written `coordinator`.
    Primary,
    /// The leaders of the worker groups, balanced.
    Workers,
    /// Balanced over the standbys.
    Standbys,
    /// Balanced over every running server.
    Any,
    /// This member, whatever its role. Written `member: name`.
    Member(String),
}

/// How sessions are spread.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Balance {
    #[default]
    LeastSessions,
    RoundRobin,
    /// The less busy of two chosen at random.
    Random,
}

/// How long a client keeps a server connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum PoolMode {
    /// As long as it is connected: it cannot tell the proxy from the server.
    #[default]
    Session,
    /// For one transaction; many clients share few connections.
    Transaction,
}

/// `proxy.status`.
#[derive(Debug, Clone)]
pub struct StatusSettings {
    /// Default `127.0.0.1:7000`.
    pub listen: Listen,
    /// Asked of every request. Without it no names of roles and no words of servers are shown.
    pub authentication: Option<BasicAuth>,
    /// PEM files; `Some`: https.
    pub tls: Option<StatusTls>,
}

impl StatusSettings {
    /// In the clear, for everybody who reaches it.
    pub fn new(listen: Listen) -> Self {
        Self { listen, authentication: None, tls: None }
    }
}

impl Default for StatusSettings {
    fn default() -> Self {
        Self::new(Listen { hosts: vec!["127.0.0.1".to_owned()], port: 7000 })
    }
}

/// The certificate of the status page.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StatusTls {
    pub certfile: PathBuf,
    /// Default: in the same file.
    pub keyfile: PathBuf,
}

/// Whose word a listener takes for where a client is: headers of the PROXY protocol, v1 or v2.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum ProxyProtocol {
    /// No header is expected: clients begin as clients of PostgreSQL do.
    #[default]
    Off,
    /// Every connection has to begin with a header, and since anyone may send one, it earns no trust: a rule
    /// with addresses admits a client only if the address of its connection *and* the claimed one fit, and
    /// a rule that rejects applies if either fits.
    Claimed,
    /// Headers of these balancers are believed; connections from elsewhere are refused.
    From(Vec<Network>),
}

impl ProxyProtocol {
    /// Whether connections begin with a header.
    pub fn is_on(&self) -> bool {
        *self != Self::Off
    }
}

/// One address that clients connect to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ListenerSettings {
    pub name: String,
    pub listen: Listen,
    pub target: Target,
    pub balance: Balance,
    /// `standbys` only: without a standby that qualifies, use the primary. Default true.
    pub fallback_to_primary: bool,
    /// `standbys` and `any`: a server further behind gets no new session. `None`: any lag.
    pub max_lag_bytes: Option<u64>,
    pub proxy_protocol: ProxyProtocol,
    /// A statement outside of a transaction whose standby is lost before anything of its answer was
    /// passed on runs again on another server. Default true if the listener never leads to a
    /// primary, else false.
    pub retry_reads: bool,
    pub pool_mode: PoolMode,
    /// In place of [`PoolSettings::size`].
    pub pool_size: Option<usize>,
    /// In place of [`PoolSettings::max_servers`].
    pub max_servers: Option<usize>,
}

/// `proxy.failover`: what becomes of sessions whose server is lost.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct FailoverSettings {
    pub keep_sessions: KeepSessions,
    pub unknown_outcome: UnknownOutcome,
    pub listen: ListenPolicy,
    pub reruns: Reruns,
}

/// Statements in flight at a primary that is lost, and that a new primary runs again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Reruns {
    /// None: the client is told that the outcome is unknown.
    #[default]
    None,
    /// Queries of sessions whose transactions the server has said to be read-only.
    Reads,
}

/// Fate of a session that listens on channels when its server is switched over.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum ListenPolicy {
    /// The session ends: a client that may have lost notifications reads again after it has reconnected.
    #[default]
    Pin,
    /// In a planned switchover it listens on the new server before anybody writes there through this
    /// proxy, and is told by a notice. In a failover it ends all the same.
    Move,
}

/// Which sessions outlive a failover without warning.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum KeepSessions {
    /// Sessions that never showed that they hold what a new server cannot have.
    #[default]
    Clean,
    /// In addition, sessions whose statements only might hold something: a text with `pg_advisory_lock` or
    /// `set_config` in it.
    All,
    /// None: every session ends, as without a proxy.
    None,
}

/// How a client is told that its statement may or may not have been committed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum UnknownOutcome {
    /// ERROR 08007; the session goes on.
    #[default]
    Error,
    /// FATAL 08007; the session ends, for clients that run a statement again by themselves.
    Close,
}

/// `proxy.pool`: for listeners whose clients share server connections.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PoolSettings {
    /// Server connections of one role to one database through one listener, at most. Default 20.
    pub size: usize,
    /// Server connections of one listener, at most. Default 100, PostgreSQL's `max_connections`.
    pub max_servers: usize,
    /// How long a transaction waits for a connection while all are busy. Default 120 s.
    pub wait_timeout: Duration,
    /// After this long a waiting client gets a NOTICE; `None` (written 0): never. Default 5 s.
    pub wait_notice: Option<Duration>,
    /// A connection that nobody used for so long is closed; `None` (written 0): never. Default
    /// 10 min.
    pub idle_timeout: Option<Duration>,
    /// A connection is closed after so long, when it is idle; a fifth of it is random. Default 1 h.
    pub lifetime: Duration,
    /// Prepared statements kept on one server connection. Default 200.
    pub prepared_statements: usize,
    /// Reset of a connection before it changes hands.
    pub reset: PoolReset,
}

/// `proxy.pool.reset`: what is undone on a server connection that changes hands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum PoolReset {
    /// Undoes what its last client is known to have left.
    #[default]
    Known,
    /// Everything, after each transaction.
    Always,
}

impl Default for PoolSettings {
    fn default() -> Self {
        Self {
            size: 20,
            max_servers: 100,
            wait_timeout: Duration::from_secs(120),
            wait_notice: Some(Duration::from_secs(5)),
            idle_timeout: Some(Duration::from_secs(600)),
            lifetime: Duration::from_secs(3600),
            prepared_statements: 200,
            reset: PoolReset::Known,
        }
    }
}

/// How clients prove who they are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AuthMethod {
    /// The proxy checks against the role's SCRAM verifier; sessions can be moved.
    Scram,
    /// As [`AuthMethod::Scram`]; in addition, roles with an md5 hash are checked against it.
    Md5,
    /// The server checks, through the proxy; sessions cannot be moved.
    Relay,
    /// The proxy asks nothing and logs in without a password: for tests and the demo, where the
    /// servers trust the proxy's address.
    Trust,
}

/// `proxy.auth`.
#[derive(Debug, Clone)]
pub struct AuthSettings {
    /// Role that looks verifiers up; `Some` whenever a rule's method needs it.
    pub user: Option<String>,
    /// From `password` or the first line of `password_file`.
    pub password: Option<SecretString>,
    /// Database in which `query` runs. Default `postgres`.
    pub database: String,
    /// One row `(role, verifier)` for `$1`, and, if there is a third column, when the verifier ends
    /// to be valid, in seconds from now.
    pub query: String,
    /// How servers may have `user` prove itself, as libpq's `require_auth`.
    pub require_auth: RequireAuth,
    /// Rules of admission; a file without rules has one, for everybody.
    pub rules: Rules,
}

/// Methods that a server may ask for. The password in clear text and its md5 hash are given only to
/// servers whose certificate was verified, whatever is said here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RequireAuth {
    pub password: bool,
    pub md5: bool,
    pub scram: bool,
    /// Nothing may be asked for.
    pub none: bool,
}

impl Default for RequireAuth {
    fn default() -> Self {
        Self { password: true, md5: true, scram: true, none: true }
    }
}

/// Default of [`AuthSettings::query`]. Needs a superuser or a function of its own, see
/// /docs/current/catalog-pg-authid.html. A password whose time is over counts as none
/// (CVE-2025-2291); whether the role may log in at all is for the server to say. A name that is too
/// long for a role is not cut: only the packet's may be, by servers before PostgreSQL 17.
pub const DEFAULT_AUTH_QUERY: &str = "SELECT rolname, \
    CASE WHEN rolvaliduntil < pg_catalog.now() THEN NULL ELSE rolpassword END, \
    (extract(epoch FROM rolvaliduntil) - extract(epoch FROM pg_catalog.now()))::pg_catalog.text \
    FROM pg_catalog.pg_authid WHERE rolname = $1::pg_catalog.text";

/// TLS towards clients.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct ClientTls {
    /// PEM files; without them clients are served in the clear.
    pub cert: Option<PathBuf>,
    pub key: Option<PathBuf>,
    /// Authorities of client certificates.
    pub ca: Option<PathBuf>,
    /// Revocation lists of these authorities.
    pub crl: Option<PathBuf>,
    /// Clients without TLS are refused.
    pub required: bool,
}

/// libpq's `sslmode` towards servers (/docs/current/libpq-ssl.html).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum SslMode {
    Disable,
    Allow,
    #[default]
    Prefer,
    Require,
    VerifyCa,
    VerifyFull,
}

/// TLS towards servers.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct ServerSideTls {
    pub sslmode: SslMode,
    /// PEM files. With authorities the chain is checked in every mode that has TLS, as in libpq.
    pub ca: Option<PathBuf>,
    /// Revocation lists of these authorities.
    pub crl: Option<PathBuf>,
    pub cert: Option<PathBuf>,
    pub key: Option<PathBuf>,
}

/// `proxy.tls`.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct ProxyTls {
    pub client: ClientTls,
    pub server: ServerSideTls,
}

/// `proxy.limits`. Each bound has a default that a user of the demo never meets.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LimitSettings {
    /// Clients that have logged in, all listeners together; later ones get 53300. Default 5000.
    pub max_clients: usize,
    /// So many superusers are let in beyond that. Default 3.
    pub superuser_reserved_connections: usize,
    /// Of these with one role, one database, from one address. `None` (default): no bound.
    pub max_user_client_connections: Option<usize>,
    pub max_db_client_connections: Option<usize>,
    pub max_address_client_connections: Option<usize>,
    /// Server connections for clients of one role, of one database: those of pools, and of clients
    /// that have one to themselves. `None` (default): no bound.
    pub max_user_connections: Option<usize>,
    pub max_db_connections: Option<usize>,
    /// Connections that have not logged in yet, in all and from one address; the oldest one makes room
    /// for the next. Default 1000 and 250.
    pub max_unauthenticated: usize,
    pub max_unauthenticated_per_address: usize,
    /// Cancel requests of one address in a second. Default 50.
    pub max_cancels_per_address: usize,
    /// From accept to the end of the login. Default 15 s, `authentication_timeout`'s order.
    pub login_timeout: Duration,
    /// How long a query waits for a primary in an unplanned failover. Default 15 s.
    pub hold_timeout: Duration,
    /// How long this proxy lets a planned drain hold a session, at most; the agent's record may ask
    /// for less. Default 1 s.
    pub max_hold: Duration,
    /// Dialling and logging in to a server. Default 5 s.
    pub connect_timeout: Duration,
    /// A session that says nothing is closed. `None` (default): never.
    pub client_idle_timeout: Option<Duration>,
    /// A session that is idle inside a transaction is closed after this time. `None` (default): never.
    pub idle_transaction_timeout: Option<Duration>,
    /// A transaction that takes longer ends with its session. `None` (default): never.
    pub transaction_timeout: Option<Duration>,
    /// How long running sessions may finish after SIGTERM. Default 10 s.
    pub shutdown_timeout: Duration,
}

impl Default for LimitSettings {
    fn default() -> Self {
        Self {
            max_clients: 5000,
            superuser_reserved_connections: 3,
            max_user_client_connections: None,
            max_db_client_connections: None,
            max_address_client_connections: None,
            max_user_connections: None,
            max_db_connections: None,
            max_unauthenticated: 1000,
            max_unauthenticated_per_address: 250,
            max_cancels_per_address: 50,
            login_timeout: Duration::from_secs(15),
            hold_timeout: Duration::from_secs(15),
            max_hold: Duration::from_secs(1),
            connect_timeout: Duration::from_secs(5),
            client_idle_timeout: None,
            idle_transaction_timeout: None,
            transaction_timeout: None,
            shutdown_timeout: Duration::from_secs(10),
        }
    }
}

impl ProxySettings {
    /// The listeners of a file that names none: primary 5000, workers 5001, standbys 5002.
    pub fn default_listeners() -> Vec<ListenerSettings> {
        let all = |port| Listen { hosts: vec!["*".to_owned()], port };
        vec![
            ListenerSettings::new("primary", all(5000), Target::Primary),
            ListenerSettings::new("workers", all(5001), Target::Workers),
            ListenerSettings::new("standbys", all(5002), Target::Standbys),
        ]
    }

    /// A whole configuration with every default, as the demo starts from.
    pub fn new(scope: Scope, source: Source) -> Self {
        Self {
            scope: Scope { group: None, ..scope },
            name: None,
            source,
            connect_address: None,
            listeners: Self::default_listeners(),
            status: Some(StatusSettings::default()),
            auth: AuthSettings::relay(),
            tls: ProxyTls::default(),
            limits: LimitSettings::default(),
            failover: FailoverSettings::default(),
            pool: PoolSettings::default(),
            log_connections: false,
            log_disconnections: false,
            application_name_add_host: false,
            state_file: None,
            threads: None,
            log: LogSettings::default(),
        }
    }
}

impl ListenerSettings {
    /// With the defaults for this target.
    pub fn new(name: &str, listen: Listen, target: Target) -> Self {
        Self {
            name: name.to_owned(),
            listen,
            target,
            balance: Balance::default(),
            fallback_to_primary: true,
            max_lag_bytes: None,
            proxy_protocol: ProxyProtocol::Off,
            retry_reads: false,
            pool_mode: PoolMode::default(),
            pool_size: None,
            max_servers: None,
        }
    }
}

impl AuthSettings {
    /// The server decides; sessions cannot be moved.
    pub fn relay() -> Self {
        Self {
            user: None,
            password: None,
            database: "postgres".to_owned(),
            query: DEFAULT_AUTH_QUERY.to_owned(),
            require_auth: RequireAuth::default(),
            rules: Rules { rules: vec![Rule::everybody(Method::Relay)], ..Rules::default() },
        }
    }

    /// Clients are checked by the proxy with verifiers that this role may read.
    pub fn scram(user: &str, password: Option<SecretString>) -> Self {
        let rules = Rules { rules: vec![Rule::everybody(Method::Scram)], ..Rules::default() };
        Self { user: Some(user.to_owned()), password, rules, ..Self::relay() }
    }
}

/// `host:port` of a static member.
impl From<&StaticMember> for HostPort {
    fn from(member: &StaticMember) -> Self {
        Self::new(&member.host, member.port)
    }
}

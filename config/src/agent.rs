//! Settings of one node's agent: Patroni's file, checked, with its defaults filled in.
//!
//! Every type here is plain data that has passed its checks; how text becomes it is in
//! the readers of this crate. Keys are Patroni's (docs/configuration.md); what is Kornak's alone is
//! [`KornakSettings`].

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use kornak_cluster::{Scope, Tags};
use secrecy::SecretString;
use serde_json::{Map, Value};

use crate::address::{HostPort, Listen};
use crate::log::LogSettings;
use crate::store::StoreSettings;

/// All that an agent needs to know.
#[derive(Debug, Clone)]
pub struct AgentSettings {
    /// Namespace (default `service`), scope, and the Citus group if there is one.
    pub scope: Scope,
    /// `Some` exactly if `scope.group` is.
    pub citus: Option<CitusSettings>,
    /// The member's name, unique in its group.
    pub name: String,
    pub store: StoreSettings,
    pub restapi: RestSettings,
    /// Credentials and TLS for calls to other members' REST APIs; falls back on `restapi`.
    pub ctl: CtlSettings,
    pub bootstrap: BootstrapSettings,
    pub postgresql: PostgresqlSettings,
    pub watchdog: WatchdogSettings,
    pub tags: Tags,
    pub log: LogSettings,
    pub kornak: KornakSettings,
}

/// `citus`: this node belongs to a group of a Citus cluster; the group is in the scope.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CitusSettings {
    /// `citus.databases`, or `citus.database` alone. Never empty; the first one is what other
    /// members are told to connect to.
    pub databases: Vec<String>,
}

impl CitusSettings {
    /// The database of [`CitusSettings::databases`] that is published.
    pub fn first_database(&self) -> &str {
        self.databases.first().map_or("", String::as_str)
    }
}

/// User and password of HTTP basic authentication.
#[derive(Debug, Clone)]
pub struct BasicAuth {
    pub username: String,
    pub password: SecretString,
}

/// Whether REST clients must show a certificate.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum VerifyClient {
    #[default]
    None,
    /// Only for unsafe requests (POST, PUT, PATCH, DELETE).
    Optional,
    Required,
}

/// Server side of TLS: PEM files.
#[derive(Debug, Clone)]
pub struct ServerTls {
    pub certfile: PathBuf,
    pub keyfile: Option<PathBuf>,
    pub keyfile_password: Option<SecretString>,
    pub cafile: Option<PathBuf>,
    pub verify_client: VerifyClient,
}

/// `restapi.server_tokens`: what the header `Server` tells.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum ServerTokens {
    /// Our own name and version.
    #[default]
    Original,
    /// Patroni's name and the version we are compatible with.
    Minimal,
    /// Patroni's name.
    ProductOnly,
}

/// `restapi`.
#[derive(Debug, Clone)]
pub struct RestSettings {
    pub listen: Listen,
    /// Address that other members and proxies use. Default: `listen`, with this host's name for a wildcard.
    pub connect_address: HostPort,
    /// Asked of unsafe requests.
    pub authentication: Option<BasicAuth>,
    /// `Some`: https.
    pub tls: Option<ServerTls>,
    /// Hosts and networks whose unsafe requests are taken; empty: anybody's.
    pub allowlist: Vec<String>,
    pub allowlist_include_members: bool,
    pub http_extra_headers: BTreeMap<String, String>,
    pub https_extra_headers: BTreeMap<String, String>,
    pub server_tokens: ServerTokens,
}

impl RestSettings {
    /// `http(s)://host:port`.
    pub fn base_url(&self) -> String {
        let scheme = if self.tls.is_some() { "https" } else { "http" };
        format!("{scheme}://{}", self.connect_address)
    }
}

/// `ctl`: the client side of REST.
#[derive(Debug, Clone, Default)]
pub struct CtlSettings {
    pub authentication: Option<BasicAuth>,
    /// Certificates of servers are not verified.
    pub insecure: bool,
    pub cacert: Option<PathBuf>,
    pub certfile: Option<PathBuf>,
    pub keyfile: Option<PathBuf>,
    pub keyfile_password: Option<SecretString>,
}

/// One option of `bootstrap.initdb`: `--name` or `--name=value`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InitdbOption {
    /// Without the leading dashes.
    pub name: String,
    pub value: Option<String>,
}

/// How a new cluster's first data directory comes to be.
#[derive(Debug, Clone)]
pub enum BootstrapMethod {
    Initdb,
    Custom(CustomBootstrap),
}

/// `bootstrap.<method>`: a command that leaves a data directory behind.
#[derive(Debug, Clone)]
pub struct CustomBootstrap {
    pub name: String,
    pub command: String,
    /// The command gets no `--scope` and `--datadir`.
    pub no_params: bool,
    /// The command has written its own recovery configuration.
    pub keep_existing_recovery_conf: bool,
    pub recovery_conf: Map<String, Value>,
    /// Everything else below its key, passed as `--key=value`.
    pub params: Map<String, Value>,
}

/// `bootstrap`.
#[derive(Debug, Clone)]
pub struct BootstrapSettings {
    /// The first value of the store's `config`; `failsafe_mode: true` is added if absent.
    pub dcs: Map<String, Value>,
    pub method: BootstrapMethod,
    pub initdb: Vec<InitdbOption>,
    /// `bootstrap.pg_hba`, still found in old files; used if `postgresql.pg_hba` is absent.
    pub pg_hba: Vec<String>,
    /// `post_bootstrap` (or `post_init`): run once with the connection URL appended.
    pub post_bootstrap: Option<String>,
}

/// One of `postgresql.authentication.*`: a role and how to log in as it.
#[derive(Debug, Clone)]
pub struct Credentials {
    pub username: String,
    /// `None`: peer, trust, certificate or a password file of one's own.
    pub password: Option<SecretString>,
    pub sslmode: Option<String>,
    pub sslkey: Option<PathBuf>,
    pub sslpassword: Option<SecretString>,
    pub sslcert: Option<PathBuf>,
    pub sslrootcert: Option<PathBuf>,
    pub sslcrl: Option<PathBuf>,
    pub sslcrldir: Option<PathBuf>,
    pub gssencmode: Option<String>,
    pub channel_binding: Option<String>,
}

impl Credentials {
    /// A role without anything else.
    pub fn new(username: &str, password: Option<SecretString>) -> Self {
        Self {
            username: username.to_owned(),
            password,
            sslmode: None,
            sslkey: None,
            sslpassword: None,
            sslcert: None,
            sslrootcert: None,
            sslcrl: None,
            sslcrldir: None,
            gssencmode: None,
            channel_binding: None,
        }
    }
}

/// `postgresql.callbacks`: shell commands, run with `<action> <role> <scope>` appended.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Callbacks {
    pub on_start: Option<String>,
    pub on_stop: Option<String>,
    pub on_restart: Option<String>,
    pub on_reload: Option<String>,
    pub on_role_change: Option<String>,
}

/// One of `postgresql.create_replica_methods`.
#[derive(Debug, Clone, PartialEq)]
pub enum ReplicaMethod {
    /// `pg_basebackup`, with options from `postgresql.basebackup`.
    Basebackup { options: Vec<InitdbOption> },
    /// A command; it gets `--scope`, `--role`, `--datadir`, `--connstring` and its other keys.
    Custom {
        name: String,
        command: String,
        /// Works without a running leader (`no_leader`).
        no_leader: bool,
        no_params: bool,
        keep_data: bool,
        /// Everything else below its key, passed as `--key=value`.
        params: Map<String, Value>,
        recovery_conf: Map<String, Value>,
    },
}

impl ReplicaMethod {
    /// Name of the method in `create_replica_methods`.
    pub fn name(&self) -> &str {
        match self {
            Self::Basebackup { .. } => "basebackup",
            Self::Custom { name, .. } => name,
        }
    }
}

/// `postgresql`.
#[derive(Debug, Clone)]
pub struct PostgresqlSettings {
    pub listen: Listen,
    /// Address that other members and clients use. Default: `listen`.
    pub connect_address: HostPort,
    pub proxy_address: Option<HostPort>,
    pub data_dir: PathBuf,
    /// Default: `data_dir`.
    pub config_dir: PathBuf,
    /// `None`: `PATH` decides.
    pub bin_dir: Option<PathBuf>,
    /// Other names of programs: `pg_ctl: pg_ctl-15`.
    pub bin_name: BTreeMap<String, String>,
    /// Default `~/pgpass` of Patroni's: a file that Kornak writes.
    pub pgpass: Option<PathBuf>,
    /// Database to watch the server through. Default `postgres`.
    pub database: String,
    pub superuser: Credentials,
    pub replication: Credentials,
    /// Default: the superuser.
    pub rewind: Option<Credentials>,
    /// Local parameters; they win over the store's, except for those that Patroni controls.
    pub parameters: Map<String, Value>,
    /// `None`: the file is left alone unless the store has lines.
    pub pg_hba: Option<Vec<String>>,
    pub pg_ident: Option<Vec<String>>,
    pub recovery_conf: Map<String, Value>,
    /// A `postgresql.conf` of the user's own, included first.
    pub custom_conf: Option<PathBuf>,
    pub callbacks: Callbacks,
    pub pre_promote: Option<String>,
    pub before_stop: Option<String>,
    /// In the order in which they are tried; never empty.
    pub create_replica_methods: Vec<ReplicaMethod>,
    pub use_unix_socket: bool,
    /// `None`: the store's configuration decides.
    pub use_pg_rewind: Option<bool>,
    pub use_slots: Option<bool>,
    pub remove_data_directory_on_rewind_failure: bool,
    pub remove_data_directory_on_diverged_timelines: bool,
}

impl PostgresqlSettings {
    /// Full path of one of PostgreSQL's programs, by its usual name.
    pub fn program(&self, name: &str) -> PathBuf {
        let name = self.bin_name.get(name).map_or(name, String::as_str);
        match &self.bin_dir {
            Some(dir) => dir.join(name),
            None => PathBuf::from(name),
        }
    }

    /// Whether one of the methods makes a copy without a running member.
    pub fn clones_alone(&self) -> bool {
        let alone = |method: &ReplicaMethod| {
            matches!(method, ReplicaMethod::Custom { no_leader: true, .. })
        };
        self.create_replica_methods.iter().any(alone)
    }

    /// Whether one of the methods wants what is there.
    pub fn keeps_data(&self) -> bool {
        let keeps = |method: &ReplicaMethod| {
            matches!(method, ReplicaMethod::Custom { keep_data: true, .. })
        };
        self.create_replica_methods.iter().any(keeps)
    }

    /// Role for pg_rewind.
    pub fn rewind(&self) -> &Credentials {
        self.rewind.as_ref().unwrap_or(&self.superuser)
    }
}

/// `watchdog.mode`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum WatchdogMode {
    Off,
    /// Used if the device can be opened.
    #[default]
    Automatic,
    /// Without it this node is never promoted.
    Required,
}

/// `watchdog.driver`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum WatchdogDriver {
    /// A device of the kernel's.
    #[default]
    Kernel,
    /// A file or pipe that is told the timeout in words.
    Testing,
}

/// `watchdog`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WatchdogSettings {
    pub mode: WatchdogMode,
    /// Default `/dev/watchdog`.
    pub device: PathBuf,
    /// Default 5 s; `None` (written -1) means half of the lease.
    pub safety_margin: Option<Duration>,
    pub driver: WatchdogDriver,
}

/// `kornak`: what Patroni has no word for. Patroni ignores the section.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KornakSettings {
    /// OS user that servers run as when the agent was started as root. Default `postgres`.
    pub os_user: String,
    /// Folder for what is otherwise kept beside the data directory (`<data_dir>.guard`, the password file);
    /// for data directories in folders that cannot be written to.
    pub state_dir: Option<PathBuf>,
    pub guard: GuardSettings,
    pub failover: FailoverSettings,
    pub handover: HandoverSettings,
    pub citus: KornakCitusSettings,
}

/// `kornak.citus`: what Patroni's Citus support has no word for.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct KornakCitusSettings {
    /// Where other nodes of the Citus cluster reach this server through a pool, as it is written to
    /// `pg_dist_poolinfo`: `host=… port=…`. `None`: they connect to the server itself.
    pub poolinfo: Option<String>,
}

impl Default for KornakSettings {
    fn default() -> Self {
        Self {
            os_user: "postgres".to_owned(),
            state_dir: None,
            guard: GuardSettings::default(),
            failover: FailoverSettings::default(),
            handover: HandoverSettings::default(),
            citus: KornakCitusSettings::default(),
        }
    }
}

/// `kornak.guard`: the process that stops a primary whose lease is not proven.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GuardSettings {
    /// Off only for tests and for a host where a watchdog does its work.
    pub enabled: bool,
    /// How long stopping the server may take. Default 1 s.
    pub stop_budget: Duration,
    /// Spare time for clocks and scheduling. Default 2 s.
    pub margin: Duration,
    /// An agent that is silent for so long while its server leads is replaced; zero: never. Default 3 s.
    pub agent_timeout: Duration,
}

impl Default for GuardSettings {
    fn default() -> Self {
        Self {
            enabled: true,
            stop_budget: Duration::from_secs(1),
            margin: Duration::from_secs(2),
            agent_timeout: Duration::from_secs(3),
        }
    }
}

/// `kornak.failover`: failovers in synchronous modes that do not wait for the end of the lease.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct FailoverSettings {
    /// A leader that has shown no sign of life for so long is deposed by its synchronous standbys. Zero, the default:
    /// its lease is waited for.
    pub suspect_after: Duration,
}

/// `kornak.handover`: planned switchovers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HandoverSettings {
    /// The longest a client is held by one drain. Default 1 s.
    pub max_hold: Duration,
    /// The longest a switch may take before the old leader starts in place. Default 5 s.
    pub switch_hold: Duration,
    /// How long drains are tried. Default 60 s.
    pub drain_timeout: Duration,
}

impl Default for HandoverSettings {
    fn default() -> Self {
        Self {
            max_hold: Duration::from_secs(1),
            switch_hold: Duration::from_secs(5),
            drain_timeout: Duration::from_secs(60),
        }
    }
}

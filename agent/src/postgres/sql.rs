//! A lasting connection to the local server, as its superuser.
//!
//! One connection serves every question of an agent: opening one takes milliseconds that a promotion
//! does not have, and a server that has no place for clients left still answers on it. It is opened
//! again when it is lost. No statement may take longer than [`STATEMENT_TIMEOUT`], but for a few that
//! are known to work long, which get a connection of their own.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use kornak_config::agent::{Credentials, PostgresqlSettings};
use secrecy::ExposeSecret;
use tokio::sync::Mutex;
use tokio::time::timeout;
use tokio_postgres::error::SqlState;
use tokio_postgres::{Client, Config, SimpleQueryMessage};

use super::encryption::Encryption;
use crate::tls::TlsError;

/// `statement_timeout` of the lasting connection.
pub(super) const STATEMENT_TIMEOUT: Duration = Duration::from_secs(2);
const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);
/// Spare time for a server that is too busy to notice its own timeout.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(3);

/// Every connection of ours has a name that begins with this; the gate of a handover does not wait
/// for them.
pub const APPLICATION_PREFIX: &str = "Kornak";

/// Why the server did not answer.
#[derive(Debug, thiserror::Error)]
pub enum SqlError {
    /// Nobody listens: not started, or gone.
    #[error("connect to the server: nobody listens")]
    Refused,
    /// 57P03: it is starting, recovering, or not yet consistent.
    #[error("connect to the server: it is starting up")]
    StartingUp,
    /// 57P03 or 57P01: it is being stopped.
    #[error("connect to the server: it is shutting down")]
    ShuttingDown,
    /// 28P01 and others: the credentials in `postgresql.authentication` or the rules in `pg_hba` are
    /// wrong.
    #[error("log in to the server: check postgresql.authentication and pg_hba")]
    Login(#[source] tokio_postgres::Error),
    /// No encryption can be had that `sslmode` allows.
    #[error(
        "encrypt the connection to the server: check sslmode and the certificates in postgresql.authentication"
    )]
    Encryption(#[source] tokio_postgres::Error),
    #[error("encrypt the connection to the server")]
    Certificates(#[from] TlsError),
    /// 53300.
    #[error("connect to the server: it has no connection left for a superuser")]
    TooManyConnections,
    /// The server took too long.
    #[error("the server has not answered within {0:?}")]
    TimedOut(Duration),
    /// The connection broke. What was asked may have been done.
    #[error("the connection to the server broke")]
    Lost(#[source] tokio_postgres::Error),
    /// The server refused what it was asked.
    #[error("the server refused to {operation}")]
    Failed {
        operation: &'static str,
        #[source]
        source: tokio_postgres::Error,
    },
    /// The server answered something that no version of it should.
    #[error("the answer to {operation} was not understood")]
    Answer { operation: &'static str },
}

impl SqlError {
    fn of(operation: &'static str, source: tokio_postgres::Error) -> Self {
        if let Some(db) = source.as_db_error() {
            let code = db.code();
            if *code == SqlState::CANNOT_CONNECT_NOW {
                // The code is the same for a server that starts and for one that stops.
                return if db.message().contains("shutting down") {
                    Self::ShuttingDown
                } else {
                    Self::StartingUp
                };
            }
            return match code.code() {
                "57P01" | "57P02" => Self::ShuttingDown,
                "53300" => Self::TooManyConnections,
                code if code.starts_with("28") => Self::Login(source),
                _ => Self::Failed { operation, source },
            };
        }
        if source.to_string().starts_with(HANDSHAKE_FAILED) {
            return Self::Encryption(source);
        }
        let refused = |error: &std::io::Error| {
            matches!(
                error.kind(),
                std::io::ErrorKind::ConnectionRefused | std::io::ErrorKind::NotFound
            )
        };
        let cause = std::error::Error::source(&source);
        match cause.and_then(|cause| cause.downcast_ref()) {
            Some(error) if refused(error) => Self::Refused,
            _ => Self::Lost(source),
        }
    }

    /// The SQLSTATE, if the server sent one.
    pub fn code(&self) -> Option<&str> {
        match self {
            Self::Login(source) | Self::Lost(source) | Self::Failed { source, .. } => {
                source.code().map(SqlState::code)
            }
            _ => None,
        }
    }

    /// The server has answered, and does not let us in: it runs, and may well work for others.
    pub fn is_an_answer(&self) -> bool {
        matches!(
            self,
            Self::Login(_)
                | Self::Encryption(_)
                | Self::Certificates(_)
                | Self::TooManyConnections
                | Self::Failed { .. }
                | Self::Answer { .. }
        )
    }

    /// Another encryption may help: `pg_hba.conf` may have no line for this one.
    fn is_about_encryption(&self) -> bool {
        matches!(self, Self::Encryption(_)) || self.code() == Some("28000")
    }

    /// The connection is of no more use.
    fn ends_connection(&self) -> bool {
        !matches!(self, Self::Failed { .. } | Self::Answer { .. })
    }
}

/// The text of tokio-postgres for a failed handshake; its kinds of errors are its own.
const HANDSHAKE_FAILED: &str = "error performing TLS handshake";

/// A row of text columns.
pub type TextRow = Vec<Option<String>>;

/// The lasting connection. Opened by the first question.
#[derive(Debug)]
pub struct Sql {
    login: Login,
    client: Mutex<Option<Arc<Client>>>,
}

impl Sql {
    /// To the server that `settings` describes, on this host.
    pub fn new(settings: &PostgresqlSettings, application: &str) -> Self {
        let login = local_login(settings, &settings.superuser, application);
        Self { login, client: Mutex::new(None) }
    }

    /// A connection of its own, for what may take as long as it wants.
    pub async fn connect_patiently(&self) -> Result<Client, SqlError> {
        self.login.clone().patiently().connect().await
    }

    /// Asks one thing. `operation` names it in errors.
    pub async fn query(
        &self,
        operation: &'static str,
        statement: &str,
    ) -> Result<Vec<TextRow>, SqlError> {
        let client = self.client().await?;
        let answered = timeout(ANSWER_TIMEOUT, ask(&client, operation, statement)).await;
        let answered = answered.unwrap_or(Err(SqlError::TimedOut(ANSWER_TIMEOUT)));
        if answered.as_ref().is_err_and(SqlError::ends_connection) {
            let mut current = self.client.lock().await;
            if current.as_ref().is_some_and(|current| Arc::ptr_eq(current, &client)) {
                *current = None;
            }
        }
        answered
    }

    /// Asks for one value. `None`: SQL's null, or no row.
    pub async fn value(
        &self,
        operation: &'static str,
        statement: &str,
    ) -> Result<Option<String>, SqlError> {
        let rows = self.query(operation, statement).await?;
        Ok(rows.into_iter().next().and_then(|row| row.into_iter().next().flatten()))
    }

    /// Closes the connection; the next question opens another.
    pub async fn forget(&self) {
        *self.client.lock().await = None;
    }

    async fn client(&self) -> Result<Arc<Client>, SqlError> {
        let mut current = self.client.lock().await;
        if let Some(client) = current.as_ref().filter(|client| !client.is_closed()) {
            return Ok(Arc::clone(client));
        }
        let client = Arc::new(self.login.connect().await?);
        *current = Some(Arc::clone(&client));
        Ok(client)
    }
}

/// The role, server and encryption of a login.
#[derive(Debug, Clone)]
pub struct Login {
    config: Config,
    encryption: Encryption,
}

impl Login {
    /// To another database.
    pub(super) fn to(mut self, database: &str) -> Self {
        self.config.dbname(database);
        self
    }

    /// For what may take as long as it wants.
    pub(super) fn patiently(mut self) -> Self {
        self.config.options(options(Duration::ZERO));
        self
    }

    /// Opens a connection; a task of its own drives it until it ends.
    pub(super) async fn connect(&self) -> Result<Client, SqlError> {
        timeout(CONNECT_TIMEOUT, self.climb())
            .await
            .unwrap_or(Err(SqlError::TimedOut(CONNECT_TIMEOUT)))
    }

    async fn climb(&self) -> Result<Client, SqlError> {
        let connector = self.encryption.connector()?;
        let mut first = None;
        for mode in self.encryption.rungs() {
            let mut config = self.config.clone();
            config.ssl_mode(*mode);
            match config.connect(connector.clone()).await {
                Ok((client, connection)) => {
                    // How it ends is seen by whoever asks next.
                    tokio::spawn(async move { drop(connection.await) });
                    return Ok(client);
                }
                Err(error) => {
                    let error = SqlError::of("log in", error);
                    if !error.is_about_encryption() {
                        // The server has spoken, so it is not the encryption that keeps us out.
                        return Err(error);
                    }
                    first.get_or_insert(error);
                }
            }
        }
        Err(first.unwrap_or(SqlError::Refused))
    }
}

/// Asks one thing over a connection.
pub async fn ask(
    client: &Client,
    operation: &'static str,
    statement: &str,
) -> Result<Vec<TextRow>, SqlError> {
    let messages =
        client.simple_query(statement).await.map_err(|error| SqlError::of(operation, error))?;
    let rows = messages.into_iter().filter_map(|message| match message {
        SimpleQueryMessage::Row(row) => {
            Some((0..row.len()).map(|column| row.get(column).map(str::to_owned)).collect())
        }
        _ => None,
    });
    Ok(rows.collect())
}

/// How to log in to the local server.
pub(super) fn local_login(
    settings: &PostgresqlSettings,
    credentials: &Credentials,
    application: &str,
) -> Login {
    let mut config = Config::new();
    let encryption = if settings.use_unix_socket {
        config.host_path(local_host(settings));
        Encryption::of_a_socket()
    } else {
        config.host(local_host(settings));
        Encryption::of(credentials).or_named(&settings.connect_address.host)
    };
    config.port(settings.listen.port).dbname(&settings.database);
    log_in_as(&mut config, credentials, application);
    Login { config, encryption }
}

/// How to log in to another member's server.
pub(super) fn remote_login(
    host: &str,
    port: u16,
    database: &str,
    credentials: &Credentials,
    application: &str,
) -> Login {
    let mut config = Config::new();
    config.host(host).port(port).dbname(database);
    log_in_as(&mut config, credentials, application);
    Login { config, encryption: Encryption::of(credentials) }
}

fn log_in_as(config: &mut Config, credentials: &Credentials, application: &str) {
    config
        .user(&credentials.username)
        .application_name(format!("{APPLICATION_PREFIX} {application}"))
        .connect_timeout(CONNECT_TIMEOUT)
        .options(options(STATEMENT_TIMEOUT));
    if let Some(password) = &credentials.password {
        config.password(password.expose_secret());
    }
}

/// Settings of our sessions. What we write is never held up by a lost standby, and nobody's functions
/// come before PostgreSQL's own.
pub(super) fn options(statement_timeout: Duration) -> String {
    format!(
        "-c statement_timeout={} -c synchronous_commit=local -c search_path=pg_catalog \
         -c standard_conforming_strings=on -c default_transaction_read_only=off",
        statement_timeout.as_millis()
    )
}

/// Where the local server is reached: the directory of its socket, or a host.
pub(super) fn local_host(settings: &PostgresqlSettings) -> String {
    if settings.use_unix_socket {
        socket_dir(settings)
    } else {
        settings.listen.local_host().to_owned()
    }
}

/// Where the server puts its unix socket.
fn socket_dir(settings: &PostgresqlSettings) -> String {
    let configured = settings.parameters.get("unix_socket_directories").and_then(|v| v.as_str());
    let first = configured.and_then(|dirs| dirs.split(',').next()).map(str::trim);
    match first {
        Some(dir) if !dir.is_empty() => dir.to_owned(),
        _ if Path::new("/var/run/postgresql").is_dir() => "/var/run/postgresql".to_owned(),
        _ => "/tmp".to_owned(),
    }
}

/// Text as an SQL literal.
pub fn literal(text: &str) -> String {
    format!("'{}'", text.replace('\0', "").replace('\'', "''"))
}

/// A name as an SQL identifier.
pub fn identifier(name: &str) -> String {
    format!("\"{}\"", name.replace('\0', "").replace('"', "\"\""))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_escapes_its_quotes() {
        assert_eq!(literal(r"it's \ "), r"'it''s \ '");
        assert_eq!(identifier("a\"b"), "\"a\"\"b\"");
    }
}

//! One connection, and answers as Python would print them.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::bail;

use kornak_config::proxy::{ServerSideTls, SslMode};
use kornak_proxy::net::tls::{Attempt, ServerTls};
use secrecy::{ExposeSecret, SecretString};
use serde_json::Value;
use tokio::net::TcpStream;
use tokio_postgres::error::SqlState;
use tokio_postgres::types::Type;
use tokio_postgres::{Client, Config, Error, NoTls, SimpleQueryMessage, SimpleQueryRow, config};

use super::pgpass;

/// The longest a connection may take to be made. patronictl's.
const CONNECT_LIMIT: Duration = Duration::from_secs(5);

/// Role, database and encryption of a connection.
#[derive(Debug)]
pub(super) struct Login {
    user: String,
    password: Option<SecretString>,
    database: String,
    tls: ServerTls,
}

impl Login {
    /// Takes what is not given from libpq's variables (/docs/current/libpq-envars.html), and at
    /// last from the name of the operating system's user.
    ///
    /// # Errors
    /// A certificate that libpq's variables name cannot be used.
    pub(super) fn new(
        user: Option<String>,
        password: Option<SecretString>,
        database: Option<String>,
    ) -> anyhow::Result<Self> {
        let user = user.or_else(|| variable("PGUSER")).or_else(|| variable("USER"));
        let user = user.or_else(own_name).unwrap_or_else(|| "postgres".to_owned());
        Ok(Self {
            password: password.or_else(|| variable("PGPASSWORD").map(SecretString::from)),
            database: database.or_else(|| variable("PGDATABASE")).unwrap_or_else(|| user.clone()),
            user,
            tls: ServerTls::new(&encryption()?)?,
        })
    }
}

fn variable(name: &str) -> Option<String> {
    std::env::var(name).ok().filter(|value| !value.is_empty())
}

/// As libpq's variables say, and its files in `~/.postgresql`.
fn encryption() -> anyhow::Result<ServerSideTls> {
    let home = std::env::home_dir().map(|home| home.join(".postgresql"));
    let file = |name: &str, usual: &str| {
        let usual = || home.as_ref().map(|home| home.join(usual)).filter(|path| path.is_file());
        variable(name).map(PathBuf::from).or_else(usual)
    };
    let sslmode = match variable("PGSSLMODE").as_deref() {
        None | Some("prefer") => SslMode::Prefer,
        Some("disable") => SslMode::Disable,
        Some("allow") => SslMode::Allow,
        Some("require") => SslMode::Require,
        Some("verify-ca") => SslMode::VerifyCa,
        Some("verify-full") => SslMode::VerifyFull,
        Some(other) => bail!("PGSSLMODE: expected one of libpq's modes, found {other:?}"),
    };
    Ok(match sslmode {
        SslMode::Disable => ServerSideTls { sslmode, ..ServerSideTls::default() },
        sslmode => ServerSideTls {
            sslmode,
            ca: file("PGSSLROOTCERT", "root.crt"),
            crl: file("PGSSLCRL", "root.crl"),
            cert: file("PGSSLCERT", "postgresql.crt"),
            key: file("PGSSLKEY", "postgresql.key"),
        },
    })
}

fn own_name() -> Option<String> {
    let uid = rustix::process::geteuid().as_raw().to_string();
    let accounts = std::fs::read_to_string("/etc/passwd").ok()?;
    accounts.lines().find_map(|line| {
        let mut fields = line.split(':');
        let name = fields.next()?;
        (fields.nth(1)? == uid).then(|| name.to_owned())
    })
}

/// Answer of a server; no columns: the last statement returns no rows.
#[derive(Debug, Default, PartialEq)]
pub(super) struct Asked {
    pub(super) columns: Vec<String>,
    pub(super) rows: Vec<Vec<Value>>,
}

/// A connection to a server.
pub(super) struct Session {
    client: Client,
}

impl Session {
    /// # Errors
    /// The error of the server, or of the network, in libpq's form.
    pub(super) async fn open(host: &str, port: u16, login: &Login) -> Result<Self, String> {
        let mut config = Config::new();
        config.user(&login.user).dbname(&login.database).application_name("Patroni ctl");
        // The stream below is encrypted already, where it is.
        config.ssl_mode(config::SslMode::Disable);
        let filed = || pgpass::look_up([host, &port.to_string(), &login.database, &login.user]);
        if let Some(password) = login.password.clone().or_else(filed) {
            config.password(password.expose_secret());
        }
        let mut first = None;
        for attempt in login.tls.attempts() {
            let dialled = dial(&login.tls, *attempt, (host, port), &config);
            let failed = match tokio::time::timeout(CONNECT_LIMIT, dialled).await {
                Ok(Ok(client)) => return Ok(Self { client }),
                Ok(Err(failed)) => failed,
                Err(_) => Failed { why: "timeout expired".to_owned(), about_encryption: false },
            };
            let last = !failed.about_encryption;
            first.get_or_insert(failed.why);
            if last {
                break;
            }
        }
        let why = first.unwrap_or_default();
        Err(format!("connection to server at \"{host}\", port {port} failed: {why}"))
    }

    /// # Errors
    /// As [`Session::ask`].
    pub(super) async fn is_in_recovery(&self) -> Result<bool, String> {
        let row = self.client.query_one("SELECT pg_catalog.pg_is_in_recovery()", &[]).await;
        row.map(|row| row.get(0)).map_err(|error| reason(&error))
    }

    /// Sends SQL of one statement or several; the last one's rows are the answer.
    ///
    /// # Errors
    /// The SQLSTATE, or the reason why there is none.
    pub(super) async fn ask(&mut self, sql: &str) -> Result<Asked, String> {
        // Only a single statement can be described; without types every value is a text.
        let types: Vec<Type> = match self.client.prepare(sql).await {
            Ok(described) => {
                described.columns().iter().map(|column| column.type_().clone()).collect()
            }
            Err(error) if error.as_db_error().is_some_and(is_several) => Vec::new(),
            Err(error) => return Err(reason(&error)),
        };
        let messages = self.client.simple_query(sql).await.map_err(|error| reason(&error))?;
        let mut asked = Asked::default();
        for message in messages {
            match message {
                SimpleQueryMessage::RowDescription(columns) => {
                    let names = columns.iter().map(|column| column.name().to_owned());
                    asked = Asked { columns: names.collect(), rows: Vec::new() };
                }
                SimpleQueryMessage::Row(row) => asked.rows.push(values(&row, &types)),
                _ => {}
            }
        }
        Ok(asked)
    }
}

struct Failed {
    why: String,
    /// pg_hba.conf has no line for it: with another encryption it may have one.
    about_encryption: bool,
}

async fn dial(
    tls: &ServerTls,
    attempt: Attempt,
    (host, port): (&str, u16),
    config: &Config,
) -> Result<Client, Failed> {
    let failed = |why: String| Failed { why, about_encryption: false };
    let tcp = TcpStream::connect((host, port)).await.map_err(|error| failed(error.to_string()))?;
    let stream =
        tls.encrypt(tcp, host, attempt).await.map_err(|error| failed(error.to_string()))?;
    let (client, connection) = config.connect_raw(stream, NoTls).await.map_err(|error| {
        let Some(told) = error.as_db_error() else {
            let why = reason(&error);
            let unsaid = why.ends_with("password missing");
            return failed(if unsaid { NO_PASSWORD.to_owned() } else { why });
        };
        Failed {
            why: format!("{}:  {}", told.severity(), told.message()),
            about_encryption: told.code() == &SqlState::INVALID_AUTHORIZATION_SPECIFICATION,
        }
    })?;
    tokio::spawn(connection);
    Ok(client)
}

/// libpq's words.
const NO_PASSWORD: &str = "fe_sendauth: no password supplied";

/// `cannot insert multiple commands into a prepared statement`
fn is_several(error: &tokio_postgres::error::DbError) -> bool {
    error.code().code() == "42601" && error.position().is_none()
}

fn reason(error: &Error) -> String {
    if let Some(told) = error.as_db_error() {
        return told.code().code().to_owned();
    }
    let mut text = error.to_string();
    let mut cause = std::error::Error::source(error);
    while let Some(next) = cause {
        text = format!("{text}: {next}");
        cause = next.source();
    }
    text.replace('\n', " ")
}

fn values(row: &SimpleQueryRow, types: &[Type]) -> Vec<Value> {
    let value = |index| python(row.get(index), types.get(index));
    (0..row.len()).map(value).collect()
}

/// PostgreSQL's text of a value as the value that Python's driver makes of it.
fn python(text: Option<&str>, kind: Option<&Type>) -> Value {
    let Some(text) = text else { return Value::Null };
    let number = || text.parse::<i64>().map_or_else(|_| Value::from(text), Value::from);
    match kind {
        Some(&Type::BOOL) => Value::from(text == "t"),
        Some(&Type::INT2 | &Type::INT4 | &Type::INT8 | &Type::OID) => number(),
        Some(&Type::FLOAT4 | &Type::FLOAT8) => {
            text.parse::<f64>().map_or_else(|_| Value::from(text), Value::from)
        }
        // +00 → +00:00
        Some(&Type::TIMESTAMPTZ) => {
            let short =
                text.len() > 3 && matches!(text.as_bytes().get(text.len() - 3), Some(b'+' | b'-'));
            Value::from(if short { format!("{text}:00") } else { text.to_owned() })
        }
        _ => Value::from(text),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_what_pythons_driver_makes_of_them() {
        for (text, kind, expected) in [
            (None, Type::TEXT, Value::Null),
            (Some("t"), Type::BOOL, Value::from(true)),
            (Some("-7"), Type::INT8, Value::from(-7)),
            (Some("2"), Type::FLOAT8, Value::from(2.0)),
            (Some("1.50"), Type::NUMERIC, Value::from("1.50")),
            (
                Some("2026-11-22 22:05:55+00"),
                Type::TIMESTAMPTZ,
                Value::from("2026-11-22 22:05:55+00:00"),
            ),
            (Some("{1,2}"), Type::INT4_ARRAY, Value::from("{1,2}")),
        ] {
            assert_eq!(python(text, Some(&kind)), expected, "{text:?}");
        }
    }
}

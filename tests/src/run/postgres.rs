//! PostgreSQL: where it is, whom it runs as, a single server for tests that need no cluster, and
//! connections past every proxy.

use std::fs;
use std::future::poll_fn;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use kornak_agent::tls::client_config;
use kornak_config::agent::CtlSettings;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};
use tokio_postgres::{AsyncMessage, Client, Connection, NoTls, SimpleQueryMessage};
use tokio_postgres_rustls::MakeRustlsConnect;

use super::port::{Port, host_of};
use super::process::Process;
use super::scratch::Scratch;
use super::wait::until;

/// Password of the superuser of every server here.
pub const SUPERUSER_PASSWORD: &str = "a-superuser's-password";

/// An account of this machine.
#[derive(Debug, Clone, Copy)]
pub struct OsUser {
    pub uid: u32,
    pub gid: u32,
}

/// Whom servers run as: `None` if that is whoever runs the test.
pub fn server_user() -> Option<OsUser> {
    if !rustix::process::geteuid().is_root() {
        return None;
    }
    let passwd = fs::read_to_string("/etc/passwd").expect("every Unix has it");
    let line = passwd.lines().find(|line| line.starts_with("postgres:"));
    let mut fields =
        line.expect("Debian's package makes the user postgres; scripts/install.sh").split(':');
    let uid = fields.nth(2).and_then(|field| field.parse().ok());
    let gid = fields.next().and_then(|field| field.parse().ok());
    Some(OsUser { uid: uid.expect("passwd(5)"), gid: gid.expect("passwd(5)") })
}

/// Directory of the newest installed release; `KORNAK_PG_BIN` names another.
pub fn bin_dir() -> PathBuf {
    if let Some(named) = std::env::var_os("KORNAK_PG_BIN") {
        return named.into();
    }
    let newest = fs::read_dir("/usr/lib/postgresql")
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok())
        .filter(|release| {
            Path::new(&format!("/usr/lib/postgresql/{release}/bin/postgres")).exists()
        })
        .max();
    let release = newest.expect("no PostgreSQL below /usr/lib/postgresql; scripts/install.sh");
    format!("/usr/lib/postgresql/{release}/bin").into()
}

/// Major version of the servers in [`bin_dir`].
pub fn release() -> Result<u32> {
    let output = program("postgres").arg("--version").output().context("run postgres")?;
    let text = String::from_utf8_lossy(&output.stdout);
    let digits = text.chars().skip_while(|c| !c.is_ascii_digit()).take_while(char::is_ascii_digit);
    digits.collect::<String>().parse().with_context(|| text.into_owned())
}

/// One of PostgreSQL's programs, run as [`server_user`].
pub fn program(name: &str) -> Command {
    let mut command = Command::new(bin_dir().join(name));
    if let Some(user) = server_user() {
        command.uid(user.uid).gid(user.gid);
    }
    // The test's own directory may be closed to that user.
    command.current_dir("/").env("LC_ALL", "C.UTF-8");
    command
}

/// Connects with a keyword/value string and drives the connection in a task. TLS is used if the string
/// says `sslmode=require`.
pub async fn connect(conninfo: &str) -> Result<Client, tokio_postgres::Error> {
    // The client's next call says what happened to the connection.
    Ok(connect_hearing(conninfo).await?.0)
}

/// Connects, and collects what the server says unasked: notices and notifications.
pub async fn connect_hearing(
    conninfo: &str,
) -> Result<(Client, UnboundedReceiver<AsyncMessage>), tokio_postgres::Error> {
    if conninfo.contains("sslmode=require") {
        // Whoever answers is believed: whether certificates are right, libpq is asked.
        let settings = CtlSettings { insecure: true, ..CtlSettings::default() };
        let tls = client_config(&settings).expect("the provider has TLS 1.2 and 1.3");
        let tls = MakeRustlsConnect::new(tls);
        let (client, connection) = tokio_postgres::connect(conninfo, tls).await?;
        return Ok((client, drive(connection)));
    }
    let (client, connection) = tokio_postgres::connect(conninfo, NoTls).await?;
    Ok((client, drive(connection)))
}

fn drive<S, T>(mut connection: Connection<S, T>) -> UnboundedReceiver<AsyncMessage>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    T: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let (tell, told) = unbounded_channel();
    tokio::spawn(async move {
        while let Some(Ok(message)) = poll_fn(|cx| connection.poll_message(cx)).await {
            // Most do not listen.
            let _ = tell.send(message);
        }
    });
    told
}

/// The superuser's connection to the server with this port.
pub fn superuser(port: u16) -> String {
    superuser_at(&host_of(port), port)
}

/// A connection string of the superuser by another address of the server, or by the directory of
/// its socket.
pub fn superuser_at(host: &str, port: u16) -> String {
    format!(
        "host={host} port={port} user=postgres password='{}' dbname=postgres \
         connect_timeout=3 application_name=test",
        SUPERUSER_PASSWORD.replace('\'', "\\'")
    )
}

/// A server of its own, without agent.
#[derive(Debug)]
pub struct Postgres {
    port: Port,
    data_dir: PathBuf,
    process: Process,
}

impl Postgres {
    /// `initdb` with SCRAM for everybody, then a server with `settings` (each `name=value`).
    ///
    /// # Panics
    /// When it does not answer within half a minute.
    pub async fn start(scratch: &Scratch, name: &str, settings: &[&str]) -> Result<Self> {
        let home = scratch.server_dir(name);
        let data_dir = home.join("data");
        let password_file = home.join("password");
        fs::write(&password_file, SUPERUSER_PASSWORD).context("write the password file")?;
        let output = program("initdb")
            .args(["--auth=scram-sha-256", "--username=postgres", "--no-sync", "--pwfile"])
            .arg(&password_file)
            .arg("-D")
            .arg(&data_dir)
            .stdin(Stdio::null())
            .output()
            .context("run initdb")?;
        if !output.status.success() {
            bail!("initdb: {}", String::from_utf8_lossy(&output.stderr));
        }
        let port = Port::free();
        let mut command = program("postgres");
        command.arg("-D").arg(&data_dir).args(["-c", "listen_addresses=127.0.0.1"]);
        command.arg("-c").arg(format!("port={}", port.number()));
        command.arg("-c").arg(format!("unix_socket_directories={}", home.display()));
        for setting in settings {
            command.args(["-c", setting]);
        }
        let log = scratch.join(&format!("{name}.log"));
        let process = Process::spawn(name, command, &log)?;
        let server = Self { port, data_dir, process };
        until(Duration::from_secs(30), "PostgreSQL answers", || async {
            server.connect().await.map(drop).map_err(|error| describe(&error))
        })
        .await;
        Ok(server)
    }

    pub fn port(&self) -> u16 {
        self.port.number()
    }

    pub fn data_dir(&self) -> &Path {
        &self.data_dir
    }

    /// As superuser.
    pub async fn connect(&self) -> Result<Client, tokio_postgres::Error> {
        connect(&superuser(self.port())).await
    }
}

impl Drop for Postgres {
    fn drop(&mut self) {
        self.process.kill();
        super::scratch::kill_below(&self.data_dir);
    }
}

/// The first value of a simple query's first row.
pub async fn text(client: &Client, query: &str) -> Result<String> {
    let messages = client.simple_query(query).await.with_context(|| query.to_owned())?;
    let row = messages.into_iter().find_map(|message| match message {
        SimpleQueryMessage::Row(row) => Some(row),
        _ => None,
    });
    Ok(row.context("no row")?.get(0).unwrap_or_default().to_owned())
}

/// The SQLSTATE of a failed query, or a text that there was no error.
pub fn sqlstate<T>(result: Result<T, tokio_postgres::Error>) -> String {
    match result {
        Ok(_) => "no error".to_owned(),
        Err(error) => {
            error.code().map_or_else(|| format!("none ({error})"), |code| code.code().to_owned())
        }
    }
}

/// An error with its causes, for tokio-postgres's own text is only "db error".
pub fn describe(error: &tokio_postgres::Error) -> String {
    match error.as_db_error() {
        Some(told) => format!("{} {}: {}", told.severity(), told.code().code(), told.message()),
        None => {
            let mut text = error.to_string();
            let mut cause = std::error::Error::source(error);
            while let Some(next) = cause {
                text = format!("{text}: {next}");
                cause = next.source();
            }
            text
        }
    }
}

//! `kornak config generate`: an agent's file for a server that runs without one, or a sample.
//!
//! The command reads what the server runs with: its data directory, addresses, the parameters that its
//! file or command line set, and its pg_hba. What only a person knows is marked `CHANGE-ME`; `kornak
//! check` finds those that are left.

use std::path::PathBuf;

use anyhow::{Context, bail};
use clap::{Args, Subcommand};
use kornak_config::Listen;
use serde_json::{Map, Value, json};
use tokio_postgres::{Client, NoTls};

use crate::output::say;
use crate::render;

#[derive(Debug, Args)]
pub struct ConfigArgs {
    #[command(subcommand)]
    command: ConfigCommand,
}

#[derive(Debug, Subcommand)]
enum ConfigCommand {
    /// Write an agent's file for a running server
    Generate(GenerateArgs),
}

#[derive(Debug, Args)]
struct GenerateArgs {
    /// Where to write it; default: standard output.
    out: Option<PathBuf>,
    /// How to connect as superuser, such as "host=/var/run/postgresql user=postgres".
    #[arg(long, default_value = "host=/var/run/postgresql user=postgres dbname=postgres")]
    dsn: String,
    /// Ask no server: write a sample to fill in.
    #[arg(long)]
    sample: bool,
}

/// Facts about a running server.
struct Server {
    scope: String,
    listen: String,
    port: u16,
    data_dir: String,
    /// Where the configuration is, if it is not in the data directory, as on Debian.
    config_dir: Option<String>,
    bin_dir: Option<String>,
    user: String,
    parameters: Map<String, Value>,
    pg_hba: Vec<String>,
    pg_ident: Vec<String>,
}

impl Default for Server {
    fn default() -> Self {
        Self {
            scope: "CHANGE-ME".to_owned(),
            listen: "0.0.0.0".to_owned(),
            port: 5432,
            data_dir: "CHANGE-ME".to_owned(),
            config_dir: None,
            bin_dir: None,
            user: "postgres".to_owned(),
            parameters: Map::new(),
            pg_hba: vec![
                "local all all peer".to_owned(),
                "host replication replicator 0.0.0.0/0 scram-sha-256".to_owned(),
                "host all all 0.0.0.0/0 scram-sha-256".to_owned(),
            ],
            pg_ident: Vec::new(),
        }
    }
}

/// Writes the file.
///
/// # Errors
/// The server cannot be asked, or the file exists.
pub fn run(args: &ConfigArgs) -> anyhow::Result<()> {
    let ConfigCommand::Generate(args) = &args.command;
    let server = if args.sample {
        Server::default()
    } else {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        runtime.block_on(ask(&args.dsn))?
    };
    let host = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    let text = print(&server, host.trim());
    let Some(out) = &args.out else {
        say(text.trim_end());
        return Ok(());
    };
    let mut options = std::fs::OpenOptions::new();
    // It will hold passwords.
    let options = std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
    let mut file = options
        .write(true)
        .create_new(true)
        .open(out)
        .with_context(|| format!("write {}", out.display()))?;
    std::io::Write::write_all(&mut file, text.as_bytes())?;
    Ok(())
}

/// Parameters that all nodes must have alike: they are set in the store alone.
const SHARED: &[&str] = &[
    "max_connections",
    "max_locks_per_transaction",
    "max_prepared_transactions",
    "max_replication_slots",
    "max_wal_senders",
    "max_worker_processes",
    "track_commit_timestamp",
    "wal_level",
    "wal_log_hints",
];

/// Parameters that an agent sets itself, or that say where the files are.
const OURS: &[&str] = &[
    "cluster_name",
    "config_file",
    "data_directory",
    "external_pid_file",
    "hba_file",
    "hot_standby",
    "ident_file",
    "listen_addresses",
    "port",
    "primary_conninfo",
    "primary_slot_name",
    "restore_command",
    "synchronous_standby_names",
];

async fn ask(dsn: &str) -> anyhow::Result<Server> {
    let (client, connection) = tokio_postgres::connect(dsn, NoTls)
        .await
        .context("connect to the server; --dsn says how")?;
    tokio::spawn(connection);
    let setting = async |name: &str| -> anyhow::Result<String> {
        let row = client.query_one("SELECT current_setting($1)", &[&name]).await;
        Ok(row.with_context(|| format!("read {name}; is the role a superuser?"))?.get(0))
    };
    let version: i32 = setting("server_version_num").await?.parse()?;
    if version < 130_000 {
        bail!("the server is older than PostgreSQL 13");
    }
    let defaults = Server::default();
    let listen = match setting("listen_addresses").await?.as_str() {
        "*" | "" => defaults.listen.clone(),
        addresses => addresses.replace(' ', ""),
    };
    let name = setting("cluster_name").await?;
    let data_dir = setting("data_directory").await?;
    let config = PathBuf::from(setting("config_file").await?);
    let config_dir = config.parent().map(|dir| dir.display().to_string());
    let programs = "SELECT setting FROM pg_config WHERE name = 'BINDIR'";
    let programs = client.query_opt(programs, &[]).await.context("read pg_config")?;
    Ok(Server {
        scope: scope_of(&name),
        listen,
        port: setting("port").await?.parse()?,
        config_dir: config_dir.filter(|dir| *dir != data_dir),
        data_dir,
        bin_dir: programs.map(|row| row.get(0)),
        user: client.query_one("SELECT current_user::text", &[]).await?.get(0),
        parameters: parameters(&client).await?,
        pg_hba: lines(&client, "hba_file").await?,
        pg_ident: lines(&client, "ident_file").await?,
    })
}

/// Debian calls clusters 15/main, and a scope is one step of a path.
fn scope_of(cluster_name: &str) -> String {
    match cluster_name {
        "" => Server::default().scope,
        name => name.replace('/', "-"),
    }
}

async fn parameters(client: &Client) -> anyhow::Result<Map<String, Value>> {
    let set = "SELECT name, current_setting(name) FROM pg_settings WHERE context <> 'internal' \
               AND source IN ('configuration file', 'command line', 'environment variable') \
               ORDER BY name";
    let rows = client.query(set, &[]).await.context("read pg_settings")?;
    let all = rows.iter().map(|row| (row.get::<_, String>(0), row.get::<_, String>(1)));
    // An agent's server is told where to recover to by nobody else.
    let ours = |name: &str| OURS.contains(&name) || name.starts_with("recovery_target");
    let wanted = all.filter(|(name, _)| !ours(name));
    Ok(wanted.map(|(name, value)| (name, Value::from(value))).collect())
}

/// The lines of a file, named by a parameter, that say something.
async fn lines(client: &Client, file: &str) -> anyhow::Result<Vec<String>> {
    let text = "SELECT pg_read_file(current_setting($1))";
    let row = client.query_one(text, &[&file]).await;
    let text: String = row.with_context(|| format!("read the file that {file} names"))?.get(0);
    let lines = text.lines().map(|line| line.split_whitespace().collect::<Vec<_>>().join(" "));
    Ok(lines.filter(|line| !line.is_empty() && !line.starts_with('#')).collect())
}

fn print(server: &Server, host: &str) -> String {
    let Server { scope, listen, port, data_dir, user, parameters, pg_hba, .. } = server;
    let shared = |name: &String| SHARED.contains(&name.as_str());
    let (dynamic, local): (Map<String, Value>, Map<String, Value>) =
        parameters.clone().into_iter().partition(|(name, _)| shared(name));
    let host = if host.is_empty() { "CHANGE-ME" } else { host };
    let dcs = json!({
        "ttl": 30, "loop_wait": 10, "retry_timeout": 10, "maximum_lag_on_failover": 1_048_576,
        "postgresql": {"use_pg_rewind": true, "parameters": dynamic},
    });
    let mut postgresql = json!({
        "listen": format!("{listen}:{port}"),
        "connect_address": format!("{host}:{port}"),
        "data_dir": data_dir,
        "authentication": {
            "superuser": {"username": user, "password": "CHANGE-ME"},
            "replication": {"username": "replicator", "password": "CHANGE-ME"},
            "rewind": {"username": "rewind_user", "password": "CHANGE-ME"},
        },
        "parameters": local,
        "pg_hba": pg_hba,
    });
    for (key, dir) in [("bin_dir", &server.bin_dir), ("config_dir", &server.config_dir)] {
        if let Some(dir) = dir {
            postgresql[key] = json!(dir);
        }
    }
    if !server.pg_ident.is_empty() {
        postgresql["pg_ident"] = json!(server.pg_ident);
    }
    let sections = [
        ("scope", json!(scope)),
        ("name", json!(host)),
        ("restapi", json!({"listen": "0.0.0.0:8008", "connect_address": format!("{host}:8008")})),
        ("etcd3", json!({"hosts": ["CHANGE-ME:2379"]})),
        ("bootstrap", json!({"dcs": dcs, "initdb": [{"encoding": "UTF8"}, "data-checksums"]})),
        ("postgresql", postgresql),
    ];
    let mut text = String::from("# Written by `kornak config generate`; look for CHANGE-ME.\n");
    if Listen::parse(&format!("{listen}:{port}"), None).is_some_and(|listen| listen.is_local()) {
        text.push_str(
            "# The server takes connections of this host alone: add an address to postgresql.listen that\n\
             # other nodes reach, the one in connect_address.\n",
        );
    }
    for (key, value) in sections {
        text.push_str(&render::yaml(&json!({key: value})));
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sample_is_a_file_that_an_agent_would_read() {
        let text = print(&Server::default(), "db1");
        let environment = [("PATRONI_CONFIGURATION".to_owned(), text.clone())];
        let loaded = kornak_config::load_agent(None, &environment);
        let loaded = loaded.unwrap_or_else(|error| panic!("{error}\n{text}"));
        assert!(loaded.warnings.is_empty(), "{:?}", loaded.warnings);
        assert_eq!(loaded.settings.name, "db1");
    }

    #[test]
    fn debians_layout_makes_a_file_that_is_accepted() {
        let debian = Server {
            scope: scope_of("15/main"),
            listen: "localhost".to_owned(),
            ..Server::default()
        };
        let text = print(&debian, "db1");
        let environment = [("PATRONI_CONFIGURATION".to_owned(), text.clone())];
        let loaded = kornak_config::load_agent(None, &environment);
        let loaded = loaded.unwrap_or_else(|error| panic!("{error}\n{text}"));
        assert!(text.contains("scope: 15-main\n"), "{text}");
        let [warning] = loaded.warnings.as_slice() else { panic!("{:?}", loaded.warnings) };
        assert!(warning.contains("postgresql.connect_address"), "{warning}");
        assert!(text.contains("of this host alone"), "{text}");
    }

    #[test]
    fn what_all_nodes_must_have_goes_into_the_store() {
        let parameters = [("max_connections", "200"), ("work_mem", "8MB")];
        let parameters = parameters.map(|(name, value)| (name.to_owned(), Value::from(value)));
        let server = Server {
            parameters: Map::from_iter(parameters),
            config_dir: Some("/etc/postgresql/15/main".to_owned()),
            bin_dir: Some("/usr/lib/postgresql/15/bin".to_owned()),
            pg_ident: vec!["people ann app".to_owned()],
            ..Server::default()
        };
        let text = print(&server, "db1");
        let environment = [("PATRONI_CONFIGURATION".to_owned(), text.clone())];
        let postgresql = kornak_config::load_agent(None, &environment).unwrap().settings.postgresql;
        assert_eq!(postgresql.config_dir.to_str(), Some("/etc/postgresql/15/main"));
        assert_eq!(postgresql.bin_dir.unwrap().to_str(), Some("/usr/lib/postgresql/15/bin"));
        assert_eq!(postgresql.pg_ident.unwrap(), ["people ann app"]);
        assert!(text.contains("        max_connections: '200'\n"), "{text}");
        assert!(text.contains("\n  parameters:\n    work_mem: 8MB\n"), "{text}");
    }
}

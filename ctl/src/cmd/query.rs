//! `kornak query`: SQL to a member, found by name or role.
//!
//! The connection's user, password, database and encryption come from the options, libpq's variables
//! and its password file. Values
//! are printed as patronictl does, which is as Python prints them: `True`, `None`, `2.0`; what has
//! no such form here (arrays, JSON) as PostgreSQL writes it.

mod pgpass;
mod session;

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, bail};
use clap::Args;
use jiff::Zoned;
use kornak_cluster::GroupId;
use serde_json::Value;

use super::dsn::choose;
use super::members::Role;
use crate::output::{Told, prompt_secret, say};
use crate::render::{self, Format};
use crate::target::{Global, Target};
use crate::when;
use session::{Asked, Login, Session};

#[derive(Debug, Args)]
pub struct QueryArgs {
    cluster_name: Option<String>,
    #[arg(long, value_parser = super::group)]
    group: Option<GroupId>,
    #[arg(long, value_enum, default_value = "tsv")]
    format: Format,
    /// The SQL is in this file; - is standard input.
    #[arg(short, long, value_name = "FILE")]
    file: Option<PathBuf>,
    /// Ask for the password.
    #[arg(long)]
    password: bool,
    /// Log in as this role; default: PGUSER.
    #[arg(short = 'U', long)]
    username: Option<String>,
    /// Ask again every 2 seconds.
    #[arg(short = 'W')]
    keep_watching: bool,
    /// Ask again every so many seconds.
    #[arg(short, long, value_name = "SECONDS")]
    watch: Option<f64>,
    /// Of a member with this role; default: of the leader.
    #[arg(short, long, value_enum)]
    role: Option<Role>,
    /// Of this member.
    #[arg(short, long)]
    member: Option<String>,
    /// Between columns.
    #[arg(long, default_value = "\t")]
    delimiter: String,
    /// The SQL.
    #[arg(short, long)]
    command: Option<String>,
    /// In this database; default: PGDATABASE.
    #[arg(short, long)]
    dbname: Option<String>,
}

/// Asks once or for ever, and prints the rows.
///
/// # Errors
/// The cluster cannot be found or read. What the server refuses is printed as a row, and then a
/// [`Told`].
pub async fn run(global: &Global, args: QueryArgs) -> anyhow::Result<()> {
    let sql = match (&args.file, &args.command) {
        (Some(_), Some(_)) => bail!("--file and --command are mutually exclusive options"),
        (None, None) => bail!("You need to specify either --command or --file"),
        (None, Some(command)) => command.clone(),
        (Some(file), None) if file.as_os_str() == "-" => {
            std::io::read_to_string(std::io::stdin()).context("read standard input")?
        }
        (Some(file), None) => {
            std::fs::read_to_string(file).with_context(|| format!("read {}", file.display()))?
        }
    };
    let password = args.password.then(|| prompt_secret("Password")).transpose()?;
    let login = Login::new(args.username.clone(), password, args.dbname.clone())?;
    let target = Target::find(global, args.cluster_name.as_deref())?;
    let cluster = target.read(args.group).await?;
    let member = choose(&cluster, args.role, args.member.as_deref())?;
    let pause = args.watch.or(args.keep_watching.then_some(2.0));
    let mut session = None;
    loop {
        let answer = match member {
            Some(member) => ask(&mut session, member, args.role, &login, &sql).await,
            None => Ok(None),
        };
        let answer = answer.and_then(|found| {
            found.ok_or_else(|| match (&args.member, args.role) {
                (Some(name), _) => format!("No connection to member {name} is available"),
                (None, Some(role)) => {
                    format!("No connection to role '{}' is available", role.word())
                }
                (None, None) => "No connection is available".to_owned(),
            })
        });
        let failed = answer.as_ref().err().cloned();
        say(&print(answer, args.format, &args.delimiter));
        let Some(seconds) = pause else {
            return failed.map_or(Ok(()), |why| Err(Told(why).into()));
        };
        tokio::time::sleep(Duration::from_secs_f64(seconds.clamp(0.1, 86_400.0))).await;
    }
}

/// `None`: the server is not what the role says, as during a failover.
async fn ask(
    session: &mut Option<Session>,
    member: &crate::view::MemberView,
    role: Option<Role>,
    login: &Login,
    sql: &str,
) -> Result<Option<Asked>, String> {
    let said = |why| format!("ERROR, SQLSTATE: {why}");
    let mut open = match session.take() {
        Some(open) => open,
        None => {
            let port = member.port.unwrap_or(5432);
            let open = Session::open(&member.host, port, login).await.map_err(said)?;
            let wanted = role.and_then(Role::in_recovery);
            if wanted.is_some() && wanted != Some(open.is_in_recovery().await.map_err(said)?) {
                return Ok(None);
            }
            open
        }
    };
    let answer = open.ask(sql).await.map_err(said)?;
    *session = Some(open);
    Ok(Some(answer))
}

fn print(answer: Result<Asked, String>, format: Format, delimiter: &str) -> String {
    let noted = |text: String| Asked {
        columns: Vec::new(),
        rows: vec![vec![Value::from(when::short_stamp(&Zoned::now())), Value::from(text)]],
    };
    let asked = match answer {
        Ok(asked) if asked.columns.is_empty() => noted("OK".to_owned()),
        Ok(asked) => asked,
        Err(why) => noted(why),
    };
    render::rows(&asked.columns, &asked.rows, format, delimiter)
}

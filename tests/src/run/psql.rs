//! `psql`, that is, libpq: what it makes of a server is what applications make of it.

use std::path::Path;
use std::process::Stdio;

use anyhow::{Context, Result};

use super::postgres;

/// How one run ended.
#[derive(Debug)]
pub struct Said {
    pub ok: bool,
    /// Standard output without its last line end.
    pub text: String,
    pub error: String,
}

/// Runs one command. `conninfo` is libpq's; `gssencmode=disable` is added. The password comes by the
/// environment; no file of the user's is read.
pub async fn psql(conninfo: &str, password: &str, sql: &str) -> Result<Said> {
    run(conninfo, password, ["-c", sql]).await
}

/// Runs a file.
pub async fn psql_file(conninfo: &str, password: &str, file: &Path) -> Result<Said> {
    run(conninfo, password, ["-f", &file.display().to_string()]).await
}

async fn run(conninfo: &str, password: &str, what: [&str; 2]) -> Result<Said> {
    let mut command = postgres::program("psql");
    command
        .args(["-X", "-A", "-t", "-w"])
        .args(what)
        .arg("-d")
        .arg(format!("{conninfo} gssencmode=disable"))
        .env("PGPASSWORD", password)
        .env("PGCONNECT_TIMEOUT", "10")
        .env("HOME", "/nonexistent")
        .stdin(Stdio::null());
    let output = super::cluster::run(command).await.context("run psql")?;
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim_end().to_owned();
    Ok(Said {
        ok: output.status.success(),
        text: text(&output.stdout),
        error: text(&output.stderr),
    })
}

impl Said {
    /// The output.
    ///
    /// # Panics
    /// When it failed, with what it said.
    #[track_caller]
    pub fn expect(&self, what: &str) -> &str {
        assert!(self.ok, "{what}: {}", self.error);
        &self.text
    }

    /// The complaint.
    ///
    /// # Panics
    /// When it succeeded.
    #[track_caller]
    pub fn expect_err(&self, what: &str) -> &str {
        assert!(!self.ok, "{what}: succeeded with {:?}", self.text);
        &self.error
    }
}

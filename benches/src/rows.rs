//! The rows of the table: what pgbench does in each.

use std::fs;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use kornak_tests::run::cluster::run;
use kornak_tests::run::scratch::Scratch;

use crate::ways::{Way, pgbench};

/// Of each of 2,000 clients, for each second asked for: some 12,000 transactions a second.
const MANY_TRANSACTIONS: u64 = 6;

/// Twenty rows of a megabyte.
const LARGE: &str = "SELECT repeat('x', 1048576) FROM generate_series(1, 20);\n";

/// A kind of work.
#[derive(Debug, Clone, Copy)]
pub struct Row {
    pub name: &'static str,
    arguments: &'static [&'static str],
    /// Named prepared statements are used.
    prepared: bool,
    large: bool,
    /// Far more clients than the server takes connections.
    many: bool,
    /// Clients speak TLS.
    tls: bool,
}

const PLAIN: Row =
    Row { name: "", arguments: &[], prepared: false, large: false, many: false, tls: false };

/// In the order of the table.
pub const ROWS: [Row; 11] = [
    Row {
        name: "select-only, prepared, 1 client",
        arguments: &["-S", "-M", "prepared", "-c", "1", "-j", "1"],
        prepared: true,
        ..PLAIN
    },
    Row {
        name: "select-only, prepared, 16 clients",
        arguments: &["-S", "-M", "prepared", "-c", "16", "-j", "2"],
        prepared: true,
        ..PLAIN
    },
    Row {
        name: "select-only, simple, 64 clients",
        arguments: &["-S", "-M", "simple", "-c", "64", "-j", "2"],
        ..PLAIN
    },
    Row {
        name: "tpcb-like, simple, 8 clients",
        arguments: &["-b", "tpcb-like", "-M", "simple", "-c", "8", "-j", "2"],
        ..PLAIN
    },
    Row {
        name: "results of 20 MB, 2 clients",
        arguments: &["-M", "simple", "-c", "2", "-j", "2"],
        large: true,
        ..PLAIN
    },
    Row {
        name: "a connection each, 4 clients",
        arguments: &["-S", "-C", "-M", "simple", "-c", "4", "-j", "2"],
        ..PLAIN
    },
    Row {
        name: "2,000 clients on 40 connections, select-only, simple",
        arguments: &["-S", "-M", "simple", "-c", "2000", "-j", "2"],
        many: true,
        ..PLAIN
    },
    Row {
        name: "2,000 clients on 40 connections, select-only, prepared",
        arguments: &["-S", "-M", "prepared", "-c", "2000", "-j", "2"],
        prepared: true,
        many: true,
        ..PLAIN
    },
    Row {
        name: "2,000 clients on 40 connections, select-only, simple, TLS",
        arguments: &["-S", "-M", "simple", "-c", "2000", "-j", "2"],
        many: true,
        tls: true,
        ..PLAIN
    },
    Row {
        name: "select-only, simple, 64 clients, TLS",
        arguments: &["-S", "-M", "simple", "-c", "64", "-j", "2"],
        tls: true,
        ..PLAIN
    },
    Row {
        name: "results of 20 MB, 2 clients, TLS",
        arguments: &["-M", "simple", "-c", "2", "-j", "2"],
        large: true,
        tls: true,
        ..PLAIN
    },
];

impl Row {
    /// Transactions per second on this way; `None` where it cannot work.
    pub async fn measure(
        &self,
        way: &Way,
        length: Duration,
        scratch: &Scratch,
    ) -> Result<Option<f64>> {
        if self.prepared && !way.prepared || self.many && !way.pooled {
            return Ok(None);
        }
        let mut command = pgbench(way.port, self.tls);
        let seconds = length.as_secs().max(1);
        if self.many {
            // pgbench's clock runs while it connects, and thousands of logins outlast it.
            command.args(["-t", &(seconds * MANY_TRANSACTIONS).to_string()]);
        } else {
            command.args(["-T", &seconds.to_string()]);
        }
        command.arg("-n").args(self.arguments);
        if self.large {
            let script = scratch.join("large.sql");
            fs::write(&script, LARGE).context("write a script")?;
            command.arg("-f").arg(&script);
        }
        let output = run(command).await?;
        let (text, complaints) =
            (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        if !output.status.success() {
            bail!("{} through {}: {complaints}", self.name, way.name);
        }
        let tps = tps(&text).with_context(|| format!("no tps in: {text}{complaints}"))?;
        Ok(Some(tps))
    }
}

/// From `tps = 1234.5 (without initial connection time)`.
fn tps(text: &str) -> Option<f64> {
    let rest = text.split("tps = ").nth(1)?;
    rest.split_whitespace().next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pgbenchs_own_words_are_understood() {
        let text = "latency average = 0.1 ms\ntps = 9041.25 (without initial connection time)\n";
        assert_eq!(tps(text), Some(9041.25));
        assert_eq!(tps("nothing"), None);
    }
}

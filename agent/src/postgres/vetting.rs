//! Parameters that a server would not start with, found before it is asked to: misspelled ones, those of
//! other versions, values that it does not take. One such line in a file keeps a server down.
//!
//! The judge is the server's own program, which reads a configuration and prints one parameter (`-C`,
//! which root may do as well), so nobody keeps a list of parameters. Those of extensions have a dot in
//! their names and are known to libraries only; they pass.

use std::collections::BTreeMap;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, SystemTime};

use rustix::fs::{MemfdFlags, memfd_create};
use serde_json::{Map, Value};
use tokio::process::Command;
use tracing::{debug, warn};

use super::conf::{self, Parameters};
use super::os::OsUser;
use super::tool::{self, ToolError};
use super::{Inner, Postgres};

/// The program reads one small file.
const LIMIT: Duration = Duration::from_secs(10);
/// Verdicts are remembered for the values that were tried; who changes them more often pays again.
const MOST_VERDICTS: usize = 2000;

/// A program's verdicts about parameters and their values.
#[derive(Debug, Default)]
pub(super) struct Verdicts {
    /// When the program was written; another one may judge otherwise.
    program: Option<SystemTime>,
    /// `None`: it takes them.
    reasons: BTreeMap<(String, String), Option<String>>,
}

/// Whether it is ours to judge: what we write ourselves is right, what an extension defines is not known
/// here, and without its end a recovery goes too far.
fn is_judged(name: &str) -> bool {
    let ours = conf::is_ours(name) || name == super::files::SYNC;
    !name.contains('.') && !ours && !name.starts_with("recovery_target")
}

/// The ones of `parameters` that the server's program refuses, with what it says to them.
///
/// # Errors
/// The program cannot be run, or judges nothing.
pub async fn refused_parameters(
    program: &Path,
    parameters: &Map<String, Value>,
) -> Result<BTreeMap<String, String>, ToolError> {
    let mut parameters = conf::parameters(Some(parameters));
    parameters.retain(|name, _| is_judged(name));
    refused(program, None, parameters).await
}

async fn refused(
    program: &Path,
    user: Option<&OsUser>,
    mut left: Parameters,
) -> Result<BTreeMap<String, String>, ToolError> {
    let mut refused = BTreeMap::new();
    while let Err(error) = attempt(program, user, &left).await {
        let ToolError::Failed { told, .. } = &error else { return Err(error) };
        let named: BTreeMap<String, String> =
            complaints(&told.0).filter(|(name, _)| left.contains_key(name)).collect();
        if named.is_empty() {
            // It has complained elsewhere, as one of them told it to.
            attempt(program, user, &Parameters::new()).await?;
            for (name, value) in &left {
                let one = Parameters::from([(name.clone(), value.clone())]);
                if let Err(ToolError::Failed { told, .. }) = attempt(program, user, &one).await {
                    refused.insert(name.clone(), format!("parameter \"{name}\": {told}"));
                }
            }
            break;
        }
        left.retain(|name, _| !named.contains_key(name));
        refused.extend(named);
    }
    Ok(refused)
}

/// Succeeds if a server would start with them.
async fn attempt(
    program: &Path,
    user: Option<&OsUser>,
    parameters: &Parameters,
) -> Result<(), ToolError> {
    let file = file_of(&conf::render(None, parameters));
    let file = file.map_err(|source| ToolError::Spawn { program: program.to_owned(), source })?;
    let mut command: Command = tool::command(program, user);
    // The option comes first, or root is refused. Nothing is read from the directory.
    command.args(["-C", "port", "-D", "/", "-c", "config_file=/dev/stdin"]).stdin(file);
    tool::run(&mut command, LIMIT).await.map(drop)
}

/// A file without a name, so that no value is seen in lists of processes or left behind. The program
/// reads it twice, so it can be no pipe.
fn file_of(text: &str) -> io::Result<Stdio> {
    let mut file = std::fs::File::from(memfd_create("parameters", MemfdFlags::CLOEXEC)?);
    file.write_all(text.as_bytes())?;
    Ok(Stdio::from(file))
}

/// Names and reasons, of lines such as `LOG:  unrecognized configuration parameter "x" in file …`.
fn complaints(told: &str) -> impl Iterator<Item = (String, String)> {
    told.split("; ").filter_map(|line| {
        let (_, said) = line.split_once(":  ")?;
        let said = said.split(" in file \"").next().unwrap_or(said);
        let name = said.split_once("parameter \"")?.1.split('"').next()?;
        Some((name.to_ascii_lowercase(), said.to_owned()))
    })
}

impl Postgres {
    /// Has the program judge what is new in the wanted configuration. Where it cannot be asked nothing is
    /// left out.
    pub(super) async fn vet(&self, standby: bool) {
        let program: PathBuf = self.settings().program("postgres");
        let written = std::fs::metadata(&program).and_then(|it| it.modified()).ok();
        let wanted = self.inner.wanted.lock().clone();
        let mut asked = self.inner.file_parameters(&wanted, standby);
        asked.extend(conf::controlled(&wanted.dynamic, None));
        {
            let mut verdicts = self.inner.verdicts.lock();
            if verdicts.program != written || verdicts.reasons.len() > MOST_VERDICTS {
                *verdicts = Verdicts { program: written, reasons: BTreeMap::new() };
            }
            asked.retain(|name, value| {
                let pair = (name.clone(), value.clone());
                is_judged(name) && !verdicts.reasons.contains_key(&pair)
            });
        }
        if asked.is_empty() {
            return;
        }
        let mut refused = match refused(&program, self.os_user(), asked.clone()).await {
            Ok(refused) => refused,
            Err(error) => {
                let error = &error as &dyn std::error::Error;
                debug!(error, "the server's program does not judge parameters");
                return;
            }
        };
        if !refused.is_empty() {
            let reasons: Vec<&str> = refused.values().map(String::as_str).collect();
            let reasons = reasons.join("; ");
            warn!(reasons, "parameters left out: this server would not start with them");
        }
        let judged = asked.into_iter().map(|(name, value)| {
            let reason = refused.remove(&name);
            ((name, value), reason)
        });
        self.inner.verdicts.lock().reasons.extend(judged);
    }
}

impl Inner {
    /// Without those that the server's program refuses.
    pub(super) fn accepted(&self, mut parameters: Parameters) -> Parameters {
        let verdicts = self.verdicts.lock();
        parameters.retain(|name, value| {
            let reason = verdicts.reasons.get(&(name.clone(), value.clone()));
            !matches!(reason, Some(Some(_)))
        });
        parameters
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_program_names_what_it_does_not_take() {
        let told = "2026-11-30 12:14:58 GMT [1] LOG:  skipping missing configuration file \"/x\"; \
                    2026 GMT [1] LOG:  unrecognized configuration parameter \"shared_bufers\" in file \
                    \"/dev/stdin\" line 1; 2026 GMT [1] LOG:  invalid value for parameter \"Work_mem\": \
                    \"64XB\"; 2026 GMT [1] HINT:  Valid units are \"B\"; 2026 GMT [1] FATAL:  configuration \
                    file \"/dev/stdin\" contains errors";
        let found: Vec<(String, String)> = complaints(told).collect();
        let unknown = "unrecognized configuration parameter \"shared_bufers\"";
        let invalid = "invalid value for parameter \"Work_mem\": \"64XB\"";
        let pair = |name: &str, said: &str| (name.to_owned(), said.to_owned());
        assert_eq!(found, [pair("shared_bufers", unknown), pair("work_mem", invalid)]);
    }

    #[tokio::test]
    async fn the_servers_own_program_judges() {
        let Some(program) = installed() else { return };
        let parameters = json!({
            "shared_bufers": "64MB", "work_mem": "64XB", "no_such": 1, "max_connections": 300_000,
            "log_destination": "nowhere", "debug_discard_caches": 0, "my.extension": "x",
            "maintenance_work_mem": "64MB", "archive_command": "cp '%p' \\ö", "port": "any",
            "logging_collector": true, "wal_keep_segments": 100,
        });
        let found = refused_parameters(&program, parameters.as_object().unwrap()).await.unwrap();
        let names: Vec<&str> = found.keys().map(String::as_str).collect();
        let wrong = ["log_destination", "max_connections", "no_such", "shared_bufers", "work_mem"];
        assert_eq!(names, wrong, "{found:?}");
        assert!(found["work_mem"].contains("64XB"), "{found:?}");
        // One that sends the complaints elsewhere does not hide them.
        let silent = json!({"log_destination": "syslog", "work_mem": "64XB"});
        let found = refused_parameters(&program, silent.as_object().unwrap()).await.unwrap();
        assert_eq!(found.keys().collect::<Vec<_>>(), ["work_mem"]);
        let missing = refused_parameters(Path::new("/nonexistent"), &Map::new()).await;
        assert!(matches!(missing, Err(ToolError::Spawn { .. })));
    }

    /// The newest that is there, where Debian has them.
    fn installed() -> Option<PathBuf> {
        let found = std::fs::read_dir("/usr/lib/postgresql").ok()?.flatten();
        found.map(|dir| dir.path().join("bin/postgres")).filter(|it| it.exists()).max()
    }
}

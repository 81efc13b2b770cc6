//! Runs PostgreSQL's programs and the operator's commands.

use std::ffi::OsStr;
use std::fmt;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Output, Stdio};
use std::time::Duration;

use kornak_cluster::discard;
use rustix::process::{Pid, Signal, kill_process_group};
use tokio::process::Command;
use tokio::time::timeout;

use super::claim::Claim;
use super::os::OsUser;
use crate::guard::{hide_settings, run_as};

/// Of what a failed program said, as much as a log line can take.
const TOLD_BYTES: usize = 2000;

/// Why a program did not do its work.
#[derive(Debug, thiserror::Error)]
pub enum ToolError {
    /// The program could not be started.
    #[error("run {program}")]
    Spawn {
        program: PathBuf,
        #[source]
        source: io::Error,
    },
    /// The program ended with an error.
    #[error("{program} ended with {status}: {told}")]
    Failed { program: PathBuf, status: ExitStatus, told: Told },
    /// Another one works on the data directory, perhaps started by an earlier agent.
    #[error("another tool works on the data directory (it holds {lock}): wait until it has ended")]
    Busy { lock: PathBuf },
    /// The work could not be noted beside the data directory.
    #[error("claim the data directory with {path}")]
    Claim {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    /// The program was killed because it took too long.
    #[error("{program} has not ended within {limit:?} and was killed")]
    TimedOut { program: PathBuf, limit: Duration },
}

/// The end of what a program wrote to its standard error.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Told(pub String);

impl Told {
    fn from_output(output: &[u8]) -> Self {
        let from = output.len().saturating_sub(TOLD_BYTES);
        let tail = output.get(from..).unwrap_or_default();
        let text = String::from_utf8_lossy(tail);
        // initdb's server repeats the statement that failed, and that may be the one with the password.
        let lines = text.trim().lines().filter(|line| !line.contains("STATEMENT:"));
        Self(lines.collect::<Vec<_>>().join("; "))
    }
}

impl fmt::Display for Told {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.0.is_empty() { "it said nothing" } else { &self.0 })
    }
}

/// A program that will run as `user`, speaking English, and that dies with whoever waits for it, as all that
/// it has started. It runs in the agent's own directory, so that a command's relative paths mean what they mean
/// to Patroni; as another user, who may not be let into that directory, in no directory of interest.
pub(super) fn command(program: impl AsRef<OsStr>, user: Option<&OsUser>) -> Command {
    let mut command = Command::new(program);
    command.env("LC_ALL", "C").stdin(Stdio::null()).kill_on_drop(true);
    command.process_group(0);
    hide_settings(&mut command);
    if let Some(user) = user {
        run_as(command.as_std_mut(), user.uid, user.gid, &user.groups);
        command.env("HOME", &user.home).env("USER", &user.name);
        command.current_dir("/");
    }
    command
}

/// Runs a program that changes a data directory, under a claim that it keeps until its end.
pub(super) async fn run_claimed(
    command: &mut Command,
    claim: &Claim,
    limit: Duration,
) -> Result<String, ToolError> {
    let program = Path::new(command.as_std().get_program()).to_owned();
    let stdin = claim.stdin().map_err(|source| ToolError::Spawn { program, source })?;
    run(command.stdin(stdin), limit).await
}

/// Runs a program under a claim that may outlive this process, and has no limit: what it says goes to a file, for
/// the end of a pipe's reader would be its own.
pub(super) async fn run_outliving(
    command: &mut Command,
    claim: &Claim,
    log: &Path,
) -> Result<(), ToolError> {
    let program = Path::new(command.as_std().get_program()).to_owned();
    let failed = |source| ToolError::Spawn { program: program.clone(), source };
    let file = File::create(log).map_err(failed)?;
    let same = file.try_clone().map_err(failed)?;
    let stdin = claim.stdin().map_err(failed)?;
    let mut child = command.stdin(stdin).stdout(same).stderr(file).spawn().map_err(failed)?;
    let mut group = Group(child.id());
    let status = child.wait().await.map_err(failed)?;
    group.0 = None;
    if status.success() {
        return Ok(());
    }
    let told = Told::from_output(&fs::read(log).unwrap_or_default());
    Err(ToolError::Failed { program, status, told })
}

/// Runs a program to its end. Returns what it wrote to its standard output.
pub(super) async fn run(command: &mut Command, limit: Duration) -> Result<String, ToolError> {
    let program = Path::new(command.as_std().get_program()).to_owned();
    match timeout(limit, output(command)).await {
        Err(_) => Err(ToolError::TimedOut { program, limit }),
        Ok(Err(source)) => Err(ToolError::Spawn { program, source }),
        Ok(Ok(output)) if output.status.success() => {
            Ok(String::from_utf8_lossy(&output.stdout).into_owned())
        }
        Ok(Ok(output)) => Err(ToolError::Failed {
            program,
            status: output.status,
            told: Told::from_output(if output.stderr.is_empty() {
                &output.stdout
            } else {
                &output.stderr
            }),
        }),
    }
}

async fn output(command: &mut Command) -> io::Result<Output> {
    let child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
    let mut group = Group(child.id());
    let output = child.wait_with_output().await;
    group.0 = None;
    output
}

/// The processes of a command that runs: a script's children would go on without it, and hold what it
/// holds.
struct Group(Option<u32>);

impl Drop for Group {
    fn drop(&mut self) {
        let leader = self.0.and_then(|pid| Pid::from_raw(i32::try_from(pid).ok()?));
        if let Some(leader) = leader {
            // They may have ended meanwhile.
            discard::may_be_gone_already(kill_process_group(leader, Signal::KILL));
        }
    }
}

/// Splits an operator's command into words as a shell does, without its expansions: blanks part, quotes
/// and backslashes join. `None`: a quote is not closed.
pub fn split_words(text: &str) -> Option<Vec<String>> {
    let mut words = Vec::new();
    let mut word: Option<String> = None;
    let mut chars = text.chars();
    while let Some(c) = chars.next() {
        match c {
            '\'' => {
                let word = word.get_or_insert_default();
                loop {
                    match chars.next()? {
                        '\'' => break,
                        c => word.push(c),
                    }
                }
            }
            '"' => {
                let word = word.get_or_insert_default();
                loop {
                    match chars.next()? {
                        '"' => break,
                        '\\' => match chars.next()? {
                            c @ ('"' | '\\' | '$' | '`') => word.push(c),
                            c => word.extend(['\\', c]),
                        },
                        c => word.push(c),
                    }
                }
            }
            '\\' => word.get_or_insert_default().push(chars.next()?),
            c if c.is_whitespace() => words.extend(word.take()),
            c => word.get_or_insert_default().push(c),
        }
    }
    words.extend(word);
    Some(words)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_split_as_a_shell_splits_them() {
        for (text, words) in [
            ("", Some(vec![])),
            ("  /bin/x  -a\tb ", Some(vec!["/bin/x", "-a", "b"])),
            (r#"x 'a b' "c \"d" e\ f '' "#, Some(vec!["x", "a b", "c \"d", "e f", ""])),
            (r#"x"y"'z'"#, Some(vec!["xyz"])),
            ("x 'y", None),
            ("x \\", None),
        ] {
            assert_eq!(split_words(text), words.map(|w| w.iter().map(|w| (*w).into()).collect()));
        }
    }

    /// As root: Debian's servers read their key as a member of ssl-cert.
    #[tokio::test]
    async fn a_program_has_all_groups_of_its_account() {
        let Ok(Some(user)) = OsUser::to_become("postgres") else { return };
        let of = |mut command: Command| async move {
            let output = command.output().await.unwrap();
            let groups: Vec<u32> = String::from_utf8(output.stdout)
                .unwrap()
                .split_whitespace()
                .map(|group| group.parse().unwrap())
                .collect();
            groups.into_iter().collect::<std::collections::BTreeSet<_>>()
        };
        let (mut own, mut by_name) = (command("id", Some(&user)), command("id", None));
        own.arg("-G");
        by_name.args(["-G", "postgres"]);
        assert_eq!(of(own).await, of(by_name).await);
    }

    #[test]
    fn a_statement_that_failed_is_not_repeated() {
        let said =
            b"FATAL:  no\nSTATEMENT:  ALTER USER \"x\" WITH PASSWORD E'secret';\nchild exited";
        assert_eq!(Told::from_output(said).0, "FATAL:  no; child exited");
    }

    #[tokio::test]
    async fn a_failing_program_tells_why() {
        let limit = Duration::from_secs(10);
        let error = run(command("sh", None).args(["-c", "echo no >&2; exit 3"]), limit).await;
        assert!(matches!(error, Err(ToolError::Failed { told: Told(told), .. }) if told == "no"));
        let error = run(&mut command("/nonexistent", None), limit).await;
        assert!(matches!(error, Err(ToolError::Spawn { .. })));
        let error = run(command("sleep", None).arg("60"), Duration::from_millis(20)).await;
        assert!(matches!(error, Err(ToolError::TimedOut { .. })));
    }

    #[tokio::test]
    async fn what_a_program_has_started_ends_with_it() {
        use std::io::Read as _;
        let (mut reader, writer) = io::pipe().unwrap();
        let mut script = command("sh", None);
        // The pipe ends when the last process that holds it does.
        script.args(["-c", "sleep 60; true"]).stdin(writer);
        let error = run(&mut script, Duration::from_millis(50)).await;
        assert!(matches!(error, Err(ToolError::TimedOut { .. })));
        drop(script);
        assert_eq!(reader.read(&mut [0]).unwrap(), 0);
    }
}

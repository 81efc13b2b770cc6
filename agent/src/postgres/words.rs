//! The last words of a server that ended by itself, so that a reader of the agent's log need not look
//! for another one.

use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use super::Postgres;
use super::process::StartError;
use crate::guard::{Exit, Watched};

/// Of lines that give a reason: as text, as CSV, and as JSON.
const LEVELS: [&str; 9] = [
    "PANIC:",
    "FATAL:",
    "ERROR:",
    ",PANIC,",
    ",FATAL,",
    ",ERROR,",
    "\"PANIC\"",
    "\"FATAL\"",
    "\"ERROR\"",
];
/// Of a log as much as is read from its end.
const TAIL_BYTES: u64 = 64 * 1024;
/// Of a line as much as is passed on.
const LINE_CHARS: usize = 500;

/// The last start of the server by this agent.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Begun {
    pub(super) pid: Option<u32>,
    /// The end of the log file before the start.
    pub(super) log_from: u64,
    /// The server was told to stop, or its end is known already.
    pub(super) told: bool,
}

/// A server that nobody has told to end.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ended {
    pub pid: u32,
    pub exit: Exit,
    pub log: PathBuf,
    /// The most telling of its last words.
    pub said: String,
}

impl Postgres {
    /// The server that was last started here has ended by itself; said once.
    pub async fn ended_by_itself(&self) -> Option<Ended> {
        let begun = *self.inner.begun.lock();
        let pid = begun.pid.filter(|_| !begun.told)?;
        let watched = *self.guard().await.ok()?.watch().borrow();
        let (Watched::Ending { pid: ended, exit } | Watched::Gone { pid: ended, exit }) = watched
        else {
            return None;
        };
        if ended != pid {
            return None;
        }
        self.inner.begun.lock().told = true;
        Some(Ended { pid, exit, log: self.log_file(), said: self.last_words() })
    }

    /// From now on its end is no surprise.
    pub(super) fn tells_to_end(&self) {
        self.inner.begun.lock().told = true;
    }

    pub(super) fn exited(&self, exit: Exit) -> StartError {
        StartError::Exited { exit, log: self.log_file(), said: self.last_words() }
    }

    fn last_words(&self) -> String {
        let from = self.inner.begun.lock().log_from;
        let text = tail(&self.log_file(), from);
        let collected = collected(&text, self.data_dir()).map(|file| tail(&file, 0));
        let said = collected.as_deref().and_then(telling).or_else(|| telling(&text));
        said.unwrap_or_else(|| "nothing".to_owned())
    }
}

fn tail(file: &Path, from: u64) -> String {
    let read = || -> std::io::Result<Vec<u8>> {
        let mut file = File::open(file)?;
        let bytes = file.metadata()?.len();
        let from = if from > bytes { 0 } else { from };
        file.seek(SeekFrom::Start(from.max(bytes.saturating_sub(TAIL_BYTES))))?;
        let mut text = Vec::new();
        file.take(TAIL_BYTES).read_to_end(&mut text)?;
        Ok(text)
    };
    String::from_utf8_lossy(&read().unwrap_or_default()).into_owned()
}

/// The file of a logging collector that has taken over: the first that the server names itself. Others' logs may
/// be in the same directory.
fn collected(text: &str, data_dir: &Path) -> Option<PathBuf> {
    text.contains("will appear in directory \"").then_some(())?;
    let named = fs::read_to_string(data_dir.join("current_logfiles")).ok()?;
    let (_, file) = named.lines().next()?.split_once(' ')?;
    Some(data_dir.join(file))
}

/// The last line with a reason in it, else the last line. What is said to clients that come too early is
/// no reason.
fn telling(text: &str) -> Option<String> {
    let lines = || text.lines().rev().map(str::trim).filter(|line| !line.is_empty());
    let level = |line: &&str| {
        LEVELS.iter().any(|level| line.contains(level)) && !line.contains("the database system is ")
    };
    let line = lines().find(level).or_else(|| lines().next())?;
    Some(line.chars().take(LINE_CHARS).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_reason_is_found_behind_what_clients_were_told() {
        for (text, expected) in [
            ("", None),
            ("LOG:  starting\n\n", Some("LOG:  starting")),
            (
                "12 [1] FATAL:  unrecognized configuration parameter \"x\"\n13 LOG:  shut down\n",
                Some("12 [1] FATAL:  unrecognized configuration parameter \"x\""),
            ),
            (
                "1,,0,FATAL,XX000,\"no\"\n1,,0,DEBUG,00000,\"logger\"\n",
                Some("1,,0,FATAL,XX000,\"no\""),
            ),
            (
                "PANIC:  could not locate a valid checkpoint record\nLOG:  aborting\n\
                 FATAL:  the database system is starting up\n",
                Some("PANIC:  could not locate a valid checkpoint record"),
            ),
        ] {
            assert_eq!(telling(text).as_deref(), expected, "{text}");
        }
    }

    #[test]
    fn a_collectors_file_is_the_one_that_the_server_names() {
        let dir = tempfile::tempdir().expect("a directory");
        let text = "LOG:  redirecting log output to logging collector process\n\
                    HINT:  Future log output will appear in directory \"log\".\n";
        assert_eq!(collected(text, dir.path()), None, "it has not begun");
        let named = "stderr log/a.log\ncsvlog log/a.csv\n";
        fs::write(dir.path().join("current_logfiles"), named).expect("written");
        assert_eq!(collected(text, dir.path()), Some(dir.path().join("log/a.log")));
        assert_eq!(collected("LOG:  starting", dir.path()), None, "it is not in use now");
    }

    #[test]
    fn only_the_last_start_counts() {
        let dir = tempfile::tempdir().expect("a directory");
        let file = dir.path().join("log");
        fs::write(&file, "FATAL:  old\nLOG:  new\n").expect("written");
        assert_eq!(telling(&tail(&file, 12)).as_deref(), Some("LOG:  new"));
        assert_eq!(telling(&tail(&file, 99)).as_deref(), Some("FATAL:  old"), "begun anew");
    }
}

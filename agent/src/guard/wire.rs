//! The protocol between agent and guard. Version 1: words may be added, and none is changed or taken away.
//!
//! Lines of text that end in a line feed, over a unix socket. The guard greets a client with
//! `HELLO 1 <guard pid>`; a newer client replaces an older one. A client asks one thing at a time:
//!
//! ```text
//! START <json>            OK <pid>       start the postmaster; see [`StartRequest`]
//! ADOPT <pid>             OK <pid>       hold a postmaster that somebody else started
//! ARM <nanoseconds>       OK             may be primary until then (CLOCK_BOOTTIME)
//! DISARM                  OK             is not primary: proven by the client
//! PROMOTE armed|unfenced  OK             write the promote file and wake the startup process
//! SIGNAL <word>           OK             smart, fast, immediate, hup or usr1
//! KILL                    OK             kill all that runs on the data directory; GONE follows
//! STATUS                  OK <json>      see [`GuardStatus`]
//! WATCH <milliseconds>    OK             replace me when I am silent for so long while my server leads; 0: do not
//! BEAT leads|rests        OK             I live; my server is a primary with a proven lease, or is not
//! LEAVE                   OK             I end because I was asked to
//! KEEP <text>             OK             for the next agent, as long as this postmaster lives and you are armed; empty: nothing
//! KEPT                    OK <json>      see [`Kept`]; `OK` alone: nothing, or too late
//! ```
//!
//! or is answered `ERR <why>`. Unasked the guard says `EXITED <pid> <exit>` when the postmaster has
//! ended, `GONE` when no process is left on the data directory, `FIRED` when the deadline has come,
//! and `JUMPED <milliseconds>` when the wall clock says that the host stood still: whoever is primary
//! must prove its lease at once. A client skips lines whose first word it does not know.

use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use kornak_cluster::Moment;
use serde::{Deserialize, Serialize};

/// Version of the protocol, in the greeting.
pub const VERSION: u32 = 1;

/// Longest line that either side takes: a START with its arguments and its environment.
pub const MAX_LINE_BYTES: usize = 256 * 1024;

/// Whether a server may be writable only until the armed deadline.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Fencing {
    /// The guard must be armed with a deadline that has not come.
    Armed,
    /// Nobody proves a lease: a paused cluster, or a server that nobody else can replace.
    Unfenced,
}

/// How a postmaster is started.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StartRequest {
    /// The `postgres` program.
    pub program: PathBuf,
    /// The postmaster's arguments; the sender adds `-D`.
    pub args: Vec<String>,
    /// Added to the guard's own environment.
    #[serde(default)]
    pub env: BTreeMap<String, String>,
    /// File that gets standard output and standard error, appended.
    pub log: PathBuf,
    /// OS user and group to run as; `None`: the guard's own.
    #[serde(default)]
    pub uid: Option<u32>,
    #[serde(default)]
    pub gid: Option<u32>,
    /// Other groups that the user is in.
    #[serde(default)]
    pub groups: Vec<u32>,
    /// `None`: a standby. The guard looks for `standby.signal` or `recovery.signal` and refuses
    /// otherwise. `Some`: the server will be writable.
    #[serde(default)]
    pub writable: Option<Fencing>,
}

/// Signals to a postmaster (/docs/current/server-shutdown.html).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ServerSignal {
    /// SIGTERM: wait for clients.
    Smart,
    /// SIGINT: end clients, write a checkpoint.
    Fast,
    /// SIGQUIT: stop as if it had crashed.
    Immediate,
    /// SIGHUP: read the configuration again.
    Reload,
    /// SIGUSR1: look for signal files.
    Usr1,
}

impl ServerSignal {
    const WORDS: [(Self, &'static str); 5] = [
        (Self::Smart, "smart"),
        (Self::Fast, "fast"),
        (Self::Immediate, "immediate"),
        (Self::Reload, "hup"),
        (Self::Usr1, "usr1"),
    ];

    fn word(self) -> &'static str {
        Self::WORDS.iter().find(|(signal, _)| *signal == self).map_or("", |(_, word)| word)
    }

    fn parse(text: &str) -> Option<Self> {
        Self::WORDS.iter().find(|(_, word)| *word == text).map(|(signal, _)| *signal)
    }
}

/// How a postmaster ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Exit {
    /// 0: a clean shutdown; 1: a fatal error, often at the start.
    Code(i32),
    /// Killed by this signal.
    Signal(i32),
    /// Not a child of the guard.
    Unknown,
}

impl fmt::Display for Exit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Code(code) => write!(f, "code:{code}"),
            Self::Signal(signal) => write!(f, "signal:{signal}"),
            Self::Unknown => f.write_str("unknown"),
        }
    }
}

impl Exit {
    fn parse(text: &str) -> Option<Self> {
        match text.split_once(':') {
            Some(("code", code)) => code.parse().ok().map(Self::Code),
            Some(("signal", signal)) => signal.parse().ok().map(Self::Signal),
            _ => (text == "unknown").then_some(Self::Unknown),
        }
    }
}

/// The guard's knowledge. Fields may be added, never taken away.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct GuardStatus {
    pub version: u32,
    pub guard_pid: u32,
    /// The postmaster that it holds and that has not ended.
    pub postmaster: Option<u32>,
    /// The postmaster was started by somebody else.
    #[serde(default)]
    pub adopted: bool,
    /// How the last postmaster ended.
    pub last_exit: Option<Exit>,
    /// Nanoseconds of `CLOCK_BOOTTIME`; `None`: not armed.
    pub armed_ns: Option<u64>,
    /// The deadline has come and the guard is killing, or has killed.
    pub fired: bool,
    /// Server processes on the data directory, whoever started them.
    pub left: u32,
    /// The guard's clock, to compare: nanoseconds of `CLOCK_BOOTTIME`.
    pub now_ns: u64,
}

impl GuardStatus {
    /// The armed deadline.
    pub fn armed(&self) -> Option<Moment> {
        self.armed_ns.map(|ns| Moment::new(Duration::from_nanos(ns)))
    }
}

/// The text that an agent has left to the next one, with a server that may be a primary.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Kept {
    /// The armed deadline, nanoseconds of `CLOCK_BOOTTIME`.
    pub deadline_ns: u64,
    pub text: String,
}

/// One line from the agent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Command {
    Start(Box<StartRequest>),
    Adopt(u32),
    Arm(Moment),
    Disarm,
    Promote(Fencing),
    Signal(ServerSignal),
    Kill,
    Status,
    Watch(Duration),
    Beat { leads: bool },
    Leave,
    Keep(String),
    Kept,
}

/// Nanoseconds of a moment as they are written; 584 years fit.
pub fn nanos(moment: Moment) -> u64 {
    u64::try_from(moment.since_start().as_nanos()).unwrap_or(u64::MAX)
}

impl Command {
    /// Reads a line without its end. `Err` is the text for `ERR`.
    pub fn parse(line: &str) -> Result<Self, String> {
        let (word, rest) = line.split_once(' ').unwrap_or((line, ""));
        let bad = || format!("{word}: cannot be read");
        match word {
            "START" => serde_json::from_str(rest)
                .map(|request| Self::Start(Box::new(request)))
                .map_err(|error| format!("START: {error}")),
            "ADOPT" => rest.parse().map(Self::Adopt).map_err(|_| bad()),
            "ARM" => rest
                .parse()
                .map(|ns| Self::Arm(Moment::new(Duration::from_nanos(ns))))
                .map_err(|_| bad()),
            "DISARM" => Ok(Self::Disarm),
            "PROMOTE" => match rest {
                "armed" => Ok(Self::Promote(Fencing::Armed)),
                "unfenced" => Ok(Self::Promote(Fencing::Unfenced)),
                _ => Err(bad()),
            },
            "SIGNAL" => ServerSignal::parse(rest).map(Self::Signal).ok_or_else(bad),
            "KILL" => Ok(Self::Kill),
            "STATUS" => Ok(Self::Status),
            "WATCH" => {
                rest.parse().map(|ms| Self::Watch(Duration::from_millis(ms))).map_err(|_| bad())
            }
            "BEAT" => match rest {
                "leads" => Ok(Self::Beat { leads: true }),
                "rests" => Ok(Self::Beat { leads: false }),
                _ => Err(bad()),
            },
            "LEAVE" => Ok(Self::Leave),
            "KEEP" => Ok(Self::Keep(rest.to_owned())),
            "KEPT" => Ok(Self::Kept),
            _ => Err(format!("{word}: unknown")),
        }
    }
}

impl fmt::Display for Command {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Start(request) => {
                let json = serde_json::to_string(request).map_err(|_| fmt::Error)?;
                write!(f, "START {json}")
            }
            Self::Adopt(pid) => write!(f, "ADOPT {pid}"),
            Self::Arm(deadline) => write!(f, "ARM {}", nanos(*deadline)),
            Self::Disarm => f.write_str("DISARM"),
            Self::Promote(Fencing::Armed) => f.write_str("PROMOTE armed"),
            Self::Promote(Fencing::Unfenced) => f.write_str("PROMOTE unfenced"),
            Self::Signal(signal) => write!(f, "SIGNAL {}", signal.word()),
            Self::Kill => f.write_str("KILL"),
            Self::Status => f.write_str("STATUS"),
            Self::Watch(timeout) => write!(f, "WATCH {}", timeout.as_millis()),
            Self::Beat { leads: true } => f.write_str("BEAT leads"),
            Self::Beat { leads: false } => f.write_str("BEAT rests"),
            Self::Leave => f.write_str("LEAVE"),
            Self::Keep(text) if text.is_empty() => f.write_str("KEEP"),
            Self::Keep(text) => write!(f, "KEEP {text}"),
            Self::Kept => f.write_str("KEPT"),
        }
    }
}

/// One line from the guard.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Answer {
    Hello { version: u32, pid: u32 },
    Ok(String),
    Err(String),
    Exited { pid: u32, exit: Exit },
    Gone,
    Fired,
    Jumped { millis: u64 },
}

impl Answer {
    /// `None`: a word of a later release, to be skipped.
    pub fn parse(line: &str) -> Option<Self> {
        let (word, rest) = line.split_once(' ').unwrap_or((line, ""));
        match word {
            "HELLO" => {
                let (version, pid) = rest.split_once(' ')?;
                Some(Self::Hello { version: version.parse().ok()?, pid: pid.parse().ok()? })
            }
            "OK" => Some(Self::Ok(rest.to_owned())),
            "ERR" => Some(Self::Err(rest.to_owned())),
            "EXITED" => {
                let (pid, exit) = rest.split_once(' ')?;
                Some(Self::Exited { pid: pid.parse().ok()?, exit: Exit::parse(exit)? })
            }
            "GONE" => Some(Self::Gone),
            "FIRED" => Some(Self::Fired),
            "JUMPED" => rest.parse().ok().map(|millis| Self::Jumped { millis }),
            _ => None,
        }
    }
}

impl fmt::Display for Answer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Hello { version, pid } => write!(f, "HELLO {version} {pid}"),
            Self::Ok(text) if text.is_empty() => f.write_str("OK"),
            Self::Ok(text) => write!(f, "OK {text}"),
            // One answer is one line, whatever the operating system put into its message.
            Self::Err(text) => write!(f, "ERR {}", text.replace('\n', " ")),
            Self::Exited { pid, exit } => write!(f, "EXITED {pid} {exit}"),
            Self::Gone => f.write_str("GONE"),
            Self::Fired => f.write_str("FIRED"),
            Self::Jumped { millis } => write!(f, "JUMPED {millis}"),
        }
    }
}

/// Cuts lines out of what a socket delivers in pieces.
#[derive(Debug, Default)]
pub struct Lines {
    pending: Vec<u8>,
}

/// A line was longer than [`MAX_LINE_BYTES`]: the connection is of no use any more.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a line of more than {MAX_LINE_BYTES} bytes")]
pub struct LineTooLong;

impl Lines {
    /// Adds bytes and returns the lines that are now complete. Bytes that are not UTF-8 are replaced.
    pub fn push(&mut self, bytes: &[u8]) -> Result<Vec<String>, LineTooLong> {
        self.pending.extend_from_slice(bytes);
        let mut lines = Vec::new();
        while let Some(end) = self.pending.iter().position(|byte| *byte == b'\n') {
            let line: Vec<u8> = self.pending.drain(..=end).take(end).collect();
            lines.push(String::from_utf8_lossy(&line).into_owned());
        }
        if self.pending.len() > MAX_LINE_BYTES { Err(LineTooLong) } else { Ok(lines) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_command_reads_what_it_prints() {
        let start = StartRequest {
            program: "/usr/bin/postgres".into(),
            args: vec!["-D".into(), "/data dir".into()],
            env: BTreeMap::from([("LANG".into(), "C\n".into())]),
            log: "/log".into(),
            uid: Some(1),
            gid: None,
            groups: vec![2],
            writable: Some(Fencing::Armed),
        };
        let commands = [
            (Command::Start(Box::new(start)), None),
            (Command::Adopt(7), Some("ADOPT 7")),
            (Command::Arm(Moment::at_millis(1500)), Some("ARM 1500000000")),
            (Command::Disarm, Some("DISARM")),
            (Command::Promote(Fencing::Armed), Some("PROMOTE armed")),
            (Command::Promote(Fencing::Unfenced), Some("PROMOTE unfenced")),
            (Command::Signal(ServerSignal::Smart), Some("SIGNAL smart")),
            (Command::Signal(ServerSignal::Fast), Some("SIGNAL fast")),
            (Command::Signal(ServerSignal::Immediate), Some("SIGNAL immediate")),
            (Command::Signal(ServerSignal::Reload), Some("SIGNAL hup")),
            (Command::Signal(ServerSignal::Usr1), Some("SIGNAL usr1")),
            (Command::Kill, Some("KILL")),
            (Command::Status, Some("STATUS")),
            (Command::Watch(Duration::from_secs(3)), Some("WATCH 3000")),
            (Command::Beat { leads: true }, Some("BEAT leads")),
            (Command::Beat { leads: false }, Some("BEAT rests")),
            (Command::Leave, Some("LEAVE")),
            (Command::Keep(String::new()), Some("KEEP")),
            (Command::Keep("{} {}".into()), Some("KEEP {} {}")),
            (Command::Kept, Some("KEPT")),
        ];
        for (command, frozen) in commands {
            let line = command.to_string();
            assert!(!line.contains('\n'), "{line}");
            if let Some(frozen) = frozen {
                assert_eq!(line, frozen);
            }
            assert_eq!(Command::parse(&line), Ok(command));
        }
        for line in [
            "",
            "START",
            "START {}",
            "ARM",
            "ARM -1",
            "SIGNAL kill",
            "PROMOTE",
            "BEAT",
            "WATCH",
            "EXIT",
        ] {
            assert!(Command::parse(line).is_err(), "{line:?}");
        }
    }

    #[test]
    fn every_answer_reads_what_it_prints() {
        for (answer, line) in [
            (Answer::Hello { version: 1, pid: 9 }, "HELLO 1 9"),
            (Answer::Ok(String::new()), "OK"),
            (Answer::Ok("12".into()), "OK 12"),
            (Answer::Err("no such file".into()), "ERR no such file"),
            (Answer::Exited { pid: 3, exit: Exit::Code(0) }, "EXITED 3 code:0"),
            (Answer::Exited { pid: 3, exit: Exit::Signal(9) }, "EXITED 3 signal:9"),
            (Answer::Exited { pid: 3, exit: Exit::Unknown }, "EXITED 3 unknown"),
            (Answer::Gone, "GONE"),
            (Answer::Fired, "FIRED"),
            (Answer::Jumped { millis: 1200 }, "JUMPED 1200"),
        ] {
            assert_eq!(answer.to_string(), line);
            assert_eq!(Answer::parse(line), Some(answer));
        }
        for line in ["", "HELLO", "EXITED 3", "EXITED x code:0", "LATER 1"] {
            assert_eq!(Answer::parse(line), None, "{line:?}");
        }
    }

    #[test]
    fn lines_arrive_in_any_pieces() {
        let mut lines = Lines::default();
        assert_eq!(lines.push(b"STA"), Ok(vec![]));
        assert_eq!(lines.push(b"TUS\nKI"), Ok(vec!["STATUS".to_owned()]));
        assert_eq!(lines.push(b"LL\n\nA\n"), Ok(vec!["KILL".into(), String::new(), "A".into()]));
        assert_eq!(lines.push(&vec![b'x'; MAX_LINE_BYTES + 1]), Err(LineTooLong));
    }
}

//! Output to the operator, and questions.
//!
//! Written by hand instead of `println!`, which would panic when the reader of a pipe has gone:
//! `kornak list | head -1` is a normal thing to do. Prompts are click's, for scripts answer them.

use std::io::{BufRead, IsTerminal, Write};

use anyhow::bail;
use kornak_cluster::discard;
use rustix::termios::{LocalModes, OptionalActions, tcgetattr, tcsetattr};
use secrecy::SecretString;

/// Something failed, and the operator has been told already.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct Told(pub String);

/// One or more lines to standard output; a reader that is gone is no error.
pub fn say(text: &str) {
    let mut out = std::io::stdout().lock();
    discard::nowhere_to_report(writeln!(out, "{text}"));
    discard::nowhere_to_report(out.flush());
}

/// Clears the screen, if it is one.
pub fn clear() {
    let mut out = std::io::stdout().lock();
    if out.is_terminal() {
        discard::nowhere_to_report(write!(out, "\x1b[2J\x1b[1;1H"));
    }
}

/// Asks for a text; an empty answer means `default`, without one the question comes again.
///
/// # Errors
/// The input has ended.
pub fn prompt(question: &str, default: Option<&str>) -> anyhow::Result<String> {
    let shown = default.map_or_else(String::new, |default| format!(" [{default}]"));
    loop {
        let answer = ask(&format!("{question}{shown}: "))?;
        match (answer.is_empty(), default) {
            (false, _) => return Ok(answer),
            (true, Some(default)) => return Ok(default.to_owned()),
            (true, None) => {}
        }
    }
}

/// Asks for a text that is not shown while it is typed.
///
/// # Errors
/// The input has ended.
pub fn prompt_secret(question: &str) -> anyhow::Result<SecretString> {
    let terminal = std::io::stdin();
    let before = tcgetattr(&terminal).ok();
    if let Some(shown) = &before {
        let mut hidden = shown.clone();
        hidden.local_modes.remove(LocalModes::ECHO);
        tcsetattr(&terminal, OptionalActions::Flush, &hidden)?;
    }
    let answer = prompt(question, None);
    if let Some(shown) = before {
        tcsetattr(&terminal, OptionalActions::Flush, &shown)?;
        say("");
    }
    answer.map(SecretString::from)
}

/// Asks for yes or no; an empty answer means no.
///
/// # Errors
/// The input has ended.
pub fn confirm(question: &str) -> anyhow::Result<bool> {
    loop {
        match ask(&format!("{question} [y/N]: "))?.to_ascii_lowercase().as_str() {
            "y" | "yes" => return Ok(true),
            "" | "n" | "no" => return Ok(false),
            _ => say("Error: invalid input"),
        }
    }
}

fn ask(question: &str) -> anyhow::Result<String> {
    {
        let mut out = std::io::stdout().lock();
        discard::nowhere_to_report(write!(out, "{question}"));
        discard::nowhere_to_report(out.flush());
    }
    let mut answer = String::new();
    if std::io::stdin().lock().read_line(&mut answer)? == 0 {
        bail!("aborted: no answer to read; --force asks nothing");
    }
    Ok(answer.trim().to_owned())
}

/// Prints an error to standard error.
pub fn complain(text: &str) {
    discard::nowhere_to_report(writeln!(std::io::stderr().lock(), "{text}"));
}

//! `kornak`: the agent, the proxy and the operator's tool in one binary. Arguments, exit codes;
//! everything else is in the libraries.

use std::ffi::OsString;
use std::process::ExitCode;

use kornak_ctl::{cmd, output};

fn main() -> ExitCode {
    let words: Vec<OsString> = std::env::args_os().collect();
    // The guard's arguments are its own affair, and it must start before and without everything else.
    if words.get(1).is_some_and(|first| first == "guard") {
        return kornak_agent::guard::main(words.into_iter().skip(2));
    }
    match cmd::main(&words) {
        Ok(()) => ExitCode::SUCCESS,
        // patronictl has told what failed, and ends with 0 all the same.
        Err(error) if error.is::<output::Told>() => {
            let drop_in = cmd::is_patronictl(words.first().map(OsString::as_os_str));
            if drop_in { ExitCode::SUCCESS } else { ExitCode::FAILURE }
        }
        Err(error) => {
            output::complain(&format!("Error: {error:#}"));
            ExitCode::FAILURE
        }
    }
}

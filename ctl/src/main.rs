//! `kornak`: the agent, the proxy and the operator's tool in one binary. Arguments, exit codes;
//! everything else is in the libraries.

use std::process::ExitCode;

use clap::Parser;
use kornak_ctl::{cmd, output};

fn main() -> ExitCode {
    let mut args = std::env::args_os().skip(1);
    // The guard's arguments are its own affair, and it must start before and without everything else.
    if args.next().is_some_and(|first| first == "guard") {
        return kornak_agent::guard::main(args);
    }
    match cmd::run(cmd::Cli::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            output::complain(&format!("Error: {error:#}"));
            ExitCode::FAILURE
        }
    }
}

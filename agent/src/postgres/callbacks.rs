//! The operator's commands that are told of a change (`postgresql.callbacks`).

use std::os::unix::process::ExitStatusExt;

use kornak_cluster::discard;
use kornak_config::agent::Callbacks as Commands;
use parking_lot::Mutex;
use rustix::process::{Pid, Signal, kill_process_group};
use tokio::process::Child;
use tracing::{debug, warn};

use super::os::OsUser;
use super::tool::{command, split_words};

/// The event that a callback is told of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CallbackAction {
    Start,
    Stop,
    Restart,
    Reload,
    RoleChange,
}

impl CallbackAction {
    /// Patroni's word.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Start => "on_start",
            Self::Stop => "on_stop",
            Self::Restart => "on_restart",
            Self::Reload => "on_reload",
            Self::RoleChange => "on_role_change",
        }
    }

    fn command(self, commands: &Commands) -> Option<&str> {
        match self {
            Self::Start => &commands.on_start,
            Self::Stop => &commands.on_stop,
            Self::Restart => &commands.on_restart,
            Self::Reload => &commands.on_reload,
            Self::RoleChange => &commands.on_role_change,
        }
        .as_deref()
    }
}

/// Runs callbacks, one at a time and without waiting for them: the newest says what is true, so it
/// ends an older one that still runs, with all its children.
#[derive(Debug)]
pub struct Callbacks {
    commands: Commands,
    scope: String,
    user: Option<OsUser>,
    running: Mutex<Option<Child>>,
}

impl Callbacks {
    /// `scope`: the last argument of each command.
    pub fn new(commands: Commands, scope: &str, user: Option<OsUser>) -> Self {
        Self { commands, scope: scope.to_owned(), user, running: Mutex::new(None) }
    }

    /// Runs `<command> <action> <role> <scope>`. A reload does not end a callback that runs; it is left
    /// out instead. Must be called within a runtime.
    pub fn call(&self, action: CallbackAction, role: &str) {
        let Some(text) = action.command(&self.commands) else { return };
        let Some((program, arguments)) = split_words(text)
            .and_then(|mut words| (!words.is_empty()).then(|| (words.remove(0), words)))
        else {
            warn!(callback = action.as_str(), "callback's command cannot be split into words");
            return;
        };
        let mut running = self.running.lock();
        if let Some(mut child) = running.take() {
            match child.try_wait() {
                Ok(None) if action == CallbackAction::Reload => {
                    *running = Some(child);
                    return;
                }
                Ok(None) => end(&mut child),
                Ok(Some(status)) if !status.success() => {
                    warn!(code = status.code(), signal = status.signal(), "callback failed");
                }
                Ok(Some(_)) | Err(_) => {}
            }
        }
        let mut command = command(program, self.user.as_ref());
        command.args(arguments).args([action.as_str(), role, &self.scope]).process_group(0);
        match command.kill_on_drop(false).spawn() {
            Ok(child) => {
                debug!(callback = action.as_str(), role, "callback started");
                *running = Some(child);
            }
            Err(error) => {
                let error = &error as &dyn std::error::Error;
                warn!(error, callback = action.as_str(), "callback could not be started");
            }
        }
    }
}

fn end(child: &mut Child) {
    let group = child.id().and_then(|pid| i32::try_from(pid).ok()).and_then(Pid::from_raw);
    if let Some(group) = group {
        // It may have ended meanwhile; the runtime reaps it.
        discard::may_be_gone_already(kill_process_group(group, Signal::KILL));
    }
    discard::may_be_gone_already(child.start_kill());
}

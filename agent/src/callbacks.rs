//! When the operator's callbacks are run: derived from what is observed, so that whatever brought a
//! server up or down, and whoever changed its role, the callbacks hear of it once.

use crate::ha::{Job, Server};
use crate::postgres::CallbackAction;

/// What the callbacks were last told.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Told {
    /// Role of the server while it ran; `None`: it is down.
    role: Option<&'static str>,
    /// The role it had when it last ran.
    last: Option<&'static str>,
    /// A restart has succeeded that they have not heard of.
    restarted: bool,
}

/// The role in Patroni's words.
pub fn role(server: &Server) -> &'static str {
    match server {
        Server::Primary(_) => "primary",
        _ => "replica",
    }
}

impl Told {
    /// A restart that was asked for has succeeded.
    pub fn restarted(&mut self) {
        self.restarted = true;
    }

    /// What has changed since the last look. A server that is on its way up or does not answer has
    /// changed nothing yet.
    pub fn changes(
        &mut self,
        server: &Server,
        job: Option<Job>,
    ) -> Vec<(CallbackAction, &'static str)> {
        let now = match server {
            Server::Primary(_) | Server::Standby(_) => Some(role(server)),
            Server::Stopped => None,
            Server::Leftovers | Server::Starting { .. } | Server::Silent { .. } => {
                return Vec::new();
            }
        };
        // A restart is one event, told when the server is up again.
        if let Some(now) = now.filter(|now| self.restarted && Some(*now) == self.role) {
            self.restarted = false;
            return vec![(CallbackAction::Restart, now)];
        }
        if now == self.role || (now.is_none() && job == Some(Job::Restart)) {
            return Vec::new();
        }
        self.restarted = false;
        let before = std::mem::replace(&mut self.role, now);
        let Some(now) = now else {
            return vec![(CallbackAction::Stop, before.unwrap_or("replica"))];
        };
        let changed = self.last.is_some_and(|last| last != now);
        self.last = Some(now);
        let mut events = Vec::new();
        if before.is_none() {
            events.push((CallbackAction::Start, now));
        }
        if changed {
            events.push((CallbackAction::RoleChange, now));
        }
        events
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ha::{PrimaryFacts, StandbyFacts};
    use kornak_cluster::Moment;

    #[test]
    fn every_change_is_told_once() {
        use CallbackAction::{RoleChange, Start, Stop};
        let standby = Server::Standby(StandbyFacts::default());
        let primary = Server::Primary(PrimaryFacts::default());
        let starting = Server::Starting { since: Moment::default() };
        let mut told = Told::default();
        let mut see = |server: &Server| told.changes(server, None);
        assert_eq!(see(&Server::Stopped), []);
        assert_eq!(see(&starting), []);
        assert_eq!(see(&standby), [(Start, "replica")]);
        assert_eq!(see(&standby), []);
        assert_eq!(see(&primary), [(RoleChange, "primary")]);
        assert_eq!(see(&Server::Stopped), [(Stop, "primary")]);
        assert_eq!(see(&standby), [(Start, "replica"), (RoleChange, "replica")]);
    }

    #[test]
    fn a_restart_is_told_as_such_when_the_server_is_up_again() {
        let standby = Server::Standby(StandbyFacts::default());
        let starting = Server::Starting { since: Moment::default() };
        let mut told = Told::default();
        told.changes(&standby, None);
        let restart = Some(Job::Restart);
        assert_eq!(told.changes(&Server::Stopped, restart), []);
        told.restarted();
        assert_eq!(told.changes(&starting, None), []);
        assert_eq!(told.changes(&standby, None), [(CallbackAction::Restart, "replica")]);
        assert_eq!(told.changes(&standby, None), []);
    }
}

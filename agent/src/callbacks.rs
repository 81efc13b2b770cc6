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
}

/// The role in Patroni's words.
pub fn role(server: &Server) -> &'static str {
    match server {
        Server::Primary(_) => "primary",
        _ => "replica",
    }
}

impl Told {
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
        if now == self.role || (now.is_none() && job == Some(Job::Restart)) {
            return Vec::new();
        }
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
}

//! When the operator's callbacks are run: derived from what is observed, so that whatever brought a
//! server up or down, and whoever changed its role, the callbacks hear of it once.

use crate::ha::{Job, Server};
use crate::postgres::CallbackAction;

/// The state that the callbacks were last told.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Told {
    /// Role of the server while it ran; `None`: it is down.
    role: Option<&'static str>,
    /// The role it had when it last ran.
    last: Option<&'static str>,
    /// A restart has succeeded that they have not heard of.
    restarted: bool,
    /// The server has ended by itself. They hear of nothing until it is up again.
    crashed: bool,
}

/// Patroni's word for the role of a leader whose server does not start.
pub const DEMOTED: &str = "demoted";

/// The role in Patroni's words. `leads`: this node has the leader key of a standby cluster.
pub fn role(server: &Server, leads: bool) -> &'static str {
    match server {
        Server::Primary(_) => "primary",
        _ if leads => "standby_leader",
        _ => "replica",
    }
}

impl Told {
    /// A restart that was asked for has succeeded.
    pub fn restarted(&mut self) {
        self.restarted = true;
    }

    /// The leader's server does not start and the leader key is given up: they have been told of the role
    /// [`DEMOTED`].
    pub fn demoted(&mut self) {
        self.last = Some(DEMOTED);
    }

    /// Answers the callbacks for what has changed since the last look. A server that is on its way
    /// up or does not answer has changed nothing yet. `leads`: see [`role`].
    pub fn changes(
        &mut self,
        server: &Server,
        job: Option<Job>,
        leads: bool,
    ) -> Vec<(CallbackAction, &'static str)> {
        let now = match server {
            Server::Primary(_) | Server::Standby(_) => Some(role(server, leads)),
            Server::Stopped => None,
            Server::Leftovers
            | Server::Starting { .. }
            | Server::Silent { .. }
            | Server::Stopping { .. }
            | Server::Closed { .. } => {
                self.crashed |= job.is_none() && *server == Server::Leftovers;
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
            let crashed = self.crashed || job.is_none();
            return match before {
                Some(before) if !crashed => vec![(CallbackAction::Stop, before)],
                _ => Vec::new(),
            };
        };
        self.crashed = false;
        // One event, for the newest callback ends an older one that still runs.
        let changed = self.last.replace(now).is_some_and(|last| last != now);
        vec![(if changed { CallbackAction::RoleChange } else { CallbackAction::Start }, now)]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ha::{PrimaryFacts, StandbyFacts};
    use kornak_cluster::Moment;

    fn standby() -> Server {
        Server::Standby(StandbyFacts::default())
    }

    fn primary() -> Server {
        Server::Primary(PrimaryFacts::default())
    }

    #[test]
    fn every_change_is_told_once() {
        use CallbackAction::{RoleChange, Start, Stop};
        let starting = Server::Starting { since: Moment::default() };
        let mut told = Told::default();
        let mut see = |server: &Server, job| told.changes(server, job, false);
        assert_eq!(see(&Server::Stopped, None), []);
        assert_eq!(see(&starting, Some(Job::Rejoin)), []);
        assert_eq!(see(&standby(), None), [(Start, "replica")]);
        assert_eq!(see(&standby(), None), []);
        assert_eq!(see(&primary(), Some(Job::Promote)), [(RoleChange, "primary")]);
        assert_eq!(see(&Server::Stopped, Some(Job::Handover)), [(Stop, "primary")]);
        assert_eq!(see(&standby(), None), [(RoleChange, "replica")]);
        assert_eq!(see(&Server::Stopped, Some(Job::Rejoin)), [(Stop, "replica")]);
        assert_eq!(see(&standby(), None), [(Start, "replica")]);
    }

    #[test]
    fn a_crash_is_told_by_the_start_that_follows() {
        use CallbackAction::{RoleChange, Start};
        let starting = Server::Starting { since: Moment::default() };
        let mut told = Told::default();
        let mut see = |server: &Server, job| told.changes(server, job, false);
        assert_eq!(see(&primary(), None), [(Start, "primary")]);
        assert_eq!(see(&Server::Leftovers, None), []);
        assert_eq!(see(&Server::Stopped, Some(Job::Demote)), []);
        assert_eq!(see(&starting, Some(Job::StartPrimary)), []);
        assert_eq!(see(&primary(), Some(Job::StartPrimary)), [(Start, "primary")]);
        assert_eq!(see(&Server::Stopped, None), []);
        assert_eq!(see(&standby(), None), [(RoleChange, "replica")], "another one took over");
    }

    #[test]
    fn who_was_demoted_for_a_server_that_does_not_start_changes_its_role_with_the_next_start() {
        use CallbackAction::{RoleChange, Start};
        for (next, role) in [(standby(), "replica"), (primary(), "primary")] {
            let mut told = Told::default();
            assert_eq!(told.changes(&primary(), None, false), [(Start, "primary")]);
            assert_eq!(told.changes(&Server::Stopped, None, false), []);
            told.demoted();
            assert_eq!(told.changes(&Server::Stopped, None, false), []);
            assert_eq!(told.changes(&next, None, false), [(RoleChange, role)]);
        }
    }

    #[test]
    fn the_leader_of_a_standby_cluster_has_a_role_of_its_own() {
        use CallbackAction::{RoleChange, Start};
        let mut told = Told::default();
        assert_eq!(told.changes(&standby(), None, true), [(Start, "standby_leader")]);
        assert_eq!(told.changes(&standby(), None, true), []);
        assert_eq!(told.changes(&primary(), None, true), [(RoleChange, "primary")]);
        assert_eq!(told.changes(&standby(), None, false), [(RoleChange, "replica")]);
        assert_eq!(told.changes(&standby(), None, true), [(RoleChange, "standby_leader")]);
    }

    #[test]
    fn a_restart_is_told_as_such_when_the_server_is_up_again() {
        let starting = Server::Starting { since: Moment::default() };
        let mut told = Told::default();
        told.changes(&standby(), None, false);
        let restart = Some(Job::Restart);
        assert_eq!(told.changes(&Server::Stopped, restart, false), []);
        told.restarted();
        assert_eq!(told.changes(&starting, None, false), []);
        assert_eq!(told.changes(&standby(), None, false), [(CallbackAction::Restart, "replica")]);
        assert_eq!(told.changes(&standby(), None, false), []);
    }
}

//! File descriptors: as many as the system gives, and never more clients than there are for.
//!
//! A client that has logged in must be able to get a server whoever else connects, and so must the proxy itself.

use std::io;

use kornak_cluster::discard;
use kornak_config::ProxySettings;
use kornak_config::proxy::PoolMode;
use rustix::io::Errno;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// Connections to the status page at once. Monitors keep a handful; more would be taken from clients'
/// file descriptors.
pub const MAX_STATUS_CONNECTIONS: usize = 64;

/// File descriptors for the proxy itself: its store, logs and listeners, questions and proofs, cancel
/// requests on their way, and the status port.
const OWN: u64 = 128 + MAX_STATUS_CONNECTIONS as u64;

/// Raises the soft limit of this process to the hard one. Answers how many there are.
pub fn raise() -> u64 {
    let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
    if current != maximum {
        // Without the right to it, it stays as it is.
        discard::only_helps(setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum }));
    }
    available()
}

fn available() -> u64 {
    getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX)
}

/// Lowers what would need more than there are. Answers what was lowered, for a warning.
pub fn fit(settings: &mut ProxySettings) -> Option<String> {
    fit_into(settings, available())
}

fn fit_into(settings: &mut ProxySettings, available: u64) -> Option<String> {
    let pool = &settings.pool;
    let pooled = settings.listeners.iter().filter(|it| it.pool_mode == PoolMode::Transaction);
    let lent: u64 = pooled.map(|it| it.max_servers.unwrap_or(pool.max_servers) as u64).sum::<u64>();
    let is_pooled = settings.listeners.iter().all(|it| it.pool_mode == PoolMode::Transaction);
    // Without a pool each client has a server connection of its own.
    let each = if is_pooled { 1 } else { 2 };
    let limits = &mut settings.limits;
    let own = OWN.min(available / 4);
    let lent = lent.min(available / 4);
    let strangers = |limit: usize| 2 * limit as u64;
    let wanted =
        |clients: usize, limit: usize| own + lent + strangers(limit) + each * clients as u64;
    let clients = limits.max_clients.saturating_add(limits.superuser_reserved_connections);
    if wanted(clients, limits.max_unauthenticated) <= available {
        return None;
    }
    let doors = limits.max_unauthenticated.min(usize::try_from(available / 16).unwrap_or(1)).max(8);
    limits.max_unauthenticated = doors;
    limits.max_unauthenticated_per_address = limits.max_unauthenticated_per_address.min(doors);
    let left = available.saturating_sub(own + lent + strangers(doors)) / each;
    let left = usize::try_from(left).unwrap_or(usize::MAX);
    let room = left.saturating_sub(limits.superuser_reserved_connections).max(1);
    limits.max_clients = limits.max_clients.min(room);
    Some(format!(
        "{available} file descriptors allow max_clients {} and max_unauthenticated {doors}; \
         LimitNOFILE or ulimit -n raises that",
        limits.max_clients
    ))
}

/// Whether an operation failed for want of something of this host, and not because of its peer.
pub fn are_missing(error: &io::Error) -> bool {
    let errno = error.raw_os_error().map(Errno::from_raw_os_error);
    matches!(errno, Some(Errno::MFILE | Errno::NFILE | Errno::NOBUFS | Errno::NOMEM))
}

#[cfg(test)]
mod tests {
    use kornak_cluster::Scope;
    use kornak_config::proxy::Source;

    use super::*;

    fn fitted(available: u64, pooled: bool) -> (ProxySettings, Option<String>) {
        let scope = Scope::new("/service", "demo", None);
        let mut settings = ProxySettings::new(scope, Source::Rest { members: Vec::new() });
        if pooled {
            settings.listeners.iter_mut().for_each(|it| it.pool_mode = PoolMode::Transaction);
        }
        let said = fit_into(&mut settings, available);
        (settings, said)
    }

    #[test]
    fn there_are_never_more_clients_than_descriptors() {
        for pooled in [false, true] {
            for available in [64, 100, 256, 1024, 4096, 9000, 65_536, u64::MAX] {
                let (settings, said) = fitted(available, pooled);
                let limits = &settings.limits;
                let each = if pooled { 1 } else { 2 };
                let clients = limits.max_clients + limits.superuser_reserved_connections;
                let used = each * clients as u64 + 2 * limits.max_unauthenticated as u64;
                let left = available.saturating_sub(used);
                assert!(left >= (available / 8).min(OWN), "{available}: {limits:?}");
                assert_eq!(said.is_none(), limits.max_clients == 5000, "{available}: {said:?}");
                assert!(limits.max_unauthenticated_per_address <= limits.max_unauthenticated);
            }
        }
        assert!(fitted(1024, false).0.limits.max_clients >= 300);
        assert!(fitted(256, false).0.limits.max_clients >= 50);
    }

    #[test]
    fn a_want_of_ours_is_not_a_fault_of_a_server() {
        for (errno, ours) in [
            (Errno::MFILE, true),
            (Errno::NFILE, true),
            (Errno::CONNREFUSED, false),
            (Errno::HOSTUNREACH, false),
        ] {
            assert_eq!(are_missing(&io::Error::from(errno)), ours, "{errno:?}");
        }
        assert!(!are_missing(&io::Error::other("x")));
    }
}

//! A login without the role's keys, at a server on this host: over its Unix socket, if its `pg_hba.conf`
//! takes that role there from whom we run as (`peer`, `trust`).
//!
//! For sessions that have proven themselves with a password that was set again since. PostgreSQL does
//! not end such a session, and the server, not we, says whether this way is open. Nothing is gained by
//! it beyond what the session had: the server logs in the role itself, never another one that may become it.

use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::net::backend::{self, Account, Address, Connected, DialError};
use crate::net::stream::Stream;
use crate::shared::Shared;

const WHERE: &str = "SELECT current_setting('unix_socket_directories'), current_setting('port')";

/// Asked of the server that we know: a socket may be somebody else's.
const WHOSE: &str = "SELECT FROM pg_stat_activity \
    WHERE pid = $1::int AND usename = $2 AND client_addr IS NULL AND client_port = -1";

/// Logs in at the server that listens at `address`, if it is on this host and its socket takes the role.
pub(super) async fn connect(
    shared: &Shared,
    address: &Address,
    account: Account<'_>,
    limit: Duration,
) -> Option<Connected> {
    let found = tokio::time::timeout(limit, look(shared, address, account, limit)).await;
    let connected = found.unwrap_or(Err(DialError::Timeout));
    if let Err(error) = &connected {
        let error = error as &dyn std::error::Error;
        tracing::debug!(server = %address.host, error, "server takes no login of the role over its socket");
    }
    connected.ok().flatten()
}

async fn look(
    shared: &Shared,
    address: &Address,
    account: Account<'_>,
    limit: Duration,
) -> Result<Option<Connected>, DialError> {
    if !shared.prober.can_ask() {
        return Ok(None);
    }
    let mut known = shared.prober.connect(address, limit).await?;
    if !is_here(&known.stream) {
        return Ok(None);
    }
    let rows = known.query(WHERE, &[]).await?;
    let text = |n: usize| std::str::from_utf8(rows.first()?.get(n)?.as_ref()?).ok();
    let (Some(directories), Some(port)) = (text(0), text(1)) else { return Ok(None) };
    for socket in sockets(directories, port) {
        let connected = match backend::connect_locally(&socket, account).await {
            Ok(connected) => connected,
            Err(error) => {
                let error = &error as &dyn std::error::Error;
                tracing::debug!(socket = %socket.display(), error, "socket takes no login");
                continue;
            }
        };
        let Some(key) = &connected.key else { continue };
        let pid = key.pid.to_string();
        let values = [Some(pid.as_bytes()), Some(account.user)];
        if !known.query(WHOSE, &values).await?.is_empty() {
            return Ok(Some(connected));
        }
    }
    Ok(None)
}

/// Whether both ends are on this host: its kernel gives both the same address.
fn is_here(stream: &Stream) -> bool {
    let tcp = stream.tcp();
    matches!((tcp.peer_addr(), tcp.local_addr()), (Ok(peer), Ok(own)) if peer.ip() == own.ip())
}

/// The sockets in `unix_socket_directories`. Sockets without a file (`@`) are nobody's by their
/// name.
fn sockets(directories: &str, port: &str) -> Vec<PathBuf> {
    let directories = directories.split(',').map(|it| it.trim().trim_matches('"'));
    let directories = directories.filter(|it| it.starts_with('/'));
    directories.map(|it| Path::new(it).join(format!(".s.PGSQL.{port}"))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sockets_are_where_the_server_says() {
        let all = sockets("/run/postgresql, \"/tmp/a b\",@abstract,relative", "5433");
        assert_eq!(
            all,
            ["/run/postgresql/.s.PGSQL.5433", "/tmp/a b/.s.PGSQL.5433"].map(PathBuf::from)
        );
        assert!(sockets("", "5432").is_empty());
    }
}

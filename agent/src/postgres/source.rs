//! Whether another member's server can be copied, asked before anything is removed for the copy.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use tracing::info;

use super::conf::{conninfo_words, join_conninfo};
use super::files::ConfigureError;
use super::os::as_user;
use super::sql::{self, SqlError, ask};
use super::tool::{self, ToolError};
use super::{Postgres, Upstream};

/// For the source to let us in and say who it is.
const LOGIN_LIMIT: Duration = Duration::from_secs(10);
/// For looking at every file there, and here; somebody waits for the answer.
const SIZES_LIMIT: Duration = Duration::from_secs(4);
/// A copy and the stream of the log beside it.
const SENDERS: i64 = 2;

/// Why a copy would fail.
#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    #[error("write the password file")]
    Configure(#[from] ConfigureError),
    #[error("log in to {host}:{port} for replication")]
    Login {
        host: String,
        port: u16,
        #[source]
        source: ToolError,
    },
    #[error("{host}:{port} did not say which system it is")]
    Answer { host: String, port: u16 },
    #[error(
        "{host}:{port} is a server of another cluster: its system identifier is {found}, expected {expected}"
    )]
    OtherCluster { host: String, port: u16, found: String, expected: String },
    #[error("{host}:{port} has {free} free of max_wal_senders, and a copy needs {SENDERS}")]
    NoSender { host: String, port: u16, free: i64 },
    #[error(
        "{path} has room for {free} bytes, with what is there now, and the copy needs {needed}"
    )]
    NoSpace { path: PathBuf, free: u64, needed: u64 },
    #[error("see how much room there is in {path}")]
    Space {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
}

/// The size of a copy.
#[derive(Debug, Default)]
struct Sizes {
    free_senders: Option<i64>,
    /// By the place where it will lie.
    bytes: Vec<(PathBuf, u64)>,
}

impl Postgres {
    /// Logs in as a copy does, and compares what can be compared: who the source is (`expected`: the cluster's
    /// identifier), and, where the source tells, whether it has a walsender and we have the room.
    pub async fn prove_source(
        &self,
        source: &Upstream,
        expected: Option<&str>,
        by_backup: bool,
    ) -> Result<(), SourceError> {
        if !by_backup {
            // A command of the operator's gets its files elsewhere.
            return Ok(());
        }
        let (host, port) = (source.host.clone(), source.port);
        let found = self.identify(source).await?;
        if let (Some(found), Some(expected)) = (&found, expected)
            && found != expected
        {
            let (found, expected) = (found.clone(), expected.to_owned());
            return Err(SourceError::OtherCluster { host, port, found, expected });
        }
        // A role for pg_rewind alone may not be told all of it.
        let Ok(Ok(sizes)) = tokio::time::timeout(SIZES_LIMIT, self.sizes(source)).await else {
            return Ok(());
        };
        if let Some(free) = sizes.free_senders.filter(|free| *free < SENDERS) {
            return Err(SourceError::NoSender { host, port, free });
        }
        if let Ok(compared) =
            tokio::time::timeout(SIZES_LIMIT, self.compare_space(sizes.bytes)).await
        {
            compared?;
        }
        info!(host, port, "leader's server can be copied");
        Ok(())
    }

    /// `IDENTIFY_SYSTEM`, through the door that a copy takes; `None` where there is no psql.
    async fn identify(&self, source: &Upstream) -> Result<Option<String>, SourceError> {
        let passfile = self.inner.write_passfile()?;
        let (host, port) = (source.host.clone(), source.port);
        let replication = &self.settings().replication;
        let mut words = conninfo_words(replication, &passfile, &host, port);
        words.push(("replication", "true".to_owned()));
        words.push(("application_name", format!("{} clone", sql::APPLICATION_PREFIX)));
        words.push(("connect_timeout", "5".to_owned()));
        let mut command = self.tool("psql");
        command.args(["--no-psqlrc", "--no-password", "-At", "-F", " ", "-c", "IDENTIFY_SYSTEM"]);
        command.arg("-d").arg(join_conninfo(&words));
        match tool::run(&mut command, LOGIN_LIMIT).await {
            Ok(text) => {
                let found = text.split_whitespace().next().map(str::to_owned);
                found.map(Some).ok_or(SourceError::Answer { host, port })
            }
            Err(ToolError::Spawn { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
                Ok(None)
            }
            Err(source) => Err(SourceError::Login { host, port, source }),
        }
    }

    async fn sizes(&self, source: &Upstream) -> Result<Sizes, SqlError> {
        let (settings, port) = (self.settings(), source.port);
        let role = &settings.superuser;
        let login = sql::remote_login(&source.host, port, &settings.database, role, "copy");
        let client = login.patiently().connect().await?;
        let statement = "SELECT current_setting('max_wal_senders')::int - \
                         (SELECT count(*) FROM pg_stat_replication)";
        let rows = ask(&client, "count its walsenders", statement).await?;
        let first = rows.into_iter().next().and_then(|row| row.into_iter().next().flatten());
        let statement = "SELECT pg_tablespace_location(oid), pg_tablespace_size(oid) \
                         FROM pg_tablespace";
        let rows = ask(&client, "measure its tablespaces", statement).await?;
        let configured = &settings.create_replica_methods;
        let options = configured.iter().find_map(|method| match method {
            kornak_config::agent::ReplicaMethod::Basebackup { options } => Some(options.as_slice()),
            kornak_config::agent::ReplicaMethod::Custom { .. } => None,
        });
        let places = self.tablespaces(source, options.unwrap_or_default()).await;
        let mut bytes = Vec::new();
        for row in rows {
            let [location, size] = row.as_slice() else { continue };
            let location = PathBuf::from(location.clone().unwrap_or_default());
            let place = places.iter().find(|(from, _)| *from == location).map(|(_, to)| to.clone());
            let size = size.as_deref().and_then(|size| size.parse().ok());
            bytes.extend(
                size.map(|size| (place.unwrap_or_else(|| self.data_dir().to_owned()), size)),
            );
        }
        Ok(Sizes { free_senders: first.and_then(|text| text.parse().ok()), bytes })
    }

    async fn compare_space(&self, bytes: Vec<(PathBuf, u64)>) -> Result<(), SourceError> {
        let inner = std::sync::Arc::clone(&self.inner);
        let measured = tokio::task::spawn_blocking(move || {
            as_user(inner.user.as_ref(), || room(&inner.settings.data_dir, &bytes))
        });
        let failed = |source| SourceError::Space { path: self.data_dir().to_owned(), source };
        let rooms = measured.await.map_err(io::Error::other).and_then(|rooms| rooms);
        match rooms.map_err(failed)?.into_iter().find(|room| room.free < room.needed) {
            Some(Room { path, free, needed }) => Err(SourceError::NoSpace { path, free, needed }),
            None => Ok(()),
        }
    }
}

struct Room {
    path: PathBuf,
    free: u64,
    needed: u64,
}

/// For each file system that the copy will lie on: what it needs, and what is free once the old data are gone.
fn room(data_dir: &Path, bytes: &[(PathBuf, u64)]) -> io::Result<Vec<Room>> {
    let mut rooms: BTreeMap<u64, Room> = BTreeMap::new();
    let mut measured: Vec<PathBuf> = Vec::new();
    for (path, needed) in bytes {
        let Some(there) = path.ancestors().find(|path| path.exists()) else { continue };
        let device = fs::metadata(there)?.dev();
        let room = match rooms.entry(device) {
            std::collections::btree_map::Entry::Occupied(room) => room.into_mut(),
            std::collections::btree_map::Entry::Vacant(new) => {
                let found = rustix::fs::statvfs(there)?;
                let free = found.f_bavail.saturating_mul(found.f_frsize);
                new.insert(Room { path: path.clone(), free, needed: 0 })
            }
        };
        room.needed = room.needed.saturating_add(*needed);
        if there == path && !measured.contains(path) {
            room.free = room.free.saturating_add(used(path, device));
            measured.push(path.clone());
        }
    }
    if rooms.is_empty() {
        return Err(io::Error::new(io::ErrorKind::NotFound, data_dir.display().to_string()));
    }
    Ok(rooms.into_values().collect())
}

/// Bytes below a directory on its own file system; what goes away meanwhile counts as nothing.
fn used(dir: &Path, device: u64) -> u64 {
    let mut sum = 0_u64;
    let mut todo = vec![dir.to_owned()];
    while let Some(dir) = todo.pop() {
        for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
            let Ok(found) = entry.metadata() else { continue };
            if found.is_dir() && found.dev() == device {
                todo.push(entry.path());
            } else if found.is_file() {
                sum = sum.saturating_add(found.blocks().saturating_mul(512));
            }
        }
    }
    sum
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_replaced_counts_as_room() {
        let dir = tempfile::tempdir().expect("a directory");
        let data = dir.path().join("data");
        fs::create_dir(&data).unwrap();
        let free = |needed: u64| room(&data, &[(data.clone(), needed)]).unwrap().remove(0);
        let before = free(1);
        fs::write(data.join("x"), vec![1; 1 << 20]).unwrap();
        let device = fs::metadata(&data).unwrap().dev();
        assert!(used(&data, device) >= 1 << 20);
        assert!(free(u64::MAX).free < u64::MAX, "{}", before.free);
        let missing = dir.path().join("not/yet/there");
        assert_eq!(room(&data, &[(missing, 5)]).unwrap().remove(0).needed, 5);
    }
}

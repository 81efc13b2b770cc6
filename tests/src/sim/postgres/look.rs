//! What a server shows: to its agent, and to commits that wait.

use std::collections::BTreeMap;
use std::rc::Rc;
use std::time::Duration;

use kornak_agent::ha::{Control, DataDir, PrimaryFacts, Server, SlotUse, StandbyFacts, StandbyRow};
use kornak_cluster::{Lsn, Timeline};

use super::{Run, Sender, drop_silent_senders};
use crate::sim::host;
use crate::sim::scenario::Mutation;
use crate::sim::world::{SYSID, World};

/// `synchronous_standby_names`, as far as Kornak writes them.
pub(super) enum Names {
    Nobody,
    Anybody,
    /// So many of these.
    Of(usize, Vec<String>),
}

impl Names {
    pub(super) fn parse(text: &str) -> Self {
        match text {
            "" => Self::Nobody,
            "*" | "ANY 1 (*)" => Self::Anybody,
            text => {
                let number = text.trim_start_matches("ANY ").split(' ').next();
                let waits = number.and_then(|number| number.parse().ok()).unwrap_or(0);
                let names = text.split('"').skip(1).step_by(2).map(str::to_owned).collect();
                Self::Of(waits, names)
            }
        }
    }

    pub(super) fn satisfied(
        &self,
        w: &World,
        senders: &BTreeMap<usize, Sender>,
        needs: usize,
    ) -> bool {
        let has = |index: usize| senders.get(&index).is_some_and(|sender| sender.flushed >= needs);
        match self {
            Self::Nobody => true,
            Self::Anybody => senders.keys().any(|index| has(*index)),
            Self::Of(waits, names) => {
                let confirm = |name: &&String| host::index_of(w, name).is_some_and(has);
                names.iter().filter(confirm).count() >= *waits
            }
        }
    }

    pub(super) fn names(&self, name: &str) -> bool {
        match self {
            Self::Nobody => false,
            Self::Anybody => true,
            Self::Of(_, names) => names.iter().any(|known| known == name),
        }
    }
}

/// What an agent sees when it looks at its server.
pub fn look(w: &Rc<World>, index: usize, names_since: Lsn) -> Server {
    drop_silent_senders(w, index);
    let host = &w.hosts[index];
    let server = host.server.borrow();
    let disk = host.disk.borrow();
    match server.run {
        Run::Down => Server::Stopped,
        Run::Leftovers if w.plan.mutation == Some(Mutation::PostmasterGoneMeansStopped) => {
            Server::Stopped
        }
        Run::Leftovers => Server::Leftovers,
        Run::Starting => Server::Starting { since: server.since },
        Run::Stopping => Server::Silent { since: server.since },
        Run::Standby | Run::Promoting => {
            let reading = server.reading.filter(|(_, until)| host.now(w) < *until);
            let end = reading.map_or(disk.wal.end(), |(shown, _)| crate::sim::disk::lsn(shown));
            let counts = w.plan.mutation == Some(Mutation::RestartedCounts);
            Server::Standby(StandbyFacts {
                timeline: Timeline(disk.wal.timeline()),
                received: end,
                replayed: end,
                wal_known: reading.is_none() || counts,
                streaming: server.stream.is_some(),
                upstream: disk.upstream.map(|upstream| (w.hosts[upstream].name.clone(), 5432)),
                not_streaming_since: server.broken_since,
            })
        }
        Run::Primary => {
            let names = Names::parse(&disk.sync_names);
            let rows = server.senders.iter().map(|(standby, sender)| {
                let application_name = w.hosts[*standby].name.clone();
                let synchronous = names.names(&application_name);
                let flush = crate::sim::disk::lsn(sender.flushed);
                let owes = flush < disk.wal.end();
                let silent = if owes { host.now(w).since(sender.heard) } else { Duration::ZERO };
                StandbyRow {
                    application_name,
                    streaming: true,
                    synchronous,
                    flush,
                    acknowledged: flush,
                    slot: SlotUse::Held,
                    silent,
                }
            });
            Server::Primary(PrimaryFacts {
                timeline: Timeline(disk.wal.timeline()),
                lsn: disk.wal.end(),
                standbys: rows.collect(),
                sync_names: disk.sync_names.clone(),
                sync_names_since: Some(names_since),
            })
        }
    }
}

/// What an agent sees in the data directory.
pub fn control(w: &World, index: usize) -> DataDir {
    let disk = w.hosts[index].disk.borrow();
    DataDir::Initialized(Control {
        system_identifier: SYSID.to_owned(),
        timeline: Timeline(disk.wal.timeline()),
        clean: disk.clean,
        was_primary: disk.was_primary,
        // The model's control file is never a copy of another server's.
        standby_signal: !disk.was_primary,
    })
}

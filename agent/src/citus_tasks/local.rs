//! The chores of each group's leader on its own server: the database and the extension, the
//! login to other nodes, and distributed transactions that a failover has left prepared.
//!
//! Every node has these tables of its own, and every node may be where a distributed transaction
//! began, so every leader looks after them; the coordinator's `pg_dist_node` is [`super::keeper`]'s, pools
//! are [`super::pools`]'s.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use kornak_cluster::GroupId;
use tokio_postgres::Client;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use super::database::{self, APPLICATION};
use crate::citus::desk::Desk;
use crate::citus::plan::Address;
use crate::citus::seen::Seen;
use crate::citus::settling::{EVERY, Primaries, STALE, Settling};
use crate::context::Context;
use crate::guard::boottime_now;
use crate::postgres::{SqlError, ask};

/// Works while this node leads its group, until `stop`.
pub(super) async fn run(
    ctx: Arc<Context>,
    desk: Arc<Desk>,
    databases: Vec<String>,
    stop: CancellationToken,
) {
    let mut local = Local { ctx, desk, databases, settling: Settling::default(), complained: None };
    let mut standings = local.desk.standings.subscribe();
    let mut view = local.ctx.view.clone();
    let mut observed = local.ctx.observation.clone();
    loop {
        let seen = Seen::read(&local.ctx.settings.scope.whole(), &view.borrow_and_update().clone());
        observed.borrow_and_update();
        standings.borrow_and_update();
        local.desk.knows(&seen.hosts);
        let was_primary = local.leads();
        let pause = if was_primary { local.round(&seen).await } else { local.rest() };
        let changed = async {
            loop {
                tokio::select! {
                    _ = view.changed() => {}
                    _ = observed.changed() => {}
                    // The coordinator's `pg_dist_node` may name another primary now.
                    _ = standings.changed() => return,
                }
                let now = Seen::read(&local.ctx.settings.scope.whole(), &view.borrow().clone());
                local.desk.knows(&now.hosts);
                if local.leads() != was_primary || followed(&now) != followed(&seen) {
                    return;
                }
            }
        };
        tokio::select! {
            () = stop.cancelled() => return,
            () = changed => {}
            () = tokio::time::sleep(pause) => {}
        }
    }
}

/// The facts of which a change starts the next round at once.
fn followed(seen: &Seen) -> impl PartialEq + '_ {
    let leaders: Vec<_> = seen.leaders.iter().map(|(group, it)| (group, &it.address)).collect();
    (primaries(seen), leaders, seen.handover.is_some())
}

fn primaries(seen: &Seen) -> Primaries {
    seen.wanted.iter().map(|(group, want)| (*group, want.primary.clone())).collect()
}

struct Local {
    ctx: Arc<Context>,
    desk: Arc<Desk>,
    databases: Vec<String>,
    settling: Settling,
    complained: Option<String>,
}

impl Local {
    fn leads(&self) -> bool {
        self.ctx.leads_primary()
    }

    /// A standby's prepared transactions are its primary's affair.
    fn rest(&mut self) -> Duration {
        self.settling = Settling::default();
        self.desk.oldest_prepared.send_replace(0.0);
        EVERY
    }

    async fn round(&mut self, seen: &Seen) -> Duration {
        let switches = seen.handover.is_some();
        let recover = self.settling.look(&primaries(seen), switches, boottime_now());
        let mut settled = true;
        for database in self.databases.clone() {
            match self.keep(&database, seen, recover).await {
                Ok(true) => {}
                Ok(false) => settled = false,
                Err(error) => {
                    settled = false;
                    self.complain(&database, &error);
                }
            }
        }
        self.look_at_prepared().await;
        if settled {
            self.complained = None;
        }
        self.settling.tried(recover, settled, boottime_now())
    }

    /// `false`: something is left to be done soon.
    async fn keep(&self, name: &str, seen: &Seen, recover: bool) -> Result<bool, SqlError> {
        let postgres = &self.ctx.postgres;
        if !recover {
            database::look_after(postgres, name).await?;
            return Ok(true);
        }
        database::ensure(postgres, name).await?;
        let client = postgres.connect_to_database(name, APPLICATION).await?;
        match registered(&client, seen).await? {
            Registered::Right => {}
            // Citus would ask a server that is gone, or one that stands still and never answers.
            Registered::Differs => return Ok(false),
            Registered::Leaderless => return Ok(true),
        }
        let statement = "SELECT recover_prepared_transactions()";
        let rows = ask(&client, "recover prepared transactions", statement).await?;
        let count = rows.first().and_then(|row| row.first().cloned().flatten());
        let count: u64 = count.and_then(|count| count.parse().ok()).unwrap_or_default();
        if count > 0 {
            info!(database = name, count, "prepared transactions recovered");
        }
        let left = "SELECT count(*) FROM pg_prepared_xacts \
                    WHERE database = current_database() AND gid LIKE 'citus_%'";
        let rows = ask(&client, "count prepared transactions", left).await?;
        let left = rows.first().and_then(|row| row.first().cloned().flatten());
        // They may be under way, or begun by a node that has not come to it yet.
        Ok(left.as_deref() == Some("0") && self.left_elsewhere(&client).await? == 0)
    }

    /// Transactions that began here and are still prepared somewhere: Citus leaves those alone whose
    /// session has not ended, which may have to wait until a server that stands still is gone.
    async fn left_elsewhere(&self, client: &Client) -> Result<u64, SqlError> {
        let known = "SELECT to_regproc('pg_catalog.run_command_on_all_nodes')";
        let known = ask(client, "look for a function of Citus", known).await?;
        if !known.iter().flatten().any(Option::is_some) {
            return Ok(0);
        }
        let group = self.ctx.settings.scope.group.unwrap_or(GroupId::COORDINATOR);
        let statement = format!(
            "SELECT coalesce(sum(result::bigint), 0) FROM run_command_on_all_nodes($$\
               SELECT count(*) FROM pg_prepared_xacts WHERE database = current_database() \
               AND starts_with(gid, 'citus_{group}_') \
               AND prepared < clock_timestamp() - interval '{} s'$$) WHERE success",
            STALE.as_secs()
        );
        let rows = ask(client, "count prepared transactions elsewhere", &statement).await?;
        let count = rows.first().and_then(|row| row.first().cloned().flatten());
        Ok(count.and_then(|count| count.parse().ok()).unwrap_or_default())
    }

    async fn look_at_prepared(&self) {
        let statement = "SELECT coalesce(extract(epoch FROM \
            max(clock_timestamp() - prepared)), 0)::float8 FROM pg_prepared_xacts";
        let oldest = self.ctx.postgres.sql().value("tell its oldest prepared", statement).await;
        let oldest = oldest.ok().flatten().and_then(|age| age.parse::<f64>().ok());
        if let Some(oldest) = oldest {
            self.desk.oldest_prepared.send_replace(oldest.max(0.0));
        }
    }

    fn complain(&mut self, database: &str, error: &SqlError) {
        let text = error.to_string();
        if self.complained.as_ref() != Some(&text) {
            let error: &dyn std::error::Error = error;
            warn!(database, error, "Citus' tables on this server could not be updated");
            self.complained = Some(text);
        }
    }
}

/// Whether this server's `pg_dist_node` has the leaders that there are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Registered {
    Right,
    /// The value differs and will be written.
    Differs,
    /// A group has none now; there will be another look when it has.
    Leaderless,
}

async fn registered(client: &Client, seen: &Seen) -> Result<Registered, SqlError> {
    let statement = "SELECT groupid, nodename, nodeport FROM pg_catalog.pg_dist_node \
        WHERE noderole = 'primary' AND nodecluster = 'default'";
    let rows = ask(client, "tell who is registered", statement).await?;
    Ok(compare(&rows, &primaries(seen)))
}

fn compare(
    rows: &[crate::postgres::TextRow],
    leaders: &BTreeMap<GroupId, Option<Address>>,
) -> Registered {
    let text = |row: &crate::postgres::TextRow, n: usize| row.get(n).cloned().flatten();
    let mut found = Registered::Right;
    for row in rows {
        let group = text(row, 0).and_then(|group| group.parse().ok()).map(GroupId);
        let at = text(row, 1).zip(text(row, 2).and_then(|port| port.parse().ok()));
        match group.and_then(|group| leaders.get(&group)) {
            Some(None) => return Registered::Leaderless,
            Some(Some(leader)) if at.as_ref() != Some(&(leader.host.clone(), leader.port)) => {
                found = Registered::Differs;
            }
            // A group that is gone is about to be removed.
            Some(Some(_)) | None => {}
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nobody_is_asked_for_prepared_transactions_before_the_rows_name_the_leaders() {
        let row = |group: &str, host: &str, port: &str| -> crate::postgres::TextRow {
            [group, host, port].into_iter().map(|it| Some(it.to_owned())).collect()
        };
        let at = |host: &str| Some(Address { host: host.to_owned(), port: 5432 });
        let rows = [row("0", "c", "5432"), row("1", "a", "5432"), row("7", "gone", "5432")];
        let leaders = |worker| BTreeMap::from([(GroupId(0), at("c")), (GroupId(1), worker)]);
        assert_eq!(compare(&rows, &leaders(at("a"))), Registered::Right);
        assert_eq!(compare(&rows, &leaders(at("b"))), Registered::Differs);
        assert_eq!(compare(&rows, &leaders(None)), Registered::Leaderless);
        let moved = Some(Address { host: "a".to_owned(), port: 6432 });
        assert_eq!(compare(&rows, &leaders(moved)), Registered::Differs);
    }
}

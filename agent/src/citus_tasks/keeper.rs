//! The hands of [`crate::citus::flight`]: one task for each database of the coordinator, with a connection that
//! holds the open transaction.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use kornak_cluster::{GroupId, Moment, Revision, Scope, discard};
use tokio::sync::oneshot;
use tokio_postgres::Client;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use super::database::APPLICATION;
use crate::citus::desk::{Desk, Standing};
use crate::citus::flight::{Answer, Facts, Flight, Next, Request, next};
use crate::citus::plan::{self, Address, Role, Row, Step};
use crate::citus::seen::Seen;
use crate::context::Context;
use crate::guard::boottime_now;
use crate::postgres::{SqlError, ask, literal};

/// Pauses after failures: doubled up to the longest.
const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(2);

/// A row that Citus would not add or remove is left alone: doubled up to the longest, for it may be a
/// matter of a moment, or of a person.
const FIRST_REFUSAL: Duration = Duration::from_secs(1);
const LONGEST_REFUSAL: Duration = Duration::from_secs(30);

/// Shortest wait for a lock: PostgreSQL takes 0 for no limit.
const SHORTEST_LOCK_WAIT: Duration = Duration::from_millis(10);

const ROWS: &str = "SELECT nodeid, groupid, nodename, nodeport, noderole, \
    (noderole <> 'primary' OR NOT hasmetadata OR metadatasynced)::int \
    FROM pg_catalog.pg_dist_node WHERE nodecluster = 'default' ORDER BY nodeid";

/// One database's keeper.
pub(super) struct Keeper {
    ctx: Arc<Context>,
    desk: Arc<Desk>,
    scope: Scope,
    database: String,
    client: Option<Client>,
    rows: Option<Vec<Row>>,
    read_at: Moment,
    behind_since: Option<Moment>,
    flight: Flight,
    requests: Vec<Request>,
    answers: Vec<oneshot::Sender<Answer>>,
    refused: BTreeMap<Address, Refused>,
    /// The sessions that hold the locks on a group's shards did not end although they were told to.
    locked_out: bool,
    not_before: Moment,
    pause: Duration,
    trouble: Option<Trouble>,
}

/// A row that Citus would not add or remove.
#[derive(Debug)]
struct Refused {
    why: String,
    until: Moment,
    pause: Duration,
}

/// Why nothing goes on.
#[derive(Debug)]
struct Trouble {
    why: String,
    /// The rows could be read, and not be changed.
    changing: bool,
}

impl Keeper {
    pub(super) fn new(ctx: &Arc<Context>, desk: &Arc<Desk>, database: &str) -> Self {
        Self {
            ctx: Arc::clone(ctx),
            desk: Arc::clone(desk),
            scope: ctx.settings.scope.whole(),
            database: database.to_owned(),
            client: None,
            rows: None,
            read_at: Moment::default(),
            behind_since: None,
            flight: Flight::Grounded,
            requests: Vec::new(),
            answers: Vec::new(),
            refused: BTreeMap::new(),
            locked_out: false,
            not_before: Moment::default(),
            pause: FIRST_PAUSE,
            trouble: None,
        }
    }

    /// Works until `stop`.
    pub(super) async fn run(mut self, stop: CancellationToken) {
        let mut view = self.ctx.view.clone();
        let mut observed = self.ctx.observation.clone();
        let mut held = self.ctx.keeper.subscribe();
        loop {
            for (request, answer) in self.desk.take(&self.database) {
                self.requests.push(request);
                self.answers.push(answer);
            }
            let mut seen = Seen::read(&self.scope, &view.borrow_and_update().clone());
            observed.borrow_and_update();
            held.borrow_and_update();
            let now = boottime_now();
            let left_alone = |it: &(&Address, &Refused)| it.1.until > now;
            let hopeless: BTreeSet<Address> =
                self.refused.iter().filter(left_alone).map(|it| it.0.clone()).collect();
            let leads = self.leads();
            if leads {
                // The store hears of our own promotion later than we do.
                let own = super::notify::own_address(&self.ctx);
                seen.wanted.entry(GroupId::COORDINATOR).or_default().primary = Some(own);
            }
            self.show(leads, &seen);
            let next = next(&Facts {
                now,
                leads,
                rows: self.rows.as_deref(),
                read_at: self.read_at,
                behind_since: self.behind_since,
                seen: &seen,
                flight: &self.flight,
                requests: &self.requests,
                hopeless: &hopeless,
                not_before: self.not_before,
            });
            let until = match next {
                Next::Rest { until } => {
                    self.rested(now);
                    self.warm(leads, &seen).await;
                    self.refused.values().map(|it| it.until).fold(until, Moment::min)
                }
                next => {
                    self.carry_out(next, &seen).await;
                    continue;
                }
            };
            tokio::select! {
                () = stop.cancelled() => return self.stand_down(),
                () = self.desk.arrived(&self.database) => {}
                _ = view.changed() => {}
                _ = observed.changed() => {}
                _ = held.changed() => {}
                () = tokio::time::sleep(until.since(boottime_now())) => {}
            }
        }
    }

    fn leads(&self) -> bool {
        self.ctx.settings.scope.group == Some(GroupId::COORDINATOR) && self.ctx.leads_primary()
    }

    /// Nothing is left to be done now: what was refused and is not wanted any more is forgotten.
    fn rested(&mut self, now: Moment) {
        self.refused.retain(|_, it| it.until > now);
        if self.rows.is_some() && now >= self.not_before {
            self.trouble = None;
            self.pause = FIRST_PAUSE;
        }
    }

    /// The candidate of a switchover has its connection open before it leads: it lives through the
    /// promotion, and clients wait for what it is needed for.
    async fn warm(&mut self, leads: bool, seen: &Seen) {
        let record = seen.handover.as_ref();
        let succeeds = record.is_some_and(|it| {
            it.group == Some(GroupId::COORDINATOR)
                && it.candidate.as_deref() == Some(&self.ctx.name)
        });
        match (leads, succeeds) {
            (false, true) if self.client.as_ref().is_none_or(Client::is_closed) => {
                let postgres = &self.ctx.postgres;
                self.client = postgres.connect_to_database(&self.database, APPLICATION).await.ok();
            }
            (false, false) => self.client = None,
            _ => {}
        }
    }

    fn show(&self, leads: bool, seen: &Seen) {
        let standing = match &self.rows {
            _ if !leads => None,
            // In the middle of a switchover the rows are as they have to be.
            Some(_) if self.flight != Flight::Grounded => return,
            Some(rows) => Some(Standing {
                differences: plan::differences(rows, &seen.wanted),
                trouble: self.why(),
                synced: rows.iter().all(|row| row.synced),
                behind: primaries(rows).filter(|row| !row.synced).map(|row| row.group).collect(),
                primaries: primaries(rows)
                    .map(|row| (row.group, row.address.to_string()))
                    .collect(),
                secondaries: secondaries(rows),
            }),
            None if self.trouble.is_some() => {
                Some(Standing { trouble: self.why(), ..Standing::default() })
            }
            None => return,
        };
        self.desk.stands(&self.database, standing);
    }

    fn why(&self) -> Option<String> {
        let refused = self.refused.values().map(|it| &it.why);
        self.trouble.iter().map(|it| &it.why).chain(refused).next().cloned()
    }

    async fn carry_out(&mut self, next: Next, seen: &Seen) {
        let request = match &next {
            Next::Open { request, .. } => Some(*request),
            Next::Commit { request, .. } => *request,
            _ => None,
        };
        let member = match &next {
            Next::Member(Step::Add { address, .. } | Step::Remove { address, .. }) => {
                Some(address.clone())
            }
            _ => None,
        };
        let looks = matches!(next, Next::Load);
        let commits = matches!(next, Next::Commit { .. });
        match self.try_to(next, seen).await {
            // What could not be changed is not mended by a look at it.
            Ok(()) if looks && self.trouble.as_ref().is_some_and(|it| it.changing) => {}
            Ok(()) => {
                self.trouble = None;
                self.pause = FIRST_PAUSE;
                if let Some(address) = member {
                    self.refused.remove(&address);
                }
            }
            Err(error) => {
                let late = error.code() == Some("55P03");
                match member.filter(|_| error.code().is_some()) {
                    Some(address) => self.is_refused(address, &error),
                    None if late => self.locked_out = commits,
                    None => self.failed(&error, !looks),
                }
                self.stand_down();
                if let Some(request) = request {
                    self.answer(request, if late { Answer::Late } else { Answer::Failed });
                }
            }
        }
    }

    async fn try_to(&mut self, next: Next, seen: &Seen) -> Result<(), SqlError> {
        match next {
            Next::Rest { .. } => {}
            Next::Load => self.load().await?,
            Next::StandDown => self.stand_down(),
            Next::Answer { request, answer } => self.answer(request, answer),
            Next::Open { request, step, former } => self.open(request, &step, former).await?,
            Next::Commit { steps, request } => self.commit(&steps, request, seen).await?,
            Next::Member(step) => {
                info!(database = %self.database, change = %Spoken(&step), "pg_dist_node updated");
                let change = statement(&step, false, Duration::ZERO);
                match self.say(&change).await {
                    // A person may have taken the row away here alone, and others still have it.
                    Err(error) if self.may_be_elsewhere(&step, &error) => {
                        self.say("SELECT start_metadata_sync_to_all_nodes()").await?;
                        self.say(&change).await?;
                    }
                    done => drop(done?),
                }
                self.rows = None;
            }
            Next::Rollback => {
                warn!(
                    database = %self.database,
                    "announced switchover was not completed in time, its pg_dist_node transaction is rolled back"
                );
                self.say("ROLLBACK").await?;
                self.flight = Flight::Grounded;
                self.rows = None;
            }
        }
        Ok(())
    }

    async fn load(&mut self) -> Result<(), SqlError> {
        let rows = self.say(ROWS).await?;
        let rows: Vec<Row> = rows.iter().filter_map(|row| read_row(row)).collect();
        self.read_at = boottime_now();
        let is_behind = rows.iter().any(|row| !row.synced);
        self.behind_since = is_behind.then(|| self.behind_since.unwrap_or(self.read_at));
        self.rows = Some(rows);
        Ok(())
    }

    /// Renames the primary's row and keeps the transaction.
    async fn open(&mut self, request: usize, step: &Step, former: Address) -> Result<(), SqlError> {
        let Some(asked) = self.requests.get(request).cloned() else { return Ok(()) };
        self.say("BEGIN").await?;
        let now = boottime_now();
        let left = (asked.received + asked.hold.unwrap_or(asked.timeout)).since(now);
        self.wait_for_locks(left).await?;
        self.say(&statement(step, asked.hold.is_none(), asked.cooldown)).await?;
        info!(
            database = %self.database,
            group = asked.group.0,
            leader = %asked.leader,
            elapsed_ms = boottime_now().since(asked.received).as_millis() as u64,
            "writes to the group blocked until its next primary serves"
        );
        if let (Step::Update { node, to }, Some(rows)) = (step, self.rows.as_mut())
            && let Some(row) = rows.iter_mut().find(|row| row.node == *node)
        {
            row.address = to.clone();
        }
        let until = now + asked.timeout;
        let record = match asked.hold {
            Some(_) => asked.record.max(Revision(1)),
            None => Revision::NONE,
        };
        self.flight = Flight::Open { group: asked.group, former, until, record };
        self.answer(request, Answer::Done);
        Ok(())
    }

    async fn commit(
        &mut self,
        steps: &[Step],
        request: Option<usize>,
        seen: &Seen,
    ) -> Result<(), SqlError> {
        let began = boottime_now();
        let past_locks = std::mem::take(&mut self.locked_out);
        if self.flight == Flight::Grounded {
            self.say("BEGIN").await?;
            self.wait_for_locks(LOCKS_WITHIN).await?;
        }
        if past_locks {
            warn!(
                database = %self.database,
                "pg_dist_node is changed without the locks of backends that wait for a silent server"
            );
        }
        for step in steps {
            let statement = match step {
                Step::Update { node, to } if past_locks && self.is_primary(*node) => {
                    directly(*node, to)
                }
                _ => statement(step, true, FORCE_AFTER),
            };
            self.say(&statement).await?;
        }
        if past_locks {
            self.say(UNSYNCED).await?;
        }
        // Nobody may reach a new address through the former one's pool.
        if let Some(pools) = super::pools::statement(seen) {
            self.say(&pools).await?;
        }
        // From here on its outcome may be unknown: the rows are read again whatever happens.
        let before = self.rows.take().unwrap_or_default();
        self.say("COMMIT").await?;
        self.flight = Flight::Grounded;
        let changes: Vec<String> = steps.iter().map(|step| Spoken(step).to_string()).collect();
        info!(
            database = %self.database,
            changes = %changes.join(", "),
            elapsed_ms = boottime_now().since(began).as_millis() as u64,
            "pg_dist_node updated"
        );
        if let Some(request) = request {
            self.answer(request, Answer::Done);
        }
        if past_locks {
            self.tell_workers(steps, &before, seen).await?;
        }
        Ok(())
    }

    /// Makes the same changes on the workers that had the metadata before.
    async fn tell_workers(
        &mut self,
        steps: &[Step],
        before: &[Row],
        seen: &Seen,
    ) -> Result<(), SqlError> {
        let changes = steps.iter().filter_map(|step| match step {
            Step::Update { node, to } => Some(directly(*node, to)),
            _ => None,
        });
        let changes: Vec<String> = changes.collect();
        let limit = LOCKS_WITHIN.as_millis();
        let statement =
            format!("BEGIN; SET LOCAL lock_timeout = {limit}; {}; COMMIT", changes.join("; "));
        let workers = primaries(before).filter(|row| row.synced && row.group.0 > 0);
        let workers = workers
            .filter_map(|row| Some((row.group, seen.wanted.get(&row.group)?.primary.clone()?)));
        let (postgres, database) = (&self.ctx.postgres, &self.database);
        let telling = workers.map(|(group, at)| {
            let statement = &statement;
            let told = async move {
                let client = postgres.connect_to(&at.host, at.port, database, APPLICATION).await?;
                ask(&client, "change pg_dist_node", statement).await
            };
            async move { (group, tokio::time::timeout(TELL_WITHIN, told).await) }
        });
        for (group, told) in futures_util::future::join_all(telling).await {
            match told {
                Ok(Ok(_)) => {
                    let synced = format!(
                        "UPDATE pg_catalog.pg_dist_node SET metadatasynced = true \
                         WHERE groupid = {group} AND hasmetadata AND noderole = 'primary'"
                    );
                    self.say(&synced).await?;
                }
                Ok(Err(error)) => {
                    warn!(database = %self.database, group = group.0, error = %kornak_cluster::error_chain(&error), "worker could not be told of the change");
                }
                Err(_) => {
                    warn!(database = %self.database, group = group.0, "worker does not answer");
                }
            }
        }
        Ok(())
    }

    async fn wait_for_locks(&mut self, limit: Duration) -> Result<(), SqlError> {
        let limit = limit.max(SHORTEST_LOCK_WAIT).as_millis();
        self.say(&format!("SET LOCAL lock_timeout = {limit}")).await.map(drop)
    }

    fn may_be_elsewhere(&self, step: &Step, error: &SqlError) -> bool {
        let Step::Add { address, .. } = step else { return false };
        error.code().is_some() && !self.refused.contains_key(address)
    }

    fn is_primary(&self, node: i32) -> bool {
        let mut rows = self.rows.iter().flatten();
        rows.any(|row| row.node == node && row.role == Role::Primary)
    }

    fn answer(&mut self, request: usize, answer: Answer) {
        if request < self.requests.len() {
            let asked = self.requests.remove(request);
            if answer != Answer::Done {
                info!(
                    database = %self.database,
                    group = asked.group.0,
                    leader = %asked.leader,
                    event = ?asked.event,
                    answer = ?answer,
                    "notification of another group refused"
                );
            }
            // Who asked may have gone.
            discard::receiver_may_be_gone(self.answers.remove(request).send(answer));
        }
    }

    /// Other rows are not kept waiting for this one.
    fn is_refused(&mut self, address: Address, error: &SqlError) {
        let why = kornak_cluster::error_chain(error);
        let before = self.refused.get(&address);
        if before.is_none_or(|before| before.why != why) {
            warn!(database = %self.database, address = %address, error = %why, "Citus refused the change of pg_dist_node, it is tried again");
        }
        let pause = before.map_or(FIRST_REFUSAL, |before| (before.pause * 2).min(LONGEST_REFUSAL));
        self.refused.insert(address, Refused { why, until: boottime_now() + pause, pause });
    }

    fn failed(&mut self, error: &SqlError, changing: bool) {
        let why = kornak_cluster::error_chain(error);
        if self.trouble.as_ref().is_none_or(|before| before.why != why) {
            warn!(database = %self.database, error = %why, "pg_dist_node could not be updated");
        }
        self.trouble = Some(Trouble { why, changing });
        self.not_before = boottime_now() + self.pause;
        self.pause = (self.pause * 2).min(LONGEST_PAUSE);
    }

    /// The connection goes, and with it whatever was open; the rows are read again.
    fn stand_down(&mut self) {
        self.client = None;
        self.flight = Flight::Grounded;
        self.rows = None;
    }

    async fn say(&mut self, statement: &str) -> Result<Vec<crate::postgres::TextRow>, SqlError> {
        if self.client.as_ref().is_none_or(Client::is_closed) {
            let postgres = &self.ctx.postgres;
            self.client = Some(postgres.connect_to_database(&self.database, APPLICATION).await?);
        }
        let Some(client) = &self.client else { return Ok(Vec::new()) };
        ask(client, "change pg_dist_node", statement).await
    }
}

/// In a failover, whoever holds a lock on the group's placements waits for a server that is gone.
const FORCE_AFTER: Duration = Duration::from_secs(1);

/// For one lock after that. Who waits for a server that is gone ends within milliseconds of being told;
/// who waits for one that stands still while its kernel answers does not: he asks it to cancel his
/// statement first, and libpq waits for that without a limit.
const LOCKS_WITHIN: Duration = Duration::from_millis(2500);

/// For telling all workers what else Citus's daemon tells them, which waits for the silent server too.
const TELL_WITHIN: Duration = Duration::from_secs(5);

/// As `citus_update_node` does it: who is not synced is told by the daemon.
const UNSYNCED: &str = "UPDATE pg_catalog.pg_dist_node SET metadatasynced = false \
    WHERE hasmetadata AND metadatasynced AND groupid > 0";

/// Does to a row what `citus_update_node` does, without the locks on the group's shards. Only for sessions that
/// have been told to end: whatever they have not committed they will not.
fn directly(node: i32, to: &Address) -> String {
    format!(
        "UPDATE pg_catalog.pg_dist_node SET nodename = {}, nodeport = {} WHERE nodeid = {node}",
        literal(&to.host),
        to.port
    )
}

fn primaries(rows: &[Row]) -> impl Iterator<Item = &Row> {
    rows.iter().filter(|row| row.role == Role::Primary)
}

fn secondaries(rows: &[Row]) -> BTreeMap<GroupId, BTreeSet<String>> {
    let mut found: BTreeMap<GroupId, BTreeSet<String>> = BTreeMap::new();
    for row in rows.iter().filter(|row| row.role == Role::Secondary) {
        found.entry(row.group).or_default().insert(row.address.to_string());
    }
    found
}

fn read_row(row: &[Option<String>]) -> Option<Row> {
    let text = |n: usize| row.get(n)?.as_deref();
    Some(Row {
        node: text(0)?.parse().ok()?,
        group: GroupId(text(1)?.parse().ok()?),
        address: Address { host: text(2)?.to_owned(), port: text(3)?.parse().ok()? },
        role: if text(4)? == "primary" { Role::Primary } else { Role::Secondary },
        synced: text(5)? == "1",
    })
}

/// Citus' functions for a step.
fn statement(step: &Step, force: bool, cooldown: Duration) -> String {
    let at = |address: &Address| format!("{}, {}", literal(&address.host), address.port);
    match step {
        Step::Update { node, to } => format!(
            "SELECT citus_update_node({node}, {}, {force}, {})",
            at(to),
            cooldown.as_millis()
        ),
        Step::SetCoordinator { address } => {
            format!("SELECT citus_set_coordinator_host({}, 'primary', 'default')", at(address))
        }
        Step::Add { group, address, role } => format!(
            "SELECT citus_add_node({}, {group}, '{}', 'default')",
            at(address),
            role.as_str()
        ),
        Step::Remove { address, .. } => format!("SELECT citus_remove_node({})", at(address)),
    }
}

/// A step in an operator's words.
struct Spoken<'a>(&'a Step);

impl std::fmt::Display for Spoken<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.0 {
            Step::Update { node, to } => write!(f, "node {node} is at {to}"),
            Step::SetCoordinator { address } => write!(f, "coordinator is at {address}"),
            Step::Add { group, address, role } => {
                write!(f, "group {group} has {} {address}", role.as_str())
            }
            Step::Remove { group, address } => write!(f, "group {group} has no {address}"),
        }
    }
}

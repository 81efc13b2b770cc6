//! The metrics of an agent: the one place with their names, mirrored in docs/metrics.md.
//!
//! Most of it is read off the newest [`NodeView`] at the moment it is asked for, so it cannot disagree
//! with the REST status. The few things that are counted live in [`Counters`], one per agent and not
//! global, because several agents may run in one process (`kornak demo`).
//!
//! Names that begin with `patroni_` are those of Patroni's `GET /metrics`, so that existing dashboards
//! work.

use std::fmt::{Display, Write};

use jiff::Timestamp;
use kornak_cluster::{MemberRole, MemberState, Moment, discard};

use super::health::{Synchrony, accepts_writes, synchrony};
use super::status::{is_unlocked, job};
use crate::citus::Desk;
use crate::counters::{Counters, words};
use crate::node::NodeView;

/// `GET /metrics`, in Prometheus' text format 0.0.4.
pub(super) fn render(view: &NodeView, counters: &Counters, now: Moment) -> String {
    let mut page = Page::new(view);
    server(view, now, &mut page);
    cluster(view, &mut page);
    agent(view, counters, now, &mut page);
    page.out
}

/// The additional metrics of a node of a Citus cluster.
pub(super) fn citus(view: &NodeView, desk: &Desk) -> String {
    let mut page = Page::new(view);
    let oldest = *desk.oldest_prepared.borrow();
    let help = "Age of the oldest prepared transaction; one that stays holds locks.";
    page.gauge("kornak_citus_oldest_prepared_seconds", help, oldest);
    const AGREES: &str = "kornak_citus_metadata_agrees";
    page.head(
        AGREES,
        "gauge",
        "1 if pg_dist_node is what the store says; the coordinator's leader.",
    );
    for (database, standing) in &*desk.standings.borrow() {
        page.labelled(AGREES, &[("database", database)], flag(standing.agrees()));
    }
    page.out
}

fn server(view: &NodeView, now: Moment, page: &mut Page) {
    let running = view.state == MemberState::Running;
    let standby = running && view.role == MemberRole::Replica;
    let synchrony = synchrony(view);
    let (sync, quorum) = (synchrony == Synchrony::Sync, synchrony == Synchrony::Quorum);
    let replication = |state| running && view.replication_state.as_deref() == Some(state);
    let location = |lsn: Option<kornak_cluster::Lsn>| lsn.unwrap_or_default().0;
    let version = kornak_cluster::member::COMPATIBLE_PATRONI_VERSION;
    page.gauge("patroni_version", "Version whose formats the node speaks.", digits(version));
    page.gauge("patroni_postgres_running", "1 if the server runs.", flag(running));
    let start = seconds(view.postmaster_start_time.as_deref());
    page.gauge("patroni_postmaster_start_time", "When the server was started.", start);
    let timeline = view.timeline.unwrap_or_default().0;
    page.gauge("patroni_postgres_timeline", "Timeline of the server; 0 if unknown.", timeline);
    let primary = flag(accepts_writes(view, now));
    page.gauge("patroni_primary", "1 if the node leads and accepts writes.", primary);
    let end = location(view.xlog.location);
    page.counter("patroni_xlog_location", "Write position in bytes; 0 on a standby.", end);
    let standby_leader = running && view.role == MemberRole::StandbyLeader;
    let help = "1 if the node leads a standby cluster.";
    page.gauge("patroni_standby_leader", help, flag(standby_leader));
    page.gauge("patroni_replica", "1 if the server is a running standby.", flag(standby));
    page.gauge("patroni_sync_standby", "1 if commits wait for this standby.", flag(sync));
    let help = "1 if this standby is one of a quorum that commits wait for.";
    page.gauge("patroni_quorum_standby", help, flag(quorum));
    let received = location(view.xlog.received_location);
    page.counter("patroni_xlog_received_location", "Received position in bytes.", received);
    let replayed = location(view.xlog.replayed_location);
    page.counter("patroni_xlog_replayed_location", "Replayed position in bytes.", replayed);
    let replayed_at = seconds(view.xlog.replayed_timestamp.as_deref());
    let help = "Commit time of the last transaction replayed.";
    page.gauge("patroni_xlog_replayed_timestamp", help, replayed_at);
    let paused = view.xlog.paused.unwrap_or(false);
    page.gauge("patroni_xlog_paused", "1 if replay is paused.", flag(paused));
    let help = "1 if the standby receives WAL as a stream.";
    page.gauge("patroni_postgres_streaming", help, flag(replication("streaming")));
    let archive = flag(replication("in archive recovery"));
    let help = "1 if the standby reads WAL from the archive.";
    page.gauge("patroni_postgres_in_archive_recovery", help, archive);
    let version = view.server_version.unwrap_or_default();
    page.gauge("patroni_postgres_server_version", "As server_version_num.", version);
    let help = "The server's state, by its place in the list of states.";
    page.gauge("patroni_postgres_state", help, view.state.metric_index());
    let pending = view.pending_restart.is_some();
    page.gauge("patroni_pending_restart", "1 if settings wait for a restart.", flag(pending));
}

fn cluster(view: &NodeView, page: &mut Page) {
    let help = "1 if the leader key is absent, or the store out of reach.";
    page.gauge("patroni_cluster_unlocked", help, flag(is_unlocked(view)));
    let help = "1 if the leader stays on the members' word.";
    page.gauge("patroni_failsafe_mode_is_active", help, flag(view.failsafe_active));
    let help = "When the store last answered, in seconds since 1970.";
    page.gauge("patroni_dcs_last_seen", help, view.dcs_last_seen);
    let paused = view.cluster.config.as_ref().is_some_and(|config| config.pause);
    page.gauge("patroni_is_paused", "1 in maintenance mode.", flag(paused));
}

fn agent(view: &NodeView, counters: &Counters, now: Moment, page: &mut Page) {
    let reachable = flag(view.dcs_reachable);
    page.gauge("kornak_agent_dcs_reachable", "1 if the store answers.", reachable);
    let help = "Revision of the store that the node has seen.";
    page.gauge("kornak_agent_dcs_revision", help, view.cluster.revision.0);
    let help = "Keys whose value made no sense.";
    page.gauge("kornak_agent_unreadable_keys", help, view.cluster.unreadable.len());
    let help = "1 if the leader key is this node's, proven.";
    page.gauge("kornak_agent_holds_leader_key", help, flag(view.holds_lock));
    let left = view.lease_until.map_or(0.0, |until| until.since(now).as_secs_f64());
    let help = "For how long the leadership is proven; 0 without it.";
    page.gauge("kornak_agent_lease_left_seconds", help, left);
    page.counter("kornak_agent_cycles_total", "Decisions since the start.", view.cycles);
    let age = now.since(view.cycle_at).as_secs_f64();
    let help = "Time since the last decision; a stuck agent shows here.";
    page.gauge("kornak_agent_last_cycle_age_seconds", help, age);
    let (action, why) = (words(&view.action, '_'), words(&view.why, '_'));
    page.head("kornak_agent_action_info", "gauge", "The last decision.");
    page.labelled("kornak_agent_action_info", &[("action", &action), ("why", &why)], 1);
    page.head("kornak_agent_job_info", "gauge", "What the agent is in the middle of.");
    page.labelled("kornak_agent_job_info", &[("job", job(view).unwrap_or("none"))], 1);
    page.head("kornak_agent_decisions_total", "counter", "Decisions by what and why.");
    for ((action, why), count) in &*counters.decisions.lock() {
        let labels = [("action", action.as_str()), ("why", why.as_str())];
        page.labelled("kornak_agent_decisions_total", &labels, count);
    }
    page.head("kornak_agent_step_failures_total", "counter", "Steps that did not succeed.");
    for (action, count) in &*counters.failures.lock() {
        page.labelled("kornak_agent_step_failures_total", &[("action", action)], count);
    }
    page.head("kornak_agent_rest_answers_total", "counter", "Answers of the REST API by status.");
    for (status, count) in &*counters.answers.lock() {
        let status = status.to_string();
        page.labelled("kornak_agent_rest_answers_total", &[("status", &status)], count);
    }
}

/// The text while it grows.
struct Page {
    out: String,
    scope: String,
    name: String,
}

impl Page {
    fn new(view: &NodeView) -> Self {
        let (scope, name) = (escape(&view.scope.name), escape(&view.name));
        Self { out: String::with_capacity(8192), scope, name }
    }

    fn gauge(&mut self, name: &str, help: &str, value: impl Display) {
        self.head(name, "gauge", help);
        self.labelled(name, &[], value);
    }

    fn counter(&mut self, name: &str, help: &str, value: impl Display) {
        self.head(name, "counter", help);
        self.labelled(name, &[], value);
    }

    fn head(&mut self, name: &str, kind: &str, help: &str) {
        // Writing to a String cannot fail.
        discard::string_takes_all(writeln!(self.out, "# HELP {name} {help}\n# TYPE {name} {kind}"));
    }

    fn labelled(&mut self, name: &str, labels: &[(&str, &str)], value: impl Display) {
        discard::string_takes_all(write!(
            self.out,
            "{name}{{scope=\"{}\",name=\"{}\"",
            self.scope, self.name
        ));
        for (label, text) in labels {
            discard::string_takes_all(write!(self.out, ",{label}=\"{}\"", escape(text)));
        }
        discard::string_takes_all(writeln!(self.out, "}} {value}"));
    }
}

fn escape(label: &str) -> String {
    label.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}

fn flag(on: bool) -> u8 {
    u8::from(on)
}

/// `4.1.5` as `040105`.
fn digits(version: &str) -> String {
    version.split('.').map(|part| format!("{part:0>2}")).collect()
}

/// Seconds since 1970 of a time as the REST status shows it; 0 if there is none.
fn seconds(time: Option<&str>) -> f64 {
    let parsed = time.and_then(|time| time.parse::<Timestamp>().ok());
    parsed.map_or(0.0, |time| time.as_microsecond() as f64 / 1e6)
}

#[cfg(test)]
mod tests;

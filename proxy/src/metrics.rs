//! Every series of the proxy, counted here and printed in Prometheus' text format.
//!
//! One instance per proxy, no process-wide recorder: several proxies may share a process. States
//! of sessions are counted when somebody looks ([`crate::status`]).

use std::collections::BTreeMap;
use std::fmt::Write;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use kornak_cluster::discard;
use kornak_protocol::sqlstate::SqlState;
use parking_lot::Mutex;

/// Bucket bounds in seconds: they double from 1 ms to 33 s. Below is invisible, above every client
/// has given up.
const BUCKETS: usize = 16;

/// A histogram of durations.
#[derive(Debug, Default)]
pub struct Histogram {
    buckets: [AtomicU64; BUCKETS],
    count: AtomicU64,
    micros: AtomicU64,
}

impl Histogram {
    /// Counts one.
    pub fn record(&self, took: Duration) {
        let mut bound = Duration::from_millis(1);
        for bucket in &self.buckets {
            if took <= bound {
                bucket.fetch_add(1, Relaxed);
                break;
            }
            bound *= 2;
        }
        self.count.fetch_add(1, Relaxed);
        self.micros.fetch_add(took.as_micros() as u64, Relaxed);
    }

    fn print(&self, name: &str, out: &mut String) {
        discard::string_takes_all(writeln!(out, "# TYPE {name} histogram"));
        let (mut sum, mut bound) = (0, 0.001);
        for bucket in &self.buckets {
            sum += bucket.load(Relaxed);
            discard::string_takes_all(writeln!(out, "{name}_bucket{{le=\"{bound}\"}} {sum}"));
            bound *= 2.0;
        }
        let count = self.count.load(Relaxed);
        let seconds = self.micros.load(Relaxed) as f64 / 1e6;
        discard::string_takes_all(writeln!(out, "{name}_bucket{{le=\"+Inf\"}} {count}"));
        discard::string_takes_all(writeln!(out, "{name}_sum {seconds}\n{name}_count {count}"));
    }
}

/// Counters of one proxy.
#[derive(Debug, Default)]
pub struct Metrics {
    /// `kornak_proxy_client_connections_total`: accepted connections.
    pub accepted: AtomicU64,
    /// `kornak_proxy_logins_total`: sessions that began.
    pub logins: AtomicU64,
    /// `kornak_proxy_logins_answered_from_cache_total`: of these without a server.
    pub cached_logins: AtomicU64,
    /// `kornak_proxy_login_failures_total`.
    pub login_failures: AtomicU64,
    /// `kornak_proxy_login_seconds`: from accept to the end of the login.
    pub login: Histogram,
    /// `kornak_proxy_malformed_total`: clients that broke the protocol.
    pub malformed: AtomicU64,
    /// `kornak_proxy_tls_failures_total`: TLS handshakes of clients that failed.
    pub tls_failures: AtomicU64,
    /// `kornak_proxy_server_connections_total`: logins to servers.
    pub dialled: AtomicU64,
    /// `kornak_proxy_server_connection_failures_total`.
    pub dial_failures: AtomicU64,
    /// `kornak_proxy_servers_lost_total`: server connections that broke under a session.
    pub servers_lost: AtomicU64,
    /// `kornak_proxy_sessions_moved_total`: sessions that got another server connection.
    pub moved: AtomicU64,
    /// `kornak_proxy_hold_seconds`: time a request was held back.
    pub hold: Histogram,
    /// `kornak_proxy_handover_seconds`: time the gate was closed.
    pub gate: Histogram,
    /// `kornak_proxy_outage_seconds`: time it was closed because a Citus group had no primary.
    pub outage: Histogram,
    /// `kornak_proxy_pool_wait_seconds`: time a transaction waited for a pooled connection.
    pub pool_wait: Histogram,
    /// `kornak_proxy_pool_fitted_total`: connections that were told a session's settings first.
    pub pool_fitted: AtomicU64,
    /// `kornak_proxy_pool_resets_total`: connections made as new after a client that left state.
    pub pool_resets: AtomicU64,
    /// `kornak_proxy_pool_dirty_total`: connections ended because a client left in a transaction.
    pub pool_dirty: AtomicU64,
    /// `kornak_proxy_pool_doubtful_total`: connections ended because a cancel request may still come.
    pub pool_doubtful: AtomicU64,
    /// `kornak_proxy_cancels_total`: cancel requests.
    pub cancels: AtomicU64,
    /// `kornak_proxy_cancels_passed_on_total`: of these passed on to other proxies.
    pub cancels_passed_on: AtomicU64,
    /// `kornak_proxy_cancels_dropped_total`: of these not passed on, for their address had sent too many.
    pub cancels_dropped: AtomicU64,
    /// `kornak_proxy_strangers_sent_away_total`: connections that had not logged in and made room for
    /// others.
    pub sent_away: AtomicU64,
    /// `kornak_proxy_clients_refused_total`: logins that a limit on clients has refused.
    pub refused: AtomicU64,
    /// `kornak_proxy_panics_total`: sessions ended by a defect of ours.
    pub panics: AtomicU64,
    /// `kornak_proxy_bytes_total{direction}`.
    pub bytes_in: AtomicU64,
    pub bytes_out: AtomicU64,
    /// `kornak_proxy_errors_total{sqlstate}`: errors of our own making.
    errors: Mutex<BTreeMap<[u8; 5], u64>>,
    /// `kornak_proxy_pinned_closed_total{reason}`: sessions closed because they could not be moved.
    pinned: Mutex<BTreeMap<&'static str, u64>>,
}

impl Metrics {
    /// Counts an error of ours.
    pub fn error(&self, sqlstate: SqlState) {
        *self.errors.lock().entry(*sqlstate.as_bytes()).or_insert(0) += 1;
    }

    /// Counts a session that was closed because of its pin.
    pub fn pinned_closed(&self, reason: &'static str) {
        *self.pinned.lock().entry(reason).or_insert(0) += 1;
    }

    /// Errors of ours by SQLSTATE.
    pub fn errors(&self) -> BTreeMap<String, u64> {
        let errors = self.errors.lock();
        errors.iter().map(|(code, n)| (String::from_utf8_lossy(code).into_owned(), *n)).collect()
    }

    /// Appends all series.
    pub fn print(&self, out: &mut String) {
        let counters: [(&str, &AtomicU64); 20] = [
            ("kornak_proxy_client_connections_total", &self.accepted),
            ("kornak_proxy_logins_total", &self.logins),
            ("kornak_proxy_logins_answered_from_cache_total", &self.cached_logins),
            ("kornak_proxy_login_failures_total", &self.login_failures),
            ("kornak_proxy_malformed_total", &self.malformed),
            ("kornak_proxy_tls_failures_total", &self.tls_failures),
            ("kornak_proxy_server_connections_total", &self.dialled),
            ("kornak_proxy_server_connection_failures_total", &self.dial_failures),
            ("kornak_proxy_servers_lost_total", &self.servers_lost),
            ("kornak_proxy_sessions_moved_total", &self.moved),
            ("kornak_proxy_pool_fitted_total", &self.pool_fitted),
            ("kornak_proxy_pool_resets_total", &self.pool_resets),
            ("kornak_proxy_pool_dirty_total", &self.pool_dirty),
            ("kornak_proxy_pool_doubtful_total", &self.pool_doubtful),
            ("kornak_proxy_cancels_total", &self.cancels),
            ("kornak_proxy_cancels_passed_on_total", &self.cancels_passed_on),
            ("kornak_proxy_cancels_dropped_total", &self.cancels_dropped),
            ("kornak_proxy_strangers_sent_away_total", &self.sent_away),
            ("kornak_proxy_clients_refused_total", &self.refused),
            ("kornak_proxy_panics_total", &self.panics),
        ];
        for (name, value) in counters {
            discard::string_takes_all(writeln!(
                out,
                "# TYPE {name} counter\n{name} {}",
                value.load(Relaxed)
            ));
        }
        let name = "kornak_proxy_bytes_total";
        let (to_server, to_client) = (self.bytes_in.load(Relaxed), self.bytes_out.load(Relaxed));
        discard::string_takes_all(writeln!(out, "# TYPE {name} counter"));
        discard::string_takes_all(writeln!(out, "{name}{{direction=\"to_server\"}} {to_server}"));
        discard::string_takes_all(writeln!(out, "{name}{{direction=\"to_client\"}} {to_client}"));
        self.login.print("kornak_proxy_login_seconds", out);
        self.hold.print("kornak_proxy_hold_seconds", out);
        self.pool_wait.print("kornak_proxy_pool_wait_seconds", out);
        self.gate.print("kornak_proxy_handover_seconds", out);
        self.outage.print("kornak_proxy_outage_seconds", out);
        discard::string_takes_all(writeln!(out, "# TYPE kornak_proxy_errors_total counter"));
        for (code, n) in self.errors() {
            discard::string_takes_all(writeln!(
                out,
                "kornak_proxy_errors_total{{sqlstate=\"{code}\"}} {n}"
            ));
        }
        discard::string_takes_all(writeln!(out, "# TYPE kornak_proxy_pinned_closed_total counter"));
        for (reason, n) in self.pinned.lock().iter() {
            discard::string_takes_all(writeln!(
                out,
                "kornak_proxy_pinned_closed_total{{reason=\"{reason}\"}} {n}"
            ));
        }
    }
}

/// Adds one.
pub fn count(counter: &AtomicU64) {
    counter.fetch_add(1, Relaxed);
}

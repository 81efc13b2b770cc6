//! The dynamic configuration that all nodes of a group share: value of `config`.

use std::time::Duration;

use serde_json::{Map, Value};

use crate::slots::{PermanentSlot, SlotMatcher};

mod check;
pub use check::{Problem, problems, ttl_beyond_the_ceiling, unread};

/// Whether commits wait for standbys (Patroni's `synchronous_mode`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum SyncMode {
    #[default]
    Off,
    /// Chosen standbys by priority: `synchronous_standby_names = 'N (a,b)'`.
    On,
    /// Any of the listed: `ANY N (a,b)`.
    Quorum,
}

/// Where a standby cluster gets its log from: `standby_cluster` of the dynamic configuration. Its leader
/// replicates from there, the other members from that leader; nobody is promoted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StandbyCluster {
    /// Host and port of the remote primary; `None`: only its archive is read.
    pub remote: Option<(String, u16)>,
    pub primary_slot_name: Option<String>,
    /// `restore_command`, `archive_cleanup_command`, `recovery_min_apply_delay`, as far as given.
    pub recovery: Vec<(&'static str, String)>,
    /// Names of methods in the node's own file; empty: a base backup.
    pub create_replica_methods: Vec<String>,
}

impl StandbyCluster {
    /// As Patroni: a section counts if it says where the log comes from.
    fn from_json(value: &Value) -> Option<Self> {
        let section = value.as_object()?;
        let text = |key: &str| match section.get(key)? {
            Value::String(text) => Some(text.clone()).filter(|text| !text.is_empty()),
            Value::Number(number) => Some(number.to_string()),
            _ => None,
        };
        let port = text("port").and_then(|port| port.parse().ok());
        let remote = match (text("host"), port) {
            (None, None) => None,
            (host, port) => {
                Some((host.unwrap_or_else(|| "localhost".to_owned()), port.unwrap_or(5432)))
            }
        };
        let recovery: Vec<_> =
            ["restore_command", "archive_cleanup_command", "recovery_min_apply_delay"]
                .into_iter()
                .filter_map(|key| Some((key, text(key)?)))
                .collect();
        if remote.is_none() && !recovery.iter().any(|(key, _)| *key == "restore_command") {
            return None;
        }
        let methods = section.get("create_replica_methods").and_then(Value::as_array);
        let methods = methods.into_iter().flatten();
        Some(Self {
            remote,
            primary_slot_name: text("primary_slot_name"),
            recovery,
            create_replica_methods: methods
                .filter_map(|name| name.as_str().map(str::to_owned))
                .collect(),
        })
    }
}

/// The dynamic configuration with Patroni's defaults filled in. The raw JSON is kept, for it is
/// shown to users and merged into by PATCH.
#[derive(Debug, Clone, PartialEq)]
pub struct ClusterConfig {
    /// Lifetime of the leader's lease. Patroni's default 30 s.
    pub ttl: Duration,
    /// The longest time between two cycles of an agent. Default 10 s.
    pub loop_wait: Duration,
    /// Budget of one store operation with its retries. Default 10 s.
    pub retry_timeout: Duration,
    /// A standby further behind than this does not race. Bytes, default 1 MiB.
    pub maximum_lag_on_failover: u64,
    pub synchronous_mode: SyncMode,
    /// Without a synchronous standby writes wait instead of going on alone.
    pub synchronous_mode_strict: bool,
    /// Default 1.
    pub synchronous_node_count: u32,
    /// A synchronous standby further behind than this is replaced. Bytes; `None` (written -1): never.
    pub maximum_lag_on_syncnode: Option<u64>,
    /// The leader stays while every member confirms it, although the store is away.
    pub failsafe_mode: bool,
    /// A candidate on an older timeline than the cluster's is refused.
    pub check_timeline: bool,
    /// Maintenance mode: nothing happens by itself.
    pub pause: bool,
    /// How long an in-place crash recovery may take before another node is preferred. Default 300 s.
    pub primary_start_timeout: Duration,
    /// See [`ClusterConfig::stop_limit`].
    pub primary_stop_timeout: Duration,
    /// Entries kept in `history`; 0 keeps all.
    pub max_timelines_history: usize,
    /// How long the slot of a vanished member is kept. Default 30 min.
    pub member_slots_ttl: Duration,
    /// The whole cluster follows a primary elsewhere.
    pub standby_cluster: Option<StandbyCluster>,
    /// The JSON as it is stored.
    pub raw: Map<String, Value>,
}

impl Default for ClusterConfig {
    fn default() -> Self {
        Self::from_json(Map::new())
    }
}

impl ClusterConfig {
    /// Never fails: a value of the wrong type counts as absent, because another tool may have
    /// written it and a cluster must not stop for that. Out-of-range timings are corrected as
    /// Patroni corrects them: `loop_wait + 2 * retry_timeout <= ttl`.
    pub fn from_json(raw: Map<String, Value>) -> Self {
        let seconds = |key: &str, default: u64| {
            let found = raw.get(key).and_then(number);
            Duration::from_secs_f64(found.map_or(default as f64, |value| value.clamp(0.0, LONGEST)))
        };
        let alias = |key: &str, old: &str, default| {
            if raw.contains_key(key) { seconds(key, default) } else { seconds(old, default) }
        };
        let flag = |key: &str| raw.get(key).is_some_and(truthy);
        let count = |key: &str| raw.get(key).and_then(number).map(|value| value.max(0.0) as u64);
        let ttl = seconds("ttl", 30).clamp(MINIMUM_TTL, MAXIMUM_TTL);
        let mut loop_wait = seconds("loop_wait", 10).max(Duration::from_secs(1));
        let mut retry_timeout = seconds("retry_timeout", 10).max(Duration::from_secs(1));
        if loop_wait + 2 * retry_timeout > ttl {
            loop_wait = ttl.saturating_sub(2 * retry_timeout).max(Duration::from_secs(1));
        }
        if loop_wait + 2 * retry_timeout > ttl {
            retry_timeout = ttl.saturating_sub(Duration::from_secs(1)) / 2;
        }
        Self {
            ttl,
            loop_wait,
            retry_timeout,
            maximum_lag_on_failover: count("maximum_lag_on_failover").unwrap_or(1_048_576),
            synchronous_mode: sync_mode(raw.get("synchronous_mode")),
            synchronous_mode_strict: flag("synchronous_mode_strict"),
            synchronous_node_count: count("synchronous_node_count")
                .map_or(1, |value| u32::try_from(value).unwrap_or(u32::MAX).max(1)),
            maximum_lag_on_syncnode: raw
                .get("maximum_lag_on_syncnode")
                .and_then(number)
                .filter(|bytes| *bytes > 0.0)
                .map(|bytes| bytes as u64),
            failsafe_mode: flag("failsafe_mode"),
            check_timeline: flag("check_timeline"),
            pause: flag("pause"),
            primary_start_timeout: alias("primary_start_timeout", "master_start_timeout", 300),
            primary_stop_timeout: alias("primary_stop_timeout", "master_stop_timeout", 0),
            max_timelines_history: count("max_timelines_history").unwrap_or(0) as usize,
            member_slots_ttl: raw
                .get("member_slots_ttl")
                .and_then(seconds_with_unit)
                .unwrap_or(Duration::from_secs(1800)),
            standby_cluster: raw.get("standby_cluster").and_then(StandbyCluster::from_json),
            raw,
        }
    }

    /// Reads the stored text; `None` if it is not a JSON object, or if a key that turns a mode on or off
    /// makes no sense. A value of another kind that makes no sense counts as absent.
    pub fn parse(text: &str) -> Option<Self> {
        let raw: Map<String, Value> = serde_json::from_str(text).ok()?;
        let decides = problems(&raw).iter().any(|problem| problem.decides);
        (!decides).then(|| Self::from_json(raw))
    }

    /// Puts `last`'s values in the place of those that make no sense, as far as it has any.
    #[must_use]
    pub fn repaired(self, last: Option<&Self>) -> Self {
        let wrong = problems(&self.raw);
        let Some(last) = last.filter(|_| !wrong.is_empty()) else { return self };
        let mut raw = self.raw;
        for problem in &wrong {
            check::replace(&mut raw, &problem.path, &last.raw);
        }
        Self::from_json(raw)
    }

    /// The synchronous mode in force: a standby cluster has none.
    pub fn sync_mode(&self) -> SyncMode {
        if self.standby_cluster.is_some() { SyncMode::Off } else { self.synchronous_mode }
    }

    /// How long a primary may take to stop before it is killed: `primary_stop_timeout`, in synchronous
    /// mode. `None`: as long as it takes.
    pub fn stop_limit(&self) -> Option<Duration> {
        let counts = self.sync_mode() != SyncMode::Off && !self.primary_stop_timeout.is_zero();
        counts.then_some(self.primary_stop_timeout)
    }

    /// The `postgresql` section, if there is one.
    pub fn postgresql(&self) -> Option<&Map<String, Value>> {
        self.raw.get("postgresql").and_then(Value::as_object)
    }

    /// `postgresql.parameters`, if there are any.
    pub fn parameters(&self) -> Option<&Map<String, Value>> {
        self.postgresql()?.get("parameters").and_then(Value::as_object)
    }

    /// Whether a diverged former primary may be rewound (`postgresql.use_pg_rewind`).
    pub fn use_pg_rewind(&self) -> bool {
        self.allows("use_pg_rewind")
    }

    /// Whether a switch of the `postgresql` section is on; one that is absent is off.
    pub fn allows(&self, key: &str) -> bool {
        self.postgresql().and_then(|section| section.get(key)).is_some_and(truthy)
    }

    /// Slots that are kept on every node (`slots`, under any of its three names).
    pub fn permanent_slots(&self) -> Vec<PermanentSlot> {
        PermanentSlot::read(self.slots_section())
    }

    /// Whether the operator's list has a slot of this name in words that make no sense.
    pub fn names_slot(&self, name: &str) -> bool {
        self.slots_section().is_some_and(|section| section.get(name).is_some())
            && self.permanent_slots().iter().all(|slot| slot.name != name)
    }

    fn slots_section(&self) -> Option<&Value> {
        check::SLOTS.iter().find_map(|key| self.raw.get(*key))
    }

    /// Slots that are somebody else's (`ignore_slots`).
    pub fn ignored_slots(&self) -> Vec<SlotMatcher> {
        SlotMatcher::read(self.raw.get("ignore_slots"))
    }

    /// Whether members get replication slots (`postgresql.use_slots`, default on).
    pub fn use_slots(&self) -> bool {
        self.postgresql().and_then(|section| section.get("use_slots")).is_none_or(truthy)
    }
}

/// Kornak's floor for `ttl`: etcd's lease and election times make less than this a source of
/// failovers without a failure. (Patroni's own floor is 20 s; a cluster with Patroni members keeps
/// to that by its configuration.)
pub const MINIMUM_TTL: Duration = Duration::from_secs(4);

/// Kornak's ceiling for `ttl`: nobody can lead before the lease of a leader that was lost has run out, so a slip of the
/// finger must not take a cluster's failovers away for years.
pub const MAXIMUM_TTL: Duration = Duration::from_secs(3600);

/// Seconds, thirty years; more would only make sums overflow.
const LONGEST: f64 = 1e9;

/// Merges `patch` into `config` as Patroni's PATCH does: objects are merged, `null` deletes. An object that
/// is new is taken as it is: in `slots` a `null` is a physical slot.
pub fn merge_patch(config: &mut Map<String, Value>, patch: &Map<String, Value>) -> bool {
    let mut changed = false;
    for (key, value) in patch {
        match (config.get_mut(key), value) {
            (Some(_), Value::Null) => {
                config.shift_remove(key);
                changed = true;
            }
            (None, Value::Null) => {}
            (Some(Value::Object(old)), Value::Object(new)) => changed |= merge_patch(old, new),
            (Some(old), new) if old == new => {}
            (_, new) => {
                config.insert(key.clone(), new.clone());
                changed = true;
            }
        }
    }
    changed
}

/// A number that can be counted with: text such as `nan` and `inf` is none.
fn number(value: &Value) -> Option<f64> {
    let number: Option<f64> = match value {
        Value::Number(number) => number.as_f64(),
        Value::String(text) => text.trim().parse().ok(),
        _ => None,
    };
    number.filter(|number| number.is_finite())
}

fn truthy(value: &Value) -> bool {
    match value {
        Value::Bool(on) => *on,
        Value::Number(number) => number.as_f64() != Some(0.0),
        Value::String(text) => {
            matches!(text.to_ascii_lowercase().as_str(), "true" | "on" | "yes" | "1")
        }
        _ => false,
    }
}

fn sync_mode(value: Option<&Value>) -> SyncMode {
    match value {
        Some(Value::String(text)) if text.eq_ignore_ascii_case("quorum") => SyncMode::Quorum,
        Some(value) if truthy(value) => SyncMode::On,
        _ => SyncMode::Off,
    }
}

fn seconds_with_unit(value: &Value) -> Option<Duration> {
    if let Some(seconds) = number(value) {
        return Some(Duration::from_secs_f64(seconds.clamp(0.0, LONGEST)));
    }
    let text = value.as_str()?.trim();
    let split = text.find(|c: char| !c.is_ascii_digit())?;
    let (digits, unit) = text.split_at(split);
    let amount: u64 = digits.parse().ok()?;
    let factor = match unit.trim() {
        "ms" => return Some(Duration::from_millis(amount.min(LONGEST as u64))),
        "s" => 1,
        "min" => 60,
        "h" => 3600,
        "d" => 86400,
        _ => return None,
    };
    Some(Duration::from_secs(amount.checked_mul(factor)?.min(LONGEST as u64)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> ClusterConfig {
        ClusterConfig::parse(text).unwrap()
    }

    #[test]
    fn an_empty_configuration_has_patronis_defaults() {
        let config = read("{}");
        assert_eq!(config.ttl, Duration::from_secs(30));
        assert_eq!(config.maximum_lag_on_failover, 1_048_576);
        assert_eq!(config.synchronous_mode, SyncMode::Off);
        assert!(!config.failsafe_mode && !config.pause && config.use_slots());
    }

    #[test]
    fn timings_that_do_not_fit_are_corrected_loop_wait_first() {
        let config = read(r#"{"ttl":20,"loop_wait":10,"retry_timeout":8}"#);
        assert_eq!(config.loop_wait, Duration::from_secs(4));
        let config = read(r#"{"ttl":20,"loop_wait":10,"retry_timeout":30}"#);
        assert_eq!(read(r#"{"ttl":31536000}"#).ttl, MAXIMUM_TTL);
        assert_eq!(
            (config.loop_wait, config.retry_timeout.as_secs_f64()),
            (Duration::from_secs(1), 9.5)
        );
    }

    #[test]
    fn synchronous_mode_is_read_in_all_its_spellings() {
        for (text, mode) in [
            ("true", SyncMode::On),
            (r#""on""#, SyncMode::On),
            (r#""quorum""#, SyncMode::Quorum),
            ("false", SyncMode::Off),
            ("null", SyncMode::Off),
        ] {
            assert_eq!(read(&format!(r#"{{"synchronous_mode":{text}}}"#)).synchronous_mode, mode);
        }
    }

    #[test]
    fn a_stop_has_a_limit_in_synchronous_mode_alone() {
        let limit = |text: &str| read(text).stop_limit().map(|limit| limit.as_secs());
        assert_eq!(limit(r#"{"synchronous_mode":true,"primary_stop_timeout":7}"#), Some(7));
        assert_eq!(limit(r#"{"synchronous_mode":"quorum","master_stop_timeout":7}"#), Some(7));
        assert_eq!(limit(r#"{"primary_stop_timeout":7}"#), None);
        assert_eq!(limit(r#"{"synchronous_mode":true,"primary_stop_timeout":0}"#), None);
        assert_eq!(limit(r#"{"synchronous_mode":true}"#), None);
    }

    #[test]
    fn a_patch_merges_objects_and_null_deletes() {
        let mut config = read(r#"{"ttl":30,"postgresql":{"parameters":{"a":1,"b":2}}}"#).raw;
        let patch = read(r#"{"ttl":null,"postgresql":{"parameters":{"a":null,"c":3}}}"#).raw;
        assert!(merge_patch(&mut config, &patch));
        assert_eq!(
            serde_json::to_string(&config).unwrap(),
            r#"{"postgresql":{"parameters":{"b":2,"c":3}}}"#
        );
        assert!(!merge_patch(&mut config, &read(r#"{"postgresql":{"parameters":{"b":2}}}"#).raw));
        let slots = read(r#"{"slots":{"x":null,"y":null}}"#).raw;
        assert!(merge_patch(&mut config, &slots));
        assert_eq!(config.get("slots"), slots.get("slots"));
        assert!(merge_patch(&mut config, &read(r#"{"slots":{"x":null,"z":null}}"#).raw));
        let slots = ClusterConfig::from_json(config).permanent_slots();
        assert!(matches!(&*slots, [only] if only.name == "y"), "{slots:?}");
    }

    #[test]
    fn a_standby_cluster_says_where_its_log_comes_from() {
        let remote = |text: &str| {
            let section = read(&format!(r#"{{"standby_cluster":{text}}}"#)).standby_cluster;
            section.map(|section| section.remote)
        };
        assert_eq!(remote("{}"), None);
        assert_eq!(remote(r#"{"primary_slot_name":"x"}"#), None);
        assert_eq!(remote(r#"{"host":"h"}"#), Some(Some(("h".to_owned(), 5432))));
        assert_eq!(remote(r#"{"host":"h","port":"6000"}"#), Some(Some(("h".to_owned(), 6000))));
        assert_eq!(remote(r#"{"restore_command":"cp x"}"#), Some(None));
        let config = read(r#"{"synchronous_mode":true,"standby_cluster":{"port":1}}"#);
        assert_eq!(config.sync_mode(), SyncMode::Off);
    }

    #[test]
    fn durations_may_have_units() {
        assert_eq!(
            read(r#"{"member_slots_ttl":"2h"}"#).member_slots_ttl,
            Duration::from_secs(7200)
        );
    }
}

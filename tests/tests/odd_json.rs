//! Values in the store may be anything: no value of a key ends an agent or a proxy, and none that makes no
//! sense counts as a default.

use kornak_cluster::config::{merge_patch, problems};
use kornak_cluster::known::SafetyKey;
use kornak_cluster::topology::Group;
use kornak_cluster::{ClusterConfig, GroupId, Known, LeaseId, RaftTerm, Revision, Scope, Topology};
use kornak_dcs::keys::Keys;
use kornak_dcs::{KeyValue, Reach, View};
use kornak_proxy::background::topology::{merge, read};
use proptest::prelude::*;
use serde_json::Value;

/// Words that some decoder looks for, and that a number may be written as.
const WORDS: [&str; 40] = [
    "ttl",
    "loop_wait",
    "retry_timeout",
    "maximum_lag_on_failover",
    "synchronous_mode",
    "quorum",
    "pause",
    "failsafe_mode",
    "standby_cluster",
    "host",
    "port",
    "slots",
    "type",
    "logical",
    "database",
    "plugin",
    "ignore_slots",
    "member_slots_ttl",
    "postgresql",
    "parameters",
    "use_slots",
    "leader",
    "sync_standby",
    "member",
    "scheduled_at",
    "optime",
    "state",
    "role",
    "conn_url",
    "api_url",
    "postgres://[::1",
    "tags",
    "failover_priority",
    "nan",
    "-inf",
    "1e999",
    "30min",
    "primary",
    "phase",
    "99999999999999999999d",
];

fn word() -> impl Strategy<Value = String> {
    prop_oneof![
        4 => proptest::sample::select(WORDS.as_slice()).prop_map(str::to_owned),
        1 => "\\PC{0,8}"
    ]
}

fn json() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<u64>().prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        word().prop_map(Value::from),
    ];
    leaf.prop_recursive(3, 32, 8, |inner| {
        prop_oneof![
            proptest::collection::vec(inner.clone(), 0..5).prop_map(Value::from),
            proptest::collection::vec((word(), inner), 0..8)
                .prop_map(|pairs| Value::Object(pairs.into_iter().collect())),
        ]
    })
}

/// Text that is JSON, or nearly.
fn text() -> impl Strategy<Value = String> {
    prop_oneof![
        6 => json().prop_map(|value| value.to_string()),
        1 => json().prop_map(|value| value.to_string().replacen('}', ",}", 1)),
        1 => "\\PC{0,20}"
    ]
}

const KEYS: [&str; 14] = [
    "initialize",
    "config",
    "leader",
    "members/a",
    "members/b",
    "status",
    "sync",
    "history",
    "failover",
    "failsafe",
    "kornak/handover",
    "kornak/handover/acks/p",
    "kornak/proxies/p",
    "kornak/unfenced",
];

fn view_of(revision: Revision, values: &[(usize, String)]) -> View {
    let keys = values.iter().map(|(at, value)| {
        let key = format!("/service/odd/{}", KEYS[at % KEYS.len()]);
        let found = KeyValue {
            key: key.clone(),
            value: value.clone(),
            create_revision: revision,
            mod_revision: revision,
            lease: LeaseId::NONE,
        };
        (key, found)
    });
    View { store: 1, revision, raft_term: RaftTerm(1), reach: Reach::Live, keys: keys.collect() }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1500, ..ProptestConfig::default() })]

    #[test]
    fn no_configuration_panics_and_whatever_passes_the_check_is_read(value in json(), patch in json()) {
        let config = ClusterConfig::parse(&value.to_string());
        if let Value::Object(raw) = &value {
            let found = problems(raw);
            prop_assert_eq!(config.is_none(), found.iter().any(|problem| problem.decides));
            let config = ClusterConfig::from_json(raw.clone());
            prop_assert!(config.loop_wait + 2 * config.retry_timeout <= config.ttl + config.ttl);
            prop_assert!(config.ttl.as_secs() >= 4);
            let _ = (config.permanent_slots(), config.ignored_slots(), config.use_slots());
            let last = ClusterConfig::parse(r#"{"ttl":20}"#);
            let repaired = config.repaired(last.as_ref());
            prop_assert!(problems(&repaired.raw).is_empty());
            if let Value::Object(patch) = &patch {
                merge_patch(&mut raw.clone(), patch);
            }
        } else {
            prop_assert!(config.is_none());
        }
    }

    #[test]
    fn no_value_of_any_key_panics_and_the_last_good_ones_stay(
        values in proptest::collection::vec((0..KEYS.len(), text()), 0..8),
    ) {
        let scope = Scope::new("service", "odd", None);
        let keys = Keys::new(&scope);
        let good = view_of(Revision(5), &[
            (0, "7".to_owned()),
            (1, r#"{"synchronous_mode":true,"failsafe_mode":true,"pause":true}"#.to_owned()),
            (2, "a".to_owned()),
            (6, r#"{"leader":"a","sync_standby":"b"}"#.to_owned()),
            (9, r#"{"a":"","b":""}"#.to_owned()),
        ]);
        let mut known = Known::default();
        let mut before = keys.state(&good);
        known.fill(&mut before, Some("7"));
        let odd = view_of(Revision(6), &values);
        let raw = keys.state(&odd);
        let mut state = raw.clone();
        known.fill(&mut state, Some("7"));
        prop_assert!(state.config.is_some() && state.initialize.is_some());
        if raw.config.is_none() {
            prop_assert_eq!(&state.config, &before.config);
        }
        for key in [SafetyKey::Sync, SafetyKey::Failsafe, SafetyKey::Handover, SafetyKey::Config] {
            prop_assert!(!state.is_unknown(key), "{}", key);
        }
        let _ = (state.timeline(), state.only_kornak(), Group::from_state(GroupId(0), &state));
        let (new, _) = read(&scope, &odd);
        let _ = merge(&read(&scope, &good).0, new.clone(), false);
        let _ = merge(&new, Topology::default(), true);
    }
}

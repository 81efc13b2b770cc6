//! No body, whatever it says, ends a request otherwise than by an answer.

use std::sync::LazyLock;

use proptest::prelude::*;

use super::*;

/// Words that some decoder looks for, and that a number may be written as.
const WORDS: [&str; 23] = [
    "ttl",
    "loop_wait",
    "timeout",
    "schedule",
    "scheduled_at",
    "leader",
    "candidate",
    "member",
    "name",
    "type",
    "group",
    "kornak",
    "hold_ms",
    "promise_ms",
    "epoch",
    "before_demote",
    "nan",
    "-inf",
    "1e999",
    "30min",
    "role",
    "postgres_version",
    "restart_pending",
];

fn word() -> impl Strategy<Value = String> {
    prop_oneof![proptest::sample::select(WORDS.as_slice()).prop_map(str::to_owned), "\\PC{0,8}"]
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
    leaf.prop_recursive(3, 24, 6, |inner| {
        prop_oneof![
            proptest::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
            proptest::collection::vec((word(), inner), 0..6)
                .prop_map(|pairs| Value::Object(pairs.into_iter().collect())),
        ]
    })
}

/// Made once: certificates of the system are read for it.
static SETTINGS: LazyLock<ApiSettings> = LazyLock::new(settings);

proptest! {
    #![proptest_config(ProptestConfig { cases: 100, ..ProptestConfig::default() })]

    #[test]
    fn every_body_gets_an_answer(body in json()) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            for (method, path) in [
                ("PATCH", "/config"), ("PUT", "/config"), ("POST", "/switchover"), ("POST", "/failover"),
                ("POST", "/restart"), ("POST", "/reinitialize"), ("POST", "/failsafe"), ("POST", "/citus"),
                ("POST", "/mpp"), ("POST", "/kornak/checkpoint"), ("POST", "/reload"),
            ] {
                // Commands are dropped without an answer.
                let node = node(standby(), SETTINGS.clone(), drop);
                let reply = node.send(request(method, path, Some(body.to_string()))).await;
                prop_assert!((200..600).contains(&reply.status));
            }
            Ok(())
        })?;
        let _ = crate::peers::PeerStatus::from_json(&body);
    }
}

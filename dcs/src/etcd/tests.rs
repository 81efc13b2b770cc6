//! Tests that need no etcd; the others are in `tests/tests/contract_etcd.rs`.

use super::*;

#[test]
fn a_password_is_not_in_debug_output() {
    let mut settings = EtcdSettings::new(vec!["127.0.0.1:2379".into()]);
    settings.user = Some(("kornak".into(), "hunter2".into()));
    let dcs = EtcdDcs::new(settings);
    assert!(!format!("{dcs:?}").contains("hunter2"));
}

#[test]
fn a_refusal_is_definite_only_in_etcds_own_words() {
    for (code, detail, meaning) in [
        (5, "etcdserver: requested lease not found", "Definite(LeaseLost)"),
        (11, "etcdserver: mvcc: required revision has been compacted", "Definite(Compacted)"),
        (7, "etcdserver: permission denied", "Definite(Denied"),
        (3, "etcdserver: authentication failed, invalid user ID or password", "Definite(Denied"),
        (3, "etcdserver: user name is empty", "Definite(Denied"),
        (3, "etcdserver: duplicate key given in txn request", "Definite(Refused"),
        (8, "etcdserver: mvcc: database space exceeded", "Definite(Full"),
        (14, "etcdserver: no leader", "NotDone"),
        (8, "etcdserver: too many requests", "NotDone"),
        (16, "etcdserver: invalid auth token", "Stale"),
        (3, "etcdserver: revision of auth store is old", "Stale"),
        (14, "etcdserver: request timed out", "none"),
        (14, "etcdserver: leader changed", "none"),
        (14, "etcdserver: server stopped", "none"),
        (11, "decoded message length too large: the answer was there", "none"),
        (14, "transport error", "none"),
    ] {
        let found = convert::refusal(code, detail);
        let found = found.map_or("none".to_owned(), |failure| format!("{failure:?}"));
        assert!(found.starts_with(meaning), "{detail}: {found}, not {meaning}");
    }
}

#[test]
fn rounds_are_apart_but_never_long() {
    for round in 0..40 {
        let pause = backoff(round);
        assert!(pause >= Duration::from_millis(50) && pause <= Duration::from_secs(1), "{pause:?}");
    }
}

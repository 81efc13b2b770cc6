//! What can be said without an etcd; the rest is `tests/tests/contract_etcd.rs`.

use super::*;

#[test]
fn a_password_is_not_in_debug_output() {
    let mut settings = EtcdSettings::new(vec!["127.0.0.1:2379".into()]);
    settings.user = Some(("kornak".into(), "hunter2".into()));
    let dcs = EtcdDcs::new(settings);
    assert!(!format!("{dcs:?}").contains("hunter2"));
}

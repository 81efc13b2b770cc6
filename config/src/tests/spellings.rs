//! Spellings that Patroni takes and that are seldom written.

use super::*;
use crate::agent::ReplicaMethod;
use crate::store::StoreSettings;

#[test]
fn a_method_without_a_section_is_the_name_of_a_program() {
    for section in ["", "  from_tape: {no_params: true}\n"] {
        let methods =
            format!("  create_replica_methods: [from_tape, basebackup]\n{section}  data_dir:");
        let text = changed(AGENT, "  data_dir:", &methods);
        let found = agent(&text).settings.postgresql.create_replica_methods;
        let [ReplicaMethod::Custom { command, no_params, .. }, ReplicaMethod::Basebackup { .. }] =
            &found[..]
        else {
            panic!("{found:?}")
        };
        assert_eq!((command.as_str(), *no_params), ("from_tape", !section.is_empty()));
    }
}

#[test]
fn a_proxy_of_the_store_goes_before_its_members() {
    let hosts = "etcd3:\n  hosts: [10.0.0.1:2379, 10.0.0.2]\n";
    for others in
        ["", "  hosts: [10.0.0.1:2379]\n", "  host: 10.0.0.1\n", "  url: http://10.0.0.1:1\n"]
    {
        let proxy = format!("etcd3:\n  proxy: https://gateway:4001\n{others}");
        let StoreSettings::Etcd3(etcd) = agent(&changed(AGENT, hosts, &proxy)).settings.store
        else {
            panic!("{proxy}")
        };
        let named: Vec<String> = etcd.hosts.iter().map(ToString::to_string).collect();
        assert_eq!((named, etcd.protocol), (vec!["gateway:4001".to_owned()], Scheme::Https));
    }
}

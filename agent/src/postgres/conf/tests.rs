use serde_json::json;

use super::*;

fn map(value: &Value) -> Parameters {
    parameters(value.as_object())
}

#[test]
fn values_are_written_as_postgresql_reads_them() {
    let given = map(&json!({
        "A": true, "b": false, "c": 7, "d": 1.5, "e": "it's", "f": null, "g": [1], "h i": 1,
        "citus.x": "y", "1z": 1,
    }));
    let expected =
        [("a", "on"), ("b", "off"), ("c", "7"), ("citus.x", "y"), ("d", "1.5"), ("e", "it's")];
    assert_eq!(given, expected.map(|(n, v)| (n.to_owned(), v.to_owned())).into());
}

#[test]
fn nothing_escapes_its_quotes() {
    for (value, quoted) in [
        ("", "''"),
        ("a b", "'a b'"),
        ("it's", "'it''s'"),
        (r"a\'b", r"'a\\''b'"),
        ("a'\nport = 1", "'a'' port = 1'"),
    ] {
        assert_eq!(quote(value), quoted);
    }
}

#[test]
fn what_was_written_is_read_back() {
    let given = map(&json!({"a": "it's", "b": r"C:\x", "c": "", "primary_conninfo": "a=b c='d'"}));
    let text = render(Some(Path::new("postgresql.base.conf")), &given);
    assert!(text.contains("\ninclude 'postgresql.base.conf'\n"), "{text}");
    assert_eq!(read_rendered(&text), given);
}

#[test]
fn controlled_parameters_are_the_stores_alone() {
    let dynamic = map(&json!({
        "max_connections": 10, "max_wal_senders": "x", "wal_level": "minimal", "hot_standby": "off",
        "wal_log_hints": false, "max_worker_processes": 16, "track_commit_timestamp": "on",
    }));
    let chosen = controlled(&dynamic, None);
    for (name, value) in [
        ("max_connections", "25"),
        ("max_wal_senders", "10"),
        ("wal_level", "replica"),
        ("hot_standby", "on"),
        ("wal_log_hints", "on"),
        ("max_worker_processes", "16"),
        ("track_commit_timestamp", "on"),
        ("max_replication_slots", "10"),
    ] {
        assert_eq!(chosen[name], value, "{name}");
    }
    let local =
        map(&json!({"max_connections": 500, "work_mem": "8MB", "port": 1, "wal_keep_size": 1}));
    let filed = filed(&map(&json!({"work_mem": "4MB", "jit": "off"})), &local, &Parameters::new());
    assert_eq!(filed.get("max_connections"), None);
    assert_eq!(filed.get("port"), None);
    assert_eq!(filed["work_mem"], "8MB");
    assert_eq!(filed["jit"], "off");
    assert_eq!(filed["wal_keep_size"], "128MB");
    assert_eq!(filed["wal_retrieve_retry_interval"], "500ms");
}

#[test]
fn old_names_become_those_of_the_versions_that_are_supported() {
    let old =
        json!({"wal_keep_segments": 100, "trigger_file": "/t", "pause_at_recovery_target": false});
    let named = parameters(old.as_object());
    assert_eq!(named.get("wal_keep_segments"), None);
    assert_eq!(named["wal_keep_size"], "1600MB");
    assert_eq!(named["promote_trigger_file"], "/t");
    assert_eq!(named["recovery_target_action"], "promote");
    let both = map(&json!({"wal_keep_segments": 100, "wal_keep_size": "1GB"}));
    assert_eq!(both["wal_keep_size"], "1GB");
    let ends = map(
        &json!({"recovery_target_time": "2020-01-01", "trigger_file": "/t", "data_directory": "/d",
            "restore_command": "cp"}),
    );
    let filed = filed(&ends, &ends, &Parameters::new());
    for never in ["recovery_target_time", "promote_trigger_file", "data_directory"] {
        assert_eq!(filed.get(never), None, "{never}");
    }
    assert_eq!(filed["restore_command"], "cp");
}

#[test]
fn no_line_of_the_original_ends_a_standbys_recovery() {
    let original = "# recovery_target_xid = '7'\nwork_mem = 4MB\n Recovery_Target='immediate'\n\
                    recovery_target_action = promote\npromote_trigger_file '/tmp/t'\nrecovery_target_timeline=1\n";
    let undone = endless(original);
    let names: Vec<&str> = undone.keys().map(String::as_str).collect();
    assert_eq!(names, ["promote_trigger_file", "recovery_target"]);
    assert!(undone.values().all(String::is_empty));
}

#[test]
fn overrides_win_and_an_explicit_retry_interval_stays() {
    let dynamic =
        map(&json!({"wal_retrieve_retry_interval": "2s", "shared_preload_libraries": "x"}));
    let overrides = map(&json!({"shared_preload_libraries": "citus,x"}));
    let filed = filed(&dynamic, &Parameters::new(), &overrides);
    assert_eq!(filed["wal_retrieve_retry_interval"], "2s");
    assert_eq!(filed["shared_preload_libraries"], "citus,x");
}

#[test]
fn recovery_is_taken_out_of_the_automatic_file() {
    let text = "# x\nprimary_conninfo = 'a'\nwork_mem = '4MB'\n restore_command='b'\n";
    assert_eq!(clean_auto_conf(text, false).as_deref(), Some("# x\nwork_mem = '4MB'\n"));
    assert_eq!(clean_auto_conf("work_mem = '4MB'\n", true), None);
}

#[test]
fn the_names_that_commits_wait_for_and_what_the_server_cannot_read_leave_the_automatic_file() {
    let names = "synchronous_standby_names = 'nobody'\n";
    assert_eq!(clean_auto_conf(names, true).as_deref(), Some(""));
    assert_eq!(clean_auto_conf(names, false), None, "the operator's");
    for good in ["a.b = 'x''y\\' z' # why\n", "  fsync off\n", "port=5\n", "\n", "x = '\u{e9}'\n"] {
        assert_eq!(clean_auto_conf(good, true), None, "{good:?}");
    }
    for odd in ["\0\u{ff}{{{ = = 'x\n", "x = 'open\n", "x\n", "= 'y'\n", "x = 'a' b\n", "1x = 2\n"]
    {
        let text = format!("{odd}work_mem = '4MB'\n");
        assert_eq!(clean_auto_conf(&text, true).as_deref(), Some("work_mem = '4MB'\n"), "{odd:?}");
    }
}

#[test]
fn the_connection_to_the_primary_has_no_password_in_it() {
    let mut credentials = Credentials::new("re'pl", Some("secret".into()));
    credentials.sslmode = Some("require".into());
    let upstream = Upstream::new("10.0.0.1", 5433, Some("a".into()));
    let conninfo = primary_conninfo(&credentials, "node b", Path::new("/p"), &upstream, "app");
    assert_eq!(
        conninfo,
        r"user='re\'pl' host=10.0.0.1 port=5433 passfile=/p sslmode=require dbname=app application_name='node b'"
    );
    // In another cluster the bare name is that cluster's member's.
    let elsewhere = Upstream { application: Some("dr:node b".into()), ..upstream };
    let conninfo =
        primary_conninfo(&credentials, "node b", Path::new("/p"), &elsewhere, "postgres");
    assert!(conninfo.ends_with("application_name='dr:node b'"), "{conninfo}");
}

#[test]
fn a_password_file_escapes_what_parts_its_fields() {
    assert_eq!(passfile(&[("a:b", r"p\w:d"), ("c", "d")]), "*:*:*:a\\:b:p\\\\w\\:d\n*:*:*:c:d\n");
}

#[test]
fn rules_without_a_line_for_sockets_get_those_of_initdb() {
    let initdbs =
        "# x\nlocal  all all trust\nhost all all 127.0.0.1/32 trust\nlocal replication all peer\n";
    let lines = |text: &str| text.split('|').map(str::to_owned).collect::<Vec<_>>();
    for (given, expected) in [
        (
            "host all all all md5",
            "local  all all trust|local replication all peer|host all all all md5",
        ),
        (
            "#local x|localhost",
            "local  all all trust|local replication all peer|#local x|localhost",
        ),
        (
            "\tlocal all app reject|host all all all md5",
            "\tlocal all app reject|host all all all md5",
        ),
    ] {
        assert_eq!(with_socket_lines(&lines(given), initdbs), lines(expected), "{given}");
    }
}

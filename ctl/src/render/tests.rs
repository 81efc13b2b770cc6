//! Golden strings: what patronictl 4.1.5 printed for the same clusters.

use kornak_cluster::{GroupId, HistoryEntry, Tags};
use serde_json::json;

use super::*;
use crate::view::Scheduled;

fn member(name: &str, role: &str, port: u16) -> MemberView {
    let leads = role == "leader";
    let position =
        || (!leads).then(|| Position { lsn: "0/4060818".to_owned(), lag_bytes: Some(0) });
    MemberView {
        name: name.to_owned(),
        role: role.to_owned(),
        state: if leads { "running" } else { "streaming" }.to_owned(),
        host: "127.0.0.1".to_owned(),
        port: Some(port),
        timeline: Some(1),
        receive: position(),
        replay: position(),
        ..MemberView::default()
    }
}

fn group() -> GroupView {
    GroupView {
        initialize: Some("7711116309192622882".to_owned()),
        members: vec![member("pg0", "leader", 25430), member("pg1", "replica", 25431)],
        ..GroupView::default()
    }
}

fn cluster(groups: Vec<GroupView>) -> ClusterView {
    let citus = groups.iter().any(|group| group.group.is_some());
    ClusterView { name: "demo".to_owned(), citus, groups, registration: None }
}

fn check(cluster: &ClusterView, format: Format, expected: &str) {
    let found = members(cluster, false, format);
    assert_eq!(found, expected.trim_matches('\n'), "\n{found}\n");
}

#[test]
fn the_title_lies_in_the_upper_border() {
    check(
        &cluster(vec![group()]),
        Format::Pretty,
        "
+ Cluster: demo (7711116309192622882) -----------+----+-------------+-----+------------+-----+
| Member | Host            | Role    | State     | TL | Receive LSN | Lag | Replay LSN | Lag |
+--------+-----------------+---------+-----------+----+-------------+-----+------------+-----+
| pg0    | 127.0.0.1:25430 | Leader  | running   |  1 |             |     |            |     |
| pg1    | 127.0.0.1:25431 | Replica | streaming |  1 |   0/4060818 |   0 |  0/4060818 |   0 |
+--------+-----------------+---------+-----------+----+-------------+-----+------------+-----+
",
    );
}

#[test]
fn columns_appear_when_somebody_needs_them() {
    let mut group = group();
    group.members[1].pending_restart = true;
    group.members[1].pending_restart_reason =
        vec![("max_connections".to_owned(), "50".to_owned(), "60".to_owned())];
    group.members[1].tags = Tags(json!({"clonefrom": true, "a": 1}).as_object().unwrap().clone());
    group.members[1].replay = Some(Position { lsn: "unknown".to_owned(), lag_bytes: None });
    group.pause = true;
    check(
        &cluster(vec![group]),
        Format::Pretty,
        "
+ Cluster: demo (7711116309192622882) -----------+----+-------------+-----+------------+-----+-----------------+-------------------------+-----------------+
| Member | Host            | Role    | State     | TL | Receive LSN | Lag | Replay LSN | Lag | Pending restart | Pending restart reason  | Tags            |
+--------+-----------------+---------+-----------+----+-------------+-----+------------+-----+-----------------+-------------------------+-----------------+
| pg0    | 127.0.0.1:25430 | Leader  | running   |  1 |             |     |            |     |                 |                         |                 |
+--------+-----------------+---------+-----------+----+-------------+-----+------------+-----+-----------------+-------------------------+-----------------+
| pg1    | 127.0.0.1:25431 | Replica | streaming |  1 |   0/4060818 |   0 |    unknown |     | *               | max_connections: 50->60 | a: 1            |
|        |                 |         |           |    |             |     |            |     |                 |                         | clonefrom: true |
+--------+-----------------+---------+-----------+----+-------------+-----+------------+-----+-----------------+-------------------------+-----------------+
 Maintenance mode: on
",
    );
}

#[test]
fn a_scheduled_switchover_is_told_below_the_table() {
    let mut group = group();
    group.members.truncate(1);
    group.members[0].port = Some(5432);
    group.initialize = Some(String::new());
    group.scheduled = Some(Scheduled {
        at: "2027-01-01T00:00:00+00:00".to_owned(),
        from: Some("pg0".to_owned()),
        to: Some("pg1".to_owned()),
    });
    check(
        &cluster(vec![group]),
        Format::Pretty,
        "
+ Cluster: demo (initializing) ---------+----+-------------+-----+------------+-----+
| Member | Host      | Role   | State   | TL | Receive LSN | Lag | Replay LSN | Lag |
+--------+-----------+--------+---------+----+-------------+-----+------------+-----+
| pg0    | 127.0.0.1 | Leader | running |  1 |             |     |            |     |
+--------+-----------+--------+---------+----+-------------+-----+------------+-----+
 Switchover scheduled at: 2027-01-01T00:00:00+00:00
                    from: pg0
                      to: pg1
",
    );
}

#[test]
fn citus_groups_share_one_table() {
    let numbered = |number| {
        let mut group = GroupView { group: Some(GroupId(number)), ..group() };
        group.members.truncate(1);
        group.members[0].host = format!("10.0.0.{number}");
        group.members[0].port = Some(5432);
        group.pause = number == 1;
        group
    };
    check(
        &cluster(vec![numbered(0), numbered(1)]),
        Format::Pretty,
        "
+ Citus cluster: demo ------+--------+---------+----+-------------+-----+------------+-----+
| Group | Member | Host     | Role   | State   | TL | Receive LSN | Lag | Replay LSN | Lag |
+-------+--------+----------+--------+---------+----+-------------+-----+------------+-----+
|     0 | pg0    | 10.0.0.0 | Leader | running |  1 |             |     |            |     |
|     1 | pg0    | 10.0.0.1 | Leader | running |  1 |             |     |            |     |
+-------+--------+----------+--------+---------+----+-------------+-----+------------+-----+
Citus group: 1
 Maintenance mode: on
",
    );
    check(
        &cluster(vec![numbered(0)]),
        Format::Pretty,
        "
+ Citus cluster: demo (group: 0, 7711116309192622882) ----+-----+------------+-----+
| Member | Host     | Role   | State   | TL | Receive LSN | Lag | Replay LSN | Lag |
+--------+----------+--------+---------+----+-------------+-----+------------+-----+
| pg0    | 10.0.0.0 | Leader | running |  1 |             |     |            |     |
+--------+----------+--------+---------+----+-------------+-----+------------+-----+
",
    );
}

#[test]
fn whether_the_citus_metadata_agree_is_said_below_the_table() {
    let check = |registration: &str, expected: &[&str]| {
        let mut cluster = cluster(vec![GroupView { group: Some(GroupId(0)), ..group() }]);
        cluster.registration = serde_json::from_str(registration).ok();
        assert!(cluster.registration.is_some(), "{registration}");
        let text = members(&cluster, false, Format::Pretty);
        let notes: Vec<&str> = text.lines().filter(|line| line.starts_with(' ')).collect();
        assert_eq!(notes, expected);
    };
    check(
        r#"{"member":"pg0","databases":{"citus":{"agrees":true,"synced":true}}}"#,
        &[" Citus metadata: citus agrees"],
    );
    check(
        r#"{"member":"pg0","databases":{"a":{"agrees":true},"b":{"agrees":false,"since":"2027-01-01T00:00:00Z","differences":["group 1 is not registered"]}}}"#,
        &[
            " Citus metadata: a agrees, not yet on every node",
            " Citus metadata: b has not agreed since 2027-01-01T00:00:00Z: group 1 is not registered",
        ],
    );
    check(
        r#"{"member":"pg9","databases":{"a":{"agrees":true}}}"#,
        &[" Citus metadata: unknown since pg9 leads the coordinator no more"],
    );
}

#[test]
fn machines_get_json_yaml_and_tsv() {
    let mut group = group();
    group.members[1].tags = Tags(json!({"nosync": true}).as_object().unwrap().clone());
    let cluster = cluster(vec![group]);
    check(
        &cluster,
        Format::Json,
        r#"[{"Cluster": "demo", "Member": "pg0", "Host": "127.0.0.1:25430", "Role": "Leader", "State": "running", "TL": 1}, {"Cluster": "demo", "Member": "pg1", "Host": "127.0.0.1:25431", "Role": "Replica", "State": "streaming", "TL": 1, "Receive LSN": "0/4060818", "Receive Lag": 0, "Replay LSN": "0/4060818", "Replay Lag": 0, "Tags": {"nosync": true}}]"#,
    );
    check(
        &cluster,
        Format::Tsv,
        "
Cluster\tMember\tHost\tRole\tState\tTL\tReceive LSN\tReceive Lag\tReplay LSN\tReplay Lag\tTags
demo\tpg0\t127.0.0.1:25430\tLeader\trunning\t1\t\t\t\t\t
demo\tpg1\t127.0.0.1:25431\tReplica\tstreaming\t1\t0/4060818\t0\t0/4060818\t0\t{nosync: true}
",
    );
    let text = members(&cluster, false, Format::Yaml);
    assert!(
        text.starts_with("- Cluster: demo\n  Host: 127.0.0.1:25430\n  Member: pg0\n"),
        "{text}"
    );
}

#[test]
fn an_empty_cluster_is_a_table_without_rows() {
    check(
        &cluster(vec![GroupView::default()]),
        Format::Pretty,
        "
+ Cluster: demo (uninitialized) ----+-------------+-----+------------+-----+
| Member | Host | Role | State | TL | Receive LSN | Lag | Replay LSN | Lag |
+--------+------+------+-------+----+-------------+-----+------------+-----+
+--------+------+------+-------+----+-------------+-----+------------+-----+
",
    );
}

#[test]
fn history_is_a_table_too() {
    let entries = HistoryEntry::parse_list(
        r#"[[1,67553520,"no recovery target specified","2026-11-22T22:05:55.870877+00:00","pg1"],[2,67755424,"no recovery target specified"]]"#,
    );
    assert_eq!(
        history(&entries, Format::Pretty),
        "\
+----+----------+------------------------------+----------------------------------+------------+
| TL |      LSN | Reason                       | Timestamp                        | New Leader |
+----+----------+------------------------------+----------------------------------+------------+
|  1 | 67553520 | no recovery target specified | 2026-11-22T22:05:55.870877+00:00 | pg1        |
|  2 | 67755424 | no recovery target specified |                                  |            |
+----+----------+------------------------------+----------------------------------+------------+"
    );
}

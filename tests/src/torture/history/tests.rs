use super::*;

fn at(second: u64) -> Duration {
    Duration::from_secs(second)
}

fn unit(span: (u64, u64), outcome: Outcome, steps: Vec<Step>) -> Unit {
    Unit { began: at(span.0), ended: at(span.1), steps, outcome }
}

fn append(span: (u64, u64), number: Number, outcome: Outcome) -> Unit {
    unit(span, outcome, vec![Step::Append(1, number)])
}

fn read(span: (u64, u64), seen: &[Number]) -> Unit {
    unit(span, Outcome::Acknowledged, vec![Step::Read(1, Some(seen.to_vec()))])
}

fn kinds(units: &[Unit], list: &[Number]) -> Vec<&'static str> {
    let lists = Lists::from([(1, list.to_vec())]);
    check(units, &lists).iter().map(Anomaly::kind).collect()
}

#[test]
fn a_history_without_faults_has_no_anomaly() {
    let units = [
        append((0, 1), 10, Outcome::Acknowledged),
        read((2, 3), &[10]),
        append((3, 5), 11, Outcome::Unknown),
        append((3, 5), 12, Outcome::Denied),
        read((4, 6), &[10, 11]),
    ];
    assert_eq!(kinds(&units, &[10, 11]), [""; 0]);
}

#[test]
fn what_was_acknowledged_is_missed() {
    let units = [append((0, 1), 10, Outcome::Acknowledged)];
    assert_eq!(kinds(&units, &[]), ["lost"]);
}

#[test]
fn an_append_that_was_executed_twice_is_seen() {
    let units = [append((0, 1), 10, Outcome::Acknowledged)];
    assert_eq!(kinds(&units, &[10, 10]), ["duplicated"]);
}

#[test]
fn a_denied_append_that_is_there_is_seen() {
    let units = [append((0, 1), 10, Outcome::Denied)];
    assert_eq!(kinds(&units, &[10]), ["executed though denied"]);
}

#[test]
fn a_number_of_nobody_is_strange() {
    assert_eq!(kinds(&[], &[10]), ["strange"]);
}

#[test]
fn a_read_of_what_is_gone_at_the_end_is_seen() {
    let units = [append((0, 9), 10, Outcome::Unknown), read((1, 2), &[10])];
    assert_eq!(kinds(&units, &[]), ["read, then taken back"]);
}

#[test]
fn a_read_in_another_order_is_seen() {
    let units = [
        append((0, 9), 10, Outcome::Unknown),
        append((0, 9), 11, Outcome::Unknown),
        read((1, 2), &[11, 10]),
    ];
    assert_eq!(kinds(&units, &[10, 11]), ["reordered"]);
}

#[test]
fn a_read_that_lacks_what_was_acknowledged_before_is_stale() {
    let units = [append((0, 1), 10, Outcome::Acknowledged), read((2, 3), &[])];
    assert_eq!(kinds(&units, &[10]), ["stale read"]);
    // The append was acknowledged while the read was under way.
    let units = [append((0, 3), 10, Outcome::Acknowledged), read((2, 4), &[])];
    assert_eq!(kinds(&units, &[10]), [""; 0]);
}

#[test]
fn transactions_that_each_miss_the_others_append_are_a_cycle() {
    let skew = |mine: Key, number, other: Key| {
        let steps = vec![Step::Read(other, Some(Vec::new())), Step::Append(mine, number)];
        unit((0, 9), Outcome::Acknowledged, steps)
    };
    let units = [skew(1, 10, 2), skew(2, 20, 1)];
    let lists = Lists::from([(1, vec![10]), (2, vec![20])]);
    assert_eq!(check(&units, &lists), [Anomaly::Cycle { units: 2 }]);
}

#[test]
fn a_transaction_sees_its_own_append() {
    let steps = vec![Step::Append(1, 10), Step::Read(1, Some(vec![10]))];
    let units = [unit((0, 1), Outcome::Acknowledged, steps)];
    assert_eq!(kinds(&units, &[10]), [""; 0]);
    assert_eq!(kinds(&units, &[]), ["lost"]);
}

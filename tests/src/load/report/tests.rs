use super::*;

/// A run in which each unit took the next ids, all of them present unless said.
fn report(acknowledged: &[&[i64]], problems: &[(Fate, &[i64])]) -> Report {
    let mut client = ClientReport::new(0, Kind::Transaction);
    client.acknowledged = acknowledged.iter().map(|ids| ids.to_vec()).collect();
    for (fate, ids) in problems {
        client.problem(Problem {
            at: Duration::ZERO,
            began: Duration::ZERO,
            doing: Doing::Commit,
            sqlstate: None,
            message: String::new(),
            lost_connection: false,
            fate: *fate,
            ids: ids.to_vec(),
        });
    }
    Report { clients: vec![client], lasted: Duration::from_secs(1), ids: 0..100 }
}

fn judge(report: &Report, present: &[i64]) -> Verdict {
    report.judge(&present.iter().copied().collect())
}

#[test]
fn rows_of_acknowledged_and_of_unknown_units_may_be_there() {
    let verdict = judge(&report(&[&[1, 2]], &[(Fate::Unknown, &[3, 4])]), &[1, 2, 3, 4]);
    assert!(verdict.is_clean(), "{verdict}");
    assert_eq!((verdict.acknowledged, verdict.unknown_present), (2, 2));
}

#[test]
fn an_acknowledged_row_that_is_not_there_is_missing() {
    let verdict = judge(&report(&[&[1], &[2]], &[]), &[2]);
    assert_eq!(verdict.missing, [1]);
    assert!(!verdict.is_clean());
}

#[test]
fn half_a_transaction_is_torn() {
    let verdict = judge(&report(&[], &[(Fate::Unknown, &[3, 4])]), &[4]);
    assert_eq!(verdict.torn, [[3, 4]]);
}

#[test]
fn a_row_that_was_denied_must_not_be_there() {
    let verdict = judge(&report(&[], &[(Fate::NotExecuted, &[5])]), &[5]);
    assert_eq!(verdict.denied, [5]);
}

#[test]
fn a_row_of_nobody_is_strange() {
    assert_eq!(judge(&report(&[&[1]], &[]), &[1, 9]).strange, [9]);
}

#[test]
fn only_a_clear_no_is_a_no() {
    for (doing, sqlstate, fate) in [
        (Doing::Write, Some("08007"), Fate::Unknown),
        (Doing::Commit, Some("57P01"), Fate::Unknown),
        (Doing::Write, None, Fate::Unknown),
        (Doing::Waiting, None, Fate::Unknown),
        (Doing::Write, Some("57P03"), Fate::NotExecuted),
        (Doing::Commit, Some("40001"), Fate::NotExecuted),
        (Doing::InTransaction, None, Fate::NotExecuted),
        (Doing::Connect, None, Fate::NotExecuted),
    ] {
        assert_eq!(Fate::of(doing, sqlstate), fate, "{doing:?} {sqlstate:?}");
    }
}

#[test]
fn the_longest_gap_is_the_longest_of_any_client() {
    let mut report = report(&[], &[]);
    report.clients[0].gap(Duration::from_secs(3), Duration::from_millis(40));
    report.clients[0].gap(Duration::from_secs(5), Duration::from_millis(120));
    report.clients[0].gap(Duration::from_secs(9), Duration::from_millis(70));
    let gap = Gap { length: Duration::from_millis(120), at: Duration::from_secs(5) };
    assert_eq!(report.longest_gap(), gap);
    assert!(report.to_string().contains("120 ms"), "{report}");
}

use std::time::Duration;

use crate::ha::{Action, Job, Why};

use super::*;
use crate::ha::Decision;

#[test]
fn variants_become_words() {
    assert_eq!(words(&Action::StartPrimary, ' '), "start primary");
    assert_eq!(words(&Action::Clone { from: "Secret".to_owned() }, '_'), "clone");
    assert_eq!(words(&Why::TooFarBehind { lag_bytes: 5 }, '_'), "too_far_behind");
}

#[test]
fn decisions_are_counted_by_what_and_why() {
    let counters = Counters::default();
    let decision =
        Decision { action: Action::Lead, why: Why::Healthy, recheck: Duration::from_secs(1) };
    counters.decided(&decision);
    counters.decided(&decision);
    counters.step_failed(Job::Promote);
    let key = ("lead".to_owned(), "healthy".to_owned());
    assert_eq!(counters.decisions.lock().get(&key), Some(&2));
    assert_eq!(counters.failures.lock().get("promote"), Some(&1));
}

#[test]
fn values_are_printed_as_prometheus_reads_them() {
    assert_eq!(digits("4.1.5"), "040105");
    assert_eq!(escape("a\"b\\c\nd"), "a\\\"b\\\\c\\nd");
    assert_eq!(seconds(Some("1970-01-01 00:00:01.500000+00:00")), 1.5);
    assert_eq!(seconds(Some("nonsense")), 0.0);
}

#[test]
fn the_documentation_lists_every_metric_and_no_other() {
    let view = crate::api::tests::primary();
    let page = render(&view, &Counters::default(), Moment::at_millis(0));
    let kinds = page.lines().filter_map(|line| line.strip_prefix("# TYPE "));
    let mut shown: Vec<String> = kinds.map(|line| line.replacen(' ', "` | ", 1)).collect();
    let document = include_str!("../../../../docs/metrics.md");
    let mut listed: Vec<String> = document
        .lines()
        .filter_map(|line| line.strip_prefix("| `"))
        .filter(|line| line.starts_with("patroni_") || line.starts_with("kornak_agent_"))
        .map(|line| line.splitn(3, " | ").take(2).collect::<Vec<_>>().join(" | "))
        .collect();
    shown.sort();
    listed.sort();
    assert_eq!(shown, listed);
}

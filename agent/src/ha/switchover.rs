//! The judgements of a planned handover: who may be the candidate, when a drain may begin, and when
//! it has succeeded. The steps themselves are in `crate::handover`.

use std::collections::BTreeMap;
use std::time::Duration;

use kornak_cluster::{Ack, ClusterState, MemberState, Moment, ProxyRegistration, SyncMode};

use super::snapshot::{StandbyRow, walsender_of};

/// Why a switchover is refused, in Patroni's words where it has them.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    #[error("candidate does not exists")]
    Unknown,
    #[error("candidate name does not match with sync_standby")]
    NotSynchronous,
    #[error("switchover is not possible: no good candidates have been found")]
    NoneFit,
    #[error("switchover is not possible: cluster does not have members except leader")]
    Alone,
    #[error("candidate {name} is not streaming from the leader")]
    NotStreaming { name: String },
    #[error("candidate {name} is tagged nofailover")]
    NoFailover { name: String },
    #[error("candidate {name} is {lag_bytes} bytes behind")]
    Behind { name: String, lag_bytes: u64 },
    #[error("the configuration in the store makes no sense, and no good one is known")]
    ConfigUnknown,
    #[error("another handover is under way")]
    Busy,
    #[error("this node does not lead")]
    NotLeader,
}

/// Chooses the candidate, or judges the one that was asked for.
pub fn candidate(
    me: &str,
    cluster: &ClusterState,
    rows: &[StandbyRow],
    lsn: kornak_cluster::Lsn,
    asked: Option<&str>,
) -> Result<String, Refusal> {
    if let Some(name) = asked {
        if name == me || !cluster.members.contains_key(name) {
            return Err(Refusal::Unknown);
        }
        return fit(cluster, rows, lsn, name).map(|_| name.to_owned());
    }
    let others: Vec<&String> = cluster.members.keys().filter(|name| *name != me).collect();
    if others.is_empty() {
        return Err(Refusal::Alone);
    }
    let best = others
        .iter()
        .filter_map(|name| Some((fit(cluster, rows, lsn, name).ok()?, *name)))
        .min_by_key(|(lag, name)| {
            let priority =
                cluster.members.get(*name).map_or(0, |member| member.tags.failover_priority());
            (*lag, -priority, (*name).clone())
        });
    best.map(|(_, name)| name.clone()).ok_or(Refusal::NoneFit)
}

/// How far behind a fit candidate is, in bytes.
fn fit(
    cluster: &ClusterState,
    rows: &[StandbyRow],
    lsn: kornak_cluster::Lsn,
    name: &str,
) -> Result<u64, Refusal> {
    let config = cluster.config.clone().ok_or(Refusal::ConfigUnknown)?;
    let member = cluster.members.get(name).ok_or(Refusal::Unknown)?;
    if member.tags.nofailover() {
        return Err(Refusal::NoFailover { name: name.to_owned() });
    }
    if config.sync_mode() != SyncMode::Off
        && !cluster.sync.as_ref().is_some_and(|sync| sync.matches(name))
    {
        return Err(Refusal::NotSynchronous);
    }
    let row = walsender_of(rows, name, config.use_slots())
        .filter(|_| member.state == MemberState::Running)
        .ok_or_else(|| Refusal::NotStreaming { name: name.to_owned() })?;
    let lag_bytes = lsn.bytes_ahead_of(row.flush);
    if lag_bytes > config.maximum_lag_on_failover {
        return Err(Refusal::Behind { name: name.to_owned(), lag_bytes });
    }
    Ok(lag_bytes)
}

/// The sessions that a drain waits for, as the leader's own server tells.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Busy {
    /// Client backends that are not idle.
    pub backends: u32,
    /// Age of the oldest of their transactions.
    pub oldest: Duration,
}

/// A drain begins only when it can succeed: a transaction that has run for half of what clients may
/// be held would most likely outlast it, and everybody would have been held for nothing.
pub fn may_drain(busy: Busy, max_hold: Duration) -> bool {
    busy.backends == 0 || busy.oldest < max_hold / 2
}

/// State of a drain.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Gate {
    /// Nothing runs: the switch may be written.
    Open,
    /// Something still runs.
    Waiting,
    /// Clients have been held for as long as they may be.
    TimeUp,
}

/// Time that the transaction into `switch` needs before the proxies let go by themselves.
const WRITE_ALLOWANCE: Duration = Duration::from_millis(50);

/// Judges a drain. `began` is from before the record was written.
pub fn gate(
    now: Moment,
    began: Moment,
    max_hold: Duration,
    attempt: (&str, u32),
    proxies: &BTreeMap<String, ProxyRegistration>,
    acks: &BTreeMap<String, Ack>,
    busy: Busy,
) -> Gate {
    if now.since(began) + WRITE_ALLOWANCE >= max_hold {
        return Gate::TimeUp;
    }
    let acknowledged = |proxy: &String| {
        acks.get(proxy).is_some_and(|ack| (ack.id.as_str(), ack.attempt) == attempt)
    };
    let awaited = proxies.iter().filter(|(_, registered)| {
        registered.speaks.contains(&kornak_cluster::member::KORNAK_RECORDS_VERSION)
    });
    let all_told = awaited.map(|(name, _)| name).all(acknowledged);
    // A proxy that is gone, frozen or cut off says nothing, and one that has somebody at work shows in the
    // server: what the server says is the gate, an acknowledgement only makes it sooner sure.
    let heard_enough = all_told || now.since(began) >= max_hold / 2;
    if busy.backends == 0 && heard_enough { Gate::Open } else { Gate::Waiting }
}

/// Whether those proxies that say so have done what can be done before a drain.
pub fn have_prepared(
    handover: &str,
    proxies: &BTreeMap<String, ProxyRegistration>,
    acks: &BTreeMap<String, Ack>,
) -> bool {
    let said = |(name, registered): (&String, &ProxyRegistration)| {
        let obeys = registered.speaks.contains(&kornak_cluster::member::KORNAK_RECORDS_VERSION);
        !registered.prepares || !obeys || acks.get(name).is_some_and(|ack| ack.id == handover)
    };
    proxies.iter().all(said)
}

/// Pause after the `attempt`th drain failed: 1 s, 3 s, then 20 s.
pub fn pause_after(attempt: u32) -> Duration {
    match attempt {
        1 => Duration::from_secs(1),
        2 => Duration::from_secs(3),
        _ => Duration::from_secs(20),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use kornak_cluster::{ClusterConfig, Lsn, Member};

    fn cluster(config: &str, sync: &str) -> ClusterState {
        let member = |tags: &str| -> Member {
            serde_json::from_str(&format!(
                r#"{{"state":"running","role":"replica","tags":{tags}}}"#
            ))
            .unwrap()
        };
        let mut state = ClusterState {
            config: ClusterConfig::parse(config),
            sync: serde_json::from_str(sync).ok(),
            ..ClusterState::default()
        };
        state.members.insert("a".into(), member("{}"));
        state.members.insert("b".into(), member("{}"));
        state.members.insert("c".into(), member(r#"{"nofailover":true}"#));
        state.members.insert("d".into(), member(r#"{"failover_priority":5}"#));
        state
    }

    fn row(name: &str, flush: u64) -> StandbyRow {
        StandbyRow {
            application_name: name.into(),
            streaming: true,
            synchronous: false,
            flush: Lsn(flush),
            ..StandbyRow::default()
        }
    }

    #[test]
    fn the_candidate_must_be_able_to_take_over() {
        let plain = cluster("{}", "null");
        let rows = [row("b", 100), row("c", 100), row("d", 100)];
        let ask = |asked| candidate("a", &plain, &rows, Lsn(100), asked);
        assert_eq!(ask(Some("b")), Ok("b".into()));
        assert_eq!(ask(Some("a")), Err(Refusal::Unknown), "the leader itself");
        assert_eq!(ask(Some("x")), Err(Refusal::Unknown));
        assert_eq!(ask(Some("c")), Err(Refusal::NoFailover { name: "c".into() }));
        assert_eq!(ask(None), Ok("d".into()), "equal WAL: the priority decides");
        let behind = candidate("a", &plain, &[row("b", 0)], Lsn(2 << 20), Some("b"));
        assert_eq!(behind, Err(Refusal::Behind { name: "b".into(), lag_bytes: 2 << 20 }));
        let silent = candidate("a", &plain, &[], Lsn(100), Some("b"));
        assert_eq!(silent, Err(Refusal::NotStreaming { name: "b".into() }));
        assert_eq!(candidate("a", &plain, &[], Lsn(100), None), Err(Refusal::NoneFit));
    }

    #[test]
    fn in_synchronous_mode_only_a_synchronous_standby_is_a_candidate() {
        let sync = cluster(r#"{"synchronous_mode":true}"#, r#"{"leader":"a","sync_standby":"b"}"#);
        let rows = [row("b", 90), row("d", 100)];
        let ask = |asked| candidate("a", &sync, &rows, Lsn(100), asked);
        assert_eq!(ask(Some("d")), Err(Refusal::NotSynchronous));
        assert_eq!(ask(None), Ok("b".into()));
    }

    #[test]
    fn a_drain_waits_for_every_proxy_and_for_the_server_itself() {
        let hold = Duration::from_secs(1);
        let (began, now) = (Moment::at_millis(5_000), Moment::at_millis(5_200));
        let registration: ProxyRegistration = serde_json::from_str(r#"{"speaks":[1]}"#).unwrap();
        let stranger: ProxyRegistration = serde_json::from_str(r#"{"speaks":[9]}"#).unwrap();
        let proxies = BTreeMap::from([("p".to_owned(), registration), ("q".to_owned(), stranger)]);
        let ack = |attempt| BTreeMap::from([("p".to_owned(), Ack { id: "h".into(), attempt })]);
        let idle = Busy::default();
        let busy = Busy { backends: 1, oldest: Duration::ZERO };
        let judge = |now, acks: &BTreeMap<String, Ack>, busy| {
            gate(now, began, hold, ("h", 2), &proxies, acks, busy)
        };
        assert_eq!(judge(now, &ack(2), idle), Gate::Open, "who does not speak is not waited for");
        assert_eq!(judge(now, &ack(1), idle), Gate::Waiting, "an answer to an earlier attempt");
        let later = Moment::at_millis(5_500);
        assert_eq!(judge(later, &ack(1), idle), Gate::Open, "a proxy that is gone says nothing");
        assert_eq!(
            judge(later, &ack(1), busy),
            Gate::Waiting,
            "somebody works, through a proxy or not"
        );
        assert_eq!(judge(now, &ack(2), busy), Gate::Waiting, "a client without a proxy");
        assert_eq!(judge(Moment::at_millis(5_960), &ack(2), idle), Gate::TimeUp);
    }

    #[test]
    fn a_drain_that_cannot_succeed_is_not_begun() {
        let hold = Duration::from_secs(1);
        let busy = |millis| Busy { backends: 1, oldest: Duration::from_millis(millis) };
        assert!(may_drain(busy(499), hold) && !may_drain(busy(500), hold));
        assert!(may_drain(Busy::default(), hold));
    }
}

//! Between our words and etcd's: requests, answers, and what a failure means.

use std::time::Duration;

use etcd_client::{
    Compare as EtcdCompare, CompareOp, DeleteOptions, Error, LeaseGrantResponse,
    LeaseTimeToLiveResponse, PutOptions, ResponseHeader, Txn as EtcdTxn, TxnOp, TxnOpResponse,
    TxnResponse,
};

use super::endpoint::Endpoint;
use crate::{
    Compare, DcsError, Granted, KeyValue, LeaseId, Op, RaftTerm, Reach, Remaining, Revision, Txn,
    TxnOutcome, View,
};

/// Meaning of a failed attempt.
#[derive(Debug, Clone)]
pub(super) enum Failure {
    /// Nothing was done; another endpoint may do it.
    NotDone(String),
    /// Nothing was done, for the connection's login is out of date.
    Stale(String),
    /// The request may have been executed.
    Maybe(String),
    /// The request may have been executed, and the endpoint does not answer at all.
    Silent(String),
    /// The store has answered, and will not answer otherwise elsewhere.
    Definite(DcsError),
}

impl Failure {
    pub(super) fn asks_for_a_new_connection(&self) -> bool {
        matches!(self, Self::Stale(_))
    }

    pub(super) fn is_transient(&self) -> bool {
        !matches!(self, Self::Definite(_))
    }

    /// A failure while connecting: the request was not sent.
    pub(super) fn before_sending(self) -> Self {
        match self {
            Self::Maybe(detail) | Self::Silent(detail) => Self::NotDone(detail),
            other => other,
        }
    }

    /// Says where it happened.
    pub(super) fn at(self, endpoint: &Endpoint) -> Self {
        match self {
            Self::NotDone(detail) => Self::NotDone(format!("{endpoint}: {detail}")),
            Self::Stale(detail) => Self::Stale(format!("{endpoint}: {detail}")),
            Self::Maybe(detail) => Self::Maybe(format!("{endpoint}: {detail}")),
            Self::Silent(detail) => Self::Silent(format!("{endpoint}: {detail}")),
            Self::Definite(error) => Self::Definite(error),
        }
    }
}

/// gRPC's numbers (<https://grpc.io/docs/guides/status-codes/>) that etcd uses for refusals.
mod code {
    pub(super) const INVALID_ARGUMENT: i32 = 3;
    pub(super) const NOT_FOUND: i32 = 5;
    pub(super) const PERMISSION_DENIED: i32 = 7;
    pub(super) const RESOURCE_EXHAUSTED: i32 = 8;
    pub(super) const FAILED_PRECONDITION: i32 = 9;
    pub(super) const OUT_OF_RANGE: i32 = 11;
    pub(super) const UNAUTHENTICATED: i32 = 16;
}

/// Meaning of a request's error. An error that is not positively known to be harmless is `Maybe`.
pub(super) fn failure(error: &Error) -> Failure {
    match error {
        Error::GRpcStatus(status) => {
            let detail = status.message();
            if let Some(refusal) = refusal(i32::from(status.code()), detail) {
                return refusal;
            }
            let cause = root_cause(status);
            if was_not_connected(status) {
                return Failure::NotDone(format!("cannot connect: {cause}"));
            }
            Failure::Maybe(if detail.is_empty() { cause } else { format!("{detail} ({cause})") })
        }
        Error::LeaseKeepAliveError(detail) if detail == "lease not found" => {
            Failure::Definite(DcsError::LeaseLost)
        }
        Error::InvalidArgs(_) | Error::InvalidUri(_) | Error::TransportError(_) => {
            // These come from building a connection.
            Failure::NotDone(error.to_string())
        }
        other => Failure::Maybe(other.to_string()),
    }
}

/// Answers of etcd's own, which say that nothing was done.
pub(super) fn refusal(code: i32, detail: &str) -> Option<Failure> {
    let said = detail.strip_prefix("etcdserver: ")?;
    let has = |part: &str| said.contains(part);
    let failure = match code {
        _ if has("requested lease not found") => Failure::Definite(DcsError::LeaseLost),
        _ if has("has been compacted") => Failure::Definite(DcsError::Compacted),
        // Answered by a member before it proposes anything to the others.
        _ if said == "no leader" || said == "too many requests" => {
            Failure::NotDone(detail.to_owned())
        }
        _ if has("revision of auth store is old") || has("invalid auth token") => {
            Failure::Stale(detail.to_owned())
        }
        code::PERMISSION_DENIED | code::UNAUTHENTICATED => denied(detail),
        _ if has("authentication") || has("user name") || has("permission") => denied(detail),
        // Whatever the code: nothing was written.
        _ if has("database space exceeded") => {
            Failure::Definite(DcsError::Full { detail: detail.to_owned() })
        }
        code::INVALID_ARGUMENT
        | code::NOT_FOUND
        | code::RESOURCE_EXHAUSTED
        | code::FAILED_PRECONDITION
        | code::OUT_OF_RANGE => Failure::Definite(DcsError::Refused { detail: detail.to_owned() }),
        _ => return None,
    };
    Some(failure)
}

fn denied(detail: &str) -> Failure {
    Failure::Definite(DcsError::Denied { detail: detail.to_owned() })
}

/// Whether the channel had no connection to send the request on. Its error is of a private type that
/// shows only in its debug format; if that changes, outcomes are called unknown that are not.
fn was_not_connected(status: &(dyn std::error::Error + 'static)) -> bool {
    causes(status).any(|cause| format!("{cause:?}").starts_with("ConnectError("))
}

fn root_cause(status: &(dyn std::error::Error + 'static)) -> String {
    causes(status).last().map_or_else(String::new, ToString::to_string)
}

pub(super) fn causes<'a>(
    error: &'a (dyn std::error::Error + 'static),
) -> impl Iterator<Item = &'a (dyn std::error::Error + 'static)> {
    std::iter::successors(Some(error), |&error| error.source())
}

/// etcd's revisions are signed and never negative.
fn revision(signed: i64) -> Revision {
    u64::try_from(signed).map_or(Revision::NONE, Revision)
}

pub(super) fn signed(revision: Revision) -> i64 {
    i64::try_from(revision.0).unwrap_or(i64::MAX)
}

/// The raft term in an answer's header.
pub(super) fn raft_term(header: Option<&ResponseHeader>) -> RaftTerm {
    header.map_or(RaftTerm::NONE, |header| RaftTerm(header.raft_term()))
}

fn revision_at(header: Option<&ResponseHeader>) -> Revision {
    header.map_or(Revision::NONE, |header| revision(header.revision()))
}

pub(super) fn key_value(found: etcd_client::KeyValue) -> KeyValue {
    let create_revision = revision(found.create_revision());
    let mod_revision = revision(found.mod_revision());
    let lease = LeaseId(found.lease());
    let (key, value) = found.into_key_value();
    KeyValue { key: text(key), value: text(value), create_revision, mod_revision, lease }
}

pub(super) fn text(bytes: Vec<u8>) -> String {
    String::from_utf8(bytes)
        .unwrap_or_else(|error| String::from_utf8_lossy(error.as_bytes()).into_owned())
}

pub(super) fn view(header: Option<&ResponseHeader>, found: Vec<etcd_client::KeyValue>) -> View {
    let keys = found.into_iter().map(key_value).map(|found| (found.key.clone(), found)).collect();
    View {
        store: header.map_or(0, ResponseHeader::cluster_id),
        revision: revision_at(header),
        raft_term: raft_term(header),
        reach: Reach::Live,
        keys,
    }
}

/// `None`: there is no such lease, which etcd says by a negative number.
pub(super) fn remaining(answer: &LeaseTimeToLiveResponse) -> Option<Remaining> {
    let seconds = |count: i64| u64::try_from(count).ok().map(Duration::from_secs);
    Some(Remaining { granted: seconds(answer.granted_ttl())?, left: seconds(answer.ttl())? })
}

pub(super) fn granted(answer: &LeaseGrantResponse) -> Granted {
    Granted {
        lease: LeaseId(answer.id()),
        ttl: seconds(answer.ttl()),
        raft_term: raft_term(answer.header()),
    }
}

pub(super) fn seconds(ttl: i64) -> Duration {
    Duration::from_secs(u64::try_from(ttl).unwrap_or(0))
}

/// A transaction in etcd's words.
///
/// etcd answers one that has no steps from the asked member's own memory, however old that is; a
/// read among the steps makes it ask the others first. So one that only compares gets a read, whose
/// answer [`outcome`] leaves out.
pub(super) fn request(txn: &Txn) -> EtcdTxn {
    let compares: Vec<EtcdCompare> = txn.compare.iter().flat_map(compare).collect();
    let mut then: Vec<TxnOp> = txn.then.iter().map(op).collect();
    if let Some(first) = txn.compare.first()
        && only_compares(txn)
    {
        let key = match first {
            Compare::Created { key, .. }
            | Compare::Modified { key, .. }
            | Compare::Lease { key, .. }
            | Compare::Value { key, .. } => key,
            Compare::NoneCreatedAfter { prefix, .. } => prefix,
        };
        then.push(TxnOp::get(key.as_str(), None));
    }
    let otherwise: Vec<TxnOp> = txn.otherwise.iter().map(op).collect();
    EtcdTxn::new().when(compares).and_then(then).or_else(otherwise)
}

fn only_compares(txn: &Txn) -> bool {
    txn.then.is_empty() && txn.otherwise.is_empty()
}

fn compare(compare: &Compare) -> Vec<EtcdCompare> {
    let equal = CompareOp::Equal;
    match compare {
        Compare::Created { key, revision } => {
            vec![EtcdCompare::create_revision(key.as_str(), equal, signed(*revision))]
        }
        Compare::Modified { key, revision } => {
            vec![EtcdCompare::mod_revision(key.as_str(), equal, signed(*revision))]
        }
        // etcd takes a key that does not exist for one with lease 0.
        Compare::Lease { key, lease } => vec![
            EtcdCompare::create_revision(key.as_str(), CompareOp::Greater, 0),
            EtcdCompare::lease(key.as_str(), equal, lease.0),
        ],
        // Here it does not: a missing key equals no value.
        Compare::Value { key, value } => {
            vec![EtcdCompare::value(key.as_str(), equal, value.as_str())]
        }
        // Holds if it holds for each key of the range, so for none as well.
        Compare::NoneCreatedAfter { prefix, revision } => vec![
            EtcdCompare::create_revision(prefix.as_str(), CompareOp::Less, signed(revision.next()))
                .with_prefix(),
        ],
    }
}

fn op(op: &Op) -> TxnOp {
    match op {
        Op::Put { key, value, lease } => {
            TxnOp::put(key.as_str(), value.as_str(), Some(PutOptions::new().with_lease(lease.0)))
        }
        Op::Delete { key } => TxnOp::delete(key.as_str(), None),
        Op::DeletePrefix { prefix } => {
            TxnOp::delete(prefix.as_str(), Some(DeleteOptions::new().with_prefix()))
        }
        Op::Get { key } => TxnOp::get(key.as_str(), None),
    }
}

/// Outcome in the answer to [`request`].
pub(super) fn outcome(txn: &Txn, answer: &TxnResponse) -> TxnOutcome {
    let gets = answer
        .op_responses()
        .into_iter()
        .filter(|_| !only_compares(txn))
        .filter_map(|response| match response {
            TxnOpResponse::Get(mut found) => Some(found.take_kvs().pop().map(key_value)),
            _ => None,
        })
        .collect();
    TxnOutcome {
        succeeded: answer.succeeded(),
        revision: revision_at(answer.header()),
        raft_term: raft_term(answer.header()),
        gets,
    }
}

//! Any bytes as messages of both sides.

use super::{Fate, Pipeline, Sent, Unit};
use crate::txn::TransactionStatus;

/// Fuzz entry: whatever a client forwards and a server answers, in whatever order, never panic,
/// and what is movable owes nothing. A byte is an event.
pub fn fuzz_pipeline(input: &[u8]) {
    let fates = [Fate::Stays, Fate::Begins, Fate::Commits, Fate::Unknown];
    let mut pipeline = Pipeline::new(TransactionStatus::Idle);
    for byte in input {
        let token = u32::from(byte & 3);
        let fate = fates.get(token as usize).copied().unwrap_or(Fate::Unknown);
        let unit = Unit { fate, token };
        let sent = match byte >> 2 {
            0 => Sent::Query(unit),
            1 => Sent::FunctionCall(unit),
            2 => Sent::Parse(token),
            3 => Sent::Bind(token),
            4 => Sent::Describe(token),
            5 => Sent::Close(token),
            6 => Sent::Execute(unit),
            7 => Sent::Sync,
            8 => Sent::Flush,
            9 => Sent::CopyData,
            10 => Sent::CopyDone,
            11 => Sent::CopyFail,
            12 if pipeline.is_doubtful() => Sent::Marker,
            _ => {
                let tags = b"123CDEGHINSTVWZAcdnst";
                let tag = tags.get(usize::from(byte % 32)).copied().unwrap_or(*byte);
                if pipeline.received(tag, b"I").is_err() {
                    return;
                }
                continue;
            }
        };
        pipeline.sent(sent);
        let _ = pipeline.loss();
        assert!(pipeline.ready_owed() <= pipeline.owed_len());
        assert!(!pipeline.movable() || pipeline.owed().next().is_none());
    }
}

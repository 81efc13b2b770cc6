use super::*;

mod model;

fn stays(token: u32) -> Unit {
    Unit { fate: Fate::Stays, token }
}

fn unit(fate: Fate) -> Unit {
    Unit { fate, token: 0 }
}

fn idle() -> Pipeline {
    Pipeline::new(TransactionStatus::Idle)
}

fn send(p: &mut Pipeline, all: &[Sent]) {
    all.iter().for_each(|sent| p.sent(*sent));
}

/// Feeds server messages by tag; ReadyForQuery as its status byte.
fn answer(p: &mut Pipeline, tags: &[u8]) -> Result<(), PipelineError> {
    for tag in tags {
        match TransactionStatus::from_byte(*tag) {
            // `I` and `E` are also messages; these tests write them as `i` and `e`.
            Some(_) => p.received(b'Z', &[*tag])?,
            None if *tag == b'i' => p.received(b'I', b"")?,
            None if *tag == b'e' => p.received(b'E', b"")?,
            None if *tag == b't' => p.received(b'T', b"")?,
            None => p.received(*tag, b"")?,
        };
    }
    Ok(())
}

/// Owners' marks of the answers that complete something.
fn tokens(p: &mut Pipeline, tags: &[u8]) -> Vec<u32> {
    let mut marks = Vec::new();
    for tag in tags {
        if let Ok(Received::Done(owner) | Received::Failed(Some(owner))) = p.received(*tag, b"I") {
            marks.push(owner.unit.token);
        }
    }
    marks
}

#[test]
fn a_simple_query_is_owed_until_its_ready() {
    let mut p = idle();
    assert!(p.movable());
    p.sent(Sent::Query(stays(1)));
    assert_eq!((p.movable(), p.ready_owed()), (false, 1));
    answer(&mut p, b"tDD").unwrap();
    assert!(p.answered());
    answer(&mut p, b"C").unwrap();
    assert!(!p.movable(), "a simple query may have several commands");
    answer(&mut p, b"CI").unwrap();
    assert!(p.movable() && !p.answered());
}

#[test]
fn a_transaction_block_is_not_movable() {
    let mut p = idle();
    p.sent(Sent::Query(unit(Fate::Begins)));
    answer(&mut p, b"CT").unwrap();
    assert_eq!((p.movable(), p.in_flight(), p.loss()), (false, false, Loss::Retry));
    p.sent(Sent::Query(unit(Fate::Commits)));
    answer(&mut p, b"CI").unwrap();
    assert!(p.movable());
}

#[test]
fn answers_find_their_owners_in_a_pipeline_of_batches() {
    let mut p = idle();
    let batch =
        |n| [Sent::Parse(n), Sent::Bind(n + 1), Sent::Describe(n + 2), Sent::Execute(stays(n + 3))];
    send(&mut p, &batch(10));
    p.sent(Sent::Sync);
    send(&mut p, &batch(20));
    p.sent(Sent::Sync);
    assert_eq!(p.ready_owed(), 2);
    assert_eq!(tokens(&mut p, b"12TDC"), [10, 11, 12, 13]);
    answer(&mut p, b"I").unwrap();
    assert_eq!(tokens(&mut p, b"12ns"), [20, 21, 22, 23]);
    answer(&mut p, b"I").unwrap();
    assert!(p.movable());
}

#[test]
fn a_batch_without_its_sync_is_not_movable_although_all_is_answered() {
    let mut p = idle();
    send(&mut p, &[Sent::Parse(1), Sent::Flush]);
    answer(&mut p, b"1").unwrap();
    assert!(!p.movable() && p.is_unsynced() && p.in_flight());
    p.sent(Sent::Sync);
    answer(&mut p, b"I").unwrap();
    assert!(p.movable());
}

#[test]
fn an_error_skips_to_the_next_sync_and_no_further() {
    let mut p = idle();
    send(&mut p, &[Sent::Parse(1), Sent::Bind(2), Sent::Execute(stays(3)), Sent::Sync]);
    send(&mut p, &[Sent::Parse(4), Sent::Sync]);
    assert_eq!(tokens(&mut p, b"1E"), [1, 2]);
    assert!(p.error_passed());
    answer(&mut p, b"I").unwrap();
    assert!(!p.error_passed());
    assert_eq!(tokens(&mut p, b"1"), [4]);
    answer(&mut p, b"I").unwrap();
    assert!(p.movable());
}

#[test]
fn after_an_error_everything_up_to_a_sync_not_yet_sent_is_dropped() {
    let mut p = idle();
    send(&mut p, &[Sent::Parse(1), Sent::Query(stays(2))]);
    answer(&mut p, b"e").unwrap();
    assert_eq!(p.ready_owed(), 0, "the query is discarded as well");
    assert!(p.is_skipping() && !p.movable());
    send(&mut p, &[Sent::Query(stays(3)), Sent::Bind(4), Sent::Execute(stays(5))]);
    assert_eq!(p.owed().count(), 0);
    p.sent(Sent::Sync);
    answer(&mut p, b"I").unwrap();
    assert!(p.movable());
}

#[test]
fn an_error_at_commit_of_a_sync_owes_one_ready_all_the_same() {
    let mut p = idle();
    send(&mut p, &[Sent::Execute(stays(1)), Sent::Sync, Sent::Query(stays(2))]);
    answer(&mut p, b"CeI").unwrap();
    assert_eq!(p.next_owner().map(|o| o.unit.token), Some(2));
    answer(&mut p, b"CI").unwrap();
    assert!(p.movable());
}

#[test]
fn the_server_may_speak_for_itself_at_any_time() {
    let mut p = idle();
    answer(&mut p, b"NSA").unwrap();
    assert!(p.movable() && !p.answered());
    assert_eq!(p.received(b'E', b""), Ok(Received::Failed(None)));
    assert!(p.movable());
}

#[test]
fn answers_to_nothing_are_an_error() {
    for tag in *b"12CTntsGHW3VI" {
        assert_eq!(idle().received(tag, b""), Err(PipelineError::Unexpected { tag }));
    }
    assert_eq!(idle().received(b'Z', b"I"), Err(PipelineError::Unexpected { tag: b'Z' }));
    let mut p = idle();
    p.sent(Sent::Bind(1));
    assert_eq!(p.received(b'1', b""), Err(PipelineError::Unexpected { tag: b'1' }));
    for body in [&b""[..], b"X"] {
        let mut p = idle();
        p.sent(Sent::Sync);
        assert_eq!(p.received(b'Z', body), Err(PipelineError::BadStatus));
    }
}

#[test]
fn copy_in_by_a_simple_query_swallows_nothing_else() {
    let mut p = idle();
    p.sent(Sent::Query(stays(1)));
    answer(&mut p, b"G").unwrap();
    assert_eq!(p.copy(), CopyState::In { client_done: false });
    send(&mut p, &[Sent::CopyData, Sent::CopyData, Sent::CopyDone]);
    assert_eq!(p.copy(), CopyState::In { client_done: true });
    answer(&mut p, b"CI").unwrap();
    assert!(p.movable());
}

#[test]
fn libpqs_extended_copy_sends_two_syncs_and_is_owed_one_ready() {
    // P B D E S, then the data, then CopyDone and another Sync: the first one was swallowed.
    let mut p = idle();
    send(&mut p, &[Sent::Parse(1), Sent::Bind(2), Sent::Execute(stays(4)), Sent::Sync]);
    answer(&mut p, b"12G").unwrap();
    assert_eq!(p.ready_owed(), 0);
    assert!(!p.movable());
    send(&mut p, &[Sent::CopyData, Sent::CopyDone, Sent::Sync]);
    answer(&mut p, b"CI").unwrap();
    assert!(p.movable());
}

#[test]
fn copy_data_sent_before_the_copy_is_answered_ends_it() {
    let mut p = idle();
    send(&mut p, &[Sent::Bind(1), Sent::Execute(stays(2)), Sent::Sync]);
    send(&mut p, &[Sent::CopyData, Sent::CopyDone, Sent::Sync]);
    answer(&mut p, b"2GCI").unwrap();
    assert!(p.movable() && !p.is_lost());
    // The same when the COPY fails before it begins: both Syncs are answered.
    send(&mut p, &[Sent::Bind(1), Sent::Execute(stays(2)), Sent::Sync]);
    send(&mut p, &[Sent::CopyData, Sent::CopyDone, Sent::Sync]);
    answer(&mut p, b"2eII").unwrap();
    assert!(p.movable() && !p.is_lost());
}

#[test]
fn a_copy_that_fails_is_settled_by_asking() {
    // What libpq sends for a COPY with parameters: a Sync, which the COPY swallows, and one at its end.
    for late in [false, true] {
        let mut p = idle();
        send(&mut p, &[Sent::Bind(1), Sent::Execute(stays(2)), Sent::Sync]);
        answer(&mut p, b"2G").unwrap();
        send(&mut p, &[Sent::CopyData, Sent::CopyDone, Sent::Sync]);
        answer(&mut p, b"eI").unwrap();
        assert!(p.is_doubtful() && p.must_settle() && !p.movable() && !p.is_lost());
        p.sent(Sent::Marker);
        if late {
            // It had failed before it swallowed the first one.
            assert_eq!(p.received(b'Z', b"I"), Ok(Received::Ready(TransactionStatus::Idle, None)));
        }
        assert_eq!(p.received(b'3', b""), Ok(Received::Ours));
        assert_eq!(p.received(b'Z', b"I"), Ok(Received::Ours));
        assert!(p.movable());
    }
    // Before the client has sent its Sync.
    let mut p = idle();
    send(&mut p, &[Sent::Bind(1), Sent::Execute(stays(2)), Sent::Sync]);
    answer(&mut p, b"2G").unwrap();
    send(&mut p, &[Sent::CopyData]);
    answer(&mut p, b"e").unwrap();
    assert!(!p.is_doubtful() && !p.must_settle(), "the server skips");
    send(&mut p, &[Sent::CopyData, Sent::CopyDone, Sent::Sync]);
    assert!(p.must_settle());
    answer(&mut p, b"I").unwrap();
    assert!(p.is_doubtful());
}

#[test]
fn a_request_behind_a_copy_that_may_have_swallowed_its_sync_pins_the_session() {
    let mut p = idle();
    send(&mut p, &[Sent::Bind(1), Sent::Execute(stays(2)), Sent::Sync]);
    answer(&mut p, b"2G").unwrap();
    send(&mut p, &[Sent::CopyData, Sent::Sync, Sent::CopyDone, Sent::Query(stays(3))]);
    answer(&mut p, b"e").unwrap();
    assert!(p.is_lost() && !p.movable());
    // The server had failed before it read the Sync, and executes the query.
    answer(&mut p, b"ICI").unwrap();
}

#[test]
fn a_copy_mixed_with_other_requests_pins_the_session() {
    let mut p = idle();
    p.sent(Sent::Query(stays(1)));
    answer(&mut p, b"G").unwrap();
    p.sent(Sent::Query(stays(2)));
    answer(&mut p, b"eI").unwrap();
    assert!(p.is_lost() && !p.movable());
    assert_eq!(p.loss(), Loss::Unknown);
    answer(&mut p, b"CII").unwrap();
    assert!(!p.movable(), "for ever");
}

#[test]
fn copy_out_and_copy_both_are_followed() {
    let mut p = idle();
    p.sent(Sent::Query(stays(1)));
    answer(&mut p, b"H").unwrap();
    assert_eq!((p.copy(), p.loss()), (CopyState::Out, Loss::Unknown));
    answer(&mut p, b"ddcCI").unwrap();
    assert!(p.movable());
    p.sent(Sent::Query(stays(1)));
    answer(&mut p, b"Wd").unwrap();
    assert!(!p.movable() && p.in_flight());
    send(&mut p, &[Sent::CopyData, Sent::CopyDone]);
    answer(&mut p, b"dcCI").unwrap();
    assert!(p.movable());
}

#[test]
fn a_function_call_owes_a_ready() {
    let mut p = idle();
    p.sent(Sent::FunctionCall(stays(1)));
    answer(&mut p, b"VI").unwrap();
    assert!(p.movable());
}

#[test]
fn a_client_that_says_good_bye_is_not_moved() {
    let mut p = idle();
    p.sent(Sent::Terminate);
    assert!(!p.movable() && p.is_terminated());
}

#[test]
fn a_client_far_ahead_has_to_wait_and_an_endless_batch_is_blurred_instead() {
    let mut p = idle();
    for _ in 0..MAX_OWED {
        assert!(!p.must_wait());
        p.sent(Sent::Query(stays(1)));
    }
    assert!(p.must_wait());

    let mut p = idle();
    let rounds = 3 * MAX_OWED;
    for n in 0..rounds {
        send(&mut p, &[Sent::Bind(1), Sent::Execute(stays(n as u32))]);
        assert!(!p.must_wait(), "the server answers only when it sees a Sync");
    }
    p.sent(Sent::Sync);
    assert!(p.must_wait() && p.owed().count() <= MAX_OWED + 2);
    for _ in 0..rounds {
        answer(&mut p, b"2DC").unwrap();
    }
    answer(&mut p, b"I").unwrap();
    assert!(p.movable());
    assert!(p.owed.capacity() <= 64, "an idle session holds no buffer");
}

#[test]
fn a_blurred_batch_fails_like_any_other() {
    let mut p = idle();
    for n in 0..MAX_OWED as u32 + 10 {
        p.sent(Sent::Execute(stays(n)));
    }
    send(&mut p, &[Sent::Execute(unit(Fate::Commits)), Sent::Sync, Sent::Parse(7), Sent::Sync]);
    answer(&mut p, b"CCeI").unwrap();
    assert_eq!(tokens(&mut p, b"1"), [7]);
    answer(&mut p, b"I").unwrap();
    assert!(p.movable());
}

/// Loss of a session in `status` that has `sent` in flight, of which the server has
/// answered `answered`.
#[test]
fn nothing_is_asked_where_its_answer_could_not_be_told() {
    let mut p = idle();
    send(&mut p, &[Sent::Query(stays(1))]);
    answer(&mut p, b"G").unwrap();
    // A Sync that the COPY may have swallowed, and a request that may be taken for an error of it.
    send(&mut p, &[Sent::CopyData, Sent::Sync, Sent::Query(stays(2)), Sent::Query(stays(3))]);
    answer(&mut p, b"eIII").unwrap();
    assert!(p.is_lost() && p.owed_len() == 0);
    // The server may still owe an error of the client's, which would be taken for the marker's.
    assert!(!p.is_doubtful());
}

fn loss(status: TransactionStatus, sent: &[Sent], answered: &[u8]) -> Loss {
    let mut p = Pipeline::new(status);
    send(&mut p, sent);
    answer(&mut p, answered).unwrap();
    p.loss()
}

#[test]
fn a_lost_statement_that_changes_its_session_alone_may_be_sent_again() {
    use Fate::{Begins, Commits, OfSession, Stays};
    use TransactionStatus::{Failed, Idle, InBlock};
    let q = |fate| Sent::Query(unit(fate));
    let e = |fate| Sent::Execute(unit(fate));
    type Row<'a> = (&'a str, TransactionStatus, &'a [Sent], &'a [u8], Loss);
    let rows: &[Row<'_>] = &[
        ("set", Idle, &[q(OfSession)], b"", Loss::Harmless),
        ("set, answered", Idle, &[q(OfSession)], b"C", Loss::Harmless),
        ("set and insert", Idle, &[e(OfSession), e(Stays), Sent::Sync], b"", Loss::Unknown),
        ("insert and set", Idle, &[q(Stays), q(OfSession)], b"", Loss::Unknown),
        ("begin and set", Idle, &[q(Begins), q(OfSession)], b"", Loss::Harmless),
        ("begin, set, insert", Idle, &[q(Begins), q(OfSession), q(Stays)], b"", Loss::Unknown),
        ("set in a block", InBlock, &[q(OfSession)], b"", Loss::Retry),
        ("set behind a commit", InBlock, &[q(Commits), q(OfSession)], b"", Loss::Unknown),
        ("set when failed", Failed, &[q(OfSession)], b"", Loss::AlreadyFailed),
    ];
    for (what, status, sent, answered, truth) in rows {
        assert_eq!(loss(*status, sent, answered), *truth, "{what}");
    }
}

#[test]
fn the_truth_about_lost_requests() {
    use Fate::{Begins, Commits, Revives, RollsBack, Stays, Unknown};
    use TransactionStatus::{Failed, Idle, InBlock};
    let q = |fate| Sent::Query(unit(fate));
    let e = |fate| Sent::Execute(unit(fate));
    type Row<'a> = (&'a str, TransactionStatus, &'a [Sent], &'a [u8], Loss);
    let rows: &[Row<'_>] = &[
        ("nothing, idle", Idle, &[], b"", Loss::Nothing),
        ("nothing, in a block", InBlock, &[], b"", Loss::Retry),
        ("nothing, failed", Failed, &[], b"", Loss::AlreadyFailed),
        ("autocommit", Idle, &[q(Stays)], b"", Loss::Unknown),
        ("autocommit, answered but not ready", Idle, &[q(Stays)], b"C", Loss::Unknown),
        (
            "extended autocommit commits at Sync",
            Idle,
            &[Sent::Bind(0), e(Stays), Sent::Sync],
            b"2C",
            Loss::Unknown,
        ),
        ("prepare and describe", Idle, &[Sent::Parse(0), Sent::Describe(0)], b"", Loss::Harmless),
        ("prepare, answered", Idle, &[Sent::Parse(0), Sent::Sync], b"1", Loss::Harmless),
        ("begin", Idle, &[q(Begins)], b"", Loss::Harmless),
        ("an empty query", Idle, &[q(Fate::Nothing)], b"", Loss::Harmless),
        ("an empty query, answered", Idle, &[q(Fate::Nothing)], b"i", Loss::Harmless),
        ("an empty query in a block", InBlock, &[q(Fate::Nothing)], b"", Loss::Retry),
        (
            "an empty query behind a commit",
            InBlock,
            &[q(Commits), q(Fate::Nothing)],
            b"",
            Loss::Unknown,
        ),
        // BEGIN may fail, a time-out is enough, and the INSERT commits alone.
        ("begin and insert", Idle, &[q(Begins), q(Stays)], b"", Loss::Unknown),
        ("begin, answered, and insert", Idle, &[q(Begins), q(Stays)], b"CT", Loss::Retry),
        (
            "begin and insert in one batch",
            Idle,
            &[e(Begins), e(Stays), Sent::Sync],
            b"",
            Loss::Retry,
        ),
        (
            "begin and insert in one batch, and another",
            Idle,
            &[e(Begins), e(Stays), Sent::Sync, e(Stays), Sent::Sync],
            b"",
            Loss::Unknown,
        ),
        ("begin twice", Idle, &[q(Begins), q(Begins)], b"", Loss::Harmless),
        ("begin and rollback", Idle, &[q(Begins), q(RollsBack)], b"", Loss::RolledBack),
        ("begin, insert, commit", Idle, &[q(Begins), q(Stays), q(Commits)], b"", Loss::Unknown),
        ("insert in a block", InBlock, &[q(Stays)], b"", Loss::Retry),
        ("several inserts in a block", InBlock, &[q(Stays), q(Stays)], b"", Loss::Retry),
        ("extended in a block", InBlock, &[Sent::Bind(0), e(Stays), Sent::Sync], b"2", Loss::Retry),
        ("commit", InBlock, &[q(Commits)], b"", Loss::Unknown),
        ("insert, then commit", InBlock, &[q(Stays), q(Commits)], b"", Loss::Unknown),
        (
            "commit answered inside a batch",
            InBlock,
            &[e(Commits), e(Stays), Sent::Sync],
            b"C",
            Loss::Unknown,
        ),
        ("unknown text", InBlock, &[q(Unknown)], b"", Loss::Unknown),
        ("rollback", InBlock, &[q(RollsBack)], b"", Loss::RolledBack),
        ("insert, rollback", InBlock, &[q(Stays), q(RollsBack)], b"", Loss::RolledBack),
        ("rollback, insert", InBlock, &[q(RollsBack), q(Stays)], b"", Loss::Unknown),
        ("rollback to", InBlock, &[q(Revives)], b"", Loss::Retry),
        ("insert when failed", Failed, &[q(Stays)], b"", Loss::AlreadyFailed),
        ("commit when failed", Failed, &[q(Commits)], b"", Loss::RolledBack),
        ("revived, commit", Failed, &[q(Revives), q(Commits)], b"", Loss::Unknown),
        ("unknown when failed", Failed, &[q(Unknown)], b"", Loss::Unknown),
        ("copy", InBlock, &[q(Stays)], b"G", Loss::Unknown),
        (
            "what an error skips was never executed",
            InBlock,
            &[e(Stays), e(Commits), Sent::Sync],
            b"e",
            Loss::Retry,
        ),
        ("flushed batch, no sync", InBlock, &[e(Stays)], b"C", Loss::Retry),
        ("flushed autocommit, no sync", Idle, &[e(Stays)], b"C", Loss::Unknown),
    ];
    for (what, status, sent, answered, truth) in rows {
        assert_eq!(loss(*status, sent, answered), *truth, "{what}");
    }
}

//! Results that are dropped on purpose, by a function whose name is the reason.
//!
//! An error that somebody could act on, or would want to read of, is handled or logged where it arises.
//! The functions below name the cases in which nobody can, and a call of one says which case it is.

use std::fmt;

/// The receiver of a channel may have gone: whoever asked has stopped waiting for the answer.
pub fn receiver_may_be_gone<T, E>(sent: Result<T, E>) {
    drop(sent);
}

/// The wait ends with an error only when the sender is gone, and the sender outlives each of its waiters.
pub fn sender_outlives_waiters<T, E>(waited: Result<T, E>) {
    drop(waited);
}

/// A `String` takes whatever is written to it.
pub fn string_takes_all(_: fmt::Result) {}

/// A message with constant contents, or with contents that came in a message, is never too long.
pub fn message_fits<E>(put: Result<(), E>) {
    drop(put);
}

/// A parameter that a server reports is refused beyond a bound only, and the login has kept to the bound.
pub fn parameter_is_within_bound<T, E>(set: Result<T, E>) {
    drop(set);
}

/// A process that is to end, or a file that is to be absent, may be gone already.
pub fn may_be_gone_already<T, E>(ended: Result<T, E>) {
    drop(ended);
}

/// A setting that makes things better where the system grants it. Everything works without it.
pub fn only_helps<T, E>(set: Result<T, E>) {
    drop(set);
}

/// A step that the next one does not depend on: the next step finds out by itself how things stand.
pub fn goes_on_either_way<T>(outcome: T) {
    drop(outcome);
}

/// A connection that does not take what is written to it says so when it is read next.
pub fn reader_finds_out<T>(written: T) {
    drop(written);
}

/// The place where errors are reported is itself out of order.
pub fn nowhere_to_report<T, E>(written: Result<T, E>) {
    drop(written);
}

//! The guard: a tiny process beside PostgreSQL that knows until when this node may be primary.
//!
//! The agent may be killed, frozen or starved at any instruction; the promise that a primary stops
//! before its lease can have run out must survive that. So the promise is kept by another process of
//! the same binary, which does nothing else: it is the parent of the postmaster, it is told a deadline
//! ([`GuardClient::arm`]) and when the deadline comes it kills everything that runs on the data
//! directory, whatever state it is in. It is level-triggered: as long as it is armed and late it keeps
//! killing, and refuses to start or to promote.
//!
//! **Life.** There is one guard per data directory: a lock file and a unix socket in a directory beside
//! it. It has a session of its own and survives the agent; the next agent finds it and goes on with it.
//! It exits by itself when nobody is connected and nothing runs. If the guard dies, the kernel stops
//! the postmaster (`PR_SET_PDEATHSIG`), so there is never an unguarded primary.
//!
//! **The agent.** An agent that is silent while its server leads is ended and replaced by the guard (`revive`): a server
//! that works need not be stopped because its agent is frozen.
//!
//! **Words.** [`wire`] is version 1 of the protocol between the two; words are only added: an agent of one
//! release must be able to go on with the guard of another.
//!
//! No tokio here, except in `client`, which is the agent's side. Not here: who ought to be primary, and
//! how long a lease lasts.

mod account;
mod args;
mod beats;
pub mod bequest;
mod client;
mod clock;
mod environment;
pub mod fence;
mod kill;
mod mounts;
mod patience;
mod recipe;
mod revive;
mod serve;
mod spawn;
pub mod wire;

pub(crate) use account::run_as;
pub(crate) use beats::beat;
pub(crate) use client::make_runtime_dir;
pub use client::{GuardClient, GuardConfig, GuardError, Watched};
pub use clock::boottime_now;
pub(crate) use environment::hide_settings;
pub(crate) use fence::HAS_FIRED;
pub use kill::{Process, processes_in};
pub(crate) use revive::replace_started;
pub use serve::main;
pub use wire::{Exit, Fencing, GuardStatus, Kept, ServerSignal, StartRequest};

use std::fmt;
use std::pin::Pin;

use kornak_cluster::Moment;
use tokio::sync::watch;

/// The guard's answer.
pub type Answered<'a, T = ()> = Pin<Box<dyn Future<Output = Result<T, GuardError>> + Send + 'a>>;

/// The guard of a data directory, as the shell uses it.
pub trait Guard: Send + Sync + fmt::Debug {
    /// See [`GuardClient::arm`].
    fn arm(&self, deadline: Moment) -> Answered<'_>;
    /// See [`GuardClient::disarm`].
    fn disarm(&self) -> Answered<'_>;
    /// See [`GuardClient::keep`].
    fn keep(&self, text: String) -> Answered<'_>;
    /// See [`GuardClient::kept`].
    fn kept(&self) -> Answered<'_, Option<Kept>>;
    /// See [`GuardClient::watch`].
    fn watch(&self) -> watch::Receiver<Watched>;
}

impl Guard for GuardClient {
    fn arm(&self, deadline: Moment) -> Answered<'_> {
        Box::pin(Self::arm(self, deadline))
    }

    fn disarm(&self) -> Answered<'_> {
        Box::pin(Self::disarm(self))
    }

    fn keep(&self, text: String) -> Answered<'_> {
        Box::pin(Self::keep(self, text))
    }

    fn kept(&self) -> Answered<'_, Option<Kept>> {
        Box::pin(Self::kept(self))
    }

    fn watch(&self) -> watch::Receiver<Watched> {
        Self::watch(self)
    }
}

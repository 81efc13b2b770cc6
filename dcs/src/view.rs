//! View of a prefix, as its follower sees it.

use std::collections::BTreeMap;
use std::sync::Arc;

use tokio::sync::watch;

use crate::{LeaseId, RaftTerm, Revision};

/// One key with its value and where it stands in the store's history.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeyValue {
    pub key: String,
    /// Values are JSON or plain text; bytes that are not UTF-8 are replaced.
    pub value: String,
    pub create_revision: Revision,
    pub mod_revision: Revision,
    /// 0 if none.
    pub lease: LeaseId,
}

/// Whether what is seen is still fed by the store.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reach {
    /// Nothing has been read yet.
    Never,
    /// The watch is open and has shown a sign of life recently.
    Live,
    /// The watch is broken or silent; the keys are as they were last seen.
    Lost,
}

/// Everything below a prefix, at one revision.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct View {
    /// The store's cluster id.
    pub store: u64,
    pub revision: Revision,
    pub raft_term: RaftTerm,
    pub reach: Reach,
    pub keys: BTreeMap<String, KeyValue>,
}

impl View {
    /// Before anything was read.
    pub fn empty() -> Self {
        Self {
            store: 0,
            revision: Revision::NONE,
            raft_term: RaftTerm::NONE,
            reach: Reach::Never,
            keys: BTreeMap::new(),
        }
    }

    /// The value of a key.
    pub fn get(&self, key: &str) -> Option<&KeyValue> {
        self.keys.get(key)
    }

    /// The keys below `prefix`, with the rest of their names.
    pub fn below<'a>(
        &'a self,
        prefix: &'a str,
    ) -> impl Iterator<Item = (&'a str, &'a KeyValue)> + 'a {
        self.keys
            .range(prefix.to_owned()..)
            .take_while(move |(key, _)| key.starts_with(prefix))
            .filter_map(move |(key, value)| Some((key.strip_prefix(prefix)?, value)))
    }
}

/// A prefix being followed. Dropping it ends the background work.
#[derive(Debug)]
pub struct Follow {
    view: watch::Receiver<Arc<View>>,
    /// Ends the task that feeds `view` when dropped.
    _feeder: Option<tokio_util::sync::DropGuard>,
}

impl Follow {
    /// For implementations of [`crate::Dcs`].
    pub fn new(
        view: watch::Receiver<Arc<View>>,
        feeder: Option<tokio_util::sync::DropGuard>,
    ) -> Self {
        Self { view, _feeder: feeder }
    }

    /// The newest view. Marks it as seen for [`Follow::changed`].
    pub fn current(&mut self) -> Arc<View> {
        Arc::clone(&self.view.borrow_and_update())
    }

    /// Waits for a view that was not seen yet; pends for ever once the store is shut down.
    pub async fn changed(&mut self) {
        if self.view.changed().await.is_err() {
            std::future::pending::<()>().await;
        }
    }

    /// Another handle on the same views, to be used beside this one.
    pub fn subscribe(&self) -> watch::Receiver<Arc<View>> {
        self.view.clone()
    }
}

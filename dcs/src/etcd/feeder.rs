//! Keeping a [`View`] fresh: read, watch from there, and doubt the silence.
//!
//! A watch may be silent because nothing happens, or because its member is stalled and does not know
//! it. So after [`QUIET`] the prefix is read again, linearizably: if that shows what the watch has
//! shown, all is well; if it shows more, the watch is worth nothing and another member is asked. The
//! view is [`Reach::Lost`] when neither has answered for [`super::SILENCE`], or every endpoint has
//! failed in turn.

use std::sync::Arc;
use std::time::Duration;

use etcd_client::{EventType, WatchOptions, WatchResponse, WatchStream};
use futures_util::FutureExt as _;
use tokio::sync::watch;
use tokio::time::{Instant, sleep, timeout};
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};

use super::convert::{self, Failure};
use super::{SILENCE, Shared, backoff};
use crate::{Follow, Reach, View};

/// Silence after which the prefix is read again. Leaves as much for the reading.
const QUIET: Duration = Duration::from_millis(2500);

/// How much later than a reading a healthy watch may show the same.
const LATE: Duration = Duration::from_millis(500);

/// Messages that are put into one view, so that a burst does not cost a copy of the view each.
const MAX_BURST: usize = 64;

/// A watch that lives shorter than this counts as a failure to open it.
const SHORT_LIFE: Duration = Duration::from_secs(1);

/// Starts following. The task ends with the [`Follow`].
pub(super) fn follow(shared: Arc<Shared>, prefix: &str) -> Follow {
    let (shown, seen) = watch::channel(Arc::new(View::empty()));
    let token = CancellationToken::new();
    let feeder = Feeder {
        at: shared.current(),
        shared,
        prefix: prefix.to_owned(),
        view: View::empty(),
        shown,
        fed: Instant::now(),
        failures: 0,
    };
    let ended = token.clone();
    tokio::spawn(async move {
        tokio::select! {
            () = ended.cancelled() => {}
            () = feeder.run() => {}
        }
    });
    Follow::new(seen, Some(token.drop_guard()))
}

#[derive(Debug)]
struct Feeder {
    shared: Arc<Shared>,
    prefix: String,
    /// Index of the endpoint that is watched.
    at: usize,
    view: View,
    shown: watch::Sender<Arc<View>>,
    /// When the store last showed that the view is complete.
    fed: Instant,
    /// Failures in a row.
    failures: usize,
}

impl Feeder {
    async fn run(mut self) {
        loop {
            let start = Instant::now();
            match self.open().await {
                Ok(stream) => {
                    if self.shared.settings.discover {
                        self.shared.discover(self.at).await;
                    }
                    let failure = self.feed(stream).await;
                    self.failures =
                        if start.elapsed() > SHORT_LIFE { 0 } else { self.failures + 1 };
                    self.note(&failure);
                }
                Err(failure) => {
                    self.failures += 1;
                    self.note(&failure);
                }
            }
            self.shared.leave(self.at);
            self.at = self.shared.current();
            let count = self.shared.endpoints.read().len().max(1);
            if self.failures >= count || self.fed.elapsed() > SILENCE {
                self.lose();
            }
            if self.failures >= count {
                let round = u32::try_from(self.failures / count).unwrap_or(u32::MAX);
                sleep(backoff(round)).await;
            }
        }
    }

    fn note(&self, failure: &Failure) {
        match failure {
            Failure::Definite(error) if self.failures <= 1 => {
                warn!(error = error as &dyn std::error::Error, prefix = %self.prefix, "watch refused");
            }
            failure => debug!(?failure, prefix = %self.prefix, "watch ended"),
        }
    }

    /// Reads everything, shows it, and watches from there.
    async fn open(&mut self) -> Result<WatchStream, Failure> {
        let limit = self.shared.settings.attempt_timeout;
        self.reread(limit).await?;
        let options = WatchOptions::new()
            .with_prefix()
            .with_start_revision(convert::signed(self.view.revision.next()))
            .with_progress_notify();
        let prefix = self.prefix.clone();
        self.shared
            .attempt(self.at, limit, |clients| async move {
                let mut watch = clients.watch;
                watch.watch(prefix, Some(options)).await
            })
            .await
    }

    /// Reads the prefix at this feeder's endpoint; whether that showed anything new.
    async fn reread(&mut self, limit: Duration) -> Result<bool, Failure> {
        let started = Instant::now();
        let prefix = self.prefix.clone();
        let read =
            self.shared
                .attempt(self.at, limit, |clients| async move {
                    Shared::range_at(clients, &prefix).await
                })
                .await?;
        self.fed = started;
        let missed = read.keys != self.view.keys;
        let other_store = self.view.store != 0 && self.view.store != read.store;
        if other_store {
            warn!(was = self.view.store, is = read.store, "endpoint belongs to another store");
        }
        // A member that answers with less than was seen is refused by raft, unless it is another
        // cluster's or was restored; then what it says now is what there is.
        self.view = read;
        self.show();
        Ok(missed || other_store)
    }

    /// Applies events until the watch ends, and says why it did.
    async fn feed(&mut self, mut stream: WatchStream) -> Failure {
        loop {
            match timeout(QUIET, stream.message()).await {
                Ok(Ok(Some(message))) => {
                    if let Err(failure) = self.apply_burst(&message, &mut stream) {
                        return failure;
                    }
                }
                Ok(Ok(None)) => return Failure::Maybe("the stream was closed".to_owned()),
                Ok(Err(error)) => return convert::failure(&error),
                Err(_) => match self.reread(SILENCE - QUIET).await {
                    Ok(false) => {}
                    // The change may have come just now, then the watch will show it too.
                    Ok(true) => match timeout(LATE, stream.message()).await {
                        Ok(Ok(Some(message))) => {
                            if let Err(failure) = self.apply_burst(&message, &mut stream) {
                                return failure;
                            }
                        }
                        _ => return Failure::Silent("the watch has missed changes".to_owned()),
                    },
                    Err(failure) => return failure,
                },
            }
        }
    }

    /// Applies a message and those that wait behind it, then shows the result once.
    fn apply_burst(
        &mut self,
        first: &WatchResponse,
        stream: &mut WatchStream,
    ) -> Result<(), Failure> {
        let mut applied = self.apply(first);
        for _ in 1..MAX_BURST {
            if applied.is_err() {
                break;
            }
            // An end or an error comes again with the next call.
            let Some(Ok(Some(next))) = stream.message().now_or_never() else { break };
            applied = self.apply(&next);
        }
        self.show();
        applied
    }

    fn apply(&mut self, message: &WatchResponse) -> Result<(), Failure> {
        if message.canceled() || message.compact_revision() != 0 {
            let why = message.cancel_reason();
            let revision = message.compact_revision();
            return Err(if why.contains("permission denied") {
                Failure::Definite(crate::DcsError::Denied { detail: why.to_owned() })
            } else {
                Failure::Maybe(format!("canceled at {revision}: {why}"))
            });
        }
        self.fed = Instant::now();
        let header = message.header();
        if header.is_some() {
            self.view.raft_term = convert::raft_term(header);
        }
        let before = self.view.revision;
        for event in message.events() {
            let Some(kv) = event.kv() else { continue };
            let found = convert::key_value(kv.clone());
            // A rereading may have shown it already.
            if found.mod_revision <= before {
                continue;
            }
            self.view.revision = self.view.revision.max(found.mod_revision);
            match event.event_type() {
                EventType::Put => {
                    self.view.keys.insert(found.key.clone(), found);
                }
                EventType::Delete => {
                    self.view.keys.remove(&found.key);
                }
            }
        }
        Ok(())
    }

    fn show(&mut self) {
        self.view.reach = Reach::Live;
        self.publish();
    }

    fn lose(&mut self) {
        if self.view.reach == Reach::Live {
            info!(prefix = %self.prefix, "store could not be watched");
            self.view.reach = Reach::Lost;
            self.publish();
        }
    }

    /// Wakes followers only for what they look at: another revision alone is none of it.
    fn publish(&self) {
        self.shown.send_if_modified(|shown| {
            let news = shown.keys != self.view.keys
                || shown.reach != self.view.reach
                || shown.store != self.view.store;
            *shown = Arc::new(self.view.clone());
            news
        });
    }
}

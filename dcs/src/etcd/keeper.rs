//! Renewing leases over streams that stay open.
//!
//! A renewal is one message there and one back. Answers carry no number, so an answer that came too
//! late must never be taken for that of the next renewal: a stream whose renewal did not finish is
//! dropped.

use std::collections::HashMap;

use etcd_client::{LeaseKeepAliveStream, LeaseKeeper};
use parking_lot::Mutex;
use tracing::debug;

use super::{Failure, Repeat, Shared, convert};
use crate::{DcsError, LeaseId, Renewed};

/// More leases than one process renews; streams beyond are closed and opened anew when needed.
const MAX_STREAMS: usize = 64;

/// Streams that wait for the next renewal.
#[derive(Debug, Default)]
pub(super) struct Keepers {
    idle: Mutex<HashMap<LeaseId, Stream>>,
}

#[derive(Debug)]
struct Stream {
    /// Index of the endpoint.
    at: usize,
    keeper: LeaseKeeper,
    answers: LeaseKeepAliveStream,
}

impl Keepers {
    pub(super) fn forget(&self, lease: LeaseId) {
        self.idle.lock().remove(&lease);
    }

    fn take(&self, lease: LeaseId, at: usize) -> Option<Stream> {
        // One to an endpoint that requests have left would ask for trouble.
        self.idle.lock().remove(&lease).filter(|stream| stream.at == at)
    }

    fn put_back(&self, lease: LeaseId, stream: Stream) {
        let mut idle = self.idle.lock();
        if idle.len() >= MAX_STREAMS {
            idle.clear();
        }
        idle.insert(lease, stream);
    }
}

impl Shared {
    /// Renews once: over the stream that is open, else over a new one.
    pub(super) async fn keep_alive(&self, lease: LeaseId) -> Result<Renewed, DcsError> {
        let at = self.current();
        if let Some(stream) = self.keepers.take(lease, at) {
            let limit = self.settings.attempt_timeout;
            match self.attempt(at, limit, |_| renew(stream)).await {
                Ok((stream, renewed)) => return self.renewed(lease, stream, renewed),
                Err(Failure::Definite(error)) => return Err(error),
                Err(Failure::Silent(detail)) => {
                    debug!(%lease, detail, "renewal was not answered");
                    self.leave(at);
                }
                // A stream ends with its member, or with an election: a new one tells more.
                Err(failure) => {
                    debug!(%lease, ?failure, "stream of a lease ended");
                }
            }
        }
        let (stream, renewed) = self
            .run(Repeat::Always, |clients| async move {
                let at = self.current();
                let mut client = clients.lease;
                // This sends a renewal too, but does not show its answer.
                let (keeper, answers) = client.keep_alive(lease.0).await?;
                renew(Stream { at, keeper, answers }).await
            })
            .await?;
        self.renewed(lease, stream, renewed)
    }

    fn renewed(
        &self,
        lease: LeaseId,
        stream: Stream,
        renewed: Renewed,
    ) -> Result<Renewed, DcsError> {
        if renewed.ttl.is_zero() {
            return Err(DcsError::LeaseLost);
        }
        self.keepers.put_back(lease, stream);
        Ok(renewed)
    }
}

async fn renew(mut stream: Stream) -> Result<(Stream, Renewed), etcd_client::Error> {
    stream.keeper.keep_alive().await?;
    let Some(answer) = stream.answers.message().await? else {
        return Err(etcd_client::Error::LeaseKeepAliveError("the stream was closed".to_owned()));
    };
    let renewed = Renewed {
        ttl: convert::seconds(answer.ttl()),
        raft_term: convert::raft_term(answer.header()),
    };
    Ok((stream, renewed))
}

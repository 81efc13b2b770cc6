//! Cancel requests: to the server of the session that is meant, to the session itself if its query is
//! held here, or to the proxy of the cluster that has the session, for a balancer may have brought the
//! request to any.
//!
//! From protocol 3.2 on the key says which proxy it is of. An older client's has four bytes, and its
//! process id is the real one; so if nobody here is meant, every proxy of the cluster is asked, once: a
//! request that was passed on says so, and is not passed on again.

use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::sync::Arc;
use std::time::Instant;

use bytes::Bytes;
use kornak_config::proxy::{ProxySettings, Source};
use kornak_config::{HostPort, StoreSettings};
use kornak_protocol::backend::BackendKey;
use kornak_protocol::startup::CancelRequest;
use sha2::{Digest, Sha256};

use crate::metrics::count;
use crate::net::backend::{self, Address};
use crate::registry::{Doing, Flags, Handle};
use crate::shared::Shared;

/// In front of the key of a request that comes from another proxy. No key of a client is longer than
/// [`KEY_BYTES`].
const PASSED_ON: &[u8; 16] = b"kornak passed on";

/// Length of keys from protocol 3.2 on. Not the longest possible: the next proxy may want room.
const KEY_BYTES: usize = 32;

/// How many of these say which proxy the key is of.
const IDENTITY_BYTES: usize = 8;

/// Length of keys before.
const OLD_KEY_BYTES: usize = 4;

/// Proxies that are asked. A cluster has a handful.
const MAX_PEERS: usize = 64;

/// The proxy that knows the session that a request means.
#[derive(Debug, PartialEq, Eq)]
enum Way {
    /// One of these proxies.
    Peers(Vec<String>),
    Nobody,
}

fn identity(proxy: &str) -> [u8; IDENTITY_BYTES] {
    let digest: [u8; 32] = Sha256::digest(proxy.as_bytes()).into();
    std::array::from_fn(|at| digest.get(at).copied().unwrap_or_default())
}

/// A fresh key: four random bytes, or from 3.2 on (`long`) many, behind the name of the proxy.
pub fn new_key(proxy: &str, long: bool) -> Bytes {
    if !long {
        return Bytes::copy_from_slice(&rand::random::<[u8; OLD_KEY_BYTES]>());
    }
    let secret: [u8; KEY_BYTES - IDENTITY_BYTES] = rand::random();
    Bytes::from([identity(proxy).as_slice(), &secret].concat())
}

/// Where a request goes that means no session of ours.
fn way<'a>(
    key: &[u8],
    own_id: &str,
    proxies: impl Iterator<Item = (&'a String, &'a String)>,
) -> Way {
    let is_meant = |id: &str| match key.len() {
        OLD_KEY_BYTES => true,
        KEY_BYTES => key.starts_with(&identity(id)),
        _ => false,
    };
    let others = proxies.filter(|(id, _)| *id != own_id && is_meant(id));
    let peers: Vec<String> = others.map(|(_, address)| address.clone()).take(MAX_PEERS).collect();
    if peers.is_empty() { Way::Nobody } else { Way::Peers(peers) }
}

/// Does what a cancel request asks for. Nothing is ever answered.
/// A request that means nobody here is passed on so many times in a second for each address and no
/// more: it needs no proof, and costs every proxy of the cluster a connection.
pub async fn obey(shared: &Shared, from: IpAddr, request: &CancelRequest) {
    count(&shared.metrics.cancels);
    let own = request.key.strip_prefix(PASSED_ON).map(Bytes::copy_from_slice);
    let key = own.as_ref().unwrap_or(&request.key);
    if let Some(handle) = shared.registry.by_key(request.pid, key) {
        deliver(shared, &handle).await;
        return;
    }
    if own.is_some() {
        return;
    }
    let topology = shared.topology();
    let Way::Peers(peers) = way(&request.key, &shared.id, topology.proxies.iter()) else { return };
    let rate = shared.settings().limits.max_cancels_per_address;
    if !shared.cancels.lock().take(from, rate, Instant::now()) {
        count(&shared.metrics.cancels_dropped);
        return;
    }
    // The semaphore is never closed.
    let Ok(_turn) = shared.passing_on.acquire().await else { return };
    count(&shared.metrics.cancels_passed_on);
    let key = Bytes::from([PASSED_ON, request.key.as_ref()].concat());
    let key = BackendKey { pid: request.pid, key };
    let asking = peers.iter().map(|peer| pass_on(shared, peer, &key));
    futures_util::future::join_all(asking).await;
}

async fn deliver(shared: &Shared, handle: &Arc<Handle>) {
    let is_held = handle.doing() == Doing::Held;
    match if is_held { None } else { handle.begin_cancel() } {
        Some(mut cancelling) => {
            let limit = shared.settings().limits.connect_timeout;
            let target = &cancelling.target;
            let sent = backend::cancel(&target.address, shared.prober.tls(), &target.key);
            match tokio::time::timeout(limit, sent).await {
                Ok(Ok(())) => cancelling.delivered = true,
                Ok(Err(error)) => tracing::debug!(
                    error = &error as &dyn std::error::Error,
                    "cancel request not delivered"
                ),
                Err(_) => tracing::debug!("cancel request not delivered in time"),
            }
        }
        None => handle.raise(Flags::CANCEL),
    }
}

async fn pass_on(shared: &Shared, peer: &str, key: &BackendKey) {
    let Some(HostPort { host, port }) = HostPort::parse(peer, None) else { return };
    let limit = shared.settings().limits.connect_timeout;
    let address = Address { host: host.into(), port };
    let sent = backend::cancel(&address, &shared.peer_tls, key);
    let told = match tokio::time::timeout(limit, sent).await {
        Ok(Ok(())) => return,
        Ok(Err(error)) => error.to_string(),
        Err(_) => "no answer in time".to_owned(),
    };
    tracing::warn!(peer, why = told, "cancel request cannot be passed on to another proxy");
}

/// Where other proxies reach this one: what the settings say; else the first listener that takes
/// connections without a balancer's header, at its own address or, if it listens everywhere, at the
/// one that faces the store.
pub fn reached_at(settings: &ProxySettings, listeners: &[(String, SocketAddr)]) -> Option<String> {
    if let Some(told) = &settings.connect_address {
        return Some(told.to_string());
    }
    let usable = |name: &String| {
        let mut all = settings.listeners.iter();
        all.any(|listener| listener.name == *name && !listener.proxy_protocol.is_on())
    };
    let (_, address) = listeners.iter().find(|(name, _)| usable(name))?;
    let ip = if address.ip().is_unspecified() { facing(&settings.source)? } else { address.ip() };
    Some(SocketAddr::new(ip, address.port()).to_string())
}

/// Our own address on the way to the store. Nothing is sent: the kernel is asked for its route.
fn facing(source: &Source) -> Option<IpAddr> {
    let Source::Dcs(StoreSettings::Etcd3(etcd)) = source else { return None };
    etcd.hosts.iter().find_map(|HostPort { host, port }| {
        let socket = UdpSocket::bind(("0.0.0.0", 0))
            .and_then(|socket| socket.connect((host.as_str(), *port)).map(|()| socket))
            .ok()?;
        socket.local_addr().ok().map(|own| own.ip())
    })
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    fn check(key: &[u8], expected: &[&str]) {
        let proxies: BTreeMap<String, String> =
            ["a", "b", "c"].map(|id| (id.to_owned(), format!("{id}:5000"))).into();
        let expected: Vec<String> = expected.iter().map(|id| format!("{id}:5000")).collect();
        let expected = if expected.is_empty() { Way::Nobody } else { Way::Peers(expected) };
        assert_eq!(way(key, "a", proxies.iter()), expected);
    }

    #[test]
    fn a_long_key_leads_to_its_proxy_and_a_short_one_to_all_others() {
        check(&new_key("b", true), &["b"]);
        check(&new_key("gone", true), &[]);
        check(&new_key("a", true), &[]);
        check(&new_key("a", false), &["b", "c"]);
        check(b"neither", &[]);
    }

    #[test]
    fn keys_are_as_long_as_their_version_allows_and_never_the_same() {
        assert_eq!((new_key("a", false).len(), new_key("a", true).len()), (4, KEY_BYTES));
        assert_ne!(new_key("a", true), new_key("a", true));
    }
}

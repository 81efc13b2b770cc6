//! From the first byte to the startup packet: PROXY header, TLS in both ways, GSSAPI's refusal,
//! cancel requests.

use std::net::SocketAddr;

use bytes::BytesMut;
use kornak_config::proxy::{ListenerSettings, ProxyProtocol};
use kornak_protocol::auth::Binding;
use kornak_protocol::error::ErrorFields;
use kornak_protocol::sqlstate::{FEATURE_NOT_SUPPORTED, INVALID_AUTHORIZATION, PROTOCOL_VIOLATION};
use kornak_protocol::startup::{self, Startup, StartupError, StartupMessage, TLS_HANDSHAKE};

use super::{Login, NotAdmitted, refuse, silent};
use crate::admission::doors::Visit;
use crate::clients::cancel;
use crate::metrics::count;
use crate::net::proxy_protocol;
use crate::net::stream::{Stream, read_at_most, read_more, write_all};
use crate::net::tls::Accepted;
use crate::shared::Shared;

/// Rounds of TLS or GSSAPI requests before the startup packet: one of each.
const MAX_REQUESTS: usize = 2;

/// A client that has said who it wants to be.
pub(super) struct Hello {
    pub(super) stream: Stream,
    /// Bytes that came behind the startup packet.
    pub(super) buf: BytesMut,
    pub(super) message: StartupMessage,
    pub(super) peer: Peer,
    /// The data that SCRAM binds to.
    pub(super) binding: Binding,
}

/// Where a client is.
#[derive(Debug, Clone, Copy)]
pub(super) struct Peer {
    /// As far as we know: the other end of the connection, or what a balancer says that the
    /// settings name.
    pub(super) address: SocketAddr,
    /// The address from a PROXY header of anybody, on a listener whose settings name no balancer.
    pub(super) claimed: Option<SocketAddr>,
}

impl Peer {
    /// For people: the address, and the claimed one behind it.
    pub(super) fn shown(&self) -> String {
        match self.claimed {
            None => self.address.to_string(),
            Some(claimed) => format!("{} (claims {claimed})", self.address),
        }
    }
}

fn canonical(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}

/// Listens until the client has sent its startup packet.
pub(super) async fn listen(
    shared: &Shared,
    listener: &ListenerSettings,
    mut stream: Stream,
    visit: &mut Visit,
) -> Login<Hello> {
    let address = canonical(stream.tcp().peer_addr().map_err(silent)?);
    let mut peer = Peer { address, claimed: None };
    match &listener.proxy_protocol {
        ProxyProtocol::Off => {}
        ProxyProtocol::Claimed => {
            peer.claimed = take_proxy_header(shared, &mut stream).await?.map(canonical);
        }
        ProxyProtocol::From(balancers) => {
            if !balancers.iter().any(|network| network.contains(address.ip())) {
                count(&shared.metrics.malformed);
                let listener = &listener.name;
                tracing::info!(%listener, client = %address, "connection refused: it comes from none of the balancers of proxy_protocol");
                return Err(NotAdmitted::Silent);
            }
            let told = take_proxy_header(shared, &mut stream).await?;
            peer.address = told.map_or(address, canonical);
            visit.comes_from(peer.address.ip());
        }
    }
    let mut binding = Binding::None;
    if begins_with_tls(&stream).await? {
        let accepted = accept_tls(shared, stream).await?;
        if !accepted.has_alpn {
            // Whoever speaks it by another name may have been lured here (ALPACA).
            count(&shared.metrics.malformed);
            return Err(NotAdmitted::Silent);
        }
        (stream, binding) = (accepted.stream, accepted.binding);
    }
    let mut buf = BytesMut::new();
    for _ in 0..=MAX_REQUESTS {
        let startup = loop {
            match startup::take_startup(&mut buf) {
                Ok(Some(startup)) => break startup,
                Ok(None) => read_more(&mut stream, &mut buf).await.map_err(silent)?,
                Err(error) => return bad_startup(shared, stream, error),
            }
        };
        match startup {
            Startup::Session(message) => {
                let unencrypted = matches!(stream, Stream::Plain(_));
                if shared.client_tls.is_required() && unencrypted {
                    let text = "the proxy asks for an encrypted connection";
                    return refuse(stream, &ErrorFields::fatal(INVALID_AUTHORIZATION, text));
                }
                return Ok(Hello { stream, buf, message, peer, binding });
            }
            Startup::Cancel(request) => {
                cancel::obey(shared, peer.address.ip(), &request).await;
                return Err(NotAdmitted::Silent);
            }
            Startup::GssEnc => write_all(&mut stream, b"N").await.map_err(silent)?,
            Startup::Ssl => {
                // Bytes before the handshake could have been put there by somebody else
                // (CVE-2021-23214).
                if !buf.is_empty() {
                    count(&shared.metrics.malformed);
                    return Err(NotAdmitted::Silent);
                }
                if !shared.client_tls.is_on() || matches!(stream, Stream::Tls(_)) {
                    write_all(&mut stream, b"N").await.map_err(silent)?;
                    continue;
                }
                write_all(&mut stream, b"S").await.map_err(silent)?;
                let accepted = accept_tls(shared, stream).await?;
                (stream, binding) = (accepted.stream, accepted.binding);
            }
        }
    }
    count(&shared.metrics.malformed);
    Err(NotAdmitted::Silent)
}

/// Takes the balancer's header and not one byte more: a TLS handshake may follow it.
async fn take_proxy_header(shared: &Shared, stream: &mut Stream) -> Login<Option<SocketAddr>> {
    let mut buf = BytesMut::new();
    loop {
        match proxy_protocol::take_header(&mut buf) {
            Ok(Some(header)) => {
                let source = header.client;
                tracing::debug!(?source, "client connected through a balancer");
                return Ok(source);
            }
            Ok(None) => {
                let missing = proxy_protocol::missing(&buf);
                read_at_most(stream, &mut buf, missing).await.map_err(silent)?;
            }
            Err(_) => {
                count(&shared.metrics.malformed);
                return Err(NotAdmitted::Silent);
            }
        }
    }
}

/// Direct TLS (`sslnegotiation=direct`) begins without a request for it.
async fn begins_with_tls(stream: &Stream) -> Login<bool> {
    let mut first = [0];
    let seen = stream.tcp().peek(&mut first).await.map_err(silent)?;
    Ok(seen == 1 && first == [TLS_HANDSHAKE])
}

async fn accept_tls(shared: &Shared, stream: Stream) -> Login<Accepted> {
    let Stream::Plain(tcp) = stream else { return Err(NotAdmitted::Silent) };
    let accepted = shared.client_tls.accept(tcp).await;
    accepted.ok_or_else(|| {
        count(&shared.metrics.tls_failures);
        NotAdmitted::Silent
    })
}

fn bad_startup<T>(shared: &Shared, stream: Stream, error: StartupError) -> Login<T> {
    count(&shared.metrics.malformed);
    let fields = match error {
        StartupError::Length { .. } => return Err(NotAdmitted::Silent),
        StartupError::Version(version) => ErrorFields::fatal(
            FEATURE_NOT_SUPPORTED,
            format!("unsupported frontend protocol {version}"),
        ),
        StartupError::Malformed(_) => {
            ErrorFields::fatal(PROTOCOL_VIOLATION, "invalid startup packet")
        }
    };
    refuse(stream, &fields)
}

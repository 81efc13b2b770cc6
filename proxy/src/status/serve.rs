//! Access to the status port, and its bounds: the port is as open as the operator makes it, and
//! costs the proxy's clients nothing whoever uses it.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::extract::State;
use axum::http::header::{AUTHORIZATION, WWW_AUTHENTICATE};
use axum::http::{HeaderMap, StatusCode};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use kornak_cluster::discard;
use kornak_config::agent::BasicAuth;
use kornak_config::proxy::StatusTls;
use secrecy::ExposeSecret;
use subtle::ConstantTimeEq;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;

use crate::net::descriptors::MAX_STATUS_CONNECTIONS;
use crate::net::tls::{self, TlsError};
use crate::shared::Shared;

/// The longest a request's head may take to arrive, a kept connection be idle, and a handshake last.
const HEAD_TIME: Duration = Duration::from_secs(10);

/// The longest a connection may live, whatever its client reads.
const CONNECTION_TIME: Duration = Duration::from_secs(300);

/// Pause after a failed accept: the process may be out of file descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Where the status is served.
pub struct Port {
    pub socket: TcpListener,
    pub tls: Option<TlsAcceptor>,
}

impl std::fmt::Debug for Port {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Port").field("socket", &self.socket).finish_non_exhaustive()
    }
}

impl Port {
    /// On a bound socket.
    ///
    /// # Errors
    /// The certificate cannot be used.
    pub fn new(socket: TcpListener, tls: Option<&StatusTls>) -> Result<Self, TlsError> {
        Ok(Self { socket, tls: tls.map(tls::of_status).transpose()? })
    }
}

/// Serves the status on all ports until told to stop.
pub async fn serve(shared: Arc<Shared>, ports: Vec<Port>, stop: CancellationToken) {
    let authentication =
        shared.settings().status.as_ref().and_then(|status| status.authentication.clone());
    let router = super::router(Arc::clone(&shared), authentication.is_some());
    let router = match authentication {
        None => router,
        Some(auth) => {
            let expected: Arc<[u8]> = authorization(&auth).into_bytes().into();
            router.layer(middleware::from_fn_with_state(expected, check))
        }
    };
    let room = Arc::new(Semaphore::new(MAX_STATUS_CONNECTIONS));
    let serving = ports.into_iter().map(|port| accept(port, router.clone(), Arc::clone(&room)));
    stop.run_until_cancelled(futures_util::future::join_all(serving)).await;
}

async fn accept(port: Port, router: Router, room: Arc<Semaphore>) {
    let mut connections = JoinSet::new();
    loop {
        // The semaphore is never closed.
        let Ok(permit) = Arc::clone(&room).acquire_owned().await else { return };
        let accepted = tokio::select! {
            accepted = port.socket.accept() => accepted,
            Some(_) = connections.join_next() => continue,
        };
        match accepted {
            Ok((tcp, _)) => {
                let (tls, router) = (port.tls.clone(), router.clone());
                connections.spawn(async move {
                    discard::goes_on_either_way(
                        tokio::time::timeout(CONNECTION_TIME, one(tcp, tls, router)).await,
                    );
                    drop(permit);
                });
            }
            Err(error) => {
                tracing::warn!(
                    error = &error as &dyn std::error::Error,
                    "connection to the status port could not be accepted"
                );
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

async fn one(tcp: TcpStream, tls: Option<TlsAcceptor>, router: Router) {
    discard::only_helps(tcp.set_nodelay(true));
    let Some(acceptor) = tls else { return http(tcp, router).await };
    if let Ok(Ok(stream)) = tokio::time::timeout(HEAD_TIME, acceptor.accept(tcp)).await {
        http(stream, router).await;
    }
}

async fn http(stream: impl AsyncRead + AsyncWrite + Unpin, router: Router) {
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_TIME)
        .serve_connection(TokioIo::new(stream), TowerToHyperService::new(router));
    if let Err(error) = connection.await {
        tracing::debug!(
            error = &error as &dyn std::error::Error,
            "connection to the status port ended"
        );
    }
}

/// The expected value of `Authorization`.
fn authorization(auth: &BasicAuth) -> String {
    let pair = format!("{}:{}", auth.username, auth.password.expose_secret());
    format!("Basic {}", BASE64_STANDARD.encode(pair))
}

async fn check(
    State(expected): State<Arc<[u8]>>,
    headers: HeaderMap,
    request: axum::extract::Request<Body>,
    next: Next,
) -> Response {
    let given = headers.get(AUTHORIZATION).map_or(&[][..], |value| value.as_bytes());
    if bool::from(given.ct_eq(&expected)) {
        return next.run(request).await;
    }
    let realm = [(WWW_AUTHENTICATE, "Basic realm=\"kornak proxy\"")];
    (StatusCode::UNAUTHORIZED, realm, "a user and a password are asked for\n").into_response()
}

/// The sockets, to be served by tokio.
///
/// # Errors
/// The runtime does not take one.
pub fn sockets(bound: Vec<std::net::TcpListener>) -> io::Result<Vec<TcpListener>> {
    bound.into_iter().map(TcpListener::from_std).collect()
}

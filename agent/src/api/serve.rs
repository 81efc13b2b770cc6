//! Listening and serving: one small task per connection, none of them able to keep the agent from
//! stopping, and none that waits for a request able to keep another one out ([`Room`]).

use std::net::SocketAddr;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use hyper::Request;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use kornak_cluster::discard;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::{AbortHandle, JoinSet};
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;
use tower::ServiceExt;

use super::room::{Room, Seat, Verdict};
use super::{Api, Client, router};
use crate::node::Command;

/// Between two look-ups of where members speak from.
const MEMBERS_EVERY: Duration = Duration::from_secs(10);

/// The longest a request's head may take to arrive, and a kept connection may be idle.
const HEAD_TIME: Duration = Duration::from_secs(20);

/// The longest a TLS handshake may take.
const HANDSHAKE_TIME: Duration = Duration::from_secs(10);

/// The longest a connection may live, for a client that does not read its answers. Longer than any
/// answer takes.
const CONNECTION_TIME: Duration = Duration::from_secs(900);

/// How long requests under way may still take once the agent stops.
const STOP_TIME: Duration = Duration::from_secs(2);

/// Pause after a failed accept: the process may be out of file descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Serves the API until `stop`, then lets requests under way finish within two seconds.
pub async fn serve(listener: TcpListener, api: Arc<Api>, stop: CancellationToken) {
    let router = router(Arc::clone(&api));
    let room = Arc::new(Room::default());
    let mut connections = JoinSet::new();
    let mut restarts = pin!(planned_restarts(&api));
    let mut members = pin!(follow_members(&api, &room));
    loop {
        let accepted = tokio::select! {
            () = stop.cancelled() => break,
            () = &mut restarts => continue,
            () = &mut members => continue,
            Some(_) = connections.join_next() => continue,
            accepted = accept(&listener) => accepted,
        };
        let Some((stream, from)) = accepted else { continue };
        let seat = match room.admit(from.ip()) {
            Verdict::Seated(seat) => seat,
            Verdict::Full => {
                tracing::debug!(client = %from, "connection to the REST API refused: too many connections");
                continue;
            }
        };
        let tls = api.tls.as_ref().map(|tls| tls.acceptor());
        let (router, stop, mine) = (router.clone(), stop.clone(), seat.clone());
        let task: AbortHandle = connections.spawn(async move {
            let served = accepted_connection(stream, from, tls, router, stop, mine);
            discard::goes_on_either_way(tokio::time::timeout(CONNECTION_TIME, served).await);
        });
        // One that has ended meanwhile has nothing to abort.
        seat.ends_with(task);
    }
    drop(listener);
    let finished = async { while connections.join_next().await.is_some() {} };
    if tokio::time::timeout(STOP_TIME, finished).await.is_err() {
        tracing::info!("requests cut off because the agent stops");
    }
}

/// The next connection.
async fn accept(listener: &TcpListener) -> Option<(TcpStream, SocketAddr)> {
    match listener.accept().await {
        Ok(accepted) => Some(accepted),
        Err(error) => {
            tracing::warn!(
                error = &error as &dyn std::error::Error,
                "connection to the REST API could not be accepted"
            );
            tokio::time::sleep(ACCEPT_PAUSE).await;
            None
        }
    }
}

/// Encrypts the connection first, if the API is https.
async fn accepted_connection(
    stream: TcpStream,
    from: SocketAddr,
    tls: Option<TlsAcceptor>,
    router: Router,
    stop: CancellationToken,
    seat: Seat,
) {
    // Answers are small and written at once; without this they could wait for an acknowledgement.
    discard::only_helps(stream.set_nodelay(true));
    let Some(acceptor) = tls else {
        let client = Client { address: from.ip(), certified: false };
        return connection(stream, client, router, stop, seat).await;
    };
    match tokio::time::timeout(HANDSHAKE_TIME, acceptor.accept(stream)).await {
        Ok(Ok(stream)) => {
            let certified = stream.get_ref().1.peer_certificates().is_some();
            let client = Client { address: from.ip(), certified };
            connection(stream, client, router, stop, seat).await;
        }
        Ok(Err(error)) => {
            tracing::debug!(error = &error as &dyn std::error::Error, client = %from, "TLS handshake with the REST API failed");
        }
        Err(_) => tracing::debug!(client = %from, "TLS handshake with the REST API took too long"),
    }
}

async fn connection(
    stream: impl AsyncRead + AsyncWrite + Unpin,
    client: Client,
    router: Router,
    stop: CancellationToken,
    seat: Seat,
) {
    let service = service_fn(move |mut request: Request<Incoming>| {
        request.extensions_mut().insert(client);
        let work = seat.work();
        let answer = router.clone().oneshot(request.map(Body::new));
        async move {
            let answer = answer.await;
            drop(work);
            answer
        }
    });
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_TIME)
        .serve_connection(TokioIo::new(stream), service);
    let mut connection = pin!(connection);
    let result = tokio::select! {
        result = connection.as_mut() => result,
        () = stop.cancelled() => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = result {
        tracing::debug!(error = &error as &dyn std::error::Error, client = %client.address, "connection to the REST API ended");
    }
}

/// Keeps the addresses that members speak from. Never returns.
async fn follow_members(api: &Api, room: &Room) {
    let mut views = api.views.clone();
    loop {
        let hosts = {
            let view = Arc::clone(&views.borrow_and_update());
            api.member_hosts(&view)
        };
        let mut found = std::collections::HashSet::new();
        for host in hosts {
            if let Ok(address) = host.parse::<std::net::IpAddr>() {
                found.insert(address.to_canonical());
            } else if let Ok(addresses) = tokio::net::lookup_host((host.as_str(), 0)).await {
                found.extend(addresses.map(|address| address.ip().to_canonical()));
            }
        }
        room.set_members(found);
        tokio::time::sleep(MEMBERS_EVERY).await;
    }
}

/// Carries planned restarts out when their time has come. Never returns.
async fn planned_restarts(api: &Api) {
    loop {
        let request = api.restart_plan.due(&api.views).await;
        let timeout = request.timeout;
        tracing::info!("scheduled restart is due");
        let restart = |answer| Command::Restart { timeout, answer };
        match api.ask(super::ANSWER_LIMIT, restart).await {
            Ok(Ok(_)) => {}
            Ok(Err(error)) => {
                tracing::warn!(
                    error = &error as &dyn std::error::Error,
                    "scheduled restart failed"
                );
            }
            Err(error) => tracing::warn!(
                error = &error as &dyn std::error::Error,
                "scheduled restart was not carried out"
            ),
        }
    }
}

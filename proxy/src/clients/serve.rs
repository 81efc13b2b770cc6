//! Listeners, threads, and one task for each client.
//!
//! Every thread is a runtime of its own with its own listening sockets (SO_REUSEPORT): a session
//! stays where it was accepted, and no two cores share its buffers.

pub mod patience;

use std::cell::RefCell;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, ToSocketAddrs};
use std::panic::AssertUnwindSafe;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::FutureExt;
use kornak_cluster::discard;
use kornak_config::proxy::{ListenerSettings, ProxyProtocol};
use kornak_config::{Listen, ProxySettings};
use socket2::{Domain, Protocol, Socket, Type};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc::UnboundedReceiver;
use tokio::sync::oneshot;
use tokio::task::LocalSet;
use tokio_util::sync::CancellationToken;

use crate::admission::doors::Visit;
use crate::clients::client::together::family_of;
use crate::clients::client::{Client, End, close, side_of};
use crate::clients::forward::{Conversation, SCRATCH_BYTES};
use crate::clients::login::{Admitted, NotAdmitted, Shown, login};
use crate::clients::pool_keeper;
use crate::metrics::count;
use crate::net::stream::{self, Leg, Stream};
use crate::pool::lender::Order;
use crate::registry::{Doing, Entry, Flags};
use crate::shared::Shared;
use crate::waiting::gate::Ticket;

/// Connections the kernel keeps until we accept them.
const BACKLOG: i32 = 4096;

/// Pause after accept failed for want of file descriptors: others will be closed.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// Pause between two warnings that it does.
const WARN_PAUSE: Duration = Duration::from_secs(10);

/// Pause between two looks at a client's time, at least.
const LEAST_PAUSE: Duration = Duration::from_millis(20);

/// One socket of a listener, for one thread.
#[derive(Debug)]
pub struct Bound {
    pub listener: usize,
    pub socket: std::net::TcpListener,
}

/// Binds every address of the hosts once for each of `copies` threads: `*` is all addresses of both
/// kinds, a name all that it stands for. Answers the first address.
pub fn bind(
    listen: &Listen,
    copies: usize,
) -> io::Result<(SocketAddr, Vec<std::net::TcpListener>)> {
    let mut first = None;
    let mut sockets = Vec::new();
    // A port that the system chooses is the same on every address.
    let mut port = listen.port;
    for (address, optional) in addresses(listen)? {
        let address = SocketAddr::new(address, port);
        let bound = match bind_one(address, copies) {
            Err(error) if optional && is_absent(&error) => continue,
            bound => bound?,
        };
        port = bound.0.port();
        first.get_or_insert(bound.0);
        sockets.extend(bound.1);
    }
    let first = first.ok_or_else(|| io::Error::from(io::ErrorKind::AddrNotAvailable))?;
    Ok((first, sockets))
}

/// Every address once, and whether it may be missing: not every host has both kinds.
fn addresses(listen: &Listen) -> io::Result<Vec<(IpAddr, bool)>> {
    let mut found: Vec<(IpAddr, bool)> = Vec::new();
    let mut add = |address: IpAddr, optional: bool| {
        if found.iter().all(|(known, _)| *known != address) {
            found.push((address, optional));
        }
    };
    for host in &listen.hosts {
        if host == "*" {
            add(Ipv4Addr::UNSPECIFIED.into(), true);
            add(Ipv6Addr::UNSPECIFIED.into(), true);
            continue;
        }
        let all: Vec<SocketAddr> = (host.as_str(), listen.port).to_socket_addrs()?.collect();
        let several = all.len() > 1;
        all.into_iter().for_each(|address| add(address.ip(), several));
    }
    Ok(found)
}

/// The host has no address of this kind.
fn is_absent(error: &io::Error) -> bool {
    let code = error.raw_os_error().map(rustix::io::Errno::from_raw_os_error);
    matches!(code, Some(rustix::io::Errno::AFNOSUPPORT | rustix::io::Errno::ADDRNOTAVAIL))
}

/// The first socket is bound without sharing, so that another proxy's port is not shared by accident;
/// it goes on as one of the copies, so that nobody who connects meanwhile is turned away.
fn bind_one(
    address: SocketAddr,
    copies: usize,
) -> io::Result<(SocketAddr, Vec<std::net::TcpListener>)> {
    let alone = socket_at(address)?;
    alone.bind(&address.into())?;
    let bound = alone.local_addr()?.as_socket();
    let address = bound.ok_or_else(|| io::Error::from(io::ErrorKind::AddrNotAvailable))?;
    // From here on it may be shared with those of the same user that ask for it.
    alone.set_reuse_port(true)?;
    let mut sockets = vec![alone];
    for _ in 1..copies {
        let socket = socket_at(address)?;
        socket.set_reuse_port(true)?;
        socket.bind(&address.into())?;
        sockets.push(socket);
    }
    for socket in &sockets {
        socket.listen(BACKLOG)?;
    }
    Ok((address, sockets.into_iter().map(Into::into).collect()))
}

fn socket_at(address: SocketAddr) -> io::Result<Socket> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
    socket.set_reuse_address(true)?;
    if address.is_ipv6() {
        socket.set_only_v6(true)?;
    }
    socket.set_nonblocking(true)?;
    Ok(socket)
}

/// Starts a thread that serves these sockets until it is told to stop and its sessions have ended.
pub fn spawn_thread(
    lane: usize,
    shared: Arc<Shared>,
    sockets: Vec<Bound>,
    orders: UnboundedReceiver<Order>,
    stop: CancellationToken,
) -> io::Result<oneshot::Receiver<()>> {
    let (done, finished) = oneshot::channel();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    std::thread::Builder::new().name(format!("kornak-proxy-{lane}")).spawn(move || {
        let local = LocalSet::new();
        local.block_on(&runtime, serve(lane, shared, sockets, orders, stop));
        // The receiver may have gone away first.
        discard::receiver_may_be_gone(done.send(()));
    })?;
    Ok(finished)
}

/// The state that the sessions of one thread share.
struct Thread {
    lane: usize,
    shared: Arc<Shared>,
    scratch: Rc<RefCell<Box<[u8]>>>,
    listeners: RefCell<Listeners>,
}

/// Settings of the listeners, one copy for the sessions of a thread; made anew after a reload.
struct Listeners {
    of: Arc<ProxySettings>,
    all: Vec<Arc<ListenerSettings>>,
}

impl Listeners {
    fn new(shared: &Shared) -> Self {
        let of = Arc::clone(&shared.settings());
        let all = of.listeners.iter().cloned().map(Arc::new).collect();
        Self { of, all }
    }
}

impl Thread {
    fn listener(&self, at: usize) -> Option<Arc<ListenerSettings>> {
        let mut known = self.listeners.borrow_mut();
        if !Arc::ptr_eq(&known.of, &self.shared.settings()) {
            *known = Listeners::new(&self.shared);
        }
        known.all.get(at).cloned()
    }
}

async fn serve(
    lane: usize,
    shared: Arc<Shared>,
    sockets: Vec<Bound>,
    orders: UnboundedReceiver<Order>,
    stop: CancellationToken,
) {
    let listeners = RefCell::new(Listeners::new(&shared));
    let scratch = Rc::new(RefCell::new(vec![0; SCRATCH_BYTES].into_boxed_slice()));
    let thread = Rc::new(Thread { lane, shared: Arc::clone(&shared), scratch, listeners });
    let sessions = tokio_util::task::TaskTracker::new();
    // Sessions that are told to end may still want a connection to end their transactions on.
    let keeping = pool_keeper::run(lane, Arc::clone(&shared), orders);
    tokio::task::spawn_local(keeping);
    for Bound { listener, socket } in sockets {
        match TcpListener::from_std(socket) {
            Ok(socket) => {
                let accepting =
                    accept(Rc::clone(&thread), listener, socket, stop.clone(), sessions.clone());
                tokio::task::spawn_local(accepting);
            }
            Err(error) => {
                tracing::error!(
                    error = &error as &dyn std::error::Error,
                    "listener cannot be used"
                );
            }
        }
    }
    stop.cancelled().await;
    sessions.close();
    drain(&shared, &sessions).await;
}

/// Ends sessions between their transactions, and after `shutdown_timeout` wherever they are.
async fn drain(shared: &Shared, sessions: &tokio_util::task::TaskTracker) {
    let give_up = Instant::now() + shared.settings().limits.shutdown_timeout;
    let mut flag = Flags::STOP;
    for _ in 0.. {
        shared.registry.raise_all(flag);
        let pause = tokio::time::timeout(Duration::from_millis(100), sessions.wait());
        if pause.await.is_ok() {
            return;
        }
        if Instant::now() >= give_up {
            if flag == Flags::STOP_NOW {
                return;
            }
            flag = Flags::STOP_NOW;
        }
    }
}

async fn accept(
    thread: Rc<Thread>,
    listener: usize,
    socket: TcpListener,
    stop: CancellationToken,
    sessions: tokio_util::task::TaskTracker,
) {
    let mut warned = None;
    loop {
        let accepted = tokio::select! {
            accepted = thread.shared.doors.room().then(|()| socket.accept()) => accepted,
            () = stop.cancelled() => return,
        };
        match accepted {
            Ok((tcp, from)) => {
                count(&thread.shared.metrics.accepted);
                stream::tune(&tcp, Leg::Client);
                let shared = Arc::clone(&thread.shared);
                // Counted before the next one is accepted, whenever its task begins.
                let visit = shared.doors.knock(origin(&thread, listener, from));
                let task = session(Rc::clone(&thread), listener, tcp, visit);
                // Not an async block, which would keep room for the task twice.
                sessions.spawn_local(AssertUnwindSafe(task).catch_unwind().map(move |ended| {
                    if ended.is_err() {
                        count(&shared.metrics.panics);
                        tracing::error!("session task panicked (bug)");
                    }
                }));
            }
            Err(error) => {
                if warned.is_none_or(|when: Instant| when.elapsed() >= WARN_PAUSE) {
                    warned = Some(Instant::now());
                    tracing::warn!(
                        error = &error as &dyn std::error::Error,
                        "connections cannot be accepted at the moment"
                    );
                }
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

/// The address of a client, unless a balancer that is believed is going to say it.
fn origin(thread: &Thread, listener: usize, from: SocketAddr) -> Option<IpAddr> {
    let behind = |it: &Arc<ListenerSettings>| matches!(it.proxy_protocol, ProxyProtocol::From(_));
    let is_behind = thread.listener(listener).as_ref().is_some_and(behind);
    (!is_behind).then(|| from.ip().to_canonical())
}

async fn session(thread: Rc<Thread>, listener: usize, tcp: TcpStream, visit: Visit) {
    let shared = &thread.shared;
    let Some(settings) = &thread.listener(listener) else { return };
    let sent_away = visit.sent_away();
    let mut entry = shared.registry.enter(listener, thread.lane, visit);
    // What is over soon is boxed: an idle session keeps no room for it.
    let admitting = Box::pin(admit(&thread, settings, tcp, &mut entry));
    let admitted = tokio::select! {
        admitted = admitting => admitted,
        () = sent_away.cancelled() => {
            count(&shared.metrics.sent_away);
            return;
        }
    };
    let Some(admitted) = admitted else { return };
    let mut client = assemble(&thread, settings, &entry, admitted);
    if shared.settings().log_connections {
        log_connection(settings, &entry);
    }
    let first = patience::shortest(&shared.settings().limits);
    let end = match first {
        None => client.run().await,
        Some(first) => Box::pin(run_in_time(&mut client, first)).await,
    };
    if shared.settings().log_disconnections {
        log_disconnection(settings, &entry, &end);
    }
    Box::pin(client.finish(end)).await;
    drop(entry);
}

fn log_connection(listener: &ListenerSettings, entry: &Entry) {
    let (Some(who), session) = (entry.visit.who(), entry.handle().id) else { return };
    tracing::info!(
        session,
        listener = listener.name,
        client = %who.address,
        role = %Shown(&who.user),
        database = %Shown(&who.database),
        "client has logged in"
    );
}

fn log_disconnection(listener: &ListenerSettings, entry: &Entry, end: &End) {
    let (Some(who), handle) = (entry.visit.who(), entry.handle()) else { return };
    let why = match end {
        End::Gone => "it left".to_owned(),
        End::Told(fields) => format!("told {}", fields.sqlstate),
        End::Passed(_) => "its server ended it".to_owned(),
        End::Broken => "broken off".to_owned(),
    };
    tracing::info!(
        session = handle.id,
        listener = listener.name,
        client = %who.address,
        role = %Shown(&who.user),
        database = %Shown(&who.database),
        seconds = handle.since.elapsed().as_secs(),
        why,
        "client session ended"
    );
}

async fn admit(
    thread: &Thread,
    settings: &ListenerSettings,
    tcp: TcpStream,
    entry: &mut Entry,
) -> Option<Admitted> {
    let shared = &thread.shared;
    let began = Instant::now();
    let login = login(shared, settings, Stream::Plain(tcp), entry);
    let limit = shared.settings().limits.login_timeout;
    match tokio::time::timeout(limit, login).await {
        Ok(Ok(admitted)) => {
            count(&shared.metrics.logins);
            shared.metrics.login.record(began.elapsed());
            Some(admitted)
        }
        Ok(Err(NotAdmitted::Silent)) => None,
        Ok(Err(NotAdmitted::Refused(stream, message))) => {
            count(&shared.metrics.login_failures);
            close(stream, &message).await;
            None
        }
        Err(_) => {
            count(&shared.metrics.login_failures);
            None
        }
    }
}

/// Puts a session together, in one box: futures keep a place for every value that they move.
fn assemble(
    thread: &Thread,
    settings: &Arc<ListenerSettings>,
    entry: &Entry,
    admitted: Admitted,
) -> Box<Client> {
    let shared = &thread.shared;
    let handle = Arc::clone(entry.handle());
    handle.set_doing(Doing::Idle);
    handle.set_pin(admitted.session.pinned());
    if let Some(family) = family_of(&admitted.identity.startup) {
        handle.set_family(family);
    }
    let mut session = admitted.session;
    session.set_policy(shared.settings().failover);
    let talk = Conversation::new(
        admitted.stream,
        session,
        admitted.read,
        side_of(&settings.target),
        Ticket::new(&shared.gate, thread.lane),
        handle,
        Arc::clone(shared),
    );
    let mut client = Box::new(Client {
        talk,
        identity: admitted.identity,
        listener: Arc::clone(settings),
        scratch: Rc::clone(&thread.scratch),
        home: None,
    });
    client.talk.member = admitted.member;
    if client.talk.member.is_some() {
        client.talk.show_whole_texts();
    }
    if let Some(opened) = admitted.opened {
        client.link(opened);
    }
    client
}

/// Has the session look at its client's time whenever that may be up. What is held back is not looked
/// at: a server connection that is being opened for it would be given up.
async fn run_in_time(client: &mut Client, first: Duration) -> End {
    let handle = Arc::clone(&client.talk.handle);
    handle.set_next_look(Instant::now() + first);
    let mut running = std::pin::pin!(client.run());
    loop {
        let next = handle.next_look().max(Instant::now() + LEAST_PAUSE);
        tokio::select! {
            end = &mut running => return end,
            () = tokio::time::sleep_until(next.into()) => {
                if handle.doing() != Doing::Held {
                    handle.raise(Flags::TIME);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_star_is_both_kinds_of_addresses() {
        let listen = |hosts: &[&str]| Listen {
            hosts: hosts.iter().map(|host| (*host).to_owned()).collect(),
            port: 0,
        };
        let (first, sockets) = bind(&listen(&["*"]), 2).unwrap();
        let all: Vec<SocketAddr> = sockets.iter().map(|it| it.local_addr().unwrap()).collect();
        assert!(all.iter().all(|address| address.port() == first.port()), "{all:?}");
        assert!(all.iter().filter(|address| address.is_ipv4()).count() == 2, "{all:?}");
        // Where the host has no IPv6 there is none.
        let has_v6 = std::net::TcpListener::bind("[::1]:0").is_ok();
        assert_eq!(
            all.iter().filter(|address| address.is_ipv6()).count(),
            if has_v6 { 2 } else { 0 }
        );
        // Another process's port is not shared by accident.
        let taken = Listen { hosts: vec!["127.0.0.1".to_owned()], port: first.port() };
        drop(sockets);
        let other = std::net::TcpListener::bind(("127.0.0.1", first.port())).unwrap();
        assert!(bind(&taken, 2).is_err());
        drop(other);
        let (_, sockets) = bind(&listen(&["localhost"]), 1).unwrap();
        assert!(!sockets.is_empty());
    }
}

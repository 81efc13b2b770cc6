//! From accept to the first ReadyForQuery.
//!
//! ```text
//! accepted ── TLS, GSSENC ──► startup packet ──► authentication ──► server, or a cached welcome
//!    └─ CancelRequest ──► routed, closed             │ scram: by us    └─► AuthenticationOk …
//!                                                    └ relay: by the server, through us
//! ```
//! The caller has the deadline. A login that no server can be found for is answered from what an
//! equal session was told before; its first query waits (DESIGN.md §6).

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use kornak_config::proxy::{AuthMethod, ListenerSettings};
use kornak_protocol::auth::{Binding, Credentials, Refusal, ServerAuth, Step, StoredPassword};
use kornak_protocol::backend::{self, Authentication, BackendKey};
use kornak_protocol::error::ErrorFields;
use kornak_protocol::frame::{Frame, take_frame};
use kornak_protocol::limits::MAX_AUTH_MESSAGE_LEN;
use kornak_protocol::params::Parameters;
use kornak_protocol::sqlstate::{
    CANNOT_CONNECT_NOW, FEATURE_NOT_SUPPORTED, INTERNAL_ERROR, INVALID_AUTHORIZATION,
    PROTOCOL_VIOLATION,
};
use kornak_protocol::startup::{
    self, CancelRequest, ProtocolVersion, Replication, Startup, StartupError, StartupMessage,
    TLS_HANDSHAKE,
};
use kornak_protocol::txn::TransactionStatus;
use tokio_rustls::TlsStream;

use crate::backend::{Address, DialError, next_frame};
use crate::client::{Identity, Opened, open, side_of};
use crate::metrics::count;
use crate::proxy_protocol::take_header;
use crate::registry::Entry;
use crate::route;
use crate::session::Session;
use crate::session::journal::Pin;
use crate::shared::Shared;
use crate::stream::{Stream, read_more, write_all};

/// How long a login waits for a server before it is answered from memory.
const WELCOME_PATIENCE: Duration = Duration::from_millis(500);

/// Pause before servers are asked again for a verifier.
const ASK_PAUSE: Duration = Duration::from_millis(100);

/// Rounds of TLS or GSSAPI requests before the startup packet: one of each.
const MAX_REQUESTS: usize = 2;

/// Newest minor version of protocol 3 that is served.
const NEWEST_MINOR: u16 = 2;

/// A client that has logged in.
#[derive(Debug)]
pub struct Admitted {
    pub stream: Stream,
    /// Bytes that came behind its last authentication message.
    pub read: BytesMut,
    pub identity: Identity,
    pub session: Session,
    /// Its server, unless the login was answered from memory.
    pub opened: Option<Opened>,
}

/// Why nobody was admitted.
#[derive(Debug)]
pub enum NotAdmitted {
    /// It was a cancel request, or the client left, or it is no client of PostgreSQL.
    Silent,
    /// It is told this.
    Refused(Stream, Bytes),
}

type Login<T> = Result<T, NotAdmitted>;

fn silent(_: std::io::Error) -> NotAdmitted {
    NotAdmitted::Silent
}

fn refuse<T>(stream: Stream, fields: &ErrorFields) -> Login<T> {
    let mut out = BytesMut::new();
    fields.put(&mut out);
    Err(NotAdmitted::Refused(stream, out.freeze()))
}

/// Takes a client from its first byte to its first ReadyForQuery.
pub async fn login(
    shared: &Arc<Shared>,
    listener: &ListenerSettings,
    stream: Stream,
    entry: &mut Entry,
) -> Login<Admitted> {
    let mut buf = BytesMut::new();
    let mut stream = stream;
    if listener.proxy_protocol {
        take_proxy_header(shared, &mut stream, &mut buf).await?;
    }
    let (mut stream, message) = take_startup(shared, stream, &mut buf).await?;
    let Some(user) = message.user().map(Bytes::copy_from_slice) else {
        let text = "no PostgreSQL user name specified in startup packet";
        return refuse(stream, &ErrorFields::fatal(INVALID_AUTHORIZATION, text));
    };
    let negotiation = message.negotiate(NEWEST_MINOR);
    let mut out = BytesMut::new();
    if negotiation.must_tell() && negotiation.put(&mut out).is_ok() {
        write_all(&mut stream, &out).await.map_err(silent)?;
    }
    let unknown: Vec<(&str, Option<&[u8]>)> = negotiation
        .unknown
        .iter()
        .filter_map(|name| Some((std::str::from_utf8(name).ok()?, None)))
        .collect();
    let mut packet = BytesMut::new();
    if message.put_patched(ProtocolVersion::V3_0, &unknown, &mut packet).is_err() {
        let text = "startup packet cannot be passed on";
        return refuse(stream, &ErrorFields::fatal(PROTOCOL_VIOLATION, text));
    }
    let startup = packet.freeze();
    let replication = message.replication() != Replication::None;
    let visitor =
        Visitor { shared, listener, user, startup, version: negotiation.version, replication };
    match shared.settings.auth.method {
        AuthMethod::Relay => visitor.relay(stream, buf, entry).await,
        AuthMethod::Trust => visitor.admit(stream, buf, entry, Credentials::None).await,
        AuthMethod::Scram => {
            let (stream, credentials) = visitor.authenticate(stream, &mut buf).await?;
            visitor.admit(stream, buf, entry, credentials).await
        }
    }
}

async fn take_proxy_header(shared: &Shared, stream: &mut Stream, buf: &mut BytesMut) -> Login<()> {
    loop {
        match take_header(buf) {
            Ok(Some(source)) => {
                tracing::debug!(?source, "client behind a balancer");
                return Ok(());
            }
            Ok(None) => read_more(stream, buf).await.map_err(silent)?,
            Err(_) => {
                count(&shared.metrics.malformed);
                return Err(NotAdmitted::Silent);
            }
        }
    }
}

async fn take_startup(
    shared: &Shared,
    mut stream: Stream,
    buf: &mut BytesMut,
) -> Login<(Stream, StartupMessage)> {
    for _ in 0..=MAX_REQUESTS {
        let startup = loop {
            if buf.first() == Some(&TLS_HANDSHAKE) {
                return Err(NotAdmitted::Silent);
            }
            match startup::take_startup(buf) {
                Ok(Some(startup)) => break startup,
                Ok(None) => read_more(&mut stream, buf).await.map_err(silent)?,
                Err(error) => return bad_startup(shared, stream, error),
            }
        };
        match startup {
            Startup::Session(message) => {
                let unencrypted = matches!(stream, Stream::Plain(_));
                if shared.settings.tls.client.required && unencrypted {
                    let text = "the proxy asks for an encrypted connection";
                    return refuse(stream, &ErrorFields::fatal(INVALID_AUTHORIZATION, text));
                }
                return Ok((stream, message));
            }
            Startup::Cancel(request) => {
                cancel(shared, &request).await;
                return Err(NotAdmitted::Silent);
            }
            Startup::GssEnc => write_all(&mut stream, b"N").await.map_err(silent)?,
            Startup::Ssl => stream = answer_tls(shared, stream, buf).await?,
        }
    }
    count(&shared.metrics.malformed);
    Err(NotAdmitted::Silent)
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

async fn answer_tls(shared: &Shared, mut stream: Stream, buf: &BytesMut) -> Login<Stream> {
    // Bytes before the handshake could have been put there by somebody else (CVE-2021-23214).
    if !buf.is_empty() {
        count(&shared.metrics.malformed);
        return Err(NotAdmitted::Silent);
    }
    let Some(acceptor) = &shared.client_tls else {
        write_all(&mut stream, b"N").await.map_err(silent)?;
        return Ok(stream);
    };
    write_all(&mut stream, b"S").await.map_err(silent)?;
    match stream {
        Stream::Plain(tcp) => {
            let tls = acceptor.accept(tcp).await.map_err(silent)?;
            Ok(Stream::Tls(Box::new(TlsStream::Server(tls))))
        }
        Stream::Tls(_) => Err(NotAdmitted::Silent),
    }
}

/// Passes a cancel request on to the server of the session that it means, or to the session itself
/// if its query is held here.
async fn cancel(shared: &Shared, request: &CancelRequest) {
    count(&shared.metrics.cancels);
    let Some(handle) = shared.registry.by_key(request.pid, &request.key) else { return };
    match handle.cancel_target() {
        Some(target) if handle.doing() != crate::registry::Doing::Held => {
            let limit = shared.settings.limits.connect_timeout;
            let tls = shared.prober.tls();
            let sent = crate::backend::cancel(&target.address, tls, &target.key);
            if let Ok(Err(error)) = tokio::time::timeout(limit, sent).await {
                tracing::debug!(
                    error = &error as &dyn std::error::Error,
                    "cancel request not delivered"
                );
            }
        }
        _ => handle.raise(crate::registry::Flags::CANCEL),
    }
}

/// A client whose startup packet is known.
struct Visitor<'a> {
    shared: &'a Arc<Shared>,
    listener: &'a ListenerSettings,
    user: Bytes,
    startup: Bytes,
    version: ProtocolVersion,
    replication: bool,
}

impl Visitor<'_> {
    /// Asks the client for a proof that its role's verifier accepts.
    async fn authenticate(
        &self,
        mut stream: Stream,
        buf: &mut BytesMut,
    ) -> Login<(Stream, Credentials)> {
        let found = tokio::time::timeout(self.patience(), self.verifier()).await;
        let known = match found.unwrap_or(Err(DialError::Timeout)) {
            Ok(known) => known,
            Err(error) if error.is_about_server() => return self.no_server(stream, &error),
            Err(error) => {
                tracing::error!(
                    error = &error as &dyn std::error::Error,
                    "verifier cannot be asked for"
                );
                self.shared.set_trouble("auth", Some(error.to_string()));
                let text = "passwords cannot be checked at the moment";
                let fields = ErrorFields::fatal(INTERNAL_ERROR, text)
                    .hint("The proxy's own login on the servers fails; see its log.");
                return refuse(stream, &fields);
            }
        };
        self.shared.set_trouble("auth", None);
        let mut auth = match known.stored {
            Some(StoredPassword::Scram(verifier)) => {
                ServerAuth::scram(verifier, rand::random(), Binding::None)
            }
            Some(StoredPassword::Md5(secret)) => ServerAuth::Md5 { secret, salt: rand::random() },
            None => {
                let mock = self.shared.verifiers.mock(&self.user);
                ServerAuth::scram(mock, rand::random(), Binding::None)
            }
        };
        let mut out = BytesMut::new();
        if auth.request(&mut out).is_err() {
            return Err(NotAdmitted::Silent);
        }
        write_all(&mut stream, &out).await.map_err(silent)?;
        loop {
            let frame = client_frame(self.shared, &mut stream, buf).await?;
            if frame.tag != b'p' {
                count(&self.shared.metrics.malformed);
                let text = "expected an authentication message";
                return refuse(stream, &ErrorFields::fatal(PROTOCOL_VIOLATION, text));
            }
            match auth.on(&frame.body) {
                Step::Send(bytes) => write_all(&mut stream, &bytes).await.map_err(silent)?,
                Step::Done { send, learnt } => {
                    write_all(&mut stream, &send).await.map_err(silent)?;
                    return Ok((stream, learnt));
                }
                Step::Refuse(refusal) => return self.wrong(stream, refusal, known.is_fresh).await,
            }
        }
    }

    async fn wrong<T>(&self, stream: Stream, refusal: Refusal, is_fresh: bool) -> Login<T> {
        if refusal == Refusal::WrongPassword && !is_fresh {
            // The password may have been changed: the next attempt meets the new verifier.
            let _ = self.shared.verifiers.find(&self.user, true, &self.servers()).await;
        }
        refuse(stream, &refusal.fields(&self.user))
    }

    async fn verifier(&self) -> Result<crate::verifiers::Known, DialError> {
        loop {
            let servers = self.servers();
            match self.shared.verifiers.find(&self.user, false, &servers).await {
                Err(error) if error.is_about_server() => tokio::time::sleep(ASK_PAUSE).await,
                found => return found,
            }
        }
    }

    /// Servers that know verifiers, the leader first.
    fn servers(&self) -> Vec<Address> {
        let address =
            |node: &kornak_cluster::Node| Address { host: node.host.clone(), port: node.port };
        let standings = self.shared.standings();
        let topology = self.shared.topology();
        let groups = topology.groups.keys();
        let leaders = groups.filter_map(|group| standings.serving(*group).ok());
        let mut servers: Vec<Address> = leaders.map(|serving| address(&serving.node)).collect();
        let nodes = topology.groups.values().flat_map(|group| group.nodes.values());
        for node in nodes.filter(|node| node.running) {
            let found = address(node);
            if !servers.contains(&found) {
                servers.push(found);
            }
        }
        servers
    }

    /// The client is who it says: finds it a server, or answers from memory.
    async fn admit(
        &self,
        stream: Stream,
        read: BytesMut,
        entry: &mut Entry,
        credentials: Credentials,
    ) -> Login<Admitted> {
        let (user, startup) = (self.user.clone(), self.startup.clone());
        let identity = Identity { user, startup, credentials };
        let welcome = self.shared.welcome(&self.startup);
        let opened = match &welcome {
            None => self.open(Some(&identity)).await.map(Some),
            Some(_) if self.must_wait() => Ok(None),
            Some(_) => {
                let opening = open(self.shared, self.listener, Some(&identity));
                match tokio::time::timeout(WELCOME_PATIENCE, opening).await {
                    Ok(opened) => opened.map(Some),
                    Err(_) => Ok(None),
                }
            }
        };
        let opened = match opened {
            Ok(opened) => opened,
            Err(error) => return self.no_server(stream, &error),
        };
        if opened.is_none() {
            count(&self.shared.metrics.cached_logins);
        }
        let params = match &opened {
            Some(opened) => {
                self.shared.remember_welcome(&self.startup, &opened.connected.params);
                opened.connected.params.clone()
            }
            None => welcome.unwrap_or_default(),
        };
        self.greet(stream, read, entry, identity, params, opened).await
    }

    /// Finds a server, or says so while there is still time to tell the client.
    async fn open(&self, identity: Option<&Identity>) -> Result<Opened, DialError> {
        let opening = open(self.shared, self.listener, identity);
        tokio::time::timeout(self.patience(), opening).await.map_err(|_| DialError::Timeout)?
    }

    fn patience(&self) -> Duration {
        let limits = &self.shared.settings.limits;
        limits.hold_timeout.min(limits.login_timeout.mul_f32(0.9))
    }

    /// Whether nobody could serve the session at this moment.
    fn must_wait(&self) -> bool {
        let side = side_of(&self.listener.target);
        let (topology, standings) = (self.shared.topology(), self.shared.standings());
        self.shared.gate.is_closed(side)
            || route::candidates(self.listener, &topology, &standings, &[]).is_err()
    }

    fn no_server<T>(&self, stream: Stream, error: &DialError) -> Login<T> {
        tracing::info!(error = error as &dyn std::error::Error, "no server for a login");
        match error {
            DialError::Refused { body, .. } => {
                let mut out = BytesMut::with_capacity(body.len() + 5);
                out.extend_from_slice(b"E");
                out.extend_from_slice(&(body.len() as u32 + 4).to_be_bytes());
                out.extend_from_slice(body);
                Err(NotAdmitted::Refused(stream, out.freeze()))
            }
            _ => {
                let fields = ErrorFields::fatal(CANNOT_CONNECT_NOW, "no server takes the login")
                    .hint("See the proxy's log.");
                refuse(stream, &fields)
            }
        }
    }

    async fn greet(
        &self,
        mut stream: Stream,
        read: BytesMut,
        entry: &mut Entry,
        identity: Identity,
        params: Parameters,
        opened: Option<Opened>,
    ) -> Login<Admitted> {
        let pid = opened.as_ref().and_then(|opened| opened.connected.key.as_ref());
        let key = self.new_key(pid.map_or_else(|| rand::random::<u32>() >> 1, |key| key.pid));
        entry.set_key(key.pid, &key.key);
        let mut out = BytesMut::new();
        backend::put_authentication_ok(&mut out);
        if params.put(&mut out).and_then(|()| key.put(&mut out)).is_err() {
            return Err(NotAdmitted::Silent);
        }
        backend::put_ready_for_query(TransactionStatus::Idle, &mut out);
        write_all(&mut stream, &out).await.map_err(silent)?;
        let mut session = Session::new(params);
        if self.replication {
            session.pin(Pin::Replication);
        }
        Ok(Admitted { stream, read, identity, session, opened })
    }

    /// The real process id and a secret of our own: the client shows it to us, not to the server.
    fn new_key(&self, pid: u32) -> BackendKey {
        let secret: [u8; 32] = rand::random();
        let len = if self.version >= ProtocolVersion::V3_2 { 32 } else { 4 };
        BackendKey { pid, key: Bytes::copy_from_slice(secret.get(..len).unwrap_or_default()) }
    }

    /// Lets the server authenticate the client.
    async fn relay(
        &self,
        mut stream: Stream,
        mut buf: BytesMut,
        entry: &mut Entry,
    ) -> Login<Admitted> {
        let mut opened = match self.open(None).await {
            Ok(opened) => opened,
            Err(error) => return self.no_server(stream, &error),
        };
        let connected = &mut opened.connected;
        write_all(&mut connected.stream, &self.startup).await.map_err(silent)?;
        let mut params = Parameters::default();
        loop {
            let frame = match next_frame(&mut connected.stream, &mut connected.rest).await {
                Ok(frame) => frame,
                Err(error) => return self.no_server(stream, &error),
            };
            let mut out = BytesMut::new();
            let mut answer_expected = false;
            match frame.tag {
                b'R' => answer_expected = relay_request(&frame, &mut out),
                b'K' => {
                    if let Ok(theirs) = BackendKey::parse(&frame.body) {
                        let ours = self.new_key(theirs.pid);
                        entry.set_key(ours.pid, &ours.key);
                        let _ = ours.put(&mut out);
                        connected.key = Some(theirs);
                    }
                }
                b'S' => {
                    if let Ok((name, value)) = backend::parameter_status(&frame.body) {
                        let _ = params.set(name, value);
                    }
                    put_frame(&frame, &mut out);
                }
                b'E' => {
                    put_frame(&frame, &mut out);
                    return Err(NotAdmitted::Refused(stream, out.freeze()));
                }
                _ => put_frame(&frame, &mut out),
            }
            write_all(&mut stream, &out).await.map_err(silent)?;
            if frame.tag == b'Z' {
                break;
            }
            if answer_expected {
                let answer = client_frame(self.shared, &mut stream, &mut buf).await?;
                out.clear();
                put_frame(&answer, &mut out);
                write_all(&mut connected.stream, &out).await.map_err(silent)?;
            }
        }
        let mut session = Session::new(params);
        session.pin(if self.replication { Pin::Replication } else { Pin::Relay });
        let (user, startup) = (self.user.clone(), self.startup.clone());
        let identity = Identity { user, startup, credentials: Credentials::None };
        Ok(Admitted { stream, read: buf, identity, session, opened: Some(opened) })
    }
}

/// Passes a server's request on, without the mechanisms that bind to a channel which ends at us.
/// Answers whether the client has to reply.
fn relay_request(frame: &Frame, out: &mut BytesMut) -> bool {
    match Authentication::parse(&frame.body) {
        Ok(Authentication::Sasl(offered)) => {
            let names: Vec<&str> = offered
                .iter()
                .filter_map(|name| std::str::from_utf8(name).ok())
                .filter(|name| !name.ends_with("-PLUS"))
                .collect();
            // Names that came in a message fit into one.
            let _ = backend::put_authentication_sasl(&names, out);
            true
        }
        Ok(Authentication::Ok | Authentication::SaslFinal(_)) => {
            put_frame(frame, out);
            false
        }
        _ => {
            put_frame(frame, out);
            true
        }
    }
}

fn put_frame(frame: &Frame, out: &mut BytesMut) {
    out.extend_from_slice(&[frame.tag]);
    out.extend_from_slice(&(frame.body.len() as u32 + 4).to_be_bytes());
    out.extend_from_slice(&frame.body);
}

async fn client_frame(shared: &Shared, stream: &mut Stream, buf: &mut BytesMut) -> Login<Frame> {
    loop {
        match take_frame(buf, MAX_AUTH_MESSAGE_LEN as usize) {
            Ok(Some(frame)) => return Ok(frame),
            Ok(None) => read_more(stream, buf).await.map_err(silent)?,
            Err(_) => {
                shared.metrics.malformed.fetch_add(1, Relaxed);
                return Err(NotAdmitted::Silent);
            }
        }
    }
}

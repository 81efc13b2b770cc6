//! From accept to the first ReadyForQuery.
//!
//! ```text
//! accepted ── TLS, GSSENC ──► startup packet ──► authentication ──► server, or a cached welcome
//!    └─ CancelRequest ──► routed, closed             │ scram: by us    └─► AuthenticationOk …
//!                                                    └ relay: by the server, through us
//! ```
//! On a listener whose clients share server connections the welcome is the pool's.
//! The caller has the deadline. A login that no server can be found for is answered from what an
//! equal session was told before; its first query waits
//! (docs/protocol.md, *What a session holds*).

mod admit;
mod hello;
mod pooled;
mod prove;
mod relay;

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

use bytes::{Bytes, BytesMut};
use kornak_cluster::GroupId;
use kornak_config::proxy::{ListenerSettings, Target};
use kornak_config::rules::Method;
use kornak_protocol::auth::{Binding, Credentials};
use kornak_protocol::error::ErrorFields;
use kornak_protocol::frame::{Frame, take_frame};
use kornak_protocol::limits::MAX_AUTH_MESSAGE_LEN;
use kornak_protocol::sqlstate::{
    INVALID_AUTHORIZATION, INVALID_PARAMETER_VALUE, PROTOCOL_VIOLATION,
};
use kornak_protocol::startup::{
    MAX_NAME_BYTES, Negotiation, ProtocolVersion, Replication, StartupMessage,
};

use crate::admission::identity::Identity;
use crate::admission::rules::{self, Visit};
use crate::cluster::route;
use crate::net::stream::{Stream, read_more, write_all};
use crate::pool::lender::Member;
use crate::pool::link::Opened;
use crate::registry::Entry;
use crate::session::Session;
use crate::shared::Shared;

/// Newest minor version of protocol 3 that is served.
const NEWEST_MINOR: u16 = 2;

/// A client that has logged in.
#[derive(Debug)]
pub struct Admitted {
    pub stream: Stream,
    /// Bytes that came behind its last authentication message.
    pub read: BytesMut,
    pub identity: Arc<Identity>,
    pub session: Session,
    /// The client's server, unless the login was answered from memory.
    pub opened: Option<Opened>,
    /// Of a client that shares server connections with others.
    pub member: Option<Box<Member>>,
}

/// Why nobody was admitted.
#[derive(Debug)]
pub enum NotAdmitted {
    /// No client to answer: a cancel request, a client that left, or no client of PostgreSQL.
    Silent,
    /// The client is sent this ErrorResponse, then closed.
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
    let hello = hello::listen(shared, listener, stream, &mut entry.visit).await?;
    let hello::Hello { mut stream, mut buf, message, peer, binding } = hello;
    let replication = match message.replication() {
        Ok(replication) => replication,
        Err(word) => {
            let word = String::from_utf8_lossy(word);
            let text = format!("invalid value for parameter \"replication\": \"{word}\"");
            let fields = ErrorFields::fatal(INVALID_PARAMETER_VALUE, text)
                .hint("Valid values are: \"false\", 0, \"true\", 1, \"database\".");
            return refuse(stream, &fields);
        }
    };
    let message = match shared.prober.cuts_names() {
        true => message.with_short_names(),
        false => message,
    };
    let Some(user) = message.user().map(Bytes::copy_from_slice) else {
        let text = "no PostgreSQL user name specified in startup packet";
        return refuse(stream, &ErrorFields::fatal(INVALID_AUTHORIZATION, text));
    };
    let negotiation = message.negotiate(NEWEST_MINOR);
    let mut out = BytesMut::new();
    if negotiation.must_tell() && negotiation.put(&mut out).is_ok() {
        write_all(&mut stream, &out).await.map_err(silent)?;
    }
    let Some((plain, startup)) = packets(shared, &message, &negotiation, &peer) else {
        let text = "startup packet cannot be passed on";
        return refuse(stream, &ErrorFields::fatal(PROTOCOL_VIOLATION, text));
    };
    let visit = Visit {
        listener: &listener.name,
        is_tls: matches!(stream, Stream::Tls(_)),
        user: &user,
        database: message.database().unwrap_or_default(),
        replication,
        address: peer.address.ip(),
        claimed: peer.claimed.map(|claimed| claimed.ip()),
    };
    let rules = shared.rules.load_full();
    let Some(rule) = rules::first(&rules.rules, &visit) else {
        return refuse_by_rule(stream, &visit, "no rule of the proxy for");
    };
    if rule.method == Method::Reject {
        return refuse_by_rule(stream, &visit, "the proxy rejects the connection of");
    }
    if !rules::certificate_fits(&rules, rule, stream.client_certificate(), &user) {
        let (client, shown) = (peer.shown(), Shown(&user));
        tracing::info!(%client, role = %shown, "login refused: no certificate that the rule asks for");
        let role = String::from_utf8_lossy(&user);
        let text = format!("certificate authentication failed for user \"{role}\"");
        return refuse(stream, &ErrorFields::fatal(INVALID_AUTHORIZATION, text));
    }
    let visitor = Visitor {
        shared,
        listener,
        group: worker_for(shared, listener),
        user: user.clone(),
        database: Bytes::copy_from_slice(visit.database),
        plain,
        startup,
        version: negotiation.version,
        replication: replication != Replication::None,
        peer,
        binding,
    };
    match &rule.method {
        Method::Relay => visitor.relay(stream, buf, entry).await,
        Method::Scram | Method::Md5 => {
            let asked = visitor.authenticate(stream, &mut buf, &rule.method, entry).await?;
            visitor.admit(asked.0, buf, entry, asked.1).await
        }
        Method::Trust | Method::Cert { .. } => {
            visitor.admit(stream, buf, entry, Credentials::None).await
        }
        Method::Reject => Err(NotAdmitted::Silent),
    }
}

/// The startup packet for servers, and the same with the client's address in its name if that is
/// asked for, as PgBouncer writes it.
fn packets(
    shared: &Shared,
    message: &StartupMessage,
    negotiation: &Negotiation,
    peer: &hello::Peer,
) -> Option<(Bytes, Bytes)> {
    let unknown = negotiation.unknown.iter();
    let mut changes: Vec<(&str, Option<&[u8]>)> =
        unknown.filter_map(|name| Some((std::str::from_utf8(name).ok()?, None))).collect();
    let mut packet = BytesMut::new();
    message.put_patched(ProtocolVersion::V3_0, &changes, &mut packet).ok()?;
    let plain = packet.split().freeze();
    if !shared.settings().application_name_add_host {
        return Some((plain.clone(), plain));
    }
    let address = peer.claimed.unwrap_or(peer.address);
    let name = named_after(message.get("application_name").unwrap_or(b"app"), address);
    changes.push(("application_name", Some(&name)));
    message.put_patched(ProtocolVersion::V3_0, &changes, &mut packet).ok()?;
    Some((plain, packet.freeze()))
}

/// An application's name with the address behind it. Servers cut names at 63 bytes: the address is
/// what stays.
fn named_after(name: &[u8], address: std::net::SocketAddr) -> Vec<u8> {
    let behind = format!(" - {address}");
    let room = MAX_NAME_BYTES.saturating_sub(behind.len());
    let mut whole = name.get(..room.min(name.len())).unwrap_or_default().to_vec();
    whole.extend_from_slice(behind.as_bytes());
    whole
}

/// In the words of PostgreSQL's `pg_hba.conf` errors.
fn refuse_by_rule<T>(stream: Stream, visit: &Visit<'_>, why: &str) -> Login<T> {
    let text = |bytes| String::from_utf8_lossy(bytes).into_owned();
    let encryption = if visit.is_tls { "SSL encryption" } else { "no encryption" };
    let database = match visit.replication {
        Replication::Physical => "replication".to_owned(),
        _ => format!("database \"{}\"", text(visit.database)),
    };
    let told = format!(
        "{why} host \"{}\", user \"{}\", {database}, {encryption}",
        visit.address,
        text(visit.user),
    );
    tracing::info!(
        listener = visit.listener,
        client = %visit.address,
        role = %Shown(visit.user),
        database = %Shown(visit.database),
        replication = ?visit.replication,
        tls = visit.is_tls,
        "login refused: {why} this client"
    );
    refuse(stream, &ErrorFields::fatal(INVALID_AUTHORIZATION, told))
}

/// A client whose startup packet is known.
struct Visitor<'a> {
    shared: &'a Arc<Shared>,
    listener: &'a ListenerSettings,
    /// On the workers' listener: the group that the session will be on.
    group: Option<GroupId>,
    user: Bytes,
    database: Bytes,
    /// The startup packet as it came, for servers.
    plain: Bytes,
    /// The startup packet for servers, perhaps with the client's address in `application_name`.
    startup: Bytes,
    version: ProtocolVersion,
    replication: bool,
    peer: hello::Peer,
    binding: Binding,
}

/// A name that a stranger has chosen, for the log: in quotes, so that it ends where it ends, and
/// without a byte that is not printable ASCII.
pub struct Shown<'a>(pub &'a [u8]);

impl std::fmt::Display for Shown<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let plain = |byte: &u8| byte.is_ascii_alphanumeric() || b"_-.@$".contains(byte);
        match !self.0.is_empty() && self.0.iter().all(plain) {
            true => write!(f, "{}", self.0.escape_ascii()),
            false => write!(f, "\"{}\"", self.0.escape_ascii()),
        }
    }
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

/// The worker group for a new session: chosen before its client has proven who it is, for the proof is
/// one for that group's servers. `None`: another target, or no worker is there yet.
fn worker_for(shared: &Shared, listener: &ListenerSettings) -> Option<GroupId> {
    if listener.target != Target::Workers {
        return None;
    }
    let (topology, standings) = (shared.topology(), shared.standings());
    let found = route::candidates(listener, &topology, &standings, &[]).ok()?;
    let sessions = shared.registry.by_node();
    route::choose(&found, listener.balance, &sessions, shared.dice()).map(|chosen| chosen.group)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_cut_and_its_address_is_not() {
        let v4 = "10.1.2.3:65000".parse().unwrap();
        assert_eq!(named_after(b"psql", v4), b"psql - 10.1.2.3:65000");
        let long = named_after(&[b'x'; 100], v4);
        assert_eq!((long.len(), long.ends_with(b"x - 10.1.2.3:65000")), (63, true));
        let v6 = "[2001:db8:1111:2222:3333:4444:5555:6666]:65000".parse().unwrap();
        let long = named_after(&[b'x'; 100], v6);
        assert_eq!((long.len(), long.ends_with(b":6666]:65000")), (63, true));
    }

    #[test]
    fn a_strangers_name_ends_where_it_ends() {
        for (name, shown) in [
            (&b"app_1"[..], "app_1"),
            (b"", "\"\""),
            (b"a b", "\"a b\""),
            (b"x\ny", "\"x\\ny\""),
            (b"q\" role=postgres", "\"q\\\" role=postgres\""),
            ("é".as_bytes(), "\"\\xc3\\xa9\""),
        ] {
            assert_eq!(Shown(name).to_string(), shown);
        }
    }
}

//! The end of a login on a listener whose clients share server connections: nobody needs a server
//! to be greeted, only to have been greeted once by one with the same startup packet.

use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use kornak_cluster::discard;
use kornak_protocol::auth::Credentials;
use kornak_protocol::backend;
use kornak_protocol::error::ErrorFields;
use kornak_protocol::params::Parameters;
use kornak_protocol::sqlstate::PROTOCOL_VIOLATION;
use kornak_protocol::startup::{self, ProtocolVersion, Startup, StartupMessage};
use kornak_protocol::txn::TransactionStatus;

use super::{Admitted, Login, NotAdmitted, Shown, Visitor, refuse, silent};
use crate::admission::access::Refusal;
use crate::clients::client::{Way, open};
use crate::clients::forward::pooled::hand_over;
use crate::metrics::count;
use crate::net::backend::DialError;
use crate::net::backend::say_good_bye;
use crate::net::stream::{Stream, write_all};
use crate::pool::lender::{Kind, Member, Newcomer};
use crate::pool::mailbox::Delivery;
use crate::registry::Entry;
use crate::session::Session;
use crate::shared::Shared;

/// How old a welcome may be before a server is asked in the background whether it still lets these
/// clients in: the catalogues were asked, but `pg_hba.conf` is the server's to read.
const WELCOME_AGE: Duration = Duration::from_secs(60);

/// How long a first login waits for a connection of its pool, before it logs in on one of its own
/// that is closed again. Longer than opening one takes, shorter than anybody notices.
const POOL_PATIENCE: Duration = Duration::from_millis(100);

/// How long a login that only a server can judge waits for one, if it was let in before.
const TRIAL_PATIENCE: Duration = Duration::from_millis(500);

impl Visitor<'_> {
    /// The client is who it says: makes it a member of its pool.
    pub(super) async fn admit_pooled(
        &self,
        mut stream: Stream,
        read: BytesMut,
        entry: &mut Entry,
        credentials: Credentials,
    ) -> Login<Admitted> {
        let Some(asked) = Asked::of(&self.startup) else {
            let text = "startup packet cannot be passed on";
            return refuse(stream, &ErrorFields::fatal(PROTOCOL_VIOLATION, text));
        };
        let rights = match self.rights().await {
            Ok(rights) => rights,
            Err(error) => return self.no_server(stream, &error),
        };
        if let Some(refusal) = rights.and_then(|rights| rights.refusal) {
            return self.refuse_login(stream, refusal);
        }
        let newcomer = Newcomer {
            listener: entry.handle().listener,
            user: self.user.clone(),
            database: self.database.clone(),
            startup: asked.startup,
            credentials,
        };
        let lane = entry.handle().lane;
        let mut member =
            Box::new(self.shared.lender.join(newcomer, Arc::clone(entry.handle()).into(), lane));
        // Another connection would be refused, and there is none to share.
        if let Some(crowded) = rights.and_then(|rights| rights.crowded)
            && !self.shared.lender.has_server(&member.kind)
        {
            return self.refuse_login(stream, crowded);
        }
        let params = match self.welcome(&mut member, entry, rights.is_some()).await {
            Ok(params) => params,
            Err(error) => return self.no_server(stream, &error),
        };
        let params = match &asked.application_name {
            None => params,
            Some(name) => self.named(name, &params),
        };
        let key = self.new_key(entry, rand::random::<u32>() >> 1);
        let mut out = BytesMut::new();
        backend::put_authentication_ok(&mut out);
        if params.put(&mut out).and_then(|()| key.put(&mut out)).is_err() {
            return Err(NotAdmitted::Silent);
        }
        backend::put_ready_for_query(TransactionStatus::Idle, &mut out);
        write_all(&mut stream, &out).await.map_err(silent)?;
        let base = asked.application_name.as_deref().map(set_application_name);
        let limit = self.shared.settings().pool.prepared_statements;
        let session = Session::pooled(params, limit, base.into_iter().collect());
        let identity = Arc::clone(&member.kind.nobody);
        Ok(Admitted { stream, read, identity, session, opened: None, member: Some(member) })
    }

    fn refuse_login<T>(&self, stream: Stream, refusal: Refusal) -> Login<T> {
        let (client, role) = (self.peer.shown(), Shown(&self.user));
        let database = Shown(&self.database);
        tracing::info!(%client, %role, %database, why = ?refusal, "login refused");
        refuse(stream, &refusal.fields(&self.user, &self.database))
    }

    /// The parameters that the client is told of its server. Whoever was let in before need not wait for others'
    /// transactions: `judged` by the catalogues it is greeted at once, otherwise a server is asked by a
    /// login.
    async fn welcome(
        &self,
        member: &mut Member,
        entry: &Entry,
        judged: bool,
    ) -> Result<Arc<Parameters>, DialError> {
        let Some((age, params)) = member.kind.welcome() else {
            return self.first_welcome(member, entry).await;
        };
        if !judged {
            let trial = try_login(self.shared, &member.kind);
            return match tokio::time::timeout(TRIAL_PATIENCE, trial).await {
                Ok(Err(error)) if is_about_login(&error) => Err(error),
                Ok(Ok(params)) => Ok(params),
                Ok(Err(_)) | Err(_) => {
                    count(&self.shared.metrics.cached_logins);
                    Ok(params)
                }
            };
        }
        if age >= WELCOME_AGE && member.kind.begin_check() {
            let (shared, kind) = (Arc::clone(self.shared), Arc::clone(&member.kind));
            tokio::task::spawn_local(check(shared, kind, self.patience()));
        }
        Ok(params)
    }

    /// Nobody was greeted yet with this startup packet, or a server has refused one: a connection is
    /// opened for what its server says, for the pool if that has room.
    async fn first_welcome(
        &self,
        member: &mut Member,
        entry: &Entry,
    ) -> Result<Arc<Parameters>, DialError> {
        let brought = match member.ask() {
            Some(settled) => Some(Delivery::Server(settled)),
            None => {
                let handle = entry.handle();
                let seated = std::future::poll_fn(|cx| {
                    handle.park(cx.waker());
                    match member.delivery() {
                        Some(delivery) => Poll::Ready(delivery),
                        None => Poll::Pending,
                    }
                });
                tokio::time::timeout(POOL_PATIENCE, seated).await.ok()
            }
        };
        match brought {
            Some(Delivery::Server(settled)) => hand_over(self.shared, settled),
            Some(Delivery::Failed(error)) => return Err(again(&error)),
            Some(Delivery::Expired(_)) | None => member.withdraw(),
        }
        // A connection that was opened long ago has brought none.
        if let Some((_, params)) = member.kind.welcome() {
            return Ok(params);
        }
        let trial = try_login(self.shared, &member.kind);
        tokio::time::timeout(self.patience(), trial).await.map_err(|_| DialError::Timeout)?
    }

    /// The parameters with the client's own `application_name`.
    fn named(&self, name: &[u8], params: &Arc<Parameters>) -> Arc<Parameters> {
        let mut named = Parameters::clone(params);
        // It is one of those that are reported already.
        discard::parameter_is_within_bound(named.set(b"application_name", name));
        match self.shared.settings().application_name_add_host {
            // Each client's is another.
            true => named.into(),
            false => self.shared.remember_welcome(&self.startup, &named),
        }
    }
}

/// Logs in as a pool's clients do, and out again.
async fn try_login(shared: &Shared, kind: &Kind) -> Result<Arc<Parameters>, DialError> {
    let identity = kind.identity();
    let settings = Arc::clone(&shared.settings());
    let listener = settings.listeners.get(kind.listener).ok_or(DialError::Timeout)?;
    let mut opened = open(shared, listener, Some(&identity), None, Way::Gate).await?;
    say_good_bye(&mut opened.connected.stream);
    let params = Arc::new(opened.connected.params);
    kind.welcomed(&params);
    Ok(params)
}

/// Asks a server beside the clients whether it still lets them in.
async fn check(shared: Arc<Shared>, kind: Arc<Kind>, limit: Duration) {
    match tokio::time::timeout(limit, try_login(&shared, &kind)).await {
        Ok(Err(error)) if is_about_login(&error) => {
            let (role, database) = (Shown(&kind.user), Shown(&kind.database));
            let error = &error as &dyn std::error::Error;
            tracing::info!(%role, %database, error, "server does not admit a pool's clients any more");
            kind.unwelcome();
        }
        Ok(_) | Err(_) => {}
    }
    kind.end_check();
}

/// Whether a server has refused this login, rather than any at this moment (class 53: it is full).
fn is_about_login(error: &DialError) -> bool {
    let full = matches!(error, DialError::Refused { sqlstate, .. } if sqlstate.class() == *b"53");
    !full && !error.is_about_server() && !error.is_ours()
}

/// The name that a startup packet gives to its application.
pub(super) fn application_name(startup: &Bytes) -> Option<Vec<u8>> {
    Asked::of(startup)?.application_name
}

/// The parts of a client's startup packet that choose its pool.
struct Asked {
    /// Without `application_name`.
    startup: Bytes,
    /// As PostgreSQL shows it: what is not printable ASCII becomes a question mark.
    application_name: Option<Vec<u8>>,
}

impl Asked {
    fn of(startup: &Bytes) -> Option<Self> {
        let message = parse(startup)?;
        let mut packet = BytesMut::new();
        let changes = [("application_name", None)];
        message.put_patched(ProtocolVersion::V3_0, &changes, &mut packet).ok()?;
        let application_name = message.get("application_name").map(|name| {
            let clean = |byte: &u8| if (32..127).contains(byte) { *byte } else { b'?' };
            name.iter().map(clean).collect()
        });
        Some(Self { startup: packet.freeze(), application_name })
    }
}

fn parse(startup: &Bytes) -> Option<StartupMessage> {
    match startup::take_startup(&mut BytesMut::from(&startup[..])) {
        Ok(Some(Startup::Session(message))) => Some(message),
        _ => None,
    }
}

/// The setting and the statement that makes it. The name is printable ASCII.
fn set_application_name(name: &[u8]) -> (Box<[u8]>, Bytes) {
    let mut text = b"SET application_name = E'".to_vec();
    for byte in name {
        if matches!(byte, b'\'' | b'\\') {
            text.push(*byte);
        }
        text.push(*byte);
    }
    text.push(b'\'');
    (b"application_name"[..].into(), text.into())
}

/// An error of one login that is told to another client.
fn again(error: &DialError) -> DialError {
    match error {
        DialError::Refused { sqlstate, message, body } => {
            DialError::Refused { sqlstate: *sqlstate, message: message.clone(), body: body.clone() }
        }
        other => DialError::Protocol { what: other.to_string() },
    }
}

//! The end of a login on a listener whose clients share server connections: nobody needs a server
//! to be greeted, only to have been greeted once by one with the same startup packet.

use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use kornak_protocol::auth::Credentials;
use kornak_protocol::backend;
use kornak_protocol::error::ErrorFields;
use kornak_protocol::params::Parameters;
use kornak_protocol::sqlstate::PROTOCOL_VIOLATION;
use kornak_protocol::startup::{self, ProtocolVersion, Startup, StartupMessage};
use kornak_protocol::txn::TransactionStatus;

use super::{Admitted, Login, NotAdmitted, Visitor, refuse, silent};
use crate::backend::DialError;
use crate::forward::pooled::hand_over;
use crate::metrics::count;
use crate::pool::lender::{Member, Newcomer};
use crate::pool::seat::Delivery;
use crate::registry::Entry;
use crate::session::Session;
use crate::stream::{Stream, write_all};

/// How long a welcome is given to others before a server is asked again whether it would take the
/// login: connection limits and privileges are the server's to judge.
const WELCOME_AGE: Duration = Duration::from_secs(60);

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
        let newcomer = Newcomer {
            listener: entry.handle().listener,
            user: self.user.clone(),
            database: asked.database,
            startup: asked.startup,
            credentials,
        };
        let lane = entry.handle().lane;
        let mut member = Box::new(self.shared.lender.join(newcomer, entry.handle(), lane));
        let params = match member.kind.welcome(WELCOME_AGE) {
            Some(params) => params,
            None => match self.first_welcome(&mut member, entry).await {
                Ok(params) => params,
                Err(error) => return self.no_server(stream, &error),
            },
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
        let limit = self.shared.settings.pool.prepared_statements;
        let session = Session::pooled(params, limit, base.into_iter().collect());
        let identity = Arc::clone(&member.kind.nobody);
        Ok(Admitted { stream, read, identity, session, opened: None, member: Some(member) })
    }

    /// Nobody was greeted yet with this startup packet, or long ago: a connection is borrowed for
    /// what its server says.
    async fn first_welcome(
        &self,
        member: &mut Member,
        entry: &Entry,
    ) -> Result<Arc<Parameters>, DialError> {
        let settled = match member.ask() {
            Some(settled) => settled,
            None => {
                let handle = entry.handle();
                let seated = std::future::poll_fn(|cx| {
                    handle.park(cx.waker());
                    match member.delivery() {
                        Some(delivery) => Poll::Ready(delivery),
                        None => Poll::Pending,
                    }
                });
                let seated = tokio::time::timeout(self.patience(), seated).await;
                match seated {
                    Ok(Delivery::Server(settled)) => settled,
                    Ok(Delivery::Failed(error)) => return Err(again(&error)),
                    Ok(Delivery::Expired(_)) | Err(_) => {
                        member.withdraw();
                        // An old welcome is better than none.
                        count(&self.shared.metrics.cached_logins);
                        let old = member.kind.welcome(Duration::MAX);
                        return old.ok_or(DialError::Timeout);
                    }
                }
            }
        };
        let params = settled.link().lease.as_ref().map(|lease| Arc::clone(&lease.params));
        hand_over(self.shared, settled);
        let params = member.kind.welcome(WELCOME_AGE).or(params);
        params.ok_or(DialError::Timeout)
    }

    /// The same with the client's own name.
    fn named(&self, name: &[u8], params: &Arc<Parameters>) -> Arc<Parameters> {
        let mut named = Parameters::clone(params);
        // It is one of those that are reported already.
        let _ = named.set(b"application_name", name);
        self.shared.remember_welcome(&self.startup, &named)
    }
}

/// What a client's startup packet says to a pool.
struct Asked {
    database: Bytes,
    /// Without `application_name`.
    startup: Bytes,
    /// As PostgreSQL shows it: what is not printable ASCII becomes a question mark.
    application_name: Option<Vec<u8>>,
}

impl Asked {
    fn of(startup: &Bytes) -> Option<Self> {
        let message = parse(startup)?;
        let database = Bytes::copy_from_slice(message.database()?);
        let mut packet = BytesMut::new();
        let changes = [("application_name", None)];
        message.put_patched(ProtocolVersion::V3_0, &changes, &mut packet).ok()?;
        let application_name = message.get("application_name").map(|name| {
            let clean = |byte: &u8| if (32..127).contains(byte) { *byte } else { b'?' };
            name.iter().map(clean).collect()
        });
        Some(Self { database, startup: packet.freeze(), application_name })
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

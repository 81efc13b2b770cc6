//! A client that has proven itself gets a server, or an answer from memory, and its first
//! ReadyForQuery.

use std::sync::Arc;
use std::time::Duration;

use bytes::BytesMut;
use kornak_cluster::discard;
use kornak_config::proxy::PoolMode;
use kornak_protocol::auth::{Credentials, LoginError, Refusal};
use kornak_protocol::backend::{self, BackendKey};
use kornak_protocol::error::ErrorFields;
use kornak_protocol::params::Parameters;
use kornak_protocol::sqlstate::{CANNOT_CONNECT_NOW, INVALID_AUTHORIZATION, TOO_MANY_CONNECTIONS};
use kornak_protocol::startup::ProtocolVersion;
use kornak_protocol::txn::TransactionStatus;

use super::{Admitted, Login, NotAdmitted, Visitor, refuse, silent};
use crate::admission::identity::Identity;
use crate::clients::cancel;
use crate::clients::client::{Way, open, side_of};
use crate::cluster::route;
use crate::metrics::count;
use crate::net::backend::DialError;
use crate::net::stream::{Stream, write_all};
use crate::pool::link::Opened;
use crate::registry::Entry;
use crate::session::Session;
use crate::session::journal::Pin;

/// How long a login waits for a server before it is answered from memory.
const WELCOME_PATIENCE: Duration = Duration::from_millis(500);

impl Visitor<'_> {
    /// The client is who it says: finds it a server, or answers from memory.
    pub(super) async fn admit(
        &self,
        stream: Stream,
        read: BytesMut,
        entry: &mut Entry,
        credentials: Credentials,
    ) -> Login<Admitted> {
        let stream = self.come_in(stream, entry).await?;
        self.shared.verifiers.remember_keys(&self.user, &credentials);
        if self.listener.pool_mode == PoolMode::Transaction && !self.replication {
            return self.admit_pooled(stream, read, entry, credentials).await;
        }
        let stream = self.take_server(stream, entry).await?;
        let (user, startup) = (self.user.clone(), self.startup.clone());
        let identity = Identity { user, startup, credentials, was_taken: false };
        let welcome = self.shared.welcome(&self.plain);
        let opened = match &welcome {
            None => self.open(Some(&identity)).await.map(Some),
            Some(_) if self.must_wait() => Ok(None),
            Some(_) => {
                let opening =
                    open(self.shared, self.listener, Some(&identity), self.group, Way::Gate);
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
            Some(opened) => self.shared.remember_welcome(&self.plain, &opened.connected.params),
            None => self.with_own_name(welcome.unwrap_or_default()),
        };
        self.greet(stream, read, entry, identity, params, opened).await
    }

    /// The parameters that a client with another address was told, with this client's address.
    fn with_own_name(&self, params: Arc<Parameters>) -> Arc<Parameters> {
        if !self.shared.settings().application_name_add_host {
            return params;
        }
        let mut own = Parameters::clone(&params);
        if let Some(name) = super::pooled::application_name(&self.startup) {
            // It is one of those that are reported already.
            discard::parameter_is_within_bound(own.set(b"application_name", &name));
        }
        own.into()
    }

    /// Finds a server, or says so while there is still time to tell the client.
    pub(super) async fn open(&self, identity: Option<&Identity>) -> Result<Opened, DialError> {
        let opening = open(self.shared, self.listener, identity, self.group, Way::Gate);
        tokio::time::timeout(self.patience(), opening).await.map_err(|_| DialError::Timeout)?
    }

    pub(super) fn patience(&self) -> Duration {
        let settings = self.shared.settings();
        let limits = &settings.limits;
        limits.hold_timeout.min(limits.login_timeout.mul_f32(0.9))
    }

    /// Whether nobody could serve the session at this moment.
    fn must_wait(&self) -> bool {
        let side = side_of(&self.listener.target);
        let (topology, standings) = (self.shared.topology(), self.shared.standings());
        self.shared.gate.is_closed(side)
            || route::candidates(self.listener, &topology, &standings, &[]).is_err()
    }

    pub(super) fn no_server<T>(&self, stream: Stream, error: &DialError) -> Login<T> {
        tracing::info!(error = error as &dyn std::error::Error, "login failed: no server");
        match error {
            DialError::Refused { body, .. } => {
                let mut out = BytesMut::with_capacity(body.len() + 5);
                out.extend_from_slice(b"E");
                out.extend_from_slice(&(body.len() as u32 + 4).to_be_bytes());
                out.extend_from_slice(body);
                Err(NotAdmitted::Refused(stream, out.freeze()))
            }
            // The password was changed a moment ago, behind our look at it.
            DialError::Auth(LoginError::OtherVerifier) => {
                refuse(stream, &Refusal::WrongPassword.fields(&self.user))
            }
            DialError::Auth(error) => {
                let text = "the proxy cannot log in to the server in the client's name";
                let fields = ErrorFields::fatal(INVALID_AUTHORIZATION, text)
                    .detail(error.to_string())
                    .hint("See the proxy's rules and the server's pg_hba.conf.");
                refuse(stream, &fields)
            }
            error if error.is_ours() => {
                let text = "the proxy is out of resources";
                refuse(stream, &ErrorFields::fatal(TOO_MANY_CONNECTIONS, text))
            }
            _ => {
                let fields = ErrorFields::fatal(CANNOT_CONNECT_NOW, "no server takes the login")
                    .hint("See the proxy's log.");
                refuse(stream, &fields)
            }
        }
    }

    pub(super) async fn greet(
        &self,
        mut stream: Stream,
        read: BytesMut,
        entry: &mut Entry,
        identity: Identity,
        params: Arc<Parameters>,
        opened: Option<Opened>,
    ) -> Login<Admitted> {
        let pid = opened.as_ref().and_then(|opened| opened.connected.key.as_ref());
        let pid = pid.map_or_else(|| rand::random::<u32>() >> 1, |key| key.pid);
        let key = self.new_key(entry, pid);
        let mut out = BytesMut::new();
        backend::put_authentication_ok(&mut out);
        if let Some(opened) = &opened {
            out.extend_from_slice(&opened.connected.notices);
        }
        if params.put(&mut out).and_then(|()| key.put(&mut out)).is_err() {
            return Err(NotAdmitted::Silent);
        }
        backend::put_ready_for_query(TransactionStatus::Idle, &mut out);
        write_all(&mut stream, &out).await.map_err(silent)?;
        let mut session = Session::new(params);
        if self.replication {
            session.pin(Pin::Replication);
        }
        let identity =
            self.shared.same_identity(Identity { was_taken: opened.is_some(), ..identity });
        Ok(Admitted { stream, read, identity, session, opened, member: None })
    }

    /// Makes the session known by the real process id and a secret of our own, which the client
    /// shows to us and not to the server. From 3.2 on it says which proxy it is of.
    pub(super) fn new_key(&self, entry: &mut Entry, pid: u32) -> BackendKey {
        loop {
            let key = cancel::new_key(&self.shared.id, self.version >= ProtocolVersion::V3_2);
            if entry.set_key(pid, &key) {
                return BackendKey { pid, key };
            }
        }
    }
}

//! Has the client prove who it is, against what the servers have stored of its role's password.

use bytes::BytesMut;
use kornak_cluster::GroupId;
use kornak_config::rules::Method;
use kornak_protocol::auth::{Credentials, Refusal, ServerAuth, Step, StoredPassword};
use kornak_protocol::error::ErrorFields;
use kornak_protocol::sqlstate::{INTERNAL_ERROR, PROTOCOL_VIOLATION};
use kornak_protocol::startup::MAX_NAME_BYTES;

use super::{Login, NotAdmitted, Shown, Visitor, client_frame, refuse, silent};
use crate::backend::{Address, DialError};
use crate::metrics::count;
use crate::route;
use crate::stream::{Stream, write_all};

/// Pause before servers are asked again for a verifier.
const ASK_PAUSE: std::time::Duration = std::time::Duration::from_millis(100);

impl Visitor<'_> {
    /// Asks the client for a proof that its role's verifier accepts. A role without one, and one
    /// whose verifier is of a kind that the method does not take, meets a made-up one: the same
    /// messages, the same work, no way in.
    pub(super) async fn authenticate(
        &self,
        mut stream: Stream,
        buf: &mut BytesMut,
        method: &Method,
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
        let takes_md5 = *method == Method::Md5;
        if !takes_md5 && matches!(known.stored, Some(StoredPassword::Md5(_))) {
            let role = Shown(&self.user);
            tracing::warn!(%role, "role has an md5 password, and the method is scram: refused");
        }
        let mut auth = match known.stored {
            Some(StoredPassword::Scram(verifier)) => {
                ServerAuth::scram(verifier, rand::random(), self.binding.clone())
            }
            Some(StoredPassword::Md5(secret)) if takes_md5 => {
                ServerAuth::Md5 { secret, salt: rand::random() }
            }
            _ => {
                let mock = self.shared.verifiers.mock(&self.user);
                ServerAuth::scram(mock, rand::random(), self.binding.clone())
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
                Step::Refuse(refusal) => return self.wrong(stream, refusal),
            }
        }
    }

    pub(super) fn wrong<T>(&self, stream: Stream, refusal: Refusal) -> Login<T> {
        let (client, role) = (self.peer.shown(), Shown(&self.user));
        tracing::info!(%client, %role, why = %refusal, "login refused");
        refuse(stream, &refusal.fields(&self.user))
    }

    pub(super) async fn verifier(&self) -> Result<crate::verifiers::Known, DialError> {
        // No role has such a name, and a server would only complain of it.
        if self.user.len() > MAX_NAME_BYTES || std::str::from_utf8(&self.user).is_err() {
            return Ok(crate::verifiers::Known { stored: None });
        }
        loop {
            let servers = self.servers();
            let role = (self.verified_by(), self.user.clone());
            match self.shared.verifiers.find(&role, &servers).await {
                Err(error) if error.is_about_server() => tokio::time::sleep(ASK_PAUSE).await,
                found => return found,
            }
        }
    }

    fn verified_by(&self) -> Option<GroupId> {
        route::verified_by(self.listener, &self.shared.topology(), self.group)
    }

    /// Servers that know verifiers, the leader first.
    pub(super) fn servers(&self) -> Vec<Address> {
        let address = |node: &kornak_cluster::Node| Address::from(node);
        let standings = self.shared.standings();
        let topology = self.shared.topology();
        let own = self.verified_by();
        let asked = |group: &&GroupId| own.is_none_or(|own| own == **group);
        let groups = topology.groups.keys().filter(asked);
        let leaders = groups.filter_map(|group| standings.serving(*group).ok());
        let mut servers: Vec<Address> = leaders.map(|serving| address(&serving.node)).collect();
        let groups = topology.groups.iter().filter(|(group, _)| asked(group));
        let nodes = groups.flat_map(|(_, group)| group.nodes.values());
        for node in nodes.filter(|node| node.running) {
            let found = address(node);
            if !servers.contains(&found) {
                servers.push(found);
            }
        }
        servers
    }
}

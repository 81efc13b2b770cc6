//! Has the client prove who it is, against what the servers have stored of its role's password.

use bytes::{Bytes, BytesMut};
use kornak_cluster::GroupId;
use kornak_config::rules::Method;
use kornak_protocol::auth::{Credentials, Refusal, ServerAuth, Step, StoredPassword};
use kornak_protocol::error::ErrorFields;
use kornak_protocol::sqlstate::{INTERNAL_ERROR, PROTOCOL_VIOLATION};
use kornak_protocol::startup::MAX_NAME_BYTES;

use super::{Login, NotAdmitted, Shown, Visitor, client_frame, refuse, silent};
use crate::admission::access::Rights;
use crate::admission::doors::{Full, Who};
use crate::cluster::route;
use crate::metrics::count;
use crate::net::backend::{Address, DialError};
use crate::net::stream::{Stream, write_all};
use crate::registry::Entry;

/// The part of a login's patience in which a server may say what it has stored; then what it said
/// before has to do. In a failover another server answers, so only the loss of all of them gets here.
const UNTIL_MEMORY: f32 = 0.8;

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
        entry: &mut Entry,
    ) -> Login<(Stream, Credentials)> {
        if let Err(full) = entry.visit.asks() {
            return self.refuse_full(stream, full);
        }
        let limit = self.patience().mul_f32(UNTIL_MEMORY);
        let found = tokio::time::timeout(limit, self.verifier()).await;
        entry.visit.listens();
        // Whoever was seen lately is known from memory while no server answers. Others are asked the
        // same after the same time, and told the same: nobody learns who was here lately.
        let from_memory = found.is_err();
        let known = match found {
            Ok(Ok(known)) => known,
            Err(_) => self.shared.verifiers.remembered_of(&self.role()),
            Ok(Err(error)) => {
                tracing::error!(
                    error = &error as &dyn std::error::Error,
                    "password verifier could not be read"
                );
                self.shared.set_trouble("auth", Some(error.to_string()));
                let text = "passwords cannot be checked at the moment";
                let fields = ErrorFields::fatal(INTERNAL_ERROR, text)
                    .hint("The proxy's own login on the servers fails; see its log.");
                return refuse(stream, &fields);
            }
        };
        self.shared.set_trouble("auth", None);
        let mut auth = self.auth(known.stored, *method == Method::Md5);
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
                Step::Refuse(Refusal::WrongPassword) if from_memory => {
                    return self.no_server(stream, &DialError::Timeout);
                }
                Step::Refuse(refusal) => return self.wrong(stream, refusal),
            }
        }
    }

    /// The exchange that the role's verifier asks for; a made-up one where there is none.
    fn auth(&self, stored: Option<StoredPassword>, takes_md5: bool) -> ServerAuth {
        if !takes_md5 && matches!(stored, Some(StoredPassword::Md5(_))) {
            let role = Shown(&self.user);
            tracing::warn!(%role, "login refused: the role has an md5 password and the method is scram");
        }
        match stored {
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
        }
    }

    pub(super) fn wrong<T>(&self, stream: Stream, refusal: Refusal) -> Login<T> {
        let (client, role) = (self.peer.shown(), Shown(&self.user));
        tracing::info!(%client, %role, why = %refusal, "login refused");
        refuse(stream, &refusal.fields(&self.user))
    }

    pub(super) async fn verifier(&self) -> Result<crate::admission::verifiers::Known, DialError> {
        // No role has such a name, and a server would only complain of it.
        if self.user.len() > MAX_NAME_BYTES || std::str::from_utf8(&self.user).is_err() {
            return Ok(crate::admission::verifiers::Known { stored: None });
        }
        loop {
            let servers = self.servers();
            match self.shared.verifiers.find(&self.role(), &servers).await {
                Err(error) if error.is_about_server() || error.is_ours() => {
                    tokio::time::sleep(ASK_PAUSE).await;
                }
                found => return found,
            }
        }
    }

    fn role(&self) -> crate::admission::verifiers::Role {
        (self.verified_by(), self.user.clone())
    }

    /// The rights of the role in the database, from the catalogues; `None` if they cannot be asked.
    pub(super) async fn rights(&self) -> Result<Option<Rights>, DialError> {
        let text = |name: &Bytes| std::str::from_utf8(name).is_ok();
        if !self.shared.prober.can_ask() || !text(&self.user) || !text(&self.database) {
            return Ok(None);
        }
        let pair = (self.user.clone(), self.database.clone());
        let asking = async {
            loop {
                match self.shared.access.find(&pair, &self.servers()).await {
                    Err(error) if error.is_about_server() || error.is_ours() => {
                        tokio::time::sleep(ASK_PAUSE).await;
                    }
                    found => return found,
                }
            }
        };
        match tokio::time::timeout(self.patience(), asking).await {
            Ok(Ok(rights)) => {
                self.shared.set_trouble("access", None);
                Ok(Some(rights))
            }
            Ok(Err(error)) => {
                if self.shared.set_trouble("access", Some(error.to_string())) {
                    let error = &error as &dyn std::error::Error;
                    tracing::error!(error, "rights of roles could not be read");
                }
                Ok(None)
            }
            Err(_) => Err(DialError::Timeout),
        }
    }

    /// Counts the client among those who are in, if there is room for it.
    pub(super) async fn come_in(&self, stream: Stream, entry: &mut Entry) -> Login<Stream> {
        let Err(full) = entry.visit.enter(self.who(), false) else { return Ok(stream) };
        let rights = self.rights().await;
        let is_superuser = rights.is_ok_and(|rights| rights.is_some_and(|it| it.is_superuser));
        if is_superuser && entry.visit.enter(self.who(), true).is_ok() {
            return Ok(stream);
        }
        self.refuse_full(stream, full)
    }

    /// Takes a place among the role's and the database's server connections, for a client that will
    /// have one to itself.
    pub(super) async fn take_server(&self, stream: Stream, entry: &mut Entry) -> Login<Stream> {
        let lender = &self.shared.lender;
        let mut taken = lender.take_own(&self.user, &self.database, false);
        if taken.is_none() {
            let rights = self.rights().await;
            let is_superuser = rights.is_ok_and(|it| it.is_some_and(|it| it.is_superuser));
            if is_superuser {
                taken = lender.take_own(&self.user, &self.database, true);
            }
        }
        match taken {
            None => self.refuse_full(stream, Full::Servers),
            taken => {
                entry.own_server = taken;
                Ok(stream)
            }
        }
    }

    pub(super) fn who(&self) -> Who {
        let (user, database) = (self.user.clone(), self.database.clone());
        Who { user, database, address: self.peer.address }
    }

    pub(super) fn refuse_full<T>(&self, stream: Stream, full: Full) -> Login<T> {
        let who = self.who();
        let (role, database) = (Shown(&who.user), Shown(&who.database));
        let client = self.peer.shown();
        tracing::info!(%client, %role, %database, limit = ?full, "login refused: too many clients");
        count(&self.shared.metrics.refused);
        let fields = full.fields(&who);
        self.shared.metrics.error(fields.sqlstate);
        refuse(stream, &fields)
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

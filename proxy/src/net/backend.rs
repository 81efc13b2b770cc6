//! Reaching a server: dial, TLS, login, and queries of our own.
//!
//! Not here: which server ([`crate::cluster::route`]), and what a session does with the connection
//! ([`crate::clients::forward`]).

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use kornak_cluster::{Node, discard};
use kornak_config::proxy::RequireAuth;
use kornak_protocol::auth::{Allowed, ClientAuth, Credentials, LoginError, Method, Step};
use kornak_protocol::backend::{self, Authentication, BackendKey};
use kornak_protocol::error::ErrorView;
use kornak_protocol::frame::{Frame, FrameError, take_frame};
use kornak_protocol::frontend;
use kornak_protocol::params::Parameters;
use kornak_protocol::sqlstate::{INVALID_PASSWORD, SqlState};
use kornak_protocol::startup::{self, ProtocolVersion};
use kornak_protocol::{DecodeError, EncodeError};
use tokio::net::{TcpStream, UnixStream};

use crate::net::descriptors;
use crate::net::stream::{self, Leg, Stream, read_more, write_all};
use crate::net::tls::{self, Attempt, ServerTls};

/// Longest message taken from a server outside of the data path: an answer to a query of ours.
const MAX_ANSWER_BYTES: usize = 1 << 20;

/// Bound of what is kept of a login's notices: a startup packet is of 10,000 bytes, and each name in it
/// is told twice at most.
const MAX_NOTICE_BYTES: usize = 1 << 15;

/// Where a server is.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Address {
    pub host: Arc<str>,
    pub port: u16,
}

impl From<&Node> for Address {
    fn from(node: &Node) -> Self {
        Self { host: Arc::clone(&node.host), port: node.port }
    }
}

/// Why a server could not be used.
#[derive(Debug, thiserror::Error)]
pub enum DialError {
    /// No connection, or it broke before the login was over.
    #[error("connect to the server")]
    Io(#[from] io::Error),
    /// The server took too long.
    #[error("server did not answer in time")]
    Timeout,
    /// The server refused by an ErrorResponse.
    #[error("server refused the login: {sqlstate} {message}")]
    Refused {
        sqlstate: SqlState,
        message: String,
        /// The whole ErrorResponse body, to be passed on.
        body: Bytes,
    },
    /// Our credentials do not do.
    #[error("log in to the server")]
    Auth(#[from] LoginError),
    /// The server does not speak PostgreSQL's protocol.
    #[error("server does not speak the protocol: {what}")]
    Protocol { what: String },
    /// TLS is asked for and the server has none, or its certificate will not do.
    #[error("encrypt the connection to the server: {what}")]
    Tls { what: String },
}

impl From<FrameError> for DialError {
    fn from(error: FrameError) -> Self {
        Self::Protocol { what: error.to_string() }
    }
}

impl From<DecodeError> for DialError {
    fn from(error: DecodeError) -> Self {
        Self::Protocol { what: error.to_string() }
    }
}

impl From<EncodeError> for DialError {
    fn from(error: EncodeError) -> Self {
        Self::Protocol { what: error.to_string() }
    }
}

impl DialError {
    /// Whether the server itself is away or not yet there, so that another, or the same one a
    /// moment later, may do; otherwise the refusal is meant for this login.
    pub fn is_about_server(&self) -> bool {
        match self {
            Self::Io(error) => !descriptors::are_missing(error),
            Self::Timeout => true,
            Self::Refused { sqlstate, .. } => sqlstate.class() == *b"57",
            Self::Auth(_) | Self::Protocol { .. } | Self::Tls { .. } => false,
        }
    }

    /// Whether what we have of the role's password is not, or not any more, its password.
    pub fn is_about_password(&self) -> bool {
        match self {
            Self::Auth(error) => {
                matches!(error, LoginError::OtherVerifier | LoginError::NoCredentials { .. })
            }
            Self::Refused { sqlstate, .. } => *sqlstate == INVALID_PASSWORD,
            _ => false,
        }
    }

    /// Whether this host has not what a connection needs: nothing is known of the server then, and a
    /// moment later it may do.
    pub fn is_ours(&self) -> bool {
        matches!(self, Self::Io(error) if descriptors::are_missing(error))
    }

    /// Whether the other kind of connection, under TLS or in the clear, may fare better.
    /// `pg_hba.conf` refuses with class 28.
    pub fn is_about_encryption(&self) -> bool {
        match self {
            Self::Tls { .. } => true,
            Self::Refused { sqlstate, .. } => sqlstate.class() == *b"28",
            _ => false,
        }
    }
}

/// A server connection that has logged in and is idle.
#[derive(Debug)]
pub struct Connected {
    pub stream: Stream,
    /// The parameters that the server reported.
    pub params: Parameters,
    /// NoticeResponses of the login, whole messages: about names in the startup packet that were cut.
    /// Not more than 32 KiB.
    pub notices: BytesMut,
    pub key: Option<BackendKey>,
    /// How it had us prove who we are.
    pub method: Method,
    /// Bytes that came behind ReadyForQuery.
    pub rest: BytesMut,
}

/// Opens a connection, encrypted as one rung of the ladder says.
pub async fn dial_as(
    address: &Address,
    tls: &ServerTls,
    attempt: Attempt,
) -> Result<Stream, DialError> {
    let tcp = TcpStream::connect((&*address.host, address.port)).await?;
    stream::tune(&tcp, Leg::Server);
    tls.encrypt(tcp, &address.host, attempt).await
}

/// Opens a connection, encrypted if the settings ask for it and the server can.
pub async fn dial(address: &Address, tls: &ServerTls) -> Result<Stream, DialError> {
    up_the_ladder(tls, |attempt| dial_as(address, tls, attempt)).await
}

/// The account for a login at a server.
#[derive(Debug, Clone, Copy)]
pub struct Account<'a> {
    /// The whole packet.
    pub startup: &'a [u8],
    pub user: &'a [u8],
    pub credentials: &'a Credentials,
    /// Of a role of ours, whose password opens every door: how it may be proven.
    pub own: Option<RequireAuth>,
}

impl Account<'_> {
    /// The methods of authentication that a server on this connection may ask for. What a client's
    /// login has taught cannot tell its password; a password in clear text or as an md5 hash is for
    /// those only whose certificate was verified.
    fn allowed(&self, stream: &Stream, tls: &ServerTls) -> Allowed {
        let Some(own) = self.own else { return Allowed::USUAL };
        let verified = matches!(stream, Stream::Tls(_)) && tls.verifies();
        let why = match verified {
            true => ": see auth.require_auth",
            false => ", because its certificate was not verified: see tls.server.ca",
        };
        Allowed {
            cleartext: own.password && verified,
            md5: own.md5 && verified,
            scram: own.scram,
            nothing: own.none,
            why,
        }
    }
}

/// Dials and logs in, all within `limit`.
pub async fn connect(
    address: &Address,
    tls: &ServerTls,
    account: Account<'_>,
    limit: Duration,
) -> Result<Connected, DialError> {
    let login = up_the_ladder(tls, |attempt| async move {
        let stream = dial_as(address, tls, attempt).await?;
        let allowed = account.allowed(&stream, tls);
        log_in(stream, account, allowed).await
    });
    tokio::time::timeout(limit, login).await.map_err(|_| DialError::Timeout)?
}

/// Logs in over a server's Unix socket.
pub async fn connect_locally(socket: &Path, account: Account<'_>) -> Result<Connected, DialError> {
    let stream = Stream::local(UnixStream::connect(socket).await?)?;
    log_in(stream, account, Allowed::USUAL).await
}

/// Tries what `sslmode` allows, as libpq does: after a failed handshake, or a refusal before the
/// login was over, `prefer` tries again in the clear and `allow` under TLS. The first refusal is
/// the one that is told.
async fn up_the_ladder<T, F: Future<Output = Result<T, DialError>>>(
    tls: &ServerTls,
    mut climb: impl FnMut(Attempt) -> F,
) -> Result<T, DialError> {
    let mut first = None;
    for attempt in tls.attempts() {
        match climb(*attempt).await {
            Err(error) if error.is_about_encryption() => {
                first.get_or_insert(error);
            }
            done => return done,
        }
    }
    Err(first.unwrap_or(DialError::Timeout))
}

async fn log_in(
    mut stream: Stream,
    account: Account<'_>,
    allowed: Allowed,
) -> Result<Connected, DialError> {
    write_all(&mut stream, account.startup).await?;
    let binding = tls::binding_of_server(&stream);
    let credentials = account.credentials.clone();
    let auth = ClientAuth::new(account.user, credentials, rand::random(), binding);
    let mut auth = auth.allow(allowed);
    let mut buf = BytesMut::new();
    let mut params = Parameters::default();
    let mut notices = BytesMut::new();
    let mut key = None;
    loop {
        let frame = next_frame(&mut stream, &mut buf).await?;
        match frame.tag {
            b'R' => match auth.on(&Authentication::parse(&frame.body)?) {
                Step::Send(bytes) | Step::Done { send: bytes, .. } => {
                    if !bytes.is_empty() {
                        write_all(&mut stream, &bytes).await?;
                    }
                }
                Step::Refuse(error) => return Err(error.into()),
            },
            b'S' => {
                let (name, value) = backend::parameter_status(&frame.body)?;
                params
                    .set(name, value)
                    .map_err(|error| DialError::Protocol { what: error.to_string() })?;
            }
            b'K' => key = Some(BackendKey::parse(&frame.body)?),
            b'Z' => {
                let method = auth.method();
                tracing::debug!(method = method.as_str(), "logged in to a server");
                return Ok(Connected { stream, params, notices, key, method, rest: buf });
            }
            b'E' => return Err(refused(&frame.body)),
            b'N' if notices.len() + frame.body.len() < MAX_NOTICE_BYTES => {
                put_frame(&frame, &mut notices);
            }
            b'N' | b'v' => {}
            tag => return Err(unexpected(tag)),
        }
    }
}

/// The next whole message.
pub async fn next_frame(stream: &mut Stream, buf: &mut BytesMut) -> Result<Frame, DialError> {
    loop {
        if let Some(frame) = take_frame(buf, MAX_ANSWER_BYTES)? {
            return Ok(frame);
        }
        read_more(stream, buf).await?;
    }
}

/// A message as it came.
pub fn put_frame(frame: &Frame, out: &mut BytesMut) {
    out.extend_from_slice(&[frame.tag]);
    out.extend_from_slice(&(frame.body.len() as u32 + 4).to_be_bytes());
    out.extend_from_slice(&frame.body);
}

fn refused(body: &Bytes) -> DialError {
    let view = ErrorView::parse_prefix(body);
    let message = String::from_utf8_lossy(view.message.unwrap_or_default()).into_owned();
    DialError::Refused { sqlstate: view.sqlstate(), message, body: body.clone() }
}

fn unexpected(tag: u8) -> DialError {
    DialError::Protocol { what: format!("unexpected message {}", tag.escape_ascii()) }
}

impl Connected {
    /// A connection over which nothing was said yet.
    pub fn fresh(stream: Stream) -> Self {
        Self {
            stream,
            params: Parameters::default(),
            notices: BytesMut::new(),
            key: None,
            method: Method::Nothing,
            rest: BytesMut::new(),
        }
    }

    /// Sends what a session held elsewhere and reads the answers, so many ReadyForQuery; their
    /// errors are counted, not passed on.
    pub async fn replay(&mut self, bytes: &[u8], mut owed: usize) -> Result<usize, DialError> {
        write_all(&mut self.stream, bytes).await?;
        let mut failed = 0;
        while owed > 0 {
            let frame = next_frame(&mut self.stream, &mut self.rest).await?;
            match frame.tag {
                b'Z' => owed -= 1,
                b'E' => failed += 1,
                b'S' => {
                    let (name, value) = backend::parameter_status(&frame.body)?;
                    // More than the bound were refused at login already.
                    discard::parameter_is_within_bound(self.params.set(name, value));
                }
                _ => {}
            }
        }
        Ok(failed)
    }

    /// Runs one statement with text parameters; rows of text values.
    pub async fn query(
        &mut self,
        sql: &str,
        values: &[Option<&[u8]>],
    ) -> Result<Vec<Vec<Option<Bytes>>>, DialError> {
        let mut out = BytesMut::new();
        frontend::put_parse(b"", sql.as_bytes(), &[], &mut out)?;
        frontend::put_bind(b"", b"", values, &mut out)?;
        frontend::put_execute(b"", 0, &mut out)?;
        frontend::put_sync(&mut out);
        write_all(&mut self.stream, &out).await?;
        let mut rows = Vec::new();
        let mut failure = None;
        loop {
            let frame = next_frame(&mut self.stream, &mut self.rest).await?;
            match frame.tag {
                b'D' => {
                    let row = backend::data_row(&frame.body)?;
                    let owned = |value: Option<&[u8]>| value.map(Bytes::copy_from_slice);
                    rows.push(row.into_iter().map(owned).collect());
                }
                b'E' => failure = Some(refused(&frame.body)),
                b'Z' => return failure.map_or(Ok(rows), Err),
                _ => {}
            }
        }
    }
}

/// The startup packet of a connection of our own.
pub fn own_startup(user: &str, database: &str, purpose: &str) -> Result<Bytes, EncodeError> {
    let mut out = BytesMut::new();
    let params: [(&[u8], &[u8]); 5] = [
        (b"user", user.as_bytes()),
        (b"database", database.as_bytes()),
        (b"application_name", purpose.as_bytes()),
        (b"client_encoding", b"UTF8"),
        (b"options", b"-c search_path=pg_catalog -c statement_timeout=5000"),
    ];
    startup::put_startup(ProtocolVersion::V3_0, params, &mut out)?;
    Ok(out.freeze())
}

/// Asks a server to cancel what one of its sessions does. Nothing is answered.
pub async fn cancel(address: &Address, tls: &ServerTls, key: &BackendKey) -> Result<(), DialError> {
    let mut stream = dial(address, tls).await?;
    let mut out = BytesMut::new();
    startup::put_cancel_request(key.pid, &key.key, &mut out)?;
    write_all(&mut stream, &out).await?;
    // The server closes when it has sent the signal; closing first could lose the packet.
    let mut nothing = BytesMut::new();
    discard::goes_on_either_way(read_more(&mut stream, &mut nothing).await);
    Ok(())
}

/// Terminates a server connection without waiting for anything.
pub fn say_good_bye(stream: &mut Stream) {
    let mut out = BytesMut::new();
    frontend::put_terminate(&mut out);
    stream.say_last(&out);
}

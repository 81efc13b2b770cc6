//! A client that speaks the protocol message by message: it sees every byte a server sends, and can
//! send what no driver would.
//!
//! Not here: TLS, and any opinion about what should be answered.

use std::time::Duration;

use anyhow::{Context, Result, bail};
use bytes::{Buf, Bytes, BytesMut};
use kornak_protocol::auth::{Binding, ClientAuth, Credentials, Step};
use kornak_protocol::backend::{self, Authentication, BackendKey};
use kornak_protocol::error::ErrorView;
use kornak_protocol::frame::{Frame, take_frame};
use kornak_protocol::frontend;
use kornak_protocol::startup::{self, ProtocolVersion};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

/// Longest message that is taken: more than any test sends for.
const LONGEST: usize = 64 << 20;

/// How long anything may take before a test gives up.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// Where and as whom to log in.
#[derive(Debug, Clone)]
pub struct Login {
    pub port: u16,
    pub user: String,
    pub password: String,
    pub database: String,
    /// Further parameters of the startup packet.
    pub params: Vec<(String, String)>,
}

impl Login {
    /// Without further parameters.
    pub fn new(port: u16, user: &str, password: &str, database: &str) -> Self {
        let own = str::to_owned;
        let (user, password, database) = (own(user), own(password), own(database));
        Self { port, user, password, database, params: Vec::new() }
    }

    /// With one more parameter.
    pub fn with(mut self, name: &str, value: &str) -> Self {
        self.params.push((name.to_owned(), value.to_owned()));
        self
    }
}

/// A connection.
#[derive(Debug)]
pub struct Talker {
    stream: TcpStream,
    inbox: BytesMut,
    port: u16,
    /// The key of BackendKeyData.
    pub key: BackendKey,
    /// The parameters that were reported at login, in their order.
    pub reported: Vec<(String, String)>,
    /// Notices before the first ReadyForQuery, in short words.
    pub noticed: Vec<String>,
}

impl Talker {
    /// Logs in.
    pub async fn login(login: &Login) -> Result<Self> {
        tokio::time::timeout(PATIENCE, Self::log_in(login)).await.context("no answer to a login")?
    }

    async fn log_in(login: &Login) -> Result<Self> {
        Self::begin(login).await?.finish().await
    }

    /// The first half of a login: the server, or the proxy, waits for a proof of the password.
    pub async fn begin(login: &Login) -> Result<HalfLogin> {
        let stream = TcpStream::connect(("127.0.0.1", login.port)).await.context("connect")?;
        stream.set_nodelay(true)?;
        let key = BackendKey { pid: 0, key: Bytes::new() };
        let (reported, noticed) = (Vec::new(), Vec::new());
        let inbox = BytesMut::new();
        let mut talker = Self { stream, inbox, port: login.port, key, reported, noticed };
        let mut out = BytesMut::new();
        let own = [("user", login.user.as_str()), ("database", login.database.as_str())];
        let more = login.params.iter().map(|(name, value)| (name.as_str(), value.as_str()));
        let params = own.into_iter().chain(more).map(|(n, v)| (n.as_bytes(), v.as_bytes()));
        startup::put_startup(ProtocolVersion::V3_0, params, &mut out)?;
        talker.send(&out).await?;
        let password = Credentials::Password(login.password.clone().into_bytes().into());
        let auth = ClientAuth::new(login.user.as_bytes(), password, rand::random(), Binding::None);
        let first = talker.next().await?.context("closed during the login")?;
        Ok(HalfLogin { talker, auth, next: first })
    }

    /// Writes.
    pub async fn send(&mut self, bytes: &[u8]) -> Result<()> {
        self.stream.write_all(bytes).await.context("write")
    }

    /// Says that nothing more will be said.
    pub async fn shut(&mut self) -> Result<()> {
        self.stream.shutdown().await.context("shut the sending side")
    }

    /// Sends a simple query.
    pub async fn query(&mut self, sql: &str) -> Result<()> {
        let mut out = BytesMut::new();
        frontend::put_query(sql.as_bytes(), &mut out)?;
        self.send(&out).await
    }

    /// The next message, or `None` after an orderly end.
    pub async fn next(&mut self) -> Result<Option<Frame>> {
        loop {
            if let Some(frame) = take_frame(&mut self.inbox, LONGEST)? {
                return Ok(Some(frame));
            }
            if self.stream.read_buf(&mut self.inbox).await.context("read")? == 0 {
                anyhow::ensure!(self.inbox.is_empty(), "closed in the middle of a message");
                return Ok(None);
            }
        }
    }

    /// Messages up to so many ReadyForQuery, or to the end of the connection, in short words
    /// ([`show`]). ParameterStatus is left out.
    pub async fn told(&mut self, ready: usize) -> Result<Vec<String>> {
        let mut told = Vec::new();
        let mut left = ready;
        while left > 0 {
            let next = tokio::time::timeout(PATIENCE, self.next()).await;
            let next = next.with_context(|| format!("no answer after {told:?}"))?;
            let Some(frame) = next.with_context(|| format!("after {told:?}"))? else {
                told.push("closed".to_owned());
                break;
            };
            left -= usize::from(frame.tag == b'Z');
            if frame.tag != b'S' {
                told.push(show(&frame));
            }
        }
        Ok(told)
    }

    /// Sends a simple query and collects what is answered to it.
    pub async fn ask(&mut self, sql: &str) -> Result<Vec<String>> {
        self.query(sql).await?;
        self.told(1).await
    }

    /// Says Parse, Bind and Execute, and nothing behind it.
    pub async fn execute(&mut self, name: &str, sql: Option<&str>) -> Result<()> {
        let mut out = BytesMut::new();
        put_execution(name, sql, &mut out);
        self.send(&out).await
    }

    /// Takes messages of any length without keeping them, up to the next ReadyForQuery. Answers
    /// which there were, and how long all of them together.
    pub async fn discard(&mut self) -> Result<(String, u64)> {
        let (mut tags, mut bytes) = (String::new(), 0);
        while !tags.ends_with('Z') {
            let tag = char::from(self.stream_byte().await?);
            let mut head = [0; 4];
            for byte in &mut head {
                *byte = self.stream_byte().await?;
            }
            let mut left = (u32::from_be_bytes(head) as usize).saturating_sub(4);
            bytes += left as u64 + 5;
            while left > 0 {
                if self.inbox.is_empty() {
                    self.fill().await?;
                }
                let taken = left.min(self.inbox.len());
                self.inbox.advance(taken);
                left -= taken;
            }
            tags.push(tag);
        }
        Ok((tags, bytes))
    }

    async fn stream_byte(&mut self) -> Result<u8> {
        if self.inbox.is_empty() {
            self.fill().await?;
        }
        Ok(self.inbox.get_u8())
    }

    async fn fill(&mut self) -> Result<()> {
        self.inbox.reserve(1 << 16);
        let read = self.stream.read_buf(&mut self.inbox).await.context("read")?;
        anyhow::ensure!(read > 0, "closed in the middle of an answer");
        Ok(())
    }

    /// Whether nothing is answered for a moment.
    pub async fn is_silent(&mut self) -> bool {
        tokio::time::timeout(Duration::from_millis(50), self.next()).await.is_err()
    }

    /// The single value of a query.
    pub async fn value(&mut self, sql: &str) -> Result<String> {
        let told = self.ask(sql).await?;
        let rows: Vec<_> = told.iter().filter_map(|it| it.strip_prefix("D ")).collect();
        match rows.as_slice() {
            [row] => Ok((*row).to_owned()),
            _ => bail!("{sql}: {told:?}"),
        }
    }

    /// Asks the other side to cancel what this connection does, and waits until it has passed the
    /// request on.
    pub async fn cancel(&self) -> Result<()> {
        let mut stream = TcpStream::connect(("127.0.0.1", self.port)).await?;
        let mut out = BytesMut::new();
        startup::put_cancel_request(self.key.pid, &self.key.key, &mut out)?;
        stream.write_all(&out).await?;
        let mut nothing = [0; 16];
        // The other side closes; a reset is as good.
        let _ = tokio::time::timeout(PATIENCE, stream.read(&mut nothing)).await?;
        Ok(())
    }
}

/// Appends Parse (if there is a text), Bind and Execute of a statement without parameters.
pub fn put_execution(name: &str, sql: Option<&str>, out: &mut BytesMut) {
    const FITS: &str = "a test's statement fits into a message";
    let name = name.as_bytes();
    if let Some(sql) = sql {
        frontend::put_parse(name, sql.as_bytes(), &[], out).expect(FITS);
    }
    frontend::put_bind(b"", name, &[], out).expect(FITS);
    frontend::put_execute(b"", 0, out).expect(FITS);
}

/// A login that has begun.
pub struct HalfLogin {
    talker: Talker,
    auth: ClientAuth,
    next: Frame,
}

impl HalfLogin {
    /// The second half.
    pub async fn finish(self) -> Result<Talker> {
        let Self { mut talker, mut auth, next: mut frame } = self;
        loop {
            match frame.tag {
                b'R' => match auth.on(&Authentication::parse(&frame.body)?) {
                    Step::Send(bytes) | Step::Done { send: bytes, .. } => {
                        talker.send(&bytes).await?;
                    }
                    Step::Refuse(error) => return Err(error.into()),
                },
                b'S' => {
                    let (name, value) = backend::parameter_status(&frame.body)?;
                    let text = |bytes| String::from_utf8_lossy(bytes).into_owned();
                    talker.reported.push((text(name), text(value)));
                }
                b'K' => talker.key = BackendKey::parse(&frame.body)?,
                b'N' => talker.noticed.push(show(&frame)),
                b'Z' => return Ok(talker),
                _ => bail!("login refused: {}", show(&frame)),
            }
            frame = talker.next().await?.context("closed during the login")?;
        }
    }
}

/// A message in short: its tag, and what matters of it (SQLSTATE, status, command tag, values).
pub fn show(frame: &Frame) -> String {
    let tag = char::from(frame.tag);
    let text = || {
        let body = frame.body.strip_suffix(b"\0").unwrap_or(&frame.body);
        String::from_utf8_lossy(body).into_owned()
    };
    match frame.tag {
        b'E' | b'N' => {
            let view = ErrorView::parse_prefix(&frame.body);
            let message = String::from_utf8_lossy(view.message.unwrap_or_default()).into_owned();
            let hint = String::from_utf8_lossy(view.hint.unwrap_or_default());
            match frame.tag {
                b'E' if view.severity().ends_session() => {
                    format!("E {} FATAL {hint}", view.sqlstate()).trim_end().to_owned()
                }
                b'E' => format!("E {}", view.sqlstate()),
                _ => format!("N {message}"),
            }
        }
        b'C' | b'Z' => format!("{tag} {}", text()),
        b'D' => {
            let row = backend::data_row(&frame.body).unwrap_or_default();
            let value = |it: Option<&[u8]>| match it {
                Some(bytes) => String::from_utf8_lossy(bytes).into_owned(),
                None => "null".to_owned(),
            };
            format!("D {}", row.into_iter().map(value).collect::<Vec<_>>().join("|"))
        }
        _ => tag.to_string(),
    }
}

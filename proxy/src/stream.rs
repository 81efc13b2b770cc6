//! A TCP connection, in the clear or under TLS, of either leg.

use std::io;
use std::os::fd::AsFd;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use socket2::{SockRef, TcpKeepalive};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio_rustls::TlsStream;

/// Either kind of connection.
#[derive(Debug)]
pub enum Stream {
    /// In the clear.
    Plain(TcpStream),
    /// Under TLS.
    Tls(Box<TlsStream<TcpStream>>),
}

/// Which peer a connection leads to; it decides how soon silence counts as death.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Leg {
    /// A client may be asleep for days.
    Client,
    /// A server that does not acknowledge what we sent is gone.
    Server,
}

/// Unacknowledged data of a server connection makes it fail after this long: half of Patroni's
/// smallest lease, so that a vanished host does not hold a transaction longer than its successor
/// takes to appear.
const SERVER_USER_TIMEOUT: Duration = Duration::from_secs(10);

/// Sets what every connection of ours has: no delay, keepalive 5/5/5 s on servers, 60/15/4 on
/// clients. Failures are of no consequence.
pub fn tune(stream: &TcpStream, leg: Leg) {
    let _ = stream.set_nodelay(true);
    let socket = SockRef::from(stream);
    let (idle, every, times) = match leg {
        Leg::Client => (60, 15, 4),
        Leg::Server => (5, 5, 3),
    };
    let keepalive = TcpKeepalive::new()
        .with_time(Duration::from_secs(idle))
        .with_interval(Duration::from_secs(every))
        .with_retries(times);
    let _ = socket.set_tcp_keepalive(&keepalive);
    if leg == Leg::Server {
        let _ = socket.set_tcp_user_timeout(Some(SERVER_USER_TIMEOUT));
    }
}

impl Stream {
    /// The TCP connection below.
    pub fn tcp(&self) -> &TcpStream {
        match self {
            Self::Plain(stream) => stream,
            Self::Tls(stream) => stream.get_ref().0,
        }
    }

    /// Says a last thing without waiting for anything: a peer that is not listening misses it.
    pub fn say_last(&mut self, bytes: &[u8]) {
        use futures_util::FutureExt;
        use tokio::io::AsyncWriteExt;
        let saying = async {
            self.write_all(bytes).await?;
            self.flush().await
        };
        let _ = saying.now_or_never();
    }

    /// The certificate that the client has shown, if it has; it was verified in the handshake.
    pub fn client_certificate(&self) -> Option<&[u8]> {
        match self {
            Self::Tls(stream) => {
                let shown = stream.get_ref().1.peer_certificates()?.first()?;
                Some(shown.as_ref())
            }
            Self::Plain(_) => None,
        }
    }

    /// Moves the connection to the calling thread: its readiness is from now on heard of here.
    pub fn rehome(&mut self) -> io::Result<()> {
        let tcp = match self {
            Self::Plain(stream) => stream,
            Self::Tls(stream) => stream.get_mut().0,
        };
        let copy = std::net::TcpStream::from(tcp.as_fd().try_clone_to_owned()?);
        *tcp = TcpStream::from_std(copy)?;
        Ok(())
    }
}

impl AsyncRead for Stream {
    #[inline]
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(stream) => Pin::new(stream).poll_read(cx, buf),
            Self::Tls(stream) => Pin::new(stream.as_mut()).poll_read(cx, buf),
        }
    }
}

impl AsyncWrite for Stream {
    #[inline]
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Plain(stream) => Pin::new(stream).poll_write(cx, bytes),
            Self::Tls(stream) => Pin::new(stream.as_mut()).poll_write(cx, bytes),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(stream) => Pin::new(stream).poll_flush(cx),
            Self::Tls(stream) => Pin::new(stream.as_mut()).poll_flush(cx),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(stream) => Pin::new(stream).poll_shutdown(cx),
            Self::Tls(stream) => Pin::new(stream.as_mut()).poll_shutdown(cx),
        }
    }
}

/// Reads some bytes behind what `buf` has; `UnexpectedEof` at the end of the stream.
pub async fn read_more(stream: &mut Stream, buf: &mut bytes::BytesMut) -> io::Result<()> {
    use tokio::io::AsyncReadExt;
    buf.reserve(1024);
    match stream.read_buf(buf).await? {
        0 => Err(io::ErrorKind::UnexpectedEof.into()),
        _ => Ok(()),
    }
}

/// Reads at least one byte and at most `most`, behind what `buf` has.
pub async fn read_at_most(
    stream: &mut Stream,
    buf: &mut bytes::BytesMut,
    most: usize,
) -> io::Result<()> {
    use bytes::BufMut;
    use tokio::io::AsyncReadExt;
    buf.reserve(most);
    match stream.read_buf(&mut buf.limit(most)).await? {
        0 => Err(io::ErrorKind::UnexpectedEof.into()),
        _ => Ok(()),
    }
}

/// Writes all of it and flushes.
pub async fn write_all(stream: &mut Stream, bytes: &[u8]) -> io::Result<()> {
    use tokio::io::AsyncWriteExt;
    stream.write_all(bytes).await?;
    stream.flush().await
}

//! A TCP connection, in the clear or under TLS, of either leg; or a server's Unix socket.

use std::io;
use std::ops::Deref;
use std::os::fd::{AsFd, OwnedFd};
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::BufMut;
use kornak_cluster::discard;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{RecvFlags, recv};
use socket2::{SockRef, TcpKeepalive};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpStream, UnixStream};
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

/// As `SERVER_USER_TIMEOUT`, for clients: a host that has vanished keeps its server connection and its locks no longer than
/// one that is idle.
const CLIENT_USER_TIMEOUT: Duration = Duration::from_secs(120);

/// Sets what every connection of ours has: no delay, keepalive 5/5/5 s on servers, 60/15/4 on
/// clients. Failures are of no consequence.
pub fn tune(stream: &TcpStream, leg: Leg) {
    discard::only_helps(stream.set_nodelay(true));
    let socket = SockRef::from(stream);
    let (idle, every, times) = match leg {
        Leg::Client => (60, 15, 4),
        Leg::Server => (5, 5, 3),
    };
    let keepalive = TcpKeepalive::new()
        .with_time(Duration::from_secs(idle))
        .with_interval(Duration::from_secs(every))
        .with_retries(times);
    discard::only_helps(socket.set_tcp_keepalive(&keepalive));
    let limit = match leg {
        Leg::Client => CLIENT_USER_TIMEOUT,
        Leg::Server => SERVER_USER_TIMEOUT,
    };
    discard::only_helps(socket.set_tcp_user_timeout(Some(limit)));
}

/// Whether a peer has closed its side of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HungUp {
    No,
    /// The other side sends nothing any more; it may still read.
    Half,
    /// The connection is over.
    Whole,
}

/// Most bytes that an idle server may have said.
const MAX_SAID_BYTES: usize = 16 * 1024;

/// A socket read without the runtime, which hears of new bytes only when it polls next.
struct Kernel<'a>(&'a TcpStream);

impl io::Read for Kernel<'_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        loop {
            match recv(self.0, &mut *buf, RecvFlags::DONTWAIT) {
                Ok((_, n)) => return Ok(n),
                Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
}

impl Stream {
    /// A server's Unix socket. Everything that is done with a stream is done with sockets of any kind;
    /// only the times that TCP knows are refused, and nobody looks.
    pub fn local(socket: UnixStream) -> io::Result<Self> {
        let socket = std::net::TcpStream::from(OwnedFd::from(socket.into_std()?));
        Ok(Self::Plain(TcpStream::from_std(socket)?))
    }

    /// A client that takes nothing is there all the same: the kernel would take its full window for death.
    pub fn be_patient(&self, patient: bool) {
        let limit = (!patient).then_some(CLIENT_USER_TIMEOUT);
        discard::only_helps(SockRef::from(self.tcp()).set_tcp_user_timeout(limit));
    }

    /// Whether the peer has closed its side, asked of the kernel.
    pub fn hung_up(&self) -> HungUp {
        let mut fds = [PollFd::new(self.tcp(), PollFlags::RDHUP)];
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        if poll(&mut fds, Some(&now)).is_err() {
            return HungUp::No;
        }
        let [fd] = fds;
        if fd.revents().intersects(PollFlags::HUP | PollFlags::ERR) {
            HungUp::Whole
        } else if fd.revents().contains(PollFlags::RDHUP) {
            HungUp::Half
        } else {
            HungUp::No
        }
    }

    /// Takes what an idle server has said, behind what was `said` before. Answers whether it is alive:
    /// it has neither closed nor sent an error, which would be its last.
    pub fn is_alive(&mut self, said: &mut (impl BufMut + Deref<Target = [u8]>)) -> bool {
        let before = said.len();
        if !matches!(self.take_waiting(said), Err(error) if error.kind() == io::ErrorKind::WouldBlock)
        {
            return false;
        }
        said.len() == before || !holds_error(said)
    }

    /// Reads until the kernel has nothing more; the error says why it ended.
    fn take_waiting(&mut self, said: &mut (impl BufMut + Deref<Target = [u8]>)) -> io::Result<()> {
        use std::io::Read;
        let mut some = [0u8; 1024];
        loop {
            let n = match self {
                Self::Plain(tcp) => Kernel(tcp).read(&mut some)?,
                Self::Tls(tls) => match &mut **tls {
                    TlsStream::Client(tls) => {
                        let (tcp, tls) = tls.get_mut();
                        match tls.reader().read(&mut some) {
                            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                                if tls.read_tls(&mut Kernel(tcp))? == 0 {
                                    return Ok(());
                                }
                                tls.process_new_packets().map_err(io::Error::other)?;
                                continue;
                            }
                            read => read?,
                        }
                    }
                    TlsStream::Server(_) => return Ok(()),
                },
            };
            if n == 0 || said.len() + n > MAX_SAID_BYTES {
                return Ok(());
            }
            said.put_slice(some.get(..n).unwrap_or_default());
        }
    }

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
        discard::goes_on_either_way(saying.now_or_never());
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

/// Whether there is an ErrorResponse among these messages, the last of which may not be whole.
fn holds_error(mut said: &[u8]) -> bool {
    while let Some((&[tag, a, b, c, d], _)) = said.split_first_chunk::<5>() {
        if tag == b'E' {
            return true;
        }
        let len = u32::from_be_bytes([a, b, c, d]) as usize + 1;
        said = said.get(len.max(5)..).unwrap_or_default();
    }
    said.first() == Some(&b'E')
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

//! Reading into and writing from borrowed buffers, without waiting.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};

use bytes::{Buf, BytesMut};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use crate::net::stream::Stream;

/// Puts bytes that were held back in front of the next read.
pub(super) fn keep_front<'a>(scratch: &'a mut [u8], kept: &[u8]) -> Option<&'a mut [u8]> {
    let (front, free) = scratch.split_at_mut_checked(kept.len())?;
    front.copy_from_slice(kept);
    (!free.is_empty()).then_some(free)
}

#[inline]
pub(super) fn poll_read(
    stream: &mut Stream,
    cx: &mut Context<'_>,
    free: &mut [u8],
) -> Poll<io::Result<usize>> {
    let mut buf = ReadBuf::new(free);
    match Pin::new(stream).poll_read(cx, &mut buf) {
        Poll::Ready(Ok(())) => Poll::Ready(Ok(buf.filled().len())),
        Poll::Ready(Err(error)) => Poll::Ready(Err(error)),
        Poll::Pending => Poll::Pending,
    }
}

/// Writes what was kept, here and inside of TLS; whether nothing is left.
pub(super) fn flush(
    stream: &mut Stream,
    kept: &mut BytesMut,
    cx: &mut Context<'_>,
) -> io::Result<bool> {
    if !kept.is_empty() {
        while !kept.is_empty() {
            match Pin::new(&mut *stream).poll_write(cx, kept) {
                Poll::Ready(Ok(0)) => return Err(io::ErrorKind::WriteZero.into()),
                Poll::Ready(Ok(n)) => kept.advance(n),
                Poll::Ready(Err(error)) => return Err(error),
                Poll::Pending => return Ok(false),
            }
        }
        *kept = BytesMut::new();
    }
    // TLS has taken bytes that a full socket has not: they wait for us as well.
    match stream {
        Stream::Plain(_) => Ok(true),
        Stream::Tls(_) => match Pin::new(stream).poll_flush(cx) {
            Poll::Ready(flushed) => flushed.map(|()| true),
            Poll::Pending => Ok(false),
        },
    }
}

/// Writes; what the socket does not take is kept behind what is kept already.
pub(super) fn write(
    stream: &mut Stream,
    kept: &mut BytesMut,
    bytes: &[u8],
    cx: &mut Context<'_>,
) -> io::Result<()> {
    let mut rest = bytes;
    if kept.is_empty() {
        while !rest.is_empty() {
            match Pin::new(&mut *stream).poll_write(cx, rest) {
                Poll::Ready(Ok(0)) => return Err(io::ErrorKind::WriteZero.into()),
                Poll::Ready(Ok(n)) => rest.advance(n),
                Poll::Ready(Err(error)) => return Err(error),
                Poll::Pending => break,
            }
        }
        if let Stream::Tls(_) = stream
            && let Poll::Ready(Err(error)) = Pin::new(&mut *stream).poll_flush(cx)
        {
            return Err(error);
        }
    }
    kept.extend_from_slice(rest);
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::task::Waker;

    use rcgen::{CertificateParams, KeyPair};
    use rustls::pki_types::{CertificateDer, PrivateKeyDer};
    use rustls::{ClientConfig, RootCertStore, ServerConfig};
    use tokio::io::AsyncReadExt;
    use tokio::net::{TcpListener, TcpStream};
    use tokio_rustls::{TlsAcceptor, TlsConnector, TlsStream};

    use super::*;

    /// Our end and the peer's.
    async fn pair() -> (Stream, tokio_rustls::client::TlsStream<TcpStream>) {
        let key = KeyPair::generate().unwrap();
        let made = CertificateParams::new(["peer".to_owned()]).unwrap().self_signed(&key).unwrap();
        let cert = CertificateDer::from(made.der().to_vec());
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let server = ServerConfig::builder_with_provider(Arc::clone(&provider))
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(
                vec![cert.clone()],
                PrivateKeyDer::try_from(key.serialize_der()).unwrap(),
            )
            .unwrap();
        let mut roots = RootCertStore::empty();
        roots.add(cert).unwrap();
        let client = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(roots)
            .with_no_client_auth();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let theirs = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        let (ours, _) = listener.accept().await.unwrap();
        let connector = TlsConnector::from(Arc::new(client));
        let acceptor = TlsAcceptor::from(Arc::new(server));
        let (theirs, ours) = tokio::join!(
            connector.connect("peer".try_into().unwrap(), theirs),
            acceptor.accept(ours)
        );
        (Stream::Tls(Box::new(TlsStream::Server(ours.unwrap()))), theirs.unwrap())
    }

    fn is_stuck(stream: &Stream) -> bool {
        let Stream::Tls(tls) = stream else { return false };
        tls.get_ref().1.wants_write()
    }

    #[tokio::test]
    async fn what_tls_has_taken_and_a_full_socket_has_not_is_flushed_as_well() {
        let (mut ours, mut theirs) = pair().await;
        let (mut kept, mut sent) = (BytesMut::new(), 0);
        let mut cx = Context::from_waker(Waker::noop());
        while !is_stuck(&ours) {
            write(&mut ours, &mut kept, &[7; 4096], &mut cx).unwrap();
            sent += 4096;
        }
        assert!(kept.is_empty(), "all of it is inside of TLS");
        let reading = async {
            let mut all = vec![0; sent];
            theirs.read_exact(&mut all).await.unwrap();
        };
        let flushing = std::future::poll_fn(|cx| match flush(&mut ours, &mut kept, cx) {
            Ok(true) => Poll::Ready(()),
            Ok(false) => Poll::Pending,
            Err(error) => panic!("{error}"),
        });
        tokio::join!(reading, flushing);
        assert!(!is_stuck(&ours));
    }

    #[tokio::test]
    async fn what_an_idle_server_has_said_is_taken() {
        let notice = b"N\0\0\0\x06x\0";
        let farewell = b"E\0\0\0\x06x\0";
        for (last, closes) in [(&farewell[..], false), (b"", true)] {
            let (mut server, ours) = pair().await;
            let mut ours = Stream::Tls(Box::new(TlsStream::Client(ours)));
            let mut said = Vec::new();
            assert!(ours.is_alive(&mut said) && said.is_empty());
            crate::net::stream::write_all(&mut server, notice).await.unwrap();
            while said.is_empty() {
                assert!(ours.is_alive(&mut said));
                tokio::task::yield_now().await;
            }
            assert_eq!(said, notice, "it is for the next client");
            crate::net::stream::write_all(&mut server, last).await.unwrap();
            if closes {
                drop(server);
            }
            while ours.is_alive(&mut said) {
                tokio::task::yield_now().await;
            }
        }
    }
}

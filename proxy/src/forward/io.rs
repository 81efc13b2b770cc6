//! Reading into and writing from borrowed buffers, without waiting.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};

use bytes::{Buf, BytesMut};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use crate::stream::Stream;

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

/// Writes what was kept; whether nothing is left.
pub(super) fn flush(
    stream: &mut Stream,
    kept: &mut BytesMut,
    cx: &mut Context<'_>,
) -> io::Result<bool> {
    if kept.is_empty() {
        return Ok(true);
    }
    while !kept.is_empty() {
        match Pin::new(&mut *stream).poll_write(cx, kept) {
            Poll::Ready(Ok(0)) => return Err(io::ErrorKind::WriteZero.into()),
            Poll::Ready(Ok(n)) => kept.advance(n),
            Poll::Ready(Err(error)) => return Err(error),
            Poll::Pending => return Ok(false),
        }
    }
    *kept = BytesMut::new();
    if let Stream::Tls(_) = stream
        && let Poll::Ready(Err(error)) = Pin::new(stream).poll_flush(cx)
    {
        return Err(error);
    }
    Ok(true)
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

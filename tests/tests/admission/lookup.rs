//! The lookup role's queries to a server that nobody knows.

use std::net::TcpListener as StdListener;
use std::time::Instant;

use anyhow::Result;
use bytes::{BufMut, BytesMut};
use kornak_tests::run::scratch::Scratch;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

use crate::{Proxy, SOON, auth};

/// A server that asks for a password in clear text, then for an md5 hash, and hears nothing.
pub(crate) async fn the_lookup_password_is_for_verified_servers(scratch: &Scratch) -> Result<()> {
    let listener = StdListener::bind("127.0.0.1:0")?;
    listener.set_nonblocking(true)?;
    let port = listener.local_addr()?.port();
    let listener = TcpListener::from_std(listener)?;
    let lines = format!("status: {{listen: \"STATUS\"}}\n{}", auth(""));
    let _proxy = Proxy::start(scratch, "unverified", port, &[""], &lines).await?;
    for asked in [&[0, 0, 0, 3][..], &[0, 0, 0, 5, 1, 2, 3, 4]] {
        let until_asked = Instant::now() + SOON;
        loop {
            anyhow::ensure!(Instant::now() < until_asked, "nobody logs in");
            let (mut socket, _) = tokio::time::timeout(SOON, listener.accept()).await??;
            let mut packet = whole_packet(&mut socket).await?;
            if packet.get(4..8) == Some(&80_877_103u32.to_be_bytes()) {
                // No TLS.
                socket.write_all(b"N").await?;
                packet = whole_packet(&mut socket).await?;
            }
            if !packet.windows(4).any(|part| part == b"user") {
                continue;
            }
            let mut question = BytesMut::new();
            question.put_u8(b'R');
            question.put_u32(asked.len() as u32 + 4);
            question.extend_from_slice(asked);
            socket.write_all(&question).await?;
            let mut answer = Vec::new();
            // A reset is as good as an orderly end.
            let _ = tokio::time::timeout(SOON, socket.read_to_end(&mut answer)).await?;
            assert!(!answer.starts_with(b"p"), "it said {:?}", String::from_utf8_lossy(&answer));
            break;
        }
    }
    Ok(())
}

async fn whole_packet(socket: &mut TcpStream) -> Result<BytesMut> {
    let mut packet = BytesMut::new();
    let length = |packet: &BytesMut| packet.first_chunk().map_or(8, |it| u32::from_be_bytes(*it));
    while packet.len() < length(&packet) as usize {
        if socket.read_buf(&mut packet).await? == 0 {
            break;
        }
    }
    Ok(packet)
}

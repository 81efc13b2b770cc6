//! The header by which a load balancer tells whom it speaks for: PROXY protocol, versions 1 and 2
//! (<https://www.haproxy.org/download/1.8/doc/proxy-protocol.txt>).
//!
//! A listener that expects it refuses connections without it: anyone could claim anything. Pure.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use bytes::{Buf, BytesMut};

/// Longest header of version 1, its line end included.
const MAX_V1_BYTES: usize = 107;

/// Longest rest of a version 2 header that is taken: addresses and a few extensions.
const MAX_V2_BYTES: usize = 2048;

const V2_SIGNATURE: &[u8; 12] = b"\r\n\r\n\0\r\nQUIT\n";

/// The bytes are no such header.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("connection does not begin with a PROXY protocol header")]
pub struct NoHeader;

/// A balancer's header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// The address of the client, if the balancer knows it.
    pub client: Option<SocketAddr>,
}

/// Takes the header from the front of `buf`; `Ok(None)` means "read more".
pub fn take_header(buf: &mut BytesMut) -> Result<Option<Header>, NoHeader> {
    let first = buf.get(..12.min(buf.len())).unwrap_or_default();
    if V2_SIGNATURE.starts_with(first) {
        return take_v2(buf);
    }
    let known = b"PROXY ".get(..6.min(buf.len())).unwrap_or_default();
    if !buf.starts_with(known) {
        return Err(NoHeader);
    }
    let line = buf.get(..MAX_V1_BYTES.min(buf.len())).unwrap_or_default();
    let Some(end) = line.windows(2).position(|pair| pair == b"\r\n") else {
        return if buf.len() < MAX_V1_BYTES { Ok(None) } else { Err(NoHeader) };
    };
    let line = buf.split_to(end + 2);
    let text = std::str::from_utf8(&line).map_err(|_| NoHeader)?;
    let mut words = text.trim_end().split(' ').skip(1);
    match words.next() {
        Some("TCP4" | "TCP6") => {
            let source: IpAddr = words.next().and_then(|it| it.parse().ok()).ok_or(NoHeader)?;
            let port = words.nth(1).and_then(|it| it.parse().ok()).ok_or(NoHeader)?;
            Ok(Some(Header { client: Some(SocketAddr::new(source, port)) }))
        }
        Some("UNKNOWN") => Ok(Some(Header { client: None })),
        _ => Err(NoHeader),
    }
}

/// How many bytes are surely missing behind these, which [`take_header`] wants more of: reading no
/// more than that never takes a byte of what follows the header.
pub fn missing(buf: &[u8]) -> usize {
    match buf.len() {
        // The shortest header of either version is longer.
        len @ 0..12 => 12 - len,
        _ if !buf.starts_with(V2_SIGNATURE) => 1,
        len @ 12..16 => 16 - len,
        len => {
            let rest = buf.get(14..16).and_then(|two| two.try_into().ok());
            (16 + usize::from(u16::from_be_bytes(rest.unwrap_or_default()))).saturating_sub(len)
        }
    }
}

fn take_v2(buf: &mut BytesMut) -> Result<Option<Header>, NoHeader> {
    let Some(&[command, family, high, low]) = buf.get(12..16) else { return Ok(None) };
    let len = usize::from(u16::from_be_bytes([high, low]));
    if command >> 4 != 2 || len > MAX_V2_BYTES {
        return Err(NoHeader);
    }
    if buf.len() < 16 + len {
        return Ok(None);
    }
    buf.advance(16);
    let addresses = buf.split_to(len);
    let port = |at: usize| {
        let two = addresses.get(at..at + 2)?;
        Some(u16::from_be_bytes(two.try_into().ok()?))
    };
    // Two addresses and two ports, the client's first.
    let source = match (command & 0xf, family) {
        (0, _) => return Ok(Some(Header { client: None })),
        (1, 0x11) => {
            addresses.first_chunk::<4>().map(|a| IpAddr::V4(Ipv4Addr::from(*a))).zip(port(8))
        }
        (1, 0x21) => {
            addresses.first_chunk::<16>().map(|a| IpAddr::V6(Ipv6Addr::from(*a))).zip(port(32))
        }
        (1, _) => return Ok(Some(Header { client: None })),
        _ => return Err(NoHeader),
    };
    let (address, port) = source.ok_or(NoHeader)?;
    Ok(Some(Header { client: Some(SocketAddr::new(address, port)) }))
}

/// Fuzz entry: whatever the bytes, never panic and never take more than was there.
pub fn fuzz_take_header(input: &[u8]) {
    let mut buf = BytesMut::from(input);
    if let Ok(Some(_)) = take_header(&mut buf) {
        assert!(input.ends_with(&buf));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn take(bytes: &[u8]) -> (Result<Option<Header>, NoHeader>, usize) {
        let mut buf = BytesMut::from(bytes);
        let taken = take_header(&mut buf);
        (taken, buf.len())
    }

    #[test]
    fn both_versions_are_read_and_what_follows_stays() {
        let v1 = b"PROXY TCP4 10.1.2.3 10.0.0.1 5555 5000\r\nrest";
        assert_eq!(
            take(v1),
            (Ok(Some(Header { client: Some("10.1.2.3:5555".parse().unwrap()) })), 4)
        );
        assert_eq!(take(b"PROXY UNKNOWN\r\n"), (Ok(Some(Header { client: None })), 0));
        let v2 = [&V2_SIGNATURE[..], &[0x21, 0x11, 0, 12, 10, 1, 2, 3, 10, 0, 0, 1, 1, 2, 3, 4, 9]];
        assert_eq!(
            take(&v2.concat()),
            (Ok(Some(Header { client: Some("10.1.2.3:258".parse().unwrap()) })), 1)
        );
        // Too short for what it says to have.
        let short = [&V2_SIGNATURE[..], &[0x21, 0x11, 0, 4, 10, 1, 2, 3]];
        assert_eq!(take(&short.concat()).0, Err(NoHeader));
        let local = [&V2_SIGNATURE[..], &[0x20, 0, 0, 0]].concat();
        assert_eq!(take(&local), (Ok(Some(Header { client: None })), 0));
    }

    #[test]
    fn a_header_in_pieces_is_waited_for() {
        let v1 = b"PROXY TCP6 ::1 ::1 5555 5000\r\n";
        for cut in 0..v1.len() {
            assert_eq!(take(&v1[..cut]).0, Ok(None), "{cut}");
        }
        let v2 = [&V2_SIGNATURE[..], &[0x21, 0x11, 0, 12, 10, 1]].concat();
        for cut in 0..v2.len() {
            assert_eq!(take(&v2[..cut]).0, Ok(None), "{cut}");
        }
    }

    #[test]
    fn reading_what_is_missing_takes_nothing_of_what_follows() {
        let v2 = [&V2_SIGNATURE[..], &[0x21, 0x11, 0, 12, 10, 1, 2, 3, 10, 0, 0, 1, 1, 2, 3, 4]];
        for header in
            [&b"PROXY TCP4 10.1.2.3 10.0.0.1 5 6\r\n"[..], b"PROXY UNKNOWN\r\n", &v2.concat()]
        {
            let mut taken = BytesMut::new();
            let mut source = [header, b"\x16rest"].concat();
            while let Ok(None) = take_header(&mut taken) {
                let n = missing(&taken);
                assert!(n > 0);
                taken.extend_from_slice(&source.drain(..n).collect::<Vec<_>>());
            }
            assert_eq!((taken.len(), source.as_slice()), (0, &b"\x16rest"[..]));
        }
    }

    #[test]
    fn anything_else_is_refused() {
        for bytes in [
            &b"\0\0\0\x08\x04\xd2\x16\x2f"[..],
            b"GET / HTTP",
            b"PROXY TCP4 x\r\n",
            &[b'P'; 9],
            b"PROXY TCP4 1.2.3.4 1.2.3.4\r\n",
        ] {
            assert_eq!(take(bytes).0, Err(NoHeader), "{bytes:?}");
        }
        let long = [&b"PROXY TCP4 "[..], &[b'1'; 200]].concat();
        assert_eq!(take(&long).0, Err(NoHeader));
    }
}

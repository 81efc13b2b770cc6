//! Port numbers that stay ours.
//!
//! Asking the kernel for port 0 and letting it go again is not enough here: such a number lies in
//! the range from which outgoing connections take theirs, and while a server restarts under load
//! one of them would take it. So numbers come from below that range, and a UDP socket on the same
//! number is the sign to other tests that it is taken.
//!
//! A number belongs to one server of a test, wherever that is: [`host_of`] says where.

use std::collections::HashMap;
use std::net::{Ipv4Addr, TcpListener, UdpSocket};
use std::sync::LazyLock;
use std::sync::atomic::{AtomicU16, Ordering};

use parking_lot::Mutex;

/// Below the kernel's default `ip_local_port_range` and above the well-known servers.
const RANGE: std::ops::Range<u16> = 15_000..32_000;

/// Where servers are that are not on 127.0.0.1, by their port.
static ELSEWHERE: LazyLock<Mutex<HashMap<u16, String>>> = LazyLock::new(Mutex::default);

/// The address of the server with this port.
pub fn host_of(number: u16) -> String {
    ELSEWHERE.lock().get(&number).cloned().unwrap_or_else(|| Ipv4Addr::LOCALHOST.to_string())
}

/// A TCP port that nobody else takes while this value lives, on 127.0.0.1 if nothing else is said.
#[derive(Debug)]
pub struct Port {
    number: u16,
    _claim: UdpSocket,
}

impl Port {
    /// Claims a port on which nothing listens.
    pub fn free() -> Self {
        static NEXT: AtomicU16 = AtomicU16::new(0);
        let span = RANGE.end - RANGE.start;
        // Processes begin at different places, so that they seldom meet.
        let start = std::process::id().wrapping_mul(97) % u32::from(span);
        for _ in 0..span {
            let step = NEXT.fetch_add(1, Ordering::Relaxed);
            let offset = (start + u32::from(step)) % u32::from(span);
            let number = RANGE.start + u16::try_from(offset).expect("less than the span");
            if let Some(port) = Self::claim(number) {
                return port;
            }
        }
        panic!("no free port in {RANGE:?}");
    }

    /// For a server on another address.
    #[must_use]
    pub fn at(self, host: &str) -> Self {
        ELSEWHERE.lock().insert(self.number, host.to_owned());
        self
    }

    /// `None` if somebody has it.
    fn claim(number: u16) -> Option<Self> {
        let claim = UdpSocket::bind((Ipv4Addr::LOCALHOST, number)).ok()?;
        // 0.0.0.0 as well: a server of this machine may listen there.
        let free = TcpListener::bind((Ipv4Addr::LOCALHOST, number)).is_ok()
            && TcpListener::bind((Ipv4Addr::UNSPECIFIED, number)).is_ok();
        free.then_some(Self { number, _claim: claim })
    }

    /// Claims `N` ports.
    pub fn several<const N: usize>() -> [Self; N] {
        std::array::from_fn(|_| Self::free())
    }

    /// Claims `count` ports in a row, for a program that is told the first one only.
    pub fn block(count: u16) -> Vec<Self> {
        loop {
            let mut block = vec![Self::free()];
            let first = block.first().map_or(0, Self::number);
            block.extend((1..count).map_while(|offset| Self::claim(first + offset)));
            if block.len() == usize::from(count) {
                return block;
            }
        }
    }

    pub fn number(&self) -> u16 {
        self.number
    }

    /// `host:number`.
    pub fn address(&self) -> String {
        format!("{}:{}", host_of(self.number), self.number)
    }
}

//! Sessions of one program that belong on one server: the workers of `pg_dump -j` import the snapshot
//! that its first connection has exported, and a snapshot is known on its own server only.

use std::hash::{DefaultHasher, Hash, Hasher};

use crate::cluster::route::Candidate;
use crate::registry::Registry;

/// Names under which such programs connect, unless they are told otherwise.
const PROGRAMS: [&[u8]; 2] = [b"pg_dump", b"pg_dumpall"];

/// A number that sessions of one program run have in common, from the startup packet; never 0.
pub fn family_of(startup: &[u8]) -> Option<u64> {
    let mut words = startup.get(8..)?.split(|byte| *byte == 0);
    let name = loop {
        let (name, value) = (words.next()?, words.next()?);
        if name == b"application_name" {
            break value;
        }
    };
    PROGRAMS.contains(&name).then(|| {
        let mut hasher = DefaultHasher::new();
        startup.hash(&mut hasher);
        hasher.finish().max(1)
    })
}

/// Where the family is already.
pub(super) fn with_family(
    registry: &Registry,
    startup: Option<&[u8]>,
    candidates: &[Candidate],
) -> Option<Candidate> {
    let node = registry.node_of_family(family_of(startup?)?)?;
    candidates.iter().find(|candidate| candidate.name == node).cloned()
}

#[cfg(test)]
mod tests {
    use bytes::BytesMut;
    use kornak_protocol::startup::{ProtocolVersion, put_startup};

    use super::*;

    fn packet(name: &str, database: &str) -> BytesMut {
        let mut out = BytesMut::new();
        let params: [(&[u8], &[u8]); 3] = [
            (b"user", b"application_name"),
            (b"database", database.as_bytes()),
            (b"application_name", name.as_bytes()),
        ];
        put_startup(ProtocolVersion::V3_0, params, &mut out).unwrap();
        out
    }

    #[test]
    fn workers_of_a_dump_are_a_family() {
        let family = |name, database| family_of(&packet(name, database));
        assert!(family("pg_dump", "a").is_some());
        assert_eq!(family("pg_dump", "a"), family("pg_dump", "a"));
        assert_ne!(family("pg_dump", "a"), family("pg_dump", "b"));
        assert_eq!(family("psql", "a"), None);
        assert_eq!(family_of(b""), None);
    }
}

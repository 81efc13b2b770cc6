//! Every fuzz entry of this crate in one table, for property tests and fuzzers alike.
//!
//! An entry takes any bytes and must return: a panic, an overflow or a broken promise (they are
//! asserted inside) is a defect. `SEEDS` are well-formed inputs to damage.

/// An entry: its name and the function.
pub type Entry = (&'static str, fn(&[u8]));

/// All entries.
pub const ENTRIES: &[Entry] = &[
    ("take_startup", crate::startup::fuzz_take_startup),
    ("take_frame", crate::frame::fuzz_take_frame),
    ("scan", crate::frame::fuzz_scan),
    ("frontend", crate::frontend::fuzz_frontend),
    ("sql", crate::frontend::fuzz_sql),
    ("backend", crate::backend::fuzz_backend),
    ("error_view", crate::error::fuzz_error_view),
    ("server_auth", crate::auth::fuzz_server_auth),
    ("client_auth", crate::auth::fuzz_client_auth),
    ("pipeline", crate::pipeline::fuzz_pipeline),
];

/// Well-formed inputs.
pub const SEEDS: &[&[u8]] = &[
    b"\0\0\0\x08\x04\xd2\x16\x2f",
    b"\0\0\0\x10\x04\xd2\x16\x2e\0\0\0\x07\x01\x02\x03\x04",
    b"\0\0\0\x22\0\x03\0\0user\0ann\0database\0shop\0\0",
    b"\0\0\0\x25\0\x03\x27\x0fuser\0u\0_pq_.test_protocol\0\0\0",
    b"\x07Q\0\0\0\x0dselect 1\0S\0\0\0\x04",
    b"\x03P\0\0\0\x10s\0select 1\0\0\0B\0\0\0\x0d\0s\0\0\0\0\0\0\0E\0\0\0\x09\0\0\0\0\0S\0\0\0\x04",
    b"\x05T\0\0\0\x06\0\0D\0\0\0\x0b\0\x01\0\0\0\x01xC\0\0\0\x0dSELECT 1\0Z\0\0\0\x05I",
    b"SERROR\0VERROR\0C40001\0Mretry the transaction\0\0",
    b"S3\0select $1, $$a;b$$ -- c\n/* d */ from \"t\" where x = 'it''s'; commit",
    b"\x30SCRAM-SHA-256\0\0\0\0\x1dn,,n=user,r=rOprNGfwEbeRWgbNc=biws,r=abc,p=AAAA",
    b"\x2ar=AQEBAQEBAQEBAQEBAQEBAQEBzz,s=c2FsdA==,i=1v=6rriTRBi23WpRR/wtup+mMhUZUn/dB5nLTJRsjl95G4=",
    b"SCRAM-SHA-256$4096:W22ZaJ0SNY7soEsUEjb6gQ==$WG5d8oPm3OtcPnkdi4Uo7BkeZkBFzpcXkuLmtbsT4qY=:\
      wfPLwcE6nTWhTAmQ7tl2KeoiWGPlZqQxSrmfPwDl2dU=",
    b"md53175bce1d3201d16594cebf9d7eb3f9d",
    b"\0\0\0\x0aSCRAM-SHA-256-PLUS\0SCRAM-SHA-256\0\0",
];

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use proptest::sample::Index;

    use super::*;

    #[test]
    fn every_entry_takes_every_seed_and_nothing() {
        for (_, entry) in ENTRIES {
            entry(&[]);
            SEEDS.iter().for_each(|seed| entry(seed));
        }
    }

    /// Damage to bytes, by a network or by an attacker.
    #[derive(Debug, Clone)]
    enum Damage {
        Set(Index, u8),
        Flip(Index, u8),
        Insert(Index, u8),
        Remove(Index),
        Cut(Index),
        Repeat(Index, Index),
        Word(Index, u32),
        Append(Index),
    }

    fn damage() -> impl Strategy<Value = Damage> {
        let index = any::<Index>;
        prop_oneof![
            (index(), any::<u8>()).prop_map(|(at, b)| Damage::Set(at, b)),
            (index(), 0u8..8).prop_map(|(at, bit)| Damage::Flip(at, bit)),
            (index(), any::<u8>()).prop_map(|(at, b)| Damage::Insert(at, b)),
            index().prop_map(Damage::Remove),
            index().prop_map(Damage::Cut),
            (index(), index()).prop_map(|(a, b)| Damage::Repeat(a, b)),
            (
                index(),
                prop::sample::select(vec![0, 1, 3, 4, 5, 10_004, 0x7fff_ffff, 1 << 31, u32::MAX])
            )
                .prop_map(|(at, w)| Damage::Word(at, w)),
            index().prop_map(Damage::Append),
        ]
    }

    fn damaged(seed: &[u8], all: &[Damage]) -> Vec<u8> {
        let mut bytes = seed.to_vec();
        for one in all {
            let len = bytes.len();
            if len == 0 {
                break;
            }
            match one {
                Damage::Set(at, b) => bytes[at.index(len)] = *b,
                Damage::Flip(at, bit) => bytes[at.index(len)] ^= 1 << bit,
                Damage::Insert(at, b) => bytes.insert(at.index(len), *b),
                Damage::Remove(at) => {
                    bytes.remove(at.index(len));
                }
                Damage::Cut(at) => bytes.truncate(at.index(len)),
                Damage::Repeat(a, b) => {
                    let (from, to) =
                        (a.index(len).min(b.index(len)), a.index(len).max(b.index(len)));
                    bytes.extend_from_within(from..to);
                }
                Damage::Word(at, w) => {
                    let at = at.index(len);
                    bytes.iter_mut().skip(at).zip(w.to_be_bytes()).for_each(|(to, b)| *to = b);
                }
                Damage::Append(other) => bytes.extend(*other.get(SEEDS)),
            }
        }
        bytes
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(512))]

        #[test]
        fn no_damaged_input_breaks_any_entry(
            seed in prop::sample::select(SEEDS),
            all in prop::collection::vec(damage(), 0..6),
        ) {
            let bytes = damaged(seed, &all);
            ENTRIES.iter().for_each(|(_, entry)| entry(&bytes));
        }

        #[test]
        fn no_random_input_breaks_any_entry(bytes in prop::collection::vec(any::<u8>(), 0..256)) {
            ENTRIES.iter().for_each(|(_, entry)| entry(&bytes));
        }
    }
}

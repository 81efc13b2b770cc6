//! Every bound of this crate, with its reason and its source.
//!
//! A peer names lengths before it sends bytes, so each length is compared with one of these
//! before anything is reserved. Nothing here is configurable: these are the bounds of the
//! protocol itself; how many sessions or held queries there may be is the proxy's affair.

/// Longest startup packet, not counting its length word: `MAX_STARTUP_PACKET_LENGTH` of
/// `src/include/libpq/pqcomm.h`. Without it, four bytes could make us reserve gigabytes.
pub const MAX_STARTUP_BYTES: usize = 10_000;

/// Largest length word of a message that may carry data: `PQ_LARGE_MESSAGE_LIMIT`, which is
/// `MaxAllocSize - 1`. A server refuses more, and so does libpq.
pub const MAX_LARGE_MESSAGE_LEN: u32 = 0x3fff_fffe;

/// Largest length word of a client message that only names things (Sync, Execute, Describe,
/// CopyDone, …): `PQ_SMALL_MESSAGE_LIMIT` of `src/include/libpq/libpq.h`.
pub const MAX_SMALL_FRONTEND_LEN: u32 = 10_000;

/// Largest length word of a server message that carries no data: libpq calls anything longer
/// "out of sync" (`pqParseInput3`, `VALID_LONG_MESSAGE_TYPE`).
pub const MAX_SMALL_BACKEND_LEN: u32 = 30_000;

/// Largest length word of a password, SASL or GSS message in either direction:
/// `PG_MAX_AUTH_TOKEN_LENGTH` (65,535) and the length word.
pub const MAX_AUTH_MESSAGE_LEN: u32 = 65_539;

/// Largest length word of BackendKeyData: the process id and a key of
/// [`MAX_CANCEL_KEY_BYTES`].
pub const MAX_KEY_DATA_LEN: u32 = 4 + 4 + MAX_CANCEL_KEY_BYTES as u32;

/// Longest secret of a cancel request, in bytes (protocol 3.2,
/// `/docs/current/protocol-message-formats.html`, BackendKeyData).
pub const MAX_CANCEL_KEY_BYTES: usize = 256;

/// Shortest secret of a cancel request, in bytes: the only length of protocol 3.0.
pub const MIN_CANCEL_KEY_BYTES: usize = 4;

/// Bytes of a body that the scanner shows of messages whose text matters: SQL, error fields,
/// parameters. Enough for what is decided by it (the first words of a statement, the SQLSTATE),
/// and small enough that ten thousand sessions with a split message cost no more than 160 MB.
pub const PREFIX_TEXT_BYTES: u32 = 16 * 1024;

/// Bytes of a body that the scanner shows of messages that begin with names (Bind, Execute, …).
/// PostgreSQL compares 63 bytes of a statement's name, so a longer one than this is nobody's.
pub const PREFIX_NAMES_BYTES: u32 = 1024;

/// Messages whose answers may be owed at once before the client is no longer read. A driver's
/// batch is a few thousand; 16,384 entries cost 192 KiB.
pub const MAX_OWED: usize = 16_384;

/// Longest SCRAM message that is looked at, in bytes. The longest honest one carries a user
/// name, a nonce and channel-binding data; CVE-2026-6664 was an overflow behind a longer one.
pub const MAX_SCRAM_MESSAGE_BYTES: usize = 2_048;

/// Fewest and most PBKDF2 rounds of a verifier: the range of PostgreSQL's `scram_iterations`.
/// Neither checking a proof nor proving with recovered keys does the rounds; a login with a
/// password does, and takes 100,000 at most (`auth::cleartext`).
pub const SCRAM_ITERATIONS: std::ops::RangeInclusive<u32> = 1..=0x7fff_ffff;

/// Longest SCRAM salt in bytes after decoding; PostgreSQL's are 16.
pub const MAX_SCRAM_SALT_BYTES: usize = 256;

/// Longest nonce that a peer may send, in characters; ours are 24, libpq's 24.
pub const MAX_SCRAM_NONCE_BYTES: usize = 256;

/// Fields of one ErrorResponse that are looked at. PostgreSQL sends at most 18.
pub const MAX_ERROR_FIELDS: usize = 64;

/// Reported parameters kept of one server. PostgreSQL 18 reports 15 and Citus one more;
/// extensions may add their own.
pub const MAX_PARAMETERS: usize = 256;

const _: () = assert!(PREFIX_NAMES_BYTES <= MAX_SMALL_FRONTEND_LEN);
const _: () = assert!(PREFIX_TEXT_BYTES <= MAX_SMALL_BACKEND_LEN);

//! The SQLSTATEs that Kornak itself sends or judges by, each with when.
//!
//! `/docs/current/errcodes-appendix.html`. Drivers act on these five letters, not on the text
//! beside them, so each is chosen for what drivers make of it.

use std::fmt;

/// Five characters of an error's class and kind.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct SqlState([u8; 5]);

impl SqlState {
    /// Reads a code as it came; anything but five digits or capital letters is none.
    pub fn from_bytes(code: &[u8]) -> Option<Self> {
        let code: [u8; 5] = code.try_into().ok()?;
        code.iter().all(|b| b.is_ascii_digit() || b.is_ascii_uppercase()).then_some(Self(code))
    }

    /// The five characters.
    pub fn as_str(&self) -> &str {
        std::str::from_utf8(&self.0).unwrap_or("XX000")
    }

    /// The five bytes.
    pub fn as_bytes(&self) -> &[u8; 5] {
        &self.0
    }

    /// The first two characters, which all codes of a kind share.
    pub fn class(&self) -> [u8; 2] {
        [self.0[0], self.0[1]]
    }
}

impl fmt::Display for SqlState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl fmt::Debug for SqlState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SqlState({})", self.as_str())
    }
}

macro_rules! states {
    ($($(#[$doc:meta])* $name:ident = $code:literal;)*) => {
        $($(#[$doc])* pub const $name: SqlState = SqlState(*$code);)*
        /// Every code of this module, for tables and tests.
        pub const ALL: &[SqlState] = &[$($name),*];
    };
}

states! {
    /// `successful_completion`: only in notices.
    SUCCESSFUL_COMPLETION = b"00000";
    /// `warning`: notices of ours.
    WARNING = b"01000";
    /// `sqlclient_unable_to_establish_sqlconnection`: a server could not be reached.
    UNABLE_TO_CONNECT = b"08001";
    /// `connection_failure`: the server's connection broke while a login was relayed.
    CONNECTION_FAILURE = b"08006";
    /// `transaction_resolution_unknown`: the statement was forwarded and its outcome is not
    /// known; it is never sent again.
    TRANSACTION_RESOLUTION_UNKNOWN = b"08007";
    /// `protocol_violation`: the peer sent what the protocol does not allow.
    PROTOCOL_VIOLATION = b"08P01";
    /// `feature_not_supported`: a protocol version or mechanism that is not served.
    FEATURE_NOT_SUPPORTED = b"0A000";
    /// `invalid_parameter_value`: a word of the startup packet that PostgreSQL does not take.
    INVALID_PARAMETER_VALUE = b"22023";
    /// `invalid_sql_statement_name`: a prepared statement does not exist.
    UNDEFINED_PSTATEMENT = b"26000";
    /// `duplicate_prepared_statement`: the client has prepared a statement of this name.
    DUPLICATE_PSTATEMENT = b"42P05";
    /// `read_only_sql_transaction`: a server was demoted under the session.
    READ_ONLY_SQL_TRANSACTION = b"25006";
    /// `idle_in_transaction_session_timeout`: a client let its transaction lie too long.
    IDLE_IN_TRANSACTION_SESSION_TIMEOUT = b"25P03";
    /// `transaction_timeout`: a transaction took too long (PostgreSQL 17).
    TRANSACTION_TIMEOUT = b"25P04";
    /// `in_failed_sql_transaction`: a statement in the dead transaction that we answer for.
    IN_FAILED_SQL_TRANSACTION = b"25P02";
    /// `insufficient_privilege`: a server does not let a role set a parameter at login.
    INSUFFICIENT_PRIVILEGE = b"42501";
    /// `invalid_authorization_specification`: no rule admits this client.
    INVALID_AUTHORIZATION = b"28000";
    /// `invalid_password`: the proof was wrong, or the role does not exist, which must look
    /// alike.
    INVALID_PASSWORD = b"28P01";
    /// `invalid_catalog_name`: no such database.
    INVALID_CATALOG_NAME = b"3D000";
    /// `serialization_failure`: the transaction is certainly rolled back; retry it.
    SERIALIZATION_FAILURE = b"40001";
    /// `configuration_limit_exceeded`: a message or queue is longer than we take.
    CONFIGURATION_LIMIT_EXCEEDED = b"53400";
    /// `too_many_connections`: the proxy's own limit.
    TOO_MANY_CONNECTIONS = b"53300";
    /// `object_not_in_prerequisite_state`: the database takes no connections.
    OBJECT_NOT_IN_PREREQUISITE_STATE = b"55000";
    /// `lock_not_available`.
    LOCK_NOT_AVAILABLE = b"55P03";
    /// `query_canceled`: a held query was cancelled by its client.
    QUERY_CANCELED = b"57014";
    /// `admin_shutdown`: the session cannot be moved and ends here.
    ADMIN_SHUTDOWN = b"57P01";
    /// `crash_shutdown`: seen of servers only.
    CRASH_SHUTDOWN = b"57P02";
    /// `cannot_connect_now`: no primary within the hold time; nothing was executed.
    CANNOT_CONNECT_NOW = b"57P03";
    /// `database_dropped`: seen of servers only.
    DATABASE_DROPPED = b"57P04";
    /// `idle_session_timeout`: seen of servers only.
    IDLE_SESSION_TIMEOUT = b"57P05";
    /// `internal_error`: a defect of ours.
    INTERNAL_ERROR = b"XX000";
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_code_reads_back_as_itself() {
        for code in ALL {
            assert_eq!(SqlState::from_bytes(code.as_bytes()), Some(*code));
            assert_eq!(code.as_str().as_bytes(), code.as_bytes());
        }
    }

    #[test]
    fn what_is_no_code_is_refused() {
        for text in [&b""[..], b"4000", b"400011", b"4000a", b"4000\0", b"\xff\xff\xff\xff\xff"] {
            assert_eq!(SqlState::from_bytes(text), None, "{text:?}");
        }
    }
}

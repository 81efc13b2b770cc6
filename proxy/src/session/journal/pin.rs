//! Why a session cannot be moved, nor its server connection be lent to others.

use crate::sabotage::{self, Sabotage};

/// Why a session cannot be moved.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(u8)]
pub enum Pin {
    /// The server authenticated the client, we cannot log in in its place.
    Relay,
    /// A replication stream.
    Replication,
    /// Temporary tables.
    Temporary,
    /// A cursor WITH HOLD.
    HoldCursor,
    /// The session listens; notifications would be lost.
    Listen,
    /// A statement prepared by SQL.
    SqlPrepare,
    /// A setting whose text we could not follow.
    Setting,
    /// A library was loaded.
    Load,
    /// Text that may take advisory locks, set parameters or open connections by a function.
    Opaque,
    /// Advisory locks of the session, by the server's own list.
    Advisory,
    /// A prepared statement that is too long to be kept.
    LongStatement,
    /// More prepared statements or settings than are kept.
    TooMuch,
    /// The conversation could not be followed.
    Lost,
}

impl Pin {
    /// Every reason.
    pub const ALL: [Self; 13] = [
        Self::Relay,
        Self::Replication,
        Self::Temporary,
        Self::HoldCursor,
        Self::Listen,
        Self::SqlPrepare,
        Self::Setting,
        Self::Load,
        Self::Opaque,
        Self::Advisory,
        Self::LongStatement,
        Self::TooMuch,
        Self::Lost,
    ];

    /// Label of metrics and status.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Relay => "relay",
            Self::Replication => "replication",
            Self::Temporary => "temporary_table",
            Self::HoldCursor => "hold_cursor",
            Self::Listen => "listen",
            Self::SqlPrepare => "sql_prepare",
            Self::Setting => "setting",
            Self::Load => "load",
            Self::Opaque => "opaque_function",
            Self::Advisory => "advisory_lock",
            Self::LongStatement => "long_statement",
            Self::TooMuch => "too_much_state",
            Self::Lost => "not_followed",
        }
    }

    /// Whether it is not noticed, on purpose.
    fn is_sabotaged(self) -> bool {
        let which = match self {
            Self::Temporary => Sabotage::Temporary,
            Self::Advisory => Sabotage::Locks,
            Self::Listen => Sabotage::Channels,
            Self::SqlPrepare => Sabotage::Prepared,
            Self::HoldCursor => Sabotage::Cursors,
            _ => return false,
        };
        sabotage::is(which)
    }

    /// Whether frameworks hold it for milliseconds: a planned switchover waits for that.
    pub fn may_be_short(self) -> bool {
        matches!(self, Self::HoldCursor | Self::SqlPrepare | Self::Temporary)
    }

    /// A hint for people: how to avoid the pin.
    pub fn hint(self) -> &'static str {
        match self {
            Self::Relay => "Sessions move only with auth method scram.",
            Self::Replication => "Replication streams cannot be moved; reconnect.",
            Self::Temporary => "The session held temporary tables.",
            Self::HoldCursor => "The session held a cursor WITH HOLD.",
            Self::Listen => "The session was listening; notifications may have been missed.",
            Self::SqlPrepare => "The session held statements of SQL PREPARE.",
            Self::Setting => "The session held a setting that could not be followed.",
            Self::Load => "The session had loaded a library.",
            Self::Opaque => "The session may have held advisory locks or other state of functions.",
            Self::Advisory => "The session held advisory locks.",
            Self::LongStatement => "The session held a prepared statement of more than 1 MB.",
            Self::TooMuch => "The session held more state than is kept.",
            Self::Lost => "The session could not be followed.",
        }
    }
}

/// A set of pins.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Pins(u16, pub(super) Doubt);

/// Whether a set of pins was touched since somebody looked.
type Doubt = bool;

impl Pins {
    /// Adds a reason.
    pub fn add(&mut self, pin: Pin) {
        if pin.is_sabotaged() {
            return;
        }
        self.0 |= 1 << pin as u16;
        self.1 = true;
    }

    pub(super) fn has(self, pin: Pin) -> bool {
        self.0 & (1 << pin as u16) != 0
    }

    pub(super) fn remove(&mut self, pin: Pin) {
        self.0 &= !(1 << pin as u16);
    }

    pub(super) fn without(self, pin: Pin) -> Self {
        Self(self.0 & !(1 << pin as u16), self.1)
    }

    /// The first reason, if there is any.
    pub fn first(self) -> Option<Pin> {
        Pin::ALL.into_iter().find(|pin| self.0 & (1 << *pin as u16) != 0)
    }
}

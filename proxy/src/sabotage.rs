//! Defects on purpose, to see that tests find them: `KORNAK_SABOTAGE=settings` in the environment of a debug
//! build. A release build has none of it.

/// A defence that a test switches off, to see that the test notices.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sabotage {
    /// A connection changes hands in the middle of a client's message.
    Boundary,
    /// A connection is lent without its next client's settings.
    Settings,
    /// Parameters that the last client has set stay on the connection, beside those of the next
    /// one.
    Leftovers,
    /// A connection that its server has closed is lent.
    Dead,
    /// COMMIT AND CHAIN commits nothing.
    Chain,
    /// ROLLBACK TO takes nothing back.
    Savepoint,
    /// A ROLLBACK is not heeded if something follows in its pipeline.
    Rollback,
    /// Settings behind a comment are not seen.
    Comment,
    /// RESET of one parameter is not seen.
    Reset,
    /// SET SESSION CHARACTERISTICS is not seen.
    Characteristics,
    /// Nobody asks for parameters of an application's own.
    Custom,
    /// Nobody asks what functions have left.
    Functions,
    /// State that functions have left without a trace reaches the next client.
    Untraced,
    /// Suspicious texts raise no suspicion.
    Texts,
    /// The server deallocates what others use.
    Deallocate,
    /// The server's names of statements are shown to clients.
    Names,
    /// Statements are shared under different settings.
    Contexts,
    /// The unnamed statement of the last client is the next one's.
    Unnamed,
    /// DISCARD ALL leaves the client its statements.
    Discard,
    /// A session with a temporary table gives its connection away.
    Temporary,
    /// A session with a lock gives its connection away.
    Locks,
    /// A session that listens gives its connection away.
    Channels,
    /// A session with a statement of SQL gives its connection away.
    Prepared,
    /// A session with a cursor WITH HOLD gives its connection away.
    Cursors,
}

/// Whether something is broken on purpose.
#[cfg(debug_assertions)]
pub fn is(sabotage: Sabotage) -> bool {
    use std::sync::OnceLock;
    static CHOSEN: OnceLock<Option<String>> = OnceLock::new();
    let chosen = CHOSEN.get_or_init(|| std::env::var("KORNAK_SABOTAGE").ok());
    chosen.as_ref().is_some_and(|name| format!("{sabotage:?}").eq_ignore_ascii_case(name))
}

/// Nothing is broken on purpose.
#[cfg(not(debug_assertions))]
pub const fn is(_: Sabotage) -> bool {
    false
}

//! What short statements name: which setting, which word comes last.

/// Whether a text may leave something in the session that cannot be asked for: connections of dblink,
/// a replication origin, or a name that is spelled with escapes.
pub(super) fn leaves_unseen(sql: &[u8]) -> bool {
    let lower = sql.to_ascii_lowercase();
    let has = |name: &[u8]| memchr::memmem::find(&lower, name).is_some();
    has(b"dblink") || has(b"pg_replication") || has(b"_replication_slot") || has(b"u&\"")
}

pub(super) enum Setting {
    Local,
    Session(Box<[u8]>),
    Unknown,
}

/// Which setting a single SET statement changes.
pub(super) fn setting_name(text: &[u8]) -> Setting {
    let mut words = words(text);
    if words.next().as_deref() != Some(b"set") {
        return Setting::Unknown;
    }
    let mut name = words.next();
    if name.as_deref() == Some(b"session") {
        match words.next().as_deref() {
            Some(b"characteristics") => {
                return Setting::Session(b"session characteristics"[..].into());
            }
            Some(b"authorization") => return Setting::Session(b"session authorization"[..].into()),
            next => name = next.map(Into::into),
        }
    }
    match name.as_deref() {
        Some(b"local" | b"transaction" | b"constraints") => Setting::Local,
        Some(b"time") => Setting::Session(b"timezone"[..].into()),
        Some(b"names") => Setting::Session(b"client_encoding"[..].into()),
        Some(b"schema") => Setting::Session(b"search_path"[..].into()),
        Some(b"seed" | b"xml") | None => Setting::Unknown,
        Some(name) => Setting::Session(name.into()),
    }
}

/// Lower-case words of a statement; anything that is no word, dot or quote separates them.
pub(super) fn words(text: &[u8]) -> impl Iterator<Item = Box<[u8]>> {
    text.split(|b| b.is_ascii_whitespace() || matches!(b, b'=' | b';' | b','))
        .filter(|word| !word.is_empty())
        .map(|word| {
            let word = word.strip_prefix(b"\"").and_then(|w| w.strip_suffix(b"\"")).unwrap_or(word);
            word.to_ascii_lowercase().into_boxed_slice()
        })
}

pub(super) fn last_word(text: &[u8]) -> Option<Box<[u8]>> {
    words(text).last()
}

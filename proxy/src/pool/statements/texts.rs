//! The texts of prepared statements, kept once.

use std::collections::HashMap;
use std::sync::{Arc, Weak};

use bytes::Bytes;
use parking_lot::Mutex;

use super::Content;

/// Texts that clients of a proxy share: the same statement of a thousand clients is kept once.
#[derive(Debug, Default)]
pub struct Texts {
    known: Mutex<HashMap<Bytes, Weak<Content>>>,
}

/// Texts remembered; beyond, those that nobody uses any more are looked for.
const MAX_TEXTS: usize = 16 * 1024;

impl Texts {
    /// The content of a Parse; `body` is its body without the name.
    pub fn find(&self, body: &[u8], make: impl FnOnce(Bytes) -> Content) -> Arc<Content> {
        let mut known = self.known.lock();
        if let Some(content) = known.get(body).and_then(Weak::upgrade) {
            return content;
        }
        if known.len() >= MAX_TEXTS {
            known.retain(|_, content| content.strong_count() > 0);
        }
        let content = Arc::new(make(Bytes::copy_from_slice(body)));
        if known.len() < MAX_TEXTS {
            known.insert(content.body.clone(), Arc::downgrade(&content));
        }
        content
    }
}

/// The bytes behind the name in a Parse's body.
pub fn content_of(body: &[u8]) -> Option<&[u8]> {
    let end = memchr::memchr(0, body)?;
    body.get(end + 1..)
}

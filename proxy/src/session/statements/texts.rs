//! The texts of prepared statements, kept once.

use std::collections::HashMap;
use std::sync::{Arc, Weak};

use bytes::Bytes;
use parking_lot::Mutex;

use super::Content;

/// Texts that clients of a proxy share: the same statement of a thousand clients is kept once.
#[derive(Debug, Default)]
pub struct Texts {
    known: Mutex<Known>,
}

#[derive(Debug, Default)]
struct Known {
    texts: HashMap<Bytes, Weak<Content>>,
    /// The length of all texts, of unused ones as well.
    bytes: usize,
    /// How long they were when the unused were last looked for.
    used: usize,
}

/// Texts remembered; beyond, those that nobody uses any more are looked for.
const MAX_TEXTS: usize = 16 * 1024;

/// Bytes that unused texts may take before they are looked for, if they are not as much as the used
/// ones.
const MIN_BYTES: usize = 1 << 20;

impl Texts {
    /// The content of a Parse; `body` is its body without the name.
    pub fn find(&self, body: &[u8], make: impl FnOnce(Bytes) -> Content) -> Arc<Content> {
        let mut known = self.known.lock();
        if let Some(content) = known.texts.get(body).and_then(Weak::upgrade) {
            return content;
        }
        if known.texts.len() >= MAX_TEXTS || known.bytes > 2 * known.used + MIN_BYTES {
            known.forget_unused();
        }
        let content = Arc::new(make(Bytes::copy_from_slice(body)));
        if known.texts.len() < MAX_TEXTS {
            known.bytes += body.len();
            // The old key goes with a text of before, of which only the memory was left.
            if known.texts.remove(body).is_some() {
                known.bytes -= body.len();
            }
            known.texts.insert(content.body.clone(), Arc::downgrade(&content));
        }
        content
    }
}

impl Known {
    fn forget_unused(&mut self) {
        self.texts.retain(|_, content| content.strong_count() > 0);
        self.bytes = self.texts.keys().map(Bytes::len).sum();
        self.used = self.bytes;
    }
}

/// The bytes behind the name in a Parse's body.
pub fn content_of(body: &[u8]) -> Option<&[u8]> {
    let end = memchr::memchr(0, body)?;
    body.get(end + 1..)
}

//! etcd v3.

use std::time::Duration;

/// How long a watch may be silent before the store is asked what it has missed.
pub const SILENCE: Duration = Duration::from_secs(5);

//! Certificates that change while the proxy runs: read again when a file has changed, and when told.
//!
//! Files are looked at rather than watched: a look costs a few `stat` calls, and it sees what a
//! watch misses, such as the swapped symbolic links of Kubernetes. Sessions that are open keep what
//! they were opened with, as in PostgreSQL.

use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use kornak_config::proxy::ProxyTls;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::net::tls::{self, TlsError};
use crate::shared::Shared;

/// How often the files are looked at.
const LOOK_EVERY: Duration = Duration::from_secs(2);

/// A fingerprint of the files' content.
type Seen = Vec<Option<(u64, u64, i64, i64, u64)>>;

/// Keeps certificates up to date until told to stop. `settings` names the files.
pub async fn follow(
    shared: Arc<Shared>,
    mut settings: watch::Receiver<ProxyTls>,
    stop: CancellationToken,
) {
    let mut names = settings.borrow_and_update().clone();
    let mut seen = look(&names).await;
    let mut may_be_told = true;
    loop {
        let told = tokio::select! {
            () = tokio::time::sleep(LOOK_EVERY) => false,
            changed = settings.changed(), if may_be_told => {
                may_be_told = changed.is_ok();
                may_be_told
            }
            () = stop.cancelled() => return,
        };
        if told {
            names = settings.borrow_and_update().clone();
        }
        let now = look(&names).await;
        if now == seen && !told {
            continue;
        }
        seen = now;
        let (shared, names) = (Arc::clone(&shared), names.clone());
        // Reading files, and hashing keys that may be encrypted.
        let read = tokio::task::spawn_blocking(move || take(&shared, &names)).await;
        if let Err(error) = read {
            tracing::error!(
                error = &error as &dyn std::error::Error,
                "certificates could not be reloaded"
            );
        }
    }
}

fn take(shared: &Shared, settings: &ProxyTls) {
    let read = || -> Result<(), TlsError> {
        shared.client_tls.reload(&settings.client)?;
        shared.prober.tls().reload(&settings.server)
    };
    match read() {
        Ok(()) => {
            shared.set_trouble("certificates", None);
            tracing::info!("certificates reloaded");
        }
        Err(error) => {
            let text = chain(&error);
            // A file may be half written; the next change is looked at again.
            tracing::error!(error = %text, "certificates cannot be used, the old ones stay in force");
            shared.set_trouble("certificates", Some(text));
        }
    }
}

fn chain(error: &TlsError) -> String {
    match std::error::Error::source(error) {
        Some(cause) => format!("{error}: {cause}"),
        None => error.to_string(),
    }
}

async fn look(settings: &ProxyTls) -> Seen {
    let files = tls::files(settings);
    let looking = tokio::task::spawn_blocking(move || files.iter().map(state).collect());
    looking.await.unwrap_or_default()
}

fn state(file: &PathBuf) -> Option<(u64, u64, i64, i64, u64)> {
    let it = std::fs::metadata(file).ok()?;
    Some((it.dev(), it.ino(), it.mtime(), it.mtime_nsec(), it.size()))
}

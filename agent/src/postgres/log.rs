//! The log of a server that has no logging collector: what it writes to its standard output, in
//! `postgres.log` of the folder beside the data directory. It is begun anew when it is large; the last one is kept.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use tokio_util::sync::CancellationToken;
use tracing::warn;

use super::Postgres;

/// A log is not larger by more than a server writes within [`LOOK_EVERY`].
const MAX_LOG_BYTES: u64 = 64 << 20;
const LOOK_EVERY: Duration = Duration::from_secs(30);

impl Postgres {
    /// Standard output and error of the postmaster.
    pub fn log_file(&self) -> PathBuf {
        self.inner.guard_config.runtime_dir.join("postgres.log")
    }

    /// Keeps the log from filling the disk, until `stop`.
    pub(crate) async fn keep_log_bounded(&self, stop: CancellationToken) {
        loop {
            let log = self.log_file();
            let bounded = tokio::task::spawn_blocking(move || bound(&log, MAX_LOG_BYTES));
            if let Err(error) = bounded.await.map_err(io::Error::other).and_then(|bounded| bounded)
            {
                warn!(
                    error = &error as &dyn std::error::Error,
                    "log of the server could not be rotated"
                );
            }
            tokio::select! {
                () = stop.cancelled() => return,
                () = tokio::time::sleep(LOOK_EVERY) => {}
            }
        }
    }
}

/// The server goes on writing to the same file, at its end. What it writes while the old part is copied is lost.
fn bound(log: &Path, most: u64) -> io::Result<()> {
    match fs::metadata(log) {
        Ok(found) if found.len() > most => {}
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => return Ok(()),
    }
    fs::copy(log, log.with_extension("log.1"))?;
    fs::File::options().write(true).open(log)?.set_len(0)
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn a_large_log_is_begun_anew_while_it_is_written_to() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("postgres.log");
        bound(&path, 4).unwrap();
        let mut log = fs::File::options().create(true).append(true).open(&path).unwrap();
        for (text, now, before) in [("1234", "1234", None), ("5", "", Some("12345"))] {
            log.write_all(text.as_bytes()).unwrap();
            bound(&path, 4).unwrap();
            assert_eq!(fs::read_to_string(&path).unwrap(), now);
            assert_eq!(fs::read_to_string(path.with_extension("log.1")).ok().as_deref(), before);
        }
        log.write_all(b"6").unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "6");
    }
}

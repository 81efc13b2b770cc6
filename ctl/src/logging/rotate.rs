//! A log file that is put aside when it is full: `patroni.log` becomes `patroni.log.1`, that
//! `patroni.log.2`, and so on, as Patroni's does.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use kornak_cluster::discard;
use kornak_config::LogSettings;
use parking_lot::{Mutex, MutexGuard};
use tracing_subscriber::fmt::MakeWriter;

/// The file, shared by all who write. Each write is one whole line.
#[derive(Debug, Clone)]
pub(super) struct RotatingFile {
    inner: Arc<Mutex<Inner>>,
}

#[derive(Debug)]
struct Inner {
    path: PathBuf,
    file: File,
    written: u64,
    /// Bytes; 0: it never is full.
    limit: u64,
    /// Files put aside that are kept.
    kept: u64,
    mode: Option<u32>,
}

impl RotatingFile {
    /// Appends to what is there.
    pub(super) fn open(path: &Path, settings: &LogSettings) -> io::Result<Self> {
        let file = open(path, settings.mode)?;
        let written = file.metadata()?.len();
        let (limit, kept, mode) = (settings.file_size, settings.file_num, settings.mode);
        let inner = Inner { path: path.to_owned(), file, written, limit, kept, mode };
        Ok(Self { inner: Arc::new(Mutex::new(inner)) })
    }
}

fn open(path: &Path, mode: Option<u32>) -> io::Result<File> {
    let mut options = OpenOptions::new();
    options.create(true).append(true);
    if let Some(mode) = mode {
        options.mode(mode);
    }
    options.open(path)
}

impl Inner {
    /// Renames upwards, from the last one down. Without files to keep, the full one just goes on, as
    /// Python's handler has it.
    fn rotate(&mut self) -> io::Result<()> {
        if self.kept == 0 {
            return Ok(());
        }
        let numbered = |number: u64| {
            let mut name = self.path.clone().into_os_string();
            name.push(format!(".{number}"));
            PathBuf::from(name)
        };
        for number in (1..self.kept).rev() {
            if numbered(number).exists() {
                fs::rename(numbered(number), numbered(number + 1))?;
            }
        }
        fs::rename(&self.path, numbered(1))?;
        self.file = open(&self.path, self.mode)?;
        self.written = 0;
        Ok(())
    }
}

/// One line's way into the file.
pub(super) struct Writer<'a>(MutexGuard<'a, Inner>);

impl Write for Writer<'_> {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        let inner = &mut *self.0;
        let length = u64::try_from(line.len()).unwrap_or(u64::MAX);
        if inner.limit > 0 && inner.written > 0 && inner.written + length > inner.limit {
            // A file that cannot be put aside is better written to than lost.
            discard::nowhere_to_report(inner.rotate());
        }
        inner.file.write_all(line)?;
        inner.written += length;
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.file.flush()
    }
}

impl<'a> MakeWriter<'a> for RotatingFile {
    type Writer = Writer<'a>;

    fn make_writer(&'a self) -> Writer<'a> {
        Writer(self.inner.lock())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_file_is_put_aside_and_so_many_are_kept() {
        let dir = std::env::temp_dir().join(format!("kornak-rotate-{}", std::process::id()));
        fs::create_dir_all(&dir).expect("it is ours");
        let path = dir.join("patroni.log");
        let settings = LogSettings { file_num: 2, file_size: 10, ..LogSettings::default() };
        let file = RotatingFile::open(&path, &settings).expect("it can be written");
        for line in ["one\n", "two\n", "three\n", "four\n", "five\n", "six\n"] {
            file.make_writer().write_all(line.as_bytes()).expect("it can be written");
        }
        let read = |name: &str| fs::read_to_string(dir.join(name)).unwrap_or_default();
        let found = ["patroni.log", "patroni.log.1", "patroni.log.2", "patroni.log.3"].map(read);
        fs::remove_dir_all(&dir).expect("it is ours");
        assert_eq!(found, ["six\n", "four\nfive\n", "three\n", ""]);
    }
}

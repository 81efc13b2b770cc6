//! Small files beside the data directory that have to be there after a loss of power: whole, or not at all.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::Path;

/// Writes the file so that a reader sees the old contents or the new ones, and the disk has the new ones
/// when this returns.
///
/// # Errors
/// Nothing is promised then, but that a reader sees one of both.
pub fn write(path: &Path, contents: &[u8]) -> io::Result<()> {
    let temporary = path.with_extension("new");
    let mut file = File::create(&temporary)?;
    file.write_all(contents)?;
    file.sync_all()?;
    fs::rename(&temporary, path)?;
    match path.parent() {
        Some(parent) => File::open(parent)?.sync_all(),
        None => Ok(()),
    }
}

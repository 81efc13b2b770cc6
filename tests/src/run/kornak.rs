//! The program under test.

use std::path::{Path, PathBuf};
use std::process::Command;

/// `kornak` beside the running test, as Cargo builds both below the same target directory;
/// `KORNAK_BIN` names another.
///
/// # Panics
/// When it has not been built, saying how.
pub fn binary() -> PathBuf {
    if let Some(named) = std::env::var_os("KORNAK_BIN") {
        return named.into();
    }
    let me = std::env::current_exe().expect("Linux tells");
    // target/<profile>/deps/<test> or target/<profile>/<binary>
    let found = me.ancestors().skip(1).take(2).map(|dir| dir.join("kornak")).find(|it| it.exists());
    found.unwrap_or_else(|| {
        panic!(
            "no `kornak` beside {}: build it with `cargo build -p kornak-ctl`, as `make test` does",
            me.display()
        )
    })
}

/// A command line of it, that reads no configuration of the machine.
pub fn command<'a>(words: impl IntoIterator<Item = &'a str>) -> Command {
    let mut command = Command::new(binary());
    command.args(words).current_dir("/").env_clear();
    command.env("PATH", "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin").env("HOME", "/nonexistent");
    if let Some(filter) = std::env::var_os("RUST_LOG") {
        command.env("RUST_LOG", filter);
    }
    if let Some(defect) = std::env::var_os("KORNAK_SABOTAGE") {
        command.env("KORNAK_SABOTAGE", defect);
    }
    command
}

/// `kornak WORD FILE`.
pub fn with_file(word: &str, file: &Path) -> Command {
    let mut command = command([word]);
    command.arg(file);
    command
}

/// A symlink to it with another name, for it looks at how it was called.
pub fn called_as(name: &str) -> anyhow::Result<PathBuf> {
    let link = binary().with_file_name(name);
    match std::os::unix::fs::symlink(binary(), &link) {
        Err(error) if error.kind() != std::io::ErrorKind::AlreadyExists => Err(error.into()),
        _ => Ok(link),
    }
}

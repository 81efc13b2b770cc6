//! Whom PostgreSQL runs as, and files that belong to it.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{chown, fchown};
use rustix::process::{Gid, Uid, geteuid};

/// An account of the operating system (`passwd(5)`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OsUser {
    pub name: String,
    pub uid: u32,
    pub gid: u32,
    pub home: PathBuf,
}

impl OsUser {
    /// Finds an account in the text of `/etc/passwd`.
    pub fn find(passwd: &str, name: &str) -> Option<Self> {
        passwd.lines().find_map(|line| {
            let mut fields = line.split(':');
            if fields.next()? != name {
                return None;
            }
            let uid = fields.nth(1)?.parse().ok()?;
            let gid = fields.next()?.parse().ok()?;
            let home = PathBuf::from(fields.nth(1)?);
            Some(Self { name: name.to_owned(), uid, gid, home })
        })
    }

    /// Whom to become before running one of PostgreSQL's programs: `name` if we are root, for they
    /// refuse root; nobody else otherwise.
    pub fn to_become(name: &str) -> io::Result<Option<Self>> {
        if !geteuid().is_root() {
            return Ok(None);
        }
        Self::find(&fs::read_to_string("/etc/passwd")?, name).map(Some).ok_or_else(|| {
            io::Error::new(io::ErrorKind::NotFound, format!("no account named {name}"))
        })
    }
}

fn owner(user: Option<&OsUser>) -> (Option<Uid>, Option<Gid>) {
    (user.map(|user| Uid::from_raw(user.uid)), user.map(|user| Gid::from_raw(user.gid)))
}

/// Replaces a file as a whole, on disk before this returns: after a crash it has the old or the new
/// contents, never a part.
pub(super) fn write_file(
    path: &Path,
    contents: &(impl AsRef<[u8]> + ?Sized),
    mode: u32,
    user: Option<&OsUser>,
) -> io::Result<()> {
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(".kornak-new");
    let new = path.with_file_name(name);
    let mut file =
        OpenOptions::new().write(true).create(true).truncate(true).mode(mode).open(&new)?;
    file.set_permissions(fs::Permissions::from_mode(mode))?;
    if user.is_some() {
        let (uid, gid) = owner(user);
        fchown(&file, uid, gid)?;
    }
    file.write_all(contents.as_ref())?;
    file.sync_all()?;
    fs::rename(&new, path)?;
    sync_parent(path)
}

/// Writes a file unless it has these contents already. True if it was written.
pub(super) fn write_if_changed(
    path: &Path,
    text: &str,
    mode: u32,
    user: Option<&OsUser>,
) -> io::Result<bool> {
    if fs::read(path).is_ok_and(|old| old == text.as_bytes()) {
        return Ok(false);
    }
    write_file(path, text, mode, user).map(|()| true)
}

/// Removes a file for good. No error if there is none.
pub(super) fn remove_file(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Ok(()) => sync_parent(path),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error),
    }
}

/// Makes a directory that only PostgreSQL may enter, or makes one that is there such a directory: a
/// volume that was just mounted belongs to root.
pub(super) fn make_private_dir(path: &Path, user: Option<&OsUser>) -> io::Result<()> {
    match fs::DirBuilder::new().mode(0o700).create(path) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
        _ => {}
    }
    if user.is_some() {
        let (uid, gid) = owner(user);
        chown(path, uid, gid)?;
        fs::set_permissions(path, fs::Permissions::from_mode(0o700))?;
    }
    Ok(())
}

fn sync_parent(path: &Path) -> io::Result<()> {
    path.parent().map_or(Ok(()), |parent| File::open(parent)?.sync_all())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_account_is_found_by_its_whole_name() {
        let passwd =
            "root:x:0:0:root:/root:/bin/sh\nbad\npostgres:x:105:110:a,,:/var/lib/p:/bin/sh\n";
        let found = OsUser::find(passwd, "postgres").expect("it is there");
        assert_eq!((found.uid, found.gid, found.home), (105, 110, "/var/lib/p".into()));
        assert_eq!(OsUser::find(passwd, "post"), None);
        assert_eq!(OsUser::find(passwd, "bad"), None);
    }

    #[test]
    fn a_file_is_written_once_with_its_mode() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("a.conf");
        assert!(write_if_changed(&path, "x", 0o600, None).unwrap());
        assert!(!write_if_changed(&path, "x", 0o600, None).unwrap());
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        remove_file(&path).unwrap();
        remove_file(&path).unwrap();
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }
}

//! Whom PostgreSQL runs as, and files that belong to it.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{
    Access, AtFlags, CWD, Mode, OFlags, ResolveFlags, access, chownat, fchown, open, openat2,
};
use rustix::process::{Gid, Uid, geteuid};
use rustix::thread::{set_thread_groups, set_thread_res_gid, set_thread_res_uid};
use tracing::info;

/// An account of the operating system (`passwd(5)`, `group(5)`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OsUser {
    pub name: String,
    pub uid: u32,
    pub gid: u32,
    /// Other groups that it is in.
    pub groups: Vec<u32>,
    pub home: PathBuf,
}

impl OsUser {
    /// Finds an account in the texts of `/etc/passwd` and `/etc/group`.
    pub fn find(passwd: &str, group: &str, name: &str) -> Option<Self> {
        let is_in = |line: &str| {
            let mut fields = line.split(':');
            let gid = fields.nth(2)?.parse().ok()?;
            fields.next()?.split(',').any(|member| member == name).then_some(gid)
        };
        let groups: Vec<u32> = group.lines().filter_map(is_in).collect();
        passwd.lines().find_map(|line| {
            let mut fields = line.split(':');
            if fields.next()? != name {
                return None;
            }
            let uid = fields.nth(1)?.parse().ok()?;
            let gid = fields.next()?.parse().ok()?;
            let home = PathBuf::from(fields.nth(1)?);
            Some(Self { name: name.to_owned(), uid, gid, groups: groups.clone(), home })
        })
    }

    /// Whom to become before running one of PostgreSQL's programs: `name` if we are root, for they
    /// refuse root; nobody else otherwise.
    pub fn to_become(name: &str) -> io::Result<Option<Self>> {
        if !geteuid().is_root() {
            return Ok(None);
        }
        let (passwd, group) =
            (fs::read_to_string("/etc/passwd")?, fs::read_to_string("/etc/group")?);
        Self::find(&passwd, &group, name).map(Some).ok_or_else(|| {
            io::Error::new(io::ErrorKind::NotFound, format!("no account named {name}"))
        })
    }
}

fn owner(user: Option<&OsUser>) -> (Option<Uid>, Option<Gid>) {
    (user.map(|user| Uid::from_raw(user.uid)), user.map(|user| Gid::from_raw(user.gid)))
}

/// Does file operations as the OS user, so that links which that account has put there lead nowhere that it
/// could not go by itself. The privileges are given up in a thread of its own, for good.
pub(super) fn as_user<T: Send>(
    user: Option<&OsUser>,
    work: impl FnOnce() -> io::Result<T> + Send,
) -> io::Result<T> {
    let Some(user) = user else { return work() };
    let (uid, gid) = (Uid::from_raw(user.uid), Gid::from_raw(user.gid));
    let mut groups = vec![gid];
    groups.extend(user.groups.iter().copied().map(Gid::from_raw));
    let other = move || {
        set_thread_groups(&groups)?;
        set_thread_res_gid(gid, gid, gid)?;
        set_thread_res_uid(uid, uid, uid)?;
        work()
    };
    std::thread::scope(|scope| scope.spawn(other).join())
        .unwrap_or_else(|_| Err(io::Error::other("a file operation ended unexpectedly")))
}

/// Whether nobody but root can change where this path leads: neither as it is written nor as it is meant.
fn is_roots(path: &Path) -> bool {
    let (Ok(written), Ok(meant)) = (std::path::absolute(path), fs::canonicalize(path)) else {
        return false;
    };
    written.ancestors().chain(meant.ancestors()).all(|step| {
        fs::symlink_metadata(step).is_ok_and(|step| {
            let shared = step.mode() & 0o022 != 0 && step.mode() & 0o1000 == 0;
            step.uid() == 0 && (step.is_symlink() || !shared)
        })
    })
}

/// Does it as the OS user; as root only what that account may not do, where nobody else can plant links.
pub(super) fn as_user_or_root<T: Send>(
    path: &Path,
    user: Option<&OsUser>,
    work: impl Fn(Option<&OsUser>) -> io::Result<T> + Send + Sync,
) -> io::Result<T> {
    match as_user(user, || work(None)) {
        Err(error)
            if user.is_some()
                && error.kind() == io::ErrorKind::PermissionDenied
                && path.parent().is_some_and(is_roots) =>
        {
            work(user)
        }
        outcome => outcome,
    }
}

/// Reads a file of the OS user's, and nothing that a link of his leads to and he may not read.
pub(super) fn read_file(path: &Path, user: Option<&OsUser>) -> io::Result<Vec<u8>> {
    as_user_or_root(path, user, |_| fs::read(path))
}

/// Replaces a file as a whole, on disk before this returns: after a crash it has the old or the new
/// contents, never a part. No link is followed.
pub(super) fn write_file(
    path: &Path,
    contents: &(impl AsRef<[u8]> + ?Sized),
    mode: u32,
    user: Option<&OsUser>,
) -> io::Result<()> {
    let contents = contents.as_ref();
    as_user_or_root(path, user, |giving| replace(path, contents, mode, giving))
}

fn replace(path: &Path, contents: &[u8], mode: u32, giving: Option<&OsUser>) -> io::Result<()> {
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(".kornak-new");
    let new = path.with_file_name(name);
    // What a crash has left there; a link goes, not what it leads to.
    match fs::remove_file(&new) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let mut file = OpenOptions::new().write(true).create_new(true).mode(mode).open(&new)?;
    file.set_permissions(fs::Permissions::from_mode(mode))?;
    if giving.is_some() {
        let (uid, gid) = owner(giving);
        fchown(&file, uid, gid)?;
    }
    file.write_all(contents)?;
    file.sync_all()?;
    fs::rename(&new, path)?;
    sync_parent(path)
}

/// Writes a file unless it has these contents already. True if it was written.
pub(super) fn write_if_changed(
    path: &Path,
    text: &(impl AsRef<[u8]> + ?Sized),
    mode: u32,
    user: Option<&OsUser>,
) -> io::Result<bool> {
    if fs::read(path).is_ok_and(|old| old == text.as_ref()) {
        return Ok(false);
    }
    write_file(path, text, mode, user).map(|()| true)
}

/// Removes a file for good. No error if there is none.
pub(super) fn remove_file(path: &Path, user: Option<&OsUser>) -> io::Result<()> {
    as_user_or_root(path, user, |_| match fs::remove_file(path) {
        Ok(()) => sync_parent(path),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error),
    })
}

/// Makes a directory that only PostgreSQL may enter, or makes one that is there such a directory: a
/// volume that was just mounted belongs to root and is open to everybody.
pub(super) fn make_private_dir(path: &Path, user: Option<&OsUser>) -> io::Result<()> {
    make_dir(path, 0o700, user)?;
    let tightened = as_user(user, || {
        let mode = fs::metadata(path)?.mode() & 0o777;
        // The server takes these two.
        if matches!(mode, 0o700 | 0o750) {
            return Ok(());
        }
        fs::set_permissions(path, fs::Permissions::from_mode(0o700))
    });
    match (tightened, user) {
        (Err(error), Some(user)) if error.kind() == io::ErrorKind::PermissionDenied => {
            give_empty_dir(path, user)?;
        }
        (tightened, _) => tightened?,
    }
    // A directory that is not the account's may have the right mode by chance.
    match user {
        Some(user) if fs::metadata(path)?.uid() != user.uid => give_empty_dir(path, user)?,
        _ => {}
    }
    remove_lost_and_found(path, user)
}

/// Removes the empty `lost+found` of a file system's root if PostgreSQL may not read it: with it no base backup could be
/// made of the server, and no rewind. e2fsck makes it again when it needs it.
fn remove_lost_and_found(dir: &Path, user: Option<&OsUser>) -> io::Result<()> {
    let path = dir.join("lost+found");
    as_user(user, || match fs::read_dir(&path) {
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
            fs::remove_dir(&path)?;
            info!(path = %path.display(), "file removed that PostgreSQL could not read, which ends every base backup");
            Ok(())
        }
        _ => Ok(()),
    })
}

/// Gives a directory of root's away, if it is an empty one that nobody else has put there.
fn give_empty_dir(path: &Path, user: &OsUser) -> io::Result<()> {
    let denied = || io::Error::from(io::ErrorKind::PermissionDenied);
    let flags = OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::RDONLY | OFlags::CLOEXEC;
    let written = std::path::absolute(path)?;
    let path = fs::canonicalize(path)?;
    // Without a link on the way it is what it says; nobody else can have made it root's.
    let direct = openat2(CWD, &written, flags, Mode::empty(), ResolveFlags::NO_SYMLINKS);
    let (direct, dir) = match direct {
        Ok(dir) => (true, File::from(dir)),
        Err(_) => (false, File::from(open(&path, flags, Mode::empty())?)),
    };
    let found = dir.metadata()?;
    let parent = path.parent().ok_or_else(denied)?;
    let mounted = fs::metadata(parent)?.dev() != found.dev();
    let mut entries = fs::read_dir(&path)?;
    let empty = entries.all(|entry| entry.is_ok_and(|entry| entry.file_name() == "lost+found"));
    if found.uid() != 0 || !empty || !(direct || mounted || is_roots(parent)) {
        return Err(denied());
    }
    let (uid, gid) = owner(Some(user));
    fchown(&dir, uid, gid)?;
    dir.set_permissions(fs::Permissions::from_mode(0o700))
}

/// Makes the directories above `path`, as initdb does.
pub(super) fn make_parents(path: &Path, user: Option<&OsUser>) -> io::Result<()> {
    let above: Vec<&Path> = path.ancestors().skip(1).take_while(|dir| !dir.exists()).collect();
    above
        .into_iter()
        .rev()
        .filter(|dir| !dir.as_os_str().is_empty())
        .try_for_each(|dir| make_dir(dir, 0o755, user).map(drop))
}

/// No error if it is there.
fn make_dir(path: &Path, mode: u32, user: Option<&OsUser>) -> io::Result<()> {
    as_user_or_root(path, user, |giving| {
        match fs::DirBuilder::new().mode(mode).create(path) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => return Ok(()),
            made => made?,
        }
        if giving.is_some() {
            let (uid, gid) = owner(giving);
            chownat(CWD, path, uid, gid, AtFlags::SYMLINK_NOFOLLOW)?;
        }
        sync_parent(path)
    })
}

/// Whether the OS user may make something in this directory.
pub(super) fn may_write(dir: &Path, user: Option<&OsUser>) -> bool {
    as_user(user, || Ok(access(dir, Access::WRITE_OK | Access::EXEC_OK)?)).is_ok()
}

fn sync_parent(path: &Path) -> io::Result<()> {
    path.parent().map_or(Ok(()), sync_dir)
}

/// Syncs a directory: files made, renamed or removed in it are so after a crash.
pub(super) fn sync_dir(dir: &Path) -> io::Result<()> {
    let dir = if dir.as_os_str().is_empty() { Path::new(".") } else { dir };
    File::open(dir)?.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_account_is_found_by_its_whole_name() {
        let passwd =
            "root:x:0:0:root:/root:/bin/sh\nbad\npostgres:x:105:110:a,,:/var/lib/p:/bin/sh\n";
        let group =
            "ssl-cert:x:103:post,postgres\nbad\nold:x:7:\nx:x:104:post\nlast:x:9:postgres\n";
        let find = |name| OsUser::find(passwd, group, name);
        let found = find("postgres").expect("it is there");
        assert_eq!((found.uid, found.gid, found.home), (105, 110, "/var/lib/p".into()));
        assert_eq!(found.groups, [103, 9]);
        assert_eq!(find("post"), None);
        assert_eq!(find("bad"), None);
    }

    #[test]
    fn a_file_is_written_once_with_its_mode() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("a.conf");
        assert!(write_if_changed(&path, "x", 0o600, None).unwrap());
        assert!(!write_if_changed(&path, "x", 0o600, None).unwrap());
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        remove_file(&path, None).unwrap();
        remove_file(&path, None).unwrap();
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    #[test]
    fn no_link_is_followed_by_a_write() {
        let dir = tempfile::tempdir().expect("a directory");
        let (path, aim) = (dir.path().join("a.conf"), dir.path().join("shadow"));
        fs::write(&aim, "root").unwrap();
        for planted in ["a.conf.kornak-new", "a.conf"] {
            std::os::unix::fs::symlink(&aim, dir.path().join(planted)).unwrap();
            write_file(&path, "x", 0o600, None).unwrap();
            assert_eq!(fs::read_to_string(&aim).unwrap(), "root", "{planted}");
            assert!(!path.is_symlink());
            fs::remove_file(&path).unwrap();
        }
    }

    /// As root: whatever the account has planted leads nowhere that it could not go itself.
    #[test]
    fn the_accounts_files_are_written_and_removed_with_its_rights() {
        let Ok(Some(user)) = OsUser::to_become("postgres") else { return };
        let dir = tempfile::tempdir().expect("a directory");
        let (theirs, roots) = (dir.path().join("theirs"), dir.path().join("roots"));
        make_private_dir(&theirs, Some(&user)).unwrap();
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
        fs::DirBuilder::new().mode(0o755).create(&roots).unwrap();
        fs::write(roots.join("x"), "root").unwrap();
        assert_eq!(fs::metadata(&theirs).unwrap().uid(), user.uid);
        std::os::unix::fs::symlink(&roots, theirs.join("link")).unwrap();
        let through = theirs.join("link/x");
        assert!(write_file(&through, "y", 0o600, Some(&user)).is_err());
        assert!(remove_file(&through, Some(&user)).is_err());
        fs::set_permissions(roots.join("x"), fs::Permissions::from_mode(0o600)).unwrap();
        assert!(read_file(&through, Some(&user)).is_err());
        assert!(make_private_dir(&theirs.join("link"), Some(&user)).is_err(), "it is not empty");
        assert_eq!(fs::read_to_string(roots.join("x")).unwrap(), "root");
        write_file(&theirs.join("y"), "y", 0o640, Some(&user)).unwrap();
        assert_eq!(fs::metadata(theirs.join("y")).unwrap().uid(), user.uid);
    }

    /// As root: a mount point as mkfs leaves it.
    #[test]
    fn an_empty_lost_and_found_that_only_root_may_read_goes() {
        let Ok(Some(user)) = OsUser::to_become("postgres") else { return };
        let dir = tempfile::tempdir().expect("a directory");
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
        let (mount, lost) = (dir.path().join("mount"), dir.path().join("mount/lost+found"));
        make_private_dir(&mount, Some(&user)).unwrap();
        let make = |mode| fs::DirBuilder::new().mode(mode).create(&lost).unwrap();
        make(0o755);
        make_private_dir(&mount, Some(&user)).unwrap();
        assert!(lost.exists(), "it can be read");
        fs::set_permissions(&lost, fs::Permissions::from_mode(0o700)).unwrap();
        fs::write(lost.join("#12"), "found").unwrap();
        assert!(make_private_dir(&mount, Some(&user)).is_err(), "it is not empty");
        fs::remove_file(lost.join("#12")).unwrap();
        make_private_dir(&mount, Some(&user)).unwrap();
        assert!(!lost.exists());
    }

    #[test]
    fn a_directory_is_made_private_and_keeps_its_groups_access() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("a/b/data");
        make_parents(&path, None).unwrap();
        for (before, after) in [(0o755, 0o700), (0o750, 0o750), (0o700, 0o700), (0o777, 0o700)] {
            make_private_dir(&path, None).unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(before)).unwrap();
            make_private_dir(&path, None).unwrap();
            assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, after);
        }
    }
}

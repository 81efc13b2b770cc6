//! Work on the files of a data directory, step by step; each step can be continued
//! after a crash. Called with the rights of the account that owns them, see [`super::os::as_user`].
//!
//! Not here: when, and what a tool does in between.

use std::ffi::{OsStr, OsString};
use std::fs;
use std::io;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};

use kornak_cluster::discard;

use super::marker::{
    MARK, Mark, Means, NEW, OLD, PASSWORD, Purpose, Step, Tablespace, Wal, contents,
};
use super::os::sync_dir;

const WAL_DIR: &str = "pg_wal";
const TABLESPACES: &str = "pg_tblspc";

/// Says which path it was about.
fn at<T>(path: &Path, outcome: io::Result<T>) -> io::Result<T> {
    outcome.map_err(|error| io::Error::new(error.kind(), format!("{}: {error}", path.display())))
}

/// Where this data directory keeps its log, if elsewhere: `pg_wal` is a link, or a mount point of its own.
pub(super) fn wal_of(dir: &Path) -> Option<Wal> {
    let path = dir.join(WAL_DIR);
    let found = fs::symlink_metadata(&path).ok()?;
    if found.is_symlink() {
        let link = fs::read_link(&path).ok()?;
        let path = fs::canonicalize(&path).unwrap_or_else(|_| dir.join(&link));
        return Some(Wal { path, link: Some(link), found: true });
    }
    let elsewhere = found.is_dir() && fs::metadata(dir).ok()?.dev() != found.dev();
    elsewhere.then_some(Wal { path, link: None, found: true })
}

/// The tablespaces of a data directory that are elsewhere.
fn tablespaces_of(dir: &Path) -> Vec<Tablespace> {
    let version = version_dir(dir);
    let links = fs::read_dir(dir.join(TABLESPACES)).into_iter().flatten().flatten();
    links
        .filter_map(|entry| fs::read_link(entry.path()).ok().filter(|target| target.is_absolute()))
        .map(|path| Tablespace { path, version: version.clone() })
        .collect()
}

/// The subdirectory that a server of this data directory has in each tablespace, `PG_15_202209061`; the second
/// number is in the control file (`ControlFileData`: system identifier, version of the file, catalog version).
fn version_dir(dir: &Path) -> Option<String> {
    let major = fs::read_to_string(dir.join("PG_VERSION")).ok()?;
    let control = fs::read(dir.join("global/pg_control")).ok()?;
    let catalog = u32::from_ne_bytes(control.get(12..16)?.try_into().ok()?);
    Some(format!("PG_{}_{catalog}", major.trim()))
}

/// Whether PostgreSQL uses such a name in `pg_wal`.
fn is_wal(name: &OsStr) -> bool {
    let name = name.as_encoded_bytes();
    let hex = |byte: &u8| byte.is_ascii_digit() || (b'A'..=b'F').contains(byte);
    name.len() > 8 && name.iter().take(8).all(hex)
        || matches!(name, b"archive_status" | b"summaries")
        || name.starts_with(b"xlogtemp.")
}

/// A directory elsewhere where the files that are to come are already, somebody's.
pub(super) fn in_use(mark: &Mark, major: Option<u32>) -> Option<PathBuf> {
    let holds = |dir: &Path, is_theirs: &dyn Fn(&OsStr) -> bool| {
        let entries = fs::read_dir(dir).into_iter().flatten().flatten();
        entries.map(|entry| entry.file_name()).any(|name| is_theirs(&name))
    };
    let version = major.map(|major| format!("PG_{major}_"));
    let of_version = |name: &OsStr| {
        let version = version.as_ref().map(String::as_bytes);
        version.is_some_and(|version| name.as_encoded_bytes().starts_with(version))
    };
    let used = mark.tablespaces.iter().map(|tablespace| &tablespace.path);
    let used = used.filter(|path| holds(path, &of_version));
    let log = mark.wal.iter().map(|wal| &wal.path).filter(|path| holds(path, &is_wal));
    used.chain(log).next().cloned()
}

/// No error if there is nothing.
pub(super) fn remove_tree(path: &Path) -> io::Result<()> {
    let removed = match fs::symlink_metadata(path) {
        Err(error) => Err(error),
        Ok(found) if found.is_dir() => fs::remove_dir_all(path),
        Ok(_) => fs::remove_file(path),
    };
    match removed {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        removed => at(path, removed),
    }
}

/// Everything in the directory, and what is its own of its log and its tablespaces, goes. Afterwards the
/// directory is as empty as it was made, but for the note that more is to come.
pub(super) fn remove_all(dir: &Path, purpose: Purpose) -> io::Result<()> {
    let before = match Mark::load(dir)? {
        Some(mark) if matches!(mark.step, Step::Leaving | Step::Removing) => {
            leave(dir, mark.clone())?;
            mark
        }
        Some(mark) => mark,
        None => Mark::new(purpose, Step::Leaving),
    };
    let mark = departing(dir, Mark { purpose, ..before })?;
    let mark = leave(dir, mark)?;
    remove_staged(dir, &mark)
}

/// From now on what is there is on its way out.
fn departing(dir: &Path, before: Mark) -> io::Result<Mark> {
    let mut mark = Mark { step: Step::Leaving, names: contents(dir)?, ..before };
    mark.wal = wal_of(dir).or(mark.wal);
    for found in tablespaces_of(dir) {
        match mark.tablespaces.iter_mut().find(|known| known.path == found.path) {
            Some(known) => known.version = found.version.or(known.version.take()),
            None => mark.tablespaces.push(found),
        }
    }
    let mounted = mark.wal.as_ref().is_some_and(|wal| wal.link.is_none());
    mark.names.retain(|name| !(mounted && name == WAL_DIR));
    // Without its control file it is no cluster any more, whoever looks at it.
    mark.names.sort_by_key(|name| name != "global");
    mark.save(dir)?;
    Ok(mark)
}

/// Moves everything that is to go aside, each part on its own file system, and notes that this is done.
fn leave(dir: &Path, mut mark: Mark) -> io::Result<Mark> {
    if mark.step == Step::Removing {
        return Ok(mark);
    }
    for name in &mark.names {
        set_aside(dir, name)?;
    }
    sync_dir(dir)?;
    for tablespace in &mark.tablespaces {
        if let Some(version) = &tablespace.version {
            set_aside(&tablespace.path, OsStr::new(version))?;
        }
    }
    if let Some(wal) = &mark.wal {
        let entries = fs::read_dir(&wal.path).into_iter().flatten().flatten();
        for name in entries.map(|entry| entry.file_name()).filter(|name| is_wal(name)) {
            set_aside(&wal.path, &name)?;
        }
    }
    mark.step = Step::Removing;
    mark.save(dir)?;
    Ok(mark)
}

fn set_aside(root: &Path, name: &OsStr) -> io::Result<()> {
    let (from, old) = (root.join(name), root.join(OLD));
    if !from.is_symlink() && !from.exists() {
        return Ok(());
    }
    match fs::create_dir(&old) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return at(&old, Err(error)),
        _ => {}
    }
    remove_tree(&old.join(name))?;
    at(&from, fs::rename(&from, old.join(name)))
}

/// Removes what tools have begun to make here and elsewhere.
fn remove_staged(dir: &Path, mark: &Mark) -> io::Result<()> {
    let elsewhere = mark.tablespaces.iter().map(|tablespace| tablespace.path.as_path());
    let wal = mark.wal.iter().map(|wal| wal.path.as_path());
    for root in elsewhere.chain(wal).chain([dir]) {
        remove_tree(&root.join(NEW))?;
        remove_tree(&root.join(OLD))?;
    }
    remove_tree(&dir.join(PASSWORD))
}

/// Takes away what an attempt has left, and nothing else. The directory may hold something afterwards: then
/// it was put there by somebody else.
pub(super) fn clear(dir: &Path) -> io::Result<()> {
    let mark = match Mark::load(dir) {
        Ok(Some(mark)) => mark,
        Ok(None) => return Ok(()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error),
    };
    let mark = match mark.step {
        Step::Making => mark,
        Step::Leaving | Step::Removing => leave(dir, mark)?,
        _ => leave(dir, departing(dir, mark)?)?,
    };
    remove_staged(dir, &mark)?;
    match mark.wal.filter(|wal| wal.found) {
        // The next copy is to have its log there as well.
        Some(wal) if contents(dir)?.is_empty() => {
            Mark { wal: Some(wal), ..Mark::new(mark.purpose, Step::Making) }.save(dir)
        }
        _ => {
            Mark::remove(dir)?;
            if mark.with_dir {
                // Not if somebody has put something there, or mounted it.
                discard::goes_on_either_way(fs::remove_dir(dir));
            }
            Ok(())
        }
    }
}

/// Removes what a data directory that is set aside has elsewhere: the next one may need the place.
pub(super) fn remove_elsewhere(dir: &Path) -> io::Result<()> {
    let Some(mark) = Mark::load(dir)? else { return Ok(()) };
    let wal = wal_of(dir).or(mark.wal.clone());
    let mut tablespaces = tablespaces_of(dir);
    tablespaces.extend(mark.tablespaces.clone());
    let elsewhere = Mark { step: Step::Leaving, names: Vec::new(), wal, tablespaces, ..mark };
    let elsewhere = leave(dir, elsewhere)?;
    remove_staged(dir, &elsewhere)
}

/// A tool may begin. False: there is something that is not ours.
pub(super) fn begin(dir: &Path, mark: &Mark) -> io::Result<bool> {
    if !contents(dir)?.is_empty() {
        return Ok(false);
    }
    mark.save(dir)?;
    remove_staged(dir, mark)?;
    Ok(true)
}

/// Puts the complete result of the tool in its place.
pub(super) fn arrive(dir: &Path, mut mark: Mark) -> io::Result<Mark> {
    mark.names = contents(&dir.join(NEW))?;
    mark.step = Step::Moving;
    mark.save(dir)?;
    move_up(dir, &mark)?;
    Ok(mark)
}

fn move_up(dir: &Path, mark: &Mark) -> io::Result<()> {
    let new = dir.join(NEW);
    for tablespace in &mark.tablespaces {
        move_out(&tablespace.path)?;
    }
    if let Some(wal) = &mark.wal {
        move_out(&wal.path)?;
    }
    for base in [new.as_path(), dir] {
        relink_tablespaces(&base.join(TABLESPACES))?;
        if let Some(wal) = &mark.wal {
            relink_wal(base, wal)?;
        }
    }
    for name in &mark.names {
        let from = new.join(name);
        if from.is_symlink() || from.exists() {
            at(&from, fs::rename(&from, dir.join(name)))?;
        }
    }
    if let Ok(made) = fs::metadata(&new) {
        let mode = made.mode() & 0o777;
        if matches!(mode, 0o700 | 0o750) {
            // Nobody else's mount point, or it could not have been written to.
            fs::set_permissions(dir, fs::Permissions::from_mode(mode))?;
        }
    }
    remove_tree(&new)?;
    sync_dir(dir)
}

/// Moves the content of a folder up by one.
fn move_out(root: &Path) -> io::Result<()> {
    let staged = root.join(NEW);
    let entries = match fs::read_dir(&staged) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        entries => at(&staged, entries)?,
    };
    for entry in entries {
        let name = entry?.file_name();
        let from = staged.join(&name);
        at(&from, fs::rename(&from, root.join(&name)))?;
    }
    fs::remove_dir(&staged)?;
    sync_dir(root)
}

/// Where a link leads to a folder that was made and moved: to the one that it is in now.
fn unstaged(link: &Path) -> Option<PathBuf> {
    let target = fs::read_link(link).ok()?;
    if target.file_name()? == NEW { target.parent().map(Path::to_owned) } else { None }
}

fn relink_tablespaces(dir: &Path) -> io::Result<()> {
    let Ok(entries) = fs::read_dir(dir) else { return Ok(()) };
    for entry in entries {
        let link = entry?.path();
        if let Some(target) = unstaged(&link) {
            replace_link(&link, &target)?;
        }
    }
    sync_dir(dir)
}

fn relink_wal(base: &Path, wal: &Wal) -> io::Result<()> {
    let link = base.join(WAL_DIR);
    match (&wal.link, unstaged(&link)) {
        (_, None) => Ok(()),
        (Some(target), Some(_)) => replace_link(&link, target),
        (None, Some(_)) => at(&link, fs::remove_file(&link)),
    }
}

fn replace_link(link: &Path, target: &Path) -> io::Result<()> {
    let mut new = OsString::from(link);
    new.push(".kornak-new");
    remove_tree(Path::new(&new))?;
    symlink(target, &new)?;
    at(link, fs::rename(&new, link))
}

/// After a crash, when nothing works here any more: what is complete takes its place, and what somebody has
/// put into a directory where an attempt was broken off is his. True if anything was done.
pub(super) fn settle(dir: &Path) -> io::Result<bool> {
    let mark = match Mark::load(dir) {
        Ok(Some(mark)) => mark,
        Ok(None) => return Ok(false),
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
        Err(error) => return Err(error),
    };
    match (mark.means(), mark.step) {
        (Means::Complete, step) => {
            if step == Step::Moving {
                move_up(dir, &mark)?;
            }
            Mark::remove(dir)?;
        }
        (Means::Nothing, Step::Making | Step::Removing) if !contents(dir)?.is_empty() => {
            clear(dir)?;
        }
        _ => return Ok(false),
    }
    Ok(true)
}

/// Everything that was written to the file system of this directory is on disk.
pub(super) fn sync_all(dir: &Path) -> io::Result<()> {
    let dir = fs::File::open(dir)?;
    Ok(rustix::fs::syncfs(&dir)?)
}

/// Of a directory that is empty, the note is all that is left: it goes.
pub(super) fn forget(dir: &Path) -> io::Result<()> {
    match contents(dir) {
        Ok(names) if names.is_empty() => Mark::remove(dir),
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// The directory has nothing in it, and is not even marked.
pub(super) fn is_untouched(dir: &Path) -> io::Result<bool> {
    match contents(dir) {
        Ok(names) => Ok(names.is_empty() && !dir.join(MARK).exists()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(true),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests;

//! The note of work on a data directory, written inside it before the first byte is written or removed,
//! until it is done. Whoever finds such a note after a crash knows what of the directory was made by us and may go;
//! what an operator puts there instead has none.
//!
//! A directory that is being made grows in [`NEW`], one that is being removed goes through [`OLD`], both inside the
//! directory (and inside those that hold its log and its tablespaces): nothing else is ever removed. Only an operator's own command
//! works in the directory itself.

use std::ffi::OsString;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::os::{remove_file, write_file};

/// Name of the note. No dot in front: who empties the directory by hand removes it as well.
pub(super) const MARK: &str = "kornak.unfinished";
/// The folder in which a tool works, until its result is complete.
pub(super) const NEW: &str = "kornak.new";
/// The folder for what is on its way out.
pub(super) const OLD: &str = "kornak.old";
/// The superuser's first password, while initdb runs.
pub(super) const PASSWORD: &str = "kornak.password";

/// The purpose of the work.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Purpose {
    /// A copy of another server: complete as soon as its files are.
    Copy,
    /// The first server of a cluster: complete when the store knows the cluster.
    Bootstrap,
}

/// How far it has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Step {
    /// `names` are moved into [`OLD`].
    Leaving,
    /// The content of [`OLD`] is removed.
    Removing,
    /// A tool fills [`NEW`].
    Making,
    /// `names` are moved out of [`NEW`].
    Moving,
    /// An operator's command fills the directory itself.
    Command,
    /// Complete, and not started yet.
    Made,
    /// Started, perhaps on its way to a point in time.
    Started,
    /// Roles, databases and `post_bootstrap` are under way.
    Filling,
}

/// A tablespace outside of the data directory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Tablespace {
    pub(super) path: PathBuf,
    /// Our subdirectory of it, where there is one already: other versions' are not ours.
    pub(super) version: Option<String>,
}

/// Where the log is, if not on the data directory's own place.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Wal {
    pub(super) path: PathBuf,
    /// The target of the link `pg_wal`; `None`: `pg_wal` itself is a mount point.
    pub(super) link: Option<PathBuf>,
    /// So it was with what is being replaced; no setting says it.
    #[serde(default)]
    pub(super) found: bool,
}

/// The note.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Mark {
    pub(super) purpose: Purpose,
    pub(super) step: Step,
    #[serde(default)]
    pub(super) wal: Option<Wal>,
    #[serde(default)]
    pub(super) tablespaces: Vec<Tablespace>,
    #[serde(default)]
    pub(super) names: Vec<OsString>,
    /// The directory itself was made by an operator's command, which may expect it not to be there.
    #[serde(default)]
    pub(super) with_dir: bool,
}

/// The meaning of a note that is found after a crash.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Means {
    /// Nothing of it is of use: it is cleared away and begun anew.
    Nothing,
    /// All is there, and has only to be put in its place.
    Complete,
    /// The first server of a cluster, which can go on from here.
    GoesOn,
    /// The first server of a cluster, which cannot: what fills it may not be done twice.
    BeginsAnew,
}

impl Mark {
    pub(super) fn new(purpose: Purpose, step: Step) -> Self {
        let (tablespaces, names) = (Vec::new(), Vec::new());
        Self { purpose, step, wal: None, tablespaces, names, with_dir: false }
    }

    pub(super) fn means(&self) -> Means {
        match (self.purpose, self.step) {
            (_, Step::Leaving | Step::Removing | Step::Making | Step::Command)
            | (Purpose::Bootstrap, Step::Moving) => Means::Nothing,
            (Purpose::Copy, Step::Moving | Step::Made | Step::Started | Step::Filling) => {
                Means::Complete
            }
            (Purpose::Bootstrap, Step::Made | Step::Started) => Means::GoesOn,
            (Purpose::Bootstrap, Step::Filling) => Means::BeginsAnew,
        }
    }

    /// Of a directory. A note that is there and cannot be read is an error: then nobody touches anything.
    pub(super) fn load(dir: &Path) -> io::Result<Option<Self>> {
        match fs::read(dir.join(MARK)) {
            Ok(text) => serde_json::from_slice(&text).map(Some).map_err(|source| {
                let told = format!("{MARK} in the data directory is not understood: {source}");
                io::Error::new(io::ErrorKind::InvalidData, told)
            }),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// On disk before this returns.
    pub(super) fn save(&self, dir: &Path) -> io::Result<()> {
        write_file(&dir.join(MARK), &serde_json::to_vec(self)?, 0o600, None)
    }

    /// The work is done.
    pub(super) fn remove(dir: &Path) -> io::Result<()> {
        remove_file(&dir.join(MARK), None)
    }
}

/// Of a data directory's entries, those that are neither our own nor a file system's.
pub(super) fn contents(dir: &Path) -> io::Result<Vec<OsString>> {
    let mut names = Vec::new();
    for entry in fs::read_dir(dir)? {
        let name = entry?.file_name();
        let ours = [MARK, NEW, OLD, PASSWORD, "lost+found"].iter().any(|own| name == *own);
        if !ours && name != format!("{MARK}.kornak-new").as_str() {
            names.push(name);
        }
    }
    names.sort();
    Ok(names)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_note_is_read_as_it_was_written_and_no_other() {
        let dir = tempfile::tempdir().expect("a directory");
        assert_eq!(Mark::load(dir.path()).unwrap(), None);
        let mut mark = Mark::new(Purpose::Bootstrap, Step::Made);
        mark.wal = Some(Wal { path: "/w".into(), link: Some("../w".into()), found: true });
        mark.tablespaces = vec![Tablespace { path: "/t s".into(), version: None }];
        mark.names = vec!["base".into()];
        mark.save(dir.path()).unwrap();
        assert_eq!(Mark::load(dir.path()).unwrap(), Some(mark));
        for text in ["", "{", "copy\n", r#"{"purpose":"copy","step":"later"}"#] {
            fs::write(dir.path().join(MARK), text).unwrap();
            assert!(Mark::load(dir.path()).is_err(), "{text:?}");
        }
        Mark::remove(dir.path()).unwrap();
        assert_eq!(Mark::load(dir.path()).unwrap(), None);
    }
}

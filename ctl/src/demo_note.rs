//! The note by which a running `kornak demo` tells the operator's verbs where it is, so that
//! `kornak list` works with nothing configured.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::Deserialize;

/// Contents of the note.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct DemoNote {
    pub scope: String,
    /// REST of the nodes, `http://host:port`.
    pub api: Vec<String>,
    /// Members of each group, if it is a Citus cluster.
    #[serde(default)]
    pub groups: BTreeMap<u32, Vec<String>>,
    /// Work directory.
    pub dir: PathBuf,
    pub pid: u32,
}

/// Where the note lies: `$XDG_RUNTIME_DIR`, else `/tmp`; one per user.
pub fn path() -> PathBuf {
    let dir = std::env::var_os("XDG_RUNTIME_DIR").filter(|dir| !dir.is_empty());
    let dir = dir.map(PathBuf::from).filter(|dir| dir.is_dir());
    let name = format!("kornak-demo-{}.json", rustix::process::getuid().as_raw());
    dir.unwrap_or_else(|| PathBuf::from("/tmp")).join(name)
}

/// Reads the note; `None` if there is none, or it is not ours: in a folder that everybody may
/// write to, another user could have left it.
pub fn read(path: &Path) -> Option<DemoNote> {
    use std::os::unix::fs::MetadataExt;
    let owner = std::fs::symlink_metadata(path).ok()?.uid();
    let ours = owner == rustix::process::getuid().as_raw();
    let text = ours.then(|| std::fs::read_to_string(path).ok())??;
    serde_json::from_str(&text).ok()
}

impl DemoNote {
    /// Whether the process that left the note still runs.
    pub fn is_alive(&self) -> bool {
        i32::try_from(self.pid)
            .ok()
            .and_then(rustix::process::Pid::from_raw)
            .is_some_and(|pid| rustix::process::test_kill_process(pid).is_ok())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn note(pid: u32) -> DemoNote {
        DemoNote {
            scope: "demo".to_owned(),
            api: vec![],
            groups: BTreeMap::new(),
            dir: PathBuf::from("/tmp"),
            pid,
        }
    }

    #[test]
    fn a_note_outlived_by_its_writer_is_noticed() {
        assert!(note(std::process::id()).is_alive());
        // Linux numbers processes below 2^22.
        assert!(!note(i32::MAX as u32).is_alive());
        assert!(!note(u32::MAX).is_alive());
    }
}

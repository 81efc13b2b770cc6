//! Whether a directory's name means the same directory to another process.
//!
//! `/proc/PID/cwd` shows the name of a directory, and a container has directories of the same names on disks of its own. A
//! process with this process's mounts is told apart by the name alone. For any other one the tables of mounts
//! (proc_pid_mountinfo(5)) say which file system the name is on, and where in it; they are read without touching the disk.

use std::ffi::{OsStr, OsString};
use std::fs;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

/// Whether the process below `proc` means the same directory as this process by `directory`. What cannot be found out is
/// not the same directory: processes are killed for it.
pub(super) fn is_same_directory(proc: &Path, directory: &Path) -> bool {
    let mounts_of = |proc: &Path| fs::read_link(proc.join("ns/mnt"));
    let own = Path::new("/proc/self");
    match (mounts_of(proc), mounts_of(own)) {
        (Ok(theirs), Ok(ours)) if theirs == ours => true,
        // A kernel without namespaces.
        (_, Err(_)) => true,
        _ => {
            let place = |proc: &Path| {
                let table = fs::read(proc.join("mountinfo")).ok()?;
                Place::of(&table, directory)
            };
            let theirs = place(proc);
            theirs.is_some() && theirs == place(own)
        }
    }
}

/// A directory, whatever it is called.
#[derive(Debug, PartialEq, Eq)]
struct Place {
    /// `major:minor` of the file system.
    device: OsString,
    /// From the file system's own root.
    path: PathBuf,
}

impl Place {
    /// `None`: no line of the table has it.
    fn of(table: &[u8], directory: &Path) -> Option<Self> {
        let mut found: Option<(PathBuf, Self)> = None;
        for line in table.split(|byte| *byte == b'\n') {
            let mut fields = line.split(|byte| *byte == b' ').skip(2);
            let (Some(device), Some(root), Some(point)) =
                (fields.next(), fields.next(), fields.next())
            else {
                continue;
            };
            let point = unescaped(point);
            let Ok(below) = directory.strip_prefix(&point) else { continue };
            // A later mount on the same point covers an earlier one.
            if found.as_ref().is_none_or(|(longest, _)| point.starts_with(longest)) {
                let path = unescaped(root).join(below);
                let device = OsStr::from_bytes(device).to_owned();
                found = Some((point, Self { device, path }));
            }
        }
        found.map(|(_, place)| place)
    }
}

/// Space, tab, newline and backslash are written in octal.
fn unescaped(field: &[u8]) -> PathBuf {
    let mut bytes = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((first, after)) = rest.split_first() {
        let octal = (*first == b'\\').then(|| after.get(..3)).flatten();
        let code = octal.and_then(|digits| std::str::from_utf8(digits).ok());
        match code.and_then(|digits| u8::from_str_radix(digits, 8).ok()) {
            Some(code) => {
                bytes.push(code);
                rest = after.get(3..).unwrap_or_default();
            }
            None => {
                bytes.push(*first);
                rest = after;
            }
        }
    }
    PathBuf::from(OsString::from_vec(bytes))
}

#[cfg(test)]
mod tests {
    use std::process::{Child, Command, Stdio};

    use super::*;

    #[test]
    fn a_directory_is_found_below_the_mount_that_is_on_top() {
        let table = b"22 1 254:0 / / rw - ext4 /dev/vda rw\n\
            30 22 0:40 / /var rw - overlay overlay rw\n\
            31 30 254:0 /srv/one /var/lib/pg rw - ext4 /dev/vda rw\n\
            32 30 0:41 /@data /var/lib/a\\040b rw - btrfs /dev/vdb rw\n\
            33 31 0:42 / /var/lib/pg rw - tmpfs tmpfs rw\n\
            broken\n";
        for (directory, device, path) in [
            ("/etc", "254:0", "/etc"),
            ("/", "254:0", "/"),
            ("/var/lib/other", "0:40", "/lib/other"),
            ("/var/lib/pg/15", "0:42", "/15"),
            ("/var/lib/pgother", "0:40", "/lib/pgother"),
            ("/var/lib/a b/15", "0:41", "/@data/15"),
        ] {
            let expected = Place { device: device.into(), path: path.into() };
            assert_eq!(Place::of(table, Path::new(directory)), Some(expected), "{directory}");
        }
        assert_eq!(Place::of(b"", Path::new("/etc")), None);
    }

    #[test]
    fn octal_codes_and_nothing_else_are_replaced() {
        assert_eq!(unescaped(b"/a\\040b\\134c\\0"), PathBuf::from("/a b\\c\\0"));
    }

    /// A sleeper called `postgres` in a container whose directory has the same name, and one whose directory is the same.
    #[test]
    fn a_server_of_a_container_is_not_ours_because_its_directory_has_the_same_name() {
        let dir = tempfile::tempdir().unwrap();
        let data = dir.path().canonicalize().unwrap().join("data");
        let program = dir.path().join("postgres");
        fs::create_dir(&data).unwrap();
        fs::copy("/bin/sleep", &program).unwrap();
        let start = |prepare: &str| -> Child {
            let script =
                format!("{prepare} cd {} && exec {} 60", data.display(), program.display());
            Command::new("unshare")
                .args(["--mount", "sh", "-ec", &script])
                .stdin(Stdio::null())
                .spawn()
                .unwrap()
        };
        if !Command::new("unshare").args(["--mount", "true"]).status().is_ok_and(|it| it.success())
        {
            return;
        }
        let mut other = start(&format!("mount -t tmpfs none {};", data.display()));
        let mut same = start("");
        let seen = || -> Vec<u32> {
            let found = super::super::processes_in(&data).unwrap();
            found.into_iter().map(|process| process.pid).collect()
        };
        let is_program = |child: &Child| {
            let exe = fs::read_link(format!("/proc/{}/exe", child.id()));
            exe.is_ok_and(|exe| exe == program.canonicalize().unwrap())
        };
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(20);
        while !(is_program(&other) && is_program(&same)) {
            assert!(std::time::Instant::now() < deadline, "neither of them runs");
            std::thread::yield_now();
        }
        let found = seen();
        let expected = vec![same.id()];
        for child in [&mut other, &mut same] {
            child.kill().unwrap();
            child.wait().unwrap();
        }
        assert_eq!(found, expected);
    }
}

//! Each step is broken off where it can be, and gone on with.

use std::collections::BTreeSet;

use tempfile::TempDir;

use super::*;

struct Field {
    root: TempDir,
}

impl Field {
    fn new() -> Self {
        Self { root: tempfile::tempdir().expect("a directory") }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.root.path().join(name)
    }

    fn write(&self, name: &str, text: impl AsRef<[u8]>) {
        let path = self.path(name);
        fs::create_dir_all(path.parent().expect("it has one")).unwrap();
        fs::write(path, text).unwrap();
    }

    /// A cluster in `base` with its log in `wal` and a tablespace in `ts`.
    fn cluster(&self, base: &str, wal: &str, ts: &str, staged: bool) {
        let mut control = vec![0; 12];
        control.extend(42_u32.to_ne_bytes());
        self.write(&format!("{base}/PG_VERSION"), "15\n");
        self.write(&format!("{base}/global/pg_control"), control);
        self.write(&format!("{base}/base/1/2"), "rows");
        self.write(&format!("{base}/postgresql.conf"), "");
        let inner = if staged { format!("/{NEW}") } else { String::new() };
        self.write(&format!("{wal}{inner}/000000010000000000000001"), "log");
        self.write(&format!("{wal}{inner}/archive_status/x"), "");
        self.write(&format!("{ts}{inner}/PG_15_42/5/6"), "rows elsewhere");
        fs::create_dir_all(self.path(&format!("{base}/pg_tblspc"))).unwrap();
        let to = |root: &str| self.path(&format!("{root}{inner}"));
        symlink(to(ts), self.path(&format!("{base}/pg_tblspc/16384"))).unwrap();
        symlink(to(wal), self.path(&format!("{base}/pg_wal"))).unwrap();
    }

    /// Puts foreign files everywhere.
    fn strangers(&self) {
        for name in
            ["d/lost+found/x", "w/lost+found/x", "t/lost+found/x", "t/PG_14_41/1", "w/letter"]
        {
            self.write(name, "not ours");
        }
    }

    fn files(&self) -> BTreeSet<String> {
        let mut found = BTreeSet::new();
        let mut todo = vec![self.root.path().to_owned()];
        while let Some(dir) = todo.pop() {
            for entry in fs::read_dir(dir).unwrap().flatten() {
                let name = entry.path().strip_prefix(self.root.path()).unwrap().to_owned();
                match entry.file_type().unwrap().is_dir() {
                    true => todo.push(entry.path()),
                    false => drop(found.insert(name.display().to_string())),
                }
            }
        }
        found
    }

    fn mark(&self) -> Mark {
        let wal = Wal { path: self.path("w"), link: Some(self.path("w")), found: false };
        let tablespace = Tablespace { path: self.path("t"), version: None };
        Mark {
            wal: Some(wal),
            tablespaces: vec![tablespace],
            ..Mark::new(Purpose::Copy, Step::Making)
        }
    }
}

fn set(names: &[&str]) -> BTreeSet<String> {
    names.iter().map(|name| (*name).to_owned()).collect()
}

const STRANGERS: [&str; 5] =
    ["d/lost+found/x", "w/lost+found/x", "t/lost+found/x", "t/PG_14_41/1", "w/letter"];

#[test]
fn a_removal_takes_what_is_the_clusters_and_nothing_else() {
    let field = Field::new();
    field.cluster("d", "w", "t", false);
    field.strangers();
    let dir = field.path("d");
    remove_all(&dir, Purpose::Copy).unwrap();
    let mark = Mark::load(&dir).unwrap().expect("more is to come");
    assert_eq!(mark.means(), Means::Nothing);
    assert_eq!(mark.wal.unwrap().path, field.path("w"));
    let left = set(&[&STRANGERS[..], &["d/kornak.unfinished"]].concat());
    assert_eq!(field.files(), left);
    // Once more, and with what somebody has restored meanwhile.
    field.write("d/PG_VERSION", "15");
    field.write("t/PG_15_42/1", "restored");
    assert!(settle(&dir).unwrap());
    assert_eq!(field.files(), set(&[&STRANGERS[..], &["d/PG_VERSION", "t/PG_15_42/1"]].concat()));
    assert_eq!(Mark::load(&dir).unwrap(), None);
}

#[test]
fn a_removal_that_is_broken_off_anywhere_is_gone_on_with() {
    for moved in 0..5 {
        let field = Field::new();
        field.cluster("d", "w", "t", false);
        field.strangers();
        let dir = field.path("d");
        let mark = departing(&dir, Mark::new(Purpose::Copy, Step::Leaving)).unwrap();
        assert_eq!(mark.names[0], "global", "it is no cluster from the first step on");
        for name in mark.names.iter().take(moved) {
            set_aside(&dir, name).unwrap();
        }
        // Not in the list: put there since.
        field.write("d/letter", "dear");
        clear(&dir).unwrap();
        assert_eq!(field.files(), set(&[&STRANGERS[..], &["d/letter"]].concat()), "{moved}");
    }
}

#[test]
fn where_the_log_was_is_remembered_for_the_next_copy() {
    let field = Field::new();
    field.cluster("d", "w", "t", false);
    let dir = field.path("d");
    remove_all(&dir, Purpose::Copy).unwrap();
    // Twice, for attempts may fail.
    for _ in 0..2 {
        clear(&dir).unwrap();
        let wal = Mark::load(&dir).unwrap().and_then(|mark| mark.wal).expect("it is known");
        assert_eq!(wal.link, Some(field.path("w")));
    }
    assert!(contents(&dir).unwrap().is_empty());
}

#[test]
fn an_attempt_that_is_broken_off_leaves_what_others_have_put_there() {
    let field = Field::new();
    field.strangers();
    let (dir, mark) = (field.path("d"), field.mark());
    assert!(begin(&dir, &mark).unwrap());
    field.cluster(&format!("d/{NEW}"), "w", "t", true);
    assert!(!settle(&dir).unwrap(), "the next attempt clears it");
    field.write("d/PG_VERSION", "restored");
    assert!(settle(&dir).unwrap());
    assert_eq!(field.files(), set(&[&STRANGERS[..], &["d/PG_VERSION"]].concat()));
    assert!(!begin(&dir, &mark).unwrap());
    assert_eq!(Mark::load(&dir).unwrap(), None);
}

#[test]
fn what_is_complete_takes_its_place_wherever_it_was_broken_off() {
    let expected = [
        "d/PG_VERSION",
        "d/base/1/2",
        "d/global/pg_control",
        "d/pg_tblspc/16384",
        "d/pg_wal",
        "d/postgresql.conf",
        "t/PG_15_42/5/6",
        "w/000000010000000000000001",
        "w/archive_status/x",
    ];
    for moved in 0..6 {
        let field = Field::new();
        field.strangers();
        let (dir, mark) = (field.path("d"), field.mark());
        assert!(begin(&dir, &mark).unwrap());
        field.cluster(&format!("d/{NEW}"), "w", "t", true);
        // A note of the source's is not ours.
        field.write(&format!("d/{NEW}/{MARK}"), "{}");
        if moved < 5 {
            let names = contents(&dir.join(NEW)).unwrap();
            let mark = Mark { step: Step::Moving, names, ..mark };
            mark.save(&dir).unwrap();
            move_out(&field.path("t")).unwrap();
            relink_tablespaces(&dir.join(NEW).join(TABLESPACES)).unwrap();
            for name in mark.names.iter().take(moved) {
                fs::rename(dir.join(NEW).join(name), dir.join(name)).unwrap();
            }
        } else {
            arrive(&dir, mark).unwrap();
        }
        assert!(settle(&dir).unwrap());
        assert_eq!(field.files(), set(&[&STRANGERS[..], &expected].concat()), "{moved}");
        assert_eq!(fs::read_link(dir.join("pg_wal")).unwrap(), field.path("w"));
        assert_eq!(fs::read_link(dir.join("pg_tblspc/16384")).unwrap(), field.path("t"));
        assert!(!settle(&dir).unwrap());
    }
}

#[test]
fn what_a_command_has_made_goes_with_its_own_tablespaces() {
    let field = Field::new();
    field.strangers();
    field.cluster("d", "w", "t", false);
    let dir = field.path("d");
    Mark::new(Purpose::Bootstrap, Step::Command).save(&dir).unwrap();
    assert!(!settle(&dir).unwrap(), "a command may still work");
    clear(&dir).unwrap();
    assert_eq!(field.files(), set(&[&STRANGERS[..], &["d/kornak.unfinished"]].concat()));
    assert!(contents(&dir).unwrap().is_empty());
}

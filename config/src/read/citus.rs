//! `citus` and `kornak.citus`.

use kornak_cluster::GroupId;

use crate::agent::{CitusSettings, KornakCitusSettings};
use crate::section::Section;

/// Longest name of a database (`NAMEDATALEN` - 1).
const LONGEST_NAME: usize = 63;

/// The group and the databases, if this is a node of a Citus cluster. Patroni takes a section that
/// makes no sense for none at all; here it is a mistake, for such a node would join no cluster.
pub(super) fn citus(root: &Section<'_>) -> Option<(GroupId, CitusSettings)> {
    if !root.has("citus") {
        return None;
    }
    let section = root.section("citus");
    section.tolerate(&["group", "database", "databases"], &[]);
    let group = section.count("group", 0..=i32::MAX as u64);
    let group = section.required("group", "the number of the group, 0 for the coordinator", group);
    let databases = databases(&section);
    let group = GroupId(u32::try_from(group?).ok()?);
    Some((group, CitusSettings { databases: databases? }))
}

fn databases(section: &Section<'_>) -> Option<Vec<String>> {
    if section.has("database") && section.has("databases") {
        section.problem("databases", "expected either database or databases");
        return None;
    }
    if !section.has("databases") {
        let one = section.text("database");
        let expected = "the database of the Citus extension";
        return section.required("database", expected, one).map(|name| vec![name]);
    }
    let names = section.texts("databases", ',')?;
    let mut known: Vec<&String> = Vec::new();
    for name in &names {
        if name.is_empty() || name.len() > LONGEST_NAME {
            section.problem("databases", format!("expected names of databases, found {name:?}"));
            return None;
        }
        if known.contains(&name) {
            section.problem("databases", format!("expected each name once, found {name:?} twice"));
            return None;
        }
        known.push(name);
    }
    if names.is_empty() {
        section.problem("databases", "expected at least one database");
        return None;
    }
    Some(names)
}

/// `kornak.citus`: an unknown key is a mistake.
pub(super) fn kornak_citus(section: &Section<'_>) -> KornakCitusSettings {
    section.only(&["poolinfo"]);
    let poolinfo = section.parsed("poolinfo", "host=… port=… of the pool", |text| {
        let words = || text.split_whitespace();
        let fine = |word: &str| match word.split_once('=') {
            Some(("host", host)) => !host.is_empty(),
            Some(("port", port)) => port.parse::<u16>().is_ok_and(|port| port > 0),
            _ => false,
        };
        (words().count() > 0 && words().all(fine)).then(|| words().collect::<Vec<_>>().join(" "))
    });
    KornakCitusSettings { poolinfo }
}

//! Whether the Citus metadata agree with the store: value of `kornak/citus`.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use crate::id::GroupId;

/// Written by the coordinator's leader whenever it changes. A cluster whose coordinator has no leader,
/// or another one, does not know.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct CitusRegistration {
    /// The member that reports.
    pub member: String,
    /// By the database's name.
    #[serde(default)]
    pub databases: BTreeMap<String, CitusDatabase>,
}

impl CitusRegistration {
    /// Groups that are registered in every database.
    pub fn groups(&self) -> BTreeSet<GroupId> {
        let mut databases = self.databases.values();
        let first = databases.next().map(|database| database.groups.clone()).unwrap_or_default();
        databases.fold(first, |known, database| &known & &database.groups)
    }
}

/// One database's `pg_dist_node`.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct CitusDatabase {
    /// Whether `pg_dist_node` names exactly the primaries and standbys that the store knows.
    pub agrees: bool,
    /// Every node has the coordinator's rows.
    #[serde(default)]
    pub synced: bool,
    /// Groups whose primary does not have the coordinator's rows yet.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub behind: BTreeSet<GroupId>,
    /// Groups that have a row for their primary.
    #[serde(default)]
    pub groups: BTreeSet<GroupId>,
    /// Where these rows say that the primary is, `host:port`.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub primaries: BTreeMap<GroupId, String>,
    /// Where these rows say that standbys are, `host:port`, of the groups that have any. `None`: whoever
    /// wrote it does not say.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub secondaries: Option<BTreeMap<GroupId, BTreeSet<String>>>,
    /// Since when it has not agreed, RFC 3339.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub since: Option<String>,
    /// Differences, and why they cannot be removed; sentences for people.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub differences: Vec<String>,
}

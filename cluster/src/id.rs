//! Names of clusters and groups.

use std::fmt;

use serde::{Deserialize, Serialize};

/// Where a cluster lives in the store: `/<namespace>/<scope>/`, and for a Citus cluster one
/// group below it.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Scope {
    /// Patroni's `namespace`, without slashes at its ends.
    pub namespace: String,
    /// Patroni's `scope`: the cluster's name.
    pub name: String,
    /// The Citus group; `None` for a plain cluster.
    pub group: Option<GroupId>,
}

impl Scope {
    /// Slashes around the namespace are dropped and repeated ones joined, as Patroni does.
    pub fn new(namespace: &str, name: &str, group: Option<GroupId>) -> Self {
        let parts: Vec<&str> = namespace.split('/').filter(|part| !part.is_empty()).collect();
        Self { namespace: parts.join("/"), name: name.to_owned(), group }
    }

    /// Scope of the whole cluster, without the group.
    pub fn whole(&self) -> Self {
        Self { group: None, ..self.clone() }
    }

    /// Scope of one group of this cluster.
    pub fn with_group(&self, group: GroupId) -> Self {
        Self { group: Some(group), ..self.clone() }
    }

    /// `/<namespace>/<scope>/`, the prefix of everything that belongs to the cluster.
    pub fn root(&self) -> String {
        if self.namespace.is_empty() {
            format!("/{}/", self.name)
        } else {
            format!("/{}/{}/", self.namespace, self.name)
        }
    }

    /// `/<namespace>/<scope>/[<group>/]`, the prefix of one HA group's keys.
    pub fn base(&self) -> String {
        match self.group {
            Some(group) => format!("{}{group}/", self.root()),
            None => self.root(),
        }
    }
}

/// Number of a Citus group (`pg_dist_node.groupid`); 0 is the coordinator.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, Default,
)]
#[serde(transparent)]
pub struct GroupId(pub u32);

impl GroupId {
    /// The coordinator's group.
    pub const COORDINATOR: Self = Self(0);

    /// Reads the decimal form used as a path element: no sign, no leading zero.
    pub fn parse(text: &str) -> Option<Self> {
        let canonical = text == "0" || !text.starts_with('0');
        let digits = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
        if canonical && digits { text.parse().ok().map(Self) } else { None }
    }
}

impl fmt::Display for GroupId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slashes_around_the_namespace_do_not_matter() {
        for namespace in ["service", "/service", "/service/", "//service//"] {
            assert_eq!(Scope::new(namespace, "demo", None).base(), "/service/demo/");
        }
        assert_eq!(Scope::new("/", "demo", None).base(), "/demo/");
    }

    #[test]
    fn a_group_is_one_level_below_the_cluster() {
        let scope = Scope::new("service", "demo", Some(GroupId(2)));
        assert_eq!(scope.base(), "/service/demo/2/");
        assert_eq!(scope.root(), "/service/demo/");
    }

    #[test]
    fn only_canonical_numbers_are_groups() {
        assert_eq!(GroupId::parse("0"), Some(GroupId(0)));
        assert_eq!(GroupId::parse("12"), Some(GroupId(12)));
        for text in ["", "01", "-1", "+1", "kornak", "1a"] {
            assert_eq!(GroupId::parse(text), None, "{text:?}");
        }
    }
}

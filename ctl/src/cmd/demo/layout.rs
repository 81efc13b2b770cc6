//! Which nodes a demo has: a plain cluster, or a Citus cluster of three coordinators and two groups of
//! two workers.

use std::collections::BTreeMap;
use std::path::Path;

/// One node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Node {
    /// From 1; its ports hang on it.
    pub(super) index: u16,
    pub(super) name: String,
    /// `Some` in a Citus cluster.
    pub(super) group: Option<u32>,
}

/// All nodes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Layout {
    pub(super) nodes: Vec<Node>,
}

/// Members of the groups of a Citus cluster, the coordinator's first.
const CITUS: [u16; 3] = [3, 2, 2];

impl Layout {
    /// `node1`, `node2` and so on.
    pub(super) fn plain(nodes: u16) -> Self {
        let node = |index| Node { index, name: format!("node{index}"), group: None };
        Self { nodes: (1..=nodes).map(node).collect() }
    }

    /// `coord1` to `coord3`, `work1-1` to `work2-2`.
    pub(super) fn citus() -> Self {
        let mut nodes = Vec::new();
        for (group, members) in (0_u32..).zip(CITUS) {
            for member in 1..=members {
                let name = match group {
                    0 => format!("coord{member}"),
                    group => format!("work{group}-{member}"),
                };
                let index = u16::try_from(nodes.len() + 1).unwrap_or(u16::MAX);
                nodes.push(Node { index, name, group: Some(group) });
            }
        }
        Self { nodes }
    }

    pub(super) fn is_citus(&self) -> bool {
        self.nodes.iter().any(|node| node.group.is_some())
    }

    /// How many nodes there are.
    pub(super) fn len(&self) -> u16 {
        u16::try_from(self.nodes.len()).unwrap_or(u16::MAX)
    }

    /// REST addresses by group; empty for a plain cluster.
    pub(super) fn by_group(&self, url: impl Fn(u16) -> String) -> BTreeMap<u32, Vec<String>> {
        let mut groups: BTreeMap<u32, Vec<String>> = BTreeMap::new();
        for node in &self.nodes {
            if let Some(group) = node.group {
                groups.entry(group).or_default().push(url(node.index));
            }
        }
        groups
    }
}

/// Whether the PostgreSQL whose programs are in `bin_dir` has the Citus extension: Debian's layout, or
/// that of one's own build.
pub(super) fn has_citus(bin_dir: &Path) -> bool {
    let above = bin_dir.parent();
    let version = above.and_then(Path::file_name).unwrap_or_default();
    let debian = Path::new("/usr/share/postgresql").join(version);
    let own = above.into_iter().flat_map(|dir| [dir.join("share"), dir.join("share/postgresql")]);
    own.chain([debian]).any(|share| share.join("extension/citus.control").exists())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_citus_layout_is_the_articles() {
        let layout = Layout::citus();
        let names: Vec<&str> = layout.nodes.iter().map(|node| node.name.as_str()).collect();
        assert_eq!(
            names,
            ["coord1", "coord2", "coord3", "work1-1", "work1-2", "work2-1", "work2-2"]
        );
        let sizes: Vec<usize> =
            layout.by_group(|index| index.to_string()).into_values().map(|api| api.len()).collect();
        assert_eq!(sizes, [3, 2, 2]);
        assert!(Layout::plain(3).by_group(|index| index.to_string()).is_empty());
    }
}

//! Whom commits wait for.

use std::collections::BTreeMap;

use super::Sender;
use crate::sim::host;
use crate::sim::world::World;

/// `synchronous_standby_names`, as far as Kornak writes them.
#[derive(Debug)]
pub enum Names {
    Nobody,
    Anybody,
    /// So many of these.
    Of(usize, Vec<String>),
}

impl Names {
    /// Reads them.
    pub fn parse(text: &str) -> Self {
        match text {
            "" => Self::Nobody,
            "*" | "ANY 1 (*)" => Self::Anybody,
            text => {
                let number = text.trim_start_matches("ANY ").split(' ').next();
                let waits = number.and_then(|number| number.parse().ok()).unwrap_or(0);
                let names = text.split('"').skip(1).step_by(2).map(str::to_owned).collect();
                Self::Of(waits, names)
            }
        }
    }

    /// Whether a commit that ends after `needs` records may be acknowledged.
    pub(super) fn satisfied(
        &self,
        w: &World,
        senders: &BTreeMap<usize, Sender>,
        needs: usize,
    ) -> bool {
        let has = |index: usize| senders.get(&index).is_some_and(|sender| sender.flushed >= needs);
        match self {
            Self::Nobody => true,
            Self::Anybody => senders.keys().any(|index| has(*index)),
            Self::Of(waits, names) => {
                let confirm = |name: &&String| host::index_of(w, name).is_some_and(has);
                names.iter().filter(confirm).count() >= *waits
            }
        }
    }

    /// Whether commits may wait for this standby.
    pub fn names(&self, name: &str) -> bool {
        match self {
            Self::Nobody => false,
            Self::Anybody => true,
            Self::Of(_, names) => names.iter().any(|known| known == name),
        }
    }
}

//! Replication slots that the dynamic configuration speaks of: `slots` (permanent ones, kept on every
//! node so that they survive a failover) and `ignore_slots` (somebody else's, left alone).

use serde_json::Value;

/// Purpose of a slot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SlotKind {
    Physical,
    Logical { database: String, plugin: String },
}

/// In which clusters a permanent slot is kept (`cluster_type`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KeptIn {
    Every,
    /// Not in a standby cluster.
    Primary,
    /// Only in a standby cluster.
    Standby,
}

/// One of `slots`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PermanentSlot {
    pub name: String,
    pub kind: SlotKind,
    pub kept_in: KeptIn,
}

impl PermanentSlot {
    /// Reads `{name: {type, database, plugin, cluster_type}}`, where a number instead of the inner
    /// object means a physical slot. What makes no sense is left out.
    pub fn read(section: Option<&Value>) -> Vec<Self> {
        let slots = section.and_then(Value::as_object).into_iter().flatten();
        slots.filter_map(|(name, value)| Self::one(name, value)).collect()
    }

    fn one(name: &str, value: &Value) -> Option<Self> {
        let valid = !name.is_empty()
            && name.len() <= 63
            && name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_');
        if !valid {
            return None;
        }
        let text = |key: &str| value.get(key).and_then(Value::as_str);
        let (database, plugin) = (text("database"), text("plugin"));
        let kind = match (text("type"), database, plugin) {
            (Some("logical"), Some(database), Some(plugin)) => {
                SlotKind::Logical { database: database.to_owned(), plugin: plugin.to_owned() }
            }
            (Some("physical"), ..) => SlotKind::Physical,
            (None, None, None) if !value.is_string() => SlotKind::Physical,
            _ => return None,
        };
        let kept_in = match text("cluster_type") {
            Some("primary") => KeptIn::Primary,
            Some("standby") => KeptIn::Standby,
            _ => KeptIn::Every,
        };
        Some(Self { name: name.to_owned(), kind, kept_in })
    }
}

/// One of `ignore_slots`: what is given must agree.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct SlotMatcher {
    pub name: Option<String>,
    /// `physical` or `logical`.
    pub kind: Option<String>,
    pub database: Option<String>,
    pub plugin: Option<String>,
}

impl SlotMatcher {
    /// Reads a list of objects; an empty one matches nothing.
    pub fn read(section: Option<&Value>) -> Vec<Self> {
        let list = section.and_then(Value::as_array).into_iter().flatten();
        list.map(|item| {
            let text = |key: &str| item.get(key).and_then(Value::as_str).map(str::to_owned);
            Self {
                name: text("name"),
                kind: text("type"),
                database: text("database"),
                plugin: text("plugin"),
            }
        })
        .filter(|matcher| *matcher != Self::default())
        .collect()
    }

    /// Whether it means this slot.
    pub fn matches(
        &self,
        name: &str,
        kind: &str,
        database: Option<&str>,
        plugin: Option<&str>,
    ) -> bool {
        let agrees = |wanted: &Option<String>, found: Option<&str>| {
            wanted.as_deref().is_none_or(|wanted| Some(wanted) == found)
        };
        agrees(&self.name, Some(name))
            && agrees(&self.kind, Some(kind))
            && agrees(&self.database, database)
            && agrees(&self.plugin, plugin)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn permanent_slots_are_read_in_all_their_forms() {
        let section = json!({
            "plain": 0, "empty": {}, "kept": {"type": "physical", "cluster_type": "standby"},
            "cdc": {"type": "logical", "database": "app", "plugin": "pgoutput"},
            "half": {"type": "logical", "database": "app"}, "Bad Name": 0, "text": "x"
        });
        let slots = PermanentSlot::read(Some(&section));
        let names: Vec<&str> = slots.iter().map(|slot| slot.name.as_str()).collect();
        assert_eq!(names, ["plain", "empty", "kept", "cdc"]);
        assert_eq!(slots[2].kept_in, KeptIn::Standby);
        let (database, plugin) = ("app".to_owned(), "pgoutput".to_owned());
        assert_eq!(slots[3].kind, SlotKind::Logical { database, plugin });
    }

    #[test]
    fn a_matcher_means_what_agrees_in_all_that_it_says() {
        let list = SlotMatcher::read(Some(&json!([{"type": "logical", "plugin": "x"}, {}])));
        assert_eq!(list.len(), 1, "nothing said matches nothing");
        assert!(list[0].matches("a", "logical", Some("db"), Some("x")));
        assert!(!list[0].matches("a", "physical", None, None));
    }
}

//! Faults in the store's contents: settings that change at any time, keys that are missing or make no sense.

use std::rc::Rc;

use kornak_cluster::{Revision, SyncMode};
use serde_json::{Value, json};

use crate::sim::world::World;

/// A key whose value was taken away.
#[derive(Debug, Clone)]
pub struct OddKey {
    key: String,
    /// The value that made sense.
    good: String,
    /// Revision of what is there instead; 0: nothing is.
    revision: Revision,
}

/// Changes one setting, as `PATCH /config` does.
pub fn change(w: &Rc<World>) {
    let count = 1 + w.rng.below(2);
    let (key, value) = match w.rng.below(6) {
        0 | 1 => ("ttl", json!(if w.rng.chance(500) { 5 } else { 22 })),
        2 => ("failsafe_mode", json!(w.rng.chance(500))),
        3 if w.plan.sync != SyncMode::Off => {
            ("synchronous_mode", if w.rng.chance(500) { json!(true) } else { json!("quorum") })
        }
        4 if w.plan.sync != SyncMode::Off => ("synchronous_node_count", json!(count)),
        _ => ("loop_wait", json!(count)),
    };
    patch(w, key, value);
}

/// Changes this setting.
pub fn patch(w: &Rc<World>, key: &str, value: Value) {
    w.note(format_args!("configuration: {key} is {value}"));
    if key == "pause" {
        let before = w.paused_since.get();
        w.paused_since.set((value == json!(true)).then(|| before.unwrap_or(w.exec.now())));
    }
    w.config.borrow_mut()[key] = value;
    let text = w.config.borrow().to_string();
    w.store.write(w, &w.store.keys.config(), Some(&text));
}

/// Takes the value of a key away that safety depends on.
pub fn spoil(w: &Rc<World>) {
    let keys = &w.store.keys;
    let key = match w.rng.below(3) {
        0 => keys.config(),
        1 => keys.sync(),
        _ => keys.failsafe(),
    };
    let Some((good, _)) = w.store.found(&key) else { return };
    if w.odd.borrow().iter().any(|odd| odd.key == key) {
        return;
    }
    let value = w.rng.chance(500).then_some("{");
    w.note(format_args!("{key} is {value:?}"));
    w.store.write(w, &key, value);
    let revision = w.store.found(&key).map_or(Revision::NONE, |(_, revision)| revision);
    w.odd.borrow_mut().push(OddKey { key, good, revision });
}

/// Puts back what nobody has written since.
pub fn restore(w: &Rc<World>) {
    for OddKey { key, good, revision } in w.odd.take() {
        let now = w.store.found(&key).map_or(Revision::NONE, |(_, revision)| revision);
        if now == revision {
            let config = (key == w.store.keys.config()).then(|| w.config.borrow().to_string());
            w.store.write(w, &key, Some(config.as_deref().unwrap_or(&good)));
        }
    }
}

/// Nothing is odd any more, and maintenance mode is over.
pub fn mend(w: &Rc<World>) {
    w.store.set_full(false);
    restore(w);
    if w.paused_since.get().is_some() {
        patch(w, "pause", json!(false));
    }
    if !w.plan.changing {
        return;
    }
    let truth = w.store.truth();
    let on = w.config.borrow()["failsafe_mode"] == json!(true);
    let primary = w.hosts.iter().any(|host| host.server.borrow().is_primary());
    if on && truth.failsafe.is_none() && !primary {
        // Nobody can know whether a list was there; the agents ask an operator for it.
        w.store.write(w, &w.store.keys.failsafe(), Some(&w.everybody()));
    }
}

//! The counters of an agent: decisions, failed steps, answers of the REST API. One instance per agent and not
//! global, because several agents may run in one process (`kornak demo`).
//!
//! Not here: the names and the text of the metrics (`api::metrics`).

use std::collections::BTreeMap;
use std::fmt::Debug;

use parking_lot::Mutex;

use crate::ha::{Decision, Job};

/// The events that are counted since the agent started.
#[derive(Debug, Default)]
pub struct Counters {
    /// By action and reason: both are closed lists.
    pub(crate) decisions: Mutex<BTreeMap<(String, String), u64>>,
    pub(crate) failures: Mutex<BTreeMap<String, u64>>,
    /// By status.
    pub(crate) answers: Mutex<BTreeMap<u16, u64>>,
}

impl Counters {
    /// The driver has decided.
    pub fn decided(&self, decision: &Decision) {
        let key = (words(&decision.action, '_'), words(&decision.why, '_'));
        *self.decisions.lock().entry(key).or_default() += 1;
    }

    /// A step was tried and did not succeed.
    pub fn step_failed(&self, job: Job) {
        *self.failures.lock().entry(words(&job, '_')).or_default() += 1;
    }

    pub(crate) fn answered(&self, status: u16) {
        *self.answers.lock().entry(status).or_default() += 1;
    }
}

/// The name of an enum's variant as words: `StartPrimary` is `start primary`. What the variant carries
/// is left out, for a label must come from a closed list.
pub(crate) fn words(variant: &impl Debug, separator: char) -> String {
    let name = format!("{variant:?}");
    let mut out = String::new();
    for c in name.chars().take_while(char::is_ascii_alphanumeric) {
        if c.is_ascii_uppercase() && !out.is_empty() {
            out.push(separator);
        }
        out.push(c.to_ascii_lowercase());
    }
    out
}

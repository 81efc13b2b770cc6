//! Settings that the operator's verbs take from a file: patronictl's own, or an agent's.

use kornak_cluster::GroupId;

use crate::agent::CtlSettings;
use crate::store::Etcd3Settings;

/// Everything is optional: arguments of the command line may say the rest.
#[derive(Debug, Clone, Default)]
pub struct OperatorSettings {
    /// The cluster's name, if the file is an agent's.
    pub scope: Option<String>,
    /// Default `service`.
    pub namespace: String,
    /// `Some`: a Citus cluster.
    pub group: Option<GroupId>,
    /// Whether the file has a `citus` section.
    pub citus: bool,
    pub store: Option<Etcd3Settings>,
    /// How to speak to REST.
    pub ctl: CtlSettings,
}

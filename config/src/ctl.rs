//! Settings that the operator's verbs take from a file: patronictl's own, or an agent's.

use std::path::Path;

use kornak_cluster::GroupId;

use crate::agent::{CtlSettings, ServerTls};
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
    /// The TLS settings with which this host's agent serves REST, if agents ask their clients for
    /// certificates.
    pub served_with: Option<ServerTls>,
    /// REST of this host's agent, `http(s)://host:port`, if the file is an agent's.
    pub agent: Option<String>,
}

impl OperatorSettings {
    /// Where `ctl` names no certificate, the host's own is shown to agents that ask for one, if its key `is_readable`.
    #[must_use]
    pub fn with_own_certificate(mut self, is_readable: impl Fn(&Path) -> bool) -> Self {
        let Some(own) = self.served_with.as_ref().filter(|_| self.ctl.certfile.is_none()) else {
            return self;
        };
        if is_readable(own.keyfile.as_ref().unwrap_or(&own.certfile)) {
            self.ctl.certfile = Some(own.certfile.clone());
            self.ctl.keyfile.clone_from(&own.keyfile);
            self.ctl.keyfile_password.clone_from(&own.keyfile_password);
        }
        self
    }
}

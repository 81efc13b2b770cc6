//! Reading of a file for the operator's verbs: little is needed and nothing is warned about, because the
//! file may be an agent's, a proxy's or patronictl's own.

use kornak_cluster::GroupId;

use super::agent::{basic_auth, ctl, served_with};
use crate::HostPort;
use crate::agent::VerifyClient;
use crate::ctl::OperatorSettings;
use crate::section::Section;

pub(crate) fn operator(root: &Section<'_>) -> OperatorSettings {
    let rest = root.section("restapi");
    let fallback = basic_auth(&rest.section("authentication"));
    let mut client = ctl(&root.section("ctl"), fallback);
    client.cacert = client.cacert.or_else(|| rest.path("cafile"));
    let group = root.section("citus").count("group", 0..=u64::from(u32::MAX));
    let address = rest.text("connect_address").and_then(|text| HostPort::parse(&text, None));
    let scheme = if rest.has("certfile") { "https" } else { "http" };
    OperatorSettings {
        agent: address.map(|address| format!("{scheme}://{address}")),
        scope: root.text("scope"),
        namespace: root.text("namespace").unwrap_or_else(|| super::DEFAULT_NAMESPACE.to_owned()),
        group: group.and_then(|group| u32::try_from(group).ok()).map(GroupId),
        citus: root.has("citus"),
        store: super::store::optional(root).valid(),
        ctl: client,
        served_with: served_with(&rest).filter(|own| own.verify_client != VerifyClient::None),
    }
}

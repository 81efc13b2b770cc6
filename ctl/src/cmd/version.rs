//! `kornak version`: ours, and those of a cluster's members.

use clap::Args;
use kornak_cluster::GroupId;
use kornak_cluster::member::COMPATIBLE_PATRONI_VERSION;
use serde_json::Value;

use crate::output::say;
use crate::target::{Global, Target};

#[derive(Debug, Args)]
pub struct VersionArgs {
    cluster_name: Option<String>,
    /// Only these members.
    member_names: Vec<String>,
    #[arg(long, value_parser = super::group)]
    group: Option<GroupId>,
}

/// Prints versions. The first line is patronictl's, for scripts read it.
///
/// # Errors
/// The cluster cannot be found or read.
pub async fn run(global: &Global, args: &VersionArgs) -> anyhow::Result<()> {
    say(&format!("patronictl version {COMPATIBLE_PATRONI_VERSION}"));
    if !super::is_patronictl(std::env::args_os().next().as_deref()) {
        say(&format!("kornak version {}", env!("CARGO_PKG_VERSION")));
    }
    let Some(name) = &args.cluster_name else { return Ok(()) };
    say("");
    let target = Target::find(global, Some(name))?;
    let cluster = target.read(args.group).await?;
    for member in cluster.groups.iter().flat_map(|group| &group.members) {
        let asked = args.member_names.is_empty() || args.member_names.contains(&member.name);
        if member.api.is_empty() || !asked {
            continue;
        }
        match target.status(member).await {
            Ok(status) => say(&format!("{}: {}", member.name, versions(&status))),
            Err(error) => say(&format!("{}: failed to get version: {error:#}", member.name)),
        }
    }
    Ok(())
}

fn versions(status: &Value) -> String {
    let patroni = status.pointer("/patroni/version").and_then(Value::as_str).unwrap_or("None");
    match status.get("server_version").and_then(Value::as_u64) {
        None => format!("Patroni {patroni}"),
        Some(old) if old < 100_000 => {
            let (major, minor, patch) = (old / 10_000, old / 100 % 100, old % 100);
            format!("Patroni {patroni} PostgreSQL {major}.{minor}.{patch}")
        }
        Some(new) => format!("Patroni {patroni} PostgreSQL {}.{}", new / 10_000, new % 100),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_members_versions_are_patronis_and_postgresqls() {
        for (status, expected) in [
            (
                json!({"server_version": 150_020, "patroni": {"version": "4.1.5"}}),
                "Patroni 4.1.5 PostgreSQL 15.20",
            ),
            (
                json!({"server_version": 90_624, "patroni": {"version": "3.0.0"}}),
                "Patroni 3.0.0 PostgreSQL 9.6.24",
            ),
            (json!({"patroni": {"version": "4.1.5"}}), "Patroni 4.1.5"),
        ] {
            assert_eq!(versions(&status), expected);
        }
    }
}

//! Checks of an agent's file that only its host can make: whether PostgreSQL's programs are where it says, fit
//! the data, and take the parameters. Warnings, for the file may be checked elsewhere.

use std::path::Path;

use kornak_config::{AgentSettings, Environment, Finding, Kind, Severity};
use serde_json::{Map, Value};

/// Everything that is odd. Nothing about a file that an agent would refuse, or that is a proxy's.
pub(super) fn findings(file: &Path, environment: &Environment) -> Vec<Finding> {
    let agents = kornak_config::kind(file).is_ok_and(|kind| kind == Kind::Agent);
    let loaded = kornak_config::load_agent(Some(file), environment);
    let Some(loaded) = loaded.ok().filter(|_| agents) else { return Vec::new() };
    let texts = match programs(&loaded.settings) {
        Ok(()) => parameters(&loaded.settings),
        Err(text) => vec![text],
    };
    let text = |text| format!("{}: {text}", file.display());
    texts.into_iter().map(|it| Finding { severity: Severity::Warning, text: text(it) }).collect()
}

fn programs(settings: &AgentSettings) -> Result<(), String> {
    let postgresql = &settings.postgresql;
    let Some(bin_dir) = &postgresql.bin_dir else { return Ok(()) };
    for name in ["postgres", "pg_controldata", "pg_basebackup", "pg_rewind", "initdb"] {
        let program = postgresql.program(name);
        if !program.exists() {
            let program = program.display();
            return Err(format!("postgresql.bin_dir: there is no {program} on this host"));
        }
    }
    let data = std::fs::read_to_string(postgresql.data_dir.join("PG_VERSION"));
    let told = std::process::Command::new(postgresql.program("postgres")).arg("--version").output();
    let told = told.map(|output| String::from_utf8_lossy(&output.stdout).into_owned());
    let (Ok(data), Ok(told)) = (data, told) else { return Ok(()) };
    let major = told.split_whitespace().nth(2).and_then(|number| number.split('.').next());
    match major.is_some_and(|major| major == data.trim()) {
        true => Ok(()),
        false => Err(format!(
            "postgresql.bin_dir: {} holds {}, and the data in {} is of PostgreSQL {}",
            bin_dir.display(),
            told.trim(),
            postgresql.data_dir.display(),
            data.trim()
        )),
    }
}

/// Parameters that this host's PostgreSQL would not start with; an agent leaves them out.
fn parameters(settings: &AgentSettings) -> Vec<String> {
    let postgresql = &settings.postgresql;
    let dynamic = settings.bootstrap.dcs.get("postgresql");
    let section = |name: &str| dynamic?.get(name)?.as_object().cloned();
    let places: [(&str, Map<String, Value>); 4] = [
        ("postgresql.parameters", postgresql.parameters.clone()),
        ("postgresql.recovery_conf", postgresql.recovery_conf.clone()),
        ("bootstrap.dcs.postgresql.parameters", section("parameters").unwrap_or_default()),
        ("bootstrap.dcs.postgresql.recovery_conf", section("recovery_conf").unwrap_or_default()),
    ];
    let Ok(runtime) = tokio::runtime::Builder::new_current_thread().enable_all().build() else {
        return Vec::new();
    };
    let program = postgresql.program("postgres");
    let mut texts = Vec::new();
    for (place, parameters) in places.iter().filter(|(_, parameters)| !parameters.is_empty()) {
        let asked = kornak_agent::postgres::refused_parameters(&program, parameters);
        // Without the program nobody knows.
        let refused = runtime.block_on(asked).unwrap_or_default();
        texts.extend(refused.values().map(|why| format!("{place}: left out by an agent: {why}")));
    }
    texts
}

#[cfg(test)]
mod tests {
    use super::*;

    const FILE: &str = "scope: demo\nname: a\nrestapi: {listen: '127.0.0.1:8008'}\n\
                        etcd3: {hosts: ['x:1']}\nbootstrap:\n  dcs:\n    postgresql:\n      \
                        parameters: {max_connections: lots}\npostgresql:\n  listen: 127.0.0.1:1\n  \
                        data_dir: /nowhere\n  parameters: {shared_bufers: 1}\n  \
                        authentication: {replication: {username: r}}\n";

    fn said(text: &str) -> Vec<String> {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), text).unwrap();
        findings(file.path(), &[]).iter().map(ToString::to_string).collect()
    }

    #[test]
    fn this_hosts_programs_are_looked_for_and_asked() {
        let [missing] = &said(&format!("{FILE}  bin_dir: /nowhere\n"))[..] else { panic!("one") };
        assert!(
            missing.ends_with("bin_dir: there is no /nowhere/postgres on this host"),
            "{missing}"
        );
        assert!(said("scope: demo\nproxy: {}\n").is_empty(), "a proxy has no programs");
        let Some(bin) = std::fs::read_dir("/usr/lib/postgresql").ok().and_then(|all| {
            all.flatten().map(|it| it.path().join("bin")).find(|it| it.join("postgres").exists())
        }) else {
            return;
        };
        let found = said(&format!("{FILE}  bin_dir: {}\n", bin.display()));
        let [local, shared] = &found[..] else { panic!("{found:?}") };
        assert!(local.contains("postgresql.parameters: left out"), "{local}");
        assert!(local.contains("shared_bufers"), "{local}");
        assert!(shared.contains("bootstrap.dcs.postgresql.parameters"), "{shared}");
        assert!(shared.contains("max_connections"), "{shared}");
    }
}

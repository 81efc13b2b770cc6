//! Effects of a changed file of an agent while the agent runs.
//!
//! Most settings do: the agent begins anew with them, around a server that goes on. What names the
//! node, its data or its sockets belongs to the process; such keys keep their value, and the operator
//! is told which ones wait for a restart.

use secrecy::ExposeSecret;

use crate::agent::AgentSettings;
use crate::store::StoreSettings;

/// The settings that hold from now on, and the keys whose change needs a restart of the agent.
pub fn agent(old: &AgentSettings, new: AgentSettings) -> (AgentSettings, Vec<&'static str>) {
    let mut merged = new;
    let mut waiting = Vec::new();
    let mut keep = |key: &'static str, same: bool| {
        if !same {
            waiting.push(key);
        }
    };
    let https = |settings: &AgentSettings| settings.restapi.tls.is_some();
    keep("name", old.name == merged.name);
    keep("scope", old.scope == merged.scope);
    keep("citus", old.citus == merged.citus);
    keep("etcd3", same_store(&old.store, &merged.store));
    keep("restapi.listen", old.restapi.listen == merged.restapi.listen);
    keep("restapi.certfile", https(old) == https(&merged));
    keep("postgresql.listen", old.postgresql.listen == merged.postgresql.listen);
    keep("postgresql.data_dir", old.postgresql.data_dir == merged.postgresql.data_dir);
    keep("postgresql.config_dir", old.postgresql.config_dir == merged.postgresql.config_dir);
    keep("kornak.os_user", old.kornak.os_user == merged.kornak.os_user);
    keep("kornak.state_dir", old.kornak.state_dir == merged.kornak.state_dir);
    keep("kornak.guard", old.kornak.guard == merged.kornak.guard);
    let form = |settings: &AgentSettings| {
        let log = &settings.log;
        (log.kind, log.format.clone(), log.date_format.clone(), log.dir.clone(), log.file_size)
    };
    keep("log (but for the levels)", form(old) == form(&merged));

    merged.name.clone_from(&old.name);
    merged.scope = old.scope.clone();
    merged.citus.clone_from(&old.citus);
    merged.store = old.store.clone();
    merged.restapi.listen = old.restapi.listen.clone();
    if https(old) != https(&merged) {
        merged.restapi.tls.clone_from(&old.restapi.tls);
    }
    merged.postgresql.listen = old.postgresql.listen.clone();
    merged.postgresql.data_dir.clone_from(&old.postgresql.data_dir);
    merged.postgresql.config_dir.clone_from(&old.postgresql.config_dir);
    merged.kornak.os_user.clone_from(&old.kornak.os_user);
    merged.kornak.state_dir.clone_from(&old.kornak.state_dir);
    merged.kornak.guard = old.kornak.guard.clone();
    (merged, waiting)
}

/// Whether nothing is different, secrets included.
pub fn is_same(a: &AgentSettings, b: &AgentSettings) -> bool {
    // Secrets print as nothing, so they are compared apart.
    format!("{a:?}") == format!("{b:?}") && secrets(a) == secrets(b)
}

fn secrets(settings: &AgentSettings) -> Vec<Option<&str>> {
    let postgresql = &settings.postgresql;
    let roles =
        [Some(&postgresql.superuser), Some(&postgresql.replication), postgresql.rewind.as_ref()];
    let of_roles = roles.into_iter().flat_map(|role| {
        [role.and_then(|it| it.password.as_ref()), role.and_then(|it| it.sslpassword.as_ref())]
    });
    let (rest, ctl) = (&settings.restapi, &settings.ctl);
    let of_rest = [
        rest.authentication.as_ref().map(|auth| &auth.password),
        rest.tls.as_ref().and_then(|tls| tls.keyfile_password.as_ref()),
        ctl.authentication.as_ref().map(|auth| &auth.password),
        ctl.keyfile_password.as_ref(),
    ];
    of_roles.chain(of_rest).map(|secret| secret.map(ExposeSecret::expose_secret)).collect()
}

fn same_store(a: &StoreSettings, b: &StoreSettings) -> bool {
    match (a, b) {
        (StoreSettings::Memory, StoreSettings::Memory) => true,
        (StoreSettings::Etcd3(a), StoreSettings::Etcd3(b)) => {
            let secret = |it: &crate::Etcd3Settings| {
                it.password.as_ref().map(|password| password.expose_secret().to_owned())
            };
            a.endpoints() == b.endpoints()
                && (&a.username, &a.cacert, &a.cert, &a.key)
                    == (&b.username, &b.cacert, &b.cert, &b.key)
                && secret(a) == secret(b)
        }
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A file with these lines at its top level and below `postgresql` and `restapi`.
    fn read(top: &str, postgresql: &str, restapi: &str) -> AgentSettings {
        let text = format!(
            "{{scope: demo, name: a, {top} restapi: {{listen: '127.0.0.1:1', {restapi}}}, postgresql: \
             {{listen: '127.0.0.1:2', data_dir: /d, {postgresql} authentication: \
             {{replication: {{username: r}}}}}}}}"
        );
        let environment = [("PATRONI_CONFIGURATION".to_owned(), text)];
        crate::load_agent(None, &environment).expect("it is right").settings
    }

    #[test]
    fn what_belongs_to_the_process_waits_and_the_rest_holds() {
        let old = read("etcd3: {hosts: 'h:1'}, tags: {x: 1},", "", "");
        let new = read(
            "etcd3: {hosts: 'h:1'}, kornak: {handover: {max_hold: 2}}, log: {level: DEBUG},",
            "parameters: {work_mem: 8MB},",
            "allowlist: [10.0.0.0/8]",
        );
        let (merged, waiting) = agent(&old, new);
        assert!(waiting.is_empty(), "{waiting:?}");
        assert_eq!(merged.kornak.handover.max_hold.as_secs(), 2);
        assert_eq!(merged.restapi.allowlist, ["10.0.0.0/8"]);
        assert_eq!(merged.postgresql.parameters.len(), 1);
        assert!(merged.tags.is_empty());
        assert!(is_same(&old, &old) && !is_same(&old, &merged));
        let with = |word: &str| {
            let login = format!("authentication: {{username: u, password: {word}}}");
            read("etcd3: {hosts: 'h:1'},", "", &login)
        };
        assert!(!is_same(&with("one"), &with("two")), "a password has changed");

        let new = read("etcd3: {hosts: 'h:2'}, log: {dir: /x},", "config_dir: /c,", "certfile: /x");
        let (merged, waiting) = agent(&old, new);
        assert_eq!(
            waiting,
            ["etcd3", "restapi.certfile", "postgresql.config_dir", "log (but for the levels)"]
        );
        assert_eq!(merged.postgresql.config_dir, old.postgresql.config_dir);
        assert!(merged.restapi.tls.is_none());
    }
}

//! Effects of a changed file of an agent or a proxy while it runs.
//!
//! Most settings take effect: the agent begins anew with them, around a server that goes on, and the proxy
//! goes on with its sessions. What names the node, its data or its sockets belongs to the process; such keys
//! keep their value, and the operator is told which ones wait for a restart.

use secrecy::ExposeSecret;

use crate::agent::AgentSettings;
use crate::proxy::{AuthSettings, ListenerSettings, ProxySettings, Source, StatusSettings};
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

/// The settings of a proxy that hold from now on, and the keys whose change needs a restart.
pub fn proxy(old: &ProxySettings, new: ProxySettings) -> (ProxySettings, Vec<String>) {
    let mut merged = new;
    let mut waiting = Vec::new();
    let mut keep = |key: &str, same: bool| {
        if !same {
            waiting.push(key.to_owned());
        }
    };
    keep("scope", old.scope == merged.scope);
    keep("proxy.name", old.name == merged.name);
    keep("etcd3, static or rest", same_source(&old.source, &merged.source));
    keep("proxy.connect_address", old.connect_address == merged.connect_address);
    keep("proxy.status", same_status(old.status.as_ref(), merged.status.as_ref()));
    keep("proxy.auth (but for the rules)", same_login(&old.auth, &merged.auth));
    keep("proxy.state_file", old.state_file == merged.state_file);
    keep("proxy.threads", old.threads == merged.threads);
    let form = |settings: &ProxySettings| {
        let log = &settings.log;
        (log.kind, log.format.clone(), log.date_format.clone(), log.dir.clone(), log.file_size)
    };
    keep("log (but for the levels)", form(old) == form(&merged));
    merged.listeners = listeners(&old.listeners, merged.listeners, &mut waiting);

    merged.scope = old.scope.clone();
    merged.name.clone_from(&old.name);
    merged.source = old.source.clone();
    merged.connect_address.clone_from(&old.connect_address);
    merged.status.clone_from(&old.status);
    let rules = std::mem::take(&mut merged.auth.rules);
    merged.auth = AuthSettings { rules, ..old.auth.clone() };
    merged.state_file.clone_from(&old.state_file);
    merged.threads = old.threads;
    (merged, waiting)
}

/// The listeners from now on: where they listen, where they lead to and whether they pool stays.
fn listeners(
    old: &[ListenerSettings],
    new: Vec<ListenerSettings>,
    waiting: &mut Vec<String>,
) -> Vec<ListenerSettings> {
    let names = |of: &[ListenerSettings]| of.iter().map(|it| it.name.clone()).collect::<Vec<_>>();
    if names(old) != names(&new) {
        waiting.push("proxy.listeners (which there are)".to_owned());
        return old.to_vec();
    }
    let merge = |(old, new): (&ListenerSettings, ListenerSettings)| {
        for (key, same) in [
            ("listen", old.listen == new.listen),
            ("target", old.target == new.target),
            ("pool_mode", old.pool_mode == new.pool_mode),
        ] {
            if !same {
                waiting.push(format!("proxy.listeners.{}.{key}", old.name));
            }
        }
        ListenerSettings {
            listen: old.listen.clone(),
            target: old.target.clone(),
            pool_mode: old.pool_mode,
            ..new
        }
    };
    old.iter().zip(new).map(merge).collect()
}

fn same_source(a: &Source, b: &Source) -> bool {
    match (a, b) {
        (Source::Dcs(a), Source::Dcs(b)) => same_store(a, b),
        (Source::Static { members: a }, Source::Static { members: b }) => a == b,
        (Source::Rest { members: a }, Source::Rest { members: b }) => a == b,
        _ => false,
    }
}

fn same_status(a: Option<&StatusSettings>, b: Option<&StatusSettings>) -> bool {
    let login = |it: &StatusSettings| {
        let login = it.authentication.as_ref();
        login.map(|it| (it.username.clone(), it.password.expose_secret().to_owned()))
    };
    let (Some(a), Some(b)) = (a, b) else { return a.is_none() && b.is_none() };
    a.listen == b.listen && a.tls == b.tls && login(a) == login(b)
}

fn same_login(a: &AuthSettings, b: &AuthSettings) -> bool {
    let secret = |it: &AuthSettings| it.password.as_ref().map(|it| it.expose_secret().to_owned());
    (&a.user, &a.database, &a.query, a.require_auth)
        == (&b.user, &b.database, &b.query, b.require_auth)
        && secret(a) == secret(b)
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

    fn read_proxy(proxy: &str, log: &str) -> ProxySettings {
        let text = format!(
            "{{scope: demo, static: {{members: [{{name: a, host: h}}]}}, log: {{{log}}}, proxy: {{{proxy}}}}}"
        );
        let environment = [("PATRONI_CONFIGURATION".to_owned(), text)];
        crate::load_proxy(None, &environment).expect("it is right").settings
    }

    #[test]
    fn a_proxy_goes_on_with_other_limits_and_says_what_waits() {
        let auth = "auth: {method: scram, user: u, password: p}";
        let listener =
            |more: &str| format!("listeners: [{{name: x, listen: '*:1', target: primary{more}}}]");
        let old = read_proxy(&format!("{auth}, {}", listener("")), "");
        let new = format!(
            "{auth}, {}, limits: {{max_clients: 7, client_idle_timeout: 5s}}, pool: {{size: 3}}, \
             failover: {{listen: move}}, log_connections: true",
            listener(", pool_size: 9, balance: random")
        );
        let (merged, waiting) = proxy(&old, read_proxy(&new, "level: DEBUG"));
        assert!(waiting.is_empty(), "{waiting:?}");
        assert_eq!((merged.limits.max_clients, merged.pool.size), (7, 3));
        assert_eq!(merged.listeners[0].pool_size, Some(9));
        assert!(merged.log_connections);

        let new = format!(
            "auth: {{method: trust, user: u, password: q}}, threads: 3, status: false, {}",
            listener(", pool_mode: transaction, max_servers: 4")
        );
        let (merged, waiting) = proxy(&old, read_proxy(&new, "dir: /x"));
        let expected = [
            "proxy.status",
            "proxy.auth (but for the rules)",
            "proxy.threads",
            "log (but for the levels)",
            "proxy.listeners.x.pool_mode",
        ];
        assert_eq!(waiting, expected);
        assert_eq!(merged.auth.rules.rules[0].method, crate::rules::Method::Trust);
        assert!(same_login(&old.auth, &merged.auth) && merged.threads.is_none());
        assert_eq!(merged.listeners[0].max_servers, Some(4));
        assert_eq!(merged.listeners[0].pool_mode, old.listeners[0].pool_mode);

        let (merged, waiting) = proxy(&old, read_proxy(auth, ""));
        assert_eq!(waiting, ["proxy.listeners (which there are)"]);
        assert_eq!(merged.listeners, old.listeners);
    }
}

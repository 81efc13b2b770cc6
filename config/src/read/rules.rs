//! `proxy.auth.rules` and `proxy.auth.maps`.

use crate::rules::{
    CertificateName, ClientCert, Connection, Database, MapLine, Method, Network, Pattern, Rule,
    Rules,
};
use crate::section::Section;

const METHODS: &str = "one of trust, reject, scram, md5, cert, relay";

/// Reads both, or makes the one rule of a file that has none.
pub(super) fn rules(section: &Section<'_>, default: Method, listeners: &[String]) -> Rules {
    let maps = maps(&section.section("maps"));
    let expected = "a list of {type, listener, user, database, address, method}";
    let Some(items) = section.sections("rules", expected) else {
        return Rules { rules: vec![Rule::everybody(default)], maps };
    };
    if section.has("method") {
        section.problem("method", "expected either method or rules; a last rule is for the rest");
    }
    if items.is_empty() {
        section.problem("rules", "expected at least one rule: without any nobody can log in");
    }
    let mut rules = Vec::with_capacity(items.len());
    for item in &items {
        let Some(rule) = rule(item, listeners) else { continue };
        if let Method::Cert { map: Some(map), .. } = &rule.method
            && !maps.contains_key(map)
        {
            item.problem("map", format!("expected the name of one of maps, found {map:?}"));
        }
        rules.push(rule);
    }
    Rules { rules, maps }
}

fn rule(item: &Section<'_>, listeners: &[String]) -> Option<Rule> {
    item.only(&[
        "type",
        "listener",
        "user",
        "database",
        "address",
        "method",
        "map",
        "clientname",
        "clientcert",
    ]);
    let connections = [
        ("host", Connection::Host),
        ("hostssl", Connection::HostSsl),
        ("hostnossl", Connection::HostNoSsl),
    ];
    let connection = item.word("type", &connections).unwrap_or_default();
    let names = item.texts("listener", ',').unwrap_or_default();
    for name in names.iter().filter(|name| *name != "all" && !listeners.contains(name)) {
        item.problem("listener", format!("expected the name of a listener, found {name:?}"));
    }
    let everywhere = names.iter().any(|name| name == "all");
    let clientcerts =
        [("verify-ca", ClientCert::VerifyCa), ("verify-full", ClientCert::VerifyFull)];
    let clientcert = item.word("clientcert", &clientcerts).unwrap_or_default();
    let method = method(item)?;
    let certificate = clientcert != ClientCert::NotNeeded || matches!(method, Method::Cert { .. });
    if certificate && connection != Connection::HostSsl {
        item.expected("type", "hostssl: certificates are shown under TLS only");
    }
    Some(Rule {
        listeners: if everywhere { Vec::new() } else { names },
        connection,
        users: patterns(item, "user"),
        databases: patterns(item, "database").into_iter().map(database).collect(),
        addresses: addresses(item),
        method,
        clientcert,
    })
}

fn method(item: &Section<'_>) -> Option<Method> {
    let text = item.text("method");
    let names = [("CN", CertificateName::CommonName), ("DN", CertificateName::DistinguishedName)];
    let name = item.word("clientname", &names).unwrap_or_default();
    let method = match text.as_deref() {
        Some("trust") => Method::Trust,
        Some("reject") => Method::Reject,
        Some("scram" | "scram-sha-256") => Method::Scram,
        Some("md5") => Method::Md5,
        Some("cert") => Method::Cert { map: item.text("map"), name },
        Some("relay") => Method::Relay,
        _ => {
            item.expected("method", METHODS);
            return None;
        }
    };
    if !matches!(method, Method::Cert { .. }) && (item.has("map") || item.has("clientname")) {
        item.problem("map", "expected with the method cert only");
    }
    Some(method)
}

fn patterns(item: &Section<'_>, key: &str) -> Vec<Pattern> {
    let mut found = Vec::new();
    for text in item.texts(key, ',').unwrap_or_default() {
        if text.starts_with('+') {
            let message = "expected names; the proxy does not know who is a member of which role";
            item.problem(key, message);
        }
        match Pattern::parse(&text) {
            Ok(pattern) => found.push(pattern),
            Err(error) => item.problem(key, format!("expected a regular expression: {error}")),
        }
    }
    found
}

fn database(pattern: Pattern) -> Database {
    match pattern {
        Pattern::Name(name) if name == "sameuser" => Database::SameUser,
        Pattern::Name(name) if name == "replication" => Database::Replication,
        pattern => Database::Named(pattern),
    }
}

fn addresses(item: &Section<'_>) -> Vec<Network> {
    let texts = item.texts("address", ',').unwrap_or_default();
    if texts.iter().any(|text| text == "all") {
        return Vec::new();
    }
    let mut networks = Vec::with_capacity(texts.len());
    for text in texts {
        match Network::parse(&text) {
            Some(network) => networks.push(network),
            None => {
                let message =
                    format!("expected an address or a range like 10.0.0.0/8, found {text:?}");
                item.problem("address", message);
            }
        }
    }
    networks
}

fn maps(section: &Section<'_>) -> std::collections::BTreeMap<String, Vec<MapLine>> {
    let expected = "a list of {certificate, role}";
    let mut maps = std::collections::BTreeMap::new();
    for (name, _) in section.entries() {
        let mut lines = Vec::new();
        for item in section.sections(name, expected).unwrap_or_default() {
            item.only(&["certificate", "role"]);
            let pattern = item.text("certificate").map(|text| Pattern::parse(&text));
            let expected = "a name, or a regular expression behind a slash";
            let certificate = match pattern {
                Some(Err(error)) => {
                    item.problem("certificate", format!("expected {expected}: {error}"));
                    None
                }
                Some(Ok(pattern)) => Some(pattern),
                None => item.required("certificate", expected, None),
            };
            let role = item.required("role", "a role", item.text("role"));
            let (Some(certificate), Some(role)) = (certificate, role) else { continue };
            lines.push(MapLine { certificate, role });
        }
        maps.insert(name.clone(), lines);
    }
    maps
}

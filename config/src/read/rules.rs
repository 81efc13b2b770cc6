//! `proxy.auth.rules` and `proxy.auth.maps`.

use serde_json::Value;

use crate::rules::{
    CertificateName, ClientCert, Connection, Database, MapLine, Method, Network, Pattern, Rule,
    Rules,
};
use crate::section::{Section, scalar_text};

/// `NAMEDATALEN - 1` of PostgreSQL: no role and no database has a longer name.
const MAX_NAME_BYTES: usize = 63;

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
        users: patterns(item, "user").into_iter().map(|(_, pattern)| pattern).collect(),
        databases: databases(item),
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

/// A word as `pg_hba.conf` has it: what stands within double quotes means nothing but itself.
#[derive(Debug, PartialEq, Eq)]
struct Word {
    text: String,
    quoted: bool,
}

/// Takes a list of words apart at commas that stand outside of quotes.
fn split(text: &str) -> Result<Vec<Word>, &'static str> {
    let (mut words, mut word) = (Vec::new(), Word { text: String::new(), quoted: false });
    let (mut inside, mut quoted_blanks) = (false, 0);
    let mut letters = text.trim().chars().peekable();
    while let Some(letter) = letters.next() {
        match letter {
            '"' if inside && letters.peek() == Some(&'"') => {
                letters.next();
                word.text.push('"');
            }
            '"' => {
                word.quoted |= !inside && word.text.is_empty();
                inside = !inside;
                quoted_blanks = word.text.len();
            }
            ',' if !inside => {
                words.push(std::mem::replace(
                    &mut word,
                    Word { text: String::new(), quoted: false },
                ));
                quoted_blanks = 0;
            }
            letter if !inside && letter.is_whitespace() && word.text.is_empty() => {}
            letter => word.text.push(letter),
        }
        if matches!(letters.peek(), Some(',') | None) && !inside {
            let end = word.text.trim_end().len().max(quoted_blanks);
            word.text.truncate(end);
        }
    }
    if inside {
        return Err("a quote that is closed again");
    }
    words.push(word);
    words.retain(|word| word.quoted || !word.text.is_empty());
    Ok(words)
}

/// The words of a text, or of a list of texts each of which is one.
fn words(item: &Section<'_>, key: &str) -> Vec<Word> {
    let found = match item.value(key) {
        None => return Vec::new(),
        Some(Value::String(text)) => split(text),
        Some(Value::Array(items)) => items.iter().map(one_word).collect(),
        Some(_) => Err("a list of names"),
    };
    found.unwrap_or_else(|expected| {
        item.expected(key, expected);
        Vec::new()
    })
}

/// A regular expression may have commas and quotes in it; elsewhere they have to be quoted.
fn one_word(value: &Value) -> Result<Word, &'static str> {
    let text = scalar_text(value).ok_or("a list of names")?;
    if text.starts_with('/') {
        return Ok(Word { text, quoted: false });
    }
    let mut words = split(&text)?;
    match (words.pop(), words.is_empty()) {
        (Some(word), true) => Ok(word),
        _ => {
            Err("one name in each place of the list; a comma in a name has to be in double quotes")
        }
    }
}

/// Reason to refuse a word: a meaning in `pg_hba.conf` that a proxy cannot know, or a name that no role can have.
fn refused(word: &Word) -> Option<&'static str> {
    let text = word.text.as_str();
    match text.chars().next() {
        None => Some("a name, found an empty one"),
        Some('/') => None,
        Some('+') if !word.quoted => {
            Some("names; the proxy does not know who is a member of which role")
        }
        Some('@') if !word.quoted => Some("names; those of a file have to be written here"),
        Some('\'') if !word.quoted => Some("a name without quotes or in double ones"),
        _ if text.len() > MAX_NAME_BYTES => Some("a name of 63 bytes at most"),
        _ => None,
    }
}

fn patterns(item: &Section<'_>, key: &str) -> Vec<(Word, Pattern)> {
    let mut found = Vec::new();
    for word in words(item, key) {
        if let Some(expected) = refused(&word) {
            item.problem(key, format!("expected {expected}: {:?}", word.text));
            continue;
        }
        let pattern = match word.quoted {
            true => Pattern::name(&word.text),
            false => Pattern::parse(&word.text),
        };
        match pattern {
            Ok(pattern) => found.push((word, pattern)),
            Err(error) => item.problem(key, format!("expected a regular expression: {error}")),
        }
    }
    found
}

fn databases(item: &Section<'_>) -> Vec<Database> {
    let mut found = Vec::new();
    for (word, pattern) in patterns(item, "database") {
        found.push(match word.text.as_str() {
            _ if word.quoted => Database::Named(pattern),
            "sameuser" => Database::SameUser,
            "replication" => Database::Replication,
            "samerole" | "samegroup" => {
                let message = "expected names; the proxy does not know who is a member of which \
                               role (a database of this name stands in double quotes)";
                item.problem("database", message);
                continue;
            }
            _ => Database::Named(pattern),
        });
    }
    found
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

/// Without the double quotes around it.
fn unquoted(text: &str) -> &str {
    text.strip_prefix('"').and_then(|rest| rest.strip_suffix('"')).unwrap_or(text)
}

fn maps(section: &Section<'_>) -> std::collections::BTreeMap<String, Vec<MapLine>> {
    let expected = "a list of {certificate, role}";
    let mut maps = std::collections::BTreeMap::new();
    for (name, _) in section.entries() {
        let mut lines = Vec::new();
        for item in section.sections(name, expected).unwrap_or_default() {
            item.only(&["certificate", "role"]);
            let pattern = item.text("certificate").map(|text| Pattern::name(unquoted(&text)));
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
            let means_more = |role: &String| role == "all" || role.starts_with(['+', '/']);
            if role.as_ref().is_some_and(means_more) {
                item.expected("role", "one role's name; in double quotes if it looks like a rule");
            }
            let role = role.map(|role| unquoted(&role).to_owned());
            let (Some(certificate), Some(role)) = (certificate, role) else { continue };
            lines.push(MapLine { certificate, role });
        }
        maps.insert(name.clone(), lines);
    }
    maps
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_taken_apart_as_in_pg_hba() {
        let check = |text: &str, expected: &[(&str, bool)]| {
            let found = split(text).expect(text);
            let found: Vec<_> = found.iter().map(|it| (it.text.as_str(), it.quoted)).collect();
            assert_eq!(found, expected, "{text}");
        };
        check("all", &[("all", false)]);
        check("\"all\"", &[("all", true)]);
        check("a, b ,c", &[("a", false), ("b", false), ("c", false)]);
        check("\"a,b\", c", &[("a,b", true), ("c", false)]);
        check("\" a \" , b", &[(" a ", true), ("b", false)]);
        check("\"say \"\"x\"\"\"", &[("say \"x\"", true)]);
        check("a\"b,c\"", &[("ab,c", false)]);
        check("joe smith", &[("joe smith", false)]);
        check("\"/^a{1,2}$\"", &[("/^a{1,2}$", true)]);
        check(" , a,", &[("a", false)]);
        assert!(split("\"a").is_err());
        assert!(one_word(&Value::from("a,b")).is_err());
        assert_eq!(one_word(&Value::from("/^a{1,2}$")).unwrap().text, "/^a{1,2}$");
        assert!(one_word(&Value::from("\"all\"")).unwrap().quoted);
    }
}

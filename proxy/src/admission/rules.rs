//! Which rule decides about a login. Pure; what a rule can say is in [`kornak_config::rules`].

use std::net::IpAddr;

use kornak_config::rules::{
    CertificateName, ClientCert, Connection, Database, MapLine, Method, Rule, Rules,
};
use kornak_protocol::startup::Replication;

use crate::net::tls::names;

/// A login, before it has proved anything.
#[derive(Debug, Clone, Copy)]
pub struct Visit<'a> {
    /// Name of the listener.
    pub listener: &'a str,
    pub is_tls: bool,
    pub user: &'a [u8],
    pub database: &'a [u8],
    pub replication: Replication,
    /// Where it connects from, as far as we know.
    pub address: IpAddr,
    /// Where it says that it connects from, if nobody vouches for that.
    pub claimed: Option<IpAddr>,
}

/// The first rule that fits.
pub fn first<'r>(rules: &'r [Rule], visit: &Visit<'_>) -> Option<&'r Rule> {
    rules.iter().find(|rule| fits(rule, visit))
}

fn fits(rule: &Rule, visit: &Visit<'_>) -> bool {
    let connection = match rule.connection {
        Connection::Host => true,
        Connection::HostSsl => visit.is_tls,
        Connection::HostNoSsl => !visit.is_tls,
    };
    let database = |wanted: &Database| match wanted {
        // As in pg_hba.conf, `all` does not mean replication.
        Database::Named(_) | Database::SameUser if visit.replication == Replication::Physical => {
            false
        }
        Database::Named(pattern) => pattern.fits(visit.database),
        Database::SameUser => visit.database == visit.user,
        Database::Replication => visit.replication == Replication::Physical,
    };
    let any = |empty: bool, found: bool| empty || found;
    connection
        && any(rule.listeners.is_empty(), rule.listeners.iter().any(|name| name == visit.listener))
        && any(rule.users.is_empty(), rule.users.iter().any(|user| user.fits(visit.user)))
        && any(rule.databases.is_empty(), rule.databases.iter().any(database))
        && any(rule.addresses.is_empty(), address_fits(rule, visit))
}

/// A claim helps nobody: who claims an address is refused for it, and not let in for it alone.
fn address_fits(rule: &Rule, visit: &Visit<'_>) -> bool {
    let lies_in = |address| rule.addresses.iter().any(|network| network.contains(address));
    let own = lies_in(visit.address);
    match visit.claimed.map(lies_in) {
        None => own,
        Some(claimed) if rule.method == Method::Reject => own || claimed,
        Some(claimed) => own && claimed,
    }
}

/// Whether the client's certificate, already verified, is what the rule asks for.
pub fn certificate_fits(
    rules: &Rules,
    rule: &Rule,
    certificate: Option<&[u8]>,
    user: &[u8],
) -> bool {
    let named = |by: CertificateName, map: Option<&Vec<MapLine>>| {
        let Some(parsed) = certificate.and_then(|der| names::parse(der).ok()) else { return false };
        let name = match by {
            CertificateName::CommonName => names::common_name(&parsed).map(str::to_owned),
            CertificateName::DistinguishedName => names::distinguished_name(&parsed),
        };
        let Some(name) = name.filter(|name| !name.is_empty()) else { return false };
        match map {
            None => name.as_bytes() == user,
            Some(lines) => lines.iter().any(|line| line.allows(&name, user)),
        }
    };
    let extra = match rule.clientcert {
        ClientCert::NotNeeded => true,
        ClientCert::VerifyCa => certificate.is_some(),
        ClientCert::VerifyFull => named(CertificateName::CommonName, None),
    };
    extra
        && match &rule.method {
            Method::Cert { map: None, name } => named(*name, None),
            // A map that is not there allows nobody.
            Method::Cert { map: Some(map), name } => {
                rules.maps.get(map).is_some_and(|lines| named(*name, Some(lines)))
            }
            _ => true,
        }
}

#[cfg(test)]
mod tests {
    use kornak_config::rules::{Network, Pattern};
    use rcgen::{CertificateParams, DistinguishedName, DnType, KeyPair};

    use super::*;

    fn visit() -> Visit<'static> {
        Visit {
            listener: "primary",
            is_tls: true,
            user: b"app",
            database: b"shop",
            replication: Replication::None,
            address: "10.1.2.3".parse().unwrap(),
            claimed: None,
        }
    }

    fn rule() -> Rule {
        Rule::everybody(Method::Scram)
    }

    fn pattern(text: &str) -> Vec<Pattern> {
        vec![Pattern::parse(text).unwrap()]
    }

    fn database(text: &str) -> Vec<Database> {
        pattern(text).into_iter().map(Database::Named).collect()
    }

    fn check(rule: &Rule, visit: Visit<'_>, expected: bool) {
        assert_eq!(
            first(std::slice::from_ref(rule), &visit).is_some(),
            expected,
            "{rule:?} for {visit:?}"
        );
    }

    #[test]
    fn a_rule_fits_by_what_it_names() {
        check(&rule(), visit(), true);
        for (name, expected) in [("primary", true), ("standbys", false)] {
            check(&Rule { listeners: vec![name.to_owned()], ..rule() }, visit(), expected);
        }
        for (connection, expected) in [(Connection::HostSsl, true), (Connection::HostNoSsl, false)]
        {
            check(&Rule { connection, ..rule() }, visit(), expected);
            check(&Rule { connection, ..rule() }, Visit { is_tls: false, ..visit() }, !expected);
        }
        for (user, expected) in [("app", true), ("/^a", true), ("/^b", false), ("App", false)] {
            check(&Rule { users: pattern(user), ..rule() }, visit(), expected);
        }
        for (network, expected) in [("10.0.0.0/8", true), ("192.168.0.0/16", false)] {
            let addresses = vec![Network::parse(network).unwrap()];
            check(&Rule { addresses, ..rule() }, visit(), expected);
        }
    }

    #[test]
    fn databases_are_named_or_the_roles_own_or_replication() {
        let own = Visit { database: b"app", ..visit() };
        check(&Rule { databases: database("shop"), ..rule() }, visit(), true);
        check(&Rule { databases: vec![Database::SameUser], ..rule() }, visit(), false);
        check(&Rule { databases: vec![Database::SameUser], ..rule() }, own, true);
        let stream = Visit { replication: Replication::Physical, ..visit() };
        check(&Rule { databases: database("all"), ..rule() }, stream, false);
        check(&Rule { databases: vec![Database::Replication], ..rule() }, stream, true);
        check(&rule(), stream, true);
        let logical = Visit { replication: Replication::Logical, ..visit() };
        check(&Rule { databases: database("shop"), ..rule() }, logical, true);
    }

    #[test]
    fn a_claimed_address_opens_no_door_and_closes_its_own() {
        let addresses = vec![Network::parse("10.0.0.0/8").unwrap()];
        let (inside, outside) = ("10.9.9.9".parse().unwrap(), "192.0.2.1".parse().unwrap());
        for (address, claimed, lets_in, rejects) in [
            (inside, inside, true, true),
            (inside, outside, false, true),
            (outside, inside, false, true),
            (outside, outside, false, false),
        ] {
            let visit = Visit { address, claimed: Some(claimed), ..visit() };
            check(&Rule { addresses: addresses.clone(), ..rule() }, visit, lets_in);
            let reject = Rule { addresses: addresses.clone(), ..Rule::everybody(Method::Reject) };
            check(&reject, visit, rejects);
        }
    }

    #[test]
    fn the_first_that_fits_decides() {
        let reject = Rule { users: pattern("app"), ..Rule::everybody(Method::Reject) };
        let rules = [reject, rule()];
        assert_eq!(first(&rules, &visit()).map(|rule| &rule.method), Some(&Method::Reject));
        let other = Visit { user: b"other", ..visit() };
        assert_eq!(first(&rules, &other).map(|rule| &rule.method), Some(&Method::Scram));
        assert!(first(&[], &visit()).is_none());
    }

    #[test]
    fn a_certificates_name_is_the_roles_or_leads_to_it() {
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.distinguished_name.push(DnType::OrganizationName, "Shop");
        params.distinguished_name.push(DnType::CommonName, "joe@example.com");
        let der = params.self_signed(&KeyPair::generate().unwrap()).unwrap().der().to_vec();
        let certificate = Pattern::parse(r"/^(.*)@example\.com$").unwrap();
        let line = MapLine { certificate, role: r"\1".to_owned() };
        let whole = Pattern::parse("CN=joe@example.com,O=Shop").unwrap();
        let whole = MapLine { certificate: whole, role: "ann".to_owned() };
        let mut rules = Rules::default();
        rules.maps.insert("people".to_owned(), vec![line]);
        rules.maps.insert("whole".to_owned(), vec![whole]);
        let common = CertificateName::CommonName;
        let check = |map: Option<&str>, name, shown: Option<&[u8]>, user: &str, expected: bool| {
            let rule = Rule::everybody(Method::Cert { map: map.map(str::to_owned), name });
            let found = certificate_fits(&rules, &rule, shown, user.as_bytes());
            assert_eq!(found, expected, "{map:?} {user}");
        };
        check(None, common, Some(&der), "joe@example.com", true);
        check(None, common, Some(&der), "joe", false);
        check(Some("people"), common, Some(&der), "joe", true);
        check(Some("people"), common, Some(&der), "ann", false);
        check(Some("people"), common, None, "joe", false);
        check(Some("absent"), common, Some(&der), "joe", false);
        check(Some("whole"), CertificateName::DistinguishedName, Some(&der), "ann", true);
        let full = Rule { clientcert: ClientCert::VerifyFull, ..rule() };
        assert!(!certificate_fits(&rules, &full, Some(&der), b"joe"));
        assert!(certificate_fits(&rules, &full, Some(&der), b"joe@example.com"));
        let ca = Rule { clientcert: ClientCert::VerifyCa, ..rule() };
        assert!(certificate_fits(&rules, &ca, Some(&der), b"joe"));
        assert!(!certificate_fits(&rules, &ca, None, b"joe"));
    }
}

//! Proving who one is, through the proxy: passwords that change and end, md5, rules, certificates with
//! a map, relayed logins; what strangers learn, and what the logs do not say.

use std::fs;
use std::time::Duration;

use anyhow::{Context, Result};
use kornak_protocol::startup::{ProtocolVersion, put_startup};
use kornak_tests::run::certificates::{Pair, Workshop};
use kornak_tests::run::postgres::{Postgres, SUPERUSER_PASSWORD, connect};
use kornak_tests::run::proxy::Proxy;
use kornak_tests::run::psql::{Said, psql};
use kornak_tests::run::scratch::Scratch;
use kornak_tests::run::wait::until;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_postgres::Client;

const SOON: Duration = Duration::from_secs(20);

/// `lax` and the holders of certificates are let in by the server on the proxy's word.
const HBA: &str = "local all all trust\n\
    host all lax,joe,ann all trust\n\
    host all cleartext all password\n\
    host all old all md5\n\
    host all all all scram-sha-256\n";

const ROLES: &str = "\
    CREATE ROLE app LOGIN PASSWORD 'first-password';\
    CREATE ROLE lax LOGIN PASSWORD 'first-password';\
    CREATE ROLE expired LOGIN PASSWORD 'first-password' VALID UNTIL '2020-01-01';\
    CREATE ROLE idle NOLOGIN PASSWORD 'first-password';\
    CREATE ROLE cleartext LOGIN PASSWORD 'first-password';\
    CREATE ROLE relayed LOGIN PASSWORD 'first-password';\
    CREATE ROLE banned LOGIN PASSWORD 'first-password';\
    CREATE ROLE joe LOGIN; CREATE ROLE ann LOGIN;\
    SET password_encryption = 'md5';\
    CREATE ROLE old LOGIN PASSWORD 'first-password';\
    CREATE ROLE older LOGIN PASSWORD 'first-password';\
    RESET password_encryption;\
    CREATE SCHEMA evil; GRANT USAGE ON SCHEMA evil TO PUBLIC;\
    CREATE TABLE evil.pg_authid AS SELECT * FROM pg_authid;\
    GRANT SELECT ON evil.pg_authid TO PUBLIC;";

const RULES: &str = r#"
  rules:
    - {user: banned, method: reject}
    - {user: [old], method: md5}
    - {user: "/^(cleartext|relayed)$", method: relay}
    - {type: hostssl, user: [joe, ann], method: cert, map: people}
    - {user: [joe, ann], method: reject}
    - {listener: primary, database: [postgres, sameuser], address: 127.0.0.0/8, method: scram}
  maps:
    people: [{certificate: "/^(.*)@example\\.com$", role: "\\1"}]
"#;

struct Front {
    scratch: Scratch,
    shop: Workshop,
    server: Postgres,
    admin: Client,
    proxy: Proxy,
    /// As `proxy`, with a query of the operator's own that names no schema.
    other: Proxy,
}

fn lines(shop: &Workshop, auth: &str) -> String {
    format!(
        "auth:\n  user: postgres\n  password: \"{SUPERUSER_PASSWORD}\"{auth}\n\
         tls:\n  client: {{cert: {cert}, key: {key}, ca: {ca}}}\n  server: {{sslmode: require}}",
        cert = shop.path("front.crt").display(),
        key = shop.path("front.key").display(),
        ca = shop.path("people.example.crt").display(),
    )
}

impl Front {
    async fn start() -> Result<Self> {
        let scratch = Scratch::new("login");
        let shop = Workshop::new(&scratch);
        let own = shop.self_signed("front", "localhost")?;
        shop.root("people.example", 3650)?;
        let settings = [
            "ssl=on".to_owned(),
            format!("ssl_cert_file={}", own.cert.display()),
            format!("ssl_key_file={}", own.key.display()),
        ];
        let settings: Vec<&str> = settings.iter().map(String::as_str).collect();
        let server = Postgres::start(&scratch, "pg", &settings).await?;
        let admin = server.connect().await?;
        admin.batch_execute(ROLES).await?;
        fs::write(server.data_dir().join("pg_hba.conf"), HBA)?;
        admin.batch_execute("SELECT pg_reload_conf()").await?;
        let head = format!(
            "scope: demo\nlog: {{level: DEBUG}}\n\
             static: {{members: [{{name: a, host: localhost, port: {}}}]}}",
            server.port()
        );
        let proxy = Proxy::start(&scratch, "proxy", &head, &lines(&shop, RULES)).await?;
        let query = "\n  query: SELECT rolname, rolpassword FROM pg_authid WHERE rolname = $1";
        let other = Proxy::start(&scratch, "other", &head, &lines(&shop, query)).await?;
        let front = Self { scratch, shop, server, admin, proxy, other };
        for proxy in [&front.proxy, &front.other] {
            let port = proxy.primary();
            let app = format!(
                "host=127.0.0.1 port={port} user=app password=first-password dbname=postgres"
            );
            proxy.ready(&app, SOON).await;
        }
        Ok(front)
    }

    fn conninfo(&self, user: &str, options: &str) -> String {
        let port = self.proxy.primary();
        let defaults = if options.contains("dbname=") { "" } else { "dbname=postgres" };
        format!("host=127.0.0.1 port={port} user={user} {defaults} sslrootcert=/none {options}")
    }

    async fn psql(&self, user: &str, password: &str, options: &str) -> Result<Said> {
        psql(&self.conninfo(user, options), password, "SELECT current_user").await
    }

    async fn login(&self, user: &str, password: &str) -> Result<Said> {
        self.psql(user, password, "sslmode=disable").await
    }

    async fn refused(&self, user: &str, password: &str) -> Result<()> {
        let told = self.login(user, password).await?;
        let told = told.expect_err(user).to_owned();
        let expected = format!("password authentication failed for user \"{user}\"");
        assert!(told.contains(&expected), "{told}");
        Ok(())
    }

    /// Past the proxy.
    fn direct(server: &Postgres) -> String {
        format!("host=127.0.0.1 port={} password='…' dbname=postgres", server.port())
    }

    async fn sql(&self, sql: &str) -> Result<()> {
        Ok(self.admin.batch_execute(sql).await?)
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn clients_prove_who_they_are_as_the_rules_say() -> Result<()> {
    let mut front = Front::start().await?;
    a_changed_password_works_at_once_and_the_old_one_fails_at_once(&front).await?;
    passwords_end_when_they_are_said_to_end(&front).await?;
    md5_is_taken_where_a_rule_says_so(&front).await?;
    rules_refuse_in_the_words_of_postgresql(&front).await?;
    changed_rules_count_after_a_signal(&mut front).await?;
    the_documented_function_answers_as_the_default_query_does(&front).await?;
    a_certificate_leads_to_its_role(&front).await?;
    the_server_decides_about_relayed_logins(&front).await?;
    what_a_client_sets_does_not_reach_the_query_for_passwords(&front).await?;
    a_stranger_cannot_tell_which_roles_exist(&mut front).await?;
    the_log_has_methods_and_no_secrets(&mut front)?;
    front.scratch.passed();
    Ok(())
}

async fn a_changed_password_works_at_once_and_the_old_one_fails_at_once(
    front: &Front,
) -> Result<()> {
    // The server asks the first for its password again; the second it lets in on our word.
    for role in ["app", "lax"] {
        let mut current = "first-password".to_owned();
        front.login(role, &current).await?.expect("the first password");
        for round in 0..3 {
            let next = format!("password-{round}");
            front.sql(&format!("ALTER ROLE {role} PASSWORD '{next}'")).await?;
            front.refused(role, &current).await?;
            assert_eq!(front.login(role, &next).await?.expect("the new password"), role);
            current = next;
        }
        front.sql(&format!("ALTER ROLE {role} PASSWORD 'first-password'")).await?;
    }
    Ok(())
}

async fn passwords_end_when_they_are_said_to_end(front: &Front) -> Result<()> {
    front.refused("expired", "first-password").await?;
    front.sql("ALTER ROLE expired VALID UNTIL 'infinity'").await?;
    front.login("expired", "first-password").await?.expect("valid for ever");
    front.sql("ALTER ROLE expired VALID UNTIL '2020-01-01'").await?;
    front.refused("expired", "first-password").await?;
    // Who may not log in at all is told so by the server, after the password.
    let told = front.login("idle", "first-password").await?;
    assert!(told.expect_err("NOLOGIN").contains("is not permitted to log in"), "{told:?}");
    front.refused("idle", "wrong").await
}

async fn md5_is_taken_where_a_rule_says_so(front: &Front) -> Result<()> {
    assert_eq!(front.login("old", "first-password").await?.expect("md5"), "old");
    front.refused("old", "wrong").await?;
    front.refused("older", "first-password").await
}

async fn rules_refuse_in_the_words_of_postgresql(front: &Front) -> Result<()> {
    let told = front.login("banned", "first-password").await?;
    let expected = "the proxy rejects the connection of host \"127.0.0.1\", user \"banned\", \
                    database \"postgres\", no encryption";
    assert!(told.expect_err("reject").contains(expected), "{told:?}");
    let told = front.psql("app", "first-password", "dbname=template1 sslmode=require").await?;
    let expected = "no rule of the proxy for host \"127.0.0.1\", user \"app\", \
                    database \"template1\", SSL encryption";
    assert!(told.expect_err("no rule fits").contains(expected), "{told:?}");
    Ok(())
}

async fn changed_rules_count_after_a_signal(front: &mut Front) -> Result<()> {
    let text = fs::read_to_string(front.proxy.file())?;
    let changed = text.replace("{user: banned, method: reject}", "{user: banned, method: scram}");
    assert_ne!(text, changed);
    fs::write(front.proxy.file(), &changed)?;
    front.proxy.process().signal(rustix::process::Signal::HUP)?;
    until(SOON, "the changed rule", || async {
        let said = front.login("banned", "first-password").await;
        let said = said.map_err(|error| error.to_string())?;
        if said.ok { Ok(()) } else { Err(said.error) }
    })
    .await;
    // A wrong file changes nothing.
    fs::write(front.proxy.file(), changed.replace("method: scram", "method: guess"))?;
    front.proxy.process().signal(rustix::process::Signal::HUP)?;
    let process = front.proxy.process();
    until(SOON, "the log says so", || async {
        let log = process.tail(50);
        if log.contains("the old one stays in force") { Ok(()) } else { Err(log) }
    })
    .await;
    front.login("banned", "first-password").await?.expect("as before");
    Ok(fs::write(front.proxy.file(), &changed)?)
}

/// The page's own SQL is run.
async fn the_documented_function_answers_as_the_default_query_does(front: &Front) -> Result<()> {
    let page = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/proxy-auth.md");
    let page = fs::read_to_string(page)?;
    let sql = page.split("```sql\n").nth(1).and_then(|rest| rest.split("```").next());
    front.sql(sql.context("no SQL on the page")?).await?;
    let client = connect(&format!("{} user=kornak", Front::direct(&front.server))).await?;
    let ask = "SELECT role, password, seconds FROM kornak.password_of($1)";
    let ours = kornak_config::proxy::DEFAULT_AUTH_QUERY;
    for role in ["app", "old", "expired", "idle", "nobody", "joe"] {
        let found = client.query(ask, &[&role]).await.with_context(|| role.to_owned())?;
        let expected = front.admin.query(ours, &[&role]).await?;
        assert_eq!(found.len(), expected.len(), "{role}");
        for (found, expected) in found.iter().zip(&expected) {
            let stored = |row: &tokio_postgres::Row| row.get::<_, Option<String>>(1);
            assert_eq!(stored(found), stored(expected), "{role}");
        }
    }
    Ok(())
}

async fn a_certificate_leads_to_its_role(front: &Front) -> Result<()> {
    let joe = front.shop.leaf("joe", "joe@example.com", "people.example")?;
    let bob = front.shop.leaf("bob", "bob@elsewhere.org", "people.example")?;
    let with = |pair: &Pair| {
        format!("sslmode=require sslcert={} sslkey={}", pair.cert.display(), pair.key.display())
    };
    let said = front.psql("joe", "", &with(&joe)).await?;
    assert_eq!(said.expect("mapped by his name"), "joe");
    for (role, options) in
        [("ann", with(&joe)), ("joe", with(&bob)), ("joe", "sslmode=require".to_owned())]
    {
        let told = front.psql(role, "", &options).await?;
        let told = told.expect_err(&options).to_owned();
        assert!(told.contains("certificate authentication failed for user"), "{told}");
    }
    Ok(())
}

async fn the_server_decides_about_relayed_logins(front: &Front) -> Result<()> {
    for (role, options) in [
        ("cleartext", "sslmode=require"),
        // A client that could bind the channel takes the missing offer for an attack.
        ("relayed", "sslmode=require channel_binding=disable"),
        ("relayed", "sslmode=disable"),
    ] {
        let said = front.psql(role, "first-password", options).await?;
        assert_eq!(said.expect("relayed"), role);
        let told = front.psql(role, "wrong", options).await?;
        assert!(told.expect_err(role).contains("password authentication failed"), "{told:?}");
    }
    Ok(())
}

/// CVE-2025-12819 of PgBouncer: `search_path` of a client's startup packet was in force when the
/// passwords were looked up.
async fn what_a_client_sets_does_not_reach_the_query_for_passwords(front: &Front) -> Result<()> {
    front
        .sql(
            "ALTER ROLE relayed PASSWORD 'of-another-role';\
             UPDATE evil.pg_authid SET rolpassword = \
             (SELECT a.rolpassword FROM pg_authid a WHERE a.rolname = 'relayed')",
        )
        .await?;
    let port = front.other.primary();
    let conninfo = |option: &str| {
        format!(
            "host=127.0.0.1 port={port} user=app dbname=postgres sslmode=disable options='{option}'"
        )
    };
    for option in ["-c search_path=evil,pg_catalog", "-csearch_path=evil -crole=postgres"] {
        let wrong = psql(&conninfo(option), "of-another-role", "SELECT 1").await?;
        let told = wrong.expect_err("let in by a table of its own").to_owned();
        assert!(told.contains("password authentication failed"), "{told}");
    }
    let right =
        psql(&conninfo("-c search_path=evil"), "first-password", "SHOW search_path").await?;
    assert_eq!(right.expect("the setting is passed on"), "evil");
    front.sql("ALTER ROLE relayed PASSWORD 'first-password'").await
}

/// The salt and the rounds that a role is asked with.
async fn challenge(port: u16, role: &str) -> Result<String> {
    let mut out = bytes::BytesMut::new();
    let params: [(&[u8], &[u8]); 2] = [(b"user", role.as_bytes()), (b"database", b"postgres")];
    put_startup(ProtocolVersion::V3_0, params, &mut out)?;
    let mut socket = TcpStream::connect(("127.0.0.1", port)).await?;
    socket.write_all(&out).await?;
    let first = message(&mut socket).await?;
    assert!(first.starts_with(b"\0\0\0\x0aSCRAM-SHA-256\0"), "{first:?}");
    let bare = b"n,,n=,r=abcdefghijklmnop";
    let mut body = b"SCRAM-SHA-256\0".to_vec();
    body.extend_from_slice(&u32::try_from(bare.len())?.to_be_bytes());
    body.extend_from_slice(bare);
    let mut answer = b"p".to_vec();
    answer.extend_from_slice(&u32::try_from(body.len() + 4)?.to_be_bytes());
    answer.extend_from_slice(&body);
    socket.write_all(&answer).await?;
    let text = String::from_utf8(message(&mut socket).await?.split_off(4))?;
    Ok(text.split_once(",s=").context("no salt")?.1.to_owned())
}

async fn message(socket: &mut TcpStream) -> Result<Vec<u8>> {
    let mut head = [0; 5];
    tokio::time::timeout(SOON, socket.read_exact(&mut head)).await??;
    let len = u32::from_be_bytes([head[1], head[2], head[3], head[4]]) as usize;
    let mut body = vec![0; len - 4];
    socket.read_exact(&mut body).await?;
    Ok(body)
}

async fn a_stranger_cannot_tell_which_roles_exist(front: &mut Front) -> Result<()> {
    let port = front.proxy.primary();
    let known = challenge(port, "app").await?;
    let nobody = challenge(port, "nobody").await?;
    assert_eq!(known, challenge(port, "app").await?, "a role's own salt");
    assert_eq!(nobody, challenge(port, "nobody").await?, "and a made-up one, again");
    assert_eq!(nobody, challenge(front.other.primary(), "nobody").await?, "by any proxy");
    assert_ne!(nobody, challenge(port, "nobody2").await?);
    assert_eq!(known.len(), nobody.len(), "as long: {known} {nobody}");
    assert!(known.ends_with(",i=4096") && nobody.ends_with(",i=4096"), "{known} {nobody}");
    // md5's and expired roles look like any other where the rule is SCRAM.
    assert_eq!(challenge(port, "older").await?.len(), known.len());
    front.proxy.restart().await?;
    let conninfo =
        format!("host=127.0.0.1 port={port} user=app password=first-password dbname=postgres");
    front.proxy.ready(&conninfo, SOON).await;
    assert_eq!(nobody, challenge(port, "nobody").await?, "and after a restart");
    front.refused("nobody", "first-password").await
}

fn the_log_has_methods_and_no_secrets(front: &mut Front) -> Result<()> {
    let log = front.proxy.process().tail(100_000);
    for method in ["method=\"SCRAM-SHA-256-PLUS\"", "method=\"md5\"", "method=\"nothing\""] {
        assert!(log.contains(method), "the server legs of this test used {method}");
    }
    for secret in [SUPERUSER_PASSWORD, "first-password", "password-1", "SCRAM-SHA-256$"] {
        assert!(!log.contains(secret), "a secret in the log: {secret}");
    }
    Ok(())
}

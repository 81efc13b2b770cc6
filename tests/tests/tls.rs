//! TLS on both legs: libpq's ladder towards servers, compared with libpq itself; what libpq makes of
//! the proxy; direct TLS; certificates of clients.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use kornak_config::proxy::{RequireAuth, ServerSideTls, SslMode};
use kornak_protocol::auth::{Credentials, Method};
use kornak_proxy::net::backend::{Account, Address, connect, own_startup};
use kornak_proxy::net::tls::ServerTls;
use kornak_tests::run::certificates::{Pair, Workshop};
use kornak_tests::run::postgres::{Postgres, SUPERUSER_PASSWORD};
use kornak_tests::run::proxy::Proxy;
use kornak_tests::run::psql::{Said, psql, psql_file};
use kornak_tests::run::scratch::Scratch;
use kornak_tests::run::wait::until;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use rustls::{ClientConfig, RootCertStore};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

const SOON: Duration = Duration::from_secs(15);

/// Whether the session of the one who asks is under TLS.
const IS_TLS: &str = "SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()";

const MODES: [(&str, SslMode); 6] = [
    ("disable", SslMode::Disable),
    ("allow", SslMode::Allow),
    ("prefer", SslMode::Prefer),
    ("require", SslMode::Require),
    ("verify-ca", SslMode::VerifyCa),
    ("verify-full", SslMode::VerifyFull),
];

/// `any` may log in in both ways, the others in one.
const HBA: &str = "local all all trust\n\
    hostssl all only_plain all reject\n\
    hostnossl all only_tls all reject\n\
    host all all all scram-sha-256\n";

/// A server with TLS whose certificate can be changed.
struct Secure {
    server: Postgres,
    cert: PathBuf,
    key: PathBuf,
}

impl Secure {
    async fn start(scratch: &Scratch, shop: &Workshop, first: &Pair) -> Result<Self> {
        let (cert, key) = (shop.path("in-force.crt"), shop.path("in-force.key"));
        put(first, &first.cert, &cert, &key)?;
        let settings = [
            "ssl=on".to_owned(),
            format!("ssl_cert_file={}", cert.display()),
            format!("ssl_key_file={}", key.display()),
        ];
        let settings: Vec<&str> = settings.iter().map(String::as_str).collect();
        let server = Postgres::start(scratch, "pg", &settings).await?;
        let admin = server.connect().await?;
        for role in ["any", "only_plain", "only_tls"] {
            let sql = format!("CREATE ROLE \"{role}\" LOGIN PASSWORD 'right'");
            admin.batch_execute(&sql).await?;
        }
        fs::write(server.data_dir().join("pg_hba.conf"), HBA)?;
        admin.batch_execute("SELECT pg_reload_conf()").await?;
        Ok(Self { server, cert, key })
    }

    /// Shows another certificate from now on, which libpq trusts by `root` or does not.
    async fn show(&self, pair: &Pair, chain: &Path, root: &Path, trusted: bool) -> Result<()> {
        put(pair, chain, &self.cert, &self.key)?;
        self.server.connect().await?.batch_execute("SELECT pg_reload_conf()").await?;
        let conninfo = self.conninfo("any", "verify-ca", "localhost", Some(root));
        until(SOON, "the server shows its new certificate", || async {
            let said = psql(&conninfo, "right", IS_TLS).await.map_err(|error| error.to_string())?;
            if said.ok == trusted { Ok(()) } else { Err(said.error) }
        })
        .await;
        Ok(())
    }

    fn conninfo(&self, user: &str, mode: &str, host: &str, ca: Option<&Path>) -> String {
        let port = self.server.port();
        let ca = ca.map_or("/nonexistent".to_owned(), |ca| ca.display().to_string());
        format!(
            "host={host} hostaddr=127.0.0.1 port={port} user={user} dbname=postgres \
             sslmode={mode} sslrootcert={ca}"
        )
    }

    /// The verdict of libpq: under TLS, in the clear, or not at all.
    async fn by_libpq(
        &self,
        user: &str,
        mode: &str,
        host: &str,
        ca: Option<&Path>,
    ) -> Result<Option<bool>> {
        let said = psql(&self.conninfo(user, mode, host, ca), "right", IS_TLS).await?;
        Ok(said.ok.then(|| said.text == "t"))
    }

    /// The verdict of the proxy, and how it proved itself.
    async fn by_us(
        &self,
        user: &str,
        mode: SslMode,
        host: &str,
        ca: Option<&Path>,
    ) -> Option<(bool, Method)> {
        let ca = ca.map(Path::to_owned);
        let settings = ServerSideTls { sslmode: mode, ca, ..ServerSideTls::default() };
        self.by_settings(user, settings, host).await
    }

    async fn by_settings(
        &self,
        user: &str,
        settings: ServerSideTls,
        host: &str,
    ) -> Option<(bool, Method)> {
        let tls = ServerTls::new(&settings).ok()?;
        let address = Address { host: host.into(), port: self.server.port() };
        let startup = own_startup(user, "postgres", "test").expect("short");
        let password = Credentials::Password(b"right".to_vec().into());
        let account = Account {
            startup: &startup,
            user: user.as_bytes(),
            credentials: &password,
            own: Some(RequireAuth::default()),
        };
        let mut connected = connect(&address, &tls, account, SOON).await.ok()?;
        let rows = connected.query(&format!("{IS_TLS} AND true"), &[]).await.ok()?;
        let value = rows.first()?.first()?.as_deref()?.to_owned();
        Some((value == b"t", connected.method))
    }
}

fn put(pair: &Pair, chain: &Path, cert: &Path, key: &Path) -> Result<()> {
    fs::copy(chain, cert).context("put the certificate in place")?;
    // Written over, not replaced: owner and mode stay.
    match key.exists() {
        true => fs::write(key, fs::read(&pair.key)?)?,
        false => {
            fs::copy(&pair.key, key)?;
            if let Some(user) = kornak_tests::run::postgres::server_user() {
                std::os::unix::fs::chown(key, Some(user.uid), Some(user.gid))?;
            }
        }
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_ladder_towards_servers_is_libpqs() -> Result<()> {
    let mut scratch = Scratch::new("ladder");
    let shop = Workshop::new(&scratch);
    let own = shop.self_signed("own", "localhost")?;
    let (root, other) = (shop.root("root.example", 3650)?, shop.root("other.example", 3650)?);
    let middle = shop.intermediate("middle.example", "root.example")?;
    let leaf = shop.leaf("leaf", "localhost", "root.example")?;
    let below = shop.leaf("below", "localhost", "middle.example")?;
    let below_chain = shop.bundle("below-chain.crt", &[&below.cert, &middle.cert])?;
    let named = "subjectAltName=DNS:*.example,IP:127.0.0.1\nextendedKeyUsage=serverAuth\n";
    let named = shop.extended("named", "localhost", "root.example", named)?;
    let wrong_use = "extendedKeyUsage=clientAuth\n";
    let wrong_use = shop.extended("wrong-use", "localhost", "root.example", wrong_use)?;
    let signed_by_leaf = shop.leaf("by-leaf", "localhost", "leaf")?;
    let by_leaf_chain = shop.bundle("by-leaf-chain.crt", &[&signed_by_leaf.cert, &leaf.cert])?;

    let secure = Secure::start(&scratch, &shop, &own).await?;
    let mut compared = 0;
    let mut bound = 0;
    let certificates: [(&str, &Pair, &Path, &Path); 6] = [
        ("self-signed", &own, &own.cert, &own.cert),
        ("of a root, version 1", &leaf, &leaf.cert, &root.cert),
        ("of an intermediate", &below, &below_chain, &root.cert),
        ("with alternative names", &named, &named.cert, &root.cert),
        ("for clients", &wrong_use, &wrong_use.cert, &root.cert),
        ("signed by who is no authority", &signed_by_leaf, &by_leaf_chain, &root.cert),
    ];
    for (what, pair, chain, its_root) in certificates {
        secure.show(pair, chain, its_root, expected(what)).await?;
        for (mode, ours) in MODES {
            let mut cases: Vec<(&str, &str, Option<&Path>)> =
                vec![("any", "localhost", Some(its_root))];
            if expected(what) {
                cases.push(("any", "127.0.0.1", Some(its_root)));
                cases.push(("any", "localhost", Some(&other.cert)));
                cases.push(("any", "localhost", None));
            }
            if pair.cert == own.cert {
                cases.push(("only_plain", "localhost", Some(its_root)));
                cases.push(("only_tls", "localhost", Some(its_root)));
            }
            for (user, host, ca) in cases {
                let theirs = secure.by_libpq(user, mode, host, ca).await?;
                let found = secure.by_us(user, ours, host, ca).await;
                assert_eq!(
                    found.map(|(tls, _)| tls),
                    theirs,
                    "a certificate {what}, {mode}, {user} at {host}, ca {ca:?}: libpq on the right"
                );
                compared += 1;
                if let Some((true, method)) = found {
                    assert_eq!(method, Method::ScramPlus, "under TLS the channel is bound");
                    bound += 1;
                }
            }
        }
    }
    assert_eq!(compared, 6 * 6 + 3 * 6 * 4 + 2 * 6);
    assert!(bound > 30, "only {bound} of {compared} logins were under TLS");
    scratch.passed();
    Ok(())
}

/// Whether libpq trusts it.
fn expected(certificate: &str) -> bool {
    !certificate.starts_with("for clients") && !certificate.starts_with("signed by")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_asks_for_a_certificate_gets_the_proxys() -> Result<()> {
    let mut scratch = Scratch::new("client-cert");
    let shop = Workshop::new(&scratch);
    let root = shop.root("root.example", 3650)?;
    shop.root("other.example", 3650)?;
    let shown = shop.leaf("shown", "localhost", "root.example")?;
    let ours = shop.leaf("ours", "any", "root.example")?;
    let stranger = shop.leaf("stranger", "any", "other.example")?;
    let secure = Secure::start(&scratch, &shop, &shown).await?;
    let admin = secure.server.connect().await?;
    let ca = root.cert.display();
    admin.batch_execute(&format!("ALTER SYSTEM SET ssl_ca_file = '{ca}'")).await?;
    for (rule, method) in [
        ("scram-sha-256 clientcert=verify-ca", Method::ScramPlus),
        ("scram-sha-256 clientcert=verify-full", Method::ScramPlus),
        ("cert", Method::Nothing),
    ] {
        let hba = format!(
            "local all all trust\nhost all postgres all scram-sha-256\nhostssl all any all {rule}\n"
        );
        fs::write(secure.server.data_dir().join("pg_hba.conf"), hba)?;
        admin.batch_execute("SELECT pg_reload_conf()").await?;
        until(SOON, rule, || async {
            let with = |pair: Option<&Pair>| {
                let settings = ServerSideTls {
                    sslmode: SslMode::VerifyFull,
                    ca: Some(root.cert.clone()),
                    cert: pair.map(|pair| pair.cert.clone()),
                    key: pair.map(|pair| pair.key.clone()),
                    ..ServerSideTls::default()
                };
                secure.by_settings("any", settings, "localhost")
            };
            let found = [with(Some(&ours)).await, with(Some(&stranger)).await, with(None).await];
            let expected = [Some((true, method)), None, None];
            if found == expected { Ok(()) } else { Err(format!("{found:?}")) }
        })
        .await;
    }
    scratch.passed();
    Ok(())
}

/// A server with a self-signed certificate, and a proxy in front with one of its own.
struct Front {
    scratch: Scratch,
    shop: Workshop,
    _server: Postgres,
    proxy: Proxy,
    cert: PathBuf,
    key: PathBuf,
}

impl Front {
    async fn start() -> Result<Self> {
        let scratch = Scratch::new("tls");
        let shop = Workshop::new(&scratch);
        let own = shop.self_signed("own", "localhost")?;
        shop.root("root.example", 3650)?;
        shop.root("people.example", 3650)?;
        let leaf = shop.leaf("leaf", "localhost", "root.example")?;
        let secure = Secure::start(&scratch, &shop, &own).await?;
        let server = secure.server;
        let (cert, key) = (shop.path("proxy.crt"), shop.path("proxy.key"));
        put(&leaf, &leaf.cert, &cert, &key)?;
        let head = format!(
            "scope: demo\nstatic: {{members: [{{name: a, host: localhost, port: {}}}]}}",
            server.port()
        );
        let lines = format!(
            "auth: {{method: scram, user: postgres, password: \"{SUPERUSER_PASSWORD}\"}}\n\
             tls:\n  client: {{cert: {}, key: {}, ca: {}}}\n  \
             server: {{sslmode: verify-full, ca: {}}}",
            cert.display(),
            key.display(),
            shop.path("people.example.crt").display(),
            own.cert.display(),
        );
        let proxy = Proxy::start(&scratch, "proxy", &head, &lines).await?;
        let front = Self { scratch, shop, _server: server, proxy, cert, key };
        let port = front.proxy.primary();
        let plain = format!("host=127.0.0.1 port={port} user=any password=right dbname=postgres");
        front.proxy.ready(&plain, SOON).await;
        Ok(front)
    }

    /// Without `sslmode`.
    fn conninfo(&self, host: &str) -> String {
        let port = self.proxy.primary();
        let root = self.shop.path("root.example.crt");
        format!(
            "host={host} hostaddr=127.0.0.1 port={port} user=any dbname=postgres sslrootcert={}",
            root.display()
        )
    }

    async fn psql(&self, host: &str, options: &str, sql: &str) -> Result<Said> {
        psql(&format!("{} {options}", self.conninfo(host)), "right", sql).await
    }

    /// Whether psql, with these options, says that its connection is under TLS.
    async fn is_encrypted(&self, options: &str) -> Result<bool> {
        let said = self.psql("localhost", options, "\\conninfo").await?;
        Ok(said.expect(options).contains("SSL connection"))
    }

    async fn direct(&self, alpn: &[&[u8]]) -> Result<TlsStream<TcpStream>> {
        let mut roots = RootCertStore::empty();
        let root = self.shop.path("root.example.crt");
        roots.add(CertificateDer::from_pem_file(root)?)?;
        let mut config = ClientConfig::builder_with_provider(
            rustls::crypto::aws_lc_rs::default_provider().into(),
        )
        .with_safe_default_protocol_versions()?
        .with_root_certificates(roots)
        .with_no_client_auth();
        config.alpn_protocols = alpn.iter().map(|name| name.to_vec()).collect();
        let tcp = TcpStream::connect(("127.0.0.1", self.proxy.primary())).await?;
        let name = "a.db.example".try_into()?;
        Ok(TlsConnector::from(Arc::new(config)).connect(name, tcp).await?)
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn libpq_finds_the_proxy_as_it_finds_a_server_with_tls() -> Result<()> {
    let mut front = Front::start().await?;
    for (mode, encrypted) in [
        ("disable", false),
        ("allow", false),
        ("prefer", true),
        ("require", true),
        ("verify-ca", true),
        ("verify-full", true),
    ] {
        let found = front.is_encrypted(&format!("sslmode={mode}")).await?;
        assert_eq!(found, encrypted, "{mode}");
    }
    let said = front.psql("localhost", "sslmode=verify-full", IS_TLS).await?;
    assert_eq!(said.expect("the other leg"), "t", "the proxy's own connection is under TLS");
    let said = front.psql("other.example", "sslmode=verify-full", "SELECT 1").await?;
    said.expect_err("the certificate is for localhost");

    the_channel_can_be_bound(&front).await?;
    certificates_of_clients_are_checked(&front).await?;
    long_values_pass(&front).await?;
    nothing_may_come_between_the_request_and_the_handshake(&front).await?;

    // The files are replaced: nobody is told, it is noticed.
    let lines = "subjectAltName=DNS:*.db.example\nextendedKeyUsage=serverAuth\n";
    let named = front.shop.extended("named", "localhost", "root.example", lines)?;
    put(&named, &named.cert, &front.cert, &front.key)?;
    until(SOON, "the new certificate is shown", || async {
        let said = front.psql("a.db.example", "sslmode=verify-full", "SELECT 1").await;
        let said = said.map_err(|error| error.to_string())?;
        if said.ok { Ok(()) } else { Err(said.error) }
    })
    .await;
    the_channel_can_be_bound(&front).await?;
    direct_tls_is_taken_from_those_who_name_the_protocol(&front).await?;
    a_broken_file_changes_nothing_and_a_signal_brings_changed_settings(&mut front).await?;
    a_revoked_certificate_is_refused(&mut front).await?;
    front.scratch.passed();
    Ok(())
}

async fn the_channel_can_be_bound(front: &Front) -> Result<()> {
    let bound = "sslmode=require channel_binding=require";
    front.psql("localhost", bound, "SELECT 1").await?.expect("bound to the proxy's certificate");
    let plain = "sslmode=disable channel_binding=require";
    front.psql("localhost", plain, "SELECT 1").await?.expect_err("nothing to bind to");
    Ok(())
}

async fn certificates_of_clients_are_checked(front: &Front) -> Result<()> {
    let mine = front.shop.leaf("mine", "any", "people.example")?;
    let stranger = front.shop.leaf("stranger", "any", "root.example")?;
    let with = |pair: &Pair| {
        format!("sslmode=require sslcert={} sslkey={}", pair.cert.display(), pair.key.display())
    };
    front.psql("localhost", &with(&mine), "SELECT 1").await?.expect("of the right authority");
    let said = front.psql("localhost", &with(&stranger), "SELECT 1").await?;
    let told = said.expect_err("of another authority");
    assert!(told.contains("alert"), "told by TLS's own means: {told}");
    Ok(())
}

async fn long_values_pass(front: &Front) -> Result<()> {
    let said = front.psql("localhost", "sslmode=require", "SELECT repeat('x', 9000000)").await?;
    assert_eq!(said.expect("a long answer").len(), 9_000_000);
    let file = front.shop.path("long.sql");
    fs::write(&file, format!("SELECT length('{}')", "x".repeat(9_000_000)))?;
    let conninfo = format!("{} sslmode=require", front.conninfo("localhost"));
    let said = psql_file(&conninfo, "right", &file).await?;
    assert_eq!(said.expect("a long question"), "9000000");
    Ok(())
}

async fn nothing_may_come_between_the_request_and_the_handshake(front: &Front) -> Result<()> {
    let mut socket = TcpStream::connect(("127.0.0.1", front.proxy.primary())).await?;
    let request = [0, 0, 0, 8, 0x04, 0xd2, 0x16, 0x2f];
    socket.write_all(&[&request[..], b"injected"].concat()).await?;
    let mut answer = Vec::new();
    // A reset is as good as an end.
    let _ =
        tokio::time::timeout(SOON, socket.read_to_end(&mut answer)).await.context("left open")?;
    assert!(answer.is_empty(), "CVE-2021-23214: {answer:?}");
    Ok(())
}

async fn direct_tls_is_taken_from_those_who_name_the_protocol(front: &Front) -> Result<()> {
    let startup = own_startup("any", "postgres", "test")?;
    let mut direct = front.direct(&[b"postgresql"]).await?;
    direct.write_all(&startup).await?;
    let mut answer = [0; 64];
    let n = tokio::time::timeout(SOON, direct.read(&mut answer)).await??;
    let answer = String::from_utf8_lossy(&answer[..n]).into_owned();
    assert!(answer.starts_with('R') && answer.contains("SCRAM-SHA-256-PLUS"), "{answer:?}");
    let mut nameless = front.direct(&[]).await?;
    // Whether the write or the read notices is a matter of time.
    let _ = nameless.write_all(&startup).await;
    let mut answer = Vec::new();
    let _ = tokio::time::timeout(SOON, nameless.read_to_end(&mut answer)).await?;
    assert!(answer.is_empty(), "direct TLS without ALPN was answered: {answer:?}");
    assert!(front.direct(&[b"http/1.1"]).await.is_err(), "another protocol's client");
    Ok(())
}

async fn a_broken_file_changes_nothing_and_a_signal_brings_changed_settings(
    front: &mut Front,
) -> Result<()> {
    fs::write(&front.cert, "-----BEGIN CERTIFICATE-----\nhalf wr")?;
    front.proxy.process().signal(rustix::process::Signal::HUP)?;
    let process = front.proxy.process();
    until(SOON, "the log says so", || async {
        let log = process.tail(20);
        if log.contains("the old ones stay in force") { Ok(()) } else { Err(log) }
    })
    .await;
    front
        .psql("a.db.example", "sslmode=verify-full", "SELECT 1")
        .await?
        .expect("still the old one");
    fs::copy(front.shop.path("named.crt"), &front.cert)?;
    let text = fs::read_to_string(front.proxy.file())?;
    fs::write(front.proxy.file(), text.replace("client: {cert", "client: {required: true, cert"))?;
    front.proxy.process().signal(rustix::process::Signal::HUP)?;
    until(SOON, "clients in the clear are refused", || async {
        let said = front.psql("localhost", "sslmode=disable", "SELECT 1").await;
        let said = said.map_err(|error| error.to_string())?;
        match said.error.contains("the proxy asks for an encrypted connection") {
            true => Ok(()),
            false => Err(said.error),
        }
    })
    .await;
    assert!(front.is_encrypted("sslmode=allow").await?, "refused in the clear, so under TLS");
    Ok(())
}

async fn a_revoked_certificate_is_refused(front: &mut Front) -> Result<()> {
    let lines = "extendedKeyUsage=clientAuth\n";
    let good = front.shop.extended("good", "any", "people.example", lines)?;
    let lost = front.shop.extended("lost", "any", "people.example", lines)?;
    let crl = front.shop.revoked("people.example", &["lost"])?;
    let with = |pair: &Pair| {
        format!("sslmode=require sslcert={} sslkey={}", pair.cert.display(), pair.key.display())
    };
    front.psql("localhost", &with(&lost), "SELECT 1").await?.expect("nobody has been told yet");
    let text = fs::read_to_string(front.proxy.file())?;
    let text = text.replace("client: {", &format!("client: {{crl: {}, ", crl.display()));
    fs::write(front.proxy.file(), text)?;
    front.proxy.process().signal(rustix::process::Signal::HUP)?;
    until(SOON, "the revoked one is refused", || async {
        let said = front.psql("localhost", &with(&lost), "SELECT 1").await;
        let said = said.map_err(|error| error.to_string())?;
        if said.error.contains("alert") { Ok(()) } else { Err(format!("{said:?}")) }
    })
    .await;
    front.psql("localhost", &with(&good), "SELECT 1").await?.expect("not on the list");
    Ok(())
}

//! Certificates of every form that people have, made by OpenSSL's command, sent through every TLS
//! connection that Kornak makes or accepts. The judges are psql (libpq) and curl themselves: each row's
//! expectation is what they say to the same files.

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use kornak_agent::peers::Peers;
use kornak_agent::postgres::{Sql, SqlError};
use kornak_agent::tls::RestTls;
use kornak_config::agent::{CtlSettings, PostgresqlSettings, ServerTls, VerifyClient};
use kornak_config::proxy::{ClientTls, ServerSideTls, SslMode};
use kornak_dcs::Dcs;
use kornak_dcs::etcd::{EtcdDcs, EtcdSettings};
use kornak_proxy::net::tls::{Attempt, ClientSide, ServerTls as ToServers};
use kornak_tests::run::certificates::{Pair, Workshop};
use kornak_tests::run::psql::psql;
use kornak_tests::run::scratch::Scratch;
use rustls::pki_types::ServerName;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::{TlsAcceptor, TlsConnector};

const SOON: Duration = Duration::from_secs(5);

/// The certificate that a server shows, and what its clients trust.
struct Row {
    form: &'static str,
    cert: PathBuf,
    key: PathBuf,
    ca: PathBuf,
    crl: Option<PathBuf>,
    host: &'static str,
    /// The verdict of psql with `verify-full`.
    libpq: bool,
    /// The verdict of curl.
    https: bool,
}

fn row(form: &'static str, own: &Pair, ca: &Path, libpq: bool, https: bool) -> Row {
    let (cert, key, ca) = (own.cert.clone(), own.key.clone(), ca.to_owned());
    Row { form, cert, key, ca, crl: None, host: "localhost", libpq, https }
}

const FOR_LOCALHOST: &str = "subjectAltName=DNS:localhost,IP:127.0.0.1\n";

fn rows(shop: &Workshop) -> Result<Vec<Row>> {
    let root = shop.root("root", 3650)?.cert;
    let other = shop.root("other", 3650)?.cert;
    let both = shop.bundle("both.crt", &[&other, &root])?;
    let between = shop.intermediate("between", "root")?;
    let documented = shop.self_signed("documented", "localhost")?;
    let old = shop.old("old", "localhost")?;
    let plain = shop.leaf("plain", "localhost", "root")?;
    let elsewhere = shop.leaf("elsewhere", "elsewhere", "root")?;
    let named = shop.extended("named", "x", "root", FOR_LOCALHOST)?;
    let by_address = shop.extended("address", "x", "root", "subjectAltName=IP:127.0.0.1\n")?;
    let deep = shop.extended("deep", "x", "between", FOR_LOCALHOST)?;
    let whole =
        Pair { cert: shop.bundle("whole.crt", &[&deep.cert, &between.cert])?, ..deep.clone() };
    let for_clients = format!("{FOR_LOCALHOST}extendedKeyUsage=clientAuth\n");
    let for_clients = shop.extended("client", "x", "root", &for_clients)?;
    let no_key_use = format!("{FOR_LOCALHOST}keyUsage=keyCertSign\n");
    let no_key_use = shop.extended("signer", "x", "root", &no_key_use)?;
    let ended = shop.expired("ended", "localhost", "root")?;
    shop.root("past", -1)?;
    let of_the_past = shop.extended("of-the-past", "x", "past", FOR_LOCALHOST)?;
    let limits = "basicConstraints=critical,CA:TRUE\nnameConstraints=permitted;DNS:localhost\n";
    let limited = shop.extended("limited", "limited", "root", limits)?;
    let inside =
        shop.extended("inside", "localhost", "limited", "subjectAltName=DNS:localhost\n")?;
    let inside = Pair { cert: shop.bundle("in.crt", &[&inside.cert, &limited.cert])?, ..inside };
    let no_authority = shop.extended("under-plain", "x", "named", FOR_LOCALHOST)?;
    let no_authority = Pair {
        cert: shop.bundle("under.crt", &[&no_authority.cert, &named.cert])?,
        ..no_authority
    };
    let revoked = shop.leaf("revoked", "localhost", "root")?;
    let lists = Some(shop.revoked("root", &["revoked"])?);
    let stranger = Some(shop.revoked("other", &[])?);

    let at = |host, row: Row| Row { host, ..row };
    let by = |crl: &Option<PathBuf>, row: Row| Row { crl: crl.clone(), ..row };
    Ok(vec![
        row("req -x509: its own authority", &documented, &documented.cert, true, true),
        row("the same, trusted by nobody", &documented, &root, false, false),
        row("version 1, self-signed, as Citus makes it", &old, &old.cert, true, true),
        row("version 1, by an authority", &plain, &root, true, true),
        row("the authority is the second of the file", &plain, &both, true, true),
        row("by another authority", &plain, &other, false, false),
        row("for another host", &elsewhere, &root, false, false),
        row("alternative names", &named, &root, true, true),
        at("127.0.0.1", row("an address", &by_address, &root, true, true)),
        row("an address is no name", &by_address, &root, false, false),
        row("a chain", &whole, &root, true, true),
        row("a chain with a hole", &deep, &root, false, false),
        row("only the intermediate is trusted", &deep, &between.cert, false, true),
        row("only the certificate itself is trusted", &named, &named.cert, false, true),
        row("for clients only", &for_clients, &root, false, false),
        row("a key that may only sign certificates", &no_key_use, &root, false, false),
        row("expired", &ended, &root, false, false),
        row("its authority has expired", &of_the_past, &shop.path("past.crt"), false, false),
        row("an authority for these names only", &inside, &root, true, true),
        row("issued by what is no authority", &no_authority, &root, false, false),
        by(&lists, row("not revoked", &plain, &root, true, true)),
        by(&lists, row("revoked", &revoked, &root, false, true)),
        by(&stranger, row("the list is another authority's", &plain, &root, false, true)),
    ])
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn servers_are_believed_as_libpq_and_curl_believe_them() -> Result<()> {
    let mut scratch = Scratch::new("certificates");
    let shop = Workshop::new(&scratch);
    let mut wrong = Vec::new();
    for row in rows(&shop)? {
        let mut found = vec![
            ("libpq", row.libpq, judged(&row, true, by_psql).await?),
            ("an agent's SQL", row.libpq, judged(&row, true, by_agents_sql).await?),
            ("a proxy", row.libpq, judged(&row, true, by_proxy).await?),
            ("an agent and the command", row.https, judged(&row, false, by_rest).await?),
            ("the store", row.https, judged(&row, false, by_etcd).await?),
        ];
        if row.crl.is_none() {
            found.push(("curl", row.https, judged(&row, false, by_curl).await?));
        }
        let differ = found.into_iter().filter(|(_, expected, found)| expected != found);
        wrong.extend(differ.map(|(who, _, found)| format!("{}: {who} says {found}", row.form)));
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    scratch.passed();
    Ok(())
}

/// Shows the row's certificate to whoever `dial` sends, and tells whether they went on to speak.
async fn judged<F>(row: &Row, postgres: bool, dial: impl FnOnce(Dial) -> F) -> Result<bool>
where
    F: Future<Output = Result<()>> + Send + 'static,
{
    let own = kornak_tls::certified(&row.cert, &row.key, None)?;
    let mut config = kornak_tls::server_config(None, own)?;
    config.alpn_protocols =
        ["postgresql", "h2", "http/1.1"].map(|it| it.as_bytes().to_vec()).into();
    let acceptor = TlsAcceptor::from(Arc::new(config));
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    let port = listener.local_addr()?.port();
    let dialling =
        tokio::spawn(dial(Dial { host: row.host, port, ca: row.ca.clone(), crl: row.crl.clone() }));
    let served = async {
        let (mut tcp, _) = listener.accept().await?;
        if postgres {
            let mut request = [0; 8];
            tcp.read_exact(&mut request).await?;
            tcp.write_all(b"S").await?;
        }
        let Ok(mut tls) = acceptor.accept(tcp).await else { return Ok(false) };
        // With TLS 1.3 the server's handshake ends before the client has judged.
        Ok::<_, std::io::Error>(tls.read_u8().await.is_ok())
    };
    let spoke = tokio::time::timeout(SOON, served).await.context(row.form)??;
    drop(listener);
    tokio::time::timeout(SOON, dialling).await.context(row.form)???;
    Ok(spoke)
}

struct Dial {
    host: &'static str,
    port: u16,
    ca: PathBuf,
    crl: Option<PathBuf>,
}

async fn by_psql(Dial { host, port, ca, crl }: Dial) -> Result<()> {
    let crl = crl.map(|crl| format!(" sslcrl={}", crl.display())).unwrap_or_default();
    let conninfo = format!(
        "host={host} hostaddr=127.0.0.1 port={port} user=x sslmode=verify-full sslrootcert={}{crl}",
        ca.display()
    );
    psql(&conninfo, "", "SELECT 1").await.map(drop)
}

async fn by_curl(Dial { host, port, ca, .. }: Dial) -> Result<()> {
    let mut curl = tokio::process::Command::new("curl");
    curl.args(["--silent", "--max-time", "3", "--ipv4", "--noproxy", "*", "--cacert"]);
    curl.arg(ca).arg(format!("https://{host}:{port}/"));
    curl.stdin(Stdio::null()).stdout(Stdio::null()).status().await.context("run curl")?;
    Ok(())
}

/// The settings of an agent whose server is there.
fn agents(
    host: &str,
    port: u16,
    (mode, ca): (&str, &Path),
    crl: Option<&Path>,
) -> Result<PostgresqlSettings> {
    let crl = crl.map(|crl| format!(", sslcrl: {}", crl.display())).unwrap_or_default();
    let text = format!(
        "scope: demo\nname: a\nrestapi: {{listen: '127.0.0.1:8008'}}\netcd3: {{hosts: ['x:1']}}\n\
         postgresql:\n  listen: {host}:{port}\n  connect_address: {host}:{port}\n  data_dir: /nowhere\n  \
         authentication:\n    replication: {{username: r}}\n    \
         superuser: {{username: x, sslmode: {mode}, sslrootcert: {}{crl}}}\n",
        ca.display()
    );
    let file = tempfile::NamedTempFile::new()?;
    std::fs::write(file.path(), text)?;
    Ok(kornak_config::load_agent(Some(file.path()), &[])?.settings.postgresql)
}

async fn by_agents_sql(Dial { host, port, ca, crl }: Dial) -> Result<()> {
    let sql = Sql::new(&agents(host, port, ("verify-full", &ca), crl.as_deref())?, "test");
    let _ = tokio::time::timeout(SOON, sql.value("ask", "SELECT 1")).await;
    Ok(())
}

async fn by_proxy(Dial { host, port, ca, crl }: Dial) -> Result<()> {
    let settings =
        ServerSideTls { sslmode: SslMode::VerifyFull, ca: Some(ca), crl, ..Default::default() };
    let tcp = TcpStream::connect(("127.0.0.1", port)).await?;
    if let Ok(mut stream) = ToServers::new(&settings)?.encrypt(tcp, host, Attempt::Tls).await {
        stream.write_all(b"x").await?;
        stream.flush().await?;
    }
    Ok(())
}

async fn by_rest(Dial { host, port, ca, .. }: Dial) -> Result<()> {
    let peers = Peers::new(&CtlSettings { cacert: Some(ca), ..CtlSettings::default() })?;
    let url = format!("https://{host}:{port}/patroni");
    let _ = peers.get_status(&url, SOON).await;
    Ok(())
}

async fn by_etcd(Dial { host, port, ca, .. }: Dial) -> Result<()> {
    let etcd = EtcdDcs::new(EtcdSettings {
        tls: true,
        ca_file: Some(ca),
        retry_timeout: Duration::from_millis(300),
        ..EtcdSettings::new(vec![format!("{host}:{port}")])
    });
    let _ = etcd.range("/").await;
    Ok(())
}

/// With `prefer` a failed handshake is followed by an attempt in the clear. A server that starts was
/// killed for silence, when its answer to that was lost behind the first attempt's error.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_server_says_in_the_clear_is_not_lost_behind_a_failed_handshake() -> Result<()> {
    let mut scratch = Scratch::new("certificates");
    let shop = Workshop::new(&scratch);
    let (own, other) = (shop.self_signed("own", "localhost")?, shop.self_signed("other", "other")?);
    let own = kornak_tls::certified(&own.cert, &own.key, None)?;
    let acceptor = TlsAcceptor::from(Arc::new(kornak_tls::server_config(None, own)?));
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    let settings =
        agents("localhost", listener.local_addr()?.port(), ("prefer", &other.cert), None)?;
    let asking =
        tokio::spawn(async move { Sql::new(&settings, "test").value("ask", "SELECT 1").await });
    let (mut tcp, _) = listener.accept().await?;
    tcp.read_exact(&mut [0; 8]).await?;
    tcp.write_all(b"S").await?;
    acceptor.accept(tcp).await.err().context("another authority's certificate")?;
    let (mut tcp, _) = listener.accept().await?;
    let length = usize::try_from(tcp.read_u32().await?)?;
    tcp.read_exact(&mut vec![0; length - 4]).await?;
    let fields = b"SFATAL\0C57P03\0Mthe database system is starting up\0\0";
    tcp.write_all(b"E").await?;
    tcp.write_u32(u32::try_from(fields.len())? + 4).await?;
    tcp.write_all(fields).await?;
    let said = asking.await?;
    assert!(matches!(said, Err(SqlError::StartingUp)), "{said:?}");
    scratch.passed();
    Ok(())
}

/// The local server is reached at an address of this host, and its certificate is for the name that others know.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_agent_accepts_its_own_server_under_the_name_of_connect_address() -> Result<()> {
    let mut scratch = Scratch::new("certificates");
    let shop = Workshop::new(&scratch);
    let own = shop.self_signed("own", "db1.example")?;
    let certified = kornak_tls::certified(&own.cert, &own.key, None)?;
    let acceptor = TlsAcceptor::from(Arc::new(kornak_tls::server_config(None, certified)?));
    for (name, expected) in [("db1.example", true), ("db2.example", false)] {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let port = listener.local_addr()?.port();
        let mut settings = agents("localhost", port, ("verify-full", &own.cert), None)?;
        name.clone_into(&mut settings.connect_address.host);
        let asking =
            tokio::spawn(async move { Sql::new(&settings, "test").value("ask", "SELECT 1").await });
        let (mut tcp, _) = listener.accept().await?;
        tcp.read_exact(&mut [0; 8]).await?;
        tcp.write_all(b"S").await?;
        // A refusal of TLS 1.3 comes when the server has finished: what counts is whether something follows.
        let followed = match acceptor.accept(tcp).await {
            Ok(mut tls) => tls.read_u32().await.is_ok(),
            Err(_) => false,
        };
        assert_eq!(followed, expected, "{name}");
        asking.abort();
    }
    scratch.passed();
    Ok(())
}

/// The certificate that a client shows.
struct Shown {
    form: &'static str,
    own: Option<Pair>,
    crl: Option<PathBuf>,
    expected: bool,
}

fn shown(shop: &Workshop) -> Result<Vec<Shown>> {
    let root = shop.root("root", 3650)?;
    shop.root("other", 3650)?;
    let plain = shop.leaf("plain", "me", "root")?;
    let for_clients = shop.extended("client", "me", "root", "extendedKeyUsage=clientAuth\n")?;
    let for_servers = shop.extended("server", "me", "root", "extendedKeyUsage=serverAuth\n")?;
    let foreign = shop.leaf("foreign", "me", "other")?;
    let ended = shop.expired("ended", "me", "root")?;
    let revoked = shop.leaf("revoked", "me", "root")?;
    let lists = Some(shop.revoked("root", &["revoked"])?);
    let row = |form, own: Pair, expected| Shown { form, own: Some(own), crl: None, expected };
    Ok(vec![
        row("version 1, by the authority", plain.clone(), true),
        row("for clients", for_clients, true),
        row("the authority's own", root, true),
        row("for servers only", for_servers, false),
        row("another authority's", foreign, false),
        row("expired", ended, false),
        Shown { crl: lists.clone(), ..row("not revoked", plain, true) },
        Shown { crl: lists, ..row("revoked", revoked, false) },
        Shown { form: "none", own: None, crl: None, expected: false },
    ])
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn clients_are_believed_as_postgresql_and_patroni_believe_them() -> Result<()> {
    let mut scratch = Scratch::new("certificates");
    let shop = Workshop::new(&scratch);
    let server = shop.self_signed("front", "localhost")?;
    for Shown { form, own, crl, expected } in shown(&shop)? {
        let ca = shop.path("root.crt");
        let front = ClientSide::new(&ClientTls {
            cert: Some(server.cert.clone()),
            key: Some(server.key.clone()),
            ca: Some(ca.clone()),
            crl: crl.clone(),
            ..ClientTls::default()
        })?;
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let asking = tokio::spawn(show(own.clone(), listener.local_addr()?.port()));
        let (tcp, _) = listener.accept().await?;
        let accepted = tokio::time::timeout(SOON, front.accept(tcp)).await?.is_some();
        asking.await??;
        // Whoever shows none is let in, and asked for a password by other rules.
        assert_eq!(accepted, expected || own.is_none(), "{form}: a proxy");
        if crl.is_some() {
            continue;
        }
        let rest = RestTls::new(&ServerTls {
            certfile: server.cert.clone(),
            keyfile: Some(server.key.clone()),
            keyfile_password: None,
            cafile: Some(ca),
            verify_client: VerifyClient::Required,
        })?;
        let asking = tokio::spawn(show(own, listener.local_addr()?.port()));
        let (tcp, _) = listener.accept().await?;
        let accepted = tokio::time::timeout(SOON, rest.acceptor().accept(tcp)).await?.is_ok();
        asking.await??;
        assert_eq!(accepted, expected, "{form}: the REST API");
    }
    scratch.passed();
    Ok(())
}

/// Shows a certificate by the same means as agents and proxies do.
async fn show(own: Option<Pair>, port: u16) -> Result<()> {
    let own = own.map(|own| kornak_tls::certified(&own.cert, &own.key, None)).transpose()?;
    let anybody = Arc::new(kornak_tls::OfServers::anybody());
    let config = kornak_tls::client_config(anybody, own)?;
    let tcp = TcpStream::connect(("127.0.0.1", port)).await?;
    let name = ServerName::try_from("localhost")?;
    if let Ok(mut tls) = TlsConnector::from(Arc::new(config)).connect(name, tcp).await {
        // With TLS 1.3 the refusal comes after the client's handshake.
        let _ = tls.read_u8().await;
    }
    Ok(())
}

//! How an agent reaches servers that are particular about it: under TLS alone, or by their socket alone.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a failed step fails the test")]

mod support;

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use kornak_agent::guard::Fencing;
use kornak_agent::postgres::{SqlError, StartAs, StopMode};
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use support::{Field, LIMIT, Node, become_guard, stream};

#[test]
fn guard_process() {
    become_guard();
}

/// An authority that signs what it is asked to.
struct Authority {
    dir: PathBuf,
    issuer: CertifiedIssuer<'static, KeyPair>,
}

impl Authority {
    fn new(field: &Field, name: &str) -> Self {
        let dir = field.path().join(name);
        fs::create_dir(&dir).unwrap();
        fs::set_permissions(&dir, fs::Permissions::from_mode(0o755)).unwrap();
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let issuer = CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap();
        fs::write(dir.join("ca.pem"), issuer.pem()).unwrap();
        Self { dir, issuer }
    }

    fn ca(&self) -> PathBuf {
        self.dir.join("ca.pem")
    }

    /// A certificate and its key for this host, or for this role.
    fn sign(&self, file: &str, subject: &str, owner: &Node) -> (PathBuf, PathBuf) {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new(vec![subject.to_owned()]).unwrap();
        params.distinguished_name.push(rcgen::DnType::CommonName, subject);
        let signed = params.signed_by(&key, &self.issuer).unwrap();
        let (cert, keyfile) =
            (self.dir.join(format!("{file}.pem")), self.dir.join(format!("{file}.key")));
        fs::write(&cert, signed.pem()).unwrap();
        fs::write(&keyfile, key.serialize_pem()).unwrap();
        fs::set_permissions(&keyfile, fs::Permissions::from_mode(0o600)).unwrap();
        if let Some(user) = &owner.user {
            std::os::unix::fs::chown(&keyfile, Some(user.uid), Some(user.gid)).unwrap();
        }
        (cert, keyfile)
    }
}

fn set(node: &mut Node, parameters: &[(&str, String)], pg_hba: &[&str]) {
    let settings = &mut node.options.settings;
    for (name, value) in parameters {
        settings.parameters.insert((*name).to_owned(), value.as_str().into());
    }
    settings.pg_hba = Some(pg_hba.iter().map(|line| (*line).to_owned()).collect());
    node.postgres = node.again();
}

/// Logs in with this `sslmode` and authority, and tells whether the connection is encrypted.
async fn log_in(node: &Node, mode: &str, root: Option<&Path>) -> Result<bool, SqlError> {
    let mut options = node.options.clone();
    options.settings.superuser.sslmode = Some(mode.to_owned());
    options.settings.superuser.sslrootcert = root.map(Path::to_owned);
    let postgres = kornak_agent::postgres::Postgres::new(options).unwrap();
    let statement = "SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()";
    let answer = postgres.sql().value("tell whether it is encrypted", statement).await?;
    Ok(answer.as_deref() == Some("t"))
}

#[tokio::test(flavor = "multi_thread")]
async fn sslmode_is_libpqs_on_a_server_that_wants_encryption_and_on_one_that_has_none() {
    let mut field = Field::new();
    let mut a = field.node("a");
    a.bootstrap().await;
    for (mode, encrypted) in [
        ("disable", Some(false)),
        ("allow", Some(false)),
        ("prefer", Some(false)),
        ("require", None),
    ] {
        assert_eq!(log_in(&a, mode, None).await.ok(), encrypted, "{mode}, without TLS");
    }
    a.postgres.stop(StopMode::Fast, LIMIT).await.unwrap();

    let (ours, theirs) = (Authority::new(&field, "ours"), Authority::new(&field, "theirs"));
    let (cert, key) = ours.sign("server", "127.0.0.1", &a);
    let path = |path: &Path| path.display().to_string();
    let tls = [
        ("ssl", "on".to_owned()),
        ("ssl_cert_file", path(&cert)),
        ("ssl_key_file", path(&key)),
        ("ssl_ca_file", path(&ours.ca())),
    ];
    let hba = [
        "hostssl all all 127.0.0.1/32 scram-sha-256",
        "hostssl replication all 127.0.0.1/32 scram-sha-256",
    ];
    set(&mut a, &tls, &hba);
    a.start_primary().await;
    let (ca, other) = (ours.ca(), theirs.ca());
    for (mode, root, encrypted) in [
        ("disable", None, None),
        ("allow", None, Some(true)),
        ("prefer", None, Some(true)),
        ("prefer", Some(&other), None),
        ("require", None, Some(true)),
        ("require", Some(&other), None),
        ("verify-ca", None, None),
        ("verify-ca", Some(&ca), Some(true)),
        ("verify-full", Some(&ca), Some(true)),
        ("verify-full", Some(&other), None),
    ] {
        let found = log_in(&a, mode, root.map(PathBuf::as_path)).await;
        assert_eq!(found.as_ref().ok(), encrypted.as_ref(), "{mode} {root:?}: {found:?}");
    }

    // Standbys, too: by libpq, and by the agent's questions to the leader.
    let mut b = field.node("b");
    set(&mut b, &tls, &hba);
    stream(&a, &b).await;
    b.postgres.leader_position(&a.upstream()).await.unwrap();

    // A certificate for another host, and clients that have to show one.
    let (elsewhere, its_key) = ours.sign("elsewhere", "elsewhere.example", &a);
    let tls = [("ssl_cert_file", path(&elsewhere)), ("ssl_key_file", path(&its_key))];
    set(&mut a, &tls, &["hostssl all all 127.0.0.1/32 scram-sha-256 clientcert=verify-full"]);
    a.postgres.stop(StopMode::Fast, LIMIT).await.unwrap();
    let (cert, key) = ours.sign("client", "postgres", &a);
    let superuser = &mut a.options.settings.superuser;
    (superuser.sslcert, superuser.sslkey) = (Some(cert), Some(key));
    a.postgres = a.again();
    a.start_primary().await;
    for (mode, encrypted) in [("verify-ca", Some(true)), ("verify-full", None)] {
        assert_eq!(log_in(&a, mode, Some(&ca)).await.ok(), encrypted, "{mode}, another name");
    }
    a.options.settings.superuser.sslcert = None;
    assert!(log_in(&a, "require", None).await.is_err(), "without a certificate of its own");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_listens_on_its_socket_alone_is_reached() {
    let mut field = Field::new();
    let mut a = field.node("a");
    a.options.settings.use_unix_socket = true;
    let dirs = [("unix_socket_directories", field.path().display().to_string())];
    set(&mut a, &dirs, &["local all all scram-sha-256", "host all all 127.0.0.1/32 reject"]);
    a.bootstrap().await;
    assert_eq!(a.execute("SELECT inet_client_addr()::text").await, None);
    let url = a.postgres.connection_url();
    assert!(url.contains(&field.path().display().to_string().replace('/', "%2F")), "{url}");
    a.options.settings.use_unix_socket = false;
    let by_tcp = a.again().sql().value("answer", "SELECT 1").await;
    assert!(matches!(by_tcp, Err(SqlError::Login(_))), "{by_tcp:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn rules_for_a_new_cluster_let_the_agent_in_on_the_socket() {
    let mut field = Field::new();
    let mut a = field.node("a");
    a.options.settings.use_unix_socket = true;
    let dirs = [("unix_socket_directories", field.path().display().to_string())];
    set(&mut a, &dirs, &[]);
    a.options.settings.pg_hba = None;
    a.postgres = a.again();
    a.postgres.initdb(&[], &["host all all 127.0.0.1/32 reject".to_owned()]).await.unwrap();
    a.postgres.start_first(&StartAs::Primary(Fencing::Unfenced)).await.unwrap();
    a.postgres.wait_ready(LIMIT).await.unwrap();
    a.postgres.create_roles().await.unwrap();
    assert_eq!(a.execute("SELECT inet_client_addr()::text").await, None);
}

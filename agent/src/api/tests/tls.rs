//! The API over TLS, with certificates made here.

use std::path::PathBuf;

use kornak_config::agent::{ServerTls, VerifyClient};
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};

use super::serving::{Served, served};
use super::*;
use crate::peers::PeerError;
use axum::http::Method;

const SOON: Duration = Duration::from_secs(10);

/// An authority, and PEM files of what it has signed.
struct Authority {
    dir: tempfile::TempDir,
    issuer: CertifiedIssuer<'static, KeyPair>,
}

impl Authority {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let issuer = CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap();
        std::fs::write(dir.path().join("ca.pem"), issuer.pem()).unwrap();
        Self { dir, issuer }
    }

    fn ca(&self) -> PathBuf {
        self.dir.path().join("ca.pem")
    }

    /// Writes a certificate for 127.0.0.1, and its key into the same file.
    fn sign(&self, name: &str) -> PathBuf {
        let key = KeyPair::generate().unwrap();
        let params = CertificateParams::new(vec!["127.0.0.1".to_owned()]).unwrap();
        let certificate = params.signed_by(&key, &self.issuer).unwrap();
        let path = self.dir.path().join(name);
        std::fs::write(&path, certificate.pem() + &key.serialize_pem()).unwrap();
        path
    }

    fn server(&self, verify_client: VerifyClient) -> ServerTls {
        ServerTls {
            certfile: self.sign("server.pem"),
            keyfile: None,
            keyfile_password: None,
            cafile: Some(self.ca()),
            verify_client,
        }
    }

    async fn serve(&self, verify_client: VerifyClient) -> Served {
        let tls = RestTls::new(&self.server(verify_client)).unwrap();
        let settings = ApiSettings {
            tls: Some(Arc::new(tls)),
            require_certificate: verify_client != VerifyClient::None,
            ..settings()
        };
        served(standby(), settings, |command| match command {
            Command::Reload { answer } => answer.send(Ok(String::new())).unwrap(),
            other => panic!("{other:?}"),
        })
        .await
    }

    fn client(&self, certificate: Option<PathBuf>) -> Peers {
        let ctl = CtlSettings {
            cacert: Some(self.ca()),
            certfile: certificate,
            ..CtlSettings::default()
        };
        Peers::new(&ctl).unwrap()
    }
}

/// The status of a GET and of a POST; `None`: no connection came to be.
async fn ask(client: &Peers, node: &Served) -> (Option<u16>, Option<u16>) {
    let url = |path| format!("https://{}{path}", node.address);
    let shown = client.send(Method::GET, &url("/health"), None, SOON).await;
    let changed = client.post_json(&url("/reload"), &json!({}), SOON).await;
    (shown.ok().map(|answer| answer.status), changed.ok().map(|answer| answer.status))
}

#[tokio::test]
async fn client_certificates_are_asked_as_configured() {
    let authority = Authority::new();
    let stranger = Authority::new();
    let with = authority.client(Some(authority.sign("client.pem")));
    let without = authority.client(None);
    let foreign = authority.client(Some(stranger.sign("client.pem")));

    let node = authority.serve(VerifyClient::None).await;
    assert_eq!(ask(&without, &node).await, (Some(200), Some(202)));
    assert_eq!(ask(&foreign, &node).await, (Some(200), Some(202)));

    let node = authority.serve(VerifyClient::Optional).await;
    assert_eq!(ask(&with, &node).await, (Some(200), Some(202)));
    assert_eq!(ask(&without, &node).await, (Some(200), Some(403)));
    assert_eq!(ask(&foreign, &node).await, (None, None));

    let node = authority.serve(VerifyClient::Required).await;
    assert_eq!(ask(&with, &node).await, (Some(200), Some(202)));
    assert_eq!(ask(&without, &node).await, (None, None));
}

#[tokio::test]
async fn a_server_is_verified_unless_told_otherwise() {
    let authority = Authority::new();
    let node = authority.serve(VerifyClient::None).await;
    let stranger = Authority::new().client(None);
    let url = format!("https://{}/health", node.address);
    let refused = stranger.send(Method::GET, &url, None, SOON).await;
    assert!(matches!(refused, Err(PeerError::Connect(_))), "{refused:?}");
    let careless = CtlSettings { insecure: true, ..CtlSettings::default() };
    let careless = Peers::new(&careless).unwrap();
    assert_eq!(ask(&careless, &node).await, (Some(200), Some(202)));
    // And who speaks no TLS gets no answer.
    let plain = format!("http://{}/health", node.address);
    assert!(careless.send(Method::GET, &plain, None, SOON).await.is_err());
}

#[tokio::test]
async fn renewed_certificates_are_taken_and_bad_ones_are_not() {
    let (old, new) = (Authority::new(), Authority::new());
    let settings = old.server(VerifyClient::None);
    let tls = Arc::new(RestTls::new(&settings).unwrap());
    let rest = ApiSettings { tls: Some(Arc::clone(&tls)), ..super::settings() };
    let node = served(standby(), rest, |command| panic!("{command:?}")).await;
    let url = format!("https://{}/health", node.address);
    let code = async |client: &Peers| {
        client.send(Method::GET, &url, None, SOON).await.ok().map(|answer| answer.status)
    };
    assert_eq!(code(&old.client(None)).await, Some(200));

    std::fs::copy(new.sign("server.pem"), &settings.certfile).unwrap();
    tls.reload(&settings).unwrap();
    assert_eq!(code(&new.client(None)).await, Some(200));
    assert_eq!(code(&old.client(None)).await, None);

    std::fs::write(&settings.certfile, "nonsense").unwrap();
    assert!(tls.reload(&settings).is_err());
    assert_eq!(code(&new.client(None)).await, Some(200));
}

/// RFC 5958's encrypted form of a key, made by OpenSSL for the password `secret`.
#[tokio::test]
async fn a_key_with_a_password_is_decrypted() {
    let authority = Authority::new();
    let plain = authority.sign("server.pem");
    let encrypted = authority.dir.path().join("key.pem");
    let made = std::process::Command::new("openssl")
        .args(["pkcs8", "-topk8", "-v2", "aes-256-cbc", "-passout", "pass:secret", "-in"])
        .arg(&plain)
        .arg("-out")
        .arg(&encrypted)
        .output()
        .unwrap();
    assert!(made.status.success(), "{made:?}");
    let with = |password: Option<&str>| ServerTls {
        certfile: plain.clone(),
        keyfile: Some(encrypted.clone()),
        keyfile_password: password.map(|password| password.to_owned().into()),
        cafile: None,
        verify_client: VerifyClient::None,
    };
    RestTls::new(&with(Some("secret"))).unwrap();
    let why = RestTls::new(&with(Some("wrong"))).unwrap_err().to_string();
    assert!(why.contains("keyfile_password"), "{why}");
    let why = RestTls::new(&with(None)).unwrap_err().to_string();
    assert!(why.contains("keyfile_password is not set"), "{why}");
}

//! Certificates, made by OpenSSL's command as PostgreSQL's documentation says
//! (`/docs/current/ssl-tcp.html`, "Creating Certificates"), which is how people have them.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

use super::scratch::Scratch;

/// A certificate's file and that of its key.
#[derive(Debug, Clone)]
pub struct Pair {
    pub cert: PathBuf,
    pub key: PathBuf,
}

/// A folder of certificates.
#[derive(Debug)]
pub struct Workshop {
    dir: PathBuf,
}

impl Workshop {
    /// An empty one that the servers can read.
    pub fn new(scratch: &Scratch) -> Self {
        Self { dir: scratch.server_dir("certificates") }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    fn openssl(&self, line: &str) -> Result<()> {
        let words = line.split_whitespace();
        let output = Command::new("openssl").args(words).current_dir(&self.dir).output();
        let output = output.context("run openssl; scripts/install.sh --tests brings it")?;
        let text = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "openssl {line}: {text}");
        Ok(())
    }

    fn pair(&self, name: &str) -> Result<Pair> {
        let (cert, key) = (self.path(&format!("{name}.crt")), self.path(&format!("{name}.key")));
        fs::set_permissions(&key, fs::Permissions::from_mode(0o600))?;
        if let Some(user) = super::postgres::server_user() {
            std::os::unix::fs::chown(&key, Some(user.uid), Some(user.gid))?;
        }
        Ok(Pair { cert, key })
    }

    /// "To create a simple self-signed certificate for the server".
    pub fn self_signed(&self, name: &str, common_name: &str) -> Result<Pair> {
        self.openssl(&format!(
            "req -new -x509 -days 365 -nodes -text -out {name}.crt -keyout {name}.key \
             -subj /CN={common_name}"
        ))?;
        self.pair(name)
    }

    /// "To create a server certificate whose identity can be validated by clients": the root.
    pub fn root(&self, name: &str, days: i32) -> Result<Pair> {
        self.request(name, name)?;
        self.openssl(&format!(
            "x509 -req -in {name}.csr -text -days {days} -extfile /etc/ssl/openssl.cnf \
             -extensions v3_ca -signkey {name}.key -out {name}.crt"
        ))?;
        self.pair(name)
    }

    /// An intermediate authority that another authority has signed.
    pub fn intermediate(&self, name: &str, by: &str) -> Result<Pair> {
        self.request(name, name)?;
        self.openssl(&format!(
            "x509 -req -in {name}.csr -text -days 1825 -extfile /etc/ssl/openssl.cnf \
             -extensions v3_ca -CA {by}.crt -CAkey {by}.key -CAcreateserial -out {name}.crt"
        ))?;
        self.pair(name)
    }

    /// A certificate without extensions; OpenSSL up to 3.1 makes it version 1.
    pub fn leaf(&self, name: &str, common_name: &str, by: &str) -> Result<Pair> {
        self.lasting(name, common_name, by, 365)
    }

    /// One whose time is over.
    pub fn expired(&self, name: &str, common_name: &str, by: &str) -> Result<Pair> {
        self.lasting(name, common_name, by, -1)
    }

    /// Without extensions, signed by itself.
    pub fn old(&self, name: &str, common_name: &str) -> Result<Pair> {
        self.request(name, common_name)?;
        self.openssl(&format!("x509 -req -in {name}.csr -signkey {name}.key -out {name}.crt"))?;
        self.pair(name)
    }

    fn lasting(&self, name: &str, common_name: &str, by: &str, days: i32) -> Result<Pair> {
        self.request(name, common_name)?;
        self.openssl(&format!(
            "x509 -req -in {name}.csr -text -days {days} -CA {by}.crt -CAkey {by}.key \
             -CAcreateserial -out {name}.crt"
        ))?;
        self.pair(name)
    }

    /// A certificate of version 3 with these extensions, in the words of OpenSSL's configuration.
    /// It is signed with SHA-384, so that a channel is not always bound by SHA-256.
    pub fn extended(&self, name: &str, common_name: &str, by: &str, lines: &str) -> Result<Pair> {
        self.request(name, common_name)?;
        fs::write(self.path(&format!("{name}.ext")), lines)?;
        self.openssl(&format!(
            "x509 -req -sha384 -in {name}.csr -days 365 -CA {by}.crt -CAkey {by}.key \
             -CAcreateserial -extfile {name}.ext -out {name}.crt"
        ))?;
        self.pair(name)
    }

    /// A list of what the authority has revoked: these certificates.
    pub fn revoked(&self, authority: &str, revoked: &[&str]) -> Result<PathBuf> {
        fs::write(self.path("revoked.index"), "")?;
        fs::write(self.path("revoked.number"), "01\n")?;
        fs::write(
            self.path("revoked.cnf"),
            "[ca]\ndefault_ca = it\n[it]\ndatabase = revoked.index\ncrlnumber = revoked.number\n\
             default_md = sha256\ncrl_extensions = ext\n[ext]\nauthorityKeyIdentifier = keyid\n",
        )?;
        let signed = format!("-config revoked.cnf -cert {authority}.crt -keyfile {authority}.key");
        for name in revoked {
            self.openssl(&format!("ca {signed} -revoke {name}.crt"))?;
        }
        self.openssl(&format!("ca {signed} -gencrl -crldays 30 -out {authority}.crl"))?;
        Ok(self.path(&format!("{authority}.crl")))
    }

    fn request(&self, name: &str, common_name: &str) -> Result<()> {
        self.openssl(&format!(
            "req -new -nodes -text -out {name}.csr -keyout {name}.key -subj /CN={common_name}"
        ))
    }

    /// Several files in one, the server's own first, as `ssl_cert_file` wants them.
    pub fn bundle(&self, name: &str, parts: &[&Path]) -> Result<PathBuf> {
        let path = self.path(name);
        let mut text = String::new();
        for part in parts {
            text.push_str(&fs::read_to_string(part)?);
        }
        fs::write(&path, text)?;
        Ok(path)
    }
}

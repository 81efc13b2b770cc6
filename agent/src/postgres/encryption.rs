//! How the agent's own SQL connections are encrypted: libpq's `sslmode` ladder
//! (/docs/current/libpq-ssl.html), by rustls.
//!
//! As in libpq a file of authorities that is there is used in every mode that has TLS, and only
//! `verify-full` looks at the name. What the file's keys do not say, libpq's variables do, and then its
//! files in `~/.postgresql`. Certificates are read anew for each connection, because they are renewed
//! more often than agents are restarted.
//!
//! Not here: GSSAPI. Walreceivers, pg_basebackup and pg_rewind have libpq itself.

use std::path::{Path, PathBuf};

use kornak_config::agent::Credentials;
use kornak_tls::{Authorities, OfServers, Rules, revoked_in};
use rustls::pki_types::ServerName;
use secrecy::SecretString;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio_postgres::config::SslMode;
use tokio_postgres::tls::MakeTlsConnect;
use tokio_postgres_rustls::MakeRustlsConnect;

use crate::tls::{self, TlsError};

/// PostgreSQL's name in ALPN.
const ALPN: &[u8] = b"postgresql";

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Mode {
    Disable,
    Allow,
    Prefer,
    Require,
    VerifyCa,
    VerifyFull,
}

/// How connections of one role are encrypted. Files are named whether they are there or not.
#[derive(Debug, Clone)]
pub(super) struct Encryption {
    mode: Mode,
    root: Option<PathBuf>,
    crl: Option<PathBuf>,
    crl_dir: Option<PathBuf>,
    cert: Option<PathBuf>,
    key: Option<PathBuf>,
    key_password: Option<SecretString>,
    /// Names of the server beside the one that is connected to.
    aliases: Vec<String>,
}

impl Encryption {
    pub(super) fn of(credentials: &Credentials) -> Self {
        let variable = |name| std::env::var(name).ok().filter(|text: &String| !text.is_empty());
        Self::with(credentials, variable)
    }

    fn with(credentials: &Credentials, variable: impl Fn(&'static str) -> Option<String>) -> Self {
        let named =
            |own: &Option<PathBuf>, name| own.clone().or_else(|| variable(name).map(PathBuf::from));
        let home = variable("HOME").map(PathBuf::from);
        let file = |own: &Option<PathBuf>, name, usual: &str| {
            named(own, name).or_else(|| Some(home.as_ref()?.join(".postgresql").join(usual)))
        };
        let mode = credentials.sslmode.clone().or_else(|| variable("PGSSLMODE"));
        Self {
            mode: match mode.as_deref() {
                Some("disable") => Mode::Disable,
                Some("allow") => Mode::Allow,
                Some("require") => Mode::Require,
                Some("verify-ca") => Mode::VerifyCa,
                Some("verify-full") => Mode::VerifyFull,
                _ => Mode::Prefer,
            },
            root: file(&credentials.sslrootcert, "PGSSLROOTCERT", "root.crt"),
            crl: file(&credentials.sslcrl, "PGSSLCRL", "root.crl"),
            crl_dir: named(&credentials.sslcrldir, "PGSSLCRLDIR"),
            cert: file(&credentials.sslcert, "PGSSLCERT", "postgresql.crt"),
            key: file(&credentials.sslkey, "PGSSLKEY", "postgresql.key"),
            key_password: credentials.sslpassword.clone(),
            aliases: Vec::new(),
        }
    }

    /// The server has this name as well. The local server is reached at `localhost`, but its certificate is for the
    /// name by which the others know it.
    pub(super) fn or_named(mut self, name: &str) -> Self {
        self.aliases.push(name.to_owned());
        self
    }

    /// No server encrypts its unix socket.
    pub(super) fn of_a_socket() -> Self {
        Self {
            mode: Mode::Disable,
            root: None,
            crl: None,
            crl_dir: None,
            cert: None,
            key: None,
            key_password: None,
            aliases: Vec::new(),
        }
    }

    /// The encryptions to try, in this order, while the server refuses for a reason that another encryption may
    /// mend.
    pub(super) fn rungs(&self) -> &'static [SslMode] {
        match self.mode {
            Mode::Disable => &[SslMode::Disable],
            Mode::Allow => &[SslMode::Disable, SslMode::Require],
            Mode::Prefer => &[SslMode::Prefer, SslMode::Disable],
            Mode::Require | Mode::VerifyCa | Mode::VerifyFull => &[SslMode::Require],
        }
    }

    /// The lists of revoked certificates. Files that are not there revoke nothing, as in libpq.
    fn lists(&self) -> Result<Vec<Vec<u8>>, TlsError> {
        let file = self.crl.as_deref().filter(|file| file.exists());
        let mut lists = file.map(revoked_in).transpose()?.unwrap_or_default();
        lists.extend(self.crl_dir.as_deref().map(lists_in).into_iter().flatten());
        Ok(lists)
    }

    /// # Errors
    /// A file cannot be read or used.
    pub(super) fn connector(&self) -> Result<Connector, TlsError> {
        let by_name = self.mode == Mode::VerifyFull;
        let verifies = by_name || self.mode == Mode::VerifyCa;
        let authorities = match &self.root {
            _ if self.mode == Mode::Disable => None,
            Some(root) if root.as_os_str() == "system" => Some(Authorities::of_this_machine()),
            // A missing file is a mistake only where it is needed, as in libpq.
            Some(root) if verifies || root.exists() => Some(Authorities::of_file(root)?),
            None if verifies => return Err(TlsError::NoAuthorities),
            _ => None,
        };
        let verifier = match authorities {
            Some(trusted) => OfServers::new(trusted.revoking(self.lists()?), Rules::Libpq, by_name)
                .or_named(self.aliases.clone()),
            None => OfServers::anybody(),
        };
        let cert = self.cert.as_deref().filter(|cert| self.mode != Mode::Disable && cert.exists());
        let own = cert.map(|cert| {
            let key = self.key.as_deref().filter(|key| key.exists()).unwrap_or(cert);
            (cert, key, self.key_password.as_ref())
        });
        let mut config = tls::client(verifier, own)?;
        config.alpn_protocols = vec![ALPN.to_vec()];
        Ok(Connector { tls: MakeRustlsConnect::new(config), by_name })
    }
}

fn lists_in(dir: &Path) -> Vec<Vec<u8>> {
    let files = std::fs::read_dir(dir).into_iter().flatten().flatten();
    // OpenSSL looks for names that it expects there, and minds nothing else.
    files.filter_map(|file| revoked_in(&file.path()).ok()).flatten().collect()
}

/// For [`tokio_postgres::Config::connect`].
#[derive(Clone)]
pub(super) struct Connector {
    tls: MakeRustlsConnect,
    by_name: bool,
}

impl<S> MakeTlsConnect<S> for Connector
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    type Stream = <MakeRustlsConnect as MakeTlsConnect<S>>::Stream;
    type TlsConnect = <MakeRustlsConnect as MakeTlsConnect<S>>::TlsConnect;
    type Error = <MakeRustlsConnect as MakeTlsConnect<S>>::Error;

    fn make_tls_connect(&mut self, host: &str) -> Result<Self::TlsConnect, Self::Error> {
        // A host that is no name to rustls, as one with an underscore, where nobody looks at it.
        let counts = self.by_name || ServerName::try_from(host).is_ok();
        let host = if counts { host } else { "0.0.0.0" };
        MakeTlsConnect::<S>::make_tls_connect(&mut self.tls, host)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_files_keys_come_before_libpqs_variables() {
        let named = |mode: &str| Credentials {
            sslmode: Some(mode.to_owned()),
            sslrootcert: Some("/own/ca".into()),
            ..Credentials::new("u", None)
        };
        let variable = |name| match name {
            "PGSSLMODE" => Some("verify-ca".to_owned()),
            "PGSSLROOTCERT" => Some("/env/ca".to_owned()),
            "PGSSLCERT" => Some("/env/cert".to_owned()),
            "HOME" => Some("/home/x".to_owned()),
            _ => None,
        };
        let nothing = |_| None;
        let own = Encryption::with(&named("require"), variable);
        assert_eq!((own.mode, own.root), (Mode::Require, Some("/own/ca".into())));
        let theirs = Encryption::with(&Credentials::new("u", None), variable);
        assert_eq!((theirs.mode, theirs.root), (Mode::VerifyCa, Some("/env/ca".into())));
        assert_eq!(theirs.cert, Some("/env/cert".into()));
        assert_eq!(theirs.key, Some("/home/x/.postgresql/postgresql.key".into()));
        for (mode, rungs) in [
            ("disable", &[SslMode::Disable][..]),
            ("allow", &[SslMode::Disable, SslMode::Require]),
            ("prefer", &[SslMode::Prefer, SslMode::Disable]),
            ("require", &[SslMode::Require]),
            ("verify-ca", &[SslMode::Require]),
            ("verify-full", &[SslMode::Require]),
        ] {
            assert_eq!(Encryption::with(&named(mode), nothing).rungs(), rungs, "{mode}");
        }
        let default = Encryption::with(&Credentials::new("u", None), nothing);
        assert_eq!(default.mode, Mode::Prefer);
    }

    #[test]
    fn nobody_can_be_verified_without_authorities() {
        let credentials =
            Credentials { sslmode: Some("verify-ca".to_owned()), ..Credentials::new("u", None) };
        let error = Encryption::with(&credentials, |_| None).connector().err();
        assert!(error.is_some_and(|error| error.to_string().contains("sslrootcert")));
    }
}

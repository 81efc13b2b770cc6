//! Configuration files of the server on disk.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use kornak_config::agent::PostgresqlSettings;
use secrecy::ExposeSecret;
use tracing::info;

use super::conf::{self, BASE_CONF, MAIN_CONF, Parameters};
use super::os::{read_file, remove_file, write_file, write_if_changed};
use super::sql::SqlError;
use super::{Following, Inner, Wanted};
use crate::guard::GuardError;

/// Why the configuration could not be put in force.
#[derive(Debug, thiserror::Error)]
pub enum ConfigureError {
    #[error("write {path}")]
    Write {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    /// The text that the operator has written there would be lost.
    #[error("keep {path} as it was: make it readable")]
    Keep {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("tell the server to read its configuration")]
    Guard(#[from] GuardError),
    #[error("see whether the configuration is in force")]
    Sql(#[from] SqlError),
    /// The server has read its files and does something else: they have an error (see its log), or
    /// `ALTER SYSTEM` says otherwise.
    #[error("{parameter} is not in force: look for errors in the log of the server")]
    NotInForce { parameter: &'static str },
}

/// Parameters that the file keeps when nobody has decided about them since this process began.
const KEPT: [&str; 2] = ["primary_conninfo", "primary_slot_name"];
pub(super) const SYNC: &str = "synchronous_standby_names";

/// Name of the password file beside the data directory, `<data_dir>.pgpass`.
const PASSFILE: &str = ".pgpass";

/// The password file: where the settings say, or beside the data directory.
/// The store's configuration in the data directory, under Patroni's name: a Patroni that takes the directory over
/// finds it, and an operator who removes it makes a new cluster of the data begin with `bootstrap.dcs`.
pub(crate) const DYNAMIC: &str = "patroni.dynamic.json";

pub(super) fn passfile(settings: &PostgresqlSettings) -> PathBuf {
    settings.pgpass.clone().unwrap_or_else(|| {
        let mut path = settings.data_dir.as_os_str().to_owned();
        path.push(PASSFILE);
        PathBuf::from(path)
    })
}

/// Bytes as characters of the same numbers, for files in whatever encoding: only ASCII is looked at.
fn characters(bytes: &[u8]) -> String {
    bytes.iter().copied().map(char::from).collect()
}

/// The bytes from which [`characters`] made this text.
fn bytes(characters: &str) -> Vec<u8> {
    characters.chars().filter_map(|c| u8::try_from(u32::from(c)).ok()).collect()
}

impl Inner {
    /// The generated file's parameters, for a standby or a primary.
    pub(super) fn file_parameters(&self, wanted: &Wanted, standby: bool) -> Parameters {
        let local = conf::parameters(Some(&self.settings.parameters));
        let mut parameters = conf::filed(&wanted.dynamic, &local, &wanted.overrides);
        let before = fs::read_to_string(self.main_conf()).unwrap_or_default();
        let before = conf::read_rendered(&before);
        match &wanted.synchronous_standby_names {
            Some(names) => {
                parameters.insert(SYNC.to_owned(), names.clone());
            }
            None => parameters.extend(before.get_key_value(SYNC).map(owned)),
        }
        parameters.extend(wanted.recovery.clone());
        // The command line wins; the file agrees with it, or each reload would complain of initdb's
        // values in the included original.
        for (name, value) in conf::controlled(&self.accepted(wanted.dynamic.clone()), None) {
            parameters.entry(name).or_insert(value);
        }
        // In a primary's file as well, where it means nothing: its absence after a promotion would
        // count as a change that waits for a restart.
        parameters
            .entry("recovery_target_timeline".to_owned())
            .or_insert_with(|| "latest".to_owned());
        if standby {
            if wanted.feedback {
                parameters.insert("hot_standby_feedback".to_owned(), "on".to_owned());
            }
            let upstream = wanted.upstream.server();
            let passfile = passfile(&self.settings);
            let dynamic = &wanted.dynamic_recovery;
            let recovery = conf::recovery(&self.settings, dynamic, &self.name, &passfile, upstream);
            parameters.extend(recovery);
            if wanted.recovery.is_empty() && !wanted.keeps_recovery {
                parameters.extend(conf::endless(&self.original()));
            }
            if matches!(wanted.upstream, Following::Undecided) {
                parameters
                    .extend(KEPT.iter().filter_map(|kept| before.get_key_value(*kept)).map(owned));
            }
        }
        parameters
    }

    /// The file that the generated one includes; empty if it cannot be read.
    fn original(&self) -> String {
        let path = match &self.settings.custom_conf {
            // As the server does, from the folder of the including file.
            Some(custom) => self.config_file("").join(custom),
            None => self.config_file(BASE_CONF),
        };
        read_file(&path, self.user.as_ref()).map(|text| characters(&text)).unwrap_or_default()
    }

    /// Writes everything that a start or a reload reads. Only files whose contents change are touched.
    pub(super) fn write_configuration(&self, standby: bool) -> Result<(), ConfigureError> {
        let wanted = self.wanted.lock().clone();
        let user = self.user.as_ref();
        let write = |path: PathBuf, text: &str, mode| {
            write_if_changed(&path, text, mode, user)
                .map(drop)
                .map_err(|source| ConfigureError::Write { path, source })
        };
        write(passfile(&self.settings), &self.passfile_text(), 0o600)?;
        self.keep_base_conf()?;
        let base = self.settings.custom_conf.as_deref().unwrap_or(Path::new(BASE_CONF));
        let mut parameters = self.accepted(self.file_parameters(&wanted, standby));
        let hba = self.settings.pg_hba.as_ref().or(wanted.dynamic_hba.as_ref());
        if let Some(lines) = hba.filter(|lines| !lines.is_empty())
            && !parameters.contains_key("hba_file")
        {
            let path = self.config_file("pg_hba.conf");
            let mode = self.mode_of(&path);
            write(path, &conf::render_lines(lines), mode)?;
        }
        let ident = self.settings.pg_ident.as_ref().or(wanted.dynamic_ident.as_ref());
        if let Some(lines) = ident.filter(|lines| !lines.is_empty())
            && !parameters.contains_key("ident_file")
        {
            let path = self.config_file("pg_ident.conf");
            let mode = self.mode_of(&path);
            write(path, &conf::render_lines(lines), mode)?;
        }
        self.ensure_hba(&parameters)?;
        if self.settings.config_dir != self.settings.data_dir {
            // Where the server would not look by itself.
            for (name, file) in [("hba_file", "pg_hba.conf"), ("ident_file", "pg_ident.conf")] {
                let path = self.config_file(file);
                if path.exists() {
                    parameters.entry(name.to_owned()).or_insert(path.display().to_string());
                }
            }
        }
        let main_mode = self.mode_of(&self.main_conf());
        write(self.main_conf(), &conf::render(Some(base), &parameters), main_mode)?;
        self.show_dynamic(&wanted.raw);
        if wanted.keeps_recovery {
            return Ok(());
        }
        self.clean_auto_conf(wanted.synchronous_standby_names.is_some())
    }

    /// See [`DYNAMIC`]. No server needs it.
    pub(super) fn show_dynamic(&self, raw: &str) {
        let path = self.settings.data_dir.join(DYNAMIC);
        if raw.is_empty() {
            return;
        }
        if let Err(error) = write_if_changed(&path, raw, self.mode_of(&path), self.user.as_ref()) {
            tracing::warn!(error = &error as &dyn std::error::Error, file = %path.display(), "configuration file could not be shown");
        }
    }

    /// A copy of a server that has its rules elsewhere comes without any, and no server starts so.
    fn ensure_hba(&self, parameters: &Parameters) -> Result<(), ConfigureError> {
        let path = self.config_file("pg_hba.conf");
        let replication = &self.settings.replication;
        if path.exists() || parameters.contains_key("hba_file") || replication.password.is_none() {
            return Ok(());
        }
        let there = self.settings.data_dir.join("pg_hba.conf");
        let text = match read_file(&there, self.user.as_ref()) {
            Ok(text) => text,
            Err(_) => conf::render_lines(&conf::default_hba(&replication.username)).into_bytes(),
        };
        write_file(&path, &text, self.mode_of(&there), self.user.as_ref())
            .map_err(|source| ConfigureError::Write { path, source })
    }

    fn passfile_text(&self) -> String {
        let settings = &self.settings;
        let roles =
            [Some(&settings.replication), Some(&settings.superuser), settings.rewind.as_ref()];
        let logins: Vec<(&str, &str)> = roles
            .into_iter()
            .flatten()
            .filter_map(|role| {
                let password = role.password.as_ref()?;
                Some((role.username.as_str(), password.expose_secret()))
            })
            .collect();
        conf::passfile(&logins)
    }

    /// The password file alone, for tools that run before there is a data directory.
    pub(super) fn write_passfile(&self) -> Result<PathBuf, ConfigureError> {
        let path = passfile(&self.settings);
        write_if_changed(&path, &self.passfile_text(), 0o600, self.user.as_ref())
            .map_err(|source| ConfigureError::Write { path: path.clone(), source })?;
        Ok(path)
    }

    /// The file that was there first becomes the base; an empty one if there is none.
    fn keep_base_conf(&self) -> Result<(), ConfigureError> {
        let base = self.config_file(BASE_CONF);
        if base.exists() || self.settings.custom_conf.is_some() {
            return Ok(());
        }
        let main = self.main_conf();
        let original = match read_file(&main, self.user.as_ref()) {
            Ok(original) => original,
            Err(error) if error.kind() == io::ErrorKind::NotFound => Vec::new(),
            Err(source) => return Err(ConfigureError::Keep { path: main, source }),
        };
        write_file(&base, &original, self.mode_of(&main), self.user.as_ref())
            .map_err(|source| ConfigureError::Write { path: base, source })
    }

    fn clean_auto_conf(&self, names_are_ours: bool) -> Result<(), ConfigureError> {
        let path = self.settings.data_dir.join("postgresql.auto.conf");
        let text = characters(&read_file(&path, self.user.as_ref()).unwrap_or_default());
        match conf::clean_auto_conf(&text, names_are_ours) {
            Some(clean) => {
                info!(path = %path.display(), "lines of ours, or unreadable ones, removed from the configuration file");
                write_file(&path, &bytes(&clean), self.mode_of(&path), self.user.as_ref())
                    .map_err(|source| ConfigureError::Write { path, source })
            }
            None => Ok(()),
        }
    }

    /// A file keeps its mode; a new one is for the group as well where the data directory is.
    pub(super) fn mode_of(&self, path: &Path) -> u32 {
        if let Ok(found) = fs::metadata(path) {
            return found.mode() & 0o777;
        }
        let group = fs::metadata(&self.settings.data_dir).is_ok_and(|dir| dir.mode() & 0o050 != 0);
        if group { 0o640 } else { 0o600 }
    }

    /// Makes the next start one with exactly this signal file; an old request to promote is forgotten.
    pub(super) fn set_signal_file(&self, wanted: Option<&str>) -> Result<(), ConfigureError> {
        for name in ["standby.signal", "recovery.signal", "promote"] {
            let path = self.settings.data_dir.join(name);
            let outcome = if wanted == Some(name) {
                let mode = self.mode_of(&path);
                write_if_changed(&path, "", mode, self.user.as_ref()).map(drop)
            } else {
                remove_file(&path, self.user.as_ref())
            };
            outcome.map_err(|source| ConfigureError::Write { path, source })?;
        }
        Ok(())
    }

    /// Whether the server is, or will start as, a standby.
    pub(super) fn has_standby_signal(&self) -> bool {
        self.settings.data_dir.join("standby.signal").exists()
    }

    pub(super) fn main_conf(&self) -> PathBuf {
        self.config_file(MAIN_CONF)
    }

    pub(super) fn config_file(&self, name: &str) -> PathBuf {
        self.settings.config_dir.join(name)
    }
}

fn owned((name, value): (&String, &String)) -> (String, String) {
    (name.clone(), value.clone())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whatever_the_encoding_bytes_stay() {
        let all: Vec<u8> = (0..=255).collect();
        assert_eq!(bytes(&characters(&all)), all);
    }
}

//! Patroni itself and its `patronictl`, from PyPI, in a virtual environment of the tests' own.
//!
//! Made once and kept: below `/var/tmp`, because the OS user of the servers has to reach it, which
//! it seldom can a checkout's target directory. The newest release is what counts, so an
//! environment older than a week is brought up to date; without a network the old one will do.

use std::fs::{self, File};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use rustix::fs::{FlockOperation, flock};

use super::postgres::server_user;

/// The installed packages: Patroni with its etcd v3 client, its driver, and the monitoring checks.
const PACKAGES: &[&str] = &["patroni[etcd3]", "psycopg2-binary", "check_patroni"];

/// How long an environment counts as new.
const FRESH: Duration = Duration::from_secs(7 * 24 * 3600);

/// The programs of the environment.
#[derive(Debug, Clone)]
pub struct Patroni {
    dir: PathBuf,
}

impl Patroni {
    /// Finds the environment, or makes it. `KORNAK_PATRONI_VENV` names another place.
    ///
    /// # Errors
    /// The environment cannot be made: no `python3-venv`, no network.
    pub fn installed() -> Result<Self> {
        let dir = match std::env::var_os("KORNAK_PATRONI_VENV") {
            Some(named) => named.into(),
            None => own_cache()?.join("patroni-venv"),
        };
        let lock = dir.with_extension("lock");
        let lock = File::create(&lock).with_context(|| format!("open {}", lock.display()))?;
        // Waits while another test makes it.
        flock(&lock, FlockOperation::LockExclusive).context("lock the environment")?;
        let patroni = Self { dir };
        let stamp = patroni.dir.join("complete");
        let age = fs::metadata(&stamp).and_then(|it| it.modified()).ok();
        match age.map(|at| at.elapsed().unwrap_or_default()) {
            Some(age) if age < FRESH => {}
            Some(_) => {
                // What is there works; the newest is better.
                let _ = patroni.install();
                fs::write(&stamp, "").context("mark the environment")?;
            }
            None => {
                patroni.create().with_context(|| {
                    format!(
                        "make an environment for Patroni in {}: it takes python3-venv \
                         (scripts/install.sh --tests) and, once, a package index that pip reaches",
                        patroni.dir.display()
                    )
                })?;
                fs::write(&stamp, "").context("mark the environment")?;
            }
        }
        Ok(patroni)
    }

    fn create(&self) -> Result<()> {
        if self.dir.exists() {
            fs::remove_dir_all(&self.dir).context("remove what an earlier try left")?;
        }
        // Debian's: others may lie below a home that the servers' user cannot enter.
        let debian = Path::new("/usr/bin/python3");
        let python = if debian.exists() { debian } else { Path::new("python3") };
        finish(Command::new(python).args(["-m", "venv"]).arg(&self.dir))?;
        self.install()
    }

    fn install(&self) -> Result<()> {
        let mut pip = Command::new(self.program("python3"));
        finish(pip.args(["-m", "pip", "install", "--quiet", "--upgrade"]).args(PACKAGES))
    }

    /// The path of one of its programs.
    pub fn program(&self, name: &str) -> PathBuf {
        self.dir.join("bin").join(name)
    }

    /// `patroni FILE` as the OS user of the servers.
    pub fn daemon(&self, file: &Path) -> Command {
        let mut command = self.command("patroni");
        if let Some(user) = server_user() {
            command.uid(user.uid).gid(user.gid);
        }
        command.arg(file);
        command
    }

    /// One of its programs, reading no configuration of the machine.
    pub fn command(&self, name: &str) -> Command {
        let mut command = Command::new(self.program(name));
        command.current_dir("/").env_clear();
        command.env("PATH", "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin");
        command.env("HOME", "/nonexistent").env("LC_ALL", "C.UTF-8").env("TZ", "UTC");
        command
    }
}

/// `/var/tmp/kornak-tests-<uid>`, ours alone to write.
fn own_cache() -> Result<PathBuf> {
    let uid = rustix::process::geteuid().as_raw();
    let dir = PathBuf::from(format!("/var/tmp/kornak-tests-{uid}"));
    match fs::create_dir(&dir) {
        Ok(()) => fs::set_permissions(&dir, fs::Permissions::from_mode(0o755))?,
        Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {}
        Err(error) => return Err(error).with_context(|| format!("make {}", dir.display())),
    }
    let found = fs::symlink_metadata(&dir)?;
    ensure!(found.is_dir() && found.uid() == uid, "{} is somebody else's", dir.display());
    Ok(dir)
}

fn finish(command: &mut Command) -> Result<()> {
    let name = format!("{command:?}");
    let output = command.stdin(Stdio::null()).output().with_context(|| format!("run {name}"))?;
    if !output.status.success() {
        bail!("{name}: {}", String::from_utf8_lossy(&output.stderr));
    }
    Ok(())
}

//! The kernel's watchdog, a second line behind the guard: it resets a host on which nobody proves the
//! lease any more, also when the kernel hangs so that no process can do anything
//! (`Documentation/watchdog/watchdog-api.rst` of Linux).
//!
//! It is switched on before a promotion and told that all is well with each proven renewal. A server
//! that is no primary any more, and maintenance mode, switch it off in order; losing the lease does
//! not: then it is what the device is for.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::sync::Arc;
use std::time::Duration;

use kornak_cluster::Moment;
use kornak_config::agent::{WatchdogDriver, WatchdogMode, WatchdogSettings};
use parking_lot::Mutex;
use rustix::fs::OFlags;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use crate::context::Context;
use crate::guard::boottime_now;
use crate::ha::Server;

/// Between two looks when the lease does not change.
const EVERY: Duration = Duration::from_secs(1);

/// Why there is no watchdog.
#[derive(Debug, thiserror::Error)]
pub enum WatchdogError {
    #[error("open {device}: its group must be the agent's, or set watchdog.mode: off")]
    Open {
        device: String,
        #[source]
        source: io::Error,
    },
    #[error("set the timeout of {device} to {seconds} s")]
    Timeout {
        device: String,
        seconds: u32,
        #[source]
        source: io::Error,
    },
}

/// The device, while it is switched on.
#[derive(Debug)]
pub struct Watchdog {
    settings: WatchdogSettings,
    device: Mutex<Option<Active>>,
    complained: Mutex<Option<String>>,
}

#[derive(Debug)]
struct Active {
    file: File,
    seconds: u32,
}

impl Watchdog {
    /// Touches nothing yet.
    pub fn new(settings: WatchdogSettings) -> Self {
        Self { settings, device: Mutex::new(None), complained: Mutex::new(None) }
    }

    /// Whether this node may lead: a required device is there and can be written to.
    pub fn is_able(&self) -> bool {
        self.settings.mode != WatchdogMode::Required
            || self.device.lock().is_some()
            || rustix::fs::access(&self.settings.device, rustix::fs::Access::WRITE_OK).is_ok()
    }

    /// Switches it on for leases of this length, or sets another length. False: it is required and
    /// there is none.
    pub fn activate(&self, ttl: Duration) -> bool {
        if self.settings.mode == WatchdogMode::Off {
            return true;
        }
        let seconds = timeout_seconds(&self.settings, ttl);
        let mut device = self.device.lock();
        if device.as_ref().is_some_and(|active| active.seconds == seconds) {
            return true;
        }
        match self.open(device.take(), seconds) {
            Ok(active) => {
                let name = self.settings.device.display();
                info!(device = %name, timeout_s = seconds, "watchdog switched on");
                *device = Some(active);
                *self.complained.lock() = None;
                true
            }
            Err(error) => {
                let required = self.settings.mode == WatchdogMode::Required;
                let text = error.to_string();
                let told = self.complained.lock().replace(text.clone()).as_ref() == Some(&text);
                if required && !told {
                    let error = &error as &dyn std::error::Error;
                    warn!(error, "the watchdog that is required cannot be switched on");
                }
                !required
            }
        }
    }

    fn open(&self, old: Option<Active>, seconds: u32) -> Result<Active, WatchdogError> {
        let device = self.settings.device.display().to_string();
        let file = match old {
            Some(active) => active.file,
            None => OpenOptions::new()
                .write(true)
                // A pipe that nobody reads must not keep the agent waiting.
                .custom_flags(OFlags::NONBLOCK.bits().cast_signed())
                .open(&self.settings.device)
                .map_err(|source| WatchdogError::Open { device: device.clone(), source })?,
        };
        let outcome = match self.settings.driver {
            WatchdogDriver::Kernel => set_timeout(&file, seconds),
            WatchdogDriver::Testing => {
                (&file).write_all(format!("Ctimeout={seconds}\n").as_bytes())
            }
        };
        outcome.map_err(|source| WatchdogError::Timeout { device, seconds, source })?;
        Ok(Active { file, seconds })
    }

    /// Says that all is well.
    pub fn ping(&self) {
        let mut device = self.device.lock();
        let Some(active) = device.as_ref() else { return };
        if let Err(error) = (&active.file).write_all(b"1") {
            warn!(error = %error, "the watchdog could not be told that all is well");
            *device = None;
        }
    }

    /// Switches it off by the letter that says that this is meant.
    pub fn disable(&self) {
        if let Some(active) = self.device.lock().take() {
            match (&active.file).write_all(b"V") {
                Ok(()) => info!("watchdog switched off"),
                Err(error) => warn!(error = %error, "the watchdog could not be switched off"),
            }
        }
    }
}

/// The lease less the margin, so that the host is gone before another leads.
fn timeout_seconds(settings: &WatchdogSettings, ttl: Duration) -> u32 {
    let timeout = match settings.safety_margin {
        Some(margin) => ttl.saturating_sub(margin),
        None => ttl / 2,
    };
    u32::try_from(timeout.as_secs()).unwrap_or(u32::MAX).max(1)
}

#[expect(unsafe_code, reason = "rustix has the shape of this ioctl and cannot know its number")]
fn set_timeout(file: &File, seconds: u32) -> io::Result<()> {
    use rustix::ioctl::{Updater, ioctl, opcode};
    const WDIOC_SETTIMEOUT: rustix::ioctl::Opcode = opcode::read_write::<i32>(b'W', 6);
    let mut value = i32::try_from(seconds).unwrap_or(i32::MAX);
    // SAFETY: WDIOC_SETTIMEOUT reads and writes one int, which `value` is.
    let outcome = unsafe { ioctl(file, Updater::<WDIOC_SETTIMEOUT, i32>::new(&mut value)) };
    outcome.map_err(io::Error::from)
}

/// What the device is to be told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Word {
    /// All is well, by a proof that has not been told yet.
    Well,
    /// Nothing: there is no news, or the lease is being lost.
    Nothing,
    Off,
}

/// Judges what is known. `proof`: the moment until which the lease is proven; `told`: the last one that
/// the device heard of.
fn word(
    proof: Option<Moment>,
    told: Option<Moment>,
    now: Moment,
    needed: bool,
    maybe_primary: bool,
) -> Word {
    match proof {
        _ if !needed => Word::Off,
        Some(until) if now < until && told != Some(until) => Word::Well,
        None if !maybe_primary => Word::Off,
        _ => Word::Nothing,
    }
}

/// Tells the device what there is to tell until `stop`; switched on by whoever promotes.
pub async fn run(ctx: Arc<Context>, stop: CancellationToken) {
    let mut held = ctx.keeper.subscribe();
    let mut told = None;
    loop {
        let proof = held.borrow_and_update().map(|held| held.until);
        let config = ctx.cluster().config.unwrap_or_default();
        let needed = !config.pause && config.standby_cluster.is_none();
        let server = ctx.observed().server.clone();
        let maybe_primary = !matches!(server, Server::Stopped | Server::Standby(_));
        match word(proof, told, boottime_now(), needed, maybe_primary) {
            Word::Well => {
                told = proof;
                // A leader that has come back into service, or found its server running.
                if matches!(server, Server::Primary(_)) {
                    ctx.watchdog.activate(config.ttl);
                }
                ctx.watchdog.ping();
            }
            Word::Nothing => {}
            Word::Off => ctx.watchdog.disable(),
        }
        tokio::select! {
            () = stop.cancelled() => return,
            _ = held.changed() => {}
            () = tokio::time::sleep(EVERY) => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;

    fn settings(mode: WatchdogMode, device: &std::path::Path) -> WatchdogSettings {
        WatchdogSettings {
            mode,
            device: device.to_owned(),
            safety_margin: Some(Duration::from_secs(5)),
            driver: WatchdogDriver::Testing,
        }
    }

    #[test]
    fn the_device_hears_of_each_proof_once_and_of_a_lost_lease_nothing() {
        let at = |seconds: u64| Some(Moment::at_millis(seconds * 1000));
        let now = Moment::at_millis(10_000);
        assert_eq!(word(at(20), at(18), now, true, true), Word::Well);
        assert_eq!(word(at(20), at(20), now, true, true), Word::Nothing);
        assert_eq!(word(at(9), at(8), now, true, true), Word::Nothing, "it has run out");
        assert_eq!(word(None, at(20), now, true, true), Word::Nothing, "a primary without a lease");
        assert_eq!(word(None, at(20), now, true, false), Word::Off, "it is no primary any more");
        assert_eq!(word(at(20), at(18), now, false, true), Word::Off, "maintenance mode");
    }

    #[test]
    fn it_is_switched_on_with_a_timeout_and_off_by_its_letter() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("device");
        std::fs::write(&path, "").unwrap();
        let watchdog = Watchdog::new(settings(WatchdogMode::Required, &path));
        assert!(watchdog.is_able() && watchdog.activate(Duration::from_secs(30)));
        watchdog.ping();
        assert!(watchdog.activate(Duration::from_secs(20)), "another length, the same device");
        watchdog.disable();
        watchdog.ping();
        let mut heard = String::new();
        File::open(&path).unwrap().read_to_string(&mut heard).unwrap();
        assert_eq!(heard, "Ctimeout=25\n1Ctimeout=15\nV");
    }

    #[test]
    fn without_the_device_only_who_requires_it_may_not_lead() {
        let nowhere = std::path::Path::new("/nonexistent/watchdog");
        let required = Watchdog::new(settings(WatchdogMode::Required, nowhere));
        assert!(!required.is_able() && !required.activate(Duration::from_secs(30)));
        let automatic = Watchdog::new(settings(WatchdogMode::Automatic, nowhere));
        assert!(automatic.is_able() && automatic.activate(Duration::from_secs(30)));
    }
}

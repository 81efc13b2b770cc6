//! The kernel's watchdog, a second line behind the guard: it resets a host on which nobody proves the
//! lease any more, also when the kernel hangs so that no process can do anything
//! (`Documentation/watchdog/watchdog-api.rst` of Linux).
//!
//! The watchdog is switched on before a promotion and told that all is well with each proven renewal. A server
//! that is no primary any more, and maintenance mode, switch it off in order; losing the lease does
//! not: then it is what the device is for.

mod device;

use std::io;
use std::time::Duration;

use device::Device;
use kornak_cluster::{Moment, discard};
use kornak_config::agent::{WatchdogMode, WatchdogSettings};
use parking_lot::Mutex;
use tracing::{error, info, warn};

use crate::lease::renewed_every;

/// Between two looks when the lease does not change.
pub(crate) const EVERY: Duration = Duration::from_secs(1);

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
    /// The device would fire when another member may lead already.
    #[error("{device} fires after {in_force} s, later than the {seconds} s that are safe")]
    TooLong { device: String, in_force: u32, seconds: u32 },
    /// The device would fire on a leader that is well.
    #[error("{device} fires after {in_force} s, before the lease would be renewed")]
    TooShort { device: String, in_force: u32 },
}

/// The device, while it is switched on.
#[derive(Debug)]
pub struct Watchdog {
    settings: WatchdogSettings,
    active: Mutex<Option<Active>>,
    complained: Mutex<Option<String>>,
}

#[derive(Debug)]
struct Active {
    device: Device,
    /// The timeout that was asked for.
    seconds: u32,
}

impl Watchdog {
    /// Touches nothing yet.
    pub fn new(settings: WatchdogSettings) -> Self {
        Self { settings, active: Mutex::new(None), complained: Mutex::new(None) }
    }

    /// Whether this node may lead: a required device is there and can be written to.
    pub fn is_able(&self) -> bool {
        self.settings.mode != WatchdogMode::Required
            || self.active.lock().is_some()
            || rustix::fs::access(&self.settings.device, rustix::fs::Access::WRITE_OK).is_ok()
    }

    /// Switches it on for leases of this length, or sets another length. False: it is required and
    /// there is none that is safe.
    pub fn activate(&self, ttl: Duration) -> bool {
        if self.settings.mode == WatchdogMode::Off {
            return true;
        }
        let seconds = timeout_seconds(&self.settings, ttl);
        let mut active = self.active.lock();
        if active.as_ref().is_some_and(|active| active.seconds == seconds) {
            return true;
        }
        let done = match active.as_mut() {
            None => self.switch_on(&mut active, seconds, ttl),
            Some(on) => {
                on.seconds = seconds;
                self.adjust(&on.device, seconds, ttl)
            }
        };
        match done {
            Ok(()) => {
                *self.complained.lock() = None;
                true
            }
            Err(error) => self.complain(&error),
        }
    }

    fn switch_on(
        &self,
        active: &mut Option<Active>,
        seconds: u32,
        ttl: Duration,
    ) -> Result<(), WatchdogError> {
        let open = Device::open(&self.settings);
        let device = open.map_err(|source| WatchdogError::Open { device: self.name(), source })?;
        if !device.closable {
            warn!(
                device = self.name(),
                "watchdog cannot be switched off again: the host is reset when this node stops leading"
            );
        }
        let adjusted = self.adjust(&device, seconds, ttl);
        let required = self.settings.mode == WatchdogMode::Required;
        let is_of_use = match &adjusted {
            Ok(()) => true,
            // Late is better than never, unless more was asked for.
            Err(error) => !required && matches!(error, WatchdogError::TooLong { .. }),
        };
        // One that cannot be switched off has to be told that all is well from now on.
        if is_of_use || !device.closable {
            *active = Some(Active { device, seconds });
        } else if let Err(error) = device.close() {
            warn!(error = &error as &dyn std::error::Error, "watchdog could not be switched off");
        }
        adjusted
    }

    fn adjust(&self, device: &Device, seconds: u32, ttl: Duration) -> Result<(), WatchdogError> {
        let set = device.set_timeout(seconds);
        let in_force =
            set.map_err(|source| WatchdogError::Timeout { device: self.name(), seconds, source })?;
        info!(device = self.name(), timeout_s = in_force, "watchdog switched on");
        match fit(in_force, seconds, renewed_every(ttl)) {
            Fit::Fits => Ok(()),
            Fit::TooLong => Err(WatchdogError::TooLong { device: self.name(), in_force, seconds }),
            Fit::TooShort => Err(WatchdogError::TooShort { device: self.name(), in_force }),
        }
    }

    fn name(&self) -> String {
        self.settings.device.display().to_string()
    }

    /// Says it once; whether the node may lead without.
    fn complain(&self, error: &WatchdogError) -> bool {
        let required = self.settings.mode == WatchdogMode::Required;
        let text = error.to_string();
        let told = self.complained.lock().replace(text.clone()).as_ref() == Some(&text);
        // Most hosts have none, and nobody has asked for one.
        let absent = matches!(error, WatchdogError::Open { .. });
        if !told && (required || !absent) {
            let error = error as &dyn std::error::Error;
            warn!(error, required, "no safe watchdog is available");
        }
        !required
    }

    /// Says that all is well.
    pub fn ping(&self) {
        let mut active = self.active.lock();
        let Some(on) = active.as_ref() else { return };
        if let Err(error) = on.device.ping() {
            warn!(error = &error as &dyn std::error::Error, "watchdog could not be pinged");
            *active = None;
        }
    }

    /// Switches it off, if it can be.
    pub fn disable(&self) {
        let Some(Active { device, .. }) = self.active.lock().take() else { return };
        if !device.closable {
            // Some more time for whoever is at work here.
            discard::only_helps(device.ping());
            error!(device = self.name(), "watchdog cannot be switched off: it resets the host");
        }
        match device.close() {
            Ok(()) => info!("watchdog switched off"),
            Err(error) => warn!(
                error = &error as &dyn std::error::Error,
                "watchdog could not be switched off"
            ),
        }
    }
}

/// The use of a timeout.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fit {
    Fits,
    TooLong,
    TooShort,
}

/// Judges the timeout that is in force. `wanted`: the longest that is safe; `every`: how often the device
/// hears that all is well.
fn fit(in_force: u32, wanted: u32, every: Duration) -> Fit {
    if Duration::from_secs(u64::from(in_force)) < every {
        Fit::TooShort
    } else if in_force > wanted {
        Fit::TooLong
    } else {
        Fit::Fits
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

/// The message for the device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Word {
    /// All is well, by a proof that has not been told yet.
    Well,
    /// Nothing: there is no news, or the lease is being lost.
    Nothing,
    Off,
}

/// Judges what is known. `proof`: the moment until which the lease is proven; `told`: the last one that
/// the device heard of.
pub(crate) fn word(
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

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::Read;

    use kornak_config::agent::WatchdogDriver;

    use super::*;

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
    fn a_timeout_is_safe_between_the_renewals_and_the_end_of_the_lease() {
        let every = Duration::from_millis(1500);
        for (in_force, expected) in [
            (1, Fit::TooShort),
            (2, Fit::Fits),
            (5, Fit::Fits),
            (6, Fit::TooLong),
            (60, Fit::TooLong),
        ] {
            assert_eq!(fit(in_force, 5, every), expected, "{in_force}");
        }
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

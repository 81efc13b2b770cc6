//! The device itself: the kernel's by its ioctls, or Patroni's test driver, which writes what it would
//! have asked for into a pipe.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;

use kornak_config::agent::{WatchdogDriver, WatchdogSettings};
use rustix::fs::OFlags;
use rustix::ioctl::{Getter, Opcode, Updater, ioctl, opcode};

/// `struct watchdog_info` of `linux/watchdog.h`.
#[repr(C)]
struct Info {
    options: u32,
    firmware_version: u32,
    identity: [u8; 32],
}

const GET_SUPPORT: Opcode = opcode::read::<Info>(b'W', 0);
const SET_TIMEOUT: Opcode = opcode::read_write::<i32>(b'W', 6);
const GET_TIMEOUT: Opcode = opcode::read::<i32>(b'W', 7);

const CAN_SET_TIMEOUT: u32 = 0x0080;
const CAN_BE_CLOSED: u32 = 0x0100;

/// A device that is open, and so counts.
#[derive(Debug)]
pub(super) struct Device {
    file: File,
    driver: WatchdogDriver,
    settable: bool,
    /// The device can be switched off: closing it after the letter for that ends the counting. Otherwise it
    /// resets the host once nobody tells it that all is well.
    pub(super) closable: bool,
}

impl Device {
    pub(super) fn open(settings: &WatchdogSettings) -> io::Result<Self> {
        let file = OpenOptions::new()
            .write(true)
            // A pipe that nobody reads must not keep the agent waiting.
            .custom_flags(OFlags::NONBLOCK.bits().cast_signed())
            .open(&settings.device)?;
        let options = match settings.driver {
            WatchdogDriver::Kernel => support(&file)?,
            WatchdogDriver::Testing => CAN_SET_TIMEOUT | CAN_BE_CLOSED,
        };
        let has = |option| options & option != 0;
        let (settable, closable) = (has(CAN_SET_TIMEOUT), has(CAN_BE_CLOSED));
        Ok(Self { file, driver: settings.driver, settable, closable })
    }

    /// Asks for a timeout; the one that is in force then, for a driver rounds, or has but one.
    pub(super) fn set_timeout(&self, seconds: u32) -> io::Result<u32> {
        match self.driver {
            WatchdogDriver::Testing => {
                (&self.file).write_all(format!("Ctimeout={seconds}\n").as_bytes())?;
                Ok(seconds)
            }
            WatchdogDriver::Kernel if self.settable => set_timeout(&self.file, seconds),
            WatchdogDriver::Kernel => timeout(&self.file),
        }
    }

    /// Says that all is well.
    pub(super) fn ping(&self) -> io::Result<()> {
        (&self.file).write_all(b"1")
    }

    /// Switches it off by the letter that says that this is meant.
    pub(super) fn close(self) -> io::Result<()> {
        (&self.file).write_all(b"V")
    }
}

#[expect(unsafe_code, reason = "rustix has the shape of this ioctl and cannot know its number")]
fn support(file: &File) -> io::Result<u32> {
    // SAFETY: WDIOC_GETSUPPORT writes one `struct watchdog_info`, which `Info` is.
    let info = unsafe { ioctl(file, Getter::<GET_SUPPORT, Info>::new()) };
    Ok(info?.options)
}

#[expect(unsafe_code, reason = "rustix has the shape of this ioctl and cannot know its number")]
fn set_timeout(file: &File, seconds: u32) -> io::Result<u32> {
    let mut value = i32::try_from(seconds).unwrap_or(i32::MAX);
    // SAFETY: WDIOC_SETTIMEOUT reads and writes one int, which `value` is.
    unsafe { ioctl(file, Updater::<SET_TIMEOUT, i32>::new(&mut value)) }?;
    // Some drivers do not write it back, and all tell it here.
    Ok(timeout(file).unwrap_or_else(|_| value.unsigned_abs()))
}

#[expect(unsafe_code, reason = "rustix has the shape of this ioctl and cannot know its number")]
fn timeout(file: &File) -> io::Result<u32> {
    // SAFETY: WDIOC_GETTIMEOUT writes one int.
    let value = unsafe { ioctl(file, Getter::<GET_TIMEOUT, i32>::new()) };
    Ok(value?.unsigned_abs())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As `linux/watchdog.h` computes them on x86 and ARM.
    #[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
    #[test]
    fn the_requests_have_the_kernels_numbers() {
        assert_eq!(
            [GET_SUPPORT, SET_TIMEOUT, GET_TIMEOUT],
            [0x8028_5700, 0xC004_5706, 0x8004_5707]
        );
    }

    #[test]
    fn what_is_no_watchdog_is_not_taken_for_one() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("device");
        std::fs::write(&path, "").unwrap();
        let settings = WatchdogSettings {
            mode: kornak_config::agent::WatchdogMode::Required,
            device: path,
            safety_margin: None,
            driver: WatchdogDriver::Kernel,
        };
        assert!(Device::open(&settings).is_err());
    }
}

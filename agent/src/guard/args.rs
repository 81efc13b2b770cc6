//! The guard's command line.

use std::ffi::OsString;
use std::path::PathBuf;
use std::time::Duration;

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Args {
    pub(super) data_dir: PathBuf,
    pub(super) runtime_dir: PathBuf,
    pub(super) stop_budget: Duration,
    pub(super) linger: Duration,
    pub(super) jump_grace: Option<Duration>,
}

impl Args {
    pub(super) fn parse(args: impl IntoIterator<Item = OsString>) -> Result<Self, String> {
        let (mut data_dir, mut runtime_dir) = (None, None);
        let (mut stop_budget, mut linger, mut jump_grace) = (1000, 10_000, 0);
        let mut args = args.into_iter();
        while let Some(name) = args.next() {
            let name = name.to_string_lossy().into_owned();
            let value = args.next().ok_or_else(|| format!("{name} needs a value"))?;
            let number = || {
                let text = value.to_string_lossy();
                text.parse::<u64>().map_err(|_| format!("{name} needs a number, not {text}"))
            };
            match name.as_str() {
                "--data-dir" => data_dir = Some(PathBuf::from(&value)),
                "--runtime-dir" => runtime_dir = Some(PathBuf::from(&value)),
                "--stop-budget-ms" => stop_budget = number()?,
                "--linger-ms" => linger = number()?,
                "--jump-grace-ms" => jump_grace = number()?,
                _ => return Err(format!("{name} is not an option of the guard")),
            }
        }
        Ok(Self {
            data_dir: data_dir.ok_or("--data-dir is missing")?,
            runtime_dir: runtime_dir.ok_or("--runtime-dir is missing")?,
            stop_budget: Duration::from_millis(stop_budget),
            linger: Duration::from_millis(linger),
            jump_grace: (jump_grace > 0).then(|| Duration::from_millis(jump_grace)),
        })
    }
}

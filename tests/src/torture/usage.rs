//! The resources of processes: memory and open files, over time.

use std::collections::BTreeMap;
use std::fmt;
use std::fs;
use std::time::Duration;

/// Resident memory in KiB, and open descriptors.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Sample {
    pub memory: u64,
    pub files: u64,
}

/// The samples of each process, by its name.
#[derive(Debug, Default)]
pub struct Usage {
    samples: BTreeMap<String, Vec<(Duration, Sample)>>,
}

impl Usage {
    /// Looks at these processes; one that has just ended is left out.
    pub fn look(&mut self, now: Duration, processes: &[(String, u32)]) {
        for (name, pid) in processes {
            if let Some(sample) = sample(*pid) {
                self.samples.entry(name.clone()).or_default().push((now, sample));
            }
        }
    }
}

fn sample(pid: u32) -> Option<Sample> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = status.lines().find(|line| line.starts_with("VmRSS:"))?;
    let memory = line.split_whitespace().nth(1)?.parse().ok()?;
    let files = fs::read_dir(format!("/proc/{pid}/fd")).ok()?.count() as u64;
    Some(Sample { memory, files })
}

impl fmt::Display for Usage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "{:<16}{:>10}{:>10}{:>10}{:>9}{:>9}{:>9}",
            "process", "MiB first", "largest", "last", "files", "largest", "last"
        )?;
        for (name, samples) in &self.samples {
            let (Some((_, first)), Some((_, last))) = (samples.first(), samples.last()) else {
                continue;
            };
            let largest = |of: fn(&Sample) -> u64| {
                samples.iter().map(|(_, sample)| of(sample)).max().unwrap_or_default()
            };
            writeln!(
                f,
                "{:<16}{:>10}{:>10}{:>10}{:>9}{:>9}{:>9}",
                name,
                first.memory / 1024,
                largest(|sample| sample.memory) / 1024,
                last.memory / 1024,
                first.files,
                largest(|sample| sample.files),
                last.files
            )?;
        }
        Ok(())
    }
}

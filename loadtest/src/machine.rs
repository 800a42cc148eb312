//! What the machine says of processes and of its disk: CPU seconds, resident memory, fdatasync rate.

use std::{fs, io::Write as _, path::Path, time::Duration};

use anyhow::{Context as _, Result};

use crate::clock::RunClock;

/// Size of an append when the disk is measured, bytes.
const APPEND_BYTES: usize = 4096;

/// CPU seconds (user and system) that a process has used.
///
/// # Errors
/// When it is gone.
pub fn cpu_secs(pid: u32) -> Result<f64> {
    let stat =
        fs::read_to_string(format!("/proc/{pid}/stat")).with_context(|| format!("read the CPU time of {pid}"))?;
    // The name, in parentheses, may hold anything; fields are counted behind it: utime and stime are the 12th and 13th.
    let fields: Vec<&str> = stat.rsplit_once(')').map_or("", |(_, rest)| rest).split_whitespace().collect();
    let ticks = |at: usize| fields.get(at).and_then(|field| field.parse::<f64>().ok());
    let (user, system) = (ticks(11).context("utime")?, ticks(12).context("stime")?);
    #[expect(clippy::cast_precision_loss, reason = "100 on every Linux")]
    let per_sec = rustix::param::clock_ticks_per_second() as f64;
    Ok((user + system) / per_sec)
}

/// Resident memory of a process, bytes.
///
/// # Errors
/// When it is gone.
pub fn resident_bytes(pid: u32) -> Result<u64> {
    let status =
        fs::read_to_string(format!("/proc/{pid}/status")).with_context(|| format!("read the memory of {pid}"))?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).context("VmRSS")?;
    let kib: u64 = line.trim().trim_end_matches("kB").trim().parse()?;
    Ok(kib * 1024)
}

/// Appends of 4 KiB, each with fdatasync, that the disk below `dir` takes in a second; measured for `time`.
///
/// # Errors
/// When `dir` cannot be written.
pub fn fdatasync_per_sec(dir: &Path, time: Duration) -> Result<f64> {
    let path = dir.join("fdatasync.tmp");
    let mut file = fs::File::create(&path).with_context(|| format!("create {}", path.display()))?;
    let bytes = [0x5a; APPEND_BYTES];
    let clock = RunClock::begin();
    let mut appends = 0_u32;
    while clock.elapsed() < time {
        file.write_all(&bytes)?;
        file.sync_data()?;
        appends += 1;
    }
    let rate = f64::from(appends) / clock.secs();
    drop(file);
    fs::remove_file(&path)?;
    Ok(rate)
}

/// The machine in a few words: cores and model.
#[must_use]
pub fn name() -> String {
    let cores = std::thread::available_parallelism().map_or(0, usize::from);
    let info = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = info.lines().find_map(|line| line.strip_prefix("model name")).unwrap_or("unknown processor");
    format!("{cores} x {}", model.trim_start_matches([' ', '\t', ':']))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_process_has_cpu_time_and_memory_and_a_gone_one_is_an_error() {
        let pid = std::process::id();
        assert!(cpu_secs(pid).unwrap() >= 0.0);
        assert!(resident_bytes(pid).unwrap() > 1 << 20);
        assert!(cpu_secs(u32::MAX).is_err());
    }
}

//! What this machine can do to a cluster. What it cannot is skipped out loud: with the reason, and with the one command that
//! would enable it.

use std::path::Path;

use anyhow::Result;

use super::{interposer::Interposer, plan::Kind, volume::Volume};

/// Bytes of the file system that is mounted to see whether it can be.
const TRIAL_BYTES: u64 = 16 << 20;

/// Why a kind is left out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Skip {
    /// Which.
    pub(super) kind: Kind,
    /// What the machine said.
    pub(super) reason: String,
    /// What would enable it.
    pub(super) enable: &'static str,
}

/// What can be done, found by trying.
#[derive(Debug)]
pub(super) struct Able {
    /// Kinds that were asked for and can be done.
    pub(super) kinds: Vec<Kind>,
    /// Those that cannot.
    pub(super) skipped: Vec<Skip>,
    /// Our library, where a kind needs it.
    pub(super) interposer: Option<Interposer>,
    /// Whether each node gets a file system of its own.
    pub(super) volumes: bool,
}

impl Able {
    /// Tries what `kinds` need, below `dir`, for this executable.
    #[must_use]
    pub(super) fn find(kinds: &[Kind], martlet: &Path, dir: &Path) -> Self {
        let interposer = kinds.iter().any(|kind| kind.needs_interposer()).then(|| {
            let interposer = Interposer::compile(dir)?;
            interposer.check(martlet, dir)?;
            Ok::<_, anyhow::Error>(interposer)
        });
        let volume = kinds.iter().any(|kind| kind.needs_volumes()).then(|| try_volume(dir));
        let power = kinds.iter().any(|kind| is_power(*kind)).then(|| try_power(dir));
        let why = |tried: &Option<Result<()>>| match tried {
            Some(Err(error)) => Some(format!("{error:#}")),
            _ => None,
        };
        let (volume_fails, power_fails) = (why(&volume), why(&power));
        let interposer_fails = match &interposer {
            Some(Err(error)) => Some(format!("{error:#}")),
            _ => None,
        };
        let mut able = Self {
            kinds: Vec::new(),
            skipped: Vec::new(),
            interposer: interposer.and_then(Result::ok),
            volumes: matches!(volume, Some(Ok(()))),
        };
        for &kind in kinds {
            let skip = if kind.needs_interposer() {
                interposer_fails.clone().map(|reason| (reason, "apt-get install gcc libc6-dev"))
            } else if kind.needs_volumes() && volume_fails.is_some() {
                volume_fails
                    .clone()
                    .map(|reason| (reason, "sudo martlet-loadtest faults (mounting loop devices needs root)"))
            } else if is_power(kind) {
                power_fails.clone().map(|reason| (reason, "apt-get install xfsprogs"))
            } else {
                None
            };
            match skip {
                Some((reason, enable)) => able.skipped.push(Skip { kind, reason, enable }),
                None => able.kinds.push(kind),
            }
        }
        able
    }
}

fn is_power(kind: Kind) -> bool {
    matches!(kind, Kind::PowerLoss | Kind::PowerLossAll)
}

fn try_volume(dir: &Path) -> Result<()> {
    let volume = Volume::create(&dir.join("trial.img"), &dir.join("trial"), TRIAL_BYTES)?;
    volume.fill()?;
    volume.free()
}

/// What was synced must be there afterwards, what was not may be gone: a machine on which it is not so proves nothing.
fn try_power(dir: &Path) -> Result<()> {
    use std::io::Write as _;

    let mount = dir.join("trial-power");
    let mut volume = Volume::create(&dir.join("trial-power.img"), &mount, TRIAL_BYTES)?;
    let mut synced = std::fs::File::create(mount.join("synced"))?;
    synced.write_all(b"synced")?;
    synced.sync_all()?;
    std::fs::File::open(&mount)?.sync_all()?;
    drop(synced);
    std::fs::write(mount.join("lost"), [1; 4096])?;
    volume.cut_power()?;
    volume.power_on()?;
    if std::fs::read(mount.join("synced"))? != b"synced" {
        anyhow::bail!("what was synced before a shutdown of the file system is gone after it");
    }
    if std::fs::read(mount.join("lost")).is_ok_and(|bytes| bytes == [1; 4096]) {
        anyhow::bail!("what was not synced before a shutdown of the file system is still there after it");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kinds_that_need_nothing_are_always_able() {
        let dir = tempfile::tempdir().unwrap();
        let kinds = [Kind::KillLeader, Kind::FlipLog];
        let able = Able::find(&kinds, Path::new("/bin/date"), dir.path());
        assert_eq!((able.kinds.as_slice(), able.skipped.as_slice()), (&kinds[..], &[][..]));
        assert!(able.interposer.is_none() && !able.volumes);
    }

    #[test]
    fn an_executable_that_does_not_load_the_library_is_skipped_with_a_reason_and_a_command() {
        let dir = tempfile::tempdir().unwrap();
        let able = Able::find(&[Kind::SlowFsync], Path::new("/missing/martlet"), dir.path());
        assert!(able.kinds.is_empty());
        assert!(!able.skipped[0].reason.is_empty() && able.skipped[0].enable.starts_with("apt-get"));
    }
}

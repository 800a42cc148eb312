//! Whether this node takes more work: the marks of memory, log and disk.
//!
//! Owns the look at the disk and the word for what is short ([`Mark`]); `shard` refuses by it, before anything is proposed, with
//! the protocol's word for "try later". Only what makes the node hold more is refused: acks, expiry, votes, checkpoints and purge
//! go on, and are what the disk's reserve is for (design.md section 7, promise 6). Nothing is latched: when room is back, the next
//! look says so.

use std::{
    fmt,
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use crate::{
    disk::{Disk, Space},
    log::Log,
    metrics::Mark,
    store::{Pressure, Store},
};

/// The part of a disk that serves only what frees memory and disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Reserve {
    /// Of the whole file system, percent.
    pub percent: u64,
    /// And at least this many bytes.
    pub bytes_min: u64,
}

impl Reserve {
    /// Whether no more than the reserve is left.
    pub fn is_reached(self, space: Space) -> bool {
        space.free < (space.total / 100 * self.percent).max(self.bytes_min)
    }
}

/// Looks at the marks of one node.
pub struct Admission {
    store: Arc<Store>,
    log: Log,
    disk: Arc<dyn Disk>,
    dir: PathBuf,
    reserve: Reserve,
    low: AtomicBool,
}

impl fmt::Debug for Admission {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Admission").field("reserve", &self.reserve).field("low", &self.low).finish_non_exhaustive()
    }
}

impl Admission {
    /// Of a node whose files are below `dir`; looks at the disk once.
    pub fn new(store: Arc<Store>, log: Log, disk: Arc<dyn Disk>, dir: PathBuf, reserve: Reserve) -> Self {
        let admission = Self { store, log, disk, dir, reserve, low: AtomicBool::new(false) };
        admission.look();
        admission
    }

    /// Looks at the disk; to be called about every second. What is free, if the disk says.
    pub fn look(&self) -> Option<u64> {
        let space = match self.disk.space(&self.dir) {
            Ok(space) => space,
            Err(error) => {
                tracing::warn!(%error, dir = %self.dir.display(), "the disk does not say how much room it has");
                return None;
            }
        };
        let low = self.reserve.is_reached(space);
        if self.low.swap(low, Ordering::SeqCst) != low {
            let Space { free, total } = space;
            match low {
                true => {
                    tracing::warn!(free, total, "the disk is down to its reserve: sends are refused until it has room")
                }
                false => tracing::info!(free, total, "the disk has room again: sends are taken"),
            }
        }
        Some(space.free)
    }

    /// What is short, if something is.
    pub fn overload(&self) -> Option<Mark> {
        if self.low.load(Ordering::SeqCst) || self.log.is_full() {
            Some(Mark::Disk)
        } else if self.store.pressure() == Pressure::Full {
            Some(Mark::Memory)
        } else {
            self.log.is_over_bound().then_some(Mark::Log)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_reserve_is_a_part_of_the_disk_and_never_less_than_its_least() {
        let reserve = Reserve { percent: 5, bytes_min: 256 << 20 };
        let space = |free, total| Space { free, total };
        assert!(!reserve.is_reached(space(300 << 20, 1 << 30)));
        assert!(reserve.is_reached(space((256 << 20) - 1, 1 << 30)));
        assert!(reserve.is_reached(space(49 << 30, 1_000 << 30)));
        assert!(!reserve.is_reached(space(51 << 30, 1_000 << 30)));
    }
}

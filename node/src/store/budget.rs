//! What the shards of a store share: the memory of their memtables, and the word that the engine failed a read.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// How much of the memory for memtables is used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Pressure {
    /// Below half.
    None,
    /// At half: checkpoints come early.
    Early,
    /// At the mark: leaders refuse enqueues, followers stop applying.
    Full,
}

/// Bytes in use, and where the marks are.
#[derive(Debug)]
pub(super) struct Budget {
    used: AtomicU64,
    full: u64,
    /// How often someone was told to wait.
    waits: AtomicU64,
    read_failed: AtomicBool,
}

impl Budget {
    pub(super) fn new(full: u64) -> Self {
        Self { used: AtomicU64::new(0), full, waits: AtomicU64::new(0), read_failed: AtomicBool::new(false) }
    }

    /// A memtable went from `before` to `after` bytes.
    pub(super) fn moved(&self, before: u64, after: u64) {
        if after >= before {
            self.used.fetch_add(after - before, Ordering::Relaxed);
        } else {
            self.used.fetch_sub(before - after, Ordering::Relaxed);
        }
    }

    pub(super) fn used(&self) -> u64 {
        self.used.load(Ordering::Relaxed)
    }

    /// The engine failed a read: it must be opened again.
    pub(super) fn read_failed(&self) {
        self.read_failed.store(true, Ordering::Release);
    }

    pub(super) fn take_failed_read(&self) -> bool {
        self.read_failed.swap(false, Ordering::AcqRel)
    }

    pub(super) fn must_wait(&self) -> bool {
        let full = self.pressure() == Pressure::Full;
        self.waits.fetch_add(u64::from(full), Ordering::Relaxed);
        full
    }

    pub(super) fn waits(&self) -> u64 {
        self.waits.load(Ordering::Relaxed)
    }

    pub(super) fn pressure(&self) -> Pressure {
        let used = self.used();
        if used >= self.full {
            Pressure::Full
        } else if used >= self.full / 2 {
            Pressure::Early
        } else {
            Pressure::None
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pressure_rises_at_half_and_at_the_mark_and_falls_again() {
        let budget = Budget::new(100);
        budget.moved(0, 49);
        assert_eq!(budget.pressure(), Pressure::None);
        budget.moved(49, 50);
        assert_eq!(budget.pressure(), Pressure::Early);
        budget.moved(50, 100);
        assert_eq!(budget.pressure(), Pressure::Full);
        budget.moved(100, 0);
        assert_eq!(budget.pressure(), Pressure::None);
    }
}

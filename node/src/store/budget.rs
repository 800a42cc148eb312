//! The memory that the memtables of all shards share.

use std::sync::atomic::{AtomicU64, Ordering};

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
}

impl Budget {
    pub(super) fn new(full: u64) -> Self {
        Self { used: AtomicU64::new(0), full }
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

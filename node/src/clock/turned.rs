//! A clock that a test turns: monotonic time passes when it says so or with real time, the wall clock jumps.
//!
//! Cloning gives another handle to the same clock. The invariant: monotonic time never goes back, whatever the wall clock does.

use std::{
    sync::{
        Arc,
        atomic::{AtomicI64, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use super::{Clock, SystemClock};

/// See the module.
#[derive(Debug, Clone)]
pub struct TurnedClock {
    /// `None`: monotonic time is the system's, and the wall clock the system's beside its jumps.
    begun: Option<(Instant, u64)>,
    passed_micros: Arc<AtomicU64>,
    jumped_ms: Arc<AtomicI64>,
}

impl TurnedClock {
    /// Stands still at this wall time, milliseconds since 1970, until [`TurnedClock::pass`].
    pub fn at_ms(wall_ms: u64) -> TurnedClock {
        TurnedClock { begun: Some((SystemClock.now(), wall_ms)), ..TurnedClock::running() }
    }

    /// Goes with the system's clocks.
    pub fn running() -> TurnedClock {
        TurnedClock { begun: None, passed_micros: Arc::default(), jumped_ms: Arc::default() }
    }

    /// Time passes, on both clocks, besides what passes by itself.
    pub fn pass(&self, time: Duration) {
        let micros = u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
        self.passed_micros.fetch_add(micros, Ordering::SeqCst);
    }

    /// The wall clock is set, by this many milliseconds from what it showed.
    pub fn jump_ms(&self, by_ms: i64) {
        self.jumped_ms.fetch_add(by_ms, Ordering::SeqCst);
    }

    fn passed(&self) -> Duration {
        Duration::from_micros(self.passed_micros.load(Ordering::SeqCst))
    }
}

impl Clock for TurnedClock {
    fn now(&self) -> Instant {
        self.begun.map_or_else(|| SystemClock.now(), |(at, _)| at) + self.passed()
    }

    fn wall_ms(&self) -> u64 {
        let shown = self.begun.map_or_else(|| SystemClock.wall_ms(), |(_, wall_ms)| wall_ms);
        let passed_ms = u64::try_from(self.passed().as_millis()).unwrap_or(u64::MAX);
        shown.saturating_add(passed_ms).saturating_add_signed(self.jumped_ms.load(Ordering::SeqCst))
    }
}

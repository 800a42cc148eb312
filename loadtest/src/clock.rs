//! The one clock of a run: seconds since it began.
//!
//! The only file of this crate that asks the system for the time. All files of a run use one [`RunClock`], because the rules of
//! the ledger compare times.

use std::{
    sync::Arc,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

/// Seconds since the run began; clones tell the same time.
#[derive(Debug, Clone)]
pub struct RunClock(Arc<Instant>);

#[expect(clippy::disallowed_methods, reason = "this is the one clock file of the crate")]
impl RunClock {
    /// Begins now.
    #[must_use]
    pub fn begin() -> Self {
        Self(Arc::new(Instant::now()))
    }

    /// Seconds since the run began.
    #[must_use]
    pub fn secs(&self) -> f64 {
        self.elapsed().as_secs_f64()
    }

    /// Time since the run began.
    #[must_use]
    pub fn elapsed(&self) -> Duration {
        Instant::now().duration_since(*self.0)
    }

    /// The instant `after` the beginning.
    #[must_use]
    pub fn instant(&self, after: Duration) -> Instant {
        *self.0 + after
    }

    /// Wall time, microseconds since 1970: names a run, measures nothing.
    #[must_use]
    pub fn wall_micros() -> u64 {
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        u64::try_from(since.as_micros()).unwrap_or(u64::MAX)
    }
}

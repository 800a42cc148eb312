//! The node's clocks: the only file of this crate that asks the system for the time.
//!
//! Monotonic time measures; wall time is only a hint (design.md section 4, "Time"): no promise rests on it.

use std::{
    fmt,
    time::{Instant, SystemTime, UNIX_EPOCH},
};

pub mod turned;

/// Where a component takes its time from; tests pass their own.
pub trait Clock: Send + Sync + fmt::Debug {
    /// Monotonic now.
    fn now(&self) -> Instant;
    /// Wall time, milliseconds since 1970; may jump.
    fn wall_ms(&self) -> u64;
}

/// The system's clocks.
#[derive(Debug, Default, Clone, Copy)]
pub struct SystemClock;

#[expect(clippy::disallowed_methods, reason = "this is the one clock file of the crate")]
impl Clock for SystemClock {
    fn now(&self) -> Instant {
        Instant::now()
    }

    fn wall_ms(&self) -> u64 {
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
    }
}

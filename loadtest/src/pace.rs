//! Open-loop pacing: when the n-th request is due, whatever became of those before.
//!
//! A closed loop waits for a slow broker and so hides its slowness; here a request that is late counts from the moment at which
//! it was due.

use std::time::Duration;

/// A steady rate from a beginning.
#[derive(Debug, Clone, Copy)]
pub struct Pace {
    begin: Duration,
    per_sec: f64,
}

impl Pace {
    /// `per_sec` requests a second (above 0) from `begin` of the run on.
    #[must_use]
    pub fn new(begin: Duration, per_sec: f64) -> Self {
        Self { begin, per_sec: per_sec.max(f64::MIN_POSITIVE) }
    }

    /// When request `n` (from 0) is due, as time of the run.
    #[must_use]
    pub fn due(&self, n: u64) -> Duration {
        #[expect(clippy::cast_precision_loss, reason = "a run has far fewer than 2^52 requests")]
        let secs = n as f64 / self.per_sec;
        self.begin + Duration::from_secs_f64(secs.min(1e9))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_are_due_at_even_distances_and_never_wait_for_each_other() {
        let pace = Pace::new(Duration::from_secs(3), 4.0);
        let due: Vec<_> = (0..4).map(|n| pace.due(n).as_millis()).collect();
        assert_eq!(due, [3_000, 3_250, 3_500, 3_750]);
    }
}

//! How long a broker that says "later" is waited for.
//!
//! Owns the pauses between the tries of one thing, and when to give up: never sooner than the broker asked (`Retry-After`), longer
//! each time, and within a bound altogether. Owns no clock: whoever tries waits.

use std::time::Duration;

/// First pause where the broker names none, doubled up to [`PAUSE_MAX`].
const PAUSE_MIN: Duration = Duration::from_millis(50);

/// Longest pause that we choose ourselves.
const PAUSE_MAX: Duration = Duration::from_secs(2);

/// The pauses of one thing that is tried until it is taken.
#[derive(Debug)]
pub struct Patience {
    pause: Duration,
    left: Duration,
}

impl Patience {
    /// Waits so long altogether.
    #[must_use]
    pub fn of(altogether: Duration) -> Self {
        Self { pause: PAUSE_MIN, left: altogether }
    }

    /// How long to wait before the next try, `asked` being what the broker asked for; none: enough was waited.
    pub fn pause(&mut self, asked: Option<Duration>) -> Option<Duration> {
        let pause = self.pause.max(asked.unwrap_or_default());
        self.pause = (self.pause * 2).min(PAUSE_MAX);
        self.left = self.left.checked_sub(pause)?;
        Some(pause)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn pauses_grow_are_never_shorter_than_asked_and_end() {
        let mut patience = Patience::of(10 * SECOND);
        assert_eq!(patience.pause(None), Some(PAUSE_MIN));
        assert_eq!(patience.pause(None), Some(2 * PAUSE_MIN));
        assert_eq!(patience.pause(Some(5 * SECOND)), Some(5 * SECOND));
        assert_eq!(patience.pause(Some(5 * SECOND)), None, "that would be longer than all");
        let mut patience = Patience::of(10 * SECOND);
        let pauses: Vec<Duration> = std::iter::from_fn(|| patience.pause(None)).collect();
        assert_eq!(pauses.last(), Some(&PAUSE_MAX));
        assert!(pauses.iter().sum::<Duration>() <= 10 * SECOND);
    }
}

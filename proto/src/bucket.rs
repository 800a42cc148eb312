//! A token bucket: how often something may happen, in the long run and at once.
//!
//! Owns the arithmetic. Leaves to its owner what it is a bucket of, where it is kept, and what happens when it is empty. Owns no clock:
//! the time comes in. The invariant: in any span of time no more is given than a full bucket, what the span refills, and what the last
//! taker owes.

use std::time::{Duration, Instant};

/// How fast a bucket fills, and how much it holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rate {
    /// So many in every period, in the long run; 1 or more.
    pub count: u32,
    /// What `count` is for.
    pub period: Duration,
    /// So many at once; 1 or more.
    pub burst: u32,
}

/// What is left of a rate.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Bucket {
    /// Negative where more was taken than was there.
    tokens: f64,
    at: Instant,
}

impl Rate {
    /// `count` a second; none where `count` is 0, which is without limit.
    #[must_use]
    pub fn per_second(count: u32, burst: u32) -> Option<Self> {
        (count > 0).then_some(Self { count, period: Duration::from_secs(1), burst })
    }

    /// `count` in a period, also all at once; none where `count` is 0, which is without limit.
    #[must_use]
    pub fn in_each(period: Duration, count: u32) -> Option<Self> {
        (count > 0).then_some(Self { count, period, burst: count })
    }

    fn tokens_per_second(self) -> f64 {
        f64::from(self.count) / self.period.as_secs_f64()
    }
}

impl Bucket {
    /// As much as it holds.
    #[must_use]
    pub fn full(rate: Rate, now: Instant) -> Self {
        Self { tokens: rate.burst.into(), at: now }
    }

    /// Takes `count` if there is at least one, and owes what there is not: so that what is larger than the bucket can pass, and small
    /// takers cannot keep large ones out.
    ///
    /// # Errors
    /// How long it is until there is one. Nothing was taken.
    pub fn take(&mut self, rate: Rate, now: Instant, count: u32) -> Result<(), Duration> {
        let wait = self.wait(rate, now);
        if wait > Duration::ZERO {
            return Err(wait);
        }
        *self = Self { tokens: self.level(rate, now) - f64::from(count), at: now.max(self.at) };
        Ok(())
    }

    /// How long it is until there is one to take; zero when there is.
    #[must_use]
    pub fn wait(&self, rate: Rate, now: Instant) -> Duration {
        let short = 1.0 - self.level(rate, now);
        Duration::try_from_secs_f64(short / rate.tokens_per_second()).unwrap_or_default()
    }

    /// How full it is: 1 when nothing is missing, 0 or less when nothing is left.
    #[must_use]
    pub fn share(&self, rate: Rate, now: Instant) -> f64 {
        self.level(rate, now) / f64::from(rate.burst)
    }

    fn level(&self, rate: Rate, now: Instant) -> f64 {
        let since = now.saturating_duration_since(self.at).as_secs_f64();
        (self.tokens + since * rate.tokens_per_second()).min(rate.burst.into())
    }
}

#[cfg(test)]
#[expect(clippy::disallowed_methods, reason = "starting points for arithmetic")]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn takes(bucket: &mut Bucket, rate: Rate, now: Instant, count: usize) -> usize {
        (0..count).filter(|_| bucket.take(rate, now, 1).is_ok()).count()
    }

    #[test]
    fn a_bucket_gives_its_burst_at_once_and_its_rate_in_the_long_run() {
        let (t0, rate) = (Instant::now(), Rate::per_second(2, 5).unwrap());
        let mut bucket = Bucket::full(rate, t0);
        assert_eq!(takes(&mut bucket, rate, t0, 9), 5);
        assert_eq!(bucket.take(rate, t0, 1), Err(SECOND / 2));
        assert_eq!(takes(&mut bucket, rate, t0 + SECOND, 9), 2);
        assert_eq!(takes(&mut bucket, rate, t0 + 100 * SECOND, 9), 5, "silence saves up no more than a bucket");
    }

    #[test]
    fn every_refill_of_a_period_is_given_however_crooked_its_share() {
        for (period, count) in [(60, 240), (3_600, 5_000), (60, 7), (3_600, 1)] {
            let (t0, rate) = (Instant::now(), Rate::in_each(Duration::from_secs(period), count).unwrap());
            let mut bucket = Bucket::full(rate, t0);
            assert_eq!(takes(&mut bucket, rate, t0, 6_000), count as usize);
            let mut now = t0;
            for _ in 0..count {
                now += bucket.take(rate, now, 1).unwrap_err();
                // A wait is told in whole nanoseconds, so the last of them may be missing.
                now += Duration::from_nanos(1);
                assert_eq!(takes(&mut bucket, rate, now, 2), 1);
            }
            let late = (now - t0).saturating_sub(Duration::from_secs(period));
            assert!(late < Duration::from_millis(1), "{count} in {period} s took {late:?} more");
        }
    }

    #[test]
    fn what_is_larger_than_the_bucket_passes_while_there_is_one_left_and_is_owed() {
        let (t0, rate) = (Instant::now(), Rate::per_second(10, 20).unwrap());
        let mut bucket = Bucket::full(rate, t0);
        assert_eq!(takes(&mut bucket, rate, t0, 19), 19);
        assert_eq!(bucket.take(rate, t0, 1_000), Ok(()));
        assert_eq!(bucket.take(rate, t0, 1), Err(100 * SECOND));
        assert_eq!(bucket.take(rate, t0 + 99 * SECOND, 1), Err(SECOND));
        assert_eq!(takes(&mut bucket, rate, t0 + 100 * SECOND, 2), 1);
    }

    #[test]
    fn time_that_goes_back_gives_nothing() {
        let (t0, rate) = (Instant::now(), Rate::per_second(1, 1).unwrap());
        let mut bucket = Bucket::full(rate, t0 + SECOND);
        assert_eq!(bucket.take(rate, t0, 1), Ok(()));
        assert_eq!(takes(&mut bucket, rate, t0 + SECOND, 1), 0);
        assert_eq!(takes(&mut bucket, rate, t0 + 2 * SECOND, 2), 1);
    }

    #[test]
    fn how_full_it_is_goes_from_one_to_nothing_and_back() {
        let (t0, rate) = (Instant::now(), Rate::per_second(1, 4).unwrap());
        let mut bucket = Bucket::full(rate, t0);
        assert!(bucket.share(rate, t0) >= 1.0);
        bucket.take(rate, t0, 4).unwrap();
        assert!(bucket.share(rate, t0) <= 0.0);
        assert!(bucket.share(rate, t0 + 2 * SECOND) < 1.0);
        assert!(bucket.share(rate, t0 + 4 * SECOND) >= 1.0);
    }

    #[test]
    fn zero_is_without_limit() {
        assert_eq!((Rate::per_second(0, 9), Rate::in_each(SECOND, 0)), (None, None));
    }
}

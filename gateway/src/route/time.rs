//! The time of each shard, as last heard: a value.
//!
//! Owns for each shard what a leader last said and when that was on the monotonic clock. The first-try time of an operation is
//! taken from here, never from the wall clock (design.md section 5): a gateway whose clock jumps must not be able to slip an
//! operation past the dedupe window. A network delay makes the estimate late, which is the safe side: `apply` refuses what
//! lies ahead.

use std::{collections::BTreeMap, time::Instant};

use martlet_proto::shard::Shard;

/// Shard times and when they were heard.
#[derive(Debug, Default)]
pub(crate) struct ShardTimes(BTreeMap<Shard, (u64, Instant)>);

impl ShardTimes {
    /// A reply carried this shard time; 0 comes from a node that does not lead and is passed over.
    pub(crate) fn heard(&mut self, shard: Shard, time_ms: u64, now: Instant) {
        if time_ms != 0 {
            self.0.insert(shard, (time_ms, now));
        }
    }

    /// Shard time now, milliseconds since 1970; 0 while none was heard.
    pub(crate) fn at(&self, shard: Shard, now: Instant) -> u64 {
        self.0.get(&shard).map_or(0, |(time_ms, heard)| {
            let since = now.saturating_duration_since(*heard).as_millis();
            time_ms.saturating_add(u64::try_from(since).unwrap_or(u64::MAX))
        })
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    #[expect(clippy::disallowed_methods, reason = "a starting point for arithmetic")]
    fn shard_time_goes_on_from_what_was_last_heard() {
        let t0 = Instant::now();
        let mut times = ShardTimes::default();
        assert_eq!(times.at(Shard(1), t0), 0);
        times.heard(Shard(1), 1_000, t0);
        times.heard(Shard(1), 0, t0 + Duration::from_secs(5));
        assert_eq!(times.at(Shard(1), t0 + Duration::from_millis(250)), 1_250);
        assert_eq!(times.at(Shard(2), t0), 0);
        times.heard(Shard(1), 900, t0 + Duration::from_secs(1));
        assert_eq!(times.at(Shard(1), t0 + Duration::from_secs(1)), 900);
    }
}

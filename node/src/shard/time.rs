//! Shard time: milliseconds since 1970 that the log agrees on, as one replica reads it.
//!
//! Owns the rule of design.md section 4, "Time": a leader's reading is the last applied time plus monotonic time since, pulled
//! towards the wall clock by at most a thousandth; a new leader goes on from what it last heard in the log plus its own monotonic
//! time since. Owns no clock: monotonic and wall time come in. The invariant: a leader's readings never go backwards, and a
//! wall clock that jumps moves them by at most a thousandth of the time that passes.
//!
//! A replica that restarted does not know how long ago the last entry in its log was made. Until it has seen two entries whose
//! distance in shard time is that of their arrival, its first reading as leader is a wall clock, if that is later: its own where
//! its peers' agree with it, else their median ([`believed_ms`]). So one node whose clock is wrong moves nothing. When every
//! node restarts and most clocks are wrong, nobody can tell: what time passed while all were down is not known otherwise.

use std::time::{Duration, Instant};

/// Greatest share of passing time by which the wall clock pulls: one in this many.
const PULL_SHARE: u64 = 1_000;
/// Entries at least this far apart show that time in the log passes as it does here.
const WATCHED: Duration = Duration::from_secs(5);
/// By this much their distances may differ, microseconds.
const WATCH_TOLERANCE_MICROS: u64 = 1_000_000;

/// By this much a wall clock may differ from the median of the peers' and be believed, milliseconds. Source: design.md section 4.
const BELIEVED_MS: u64 = 1_000;

/// The wall time to begin with, of this node's clock and its peers', milliseconds since 1970. Without peers there is only its own.
///
/// Of an even number of peers the own clock decides which of the two in the middle counts, so that one wrong clock among three
/// nodes is never believed.
pub fn believed_ms(own_ms: u64, peers_ms: &[u64]) -> u64 {
    let mut clocks = peers_ms.to_vec();
    if clocks.len().is_multiple_of(2) {
        clocks.push(own_ms);
    }
    clocks.sort_unstable();
    let median = clocks[clocks.len() / 2];
    if own_ms.abs_diff(median) <= BELIEVED_MS { own_ms } else { median }
}

/// One replica's reading of shard time.
#[derive(Debug, Clone)]
pub struct ShardTime {
    /// Last time applied, microseconds, and when.
    heard: (u64, Instant),
    /// Where the present watch for live entries began; `None` once time was seen to pass in the log.
    watch: Option<(u64, Instant)>,
    /// A leader's own reading, microseconds, and when it was taken.
    led: Option<(u64, Instant)>,
}

impl ShardTime {
    /// A replica whose state says `applied_ms` at its start.
    pub fn restarted(applied_ms: u64, now: Instant) -> Self {
        let at = (applied_ms.saturating_mul(1_000), now);
        ShardTime { heard: at, watch: Some(at), led: None }
    }

    /// An entry with this time was applied, whoever proposed it. `time_ms` is the state's time after it.
    pub fn heard(&mut self, time_ms: u64, now: Instant) {
        let micros = time_ms.saturating_mul(1_000);
        if micros <= self.heard.0 {
            return;
        }
        self.heard = (micros, now);
        let Some((from_micros, from)) = self.watch else { return };
        let here = now.saturating_duration_since(from);
        let apart = micros.saturating_sub(from_micros);
        if apart.abs_diff(in_micros(here)) > WATCH_TOLERANCE_MICROS {
            self.watch = Some(self.heard);
        } else if here >= WATCHED {
            self.watch = None;
        }
    }

    /// This replica begins to lead. `wall_ms`, which is to be [`believed_ms`], counts only if it restarted.
    pub fn lead(&mut self, now: Instant, wall_ms: u64) {
        let going_on = self.heard.0.saturating_add(in_micros(now.saturating_duration_since(self.heard.1)));
        let first = match self.watch {
            Some(_) => going_on.max(wall_ms.saturating_mul(1_000)),
            None => going_on,
        };
        self.led = Some((first, now));
        self.watch = None;
    }

    /// This replica leads no more.
    pub fn follow(&mut self) {
        self.led = None;
    }

    /// A leader's time now, milliseconds; `None` when it does not lead.
    pub fn read_ms(&mut self, now: Instant, wall_ms: u64) -> Option<u64> {
        let (micros, at) = self.led?;
        let passed = in_micros(now.saturating_duration_since(at));
        let plain = micros.saturating_add(passed);
        let wall = wall_ms.saturating_mul(1_000);
        // The share is rounded down: readings in quick succession are not pulled at all, so short steps are not taken.
        let pull = passed / PULL_SHARE;
        if pull > 0 {
            let pulled = if wall > plain { plain + pull.min(wall - plain) } else { plain - pull.min(plain - wall) };
            self.led = Some((pulled, now));
            return Some(pulled / 1_000);
        }
        Some(plain / 1_000)
    }
}

fn in_micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const HOUR_MS: u64 = 3_600_000;
    const T: u64 = 1_700_000_000_000;

    #[expect(clippy::disallowed_methods, reason = "an origin for made-up instants")]
    fn origin() -> Instant {
        Instant::now()
    }

    fn secs(n: u64) -> Duration {
        Duration::from_secs(n)
    }

    /// A replica that has seen time pass in the log.
    fn sure(t0: Instant) -> ShardTime {
        let mut time = ShardTime::restarted(T - 10_000, t0);
        time.heard(T - 8_000, t0 + secs(2));
        time.heard(T, t0 + secs(10));
        time
    }

    #[test]
    fn a_new_leader_goes_on_from_what_it_heard_plus_its_own_time_since() {
        let t0 = origin();
        let mut time = sure(t0);
        time.lead(t0 + secs(40), T + 5 * HOUR_MS);
        assert_eq!(time.read_ms(t0 + secs(40), T + 5 * HOUR_MS), Some(T + 30_000));
    }

    #[test]
    fn a_restarted_replica_takes_the_wall_clock_when_it_leads() {
        let t0 = origin();
        let mut time = ShardTime::restarted(T, t0);
        time.lead(t0 + secs(1), T + HOUR_MS);
        assert_eq!(time.read_ms(t0 + secs(1), T + HOUR_MS), Some(T + HOUR_MS));
    }

    #[test]
    fn one_wrong_clock_of_three_is_not_believed_whosever_it_is() {
        for wrong in [T + HOUR_MS, T - HOUR_MS] {
            assert_eq!(believed_ms(wrong, &[T, T + 3]), if wrong > T { T + 3 } else { T });
            assert_eq!(believed_ms(T + 1, &[T, wrong]), T + 1);
            assert_eq!(believed_ms(T + 1, &[wrong, T]), T + 1);
            assert_eq!(believed_ms(wrong, &[T]), T, "the only peer that was heard decides");
            assert_eq!(believed_ms(wrong, &[T, T, T + 2, wrong]), if wrong > T { T + 2 } else { T });
        }
        assert_eq!(believed_ms(T, &[]), T);
    }

    #[test]
    fn a_clock_within_a_second_of_the_median_is_believed() {
        assert_eq!(believed_ms(T + 1_000, &[T - 5, T, T + 5]), T + 1_000);
        assert_eq!(believed_ms(T + 1_001, &[T - 5, T, T + 5]), T);
        assert_eq!(believed_ms(T - 1_000, &[T]), T - 1_000);
    }

    #[test]
    fn a_restarted_replica_never_goes_below_its_log() {
        let t0 = origin();
        let mut time = ShardTime::restarted(T, t0);
        time.lead(t0, T - HOUR_MS);
        assert_eq!(time.read_ms(t0, T - HOUR_MS), Some(T));
    }

    #[test]
    fn entries_caught_up_in_a_burst_do_not_make_a_replica_sure() {
        let t0 = origin();
        let mut time = ShardTime::restarted(T, t0);
        time.heard(T + HOUR_MS, t0 + secs(1));
        time.heard(T + 2 * HOUR_MS, t0 + secs(7));
        time.lead(t0 + secs(8), T + 5 * HOUR_MS);
        assert_eq!(time.read_ms(t0 + secs(8), T + 5 * HOUR_MS), Some(T + 5 * HOUR_MS));
    }

    #[test]
    fn a_follower_has_no_reading() {
        let t0 = origin();
        let mut time = sure(t0);
        assert_eq!(time.read_ms(t0 + secs(11), T), None);
    }

    proptest! {
        #[test]
        fn readings_never_go_backwards(steps in prop::collection::vec((0u64..5_000_000, 0u64..2 * T), 1..60)) {
            let t0 = origin();
            let mut time = sure(t0);
            let mut now = t0 + secs(10);
            time.lead(now, T);
            let mut before = 0;
            for (micros, wall_ms) in steps {
                now += Duration::from_micros(micros);
                let read = time.read_ms(now, wall_ms).unwrap();
                prop_assert!(read >= before);
                before = read;
            }
        }

        #[test]
        fn an_hours_jump_of_the_wall_clock_moves_it_by_at_most_a_thousandth(
            steps in prop::collection::vec(0u64..3_000_000, 1..60),
            forward: bool,
        ) {
            let t0 = origin();
            let mut time = sure(t0);
            let begin = t0 + secs(10);
            time.lead(begin, T);
            let mut now = begin;
            let mut read = T;
            for micros in steps {
                now += Duration::from_micros(micros);
                let honest = T + u64::try_from((now - begin).as_millis()).unwrap();
                let wall = if forward { honest + HOUR_MS } else { honest - HOUR_MS };
                read = time.read_ms(now, wall).unwrap();
            }
            let passed_ms = u64::try_from((now - begin).as_millis()).unwrap();
            prop_assert!(read.abs_diff(T + passed_ms) <= passed_ms / 1_000 + 1);
        }
    }
}

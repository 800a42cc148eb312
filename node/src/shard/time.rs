//! Shard time: milliseconds since 1970 that the log agrees on, as one replica reads it.
//!
//! Owns the rule of design.md section 4, "Time": a leader's reading is the last applied time plus monotonic time since, pulled
//! towards the wall clock by at most a thousandth; a new leader goes on from what it last heard plus its own monotonic time since.
//! Owns no clock: monotonic and wall time come in. The invariant: a leader's readings never go backwards, and a wall clock that
//! jumps moves them by at most a thousandth of the time that passes.
//!
//! What is heard may be late (an entry that is caught up on, a frame that waited), never early: what lies behind this replica's
//! own reckoning by more than clocks drift apart is passed over, so that catching up does not set time back.
//!
//! A replica that restarted does not know how long ago the last entry in its log was made, until a leader tells it the time, with
//! its heartbeats. One that leads before that asks the other replicas ([`ShardTime::is_known`], [`ShardTime::known_ms`]): who has
//! heard a leader since it started, or has led, has kept shard time by its monotonic clock. Only when none of them knows does a
//! wall clock count, if it is later than the log: its own where its peers' agree with it, else their median ([`believed_ms`]);
//! it is shard time once an entry with it is applied. So clocks that are wrong, one or all, move nothing while any replica that
//! answers has run on. (design.md would have a restarted leader take the wall clock at once. With all clocks an hour ahead that
//! ended every time to live within the hour: a loss, which promise 4 rules out.) When every replica has restarted and most
//! clocks are wrong, nobody can tell: what time passed while all were down is not known otherwise.

use std::time::{Duration, Instant};

/// Greatest share of passing time by which the wall clock pulls: one in this many.
const PULL_SHARE: u64 = 1_000;
/// Greatest share of passing time by which a leader's readings may fall behind this replica's reckoning, one in this many: the
/// pull, and as much again for the drift of two monotonic clocks.
const LAG_SHARE: u64 = 500;

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
    /// A time that was heard, microseconds, and when: shard time is that plus what has passed since, or later if not known.
    heard: (u64, Instant),
    /// Whether that was shard time when it was heard, and not only a time in the past.
    known: bool,
    /// A leader's own reading, microseconds, and when it was taken.
    led: Option<(u64, Instant)>,
}

impl ShardTime {
    /// A replica whose state says `applied_ms` at its start.
    pub fn restarted(applied_ms: u64, now: Instant) -> Self {
        ShardTime { heard: (applied_ms.saturating_mul(1_000), now), known: false, led: None }
    }

    /// An entry was applied, whoever proposed it and whenever. `time_ms` is the state's time after it.
    pub fn applied(&mut self, time_ms: u64, now: Instant) {
        let micros = time_ms.saturating_mul(1_000);
        let passed = in_micros(now.saturating_duration_since(self.heard.1));
        if micros >= self.heard.0.saturating_add(passed - passed / LAG_SHARE) {
            self.heard = (micros, now);
        }
        // What this leader began with is in the log now.
        self.known |= self.led.is_some();
    }

    /// A leader says that it is this now, or another replica that knows.
    pub fn told(&mut self, time_ms: u64, now: Instant) {
        self.applied(time_ms, now);
        self.known = true;
    }

    /// Whether this replica has heard the time since it started. One that has not begins to lead with what the others say.
    pub fn is_known(&self) -> bool {
        self.known
    }

    /// Shard time now for another replica, milliseconds; `None` when it is not known here.
    pub fn known_ms(&self, now: Instant) -> Option<u64> {
        let (micros, at) = self.known.then(|| self.led.unwrap_or(self.heard))?;
        Some(micros.saturating_add(in_micros(now.saturating_duration_since(at))) / 1_000)
    }

    /// This replica begins to lead. `otherwise_ms`, which is to be [`believed_ms`], counts only if it does not know the time; then
    /// an entry is due, which makes it known.
    pub fn lead(&mut self, now: Instant, otherwise_ms: u64) {
        let going_on = self.heard.0.saturating_add(in_micros(now.saturating_duration_since(self.heard.1)));
        let first = if self.known { going_on } else { going_on.max(otherwise_ms.saturating_mul(1_000)) };
        self.led = Some((first, now));
    }

    /// This replica leads no more. It goes on from its last reading, which it has told the others, unless nothing came of it.
    pub fn follow(&mut self) {
        if let Some(last) = self.led.take().filter(|_| self.known) {
            self.heard = last;
        }
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

    /// A replica that a leader has told the time, `T` at ten seconds.
    fn told(t0: Instant) -> ShardTime {
        let mut time = ShardTime::restarted(T - HOUR_MS, t0);
        time.told(T, t0 + secs(10));
        time
    }

    #[test]
    fn a_new_leader_goes_on_from_what_it_heard_plus_its_own_time_since() {
        let t0 = origin();
        let mut time = told(t0);
        time.lead(t0 + secs(40), T + 5 * HOUR_MS);
        assert_eq!(time.read_ms(t0 + secs(40), T + 5 * HOUR_MS), Some(T + 30_000));
    }

    #[test]
    fn a_restarted_replica_that_nobody_told_the_time_begins_with_what_it_is_given() {
        let t0 = origin();
        let mut time = ShardTime::restarted(T, t0);
        time.applied(T + 1_000, t0 + secs(1));
        assert!(!time.is_known());
        time.lead(t0 + secs(1), T + HOUR_MS);
        assert_eq!(time.read_ms(t0 + secs(1), T + HOUR_MS), Some(T + HOUR_MS));
    }

    #[test]
    fn what_a_leader_began_with_is_told_to_others_only_once_it_is_in_the_log() {
        let t0 = origin();
        let mut time = ShardTime::restarted(T, t0);
        time.lead(t0, T + HOUR_MS);
        assert_eq!(time.known_ms(t0), None);
        let mut other = time.clone();
        other.follow();
        other.lead(t0 + secs(1), T);
        assert_eq!(other.read_ms(t0 + secs(1), T), Some(T + 1_000), "nothing came of its first reading");
        time.applied(T + HOUR_MS, t0);
        assert_eq!(time.known_ms(t0 + secs(2)), Some(T + HOUR_MS + 2_000));
        time.follow();
        assert_eq!(time.known_ms(t0 + secs(3)), Some(T + HOUR_MS + 3_000));
    }

    #[test]
    fn catching_up_on_old_entries_does_not_set_time_back() {
        let t0 = origin();
        let mut time = told(t0);
        time.applied(T - 1_000, t0 + secs(1_800));
        time.applied(T + 600_000, t0 + secs(1_801));
        assert_eq!(time.known_ms(t0 + secs(1_810)), Some(T + 1_800_000));
        time.lead(t0 + secs(1_810), T);
        assert_eq!(time.read_ms(t0 + secs(1_810), T), Some(T + 1_800_000));
    }

    #[test]
    fn a_leader_whose_readings_are_pulled_back_or_ahead_is_followed() {
        for by in [-1_i64, 1] {
            let t0 = origin();
            let (mut leader, mut follower) = (told(t0), told(t0));
            leader.lead(t0 + secs(10), T);
            let mut read = T;
            for n in 0..20_000 {
                let now = t0 + secs(10 + n);
                read =
                    leader.read_ms(now, T.saturating_add_signed(by * 100 * i64::try_from(HOUR_MS).unwrap())).unwrap();
                follower.told(read, now);
            }
            assert!(read.abs_diff(T + 19_999_000) > 19_000, "the pull is too small to tell");
            assert_eq!(follower.known_ms(t0 + secs(20_009)), Some(read));
        }
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
    fn a_follower_has_no_reading() {
        let t0 = origin();
        let mut time = told(t0);
        assert_eq!(time.read_ms(t0 + secs(11), T), None);
    }

    proptest! {
        #[test]
        fn readings_never_go_backwards(steps in prop::collection::vec((0u64..5_000_000, 0u64..2 * T), 1..60)) {
            let t0 = origin();
            let mut time = told(t0);
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
            let mut time = told(t0);
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

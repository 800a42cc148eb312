//! What this node knows of other nodes themselves, whatever group: which of them are connected to it, since when they have
//! answered without a break, and what their clocks say.
//!
//! A value behind a lock; `service` and `line` tell it, elections, transfers and shard time ask it. Owns no connection. The
//! invariant: a clock is passed on only as heard plus monotonic time since, so that a wall clock that jumps here changes none.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use crate::clock::Clock;

/// A node that was not heard for this long was away: what it said before is not counted.
const SILENCE_MAX: Duration = Duration::from_secs(3);
/// A clock heard this long ago is not asked for: drift is small, but the node may have been set right meanwhile.
const CLOCK_MAX: Duration = Duration::from_secs(60);

/// Other nodes, as this one hears them.
#[derive(Debug)]
pub(super) struct Presence {
    clock: Arc<dyn Clock>,
    nodes: Mutex<BTreeMap<u64, Seen>>,
}

#[derive(Debug, Default)]
struct Seen {
    /// Liveness streams that the node has open here.
    streams: usize,
    /// Heard without a break since, and last.
    heard: Option<(Instant, Instant)>,
    /// What its wall clock said, milliseconds, and when that was heard.
    wall: Option<(u64, Instant)>,
}

impl Presence {
    pub(super) fn new(clock: Arc<dyn Clock>) -> Presence {
        Presence { clock, nodes: Mutex::default() }
    }

    /// This node's wall clock, for its frames.
    pub(super) fn wall_ms(&self) -> u64 {
        self.clock.wall_ms()
    }

    /// The node opened a liveness stream to this one.
    pub(super) fn opened(&self, node: u64) {
        self.nodes().entry(node).or_default().streams += 1;
    }

    /// One of its streams has ended; `true`: it was the last.
    pub(super) fn closed(&self, node: u64) -> bool {
        let mut nodes = self.nodes();
        let seen = nodes.entry(node).or_default();
        seen.streams = seen.streams.saturating_sub(1);
        seen.streams == 0
    }

    /// Whether the node has a stream to this one.
    pub(super) fn is_connected(&self, node: u64) -> bool {
        self.nodes().get(&node).is_some_and(|seen| seen.streams > 0)
    }

    /// A frame of the node came in; `wall_ms` is 0 when it did not say.
    pub(super) fn heard(&self, node: u64, wall_ms: u64) {
        let now = self.clock.now();
        let mut nodes = self.nodes();
        let seen = nodes.entry(node).or_default();
        seen.heard = match seen.heard {
            Some((since, last)) if now.saturating_duration_since(last) <= SILENCE_MAX => Some((since, now)),
            _ => Some((now, now)),
        };
        if wall_ms > 0 {
            seen.wall = Some((wall_ms, now));
        }
    }

    /// How long the node has been heard without a break, up to now.
    pub(super) fn up_for(&self, node: u64) -> Duration {
        let now = self.clock.now();
        let heard = self.nodes().get(&node).and_then(|seen| seen.heard);
        heard
            .filter(|(_, last)| now.saturating_duration_since(*last) <= SILENCE_MAX)
            .map_or(Duration::ZERO, |(since, _)| now.saturating_duration_since(since))
    }

    /// What the wall clocks of these nodes say now, of those that were heard lately; milliseconds since 1970.
    pub(super) fn clocks_ms(&self, of: impl Iterator<Item = u64>) -> Vec<u64> {
        let now = self.clock.now();
        let nodes = self.nodes();
        let read = |node| {
            let (wall_ms, at) = nodes.get(&node)?.wall?;
            let passed = now.saturating_duration_since(at);
            let passed_ms = u64::try_from(passed.as_millis()).unwrap_or(u64::MAX);
            (passed <= CLOCK_MAX).then(|| wall_ms.saturating_add(passed_ms))
        };
        of.filter_map(read).collect()
    }

    fn nodes(&self) -> MutexGuard<'_, BTreeMap<u64, Seen>> {
        self.nodes.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::turned::TurnedClock;

    const T: u64 = 1_700_000_000_000;

    fn presence() -> (Presence, TurnedClock) {
        let clock = TurnedClock::at_ms(T);
        (Presence::new(Arc::new(clock.clone())), clock)
    }

    #[test]
    fn a_node_is_connected_until_its_last_stream_has_ended() {
        let (presence, _) = presence();
        presence.opened(2);
        presence.opened(2);
        assert!(!presence.closed(2));
        assert!(presence.is_connected(2));
        assert!(presence.closed(2));
        assert!(!presence.is_connected(2) && !presence.is_connected(3));
    }

    #[test]
    fn a_node_is_up_since_its_last_silence() {
        let (presence, clock) = presence();
        assert_eq!(presence.up_for(2), Duration::ZERO);
        for _ in 0..6 {
            presence.heard(2, 0);
            clock.pass(Duration::from_secs(2));
        }
        assert_eq!(presence.up_for(2), Duration::from_secs(12));
        clock.pass(Duration::from_secs(2));
        assert_eq!(presence.up_for(2), Duration::ZERO, "it has fallen silent");
        presence.heard(2, 0);
        clock.pass(Duration::from_secs(1));
        assert_eq!(presence.up_for(2), Duration::from_secs(1));
    }

    #[test]
    fn a_clock_goes_on_with_monotonic_time_whatever_the_clock_here_does() {
        let (presence, clock) = presence();
        presence.heard(2, T + 5);
        presence.heard(3, 0);
        clock.pass(Duration::from_secs(7));
        clock.jump_ms(3_600_000);
        assert_eq!(presence.clocks_ms([2, 3, 4].into_iter()), [T + 7_005]);
        clock.pass(CLOCK_MAX);
        assert!(presence.clocks_ms([2].into_iter()).is_empty());
    }
}

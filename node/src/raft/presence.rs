//! What this node knows of other nodes themselves, whatever group: which of them are connected to it, since when they have
//! answered without a break, and what they say with every frame: their clocks, and which state version they can apply.
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

/// What a node says of itself with every liveness frame, and with every frame that answers one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Said {
    /// Its wall clock, milliseconds since 1970; 0 when it does not say.
    pub(super) wall_ms: u64,
    /// The highest state version that it can apply; 0 stands for 1.
    pub(super) state_version: u32,
}

/// Other nodes, as this one hears them.
#[derive(Debug)]
pub(super) struct Presence {
    clock: Arc<dyn Clock>,
    /// The highest state version that this node can apply.
    state_version: u32,
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
    /// The state version that it announced last.
    state_version: u32,
}

impl Presence {
    pub(super) fn new(clock: Arc<dyn Clock>, state_version: u32) -> Presence {
        Presence { clock, state_version, nodes: Mutex::default() }
    }

    /// What this node says of itself, for its frames.
    pub(super) fn says(&self) -> Said {
        Said { wall_ms: self.clock.wall_ms(), state_version: self.state_version }
    }

    /// The highest state version that this node can apply.
    pub(super) fn own_state_version(&self) -> u32 {
        self.state_version
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
        if seen.streams == 0 {
            // It may come back with another program.
            seen.state_version = 0;
        }
        seen.streams == 0
    }

    /// Whether the node has a stream to this one.
    pub(super) fn is_connected(&self, node: u64) -> bool {
        self.nodes().get(&node).is_some_and(|seen| seen.streams > 0)
    }

    /// A frame of the node came in.
    pub(super) fn heard(&self, node: u64, said: Said) {
        let now = self.clock.now();
        let mut nodes = self.nodes();
        let seen = nodes.entry(node).or_default();
        seen.heard = match seen.heard {
            Some((since, last)) if now.saturating_duration_since(last) <= SILENCE_MAX => Some((since, now)),
            _ => Some((now, now)),
        };
        if said.wall_ms > 0 {
            seen.wall = Some((said.wall_ms, now));
        }
        seen.state_version = said.state_version.max(1);
    }

    /// The highest state version that all of these nodes announce, and have announced lately; `None` when one has not been heard.
    pub(super) fn state_version_of(&self, of: impl Iterator<Item = u64>) -> Option<u32> {
        let now = self.clock.now();
        let nodes = self.nodes();
        let announced = |node| {
            let seen = nodes.get(&node)?;
            let lately = seen.heard.is_some_and(|(_, last)| now.saturating_duration_since(last) <= SILENCE_MAX);
            (lately && seen.state_version > 0).then_some(seen.state_version)
        };
        of.map(announced).try_fold(u32::MAX, |least, version| Some(least.min(version?)))
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
        (Presence::new(Arc::new(clock.clone()), 2), clock)
    }

    fn at(wall_ms: u64) -> Said {
        Said { wall_ms, state_version: 0 }
    }

    fn knows(state_version: u32) -> Said {
        Said { wall_ms: T, state_version }
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
            presence.heard(2, at(0));
            clock.pass(Duration::from_secs(2));
        }
        assert_eq!(presence.up_for(2), Duration::from_secs(12));
        clock.pass(Duration::from_secs(2));
        assert_eq!(presence.up_for(2), Duration::ZERO, "it has fallen silent");
        presence.heard(2, at(0));
        clock.pass(Duration::from_secs(1));
        assert_eq!(presence.up_for(2), Duration::from_secs(1));
    }

    #[test]
    fn a_clock_goes_on_with_monotonic_time_whatever_the_clock_here_does() {
        let (presence, clock) = presence();
        presence.heard(2, at(T + 5));
        presence.heard(3, at(0));
        clock.pass(Duration::from_secs(7));
        clock.jump_ms(3_600_000);
        assert_eq!(presence.clocks_ms([2, 3, 4].into_iter()), [T + 7_005]);
        clock.pass(CLOCK_MAX);
        assert!(presence.clocks_ms([2].into_iter()).is_empty());
    }

    #[test]
    fn a_version_counts_when_all_have_announced_it_lately_and_one_that_says_nothing_has_the_first() {
        let (presence, clock) = presence();
        let of = |nodes: &[u64]| presence.state_version_of(nodes.iter().copied());
        assert_eq!(of(&[2, 3]), None, "never heard");
        presence.heard(2, knows(5));
        assert_eq!((of(&[2]), of(&[2, 3])), (Some(5), None));
        presence.heard(3, knows(0));
        assert_eq!(of(&[2, 3]), Some(1));
        presence.heard(3, knows(4));
        assert_eq!(of(&[2, 3]), Some(4));
        clock.pass(SILENCE_MAX + Duration::from_millis(1));
        presence.heard(2, knows(5));
        assert_eq!((of(&[2]), of(&[2, 3])), (Some(5), None), "it has fallen silent");
    }

    #[test]
    fn the_version_of_a_node_that_closed_its_last_stream_is_forgotten() {
        let (presence, _) = presence();
        presence.opened(2);
        presence.heard(2, knows(2));
        presence.closed(2);
        assert_eq!(presence.state_version_of([2].into_iter()), None);
        presence.heard(2, knows(1));
        assert_eq!(presence.state_version_of([2].into_iter()), Some(1));
    }
}

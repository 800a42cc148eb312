//! Which gateways follow the meta state through this node, and how far each has confirmed it.
//!
//! A value: time comes in. A gateway with an open stream is there: the connection's keepalive ends a dead one. One whose streams
//! have ended is silent since then, and lost when that is longer than its lease; it may go on serving known keys for the grace time
//! after that, and so long it is remembered and named. One that ends its last stream in order says goodbye and is forgotten.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::{Duration, Instant},
};

use bytes::Bytes;
use martlet_proto::cluster::{admin::GatewayStatus, meta::WatchRequest};
use serde::{Deserialize, Serialize};

/// Most gateways that one node remembers.
pub const GATEWAYS_MAX: usize = 4_096;
const NAME_MAX: usize = 128;

/// Section `[watch]`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct WatchConfig {
    /// Between two replies of a watch. Shorter finds a lost gateway sooner; each is a small message.
    #[serde(with = "humantime_serde")]
    pub keepalive: Duration,
    /// A watcher may serve by what it knows this long after a reply; then it counts as lost. A multiple of `keepalive`, so that
    /// one late reply costs nothing; revoking a key takes as long when a gateway is lost.
    #[serde(with = "humantime_serde")]
    pub lease: Duration,
    /// How long gateways without a lease go on serving the keys they know: the gateways' own setting, told to operators who
    /// revoke a key.
    #[serde(with = "humantime_serde")]
    pub grace: Duration,
}

impl Default for WatchConfig {
    fn default() -> Self {
        Self { keepalive: Duration::from_secs(1), lease: Duration::from_secs(10), grace: Duration::from_secs(15 * 60) }
    }
}

/// A watcher that was refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum WatchError {
    /// The id is neither empty nor 16 bytes.
    #[error("a gateway id has 16 bytes")]
    BadId,
    /// [`GATEWAYS_MAX`] are remembered.
    #[error("{GATEWAYS_MAX} gateways are known already")]
    Full,
}

/// The gateways that watch, or did until lately.
#[derive(Debug)]
pub struct Watchers {
    lease: Duration,
    grace: Duration,
    since: Instant,
    seen: BTreeMap<Bytes, Watcher>,
}

#[derive(Debug)]
struct Watcher {
    name: String,
    confirmed_revision: u64,
    token_keys: BTreeSet<u32>,
    heard: Instant,
    /// Open streams; a gateway that changes over to another stream has two for a moment.
    streams: u32,
}

impl Watcher {
    fn silence(&self, now: Instant) -> Duration {
        if self.streams > 0 { Duration::ZERO } else { now.saturating_duration_since(self.heard) }
    }
}

impl Watchers {
    /// Knows nobody; `now` is when this node began to listen.
    pub fn new(config: &WatchConfig, now: Instant) -> Self {
        Self { lease: config.lease, grace: config.grace, since: now, seen: BTreeMap::new() }
    }

    /// A watcher spoke. Nodes and operators' tools, which have no id, are not kept.
    pub fn heard(&mut self, now: Instant, request: &WatchRequest) -> Result<(), WatchError> {
        if request.gateway.is_empty() {
            return Ok(());
        }
        if request.gateway.len() != 16 {
            return Err(WatchError::BadId);
        }
        self.forget(now);
        if self.seen.len() >= GATEWAYS_MAX && !self.seen.contains_key(&request.gateway) {
            return Err(WatchError::Full);
        }
        let watcher = Watcher {
            name: request.name.chars().filter(|c| !c.is_control()).take(NAME_MAX).collect(),
            confirmed_revision: request.confirmed_revision,
            token_keys: request.confirmed_token_keys.iter().copied().take(16).collect(),
            heard: now,
            streams: self.seen.get(&request.gateway).map_or(0, |known| known.streams),
        };
        self.seen.insert(request.gateway.clone(), watcher);
        Ok(())
    }

    /// A stream is the gateway's: it was heard on it for the first time.
    pub fn opened(&mut self, gateway: &[u8]) {
        if let Some(watcher) = self.seen.get_mut(gateway) {
            watcher.streams += 1;
        }
    }

    /// One of its streams has ended. In order: if it was the last, the gateway serves nothing any more.
    pub fn closed(&mut self, now: Instant, gateway: &[u8], in_order: bool) {
        let Some(watcher) = self.seen.get_mut(gateway) else { return };
        watcher.streams = watcher.streams.saturating_sub(1);
        watcher.heard = now;
        if in_order && watcher.streams == 0 {
            self.seen.remove(gateway);
        }
    }

    /// Everyone remembered.
    pub fn status(&mut self, now: Instant) -> Vec<GatewayStatus> {
        self.forget(now);
        self.seen
            .iter()
            .map(|(gateway, watcher)| GatewayStatus {
                name: watcher.name.clone(),
                gateway: gateway.clone(),
                confirmed_revision: watcher.confirmed_revision,
                silent_ms: millis(watcher.silence(now)),
            })
            .collect()
    }

    /// Whether every remembered gateway can verify tokens of this key.
    pub fn all_know_token_key(&mut self, now: Instant, key_id: u32) -> bool {
        self.forget(now);
        self.seen.values().all(|watcher| watcher.token_keys.contains(&key_id))
    }

    /// How long gateways that this node never heard of may still accept what was revoked: those that followed it before it
    /// started, until their grace has run out.
    pub fn unheard_ms(&self, now: Instant) -> u64 {
        millis((self.lease + self.grace).saturating_sub(now.saturating_duration_since(self.since)))
    }

    fn forget(&mut self, now: Instant) {
        let longest = self.lease + self.grace;
        self.seen.retain(|_, watcher| watcher.silence(now) <= longest);
    }
}

/// One entry for each gateway of several nodes' answers: the newest confirmation, the shortest silence.
pub fn merge(statuses: impl IntoIterator<Item = GatewayStatus>) -> Vec<GatewayStatus> {
    let mut merged: BTreeMap<Bytes, GatewayStatus> = BTreeMap::new();
    for status in statuses {
        let known = merged.entry(status.gateway.clone()).or_insert_with(|| status.clone());
        known.confirmed_revision = known.confirmed_revision.max(status.confirmed_revision);
        known.silent_ms = known.silent_ms.min(status.silent_ms);
    }
    merged.into_values().collect()
}

fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
#[expect(clippy::disallowed_methods, reason = "a test needs some instant to count from")]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn says(gateway: u8, confirmed_revision: u64) -> WatchRequest {
        WatchRequest {
            gateway: vec![gateway; 16].into(),
            name: format!("gateway {gateway}"),
            confirmed_revision,
            confirmed_token_keys: vec![1],
        }
    }

    #[test]
    fn a_gateway_is_known_by_what_it_confirmed_last_and_how_long_it_is_silent() {
        let t0 = Instant::now();
        let mut watchers = Watchers::new(&WatchConfig::default(), t0);
        watchers.heard(t0, &says(1, 5)).unwrap();
        watchers.heard(t0 + SECOND, &says(1, 6)).unwrap();
        let status = watchers.status(t0 + 3 * SECOND);
        assert_eq!((status[0].confirmed_revision, status[0].silent_ms, status.len()), (6, 2_000, 1));
    }

    #[test]
    fn a_lost_gateway_is_remembered_for_as_long_as_it_may_serve_and_a_leaving_one_is_not() {
        let t0 = Instant::now();
        let config = WatchConfig::default();
        let mut watchers = Watchers::new(&config, t0);
        watchers.heard(t0, &says(1, 1)).unwrap();
        watchers.heard(t0, &says(2, 1)).unwrap();
        watchers.opened(&[2; 16]);
        watchers.closed(t0, &[2; 16], true);
        let end = t0 + config.lease + config.grace;
        assert_eq!(watchers.status(end).len(), 1);
        assert_eq!(watchers.status(end + SECOND).len(), 0);
    }

    #[test]
    fn a_gateway_with_an_open_stream_is_not_silent_and_one_that_changes_streams_does_not_say_goodbye() {
        let t0 = Instant::now();
        let mut watchers = Watchers::new(&WatchConfig::default(), t0);
        watchers.heard(t0, &says(1, 5)).unwrap();
        watchers.opened(&[1; 16]);
        assert_eq!(watchers.status(t0 + 5_000 * SECOND)[0].silent_ms, 0);
        watchers.opened(&[1; 16]);
        watchers.closed(t0 + 5_000 * SECOND, &[1; 16], true);
        assert_eq!(watchers.status(t0 + 5_001 * SECOND)[0].silent_ms, 0);
        watchers.closed(t0 + 5_001 * SECOND, &[1; 16], false);
        assert_eq!(watchers.status(t0 + 5_003 * SECOND)[0].silent_ms, 2_000);
    }

    #[test]
    fn watchers_without_an_id_are_not_kept_and_wrong_ids_are_refused() {
        let t0 = Instant::now();
        let mut watchers = Watchers::new(&WatchConfig::default(), t0);
        watchers.heard(t0, &WatchRequest::default()).unwrap();
        let short = WatchRequest { gateway: Bytes::from_static(b"short"), ..WatchRequest::default() };
        assert_eq!(watchers.heard(t0, &short), Err(WatchError::BadId));
        assert!(watchers.status(t0).is_empty());
    }

    #[test]
    fn the_gateways_that_are_remembered_are_bounded_and_the_known_are_still_heard() {
        let t0 = Instant::now();
        let mut watchers = Watchers::new(&WatchConfig::default(), t0);
        let named =
            |number: u128| WatchRequest { gateway: Bytes::copy_from_slice(&number.to_be_bytes()), ..says(0, 1) };
        for number in 0..GATEWAYS_MAX as u128 {
            watchers.heard(t0, &named(number)).unwrap();
        }
        assert_eq!(watchers.heard(t0, &named(u128::MAX)), Err(WatchError::Full));
        watchers.heard(t0, &named(0)).unwrap();
    }

    #[test]
    fn a_node_that_started_lately_says_for_how_long_it_may_not_know_a_gateway() {
        let t0 = Instant::now();
        let watchers = Watchers::new(&WatchConfig::default(), t0);
        assert_eq!(watchers.unheard_ms(t0), 910_000);
        assert_eq!(watchers.unheard_ms(t0 + 911 * SECOND), 0);
    }

    #[test]
    fn a_gateway_that_moved_from_node_to_node_counts_once_with_its_newest_word() {
        let t0 = Instant::now();
        let mut nodes = [0, 1].map(|_| Watchers::new(&WatchConfig::default(), t0));
        nodes[0].heard(t0, &says(1, 7)).unwrap();
        nodes[1].heard(t0 + SECOND, &says(1, 9)).unwrap();
        let merged = merge(nodes.iter_mut().flat_map(|node| node.status(t0 + 2 * SECOND)));
        assert_eq!((merged.len(), merged[0].confirmed_revision, merged[0].silent_ms), (1, 9, 1_000));
    }

    #[test]
    fn a_token_key_is_known_when_every_gateway_confirmed_it() {
        let t0 = Instant::now();
        let mut watchers = Watchers::new(&WatchConfig::default(), t0);
        assert!(watchers.all_know_token_key(t0, 2), "nobody has to know it");
        watchers.heard(t0, &says(1, 1)).unwrap();
        assert!(watchers.all_know_token_key(t0, 1));
        assert!(!watchers.all_know_token_key(t0, 2));
    }
}

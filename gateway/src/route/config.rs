//! Settings of the calls to nodes.

use std::time::Duration;

use martlet_proto::limits::{BATCH_BYTES_MAX, BATCH_OPERATIONS_MAX};
use serde::{Deserialize, Serialize};

use crate::config::{ConfigError, wrong};

/// Half of what a node takes as one batch: operations have some bytes each around them, and one may come on top. A request of as many
/// bytes and a batch more stays below what gRPC takes.
const PACK_BYTES_MAX: usize = BATCH_BYTES_MAX / 2;

/// Section `[route]`: how operations reach the leaders of shards.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RouteConfig {
    /// From a request to its answer. Not above the nodes' dedupe window less 30 s.
    #[serde(with = "humantime_serde")]
    pub deadline: Duration,
    /// Of the deadline, what is kept for learning an unknown outcome.
    #[serde(with = "humantime_serde")]
    pub resolve_reserve: Duration,
    /// One try at one node; after it the outcome of that try is unknown and another node is asked.
    #[serde(with = "humantime_serde")]
    pub try_timeout: Duration,
    /// First wait before a refused operation is tried again; doubles up to `retry_max`, with jitter.
    #[serde(with = "humantime_serde")]
    pub retry_min: Duration,
    /// Longest wait between tries. Shorter finds a new leader sooner and asks more in vain meanwhile.
    #[serde(with = "humantime_serde")]
    pub retry_max: Duration,
    /// Longest wait between dials of a node that does not answer.
    #[serde(with = "humantime_serde")]
    pub dial_max: Duration,
    /// How long a dial may take.
    #[serde(with = "humantime_serde")]
    pub connect_timeout: Duration,
    /// HTTP/2 ping of an idle or busy connection to a node.
    #[serde(with = "humantime_serde")]
    pub ping_interval: Duration,
    /// A ping not answered for this long ends the connection.
    #[serde(with = "humantime_serde")]
    pub ping_timeout: Duration,
    /// Batches that wait to be sent to one node at most; beyond it operations are refused as unavailable.
    pub queue_max: usize,
    /// Batches of one node whose answer is awaited at most.
    pub inflight_max: usize,
    /// Bytes of operations that are packed into one request, 1 to 1048576.
    pub pack_bytes: usize,
    /// Operations of one batch at most, 1 to 4096.
    pub batch_operations: usize,
    /// How long known projects and keys are served after the lease of the watch has ended; then every request is answered
    /// 503. Longer survives longer outages of all nodes, and accepts a revoked key longer.
    #[serde(with = "humantime_serde")]
    pub serve_without_lease: Duration,
    /// A token made with an unknown key asks the nodes for newer keys at most this often.
    #[serde(with = "humantime_serde")]
    pub refresh_interval: Duration,
}

impl Default for RouteConfig {
    fn default() -> Self {
        Self {
            deadline: Duration::from_secs(10),
            resolve_reserve: Duration::from_secs(3),
            try_timeout: Duration::from_secs(3),
            retry_min: Duration::from_millis(20),
            retry_max: Duration::from_millis(250),
            dial_max: Duration::from_secs(1),
            connect_timeout: Duration::from_secs(2),
            ping_interval: Duration::from_secs(1),
            ping_timeout: Duration::from_secs(2),
            queue_max: 4096,
            inflight_max: 4096,
            pack_bytes: 64 << 10,
            batch_operations: 256,
            serve_without_lease: Duration::from_secs(15 * 60),
            refresh_interval: Duration::from_secs(5),
        }
    }
}

impl RouteConfig {
    pub(crate) fn check(&self) -> Result<(), ConfigError> {
        if self.deadline.is_zero() {
            return wrong("route.deadline", "must be longer than 0s");
        }
        if self.resolve_reserve >= self.deadline {
            return wrong("route.resolve_reserve", "must be shorter than route.deadline");
        }
        for (key, value) in [
            ("route.try_timeout", self.try_timeout),
            ("route.retry_min", self.retry_min),
            ("route.retry_max", self.retry_max),
            ("route.dial_max", self.dial_max),
            ("route.connect_timeout", self.connect_timeout),
            ("route.ping_interval", self.ping_interval),
            ("route.ping_timeout", self.ping_timeout),
        ] {
            if value.is_zero() {
                return wrong(key, "must be longer than 0s");
            }
        }
        for (key, value) in [("route.queue_max", self.queue_max), ("route.inflight_max", self.inflight_max)] {
            if value == 0 {
                return wrong(key, "must be 1 or more");
            }
        }
        // A node refuses larger batches each time.
        if !(1..=PACK_BYTES_MAX).contains(&self.pack_bytes) {
            return wrong("route.pack_bytes", "must be 1 to 1048576");
        }
        if !(1..=BATCH_OPERATIONS_MAX).contains(&self.batch_operations) {
            return wrong("route.batch_operations", "must be 1 to 4096");
        }
        Ok(())
    }
}

//! How patient Raft is.

use std::time::Duration;

use serde::{Deserialize, Serialize};

/// Timers and bounds of every group of a node; the same on all nodes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RaftSettings {
    /// Between two heartbeats of a leader. Shorter finds a dead leader sooner and costs every idle group; with 64 groups
    /// 300 ms costs about 4 % of a core.
    #[serde(with = "humantime_serde")]
    pub heartbeat: Duration,
    /// A heartbeat is left out when an append was acknowledged this recently.
    #[serde(with = "humantime_serde")]
    pub heartbeat_min: Duration,
    /// Silence after which a follower may campaign, at least. Should be ten times what an append takes.
    #[serde(with = "humantime_serde")]
    pub election_min: Duration,
    /// Silence after which a follower campaigns, at most; also the leader's lease.
    #[serde(with = "humantime_serde")]
    pub election_max: Duration,
    /// Most entries in one append between nodes.
    pub append_entries_max: u64,
    /// Entries kept behind a checkpoint, so that a slow follower needs no snapshot.
    pub kept_entries: u64,
}

impl Default for RaftSettings {
    fn default() -> Self {
        RaftSettings {
            heartbeat: Duration::from_millis(300),
            heartbeat_min: Duration::from_millis(250),
            election_min: Duration::from_millis(900),
            election_max: Duration::from_millis(1500),
            append_entries_max: 256,
            kept_entries: 10_000,
        }
    }
}

//! How patient Raft is.

use std::time::Duration;

use openraft::{Config, ConfigError, SnapshotPolicy};
use serde::{Deserialize, Serialize};

use crate::log::GroupId;

/// Entries that a follower may lack and still be handed leadership: it gets them before it campaigns.
pub(super) const TRANSFER_LAG: u64 = 64;

/// Timers and bounds of every group of a node; the same on all nodes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RaftSettings {
    /// Between two heartbeats of a leader. Shorter finds a dead leader sooner and costs every idle group; with 64 groups
    /// 300 ms costs less than 2 % of a core.
    #[serde(with = "humantime_serde")]
    pub heartbeat: Duration,
    /// A heartbeat is left out when an append was acknowledged this recently.
    #[serde(with = "humantime_serde")]
    pub heartbeat_min: Duration,
    /// Silence after which a follower may campaign, at least; it looks at each line of `ticks`. Should be ten times what an append
    /// takes.
    #[serde(with = "humantime_serde")]
    pub election_min: Duration,
    /// Silence after which a follower campaigns, at most; also the leader's lease.
    #[serde(with = "humantime_serde")]
    pub election_max: Duration,
    /// The first replica of a shard's list takes leadership back once its node has been up this long. Shorter moves leaders to
    /// nodes that may go again at once; longer leaves the load with the others.
    #[serde(with = "humantime_serde")]
    pub balance_after: Duration,
    /// Most entries in one append between nodes.
    pub append_entries_max: u64,
    /// Entries kept behind the purge point that would be possible: a replica that lags a bit, or dropped the end of its log,
    /// finds them. Beyond `log.checkpoint_bytes` of log they go all the same. Fewer send snapshots sooner; more costs disk.
    pub kept_entries: u64,
}

impl Default for RaftSettings {
    fn default() -> Self {
        RaftSettings {
            heartbeat: Duration::from_millis(300),
            heartbeat_min: Duration::from_millis(250),
            election_min: Duration::from_millis(900),
            election_max: Duration::from_millis(1500),
            balance_after: Duration::from_secs(10),
            append_entries_max: 256,
            kept_entries: 1_000,
        }
    }
}

impl RaftSettings {
    /// openraft's configuration. Snapshots and purges are never its own idea; a quiet replica does not campaign yet.
    pub(super) fn openraft(&self, group: GroupId, campaigns: bool) -> Result<Config, ConfigError> {
        let ms = |duration: Duration| u64::try_from(duration.as_millis()).unwrap_or(u64::MAX);
        let config = Config {
            cluster_name: group.to_string(),
            heartbeat_interval: ms(self.heartbeat),
            heartbeat_min_interval: Some(ms(self.heartbeat_min)),
            election_timeout_min: ms(self.election_min),
            election_timeout_max: ms(self.election_max),
            // `beats` asks for them, those of all groups at once.
            enable_heartbeat: false,
            enable_elect: campaigns,
            enable_pre_vote: Some(true),
            max_payload_entries: self.append_entries_max,
            max_append_entries: Some(self.append_entries_max),
            api_batch_linger_ms: 0,
            snapshot_policy: SnapshotPolicy::Never,
            // Would purge by itself, beyond checkpoints and followers: see `Group::purge_upto`.
            max_in_snapshot_log_to_keep: u64::MAX,
            replication_lag_threshold: u64::MAX,
            install_snapshot_timeout: 60_000,
            enable_leader_restore: Some(false),
            allow_log_reversion: Some(false),
            ..Config::default()
        };
        config.validate()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_defaults_are_valid() {
        assert!(RaftSettings::default().openraft(GroupId::META, true).is_ok());
    }
}

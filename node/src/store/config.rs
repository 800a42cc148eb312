//! What an operator can choose about the store.

use std::{path::PathBuf, time::Duration};

use serde::{Deserialize, Serialize};

/// Settings of the store of one node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct StoreConfig {
    /// Directory of the store: holds `sled/` and, during a checkpoint, `redo`. The node sets it below its data directory.
    #[serde(skip)]
    pub dir: PathBuf,
    /// Memory of sled's page cache, in bytes. Less makes reads of older mailboxes slow; sled may exceed it somewhat.
    pub cache_bytes: u64,
    /// Memory for rows that are not yet in sled, in bytes, of all shards together. At half of it checkpoints come early; at all
    /// of it leaders refuse enqueues and followers stop applying. Less sends more messages through sled that a device is about
    /// to fetch; more makes a checkpoint longer.
    pub budget_bytes: u64,
    /// A shard is checkpointed this long after its first change. Shorter writes more messages to sled that a device is about
    /// to fetch; longer keeps more log and makes a restart longer.
    #[serde(with = "humantime_serde")]
    pub checkpoint_age: Duration,
    /// A shard is checkpointed when its memtable holds this many bytes.
    pub checkpoint_bytes: u64,
    /// The base file of a shard, from which sled can be rebuilt and other nodes brought up, is written anew when the log since it is
    /// this many times its size. More keeps more log, which makes rebuilding longer; less writes all rows of a shard more often.
    pub base_log_factor: u64,
    /// Bytes of log since the base file below which it is not written anew, unless the log as a whole has grown too long.
    pub base_log_bytes_min: u64,
}

impl Default for StoreConfig {
    fn default() -> Self {
        Self {
            dir: PathBuf::from("store"),
            cache_bytes: 128 << 20,
            budget_bytes: 256 << 20,
            checkpoint_age: Duration::from_secs(15),
            checkpoint_bytes: 64 << 20,
            base_log_factor: 1,
            base_log_bytes_min: 16 << 20,
        }
    }
}

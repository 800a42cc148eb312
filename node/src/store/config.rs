//! What an operator can choose about the store.

use std::{path::PathBuf, time::Duration};

use serde::Deserialize;

/// Settings of the store of one node.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct StoreConfig {
    /// Directory of the store. Holds `sled/` and, during a checkpoint, `redo`. Set by the node from its data directory.
    pub dir: PathBuf,
    /// Memory of sled's page cache, in bytes. Less makes reads of older mailboxes slow; sled may exceed it somewhat.
    pub cache_bytes: u64,
    /// Memory for rows that are not yet in sled.
    pub budget: Budget,
    /// A shard is checkpointed this long after its first change. Shorter writes more messages to sled that a device is about
    /// to fetch; longer keeps more log and makes a restart longer.
    #[serde(with = "humantime_serde")]
    pub checkpoint_age: Duration,
    /// A shard is checkpointed when its memtable holds this many bytes.
    pub checkpoint_bytes: u64,
}

impl Default for StoreConfig {
    fn default() -> Self {
        Self {
            dir: PathBuf::from("store"),
            cache_bytes: 128 << 20,
            budget: Budget::default(),
            checkpoint_age: Duration::from_secs(15),
            checkpoint_bytes: 64 << 20,
        }
    }
}

/// The memory that all memtables of a node share.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Budget {
    /// At this many bytes leaders refuse enqueues and followers stop applying; at half of it checkpoints come early.
    pub bytes: u64,
}

impl Default for Budget {
    fn default() -> Self {
        Self { bytes: 256 << 20 }
    }
}

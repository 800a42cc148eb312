//! The store: memtables over sled, made durable by an atomic checkpoint.

mod config;
mod error;
pub mod key;
mod shard;

use std::sync::Arc;

pub use self::{
    config::{Budget, StoreConfig},
    error::StoreError,
    shard::{Mark, Seal, ShardStore},
};
use crate::{clock::Clock, disk::Disk};

/// How much of the memory for memtables is used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Pressure {
    /// Below half.
    None,
    /// Above half: checkpoints come early.
    Early,
    /// At the mark: leaders refuse enqueues, followers stop applying.
    Full,
}

/// Which shards a checkpoint takes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Which {
    /// Those that are due by age or bytes, when the disk has rested enough.
    Due,
    /// These replicas, now.
    Replicas(Vec<u64>),
    /// All, now.
    All,
}

/// What a checkpoint cycle made durable.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Checkpointed {
    /// Per replica: what sled now holds durably. To be noted in the log as well.
    pub seals: Vec<(u64, Seal)>,
    /// Physical operations written to sled.
    pub operations: u64,
}

/// The rows of all replicas on this node.
#[derive(Debug)]
pub struct Store {}

impl Store {
    /// Opens the store below `config.dir`.
    pub fn open(_config: StoreConfig, _disk: Arc<dyn Disk>, _clock: Arc<dyn Clock>) -> Result<Self, StoreError> {
        unimplemented!("skeleton")
    }

    /// The rows of one replica.
    pub fn shard(&self, _replica: u64) -> Result<Arc<ShardStore>, StoreError> {
        unimplemented!("skeleton")
    }

    /// Runs one checkpoint cycle; blocks on the disk.
    pub fn checkpoint(&self, _which: Which) -> Result<Checkpointed, StoreError> {
        unimplemented!("skeleton")
    }

    /// Forgets a replica for ever; blocks on the disk.
    pub fn drop_replica(&self, _replica: u64) -> Result<(), StoreError> {
        unimplemented!("skeleton")
    }

    /// How much of the memory for memtables is used.
    pub fn pressure(&self) -> Pressure {
        unimplemented!("skeleton")
    }
}

//! The store: memtables over sled, made durable by an atomic checkpoint.
//!
//! Owns the rows of all replicas on this node: what a commit puts in memory, what a checkpoint moves to sled, what is checked
//! before a row is believed. Leaves to `state` what rows mean, to [`key`] how they are spelled, to `raft` when they are applied,
//! to `log` everything since the last checkpoint: a commit is *not* durable, a checkpointed index is.
//!
//! In the order in which a row passes: [`ShardStore::commit`] (`shard`, `memtable`), [`Store::checkpoint`] (`checkpoint`,
//! `redo`), the physical form (`row`, `head`), [`engine`] and [`sled`], the base file ([`base`], `basing`); from a peer `install`;
//! at the open `recover` and `rebuild`, after a replica was dropped `orphan`. Files: `DIR/sled/`, during a checkpoint `DIR/redo`,
//! and of each replica `DIR/<id>.base`.
//!
//! The invariants:
//! - sled, with the redo file if there is one, always stands for exactly one log index per replica.
//! - Every physical value is checked against its key when read, and all rows of a replica against its head's count and sum when
//!   it is opened: [`StoreError::Damaged`] otherwise. That check reads every row once per start, about two to four seconds per
//!   million; it is the price of not trusting sled.
//! - A base file is whole, or is no base; the log of a replica is purged at most to it, so that what sled loses can be made again.
//! - A read error is an error, never 'absent'.
//!
//! The node runs [`Store::checkpoint`] with [`Which::Due`] and [`Store::sweep`] from one thread of its own, about every second,
//! and [`Store::write_base`] from another.

pub mod base;
pub mod engine;
pub mod key;
pub mod memory;
pub mod sled;

mod basing;
mod budget;
mod checkpoint;
mod config;
mod error;
mod head;
mod install;
mod memtable;
mod orphan;
mod rebuild;
mod recover;
mod redo;
mod row;
mod shard;

use std::{
    collections::BTreeMap,
    path::PathBuf,
    sync::{Arc, Mutex},
};

use self::{budget::Budget, checkpoint::Cycle, engine::Engine, head::Head, orphan::Orphan, row::Region};
pub use self::{
    budget::Pressure,
    checkpoint::{Checkpointed, Which},
    config::StoreConfig,
    error::StoreError,
    head::{Mark, Seal},
    install::{Incoming, Staged},
    rebuild::LogReach,
    shard::{Base, KEY_MAX, MARK_MAX, ShardStore},
};
use crate::{clock::Clock, disk::Disk};

/// What reading all rows of a replica found.
#[derive(Debug)]
enum Checked {
    /// Their number and sum.
    Tally((u64, u64)),
    /// One that is not what was written.
    Damaged(String),
}

/// The rows of all replicas on this node.
#[derive(Debug)]
pub struct Store {
    config: StoreConfig,
    disk: Arc<dyn Disk>,
    clock: Arc<dyn Clock>,
    engine: Arc<dyn Engine>,
    budget: Arc<Budget>,
    redo_path: PathBuf,
    /// Replicas that sled held at the open.
    replicas: Vec<u64>,
    /// Where sled was moved at the open, if it was.
    aside: Option<PathBuf>,
    /// Replicas that must not be opened as they are, and why.
    damaged: Mutex<BTreeMap<u64, String>>,
    /// What the open found of rows that nobody has opened since.
    checked: Mutex<BTreeMap<u64, Checked>>,
    // Locked in this order.
    cycle: Mutex<Cycle>,
    orphans: Mutex<Vec<Orphan>>,
    shards: Mutex<BTreeMap<u64, Arc<ShardStore>>>,
}

impl Store {
    /// As [`Store::open`], over another engine. `config.dir` must exist on `disk`.
    pub fn open_with(
        config: StoreConfig,
        disk: Arc<dyn Disk>,
        clock: Arc<dyn Clock>,
        engine: Arc<dyn Engine>,
    ) -> Result<Self, StoreError> {
        let redo_path = config.dir.join("redo");
        let damaged = recover::finish_checkpoint(&*disk, &*engine, &redo_path)?;
        let inventory = orphan::inventory(&*engine)?;
        Ok(Self {
            budget: Arc::new(Budget::new(config.budget_bytes)),
            config,
            disk,
            clock,
            engine,
            redo_path,
            replicas: inventory.replicas,
            aside: None,
            damaged: Mutex::new(damaged),
            checked: Mutex::default(),
            cycle: Mutex::default(),
            shards: Mutex::default(),
            orphans: Mutex::new(inventory.orphans),
        })
    }

    /// Replicas that sled held rows of at the open, ascending. One that was never checkpointed is not among them.
    pub fn replicas(&self) -> &[u64] {
        &self.replicas
    }

    /// The rows of one replica; a new one begins empty. The first call for a replica reads all its rows.
    ///
    /// [`StoreError::Damaged`] says that they are not what was written. The caller must still compare
    /// [`ShardStore::checkpointed`] with its log: an index before the log's purge point means that sled fell back.
    pub fn shard(&self, replica: u64) -> Result<Arc<ShardStore>, StoreError> {
        let mut shards = self.shards.lock().expect("no panic under this lock");
        if let Some(shard) = shards.get(&replica) {
            return Ok(shard.clone());
        }
        if let Some(what) = self.damaged.lock().expect("no panic under this lock").get(&replica) {
            return Err(self.damage(replica, what.clone()));
        }
        let head = Head::read(&*self.engine, replica)?;
        if head.as_ref().is_some_and(|head| head.dropped) {
            return Err(StoreError::Dropped { replica });
        }
        let generation = head.as_ref().map_or(1, |head| head.generation);
        let seal = head.as_ref().and_then(|head| head.seal.as_ref());
        self.verify(replica, generation, seal)?;
        let unused = orphan::last_generation(&*self.engine, replica)?.max(generation).saturating_add(1);
        let (engine, clock, budget) = (self.engine.clone(), self.clock.clone(), self.budget.clone());
        let shard = Arc::new(ShardStore::new((replica, generation, unused), seal, engine, clock, budget));
        shards.insert(replica, shard.clone());
        Ok(shard)
    }

    /// How much of the memory for memtables is used, by all shards together.
    pub fn pressure(&self) -> Pressure {
        self.budget.pressure()
    }

    /// How often a replica was told to wait with applying because that memory was used up.
    pub fn waits(&self) -> u64 {
        self.budget.waits()
    }

    /// Bytes that the memtables of all shards hold.
    pub fn memtable_bytes(&self) -> u64 {
        self.budget.used()
    }

    fn verify(&self, replica: u64, generation: u32, seal: Option<&Seal>) -> Result<(), StoreError> {
        let (rows, sum) = match self.checked.lock().expect("no panic under this lock").remove(&replica) {
            Some(Checked::Tally(tally)) => tally,
            Some(Checked::Damaged(what)) => return Err(self.damage(replica, what)),
            None => Region { engine: &*self.engine, replica, generation }.tally()?,
        };
        let told = seal.map_or((0, 0), |seal| (seal.rows, seal.sum));
        if (rows, sum) == told {
            return Ok(());
        }
        let index = seal.map(|seal| seal.mark.index);
        let told = format!("{} rows with sum {:016x} at index {index:?}", told.0, told.1);
        Err(self.damage(replica, format!("its head tells of {told}, there are {rows} with sum {sum:016x}")))
    }

    fn damage(&self, replica: u64, what: String) -> StoreError {
        StoreError::Damaged { replica, path: self.engine.path().to_owned(), what }
    }
}

#[cfg(test)]
mod tests;

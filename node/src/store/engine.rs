//! What the store asks of the ordered map below it.
//!
//! Owns the seam between the store and sled: [`Engine`] is what tests replace by one that forgets, fails or flips bits. Knows
//! nothing of replicas, rows or checksums. The invariant: nothing that was batched counts as kept before
//! [`Engine::make_durable`] returned, and a crash before it may keep any part of it.

use std::{
    fmt,
    path::{Path, PathBuf},
};

use bytes::Bytes;

use super::StoreError;

/// Most operations in one batch: sled leaks memory and disk from some 400 on (measured).
pub const BATCH_MAX: usize = 128;

/// One physical change.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Op {
    /// Sets a physical row.
    Put(Bytes, Bytes),
    /// Removes a physical row.
    Remove(Bytes),
}

/// Why the engine could not do what was asked.
#[derive(Debug, thiserror::Error)]
#[error("cannot {doing} {}: {what}", path.display())]
pub struct EngineError {
    /// What was attempted.
    pub doing: &'static str,
    /// On which file or directory.
    pub path: PathBuf,
    /// What came instead.
    pub what: String,
    /// The file itself is not what was written: another try finds the same.
    pub damaged: bool,
}

impl From<EngineError> for StoreError {
    fn from(error: EngineError) -> Self {
        let EngineError { doing, path, what, damaged } = error;
        StoreError::Engine { doing, path, what, damaged }
    }
}

/// Physical rows in key order.
pub type PhysicalRows = Vec<(Bytes, Bytes)>;

/// An ordered map of byte strings on a disk.
pub trait Engine: Send + Sync + fmt::Debug {
    /// Where it lives, for error messages.
    fn path(&self) -> &Path;
    /// The value at `key`. An error is never 'absent'.
    fn get(&self, key: &[u8]) -> Result<Option<Bytes>, EngineError>;
    /// At most `limit` rows from `from` on, ascending; `to` is exclusive.
    fn scan(&self, from: &[u8], to: &[u8], limit: usize) -> Result<PhysicalRows, EngineError>;
    /// At most `limit` rows before `to`, descending; `from` is inclusive.
    fn scan_back(&self, from: &[u8], to: &[u8], limit: usize) -> Result<PhysicalRows, EngineError>;
    /// Does at most [`BATCH_MAX`] changes. Not durable yet; after an error any of them may have happened.
    fn batch(&self, ops: &[Op]) -> Result<(), EngineError>;
    /// Gives all batches so far to the system, without a promise; after an error it may be repeated behind [`Engine::reopen`] and
    /// the batches themselves. What [`Engine::make_durable`] then still finds wrong is the disk's.
    fn hand_over(&self) -> Result<(), EngineError> {
        Ok(())
    }
    /// Returns when all batches so far are on disk. After an error nothing may be assumed of them, ever.
    fn make_durable(&self) -> Result<(), EngineError>;
    /// Closes and opens again, after an error of [`Engine::batch`]: what was not durable may be gone.
    fn reopen(&self) -> Result<(), EngineError>;
}

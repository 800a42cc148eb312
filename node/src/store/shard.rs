//! The rows of one replica.

use bytes::Bytes;

use super::StoreError;
use crate::state::{Rows, RowsError, Write};

/// Up to where a replica has applied.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mark {
    /// Log index of the last entry applied.
    pub index: u64,
    /// What the Raft layer keeps with it (applied log id, membership); opaque here.
    pub bytes: Bytes,
}

/// What the rows of a replica amount to at one index.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Seal {
    /// The index.
    pub mark: Mark,
    /// Number of rows.
    pub rows: u64,
    /// Sum of the row hashes, wrapping; equal on all replicas at one index.
    pub sum: u64,
}

/// The rows of one replica.
#[derive(Debug)]
pub struct ShardStore {}

impl ShardStore {
    /// Takes the writes of one applied entry.
    pub fn commit(&self, _mark: Mark, _writes: Vec<Write>) -> Result<(), StoreError> {
        unimplemented!("skeleton")
    }

    /// Up to where reads see; `None` before the first commit.
    pub fn mark(&self) -> Option<Mark> {
        unimplemented!("skeleton")
    }

    /// The index that is durable in sled; `None` before the first checkpoint (index 0 is a real entry).
    pub fn checkpointed(&self) -> Option<u64> {
        unimplemented!("skeleton")
    }

    /// Sum of the row hashes of what reads see; equal on all replicas at one index.
    pub fn hash(&self) -> u64 {
        unimplemented!("skeleton")
    }

    /// Bytes held in memory for rows that are not yet in sled.
    pub fn bytes(&self) -> u64 {
        unimplemented!("skeleton")
    }
}

impl Rows for ShardStore {
    fn get(&self, _key: &[u8]) -> Result<Option<Bytes>, RowsError> {
        unimplemented!("skeleton")
    }

    fn scan(&self, _from: &[u8], _to: &[u8], _limit: usize) -> Result<Vec<(Bytes, Bytes)>, RowsError> {
        unimplemented!("skeleton")
    }

    fn scan_back(&self, _from: &[u8], _to: &[u8], _limit: usize) -> Result<Vec<(Bytes, Bytes)>, RowsError> {
        unimplemented!("skeleton")
    }
}

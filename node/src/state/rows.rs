//! What the state reads and what it wants written: bytes under keys, in key order.
//!
//! Owns the seam between the pure value and whoever keeps its rows; knows no layout ([`crate::store::key`] does) and no
//! disk ([`crate::store`] does). Keys do not name the replica: the keeper of the rows adds that.

use bytes::Bytes;

/// Why rows could not be read. Never to be taken for "absent": the replica that meets one stops.
#[derive(Debug, thiserror::Error)]
#[error("rows cannot be read: {0}")]
pub struct RowsError(#[source] pub Box<dyn std::error::Error + Send + Sync>);

/// Rows of a shard as of the last entry applied, in key order.
pub trait Rows {
    /// The value at `key`.
    fn get(&self, key: &[u8]) -> Result<Option<Bytes>, RowsError>;
    /// At most `limit` rows from `from` on, ascending; `to` is exclusive.
    fn scan(&self, from: &[u8], to: &[u8], limit: usize) -> Result<Vec<(Bytes, Bytes)>, RowsError>;
    /// At most `limit` rows before `to`, descending; `from` is inclusive.
    fn scan_back(&self, from: &[u8], to: &[u8], limit: usize) -> Result<Vec<(Bytes, Bytes)>, RowsError>;
}

/// One change of a row, as `apply` asks for it. An entry's writes are carried out together, in their order; no two of them
/// name one key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Write {
    /// Sets a row.
    Put {
        /// Where.
        key: Bytes,
        /// What.
        value: Bytes,
        /// No row was ever under this key: a later `Remove` leaves no trace below.
        fresh: bool,
    },
    /// Removes a row; one that is absent stays absent.
    Remove {
        /// Where.
        key: Bytes,
    },
    /// Lets a value grow; an absent one begins as `tail`.
    Append {
        /// Where.
        key: Bytes,
        /// What comes after the value there is.
        tail: Bytes,
    },
}

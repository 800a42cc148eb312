//! The replicated state of a shard, as a pure value: `apply(entry) -> (answers, effects, writes)`.

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

/// One change of a row, as `apply` asks for it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Write {
    /// Sets a row.
    Put {
        /// Where.
        key: Bytes,
        /// What.
        value: Bytes,
        /// The key is certainly absent now: a later `Remove` leaves no trace below.
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

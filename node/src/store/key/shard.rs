//! Key family `Shard` (0x01): the shard's own row. Key: the tag alone. Value: [`ShardRow`], protocol buffers.

use bytes::Bytes;
use prost::Message;

use super::{BadRow, Family};

/// What holds for the whole shard.
#[derive(Clone, Copy, PartialEq, Eq, Message)]
pub struct ShardRow {
    /// How the state behaves and what it writes; rises by a logged `Raise`. 0 stands for 1: no `Raise` yet.
    #[prost(uint32, tag = "1")]
    pub version: u32,
    /// First part of every sequence; a restore from backup raises it.
    #[prost(uint32, tag = "2")]
    pub incarnation: u32,
    /// Shard time, milliseconds since 1970: the greatest of any entry so far.
    #[prost(uint64, tag = "3")]
    pub time_ms: u64,
    /// Operations first tried before this are refused: what was known of them has been dropped. Never falls.
    #[prost(uint64, tag = "4")]
    pub dedupe_floor_ms: u64,
    /// Publishes at home here that are not known to be in every shard.
    #[prost(uint32, tag = "5")]
    pub publishes_open: u32,
}

/// The key of the row.
#[must_use]
pub fn key() -> Bytes {
    Bytes::copy_from_slice(&[Family::Shard.tag()])
}

/// The value.
#[must_use]
pub fn encode(row: &ShardRow) -> Bytes {
    row.encode_to_vec().into()
}

/// Reads the value.
///
/// # Errors
/// When it is not a [`ShardRow`].
pub fn decode(value: Bytes) -> Result<ShardRow, BadRow> {
    ShardRow::decode(value).map_err(|_| BadRow::new(Family::Shard, "not protocol buffers", &key()))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn round_trips(version: u32, incarnation: u32, time_ms: u64, dedupe_floor_ms: u64, publishes_open: u32) {
            let row = ShardRow { version, incarnation, time_ms, dedupe_floor_ms, publishes_open };
            prop_assert_eq!(decode(encode(&row)), Ok(row));
        }
    }
}

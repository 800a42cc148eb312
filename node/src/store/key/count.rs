//! Key family `Count` (0x08): fate counters of one project. Key: `tag | sender id, UTF-8`. Value: [`CountRow`], protocol
//! buffers.

use bytes::Bytes;
use prost::Message;

use super::{BadRow, Family, body};

/// What became of a project's messages in this shard. Counters of fates only rise.
///
/// accepted = delivered + waiting + expired + collapsed + overflow + unregistered + recalled, after every entry.
#[derive(Clone, Copy, PartialEq, Eq, Message)]
pub struct CountRow {
    /// Answered `Accepted`.
    #[prost(uint64, tag = "1")]
    pub accepted: u64,
    /// Acked by the device.
    #[prost(uint64, tag = "2")]
    pub delivered: u64,
    /// Their time to live ended.
    #[prost(uint64, tag = "3")]
    pub expired: u64,
    /// Replaced by a newer one of their collapse key, or over the limit of keys.
    #[prost(uint64, tag = "4")]
    pub collapsed: u64,
    /// Dropped by the limit of waiting messages or by the cap of unacked ones.
    #[prost(uint64, tag = "5")]
    pub overflow: u64,
    /// Their registration went.
    #[prost(uint64, tag = "6")]
    pub unregistered: u64,
    /// Taken back by an operator.
    #[prost(uint64, tag = "7")]
    pub recalled: u64,
    /// Bytes of the project's rows in the mailboxes of this shard, notices included. A body that many rows share is not among them.
    #[prost(uint64, tag = "8")]
    pub stored_bytes: u64,
}

impl CountRow {
    /// Messages that are in a mailbox: what has no other fate yet. Nothing when the row does not balance.
    #[must_use]
    pub fn waiting(&self) -> Option<u64> {
        let Self { accepted, delivered, expired, collapsed, overflow, unregistered, recalled, stored_bytes: _ } = *self;
        [delivered, expired, collapsed, overflow, unregistered, recalled]
            .into_iter()
            .try_fold(accepted, u64::checked_sub)
    }
}

/// The key of one project.
#[must_use]
pub fn key(sender: &str) -> Bytes {
    let mut key = Vec::with_capacity(1 + sender.len());
    key.push(Family::Count.tag());
    key.extend_from_slice(sender.as_bytes());
    key.into()
}

/// Reads a key.
#[must_use]
pub fn decode_key(key: &[u8]) -> Option<&str> {
    std::str::from_utf8(body(Family::Count, key)?).ok()
}

/// The value.
#[must_use]
pub fn encode(row: &CountRow) -> Bytes {
    row.encode_to_vec().into()
}

/// Reads the value found under `key`.
///
/// # Errors
/// When it is not a [`CountRow`], or does not balance.
pub fn decode(key: &[u8], value: Bytes) -> Result<CountRow, BadRow> {
    let bad = |what| BadRow::new(Family::Count, what, key);
    let row = CountRow::decode(value).map_err(|_| bad("not protocol buffers"))?;
    row.waiting().ok_or_else(|| bad("more messages have met their fate than were accepted"))?;
    Ok(row)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn round_trips_and_sorts_by_sender(a: String, b: String, delivered: u32, waiting: u32) {
            let bytes = key(&a);
            prop_assert_eq!(decode_key(&bytes), Some(&a[..]));
            prop_assert_eq!(key(&a).cmp(&key(&b)), a.cmp(&b));
            let (delivered, waiting) = (u64::from(delivered), u64::from(waiting));
            let row = CountRow { accepted: delivered + waiting, delivered, ..Default::default() };
            prop_assert_eq!(decode(&key(&a), encode(&row)), Ok(row));
            prop_assert_eq!(row.waiting(), Some(waiting));
        }
    }

    #[test]
    fn a_row_that_does_not_balance_is_bad() {
        let row = CountRow { accepted: 1, delivered: 1, expired: 1, ..Default::default() };
        assert!(decode(&key("1"), encode(&row)).is_err());
    }
}

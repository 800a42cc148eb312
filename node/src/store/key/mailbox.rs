//! Key family `Mailbox` (0x04): one message that waits for its device. Key: `OF_DEVICE | device tag u64 | tag | sequence 16`, 26 bytes,
//! so that a mailbox is read in its order. Never written twice: a sequence is given once. Value: [`MailboxRow`], protocol
//! buffers; the payload shares the bytes it was read from.

use bytes::Bytes;
use martlet_proto::{
    cluster::queue,
    message::{MessageId, Sequence},
    tag::DeviceTag,
    token::RegistrationId,
};
use prost::Message;

use super::{BadRow, Family, after_prefix, device_body, of_device};

/// A message that waits, or a notice `deleted_messages` (its `message.total_deleted` is not 0).
#[derive(Clone, PartialEq, Message)]
pub struct MailboxRow {
    /// What the device is to see.
    #[prost(message, required, tag = "1")]
    pub message: queue::Message,
    /// The project: sender id of the key that sent.
    #[prost(string, tag = "2")]
    pub sender: String,
    /// Shard time from which on it is not delivered, milliseconds since 1970.
    #[prost(uint64, tag = "3")]
    pub expiry_ms: u64,
    /// What the app server calls the message, for receipts; empty when it is the message id.
    #[prost(string, tag = "4")]
    pub client_message_id: String,
    /// The token the app server addressed, for receipts.
    #[prost(string, tag = "5")]
    pub addressed_token: String,
    /// Term of the log entry that brought it; its index is in the key.
    #[prost(uint64, tag = "6")]
    pub term: u64,
}

impl MailboxRow {
    /// Message id, also the persistent id.
    #[must_use]
    pub fn message_id(&self) -> MessageId {
        MessageId::from_bytes(&self.message.message_id).expect("checked when the row was made or read")
    }

    /// The registration it is delivered for; of a notice one of those whose messages were dropped.
    #[must_use]
    pub fn registration_id(&self) -> RegistrationId {
        let bytes = <[u8; 16]>::try_from(&self.message.registration_id[..]);
        RegistrationId(bytes.expect("checked when the row was made or read"))
    }

    /// Time to live that is left at shard time `now_ms`, milliseconds; 0: it is not delivered any more.
    #[must_use]
    pub fn remaining_ms(&self, now_ms: u64) -> u64 {
        self.expiry_ms.saturating_sub(now_ms)
    }

    /// Whether it is a notice `deleted_messages`.
    #[must_use]
    pub fn is_notice(&self) -> bool {
        self.message.total_deleted > 0
    }
}

/// The key of one message.
#[must_use]
pub fn key(device: DeviceTag, sequence: Sequence) -> Bytes {
    let mut key = prefix(device);
    key.extend_from_slice(&sequence.to_bytes());
    key.into()
}

/// The rows of a device are those with `range.0 <= key < range.1`; with `after`, those above it.
#[must_use]
pub fn range(device: DeviceTag, after: Option<Sequence>) -> (Bytes, Bytes) {
    let prefix = prefix(device);
    let end = after_prefix(&prefix);
    let start = after.map_or_else(|| prefix.into(), |after| after_prefix(&key(device, after)));
    (start, end)
}

fn prefix(device: DeviceTag) -> Vec<u8> {
    of_device(Family::Mailbox, device, 16)
}

/// Reads a key.
#[must_use]
pub fn decode_key(key: &[u8]) -> Option<(DeviceTag, Sequence)> {
    let (device, rest) = device_body(Family::Mailbox, key)?;
    Some((device, Sequence::from_bytes(rest)?))
}

/// The value.
#[must_use]
pub fn encode(row: &MailboxRow) -> Bytes {
    row.encode_to_vec().into()
}

/// Reads the value found under `key`.
///
/// # Errors
/// When it is not a [`MailboxRow`].
pub fn decode(key: &[u8], value: Bytes) -> Result<MailboxRow, BadRow> {
    let row = MailboxRow::decode(value).map_err(|_| BadRow::new(Family::Mailbox, "not protocol buffers", key))?;
    if row.message.message_id.len() != 16 || row.message.registration_id.len() != 16 {
        return Err(BadRow::new(Family::Mailbox, "an id is not 16 bytes", key));
    }
    Ok(row)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn sequence((incarnation, index, position): (u32, u64, u32)) -> Sequence {
        Sequence { incarnation, index, position }
    }

    proptest! {
        #[test]
        fn round_trips_and_sorts_by_device_then_sequence(a: (u64, (u32, u64, u32)), b: (u64, (u32, u64, u32))) {
            let encode = |(device, at): (u64, (u32, u64, u32))| key(DeviceTag(device), sequence(at));
            prop_assert_eq!(decode_key(&encode(a)), Some((DeviceTag(a.0), sequence(a.1))));
            prop_assert_eq!(encode(a).cmp(&encode(b)), a.cmp(&b));
        }

        #[test]
        fn a_range_holds_the_device_above_the_mark(device: u64, mark: (u32, u64, u32), other: (u64, (u32, u64, u32))) {
            let (from, to) = range(DeviceTag(device), Some(sequence(mark)));
            let key = key(DeviceTag(other.0), sequence(other.1));
            prop_assert_eq!(from <= key && key < to, other.0 == device && other.1 > mark);
        }

        #[test]
        fn a_value_round_trips_and_any_bytes_answer(sender: String, expiry_ms: u64, payload: Vec<u8>, junk: Vec<u8>) {
            let message = queue::Message {
                message_id: Bytes::from_static(&[1; 16]),
                registration_id: Bytes::from_static(&[2; 16]),
                payload: payload.into(),
                ..Default::default()
            };
            let row = MailboxRow { message, sender, expiry_ms, ..Default::default() };
            prop_assert_eq!(decode(&[], encode(&row)), Ok(row));
            let _ = decode(&[], junk.into());
        }
    }

    #[test]
    fn a_payload_is_not_copied_when_a_row_is_read() {
        let message = queue::Message {
            message_id: Bytes::from_static(&[1; 16]),
            registration_id: Bytes::from_static(&[2; 16]),
            payload: vec![7; 4096].into(),
            ..Default::default()
        };
        let value = encode(&MailboxRow { message, ..Default::default() });
        let row = decode(&[], value.clone()).unwrap();
        assert!(value.as_ptr_range().contains(&row.message.payload.as_ptr()));
    }
}

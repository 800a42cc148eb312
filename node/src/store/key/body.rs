//! Key family `Body` (0x0d): what all mailbox rows of one publish share in this shard. Key: `tag | publish id 16 | part u8`: part 0
//! is the body, [`BodyRow`], protocol buffers, written once; part 1 is how many hold it, u32: its mailbox rows, and the fan-out
//! until it is through. Both go with the last hold.

use bytes::Bytes;
use prost::Message;

use super::{BadRow, Family};

/// Names a body: the publish's operation id.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BodyId(pub [u8; 16]);

impl BodyId {
    /// Of 16 bytes.
    #[must_use]
    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        bytes.try_into().ok().map(Self)
    }
}

/// What is shared.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct BodyRow {
    /// `from` of the stanza.
    #[prost(string, tag = "1")]
    pub wire_from: String,
    /// An encoded `queue.Payload`.
    #[prost(bytes = "bytes", tag = "2")]
    pub payload: Bytes,
}

/// The key of the body.
#[must_use]
pub fn key(id: BodyId) -> Bytes {
    [&[Family::Body.tag()][..], &id.0, &[0]].concat().into()
}

/// The key of how many hold it.
#[must_use]
pub fn holds_key(id: BodyId) -> Bytes {
    [&[Family::Body.tag()][..], &id.0, &[1]].concat().into()
}

/// The value.
#[must_use]
pub fn encode(row: &BodyRow) -> Bytes {
    row.encode_to_vec().into()
}

/// Reads the value found under `key`.
///
/// # Errors
/// When it is not a [`BodyRow`].
pub fn decode(key: &[u8], value: Bytes) -> Result<BodyRow, BadRow> {
    BodyRow::decode(value).map_err(|_| BadRow::new(Family::Body, "not protocol buffers", key))
}

/// How many hold it.
#[must_use]
pub fn encode_holds(holds: u32) -> Bytes {
    Bytes::copy_from_slice(&holds.to_be_bytes())
}

/// Reads the number found under `key`.
///
/// # Errors
/// When it is none.
pub fn decode_holds(key: &[u8], value: &[u8]) -> Result<u32, BadRow> {
    value.try_into().map(u32::from_be_bytes).map_err(|_| BadRow::new(Family::Body, "not 4 bytes", key))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn values_round_trip_and_any_bytes_answer(wire_from: String, payload: Vec<u8>, holds: u32, junk: Vec<u8>) {
            let row = BodyRow { wire_from, payload: payload.into() };
            prop_assert_eq!(decode(&[], encode(&row)), Ok(row));
            prop_assert_eq!(decode_holds(&[], &encode_holds(holds)), Ok(holds));
            let _ = (decode_holds(&[], &junk), decode(&[], junk.into()));
        }

        #[test]
        fn the_parts_of_a_body_lie_side_by_side(a: [u8; 16], b: [u8; 16]) {
            prop_assert!(key(BodyId(a)) < holds_key(BodyId(a)));
            prop_assert_eq!(key(BodyId(a)).cmp(&key(BodyId(b))), a.cmp(&b));
        }
    }
}

//! Key family `Expiry` (0x05): when a message runs out. Key: `tag | expiry ms u64 | device tag u64 | sequence 16`, 33 bytes,
//! earliest first. Never written twice. Value: empty.

use bytes::Bytes;
use martlet_proto::{message::Sequence, tag::DeviceTag};

use super::{Family, body, take};

/// The key of one message.
#[must_use]
pub fn key(expiry_ms: u64, device: DeviceTag, sequence: Sequence) -> Bytes {
    let mut key = Vec::with_capacity(33);
    key.push(Family::Expiry.tag());
    key.extend_from_slice(&expiry_ms.to_be_bytes());
    key.extend_from_slice(&device.0.to_be_bytes());
    key.extend_from_slice(&sequence.to_bytes());
    key.into()
}

/// Rows that ran out at or before `upto_ms` are those with `range.0 <= key < range.1`.
#[must_use]
pub fn range(upto_ms: u64) -> (Bytes, Bytes) {
    let (from, to) = Family::Expiry.range();
    let to = upto_ms
        .checked_add(1)
        .map_or_else(|| Bytes::copy_from_slice(&to), |next| [&from[..], &next.to_be_bytes()].concat().into());
    (Bytes::copy_from_slice(&from), to)
}

/// Reads a key.
#[must_use]
pub fn decode_key(key: &[u8]) -> Option<(u64, DeviceTag, Sequence)> {
    let mut rest = body(Family::Expiry, key)?;
    let expiry_ms = u64::from_be_bytes(take(&mut rest)?);
    let device = DeviceTag(u64::from_be_bytes(take(&mut rest)?));
    Some((expiry_ms, device, Sequence::from_bytes(rest)?))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    type Parts = (u64, u64, (u32, u64, u32));

    fn encode((expiry_ms, device, (incarnation, index, position)): Parts) -> Bytes {
        key(expiry_ms, DeviceTag(device), Sequence { incarnation, index, position })
    }

    proptest! {
        #[test]
        fn round_trips_and_sorts_by_time(a: Parts, b: Parts) {
            let (incarnation, index, position) = a.2;
            let back = Some((a.0, DeviceTag(a.1), Sequence { incarnation, index, position }));
            prop_assert_eq!(decode_key(&encode(a)), back);
            prop_assert_eq!(encode(a).cmp(&encode(b)), a.cmp(&b));
        }

        #[test]
        fn a_range_ends_with_its_moment(a: Parts, upto_ms: u64) {
            let (from, to) = range(upto_ms);
            let key = encode(a);
            prop_assert_eq!(from <= key && key < to, a.0 <= upto_ms);
        }
    }
}

//! Key family `Lapse` (0x06): when a registration runs out, by its own life or because it was superseded long ago. Key:
//! `tag | due ms u64 | device tag u64 | registration id 16`, 33 bytes, earliest first. Value: empty.

use bytes::Bytes;
use martlet_proto::{tag::DeviceTag, token::RegistrationId};

use super::{Family, body, take};

/// The key of one registration.
#[must_use]
pub fn key(due_ms: u64, device: DeviceTag, id: RegistrationId) -> Bytes {
    let mut key = Vec::with_capacity(33);
    key.push(Family::Lapse.tag());
    key.extend_from_slice(&due_ms.to_be_bytes());
    key.extend_from_slice(&device.0.to_be_bytes());
    key.extend_from_slice(&id.0);
    key.into()
}

/// Rows that are due at or before `upto_ms` are those with `range.0 <= key < range.1`.
#[must_use]
pub fn range(upto_ms: u64) -> (Bytes, Bytes) {
    let (from, to) = Family::Lapse.range();
    let to = upto_ms
        .checked_add(1)
        .map_or_else(|| Bytes::copy_from_slice(&to), |next| [&from[..], &next.to_be_bytes()].concat().into());
    (Bytes::copy_from_slice(&from), to)
}

/// Reads a key.
#[must_use]
pub fn decode_key(key: &[u8]) -> Option<(u64, DeviceTag, RegistrationId)> {
    let mut rest = body(Family::Lapse, key)?;
    let due_ms = u64::from_be_bytes(take(&mut rest)?);
    let device = DeviceTag(u64::from_be_bytes(take(&mut rest)?));
    let id = RegistrationId(take(&mut rest)?);
    rest.is_empty().then_some((due_ms, device, id))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    type Parts = (u64, u64, [u8; 16]);

    fn encode((due_ms, device, id): Parts) -> Bytes {
        key(due_ms, DeviceTag(device), RegistrationId(id))
    }

    proptest! {
        #[test]
        fn round_trips_and_sorts_by_time(a: Parts, b: Parts) {
            let (due_ms, device, id) = decode_key(&encode(a)).unwrap();
            prop_assert_eq!((due_ms, device.0, id.0), a);
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

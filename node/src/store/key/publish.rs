//! Key family `Publish` (0x0c): messages for topics on their way. Key: `tag | role u8`, then by role:
//!
//! | role | key goes on | value | what |
//! | --- | --- | --- | --- |
//! | 0 | `place 16` | [`HomeRow`] | at home: not yet known to be in every shard |
//! | 1 | `home u16 | place 16` | [`FanOutRow`] | in a shard that has subscribers: up to where it was fanned out |
//! | 2 | `home u16 | place 16` | empty | the fan-outs of role 1 that are not through |
//! | 3 | `home u16` | a place, 16 bytes | publishes of that home before it are over everywhere |
//!
//! A place is a sequence of the home shard, so that publishes of one home lie in their order. Values are protocol buffers.

use bytes::Bytes;
use martlet_proto::{cluster::queue, message::Sequence, tag::DeviceTag, token::RegistrationId};
use prost::Message;

use super::{BadRow, Family, body, subscription::Subscriber, take};

const HOME: u8 = 0;
const FAN_OUT: u8 = 1;
const UNDER_WAY: u8 = 2;
const OVER: u8 = 3;

/// A publish at home.
#[derive(Clone, PartialEq, Message)]
pub struct HomeRow {
    /// Operation id of the publish, 16 bytes.
    #[prost(bytes = "bytes", tag = "1")]
    pub publish_id: Bytes,
    /// Shard time from which on nobody is to get it, milliseconds since 1970.
    #[prost(uint64, tag = "2")]
    pub expiry_ms: u64,
    /// The message.
    #[prost(message, required, tag = "3")]
    pub publish: queue::Publish,
}

/// A publish in a shard.
#[derive(Clone, PartialEq, Message)]
pub struct FanOutRow {
    /// Operation id of the publish, 16 bytes: also names the body.
    #[prost(bytes = "bytes", tag = "1")]
    pub publish_id: Bytes,
    /// Shard time from which on nobody is to get it, milliseconds since 1970.
    #[prost(uint64, tag = "2")]
    pub expiry_ms: u64,
    /// The message without `payload` and `wire_from`, which are in the body. Empty once it is through.
    #[prost(message, optional, tag = "3")]
    pub publish: Option<queue::Publish>,
    /// Device tag and registration id of the last who was looked at, 24 bytes; empty: nobody yet.
    #[prost(bytes = "bytes", tag = "4")]
    pub cursor: Bytes,
}

impl FanOutRow {
    /// The last subscriber who was looked at.
    #[must_use]
    pub fn cursor(&self) -> Option<Subscriber> {
        let (device, id) = self.cursor.split_first_chunk::<8>()?;
        Some((DeviceTag(u64::from_be_bytes(*device)), RegistrationId(id.try_into().ok()?)))
    }
}

/// A cursor as it is stored.
#[must_use]
pub fn encode_cursor((device, id): Subscriber) -> Bytes {
    [&device.0.to_be_bytes()[..], &id.0].concat().into()
}

/// A publish in another shard: its home and its place there.
pub type Origin = (u16, Sequence);

/// The key at home.
#[must_use]
pub fn home_key(place: Sequence) -> Bytes {
    [&[Family::Publish.tag(), HOME][..], &place.to_bytes()].concat().into()
}

/// Publishes at home from `from` on, in their order, are the rows with `range.0 <= key < range.1`.
#[must_use]
pub fn home_range(from: Option<Sequence>) -> (Bytes, Bytes) {
    let (first, end) = of_role(HOME);
    (from.map_or(first, home_key), end)
}

/// Reads a key at home.
#[must_use]
pub fn decode_home_key(key: &[u8]) -> Option<Sequence> {
    Sequence::from_bytes(body(Family::Publish, key)?.strip_prefix(&[HOME])?)
}

/// The key in a shard that has subscribers.
#[must_use]
pub fn fan_out_key(origin: Origin) -> Bytes {
    of_origin(FAN_OUT, origin)
}

/// Fan-outs of one home below `place` are the rows with `range.0 <= key < range.1`.
#[must_use]
pub fn fan_out_range(home: u16, place: Sequence) -> (Bytes, Bytes) {
    let start = [&[Family::Publish.tag(), FAN_OUT][..], &home.to_be_bytes()].concat();
    (start.into(), fan_out_key((home, place)))
}

/// The key that says that a fan-out is not through.
#[must_use]
pub fn under_way_key(origin: Origin) -> Bytes {
    of_origin(UNDER_WAY, origin)
}

/// All that are not through are the rows with `range.0 <= key < range.1`.
#[must_use]
pub fn under_way_range() -> (Bytes, Bytes) {
    of_role(UNDER_WAY)
}

/// Reads a key that says that a fan-out is not through.
#[must_use]
pub fn decode_under_way_key(key: &[u8]) -> Option<Origin> {
    let mut rest = body(Family::Publish, key)?.strip_prefix(&[UNDER_WAY])?;
    let home = u16::from_be_bytes(take(&mut rest)?);
    Some((home, Sequence::from_bytes(rest)?))
}

/// The key of the place before which a home's publishes are over.
#[must_use]
pub fn over_key(home: u16) -> Bytes {
    [&[Family::Publish.tag(), OVER][..], &home.to_be_bytes()].concat().into()
}

/// Reads the place found under `key`.
///
/// # Errors
/// When it is none.
pub fn decode_over(key: &[u8], value: &[u8]) -> Result<Sequence, BadRow> {
    Sequence::from_bytes(value).ok_or_else(|| BadRow::new(Family::Publish, "not a sequence", key))
}

fn of_role(role: u8) -> (Bytes, Bytes) {
    let at = |role| Bytes::copy_from_slice(&[Family::Publish.tag(), role]);
    (at(role), at(role + 1))
}

fn of_origin(role: u8, (home, place): Origin) -> Bytes {
    [&[Family::Publish.tag(), role][..], &home.to_be_bytes(), &place.to_bytes()].concat().into()
}

/// Reads the value found under a home key.
///
/// # Errors
/// When it is not a [`HomeRow`].
pub fn decode_home(key: &[u8], value: Bytes) -> Result<HomeRow, BadRow> {
    let row = HomeRow::decode(value).map_err(|_| BadRow::new(Family::Publish, "not protocol buffers", key))?;
    if row.publish_id.len() == 16 { Ok(row) } else { Err(BadRow::new(Family::Publish, "an id is not 16 bytes", key)) }
}

/// Reads the value found under a fan-out's key.
///
/// # Errors
/// When it is not a [`FanOutRow`].
pub fn decode_fan_out(key: &[u8], value: Bytes) -> Result<FanOutRow, BadRow> {
    let row = FanOutRow::decode(value).map_err(|_| BadRow::new(Family::Publish, "not protocol buffers", key))?;
    if row.publish_id.len() == 16 && matches!(row.cursor.len(), 0 | 24) {
        Ok(row)
    } else {
        Err(BadRow::new(Family::Publish, "an id or the cursor has not its length", key))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    type Parts = (u16, (u32, u64, u32));

    fn origin((home, (incarnation, index, position)): Parts) -> Origin {
        (home, Sequence { incarnation, index, position })
    }

    proptest! {
        #[test]
        fn keys_round_trip_and_lie_in_the_order_of_their_home(a: Parts, b: Parts) {
            let (one, other) = (origin(a), origin(b));
            prop_assert_eq!(decode_home_key(&home_key(one.1)), Some(one.1));
            prop_assert_eq!(home_key(one.1).cmp(&home_key(other.1)), a.1.cmp(&b.1));
            prop_assert_eq!(decode_under_way_key(&under_way_key(one)), Some(one));
            prop_assert_eq!(fan_out_key(one).cmp(&fan_out_key(other)), a.cmp(&b));
            let (from, to) = fan_out_range(other.0, other.1);
            prop_assert_eq!(from <= fan_out_key(one) && fan_out_key(one) < to, a.0 == b.0 && a.1 < b.1);
            let (from, to) = home_range(Some(other.1));
            prop_assert_eq!(from <= home_key(one.1) && home_key(one.1) < to, a.1 >= b.1);
            let (from, to) = under_way_range();
            prop_assert!(from <= under_way_key(one) && under_way_key(one) < to && fan_out_key(one) < from);
        }

        #[test]
        fn values_round_trip_and_any_bytes_answer(id: [u8; 16], expiry_ms: u64, who: (u64, [u8; 16]), junk: Vec<u8>) {
            let publish_id = Bytes::copy_from_slice(&id);
            let publish = queue::Publish { sender: "7".to_owned(), ..Default::default() };
            let home = HomeRow { publish_id: publish_id.clone(), expiry_ms, publish: publish.clone() };
            prop_assert_eq!(decode_home(&[], home.encode_to_vec().into()), Ok(home));
            let who = (DeviceTag(who.0), RegistrationId(who.1));
            let row = FanOutRow { publish_id, expiry_ms, publish: Some(publish), cursor: encode_cursor(who) };
            prop_assert_eq!(row.cursor(), Some(who));
            prop_assert_eq!(decode_fan_out(&[], row.encode_to_vec().into()), Ok(row));
            let _ = (decode_home_key(&junk), decode_under_way_key(&junk), decode_over(&[], &junk));
            let _ = (decode_home(&[], junk.clone().into()), decode_fan_out(&[], junk.into()));
        }
    }
}

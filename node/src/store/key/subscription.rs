//! Key families of topics. `Subscription` (0x0a): who subscribes to a topic. Key: `tag | topic id 16 | device tag u64 | registration
//! id 16`, 41 bytes, so that a fan-out walks a topic in the order of its devices. Value: when it was added, milliseconds since 1970,
//! u64. `Subscribed` (0x0b): the same by device. Key: `tag | device tag u64 | registration id 16 | topic id 16`. Value:
//! [`SubscribedRow`], protocol buffers. `Subscriptions` (0x0e): how many topics a registration has. Key: `tag | device tag u64 |
//! registration id 16`. Value: u32; no row is none.

use bytes::Bytes;
use martlet_proto::{tag::DeviceTag, token::RegistrationId, topic::TopicId};
use prost::Message;

use super::{BadRow, Family, after_prefix, body, take};

/// A topic of a registration.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct SubscribedRow {
    /// Whose topic: a sender id.
    #[prost(string, tag = "1")]
    pub sender: String,
    /// Without `/topics/`.
    #[prost(string, tag = "2")]
    pub topic: String,
    /// Shard time when it was added, milliseconds since 1970.
    #[prost(uint64, tag = "3")]
    pub added_ms: u64,
}

/// One who subscribes.
pub type Subscriber = (DeviceTag, RegistrationId);

/// The key of one subscription in its topic.
#[must_use]
pub fn key(topic: TopicId, (device, id): Subscriber) -> Bytes {
    [&[Family::Subscription.tag()][..], &topic.0, &device.0.to_be_bytes(), &id.0].concat().into()
}

/// The subscriptions of a topic, those above `after`, are the rows with `range.0 <= key < range.1`.
#[must_use]
pub fn range(topic: TopicId, after: Option<Subscriber>) -> (Bytes, Bytes) {
    let prefix = [&[Family::Subscription.tag()][..], &topic.0].concat();
    let end = after_prefix(&prefix);
    let start = after.map_or_else(|| prefix.into(), |after| after_prefix(&key(topic, after)));
    (start, end)
}

/// Reads a key of the topic's order.
#[must_use]
pub fn decode_key(key: &[u8]) -> Option<(TopicId, Subscriber)> {
    let mut rest = body(Family::Subscription, key)?;
    let topic = TopicId(take(&mut rest)?);
    Some((topic, subscriber(&mut rest).filter(|_| rest.is_empty())?))
}

/// The key of one subscription in its device.
#[must_use]
pub fn device_key((device, id): Subscriber, topic: TopicId) -> Bytes {
    [&[Family::Subscribed.tag()][..], &device.0.to_be_bytes(), &id.0, &topic.0].concat().into()
}

/// The topics of a registration are the rows with `range.0 <= key < range.1`.
#[must_use]
pub fn device_range((device, id): Subscriber) -> (Bytes, Bytes) {
    let prefix = [&[Family::Subscribed.tag()][..], &device.0.to_be_bytes(), &id.0].concat();
    let end = after_prefix(&prefix);
    (prefix.into(), end)
}

/// Reads a key of the device's order.
#[must_use]
pub fn decode_device_key(key: &[u8]) -> Option<(Subscriber, TopicId)> {
    let mut rest = body(Family::Subscribed, key)?;
    let subscriber = subscriber(&mut rest)?;
    let topic = TopicId(take(&mut rest)?);
    rest.is_empty().then_some((subscriber, topic))
}

/// The key of the number of topics of a registration.
#[must_use]
pub fn count_key((device, id): Subscriber) -> Bytes {
    [&[Family::Subscriptions.tag()][..], &device.0.to_be_bytes(), &id.0].concat().into()
}

/// A number of topics.
#[must_use]
pub fn encode_count(count: u32) -> Bytes {
    Bytes::copy_from_slice(&count.to_be_bytes())
}

/// Reads the number found under `key`.
///
/// # Errors
/// When it is none.
pub fn decode_count(key: &[u8], value: &[u8]) -> Result<u32, BadRow> {
    let count = value.try_into().map(u32::from_be_bytes);
    count.map_err(|_| BadRow::new(Family::Subscriptions, "not 4 bytes", key))
}

/// When one subscription was added.
#[must_use]
pub fn encode_added(added_ms: u64) -> Bytes {
    Bytes::copy_from_slice(&added_ms.to_be_bytes())
}

/// The value in the device's order.
#[must_use]
pub fn encode(row: &SubscribedRow) -> Bytes {
    row.encode_to_vec().into()
}

/// Reads the value found under `key` in the device's order.
///
/// # Errors
/// When it is not a [`SubscribedRow`].
pub fn decode(key: &[u8], value: Bytes) -> Result<SubscribedRow, BadRow> {
    SubscribedRow::decode(value).map_err(|_| BadRow::new(Family::Subscribed, "not protocol buffers", key))
}

fn subscriber(rest: &mut &[u8]) -> Option<Subscriber> {
    Some((DeviceTag(u64::from_be_bytes(take(rest)?)), RegistrationId(take(rest)?)))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    type Parts = ([u8; 16], u64, [u8; 16]);

    proptest! {
        #[test]
        fn keys_round_trip_and_sort_by_topic_device_and_registration(a: Parts, b: Parts, mark: (u64, [u8; 16])) {
            let who = |parts: Parts| (DeviceTag(parts.1), RegistrationId(parts.2));
            let at = |parts: Parts| key(TopicId(parts.0), who(parts));
            prop_assert_eq!(decode_key(&at(a)), Some((TopicId(a.0), who(a))));
            prop_assert_eq!(at(a).cmp(&at(b)), a.cmp(&b));
            let (from, to) = range(TopicId(b.0), Some((DeviceTag(mark.0), RegistrationId(mark.1))));
            prop_assert_eq!(from <= at(a) && at(a) < to, a.0 == b.0 && (a.1, a.2) > mark);

            let by_device = |parts: Parts| device_key(who(parts), TopicId(parts.0));
            prop_assert_eq!(decode_device_key(&by_device(a)), Some((who(a), TopicId(a.0))));
            let (from, to) = device_range(who(b));
            prop_assert_eq!(from <= by_device(a) && by_device(a) < to, who(a) == who(b));
        }

        #[test]
        fn values_round_trip_and_any_bytes_answer(sender: String, topic: String, added_ms: u64, count: u32, junk: Vec<u8>) {
            let row = SubscribedRow { sender, topic, added_ms };
            prop_assert_eq!(decode(&[], encode(&row)), Ok(row));
            prop_assert_eq!(decode_count(&[], &encode_count(count)), Ok(count));
            let _ = (decode_key(&junk), decode_device_key(&junk), decode_count(&[], &junk), decode(&[], junk.into()));
        }
    }
}

//! Key family `Group` (0x0f): one device group. Key: `tag | group tag u64 | random bits of its notification key u64`, 17 bytes.
//! Value: [`GroupRow`], protocol buffers.

use bytes::Bytes;
use martlet_proto::{
    cluster::queue::GroupMember,
    group::{GroupBits, GroupTag},
};
use prost::Message;

use super::{BadRow, Family, after_prefix, body, take};

/// A device group.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct GroupRow {
    /// Whose it is.
    #[prost(string, tag = "1")]
    pub sender: String,
    /// Unique among the sender's groups.
    #[prost(string, tag = "2")]
    pub name: String,
    /// Token key its notification key is minted with.
    #[prost(uint32, tag = "3")]
    pub token_key_id: u32,
    /// Shard time when it was made, milliseconds since 1970.
    #[prost(uint64, tag = "4")]
    pub created_ms: u64,
    /// In the order in which they joined; never nobody, no registration twice.
    #[prost(message, repeated, tag = "5")]
    pub members: Vec<GroupMember>,
}

/// The key of one group.
#[must_use]
pub fn key(tag: GroupTag, bits: GroupBits) -> Bytes {
    let mut key = prefix(tag);
    key.extend_from_slice(&bits.0.to_be_bytes());
    key.into()
}

/// The groups of a tag are those with `range.0 <= key < range.1`: one, unless chance gave two names one tag.
#[must_use]
pub fn range(tag: GroupTag) -> (Bytes, Bytes) {
    let prefix = prefix(tag);
    let end = after_prefix(&prefix);
    (prefix.into(), end)
}

fn prefix(tag: GroupTag) -> Vec<u8> {
    let mut key = Vec::with_capacity(17);
    key.push(Family::Group.tag());
    key.extend_from_slice(&tag.0.to_be_bytes());
    key
}

/// Reads a key.
#[must_use]
pub fn decode_key(key: &[u8]) -> Option<(GroupTag, GroupBits)> {
    let mut rest = body(Family::Group, key)?;
    let tag = GroupTag(u64::from_be_bytes(take(&mut rest)?));
    let bits = GroupBits(u64::from_be_bytes(take(&mut rest)?));
    rest.is_empty().then_some((tag, bits))
}

/// The value.
#[must_use]
pub fn encode(row: &GroupRow) -> Bytes {
    row.encode_to_vec().into()
}

/// Reads the value found under `key`.
///
/// # Errors
/// When it is not a [`GroupRow`].
pub fn decode(key: &[u8], value: Bytes) -> Result<GroupRow, BadRow> {
    let bad = |what| BadRow::new(Family::Group, what, key);
    let row = GroupRow::decode(value).map_err(|_| bad("not protocol buffers"))?;
    if row.members.is_empty() {
        return Err(bad("a group without members"));
    }
    if row.members.iter().any(|member| member.registration_id.len() != 16) {
        return Err(bad("a member is not a registration id"));
    }
    Ok(row)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn round_trips_and_sorts_by_tag_then_bits(a: (u64, u64), b: (u64, u64)) {
            let encode = |(tag, bits): (u64, u64)| key(GroupTag(tag), GroupBits(bits));
            prop_assert_eq!(decode_key(&encode(a)), Some((GroupTag(a.0), GroupBits(a.1))));
            prop_assert_eq!(encode(a).cmp(&encode(b)), a.cmp(&b));
            let (from, to) = range(GroupTag(a.0));
            prop_assert_eq!(from <= encode(b) && encode(b) < to, a.0 == b.0);
        }

        #[test]
        fn a_value_round_trips_and_any_bytes_answer(
            name: String, created_ms: u64, ids in proptest::collection::vec((any::<u64>(), any::<[u8; 16]>()), 1..5), junk: Vec<u8>,
        ) {
            let member = |(device_tag, id): (u64, [u8; 16])| GroupMember {
                device_tag,
                registration_id: Bytes::copy_from_slice(&id),
                token_key_id: 1,
                iid: "cAAAAAAAAA1".into(),
            };
            let members = ids.into_iter().map(member).collect();
            let row = GroupRow { sender: "1".into(), name, token_key_id: 1, created_ms, members };
            prop_assert_eq!(decode(&[], encode(&row)), Ok(row));
            let _ = decode(&[], junk.into());
        }
    }

    #[test]
    fn a_group_of_nobody_or_of_something_else_is_bad() {
        let with = |members: Vec<GroupMember>| encode(&GroupRow { name: "n".into(), members, ..GroupRow::default() });
        assert!(decode(&[], with(vec![])).is_err());
        assert!(decode(&[], with(vec![GroupMember::default()])).is_err());
    }
}

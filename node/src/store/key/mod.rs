//! Key families of a shard's rows, one per file: layout in the header, encode, decode.
//!
//! Every key begins with the tag of its family, but for what is read together for one device: the device row, its registrations and
//! its mailbox begin with [`OF_DEVICE`] and the device, and the family comes behind. So they stand side by side, mostly in one leaf of
//! sled: a message for a device that nobody thought of for long costs the read of one page, and not of three. Whoever keeps the rows
//! puts the replica before the key. Integers in keys are big-endian, so that the order of the bytes is the order of the numbers. Values are protocol buffers unless a family says
//! otherwise; their fields, like the tags below, are added and never reused. Who may write which form is decided by the
//! shard's version ([`shard::ShardRow::version`]).

pub mod body;
pub mod count;
pub mod dedupe;
pub mod device;
pub mod expiry;
pub mod group;
pub mod lapse;
pub mod mailbox;
pub mod publish;
pub mod registration;
pub mod shard;
pub mod subscription;

use bytes::Bytes;
use martlet_proto::tag::DeviceTag;

/// First byte of the keys of [`Family::Device`], [`Family::Registration`] and [`Family::Mailbox`]; no other family has it as its tag.
pub const OF_DEVICE: u8 = Family::Device.tag();

/// Tag of a family: the first byte of its keys, or the one behind the device. Listed here and nowhere else; a tag that was ever
/// released is never given to another family.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
pub enum Family {
    /// [`shard`]: the shard's own row.
    Shard = 0x01,
    /// [`device`]: one per device.
    Device = 0x02,
    /// [`registration`]: one per registration.
    Registration = 0x03,
    /// [`mailbox`]: one per message that waits.
    Mailbox = 0x04,
    /// [`expiry`]: when messages run out.
    Expiry = 0x05,
    /// [`lapse`]: when registrations run out.
    Lapse = 0x06,
    /// [`dedupe`]: operation ids and what they were answered.
    Dedupe = 0x07,
    /// [`count`]: fate counters of projects.
    Count = 0x08,
    /// [`group`]: device groups.
    Group = 0x0f,
    /// [`subscription`]: who subscribes to a topic.
    Subscription = 0x0a,
    /// [`subscription`]: the same, by device.
    Subscribed = 0x0b,
    /// [`publish`]: messages for topics on their way.
    Publish = 0x0c,
    /// [`mod@body`]: what the messages of one publish share.
    Body = 0x0d,
    /// [`subscription`]: how many topics a registration has.
    Subscriptions = 0x0e,
}

impl Family {
    /// All of them, by tag.
    pub const ALL: [Self; 14] = [
        Self::Shard,
        Self::Device,
        Self::Registration,
        Self::Mailbox,
        Self::Expiry,
        Self::Lapse,
        Self::Dedupe,
        Self::Count,
        Self::Group,
        Self::Subscription,
        Self::Subscribed,
        Self::Publish,
        Self::Body,
        Self::Subscriptions,
    ];

    /// The tag.
    #[must_use]
    pub const fn tag(self) -> u8 {
        self as u8
    }

    /// The family's rows are those with `range().0 <= key < range().1`; those of a device's families have the others between them.
    #[must_use]
    pub const fn range(self) -> ([u8; 1], [u8; 1]) {
        let first = if self.is_of_device() { OF_DEVICE } else { self.tag() };
        ([first], [first + 1])
    }

    /// Whether its keys begin with the device.
    #[must_use]
    const fn is_of_device(self) -> bool {
        matches!(self, Self::Device | Self::Registration | Self::Mailbox)
    }

    /// Whether `key` is one of this family.
    #[must_use]
    pub fn is_of(self, key: &[u8]) -> bool {
        if self.is_of_device() { device_body(self, key).is_some() } else { body(self, key).is_some() }
    }
}

/// A row is not what its family says.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("bad {family:?} row: {what} (key {key:02x?})")]
pub struct BadRow {
    /// Which family was expected.
    pub family: Family,
    /// What is wrong.
    pub what: &'static str,
    /// The key as it stands.
    pub key: Vec<u8>,
}

impl BadRow {
    fn new(family: Family, what: &'static str, key: &[u8]) -> Self {
        Self { family, what, key: key.to_vec() }
    }
}

/// Takes `N` bytes from the front.
fn take<const N: usize>(bytes: &mut &[u8]) -> Option<[u8; N]> {
    let (head, rest) = bytes.split_first_chunk::<N>()?;
    *bytes = rest;
    Some(*head)
}

/// The bytes after the family's tag, or nothing when the key is another family's.
fn body(family: Family, key: &[u8]) -> Option<&[u8]> {
    key.strip_prefix(&[family.tag()])
}

/// The beginning of a key of a device's family, with room for `more` bytes.
fn of_device(family: Family, device: DeviceTag, more: usize) -> Vec<u8> {
    let mut key = Vec::with_capacity(10 + more);
    key.push(OF_DEVICE);
    key.extend_from_slice(&device.0.to_be_bytes());
    key.push(family.tag());
    key
}

/// The device and what stands behind the family's tag, or nothing when the key is another family's.
fn device_body(family: Family, key: &[u8]) -> Option<(DeviceTag, &[u8])> {
    let mut rest = key.strip_prefix(&[OF_DEVICE])?;
    let device = DeviceTag(u64::from_be_bytes(take(&mut rest)?));
    Some((device, rest.strip_prefix(&[family.tag()])?))
}

/// The smallest key above every key that begins with `prefix`. The prefix holds a byte below 255 (tags are).
fn after_prefix(prefix: &[u8]) -> Bytes {
    let mut end = prefix.to_vec();
    while let Some(last) = end.pop() {
        if last < u8::MAX {
            end.push(last + 1);
            break;
        }
    }
    end.into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_family_has_a_tag_of_its_own() {
        let tags: std::collections::BTreeSet<u8> = Family::ALL.iter().map(|family| family.tag()).collect();
        assert_eq!(tags.len(), Family::ALL.len());
        assert_eq!(tags, (0x01..=0x08).chain(0x0a..=0x0f).collect());
    }

    #[test]
    fn what_is_of_a_device_stands_side_by_side_and_is_told_apart() {
        let device = DeviceTag(7);
        let keys = [
            device::key(device),
            registration::key(device, martlet_proto::token::RegistrationId([0xff; 16])),
            mailbox::range(device, None).0,
        ];
        assert!(keys.is_sorted());
        assert!(keys.iter().all(|key| key.starts_with(&[OF_DEVICE, 0, 0, 0, 0, 0, 0, 0, 7])));
        let families = [Family::Device, Family::Registration, Family::Mailbox];
        for (family, key) in families.iter().zip(&keys) {
            assert!(families.iter().all(|other| other.is_of(key) == (other == family)));
            assert!(family.range().0[..] <= key[..] && key[..] < family.range().1[..]);
        }
    }

    #[test]
    fn the_end_of_a_prefix_is_above_all_its_keys_and_below_the_next() {
        assert_eq!(&after_prefix(&[3, 7])[..], [3, 8]);
        assert_eq!(&after_prefix(&[3, 255, 255])[..], [4]);
    }
}

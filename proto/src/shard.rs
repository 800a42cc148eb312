//! Device tag to shard: which Raft group owns a device.
//!
//! Frozen: `xxh3_64` of the tag's 8 big-endian bytes, modulo the shard count. The count is fixed when the cluster is made.

use std::fmt;

use xxhash_rust::xxh3::xxh3_64;

use crate::tag::DeviceTag;

/// Number of shards of a cluster, 1 to 256.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct ShardCount(u16);

impl ShardCount {
    /// Most shards of a cluster.
    pub const MAX: u32 = 256;

    /// A count of 1 to 256; `None` otherwise.
    pub fn new(count: u32) -> Option<Self> {
        (1..=Self::MAX).contains(&count).then(|| Self(u16::try_from(count).expect("at most 256")))
    }

    /// The count.
    pub fn get(self) -> u16 {
        self.0
    }

    /// Every shard, in ascending order.
    pub fn shards(self) -> impl Iterator<Item = Shard> {
        (0..self.0).map(Shard)
    }
}

/// One shard, counted from 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Shard(pub u16);

impl fmt::Display for Shard {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// The shard that owns a device.
pub fn shard_of(tag: DeviceTag, count: ShardCount) -> Shard {
    let shard = xxh3_64(&tag.0.to_be_bytes()) % u64::from(count.0);
    Shard(u16::try_from(shard).expect("below the count, which is at most 256"))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_count_is_1_to_256() {
        assert_eq!(ShardCount::new(0), None);
        assert_eq!(ShardCount::new(1).map(ShardCount::get), Some(1));
        assert_eq!(ShardCount::new(256).map(ShardCount::get), Some(256));
        assert_eq!(ShardCount::new(257), None);
    }

    proptest! {
        #[test]
        fn a_shard_is_below_the_count(tag: u64, count in 1u32..=256) {
            let count = ShardCount::new(count).unwrap();
            prop_assert!(shard_of(DeviceTag(tag), count).0 < count.get());
        }
    }
}

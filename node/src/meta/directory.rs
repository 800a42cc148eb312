//! Where the replicas of shards live, as the newest meta state on this node says.

use std::sync::Arc;

use martlet_proto::{
    cluster::meta::{MetaState, ShardReplicas},
    shard::Shard,
};
use tokio::sync::watch;

use crate::shard::Directory;

/// The shard map, followed.
#[derive(Debug)]
pub struct Followed(watch::Receiver<Arc<MetaState>>);

impl Followed {
    /// Follows what is kept.
    pub fn new(kept: watch::Receiver<Arc<MetaState>>) -> Self {
        Self(kept)
    }

    fn of<T>(&self, shard: Shard, read: impl FnOnce(&ShardReplicas) -> T) -> Option<T> {
        let state = self.0.borrow();
        // Shards are listed in their order, from 0.
        state.shards.get(usize::from(shard.0)).map(read)
    }
}

impl Directory for Followed {
    fn node_of(&self, shard: Shard, replica: u64) -> Option<u64> {
        let node = |of: &ShardReplicas| of.replicas.iter().find(|other| other.replica_id == replica).map(|r| r.node_id);
        self.of(shard, node).flatten()
    }

    fn epoch(&self, shard: Shard) -> u64 {
        self.of(shard, |of| of.epoch).unwrap_or(0)
    }

    fn shards(&self) -> u16 {
        u16::try_from(self.0.borrow().shards.len()).unwrap_or(u16::MAX)
    }

    fn nodes_of(&self, shard: Shard) -> Vec<u64> {
        self.of(shard, |of| of.replicas.iter().map(|replica| replica.node_id).collect()).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use martlet_proto::cluster::meta::Replica;

    use super::*;

    #[test]
    fn replicas_are_found_in_their_shard_only() {
        let shard = |shard, replica_id| ShardReplicas {
            shard,
            epoch: 1 + u64::from(shard),
            replicas: vec![Replica { node_id: 7, replica_id }],
        };
        let state = MetaState { shards: vec![shard(0, 4), shard(1, 5)], ..MetaState::default() };
        let followed = Followed::new(watch::channel(Arc::new(state)).1);
        assert_eq!(followed.node_of(Shard(1), 5), Some(7));
        assert_eq!(followed.node_of(Shard(1), 4), None);
        assert_eq!(followed.node_of(Shard(2), 5), None);
        assert_eq!((followed.epoch(Shard(1)), followed.epoch(Shard(9))), (2, 0));
    }
}

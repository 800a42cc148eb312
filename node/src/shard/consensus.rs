//! What a shard needs of its Raft group: the seam at which tests put a group that answers at once, late, or never.

use std::fmt;

use bytes::Bytes;
use futures::future::BoxFuture;
use tokio::sync::watch;

use crate::raft::{Group, Leadership, ProposeError, ReadError, Reply};

/// A Raft group as its shard sees it.
pub trait Consensus: Send + Sync + fmt::Debug + 'static {
    /// Proposes an entry and waits until it is applied here. The entry's place in the log is behind those of all proposals whose
    /// futures were polled before this one.
    fn propose(&self, entry: Bytes) -> BoxFuture<'static, Result<Reply, ProposeError>>;
    /// Who leads, and every change of it.
    fn leadership(&self) -> watch::Receiver<Leadership>;
    /// Confirms with a quorum that this replica leads, and waits until what was committed before is applied.
    fn read_barrier(&self) -> BoxFuture<'static, Result<(), ReadError>>;
    /// Whether no other replica can lead at this moment.
    fn lease_valid(&self) -> bool;
    /// Shard time as another replica knows it, if one that answers does; milliseconds since 1970.
    fn time_of_others_ms(&self) -> BoxFuture<'static, Option<u64>>;
    /// What the wall clocks of the other replicas' nodes say, as far as they were heard lately; milliseconds since 1970.
    fn peer_clocks_ms(&self) -> Vec<u64>;
    /// The highest state version that every replica announces at this moment; `None` while one of them is not heard.
    fn state_version_announced(&self) -> Option<u32>;
}

impl Consensus for Group {
    fn propose(&self, entry: Bytes) -> BoxFuture<'static, Result<Reply, ProposeError>> {
        let group = self.clone();
        Box::pin(async move { group.propose(entry).await })
    }

    fn leadership(&self) -> watch::Receiver<Leadership> {
        Group::leadership(self)
    }

    fn read_barrier(&self) -> BoxFuture<'static, Result<(), ReadError>> {
        let group = self.clone();
        Box::pin(async move { group.read_barrier().await.map(|_| ()) })
    }

    fn lease_valid(&self) -> bool {
        Group::lease_valid(self)
    }

    fn time_of_others_ms(&self) -> BoxFuture<'static, Option<u64>> {
        let group = self.clone();
        Box::pin(async move { group.time_of_others_ms().await })
    }

    fn peer_clocks_ms(&self) -> Vec<u64> {
        Group::peer_clocks_ms(self)
    }

    fn state_version_announced(&self) -> Option<u32> {
        Group::state_version_announced(self)
    }
}

//! How operators' questions reach rows: those of other nodes by asking them, those here off the runtime.
//!
//! Owns the patience with other nodes and the thread that reads; leaves the questions to their services. Nothing is passed on twice: what
//! one node asks another is marked `here`.

use std::time::Duration;

use futures::future::join_all;
use martlet_proto::{
    cluster::{
        admin::admin_client::AdminClient,
        meta::{MetaState, Node},
    },
    shard::ShardCount,
};
use tokio::time::timeout;
use tonic::{Status, transport::Channel};

use super::admin::AdminService;
use crate::state::StateError;

/// Longest another node is waited for that looks through all rows of a kind that it leads.
pub(super) const SEARCH_MAX: Duration = Duration::from_secs(40);

impl AdminService {
    /// Asks all of `nodes` but this one; what they replied, and who did not.
    pub(super) async fn ask_all<T, F>(
        &self,
        nodes: &[Node],
        longest: Duration,
        ask: impl Fn(AdminClient<Channel>) -> F,
    ) -> (Vec<T>, Vec<u64>)
    where
        F: Future<Output = Result<T, Status>>,
    {
        let own = self.parts.config.node.id;
        let calls = nodes.iter().filter(|node| node.node_id != own).map(|node| {
            let call = ask(self.parts.peers.admin(node));
            async move { (node.node_id, timeout(longest, call).await) }
        });
        let (mut replies, mut silent) = (Vec::new(), Vec::new());
        for (node, outcome) in join_all(calls).await {
            match outcome {
                Ok(Ok(reply)) => replies.push(reply),
                Ok(Err(_)) | Err(_) => silent.push(node),
            }
        }
        (replies, silent)
    }
}

/// Reads rows, which may come from the disk, on a thread that may block.
pub(super) async fn off_the_runtime<T: Send + 'static>(
    read: impl FnOnce() -> Result<T, StateError> + Send + 'static,
) -> Result<T, Status> {
    let read = tokio::task::spawn_blocking(read).await.map_err(|error| Status::internal(error.to_string()))?;
    read.map_err(|error| Status::internal(format!("rows cannot be read: {error}")))
}

/// How many shards the cluster has.
pub(super) fn shards_of(state: &MetaState) -> Result<ShardCount, Status> {
    ShardCount::new(state.shard_count).ok_or_else(|| Status::failed_precondition("this cluster has no shards yet"))
}

//! Batches to other nodes, over the stream that gateways submit on.
//!
//! Owns one call: it is opened, the batches are sent, their answers read, and it ends. Who leads what is the caller's to know.

use std::sync::Arc;

use futures::{FutureExt as _, future::BoxFuture, stream};
use martlet_proto::cluster::{
    meta::MetaState,
    queue::{Batch, BatchReply, SubmitRequest},
};
use tokio::sync::watch;

use super::peers::Peers;
use crate::shard::Courier;

/// Reaches the nodes that the meta state names.
#[derive(Debug)]
pub struct Carrier {
    peers: Peers,
    kept: watch::Receiver<Arc<MetaState>>,
}

impl Carrier {
    /// Over these channels.
    pub fn new(peers: Peers, kept: watch::Receiver<Arc<MetaState>>) -> Self {
        Self { peers, kept }
    }
}

impl Courier for Carrier {
    fn submit(&self, node: u64, batches: Vec<Batch>) -> BoxFuture<'static, Result<Vec<BatchReply>, String>> {
        let found = self.kept.borrow().nodes.iter().find(|known| known.node_id == node).cloned();
        let client = found.map(|node| self.peers.queue(&node));
        async move {
            let mut client = client.ok_or_else(|| format!("node {node} is not known here"))?;
            let wanted = batches.len();
            let requests = batches.into_iter().map(|batch| SubmitRequest { batches: vec![batch] });
            let requests: Vec<SubmitRequest> = requests.collect();
            let answer = client.submit(stream::iter(requests)).await.map_err(|status| status.to_string())?;
            let (mut stream, mut replies) = (answer.into_inner(), Vec::with_capacity(wanted));
            while replies.len() < wanted
                && let Some(reply) = stream.message().await.map_err(|status| status.to_string())?
            {
                replies.extend(reply.replies);
            }
            Ok(replies)
        }
        .boxed()
    }
}

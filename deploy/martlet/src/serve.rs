//! A serving process: a node, a gateway, or both, with health endpoints beside them.
//!
//! Owns the order at the end: the gateway drains first, then the node it relies on, then the health endpoints, which tell of
//! both. A part that ends by itself ends the process.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use anyhow::{Context as _, Result};
use martlet_gateway::Gateway;
use martlet_node::Node;
use prometheus_client::registry::Registry;
use tokio::task::JoinHandle;
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use crate::{
    config::{Config, ProcessConfig},
    ops::{self, Check, Ops},
    shutdown, telemetry,
};

/// Runs the role `node`.
///
/// # Errors
/// Why it did not start, or could not go on.
pub(crate) async fn node(config: Config) -> Result<()> {
    let telemetry = telemetry::install(&config.process.telemetry, "node")?;
    shutdown::raise_descriptor_limit();
    let drain = shutdown::on_signal()?;
    let node = Node::start(config.node).await.context("start the node")?;
    let mut parts = Parts::default();
    parts.add_node(node);
    parts.open_ops(&config.process, &drain).await?;
    let result = parts.run(drain).await;
    telemetry.flush();
    result
}

/// Runs the role `gateway`.
///
/// # Errors
/// As [`node`].
pub(crate) async fn gateway(config: Config) -> Result<()> {
    let telemetry = telemetry::install(&config.process.telemetry, "gateway")?;
    shutdown::raise_descriptor_limit();
    let drain = shutdown::on_signal()?;
    let gateway = Gateway::start(config.gateway).await.context("start the gateway")?;
    let mut parts = Parts::default();
    parts.add_gateway(gateway);
    parts.open_ops(&config.process, &drain).await?;
    let result = parts.run(drain).await;
    telemetry.flush();
    result
}

/// The parts of one process.
#[derive(Default)]
pub(crate) struct Parts {
    gateway: Option<Part>,
    node: Option<Part>,
    registry: Registry,
    checks: Vec<(&'static str, Check)>,
    ops: Option<(JoinHandle<()>, CancellationToken)>,
    tasks: TaskTracker,
}

struct Part {
    name: &'static str,
    task: JoinHandle<Result<()>>,
    drain: CancellationToken,
}

impl Parts {
    /// Begins to serve a node.
    pub(crate) fn add_node(&mut self, node: Node) {
        let started = node.started();
        started.metrics.register(&mut self.registry);
        let waits = started.clone();
        self.checks.push(("node", Box::new(move || first_problem(&waits.readiness().checks))));
        let drain = CancellationToken::new();
        let run = node.run(drain.clone());
        let task = self.tasks.spawn(async move { run.await.context("the node") });
        self.node = Some(Part { name: "node", task, drain });
    }

    /// Begins to serve a gateway.
    pub(crate) fn add_gateway(&mut self, gateway: Gateway) {
        let started = gateway.started();
        started.register(&mut self.registry);
        let waits = started.clone();
        self.checks.push(("gateway", Box::new(move || first_problem(&waits.readiness().checks))));
        let drain = CancellationToken::new();
        let run = gateway.run(drain.clone());
        let task = self.tasks.spawn(async move { run.await.context("the gateway") });
        self.gateway = Some(Part { name: "gateway", task, drain });
    }

    /// Opens the health endpoints for the parts that were added; their address.
    ///
    /// # Errors
    /// When the address cannot be bound.
    pub(crate) async fn open_ops(&mut self, config: &ProcessConfig, drain: &CancellationToken) -> Result<SocketAddr> {
        let listener = ops::bind(config.admin.listen).await?;
        let address = listener.local_addr()?;
        let end = CancellationToken::new();
        let ops = Ops {
            registry: std::mem::take(&mut self.registry),
            checks: std::mem::take(&mut self.checks),
            drain: drain.clone(),
        };
        let task = self.tasks.spawn(ops::serve(listener, Arc::new(ops), end.clone()));
        self.ops = Some((task, end));
        Ok(address)
    }

    /// Whether a part has ended by itself.
    pub(crate) fn has_ended(&self) -> bool {
        [&self.gateway, &self.node].into_iter().flatten().any(|part| part.task.is_finished())
    }

    /// Serves until `drain` fires or a part ends, then ends the others in order.
    ///
    /// # Errors
    /// The first part that failed.
    pub(crate) async fn run(mut self, drain: CancellationToken) -> Result<()> {
        while !drain.is_cancelled() && !self.has_ended() {
            tokio::select! { () = drain.cancelled() => {}, () = tokio::time::sleep(Duration::from_millis(200)) => {} }
        }
        drain.cancel();
        let mut result = Ok(());
        for part in [self.gateway.take(), self.node.take()].into_iter().flatten() {
            part.drain.cancel();
            let ended =
                part.task.await.unwrap_or_else(|error| Err(anyhow::anyhow!("the {} panicked: {error}", part.name)));
            tracing::info!(part = part.name, "drained");
            if result.is_ok() {
                result = ended;
            }
        }
        if let Some((task, end)) = self.ops.take() {
            end.cancel();
            task.await.context("the health endpoints panicked")?;
        }
        result
    }
}

fn first_problem(checks: &[(&'static str, Result<(), String>)]) -> Result<(), String> {
    let problem = checks.iter().find_map(|(name, check)| check.as_ref().err().map(|why| format!("{name}: {why}")));
    problem.map_or(Ok(()), Err)
}

//! `idle`: what devices cost that are connected and say nothing, and what a cluster costs that nobody uses.
//!
//! The empty cluster is measured first. Then all devices are registered, and the gateway starts anew, so that nothing but the
//! connections is in its memory: bytes of a connection are what it has grown by, divided by the devices, after the quiet time
//! and again after each device has received and acknowledged one message and been quiet for as long.

use std::{sync::Arc, time::Duration};

use anyhow::{Context as _, Result};
use serde::Serialize;

use super::{Broker, Plan, Run, Sending, progress};
use crate::{
    cluster::Cluster,
    report::{Report, to_f64},
};

/// A cluster that was just made elects, and its processes warm up, before it is measured as empty.
const SETTLE: Duration = Duration::from_secs(10);

/// Longest wait until acknowledgements are confirmed; a device asks by a ping after two seconds.
const CONFIRM_PATIENCE: Duration = Duration::from_secs(60);

/// Figures of an empty cluster.
#[derive(Debug, Clone, Default)]
pub(super) struct Empty {
    cpu_share_each: Vec<(String, f64)>,
    rss_bytes_each: Vec<(String, u64)>,
}

/// Figures of `idle`. Field names are keys of the JSON line: they stay.
#[derive(Debug, Clone, Default, Serialize)]
pub struct IdleFigures {
    /// Share of one core that each process of the empty cluster uses, by name.
    pub empty_cpu_share_each: Vec<(String, f64)>,
    /// Resident memory of each process of the empty cluster, bytes, by name.
    pub empty_rss_bytes_each: Vec<(String, u64)>,
    /// Resident memory of the gateway before the first device connects, bytes.
    pub gateway_rss_before_bytes: u64,
    /// The same with all connected, after the quiet time.
    pub gateway_rss_quiet_bytes: u64,
    /// The same after each device has received one message, and a quiet time again.
    pub gateway_rss_after_message_bytes: u64,
    /// What the gateway has grown by for each connection, after the quiet time.
    pub bytes_per_connection_quiet: f64,
    /// The same after each has received one message.
    pub bytes_per_connection_after_message: f64,
    /// What all nodes together have grown by for each device, from before the first connection to the quiet.
    pub node_bytes_per_device_quiet: f64,
    /// Share of one core that each process uses while all devices are connected and quiet, by name.
    pub quiet_cpu_share_each: Vec<(String, f64)>,
}

impl IdleFigures {
    /// For the table.
    pub fn rows(&self) -> Vec<(&'static str, String)> {
        let shares = |each: &[(String, f64)]| {
            let each: Vec<String> = each.iter().map(|(name, share)| format!("{name} {:.2} %", 100.0 * share)).collect();
            each.join(", ")
        };
        let memory: Vec<String> =
            self.empty_rss_bytes_each.iter().map(|(name, bytes)| format!("{name} {}", mb(*bytes))).collect();
        vec![
            ("empty, CPU", shares(&self.empty_cpu_share_each)),
            ("empty, memory", memory.join(", ")),
            ("quiet, CPU", shares(&self.quiet_cpu_share_each)),
            (
                "gateway memory",
                format!(
                    "{} before, {} quiet, {} after a message each",
                    mb(self.gateway_rss_before_bytes),
                    mb(self.gateway_rss_quiet_bytes),
                    mb(self.gateway_rss_after_message_bytes)
                ),
            ),
            (
                "a connection",
                format!(
                    "{:.2} KiB quiet, {:.2} KiB after a message; at the nodes together {:.2} KiB",
                    self.bytes_per_connection_quiet / 1024.0,
                    self.bytes_per_connection_after_message / 1024.0,
                    self.node_bytes_per_device_quiet / 1024.0
                ),
            ),
        ]
    }
}

fn mb(bytes: u64) -> String {
    format!("{:.1} MB", to_f64(bytes) / 1e6)
}

/// Measures the cluster before anybody uses it.
pub(super) async fn empty(plan: &Plan, broker: &Broker, quiet: bool) -> Result<Empty> {
    let cluster = ours(broker)?;
    let bar = progress(quiet, "empty", 0);
    tokio::time::sleep(SETTLE).await;
    let cpu_share_each = shares(cluster, plan.window).await;
    bar.finish_and_clear();
    Ok(Empty { cpu_share_each, rss_bytes_each: cluster.resident_bytes_each() })
}

fn ours(broker: &Broker) -> Result<&Cluster> {
    broker.cluster.as_ref().context("idle measures processes of its own: use --local-cluster")
}

/// Share of a core that each process uses over `time`.
async fn shares(cluster: &Cluster, time: Duration) -> Vec<(String, f64)> {
    let from = cluster.cpu_secs_each();
    tokio::time::sleep(time).await;
    let to = cluster.cpu_secs_each();
    let before = |name: &str| from.iter().find(|(other, _)| other == name).map_or(0.0, |(_, secs)| *secs);
    to.iter().map(|(name, secs)| (name.clone(), (secs - before(name)) / time.as_secs_f64())).collect()
}

impl Run<'_> {
    pub(super) async fn idle(&self, empty: Empty) -> Result<Report> {
        let cluster = ours(self.broker)?;
        let sending = Arc::new(Sending::default());
        let nodes = || cluster.resident_bytes() - cluster.gateway_resident_bytes();
        tokio::time::sleep(SETTLE).await;
        let (gateway_before, nodes_before) = (cluster.gateway_resident_bytes(), nodes());
        self.bring_on_line().await?;
        let from = self.edge(&sending);
        let quiet_cpu_share_each = shares(cluster, self.plan.window).await;
        let (gateway_quiet, nodes_quiet) = (cluster.gateway_resident_bytes(), nodes());
        self.store(&sending, 0..self.plan.devices, 1).await?;
        self.drain(&sending).await;
        self.confirmed(CONFIRM_PATIENCE).await?;
        tokio::time::sleep(self.plan.window).await;
        let gateway_after = cluster.gateway_resident_bytes();
        let to = self.edge(&sending);
        let mut report = self.report(&from, &to, cluster.resident_bytes());
        self.fleet.leave().await;
        let devices = to_f64(self.plan.devices as u64);
        let each = |from: u64, to: u64| to_f64(to.saturating_sub(from)) / devices;
        report.idle = Some(IdleFigures {
            empty_cpu_share_each: empty.cpu_share_each,
            empty_rss_bytes_each: empty.rss_bytes_each,
            gateway_rss_before_bytes: gateway_before,
            gateway_rss_quiet_bytes: gateway_quiet,
            gateway_rss_after_message_bytes: gateway_after,
            bytes_per_connection_quiet: each(gateway_before, gateway_quiet),
            bytes_per_connection_after_message: each(gateway_before, gateway_after),
            node_bytes_per_device_quiet: each(nodes_before, nodes_quiet),
            quiet_cpu_share_each,
        });
        Ok(report)
    }
}

//! `offline-fill`: what a cluster that is full of stored messages costs, against the same cluster when it was empty.
//!
//! All devices are registered and stay away; each gets one message. The first tenth is stored into an empty cluster, the last into
//! one that is nine tenths full: the rates of the two are compared. Memory and disk are looked at when checkpoints have come to rest,
//! with one tenth stored and with all: what they grew by in between, for each message, holds none of what a cluster has anyway.
//! Then a node is started again, as in `restart`. At the end a sample of the devices comes on line, and the ledger judges what
//! happened to those alone: the history of all would not fit into the generator.

use std::{
    ops::Range,
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use anyhow::{Context as _, Result, bail};
use serde::Serialize;

use super::{
    Run, Sending,
    restart::{bytes_below, restarted},
};
use crate::{
    clock::RunClock,
    cluster::{Cluster, Member},
    report::{Report, to_f64},
};

/// Devices of the sample at most.
const SAMPLE_MAX: usize = 1_000;

/// Rows that wait for a checkpoint on each node below which it has come to rest, bytes.
const REST_BYTES: f64 = 262_144.0;

/// Longest wait for that. A shard is due 15 s after its first change.
const REST_PATIENCE: Duration = Duration::from_secs(180);

/// After that: base files are written, and the log is cleaned.
const SETTLE: Duration = Duration::from_secs(5);

/// Between two looks.
const LOOK_EVERY: Duration = Duration::from_millis(250);

/// Figures of `offline-fill`. Field names are keys of the JSON line: they stay.
#[derive(Debug, Clone, Default, Serialize)]
pub struct FillFigures {
    /// Messages stored and waiting in the end.
    pub filled: u64,
    /// Messages a second stored of the first tenth.
    pub enqueue_empty_per_s: f64,
    /// Messages a second stored of the last tenth.
    pub enqueue_full_per_s: f64,
    /// The latter over the former.
    pub enqueue_full_to_empty: f64,
    /// Resident memory of each node with one tenth stored, bytes.
    pub node_rss_tenth_bytes: Vec<u64>,
    /// The same with all stored.
    pub node_rss_full_bytes: Vec<u64>,
    /// What the node that grew most grew by in between, for each message.
    pub node_rss_bytes_per_message: f64,
    /// What the data directories of all nodes grew by in between, for each message.
    pub disk_bytes_per_message: f64,
    /// From the start of a full node after SIGTERM until it serves, seconds.
    pub full_restart_after_sigterm_s: f64,
    /// The same after SIGKILL.
    pub full_restart_after_sigkill_s: f64,
    /// Devices that came on line at the end and were judged.
    pub sampled: usize,
}

impl FillFigures {
    /// For the table.
    pub fn rows(&self) -> Vec<(&'static str, String)> {
        vec![
            ("stored", format!("{} messages", self.filled)),
            (
                "enqueued",
                format!(
                    "{:.0}/s when empty, {:.0}/s when full: {:.2}",
                    self.enqueue_empty_per_s, self.enqueue_full_per_s, self.enqueue_full_to_empty
                ),
            ),
            (
                "a stored message",
                format!(
                    "{:.0} bytes resident on a node, {:.0} bytes on the disks of all",
                    self.node_rss_bytes_per_message, self.disk_bytes_per_message
                ),
            ),
            (
                "a full node serves",
                format!(
                    "{:.1} s after SIGTERM, {:.1} s after SIGKILL",
                    self.full_restart_after_sigterm_s, self.full_restart_after_sigkill_s
                ),
            ),
            ("judged", format!("{} devices", self.sampled)),
        ]
    }
}

/// One device in so many is judged.
pub(super) fn sample_every(devices: usize) -> usize {
    devices.div_ceil(SAMPLE_MAX).max(1)
}

/// What the nodes take at one moment.
struct Footprint {
    stored: u64,
    rss: Vec<u64>,
    disk: u64,
}

impl Footprint {
    /// Bytes for each message stored since an earlier moment: of the node that grew most, and of all disks.
    fn growth_since(&self, before: &Self) -> (f64, f64) {
        let messages = to_f64(self.stored - before.stored).max(1.0);
        let each = self.rss.iter().zip(&before.rss).map(|(now, then)| to_f64(*now) - to_f64(*then));
        let rss = each.fold(f64::NEG_INFINITY, f64::max);
        (rss / messages, (to_f64(self.disk) - to_f64(before.disk)) / messages)
    }
}

impl Run<'_> {
    pub(super) async fn offline_fill(&mut self) -> Result<Report> {
        if self.broker.cluster.is_none() {
            bail!("offline-fill looks at processes: use --local-cluster");
        }
        let all = self.plan.devices;
        let tenth = all / 10;
        if tenth < self.plan.recipients {
            bail!("--devices {all}: at least ten times --recipients");
        }
        let sending = Arc::new(Sending::default());
        let begin = self.edge(&sending);
        self.rest(&sending).await?;
        let empty = self.rate(&sending, 0..tenth).await?;
        let tenth_full = self.rest(&sending).await?;
        self.store(&sending, tenth..all - tenth, 1).await?;
        self.rest(&sending).await?;
        let full = self.rate(&sending, all - tenth..all).await?;
        let filled = self.rest(&sending).await?;
        let end = self.edge(&sending);
        let (node_rss_bytes_per_message, disk_bytes_per_message) = filled.growth_since(&tenth_full);

        let cluster = self.broker.cluster.as_mut().context("it was there")?;
        let (full_restart_after_sigterm_s, full_restart_after_sigkill_s) = restarted(cluster).await?;

        let sample: Vec<usize> = (0..all).step_by(sample_every(all)).collect();
        for (at, device) in self.fleet.devices.iter().enumerate() {
            if !at.is_multiple_of(sample_every(all)) {
                // It stays away: nobody waits for its message.
                device.outstanding.store(0, Ordering::Relaxed);
            }
        }
        self.fleet.connect(sample.iter().copied());
        self.drain(&sending).await;
        let resident = self.broker.cluster.as_ref().map_or(0, Cluster::resident_bytes);
        self.fleet.leave().await;
        let mut report = self.report(&begin, &end, resident);
        report.throughput_per_s = full;
        self.per_cpu(&mut report, to_f64(filled.stored));
        report.fill = Some(FillFigures {
            filled: filled.stored,
            enqueue_empty_per_s: empty,
            enqueue_full_per_s: full,
            enqueue_full_to_empty: full / empty,
            node_rss_tenth_bytes: tenth_full.rss,
            node_rss_full_bytes: filled.rss,
            node_rss_bytes_per_message,
            disk_bytes_per_message,
            full_restart_after_sigterm_s,
            full_restart_after_sigkill_s,
            sampled: sample.len(),
        });
        Ok(report)
    }

    /// Stores a message for each of these devices; messages a second.
    async fn rate(&self, sending: &Arc<Sending>, devices: Range<usize>) -> Result<f64> {
        let (begin, before) = (self.clock.secs(), sending.acked.load(Ordering::Relaxed));
        self.store(sending, devices, 1).await?;
        Ok(to_f64(sending.acked.load(Ordering::Relaxed) - before) / (self.clock.secs() - begin))
    }

    /// Waits until checkpoints have moved what was stored; what the nodes take then.
    async fn rest(&self, sending: &Sending) -> Result<Footprint> {
        let cluster = self.broker.cluster.as_ref().context("it was there")?;
        let clock = RunClock::begin();
        for at in 0..cluster.nodes() {
            let node = cluster.process(Member::Node(at));
            while node.metric("martlet_node_memtable_bytes").await? > REST_BYTES {
                if clock.elapsed() > REST_PATIENCE {
                    bail!("node {} did not come to rest within {REST_PATIENCE:?}", at + 1);
                }
                tokio::time::sleep(LOOK_EVERY).await;
            }
        }
        tokio::time::sleep(SETTLE).await;
        let nodes = cluster.nodes();
        let disks = (0..nodes).map(|at| bytes_below(&cluster.node_data(at)));
        Ok(Footprint {
            stored: sending.acked.load(Ordering::Relaxed),
            rss: cluster.resident_bytes_each().into_iter().take(nodes).map(|(_, bytes)| bytes).collect(),
            disk: disks.sum::<Result<u64>>()?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_costs_what_was_grown_by_since_and_memory_counts_on_the_node_that_grew_most() {
        let tenth = Footprint { stored: 100, rss: vec![1_000, 5_000, 2_000], disk: 50_000 };
        let full = Footprint { stored: 1_100, rss: vec![11_000, 5_000, 32_000], disk: 4_050_000 };
        assert_eq!(full.growth_since(&tenth), (30.0, 4_000.0));
    }

    #[test]
    fn of_few_devices_all_are_judged_and_of_many_a_thousand() {
        assert_eq!(sample_every(1), 1);
        assert_eq!(sample_every(1_000), 1);
        assert_eq!(sample_every(10_000), 10);
        assert_eq!((0..1_000_000).step_by(sample_every(1_000_000)).count(), 1_000);
    }
}

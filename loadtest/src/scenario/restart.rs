//! `restart`: how long a node that holds much takes until it serves again.
//!
//! Messages are stored for devices that are away, then the first node is started again twice: after SIGTERM, which lets it write a
//! last checkpoint, and after SIGKILL, which leaves it the log to read. It *serves* when it is ready, each of its replicas has
//! applied what was applied there before it ended, and each knows a leader. Nothing is sent meanwhile. At the end all devices come
//! and get what was stored, so that the ledger can judge it.

use std::{fs, path::Path, sync::Arc, sync::atomic::Ordering, time::Duration};

use anyhow::{Context as _, Result, bail};
use martlet_proto::cluster::admin::GroupStatus;
use serde::Serialize;

use super::{OUTSTANDING_MAX, Run, Sending};
use crate::{
    clock::RunClock,
    cluster::{Cluster, Member},
    report::{Report, to_f64},
};

/// The node that is started again.
const NODE: usize = 0;

/// Before each end: elections and checkpoints that the load brought about come to rest.
const SETTLE: Duration = Duration::from_secs(10);

/// Longest wait until the node serves; beyond it the run has failed.
const SERVE_PATIENCE: Duration = Duration::from_secs(300);

/// Between two looks.
const LOOK_EVERY: Duration = Duration::from_millis(50);

/// Figures of `restart`. Field names are keys of the JSON line: they stay.
#[derive(Debug, Clone, Default, Serialize)]
pub struct RestartFigures {
    /// Payload bytes that were stored and not delivered when the node was started again: messages acked, times their size.
    pub stored_bytes: u64,
    /// Bytes of the node's data directory before the first end.
    pub node_disk_bytes: u64,
    /// From the start after SIGTERM until the node serves, seconds.
    pub restart_after_sigterm_s: f64,
    /// From the start after SIGKILL until the node serves, seconds.
    pub restart_after_sigkill_s: f64,
    /// Resident memory of the node once it serves after SIGKILL, bytes.
    pub restarted_rss_bytes: u64,
}

impl RestartFigures {
    /// For the table.
    pub fn rows(&self) -> Vec<(&'static str, String)> {
        let mib = |bytes: u64| format!("{:.0} MiB", to_f64(bytes) / f64::from(1 << 20));
        vec![
            ("stored", format!("{}, {} on the node's disk", mib(self.stored_bytes), mib(self.node_disk_bytes))),
            ("serves after SIGTERM", format!("{:.1} s", self.restart_after_sigterm_s)),
            (
                "serves after SIGKILL",
                format!("{:.1} s, with {} resident", self.restart_after_sigkill_s, mib(self.restarted_rss_bytes)),
            ),
        ]
    }
}

impl Run<'_> {
    pub(super) async fn restart(&mut self) -> Result<Report> {
        if self.plan.per_device >= OUTSTANDING_MAX {
            bail!("--per-device: at most {}, below the limit of waiting messages", OUTSTANDING_MAX - 1);
        }
        let sending = Arc::new(Sending::default());
        self.store(&sending, 0..self.plan.devices, self.plan.per_device).await?;
        let stored = sending.acked.load(Ordering::Relaxed);
        let cluster = self.broker.cluster.as_mut().context("restart ends processes: use --local-cluster")?;

        tokio::time::sleep(SETTLE).await;
        let node_disk_bytes = bytes_below(&cluster.node_data(NODE))?;
        let (restart_after_sigterm_s, restart_after_sigkill_s) = restarted(cluster).await?;
        let resident = cluster.resident_bytes_each().first().map_or(0, |(_, bytes)| *bytes);

        let from = self.edge(&sending);
        self.fleet.connect(0..self.plan.devices);
        self.drain(&sending).await;
        let to = self.edge(&sending);
        let all = self.broker.cluster.as_ref().map_or(0, Cluster::resident_bytes);
        self.fleet.leave().await;
        let mut report = self.report(&from, &to, all);
        report.restart = Some(RestartFigures {
            stored_bytes: stored * self.plan.payload_bytes as u64,
            node_disk_bytes,
            restart_after_sigterm_s,
            restart_after_sigkill_s,
            restarted_rss_bytes: resident,
        });
        Ok(report)
    }
}

/// Starts the node again, after SIGTERM and then after SIGKILL: how long each took until it served, seconds.
pub(super) async fn restarted(cluster: &mut Cluster) -> Result<(f64, f64)> {
    let before = groups(cluster).await.context("the node does not say what it holds")?;
    cluster.process_mut(Member::Node(NODE)).end().await?;
    let after_sigterm = start(cluster, &before).await.context("after SIGTERM")?;

    tokio::time::sleep(SETTLE).await;
    let before = groups(cluster).await.context("the node does not say what it holds")?;
    cluster.kill_node(NODE)?;
    let after_sigkill = start(cluster, &before).await.context("after SIGKILL")?;
    Ok((after_sigterm, after_sigkill))
}

/// Starts the node and waits until it serves; how long that took, seconds.
async fn start(cluster: &mut Cluster, before: &[GroupStatus]) -> Result<f64> {
    let clock = RunClock::begin();
    cluster.start_node(NODE)?;
    loop {
        let is_ready = cluster.process(Member::Node(NODE)).ask("/readyz").await.is_ok();
        if is_ready && groups(cluster).await.is_some_and(|now| serves(before, &now)) {
            return Ok(clock.secs());
        }
        let process = cluster.process_mut(Member::Node(NODE));
        if let Some(status) = process.ended()? {
            bail!("the node ended with {status}; its log is {}", process.log().display());
        }
        if clock.elapsed() > SERVE_PATIENCE {
            bail!("the node did not serve within {SERVE_PATIENCE:?}; its log is {}", process.log().display());
        }
        tokio::time::sleep(LOOK_EVERY).await;
    }
}

/// Whether every replica is back: runs, knows a leader, and has applied what it had applied.
fn serves(before: &[GroupStatus], now: &[GroupStatus]) -> bool {
    before.iter().all(|was| {
        now.iter().any(|is| {
            is.group == was.group
                && is.stopped.is_empty()
                && is.leader_replica > 0
                && is.applied_index >= was.applied_index
        })
    })
}

/// The replicas of the node, as it tells of them.
async fn groups(cluster: &Cluster) -> Option<Vec<GroupStatus>> {
    let groups = cluster.status(NODE).await?.groups;
    (!groups.is_empty()).then_some(groups)
}

/// Bytes of all files below a directory. One that goes meanwhile counts nothing.
pub(super) fn bytes_below(dir: &Path) -> Result<u64> {
    let mut bytes = 0;
    for entry in fs::read_dir(dir).with_context(|| format!("read {}", dir.display()))? {
        let entry = entry?;
        let Ok(metadata) = entry.metadata() else { continue };
        bytes += if metadata.is_dir() { bytes_below(&entry.path())? } else { metadata.len() };
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn replica(group: u32, applied_index: u64, leader_replica: u64) -> GroupStatus {
        GroupStatus { group, applied_index, leader_replica, ..GroupStatus::default() }
    }

    #[test]
    fn a_node_serves_once_each_replica_has_a_leader_and_is_as_far_as_it_was() {
        let before = [replica(0, 5, 1), replica(1, 9, 2)];
        assert!(serves(&before, &[replica(0, 5, 3), replica(1, 12, 2)]));
        assert!(!serves(&before, &[replica(0, 5, 3)]), "one is not there yet");
        assert!(!serves(&before, &[replica(0, 5, 3), replica(1, 8, 2)]), "one is behind");
        assert!(!serves(&before, &[replica(0, 5, 0), replica(1, 9, 2)]), "one knows no leader");
        let stopped = GroupStatus { stopped: "damaged".into(), ..replica(1, 9, 2) };
        assert!(!serves(&before, &[replica(0, 5, 3), stopped]));
    }
}

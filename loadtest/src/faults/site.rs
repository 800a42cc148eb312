//! The cluster under fault: its processes, their control pages, their file systems, and what was found wrong with them.
//!
//! Owns the choice of a victim and the way back after a fault. A *finding* is a promise about a process that was broken and that
//! no history shows: damage that was served, a node that a full disk ended. The invariant: a process that a fault has hold of
//! (`touched`) is never the victim of another, and nobody waits for a process that cannot be ready yet.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use anyhow::{Context as _, Result, bail};
use martlet_proto::cluster::admin::NodeStatus;

use super::{interposer::Control, volume::Volume};
use crate::{
    clock::RunClock,
    cluster::{Cluster, Member},
};

/// Patience for a leader to be known.
const LEADER_PATIENCE: Duration = Duration::from_secs(20);

/// The cluster and all that faults need.
#[derive(Debug)]
pub(super) struct Site {
    /// The processes. Before the volumes: they must be gone first.
    pub(super) cluster: Cluster,
    /// Control page of each process; empty without the library.
    pub(super) controls: BTreeMap<Member, Control>,
    /// File system of each node; empty when the nodes share one.
    pub(super) volumes: Vec<Volume>,
    /// What was found wrong.
    pub(super) findings: Vec<String>,
    /// What is going on, for findings.
    pub(super) doing: String,
    touched: BTreeSet<Member>,
    /// Those of `touched` that were started again and are not known to be ready.
    returning: BTreeSet<Member>,
}

impl Site {
    /// Of a cluster that runs.
    #[must_use]
    pub(super) fn new(cluster: Cluster, controls: BTreeMap<Member, Control>, volumes: Vec<Volume>) -> Self {
        let (touched, returning) = (BTreeSet::new(), BTreeSet::new());
        Self { cluster, controls, volumes, findings: Vec::new(), doing: String::new(), touched, returning }
    }

    /// Notes that a promise about a process was broken.
    pub(super) fn found(&mut self, what: impl AsRef<str>) {
        self.findings.push(format!("{}: {}", self.doing, what.as_ref()));
    }

    /// All nodes.
    #[must_use]
    pub(super) fn nodes(&self) -> Vec<Member> {
        (0..self.cluster.nodes()).map(Member::Node).collect()
    }

    /// All processes.
    #[must_use]
    pub(super) fn members(&self) -> Vec<Member> {
        self.nodes().into_iter().chain([Member::Gateway]).collect()
    }

    /// One of `members` that nothing has hold of; it is `pick`'s choice.
    #[must_use]
    pub(super) fn choose(&self, members: &[Member], pick: u64) -> Option<Member> {
        let free: Vec<Member> = members.iter().copied().filter(|member| !self.touched.contains(member)).collect();
        let at = usize::try_from(pick.checked_rem(free.len() as u64)?).ok()?;
        free.get(at).copied()
    }

    /// Takes hold of members.
    pub(super) fn touch(&mut self, members: &[Member]) {
        self.touched.extend(members);
    }

    /// What each node says of itself; one that does not answer is absent.
    pub(super) async fn status(&self) -> Vec<(usize, NodeStatus)> {
        let mut all = Vec::new();
        for at in 0..self.cluster.nodes() {
            all.extend(self.cluster.status(at).await.map(|status| (at, status)));
        }
        all
    }

    /// A node that leads a shard and that nothing has hold of; waits for an election where there is none. None where something has
    /// hold of all nodes or of all that lead.
    ///
    /// # Errors
    /// When no shard gets a leader.
    pub(super) async fn leader(&self, pick: u64) -> Result<Option<Member>> {
        // Under a fault of all nodes there is nobody to ask, let alone to strike.
        if self.choose(&self.nodes(), 0).is_none() {
            return Ok(None);
        }
        let clock = RunClock::begin();
        loop {
            let status = self.status().await;
            let led = status.iter().flat_map(|(at, node)| {
                let leads =
                    node.groups.iter().filter(|group| group.group > 0 && group.leader_replica == group.replica_id);
                leads.map(|_| Member::Node(*at))
            });
            let leaders: Vec<Member> = led.collect();
            if !leaders.is_empty() {
                return Ok(self.choose(&leaders, pick));
            }
            if clock.elapsed() > LEADER_PATIENCE {
                bail!("no shard has a leader for {LEADER_PATIENCE:?}");
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }

    /// A node that does not lead the shard that `pick` means, and that nothing has hold of.
    ///
    /// # Errors
    /// As [`Site::leader`].
    pub(super) async fn follower(&self, pick: u64) -> Result<Option<Member>> {
        let leader = self.leader(pick).await?;
        let others: Vec<Member> = self.nodes().into_iter().filter(|member| Some(*member) != leader).collect();
        Ok(self.choose(&others, pick >> 8))
    }

    /// Starts those that do not run, waits until all of them are ready, and lets go of them. While another fault has hold of
    /// a majority of the nodes nothing becomes ready, and they are waited for at its end.
    ///
    /// # Errors
    /// When one does not become ready.
    pub(super) async fn revive(&mut self, members: &[Member]) -> Result<()> {
        for &member in members {
            if self.cluster.process(member).pid().is_none() {
                self.cluster.start_member(member)?;
            }
        }
        self.returning.extend(members);
        if majority_free(&self.nodes(), &self.touched, &self.returning) { self.returned().await } else { Ok(()) }
    }

    /// Waits for all that were started again, and lets go of them. Every fault has ended.
    ///
    /// # Errors
    /// When one does not become ready.
    pub(super) async fn returned(&mut self) -> Result<()> {
        while let Some(&member) = self.returning.first() {
            self.cluster.process_mut(member).wait("/readyz").await?;
            self.returning.remove(&member);
            self.touched.remove(&member);
        }
        Ok(())
    }

    /// Looks for what nobody did: processes that ended, replicas that stopped. What ended is started again.
    ///
    /// # Errors
    /// When a process cannot be started again.
    pub(super) async fn inspect(&mut self) -> Result<()> {
        for member in self.members() {
            if let Some(status) = self.cluster.process_mut(member).ended()? {
                let log = self.cluster.process(member).log().display().to_string();
                self.found(format!("{member} ended by itself with {status}; its log is {log}"));
                self.cluster.start_member(member).context("start what ended")?;
                self.cluster.process_mut(member).wait("/readyz").await?;
            }
        }
        for (at, status) in self.status().await {
            for group in status.groups.iter().filter(|group| !group.stopped.is_empty()) {
                self.found(format!(
                    "{}: the replica of group {} stopped: {}",
                    Member::Node(at),
                    group.group,
                    group.stopped
                ));
            }
        }
        Ok(())
    }
}

/// Whether no fault has hold of so many of `nodes` that the others have no quorum.
fn majority_free(nodes: &[Member], touched: &BTreeSet<Member>, returning: &BTreeSet<Member>) -> bool {
    let held = nodes.iter().filter(|node| touched.contains(node) && !returning.contains(node)).count();
    2 * held < nodes.len()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nobody_waits_for_a_gateway_while_a_fault_has_hold_of_a_majority() {
        let nodes = [0, 1, 2].map(Member::Node);
        let set = |members: &[Member]| members.iter().copied().collect::<BTreeSet<_>>();
        let gateway = set(&[Member::Gateway]);
        // Found by a seed: a gateway was killed on top of a power loss of all nodes, and waited for before they were started.
        let all = set(&[nodes[0], nodes[1], nodes[2], Member::Gateway]);
        assert!(!majority_free(&nodes, &all, &gateway));
        assert!(!majority_free(&nodes, &set(&nodes[..2]), &gateway));
        assert!(majority_free(&nodes, &set(&nodes[..1]), &gateway));
        assert!(majority_free(&nodes, &all, &all));
    }
}

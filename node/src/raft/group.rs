//! A running Raft group, as the rest of the node sees it.

use std::{collections::BTreeMap, sync::Arc};

use bytes::Bytes;
use tokio::sync::watch;

use super::{
    machine::{Machine, Reply},
    network::Network,
    settings::RaftSettings,
};
use crate::{
    clock::Clock,
    log::{GroupId, Log},
};

/// Where a replica lives.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Member {
    /// Node id.
    pub node: u64,
    /// `host:port` as peers reach the node.
    pub address: String,
}

/// What a group is started with.
#[derive(Debug, Clone)]
pub struct GroupConfig {
    /// Which group.
    pub group: GroupId,
    /// This node's replica of it; given by the meta group, never reused.
    pub replica: u64,
    /// Timers and bounds.
    pub settings: RaftSettings,
    /// Monotonic time for the lease.
    pub clock: Arc<dyn Clock>,
}

/// Who leads, as this replica knows it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Leadership {
    /// Newest term seen.
    pub term: u64,
    /// Replica that leads it, if known.
    pub leader: Option<u64>,
    /// This replica leads.
    pub is_leader: bool,
    /// This replica leads and has applied its own first entry of the term: its state is complete.
    pub first_applied: bool,
}

/// Why a proposal was not answered.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ProposeError {
    /// Definite: nothing was proposed.
    #[error("not the leader in term {term}")]
    NotLeader {
        /// Replica that leads, if known.
        leader: Option<u64>,
        /// Newest term seen.
        term: u64,
    },
    /// Proposed; it may be applied or not.
    #[error("the outcome is not known")]
    Unknown,
    /// The group has stopped on this node. Whether it was proposed is not known.
    #[error("the group has stopped: {0}")]
    Stopped(String),
}

/// Why a read cannot be answered here.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ReadError {
    /// Another replica leads, or no quorum answered.
    #[error("not the leader in term {term}")]
    NotLeader {
        /// Replica that leads, if known.
        leader: Option<u64>,
        /// Newest term seen.
        term: u64,
    },
    /// The group has stopped on this node.
    #[error("the group has stopped: {0}")]
    Stopped(String),
}

/// Why a group cannot be started, created, or changed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("group {group}: {what}")]
pub struct GroupError {
    /// Which group.
    pub group: GroupId,
    /// What was attempted and what came instead.
    pub what: String,
}

/// For operators.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct GroupStatus {
    /// This replica.
    pub replica: u64,
    /// Newest term seen.
    pub term: u64,
    /// Replica that leads, if known.
    pub leader: Option<u64>,
    /// Last index in the log; 0 for an empty log.
    pub last_log_index: u64,
    /// Last index applied.
    pub applied_index: u64,
    /// Last index known committed.
    pub committed_index: u64,
    /// Last index purged from the log.
    pub purged_index: u64,
    /// What stopped the group, if it has stopped.
    pub stopped: Option<String>,
    /// Voters by replica id.
    pub voters: BTreeMap<u64, Member>,
}

/// Handle of a running group; cloning gives another handle.
#[derive(Clone, Debug)]
pub struct Group {
    group: GroupId,
    leadership: watch::Receiver<Leadership>,
    stopped: watch::Receiver<Option<String>>,
}

impl Group {
    /// Starts this node's replica: replays what the machine has not applied, then takes part.
    #[expect(clippy::unused_async, reason = "filled in next")]
    pub async fn start(
        config: GroupConfig,
        log: &Log,
        machine: Box<dyn Machine>,
        network: &Network,
    ) -> Result<Group, GroupError> {
        let _ = (log, machine, network);
        let (_, leadership) = watch::channel(Leadership::default());
        let (_, stopped) = watch::channel(None);
        Ok(Group { group: config.group, leadership, stopped })
    }

    /// Which group.
    pub fn id(&self) -> GroupId {
        self.group
    }

    /// Makes these replicas the first voters. Once in the life of a group, on one or all of them with the same members; a
    /// group that has begun is left as it is and `false` is returned.
    #[expect(clippy::unused_async, reason = "filled in next")]
    pub async fn initialize(&self, members: BTreeMap<u64, Member>) -> Result<bool, GroupError> {
        let _ = members;
        Ok(false)
    }

    /// Proposes an entry and waits until it is applied here.
    #[expect(clippy::unused_async, reason = "filled in next")]
    pub async fn propose(&self, payload: Bytes) -> Result<Reply, ProposeError> {
        let _ = payload;
        Err(ProposeError::NotLeader { leader: None, term: 0 })
    }

    /// Who leads, and every change of it.
    pub fn leadership(&self) -> watch::Receiver<Leadership> {
        self.leadership.clone()
    }

    /// Confirms with a quorum that this replica leads, and waits until everything committed before is applied. Returns the
    /// index that reads then see at least.
    #[expect(clippy::unused_async, reason = "filled in next")]
    pub async fn read_barrier(&self) -> Result<u64, ReadError> {
        Err(ReadError::NotLeader { leader: None, term: 0 })
    }

    /// Whether no other replica can lead at this moment: a quorum answered less than the election minimum ago.
    pub fn lease_valid(&self) -> bool {
        false
    }

    /// For operators.
    pub fn status(&self) -> GroupStatus {
        GroupStatus::default()
    }

    /// Becomes `Some(why)` when the group stops on this node, by an error or [`Group::shutdown`].
    pub fn stopped(&self) -> watch::Receiver<Option<String>> {
        self.stopped.clone()
    }

    /// Highest index that every replica is known to have on disk; 0 when this replica does not lead.
    pub fn replicated_everywhere(&self) -> u64 {
        0
    }

    /// Lets the log forget entries up to `index`, which a checkpoint covers and every replica has.
    #[expect(clippy::unused_async, reason = "filled in next")]
    pub async fn purge_upto(&self, index: u64) -> Result<(), GroupError> {
        let _ = index;
        Ok(())
    }

    /// Hands leadership to a caught-up voter, if there is one; returns who was asked. Best effort.
    #[expect(clippy::unused_async, reason = "filled in next")]
    pub async fn step_down(&self) -> Result<Option<u64>, GroupError> {
        Ok(None)
    }

    /// Hands leadership to this replica; refused unless it is a voter and caught up.
    #[expect(clippy::unused_async, reason = "filled in next")]
    pub async fn transfer_leader(&self, to: u64) -> Result<(), GroupError> {
        let _ = to;
        Ok(())
    }

    /// Stops the replica; it can be started again.
    #[expect(clippy::unused_async, reason = "filled in next")]
    pub async fn shutdown(&self) {}
}

//! A running Raft group, as the rest of the node sees it.
//!
//! Left out for now: the ask-first rule that elects at once when connections to a leader close; snapshots between nodes, so
//! that the log is purged only to where every replica is; changes of membership.

use std::{
    collections::BTreeMap,
    fmt,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use bytes::Bytes;
use openraft::{
    Instant as _, ReadPolicy, ServerState,
    async_runtime::watch::WatchReceiver,
    errors::{ClientWriteError, ForwardToLeader, InitializeError, LinearizableReadError, RaftError},
};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::{
    client::Clients,
    local::Local,
    machine::{Applier, Machine, Reply},
    network::Network,
    settings::RaftSettings,
    storage::Storage,
    types::{Command, Raft, Types},
    watcher,
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
    /// Replica that leads it, if known. A hint: right after a start it is who led before.
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

/// Handle of a running group; cloning gives another handle. The group runs until [`Group::shutdown`], also without handles.
#[derive(Clone)]
pub struct Group {
    local: Arc<Local>,
    raft: Raft,
    network: Network,
    settings: RaftSettings,
    leadership: watch::Receiver<Leadership>,
    stopped: watch::Receiver<Option<String>>,
    /// Term whose leadership was handed over: its lease is not worth anything any more.
    given_up: Arc<AtomicU64>,
    ending: CancellationToken,
}

impl fmt::Debug for Group {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Group").field("local", &self.local).finish_non_exhaustive()
    }
}

impl Group {
    /// Starts this node's replica: replays what the machine has not applied, then takes part.
    ///
    /// A replica that was here before neither votes nor campaigns for one election maximum: it may have promised a leader its
    /// lease. If the log dropped a drain it waits for a leader to catch it up, or until every voter has answered: then it votes
    /// only in a new term and for a log at least as new as the newest of them. A sole voter goes on at once.
    ///
    /// Refused when store and log contradict each other: the store lies before the log's purge point, or the log is gone.
    pub async fn start(
        config: GroupConfig,
        log: &Log,
        machine: Box<dyn Machine>,
        network: &Network,
    ) -> Result<Group, GroupError> {
        let GroupConfig { group, replica, settings, .. } = config;
        let failed = |what: String| GroupError { group, what };
        let log = log.group(group);
        let fresh = log.vote().is_none() && log.last().is_none() && !log.is_behind();
        let (led_tx, led) = watch::channel(0);
        let applier = Applier::new(machine, replica, log.clone(), led_tx).map_err(|e| failed(e.to_string()))?;
        if let Some(what) = applier.contradiction() {
            return Err(failed(format!("replica {replica} cannot start: {what}")));
        }
        let local = Arc::new(Local::new(group, replica, log.clone(), !fresh));
        let openraft = settings.openraft(group, fresh).map_err(|e| failed(e.to_string()))?;
        let clients = Clients { network: network.clone(), local: local.clone() };
        let raft = Raft::new(replica, Arc::new(openraft), clients, Storage(log.clone()), applier)
            .await
            .map_err(|e| failed(format!("replica {replica} cannot start: {e}")))?;
        // Set here only, once.
        let _ = local.raft.set(raft.clone());
        network.register(local.clone());

        let ending = CancellationToken::new();
        let (leadership, stopped) = watcher::follow(network, &local, &raft, led, &settings, ending.clone());
        Ok(Group {
            local,
            raft,
            network: network.clone(),
            settings,
            leadership,
            stopped,
            given_up: Arc::default(),
            ending,
        })
    }

    /// Which group.
    pub fn id(&self) -> GroupId {
        self.local.group
    }

    /// This node's replica.
    pub fn replica(&self) -> u64 {
        self.local.replica
    }

    /// Makes these replicas the first voters. Once in the life of a group, on one or all of them with the same members; a
    /// group that has begun is left as it is and `false` is returned.
    pub async fn initialize(&self, members: BTreeMap<u64, Member>) -> Result<bool, GroupError> {
        match self.raft.initialize(members).await {
            Ok(()) => Ok(true),
            Err(RaftError::APIError(InitializeError::NotAllowed(_))) => Ok(false),
            Err(e) => Err(GroupError { group: self.id(), what: format!("cannot be created: {e}") }),
        }
    }

    /// Proposes an entry and waits until it is applied here. Cancelled, the entry may be applied or not.
    pub async fn propose(&self, payload: Bytes) -> Result<Reply, ProposeError> {
        match self.raft.client_write(Command(payload)).await {
            Ok(response) => Ok(response.data),
            Err(RaftError::APIError(ClientWriteError::ForwardToLeader(forward))) => {
                let (leader, term) = self.forward(&forward);
                Err(ProposeError::NotLeader { leader, term })
            }
            Err(RaftError::APIError(e)) => {
                tracing::debug!(group = %self.id(), error = %e, "the outcome of a proposal is not known");
                Err(ProposeError::Unknown)
            }
            Err(RaftError::Fatal(fatal)) => Err(ProposeError::Stopped(fatal.to_string())),
        }
    }

    /// Who leads, and every change of it.
    pub fn leadership(&self) -> watch::Receiver<Leadership> {
        self.leadership.clone()
    }

    /// Confirms with a quorum that this replica leads, and waits until everything committed before is applied. Returns the
    /// index that reads then see at least.
    pub async fn read_barrier(&self) -> Result<u64, ReadError> {
        let barrier = match self.raft.get_read_linearizer(ReadPolicy::ReadIndex).await {
            Ok(barrier) => barrier,
            Err(RaftError::APIError(LinearizableReadError::ForwardToLeader(forward))) => {
                let (leader, term) = self.forward(&forward);
                return Err(ReadError::NotLeader { leader, term });
            }
            Err(RaftError::APIError(LinearizableReadError::QuorumNotEnough(_))) => {
                return Err(ReadError::NotLeader { leader: None, term: self.leadership.borrow().term });
            }
            Err(RaftError::Fatal(fatal)) => return Err(ReadError::Stopped(fatal.to_string())),
        };
        let reached = barrier.await_ready(&self.raft).await.map_err(|fatal| ReadError::Stopped(fatal.to_string()))?;
        Ok(reached.read_log_id().index())
    }

    /// Whether no other replica can lead at this moment: a quorum has answered something that was sent less than the election
    /// minimum ago (no voter of it votes before the election maximum). The gap between the two is the margin for clocks. A
    /// sole voter that leads needs nobody's answer.
    pub fn lease_valid(&self) -> bool {
        let leadership = *self.leadership.borrow();
        if !leadership.is_leader || self.given_up.load(Ordering::SeqCst) >= leadership.term {
            return false;
        }
        if watcher::is_sole_voter(&self.local, &self.raft) {
            return true;
        }
        let metrics = self.raft.data_metrics();
        let acked = metrics.borrow_watched().last_quorum_acked;
        acked.is_some_and(|at| at.elapsed() < self.settings.election_min)
    }

    /// For operators.
    pub fn status(&self) -> GroupStatus {
        let metrics = self.raft.metrics();
        let metrics = metrics.borrow_watched().clone();
        let index = |at: Option<super::types::LogId>| at.map_or(0, |at| at.index());
        let membership = metrics.membership_config.membership();
        let voters = membership.voter_ids().filter_map(|id| Some((id, membership.get_node(&id)?.clone()))).collect();
        GroupStatus {
            replica: self.local.replica,
            term: metrics.current_term,
            leader: metrics.current_leader,
            last_log_index: metrics.last_log_index.unwrap_or(0),
            applied_index: index(metrics.last_applied),
            committed_index: index(metrics.local_committed),
            purged_index: index(metrics.purged),
            stopped: self.stopped.borrow().clone(),
            voters,
        }
    }

    /// Becomes `Some(why)` when the group stops on this node, by an error or [`Group::shutdown`].
    pub fn stopped(&self) -> watch::Receiver<Option<String>> {
        self.stopped.clone()
    }

    /// Highest index that every replica is known to have on disk. A leader knows it; others know what it told them.
    pub fn replicated_everywhere(&self) -> u64 {
        self.local.everywhere()
    }

    /// Lets the log forget what a checkpoint up to `index` covers and every replica has, but for the newest
    /// [`RaftSettings::kept_entries`]; those up to `pinned` are not kept, because they hold up the cleaning of the node's log
    /// ([`Log::pins`]; 0 for none). Returns the index up to which it may forget; 0 when there is nothing.
    pub async fn purge_upto(&self, index: u64, pinned: u64) -> Result<u64, GroupError> {
        let failed = |what: String| GroupError { group: self.id(), what: format!("cannot be purged: {what}") };
        let possible = index.min(self.replicated_everywhere());
        let upto = possible.saturating_sub(self.settings.kept_entries).max(pinned.min(possible));
        if upto == 0 || self.local.log.purged().is_some_and(|purged| purged.index >= upto) {
            return Ok(upto);
        }
        // openraft never purges beyond what it takes for its snapshot.
        let mut metrics = self.raft.data_metrics();
        if metrics.borrow_watched().snapshot.is_none_or(|at| at.index() < upto) {
            self.raft.trigger().snapshot().await.map_err(|e| failed(e.to_string()))?;
            while metrics.borrow_watched().snapshot.is_none_or(|at| at.index() < upto) {
                metrics.changed().await.map_err(|_| failed("the group has stopped".to_owned()))?;
            }
        }
        self.raft.trigger().purge_log(upto).await.map_err(|e| failed(e.to_string()))?;
        Ok(upto)
    }

    /// Hands leadership to a caught-up voter that answered lately, if there is one; returns who was asked. Best effort: the
    /// leadership watch tells how it went.
    pub async fn step_down(&self) -> Result<Option<u64>, GroupError> {
        let Some(to) = self.successor() else { return Ok(None) };
        self.transfer_leader(to).await?;
        Ok(Some(to))
    }

    /// Hands leadership to this replica; refused unless it is a voter, caught up, and answered lately: a transfer that fails
    /// leaves the group without a leader for an election.
    pub async fn transfer_leader(&self, to: u64) -> Result<(), GroupError> {
        let failed = |what: String| GroupError { group: self.id(), what };
        if !self.caught_up_voters().contains(&to) {
            return Err(failed(format!("replica {to} is not ready to lead")));
        }
        self.given_up.fetch_max(self.leadership.borrow().term, Ordering::SeqCst);
        self.raft.trigger().transfer_leader(to).await.map_err(|e| failed(e.to_string()))
    }

    /// Stops the replica; it can be started again.
    pub async fn shutdown(&self) {
        self.network.deregister(&self.local);
        if let Err(e) = self.raft.shutdown().await {
            tracing::warn!(group = %self.id(), error = %e, "the group did not end in order");
        }
        self.ending.cancel();
    }

    fn successor(&self) -> Option<u64> {
        self.caught_up_voters().first().copied()
    }

    /// Voters that this leader could hand over to, the most advanced first.
    fn caught_up_voters(&self) -> Vec<u64> {
        let membership = self.raft.server_metrics().borrow_watched().membership_config.clone();
        let metrics = self.raft.data_metrics();
        let metrics = metrics.borrow_watched();
        let (Some(replication), Some(heartbeat)) = (&metrics.replication, &metrics.heartbeat) else {
            return Vec::new();
        };
        let last = metrics.last_log.map_or(0, |at| at.index());
        let lately = |id: &u64| {
            let heard = heartbeat.get(id).copied().flatten();
            heard.is_some_and(|at| at.elapsed() < self.settings.election_min)
        };
        let matched = |id: &u64| replication.get(id).copied().flatten().map_or(0, |at| at.index());
        let mut ready: Vec<u64> = membership
            .voter_ids()
            .filter(|id| *id != self.local.replica && lately(id))
            .filter(|id| matched(id) + super::settings::TRANSFER_LAG >= last)
            .collect();
        ready.sort_by_key(|id| std::cmp::Reverse(matched(id)));
        ready
    }

    fn forward(&self, forward: &ForwardToLeader<Types>) -> (Option<u64>, u64) {
        (forward.leader_id.filter(|id| *id != self.local.replica), self.leadership.borrow().term)
    }
}

/// How this replica stands, by openraft's metrics.
pub(super) fn leadership(raft: &Raft, replica: u64, led: u64) -> Leadership {
    let metrics = raft.server_metrics();
    let metrics = metrics.borrow_watched();
    let vote = super::types::plain_vote(&metrics.vote);
    let is_leader = metrics.state == ServerState::Leader && vote.committed && vote.replica == replica;
    Leadership {
        term: vote.term,
        leader: metrics.current_leader,
        is_leader,
        first_applied: is_leader && led == vote.term,
    }
}

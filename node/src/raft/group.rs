//! A running Raft group, as the rest of the node sees it.
//!
//! Left out for now: changes of membership.

use std::{
    collections::BTreeMap,
    fmt,
    future::Future,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use futures::{StreamExt, stream::FuturesUnordered};
use openraft::{
    Instant as _, ReadPolicy, ServerState,
    async_runtime::watch::WatchReceiver,
    errors::{ClientWriteError, ForwardToLeader, InitializeError, LinearizableReadError, RaftError},
};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::{
    client::{Clients, Standing},
    local::Local,
    machine::{Applier, Machine, Reply},
    network::Network,
    park::{self, Decisions, Parking, Stop},
    settings::RaftSettings,
    snapshot::Snapshots,
    storage::Storage,
    time::GroupTime,
    types::{Command, Raft, Types},
    watcher,
};
use crate::log::{GroupId, Log};

/// Between two looks for a successor that is caught up.
const SUCCESSOR_PAUSE: Duration = Duration::from_millis(50);
/// Looks that find nobody who would lead, before it is given up.
const UNWILLING_MAX: u32 = 4;

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
    /// Replicas in the order in which they are to lead; empty: in no order.
    pub preference: Vec<u64>,
    /// Timers and bounds.
    pub settings: RaftSettings,
    /// What was decided of single entries.
    pub decisions: Arc<dyn Decisions>,
    /// The group's own time, if it has one.
    pub time: Arc<dyn GroupTime>,
    /// Where snapshots come from and go to.
    pub snapshots: Arc<dyn Snapshots>,
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

impl Leadership {
    /// A replica that waits before an entry leads nothing.
    pub(super) fn unless(self, waits: bool) -> Leadership {
        match waits {
            true => {
                Leadership { term: self.term, leader: self.leader.filter(|_| !self.is_leader), ..Default::default() }
            }
            false => self,
        }
    }
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

/// What came of handing leadership over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HandedOver {
    /// There was nothing to hand over.
    NotLeading,
    /// It is the only voter: there is nobody to hand it to.
    Alone,
    /// Another replica leads.
    Moved,
    /// No voter that answers would take it.
    NobodyWilling,
    /// Not within the time given. Whoever was asked may still take it.
    Late,
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
    /// What stopped the group, if it has stopped, or what it waits for.
    pub stopped: Option<String>,
    /// The entry before which the replica waits.
    pub waits: Option<Stop>,
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
    parking: Arc<Parking>,
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
        let GroupConfig { group, replica, preference, settings, decisions, time, snapshots } = config;
        let failed = |what: String| GroupError { group, what };
        let log = log.group(group);
        let fresh = log.vote().is_none() && log.last().is_none() && !log.is_behind();
        let (led_tx, led) = watch::channel(0);
        let (parking, machine) = (Parking::new(group, decisions), Arc::new(Mutex::new(machine)));
        let applier = |replays_upto| {
            let (log, led, parking, snapshots) = (log.clone(), led_tx.clone(), parking.clone(), snapshots.clone());
            let applier = Applier::new(&machine, replica, log, led, parking, replays_upto, snapshots);
            applier.map_err(|e| failed(e.to_string()))
        };
        let storage = Storage::new(log.clone());
        let replays_upto = storage.committed().map_or(0, |at| at.index());
        let first = applier(replays_upto)?;
        if let Some(what) = first.contradiction() {
            return Err(failed(format!("replica {replica} cannot start: {what}")));
        }
        if let Some(applied) = first.applied().map(|at| super::types::position(&at))
            && log.purged().is_none_or(|purged| purged.index < applied.index)
            && log.at(applied.index) != Some(applied)
        {
            // A snapshot was switched to, and the node ended before the log was purged to it: what is there contradicts it or ends
            // before it, and was never committed beyond.
            tracing::warn!(%group, replica, %applied, "the log is purged to a snapshot that was installed before");
            let purged = async {
                log.truncate(0).await?;
                log.purge(applied).await
            };
            purged.await.map_err(|e| failed(e.to_string()))?;
        }
        let local = Arc::new(Local::new(group, replica, preference, log.clone(), time, snapshots.clone(), !fresh));
        let openraft = Arc::new(settings.openraft(group, fresh).map_err(|e| failed(e.to_string()))?);
        let clients = || Clients { network: network.clone(), local: local.clone() };
        let raft = match Raft::new(replica, openraft.clone(), clients(), storage, first).await {
            // It applied what it could. The rest it applies, or waits for, while it runs, so that others have its vote and log.
            Err(_) if parking.now().is_some() => {
                let rest = applier(0)?;
                let storage = Storage::replaying_upto(log.clone(), rest.applied());
                Raft::new(replica, openraft, clients(), storage, rest).await
            }
            started => started,
        };
        let raft = raft.map_err(|e| failed(format!("replica {replica} cannot start: {e}")))?;
        // Set here only, once.
        let _ = local.raft.set(raft.clone());
        network.register(local.clone(), settings.heartbeat);

        let ending = CancellationToken::new();
        let (leadership, stopped) = watcher::follow(network, &local, &raft, led, &parking, &settings, ending.clone());
        let group = Group {
            local,
            raft,
            network: network.clone(),
            settings,
            leadership,
            stopped,
            parking: parking.clone(),
            given_up: Arc::default(),
            ending,
        };
        network.spawn(park::hand_over(group.clone(), parking));
        Ok(group)
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
        let mut waits = self.parking.follow();
        if waits.borrow_and_update().is_some() {
            return Err(ProposeError::NotLeader { leader: None, term: self.leadership.borrow().term });
        }
        let answer = tokio::select! {
            biased;
            answer = self.raft.client_write(Command(payload)) => answer,
            // What was applied before it is answered; this is behind it, and may be applied when it is skipped.
            stop = waits.wait_for(Option::is_some) => {
                let words = stop.ok().and_then(|stop| stop.as_ref().map(Stop::to_string));
                return Err(ProposeError::Stopped(words.unwrap_or_default()));
            }
        };
        match answer {
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
        let mut waits = self.parking.follow();
        let reached = tokio::select! {
            biased;
            reached = barrier.await_ready(&self.raft) => reached,
            stop = waits.wait_for(Option::is_some) => {
                let words = stop.ok().and_then(|stop| stop.as_ref().map(Stop::to_string));
                return Err(ReadError::Stopped(words.unwrap_or_default()));
            }
        };
        Ok(reached.map_err(|fatal| ReadError::Stopped(fatal.to_string()))?.read_log_id().index())
    }

    /// Whether no other replica can lead at this moment: a quorum has answered something that was sent less than the election
    /// minimum ago (no voter of it votes before the election maximum). The gap between the two is the margin for clocks. What
    /// was sent before the lines to a majority closed does not count: voters that have lost their leader do not wait. A sole
    /// voter that leads needs nobody's answer.
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
        acked.is_some_and(|at| at.elapsed() < self.settings.election_min && self.local.is_reached_since(*at))
    }

    /// Whether the entries behind `index` take at least so many bytes of the log.
    pub fn has_grown(&self, index: u64, bytes: u64) -> bool {
        self.local.log.has_grown(index, bytes)
    }

    /// Last index purged from the log, 0 when none was.
    pub fn purged(&self) -> u64 {
        self.local.log.purged().map_or(0, |at| at.index)
    }

    /// For operators.
    pub fn status(&self) -> GroupStatus {
        let metrics = self.raft.metrics();
        let metrics = metrics.borrow_watched().clone();
        let index = |at: Option<super::types::LogId>| at.map_or(0, |at| at.index());
        let membership = metrics.membership_config.membership();
        let waits = self.parking.now();
        let voters = membership.voter_ids().filter_map(|id| Some((id, membership.get_node(&id)?.clone()))).collect();
        GroupStatus {
            replica: self.local.replica,
            term: metrics.current_term,
            leader: metrics.current_leader,
            last_log_index: metrics.last_log_index.unwrap_or(0),
            applied_index: index(metrics.last_applied),
            committed_index: index(metrics.local_committed),
            purged_index: index(metrics.purged),
            stopped: self.stopped.borrow().clone().or_else(|| waits.as_ref().map(Stop::to_string)),
            waits,
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

    /// Lets the log forget what a base file up to `index` holds, but for the newest [`RaftSettings::kept_entries`] and what a
    /// replica still lacks; those up to `pinned` are kept for neither, because they hold up the cleaning of the node's log
    /// ([`Log::pins`]; 0 for none): a replica that lacks them gets a snapshot. What the receiver of a snapshot goes on from is
    /// kept in any case. Returns the index up to which it may forget; 0 when there is nothing.
    pub async fn purge_upto(&self, index: u64, pinned: u64) -> Result<u64, GroupError> {
        let failed = |what: String| GroupError { group: self.id(), what: format!("cannot be purged: {what}") };
        if self.parking.now().is_some() {
            // Its machine is busy waiting, and has applied nothing since.
            return Ok(0);
        }
        let possible = index.min(self.local.purge_limit());
        let wanted = possible.min(self.replicated_everywhere()).saturating_sub(self.settings.kept_entries);
        let upto = wanted.max(pinned.min(possible));
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

    /// Takes no leadership from now on: the node is about to stop.
    pub fn leave(&self) {
        self.local.leave();
        self.raft.runtime_config().elect(false);
    }

    /// Hands leadership to a voter that is caught up and takes it, and waits until another leads; as long as one lags it is
    /// waited for. Writes go on until the moment of the transfer.
    pub async fn hand_over(&self, within: Duration) -> HandedOver {
        if !self.leadership.borrow().is_leader {
            return HandedOver::NotLeading;
        }
        if self.raft.server_metrics().borrow_watched().membership_config.voter_ids().all(|id| id == self.local.replica)
        {
            return HandedOver::Alone;
        }
        tokio::time::timeout(within, self.hand_over_to_any()).await.unwrap_or(HandedOver::Late)
    }

    async fn hand_over_to_any(&self) -> HandedOver {
        let mut leadership = self.leadership();
        for unwilling in 1.. {
            if !leadership.borrow().is_leader {
                break;
            }
            let (ready, any) = self.successors().await;
            if let Some(to) = ready.first() {
                if let Err(e) = self.give_to(*to).await {
                    tracing::info!(group = %self.id(), error = %e, "leadership is not handed over");
                    return HandedOver::Late;
                }
                break;
            }
            if !any && unwilling >= UNWILLING_MAX {
                return HandedOver::NobodyWilling;
            }
            tokio::time::sleep(SUCCESSOR_PAUSE).await;
        }
        let own = self.local.replica;
        match leadership.wait_for(|now| now.leader.is_some_and(|leader| leader != own)).await {
            Ok(_) => HandedOver::Moved,
            Err(_) => HandedOver::Late,
        }
    }

    /// Hands leadership to this replica; refused unless it is a voter, caught up, answers now and takes it: a transfer that
    /// fails leaves the group without a leader for an election (openraft #2088). The leadership watch tells how it went.
    pub async fn transfer_leader(&self, to: u64) -> Result<(), GroupError> {
        if !self.successors().await.0.contains(&to) {
            return Err(GroupError { group: self.id(), what: format!("replica {to} is not ready to lead") });
        }
        self.give_to(to).await
    }

    pub(super) async fn give_to(&self, to: u64) -> Result<(), GroupError> {
        self.given_up.fetch_max(self.leadership.borrow().term, Ordering::SeqCst);
        let failed = |what: String| GroupError { group: self.id(), what };
        self.raft.trigger().transfer_leader(to).await.map_err(|e| failed(e.to_string()))
    }

    /// The replica that should lead instead of this one, if it is ready: the first of the list that is live, once it has been up
    /// for [`RaftSettings::balance_after`] and is caught up. `None` also when this replica is that one, or does not lead.
    pub fn preferred(&self) -> Option<u64> {
        if !self.leadership.borrow().first_applied {
            return None;
        }
        let membership = self.raft.server_metrics().borrow_watched().membership_config.clone();
        for id in self.local.preference() {
            if *id == self.local.replica {
                return None;
            }
            let up_for = membership.get_node(id).map(|member| self.network.presence().up_for(member.node));
            if up_for.is_some_and(|up| !up.is_zero()) {
                let is_ready = up_for >= Some(self.settings.balance_after) && self.caught_up_voters().contains(id);
                return is_ready.then_some(*id);
            }
        }
        None
    }

    /// What the wall clocks of the other voters' nodes say now, as far as they were heard lately; milliseconds since 1970.
    pub fn peer_clocks_ms(&self) -> Vec<u64> {
        let membership = self.raft.server_metrics().borrow_watched().membership_config.clone();
        let others = membership.voter_ids().filter_map(|id| Some(membership.get_node(&id)?.node));
        self.network.presence().clocks_ms(others.filter(|node| *node != self.network.node()))
    }

    /// The highest state version that every replica of the group, learners too, announces at this moment. `None` while one of
    /// them is not heard.
    pub fn state_version_announced(&self) -> Option<u32> {
        let membership = self.raft.server_metrics().borrow_watched().membership_config.clone();
        let presence = self.network.presence();
        let others = membership.nodes().map(|(_, member)| member.node).filter(|node| *node != self.network.node());
        Some(presence.state_version_of(others)?.min(presence.own_state_version()))
    }

    /// The group's own time as another voter knows it, milliseconds since 1970: the first that answers and knows. `None` when none
    /// does within the election minimum.
    pub async fn time_of_others_ms(&self) -> Option<u64> {
        let mut asked = self.standings();
        while let Some((_, standing)) = asked.next().await {
            if let Some(time_ms) = standing.and_then(|standing| standing.time_ms) {
                return Some(time_ms);
            }
        }
        None
    }

    /// Stops the replica; it can be started again.
    pub async fn shutdown(&self) {
        self.network.deregister(&self.local);
        self.parking.ending.cancel();
        if let Err(e) = self.raft.shutdown().await {
            tracing::warn!(group = %self.id(), error = %e, "the group did not end in order");
        }
        self.ending.cancel();
    }

    /// Voters that are caught up and say that they would lead, the best first; and whether any voter that answers would.
    pub(super) async fn successors(&self) -> (Vec<u64>, bool) {
        let standings: Vec<_> = self.standings().collect().await;
        let is_willing = |standing: Option<Standing>| standing.is_some_and(|standing| standing.is_willing);
        let willing: Vec<u64> =
            standings.into_iter().filter(|(_, standing)| is_willing(*standing)).map(|(id, _)| id).collect();
        let ready = self.caught_up_voters().into_iter().filter(|id| willing.contains(id)).collect();
        (ready, !willing.is_empty())
    }

    /// Asks the other voters how they stand, all at once; each with its answer as it comes, `None` for one that does not answer
    /// within the election minimum.
    fn standings(&self) -> FuturesUnordered<impl Future<Output = (u64, Option<Standing>)> + use<>> {
        let membership = self.raft.server_metrics().borrow_watched().membership_config.clone();
        let others = membership.voter_ids().filter(|id| *id != self.local.replica);
        let asked = others.filter_map(|id| {
            let clients = Clients { network: self.network.clone(), local: self.local.clone() };
            let (member, within) = (membership.get_node(&id)?.clone(), self.settings.election_min);
            Some(async move { (id, clients.standing(id, &member, within).await) })
        });
        asked.collect()
    }

    /// Whether this replica has the leadership, also while it waits and makes no use of it.
    pub(super) fn leads_unmasked(&self) -> bool {
        leadership(&self.raft, self.local.replica, 0).is_leader
    }

    /// Voters that this leader could hand over to by their logs, the most advanced first.
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
        ready.sort_by_key(|id| (std::cmp::Reverse(matched(id)), self.local.place(*id)));
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

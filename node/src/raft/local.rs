//! One group on this node, as its network sees it: what peers may ask of it, and what it may tell them.

use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex, OnceLock,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
};

use openraft::{Instant as _, async_runtime::watch::WatchReceiver, type_config::alias::InstantOf};

use tokio::time::Instant;

use super::{
    snapshot::Snapshots,
    time::GroupTime,
    types::{LogId, Raft, Types, Vote, log_id, position, vote},
};
use crate::log::{GroupId, GroupLog};

/// Shared by the group's handle, its clients to peers, and the service that peers call.
pub(super) struct Local {
    pub(super) group: GroupId,
    pub(super) replica: u64,
    /// Replicas in the order in which they are to lead.
    preference: Vec<u64>,
    pub(super) log: GroupLog,
    /// The group's own time here.
    pub(super) time: Arc<dyn GroupTime>,
    pub(super) snapshots: Arc<dyn Snapshots>,
    /// Set once, when the group runs.
    pub(super) raft: OnceLock<Raft>,
    /// Neither votes nor campaigns: it restarted just now, or dropped a drain and is not caught up.
    pub(super) quiet: AtomicBool,
    /// Every replica has the log up to here on disk, as some leader said.
    everywhere: AtomicU64,
    /// What a leader said, in this process, is committed: an entry of its own term, so everything before is too.
    heard: Mutex<Option<LogId>>,
    /// A replica that dropped a drain and has heard every voter votes only above this.
    floor: Mutex<Option<Floor>>,
    /// About to stop: takes no leadership.
    leaving: AtomicBool,
    /// Waits before an entry: takes no leadership.
    waiting: AtomicBool,
    /// The term in which this replica campaigns because a majority has lost the leader before, and that leader's node.
    claim: Mutex<Option<(u64, u64)>>,
    /// As a leader it was cut off from a majority at this time: what was sent before is no lease.
    cut_off: Mutex<Option<InstantOf<Types>>>,
    /// Replicas that may lose what they had once, and the term in which that was allowed.
    reverts: Mutex<BTreeMap<u64, u64>>,
    /// From which indexes on the log is kept for receivers of snapshots, and until when if that is known.
    kept: Mutex<BTreeMap<u64, (u64, Option<Instant>)>>,
}

/// The newest that the voters of a group have, all of them having answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Floor {
    /// Highest term in which any of them has voted: whatever vote was dropped, it was not in a later one.
    pub(super) term: u64,
    /// The newest log.
    pub(super) last: Option<LogId>,
}

impl std::fmt::Debug for Local {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Local").field("group", &self.group).field("replica", &self.replica).finish_non_exhaustive()
    }
}

impl Local {
    pub(super) fn new(
        group: GroupId,
        replica: u64,
        preference: Vec<u64>,
        log: GroupLog,
        time: Arc<dyn GroupTime>,
        snapshots: Arc<dyn Snapshots>,
        quiet: bool,
    ) -> Local {
        Local {
            group,
            replica,
            preference,
            log,
            time,
            snapshots,
            raft: OnceLock::new(),
            quiet: AtomicBool::new(quiet),
            everywhere: AtomicU64::new(0),
            heard: Mutex::default(),
            floor: Mutex::default(),
            leaving: AtomicBool::new(false),
            waiting: AtomicBool::new(false),
            claim: Mutex::default(),
            cut_off: Mutex::default(),
            reverts: Mutex::default(),
            kept: Mutex::default(),
        }
    }

    pub(super) fn is_quiet(&self) -> bool {
        self.quiet.load(Ordering::SeqCst)
    }

    /// Replicas in the order in which they are to lead.
    pub(super) fn preference(&self) -> &[u64] {
        &self.preference
    }

    /// A replica's place in that order; one that is not named comes last.
    pub(super) fn place(&self, replica: u64) -> usize {
        self.preference.iter().position(|id| *id == replica).unwrap_or(usize::MAX)
    }

    /// Takes no leadership from now on.
    pub(super) fn leave(&self) {
        self.leaving.store(true, Ordering::SeqCst);
    }

    /// Whether it takes no leadership any more.
    pub(super) fn is_leaving(&self) -> bool {
        self.leaving.load(Ordering::SeqCst)
    }

    /// Whether it would not take leadership now.
    pub(super) fn is_unwilling(&self) -> bool {
        self.is_quiet() || self.is_leaving() || self.waiting.load(Ordering::SeqCst)
    }

    /// Whether it waits before an entry that it cannot apply.
    pub(super) fn set_waiting(&self, waits: bool) {
        self.waiting.store(waits, Ordering::SeqCst);
    }

    /// Whether it waits before an entry that it cannot apply.
    pub(super) fn waits(&self) -> bool {
        self.waiting.load(Ordering::SeqCst)
    }

    /// The log is kept behind `index` until [`Local::keep_until`] says how long.
    pub(super) fn keep_from(&self, key: u64, index: u64) -> u64 {
        self.kept.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).insert(key, (index, None));
        key
    }

    /// What was kept under `key` may go from then on.
    pub(super) fn keep_until(&self, key: u64, until: Instant) {
        if let Some(kept) = self.kept.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).get_mut(&key) {
            kept.1 = Some(until);
        }
    }

    /// The highest index to which the log may be purged for the sake of receivers of snapshots.
    pub(super) fn purge_limit(&self) -> u64 {
        let now = Instant::now();
        let mut kept = self.kept.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        kept.retain(|_, (_, until)| until.is_none_or(|until| now < until));
        kept.values().map(|(index, _)| *index).min().unwrap_or(u64::MAX)
    }

    /// Votes asked for in `term` say that a majority has lost the leader on `node`.
    pub(super) fn claim(&self, term: u64, node: u64) {
        *self.claim.lock().unwrap_or_else(|poisoned| poisoned.into_inner()) = Some((term, node));
    }

    /// The node whose loss is the reason of a campaign in `term`.
    pub(super) fn claimed(&self, term: u64) -> Option<u64> {
        let claim = *self.claim.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        claim.filter(|(claimed, _)| *claimed == term).map(|(_, node)| node)
    }

    /// A majority cannot be reached at this moment.
    pub(super) fn cut_off(&self) {
        *self.cut_off.lock().unwrap_or_else(|poisoned| poisoned.into_inner()) = Some(InstantOf::<Types>::now());
    }

    /// Whether something that a majority has acknowledged was sent since this leader was last cut off from it.
    pub(super) fn is_reached_since(&self, sent: InstantOf<Types>) -> bool {
        self.cut_off.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).is_none_or(|at| sent > at)
    }

    /// The newest vote, as a refusal carries it.
    pub(super) fn own_vote(&self) -> Vote {
        self.log.vote().map_or_else(|| Vote::new(0, self.replica), vote)
    }

    pub(super) fn last(&self) -> Option<LogId> {
        self.log.last().map(log_id)
    }

    /// Highest index that every replica has on disk: of a leader by what it has seen, else by what the last leader said.
    pub(super) fn everywhere(&self) -> u64 {
        if let Some(index) = self.raft.get().and_then(|raft| replicated_everywhere(raft, self.replica)) {
            self.hear_everywhere(index);
        }
        self.everywhere.load(Ordering::SeqCst)
    }

    pub(super) fn hear_everywhere(&self, index: u64) {
        self.everywhere.fetch_max(index, Ordering::SeqCst);
    }

    /// The replica dropped a drain: lets openraft send again what it once acknowledged. Without this the leader's group would
    /// stop at the contradiction.
    pub(super) async fn allow_revert(&self, target: u64, term: u64) -> bool {
        let Some(raft) = self.raft.get() else { return false };
        let allowed = matches!(raft.trigger().allow_next_revert(&target, true).await, Ok(Ok(())));
        if allowed {
            self.reverts().insert(target, term);
        }
        allowed
    }

    pub(super) fn revert_allowed(&self, target: u64, term: u64) -> bool {
        self.reverts().get(&target) == Some(&term)
    }

    /// A leader of this term says that entries up to `committed` are.
    pub(super) fn hear_committed(&self, term: u64, committed: Option<LogId>) {
        if committed.is_some_and(|at| position(&at).term == term) {
            let mut heard = self.heard.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
            *heard = (*heard).max(committed);
        }
    }

    pub(super) fn heard_committed(&self) -> Option<LogId> {
        *self.heard.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    pub(super) fn floor(&self) -> Option<Floor> {
        *self.floor.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    pub(super) fn set_floor(&self, floor: Option<Floor>) {
        *self.floor.lock().unwrap_or_else(|poisoned| poisoned.into_inner()) = floor;
    }

    fn reverts(&self) -> std::sync::MutexGuard<'_, BTreeMap<u64, u64>> {
        self.reverts.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

/// As a leader knows it; `None` when it does not lead.
fn replicated_everywhere(raft: &Raft, replica: u64) -> Option<u64> {
    let membership = raft.server_metrics().borrow_watched().membership_config.clone();
    let metrics = raft.data_metrics();
    let metrics = metrics.borrow_watched();
    let replication = metrics.replication.as_ref()?;
    let others = membership.nodes().map(|(id, _)| *id).filter(|id| *id != replica);
    let matched = others.map(|id| replication.get(&id).copied().flatten().map_or(0, |at| at.index()));
    // Its own log is on disk at least as far as it is committed by itself or others; applied is what may be purged anyway.
    let own = metrics.last_applied.map_or(0, |at| at.index());
    Some(matched.min().map_or(own, |least| least.min(own)))
}

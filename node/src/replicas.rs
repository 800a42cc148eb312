//! The Raft groups that run on this node, by number.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use martlet_proto::cluster::admin::{GroupStatus, Poison};

use crate::{
    log::GroupId,
    raft::{Group, Stop, Why},
    store::ShardStore,
};

/// One running replica.
#[derive(Debug, Clone)]
pub struct Replica {
    /// Replica id, given by the meta group.
    pub id: u64,
    /// Its Raft group.
    pub group: Group,
    /// Its rows.
    pub rows: Arc<ShardStore>,
}

/// All replicas of this node; clones show the same ones.
#[derive(Debug, Clone, Default)]
pub struct Replicas(Arc<Mutex<Held>>);

#[derive(Debug, Default)]
struct Held {
    running: BTreeMap<GroupId, Replica>,
    /// Why the last try to open a replica failed, until one succeeds.
    refused: BTreeMap<GroupId, String>,
}

impl Replicas {
    /// Adds a replica that was started.
    pub fn insert(&self, replica: Replica) {
        let mut held = self.lock();
        held.refused.remove(&replica.group.id());
        held.running.insert(replica.group.id(), replica);
    }

    /// Notes why a replica cannot be opened.
    pub fn refuse(&self, group: GroupId, why: String) {
        self.lock().refused.insert(group, why);
    }

    /// Why a replica that is missing could not be opened, if it was tried.
    pub fn refusal(&self, group: GroupId) -> Option<String> {
        self.lock().refused.get(&group).cloned()
    }

    /// Whether the group runs here.
    pub fn holds(&self, group: GroupId) -> bool {
        self.lock().running.contains_key(&group)
    }

    /// All of them, the meta group first.
    pub fn all(&self) -> Vec<Replica> {
        self.lock().running.values().cloned().collect()
    }

    /// What operators are told of each.
    pub fn status(&self) -> Vec<GroupStatus> {
        self.all().iter().map(Replica::status).collect()
    }

    fn lock(&self) -> MutexGuard<'_, Held> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Replica {
    /// Index up to which a checkpoint holds everything, 0 when there is none.
    pub fn checkpointed(&self) -> u64 {
        self.rows.checkpointed().unwrap_or(0)
    }

    /// For operators; `applied_index` and `state_hash` belong together. What is not of the group (`hold`, `state_version`) is left
    /// to whoever answers.
    pub fn status(&self) -> GroupStatus {
        let raft = self.group.status();
        let (applied_index, state_hash) = self.applied();
        GroupStatus {
            group: self.group.id().0,
            replica_id: self.id,
            term: raft.term,
            leader_replica: raft.leader.unwrap_or(0),
            last_log_index: raft.last_log_index,
            applied_index,
            checkpointed_index: self.checkpointed(),
            stopped: raft.stopped.unwrap_or_default(),
            state_hash,
            poison: raft.waits.map(poison),
            hold: 0,
            state_version: 0,
        }
    }

    fn applied(&self) -> (u64, u64) {
        let index = || self.rows.mark().map_or(0, |mark| mark.index);
        loop {
            let (before, hash) = (index(), self.rows.hash());
            if index() == before {
                return (before, hash);
            }
        }
    }
}

/// An entry before which a replica waits; one that it did not try has no operation.
fn poison(stop: Stop) -> Poison {
    let Stop { at, digest, why, .. } = stop;
    let (operation, what) = match why {
        Why::Poison { operation, what } => (operation, what),
        Why::Held | Why::OtherEntry => Default::default(),
    };
    Poison { index: at.index, term: at.term, digest: digest.to_vec().into(), operation, what }
}

//! Moves what is old from memory and log to sled, and lets the log forget it.
//!
//! The store decides which shards are due; this drives it, once a second, early when the log has grown. A group's log is purged up
//! to what *every* replica of the group has checkpointed, as far as this node has heard: snapshots between nodes are not built, so a
//! replica that was away must find in its peers' logs all that it lacks. The price: while a node is away, the others keep log for
//! it, without a bound but the disk's.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use futures::future::join_all;
use martlet_proto::cluster::{
    admin::StatusRequest,
    meta::{MetaState, Node},
};
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;

use crate::{
    log::GroupId,
    parts::Parts,
    store::{StoreError, Which},
};

/// Between two looks.
const TICK: Duration = Duration::from_secs(1);
/// Looks between two questions to peers.
const ASK_EVERY: u32 = 10;
const ASK_MAX: Duration = Duration::from_secs(2);

/// What peers have checkpointed, by group and replica; only rises.
#[derive(Debug, Default)]
struct Heard(BTreeMap<(GroupId, u64), u64>);

/// Runs cycles until `end` fires, or the store says that only opening it anew helps: then the node must stop, and the log holds
/// what the store could not keep. Owned by the node, which awaits it.
pub(crate) async fn run(parts: Arc<Parts>, end: CancellationToken) -> Result<(), StoreError> {
    let mut heard = Heard::default();
    for tick in 1_u32.. {
        tokio::select! { () = end.cancelled() => return Ok(()), () = sleep(TICK) => {} }
        let long = parts.log.bytes() > parts.config.log.checkpoint_bytes;
        // Once in a while only: the log stays long when a peer is away, and then a checkpoint does not help.
        let which = if long && tick % ASK_EVERY == 0 { Which::All } else { Which::Due };
        let moved = match cycle(&parts, which).await {
            Ok(moved) => moved,
            Err(error @ StoreError::Broken(_)) => return Err(error),
            Err(_) => false,
        };
        if moved || tick % ASK_EVERY == 0 {
            let state = Arc::clone(&parts.keeper.kept().borrow());
            if tick % ASK_EVERY == 0 {
                heard.ask(&parts, &state).await;
            }
            purge(&parts, &state, &heard).await;
        }
    }
    Ok(())
}

/// One cycle; whether anything was moved. A failure is logged and counted: the log keeps what the store could not.
pub(crate) async fn cycle(parts: &Arc<Parts>, which: Which) -> Result<bool, StoreError> {
    let begun = parts.clock.now();
    let store = Arc::clone(&parts.store);
    let work = move || {
        let done = store.checkpoint(which)?;
        // What a dropped replica left goes in small batches, between cycles.
        store.sweep()?;
        Ok(done)
    };
    let done =
        tokio::task::spawn_blocking(work).await.unwrap_or_else(|error| Err(StoreError::Broken(error.to_string())));
    match done {
        Ok(done) if done.seals.is_empty() => Ok(false),
        Ok(_) => {
            parts.metrics.checkpoints.inc();
            let took = parts.clock.now().saturating_duration_since(begun);
            parts.metrics.checkpoint_seconds.observe(took.as_secs_f64());
            Ok(true)
        }
        Err(error) => {
            parts.metrics.checkpoint_failures.inc();
            tracing::error!(%error, "a checkpoint failed; the log keeps what it was to move");
            Err(error)
        }
    }
}

async fn purge(parts: &Parts, state: &MetaState, heard: &Heard) {
    for replica in parts.replicas.all() {
        let group = replica.group.id();
        let everywhere = others(parts, state, group).map(|other| heard.of(group, other)).min();
        let upto = everywhere.unwrap_or(u64::MAX).min(replica.checkpointed());
        if upto == 0 {
            continue;
        }
        if let Err(error) = replica.group.purge_upto(upto).await {
            tracing::warn!(%error, %group, upto, "the log could not be purged");
        }
    }
}

/// Replicas of the group on other nodes.
fn others(parts: &Parts, state: &MetaState, group: GroupId) -> impl Iterator<Item = u64> {
    let own = parts.config.node.id;
    let voters = match group.shard() {
        Some(shard) => state
            .shards
            .iter()
            .filter(|other| other.shard == u32::from(shard))
            .flat_map(|shard| &shard.replicas)
            .map(|replica| (replica.node_id, replica.replica_id))
            .collect(),
        None => parts
            .replicas
            .all()
            .iter()
            .filter(|replica| replica.group.id() == group)
            .flat_map(|replica| replica.group.status().voters)
            .map(|(replica, member)| (member.node, replica))
            .collect::<Vec<_>>(),
    };
    voters.into_iter().filter(move |(node, _)| *node != own).map(|(_, replica)| replica)
}

impl Heard {
    fn of(&self, group: GroupId, replica: u64) -> u64 {
        self.0.get(&(group, replica)).copied().unwrap_or(0)
    }

    async fn ask(&mut self, parts: &Parts, state: &MetaState) {
        let others = state.nodes.iter().filter(|node| node.node_id != parts.config.node.id);
        for (group, replica, checkpointed) in join_all(others.map(|node| ask(parts, node))).await.into_iter().flatten()
        {
            let known = self.0.entry((group, replica)).or_default();
            *known = checkpointed.max(*known);
        }
    }
}

/// What one peer has checkpointed; nothing when it does not answer.
async fn ask(parts: &Parts, node: &Node) -> Vec<(GroupId, u64, u64)> {
    let Ok(mut admin) = parts.peers.admin(&node.address) else { return Vec::new() };
    let request = StatusRequest { cluster_wide: false };
    let Ok(Ok(reply)) = timeout(ASK_MAX, admin.status(request)).await else { return Vec::new() };
    let groups = reply.into_inner().nodes.into_iter().flat_map(|node| node.groups);
    groups.map(|group| (GroupId(group.group), group.replica_id, group.checkpointed_index)).collect()
}

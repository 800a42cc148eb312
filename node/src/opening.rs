//! Opens the replicas that the meta state gives this node, as it gives them.
//!
//! The first replica of a shard's list begins the shard's group, with all of the list as voters, when the group has not begun;
//! after a restart that finds a group that has begun, and leaves it alone. A replica that cannot be opened is tried again and named in the log
//! and in the readiness; it does not hold up the others.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use martlet_proto::{
    cluster::meta::{MetaState, ShardReplicas},
    shard::Shard,
};
use tokio_util::sync::CancellationToken;

use crate::{
    log::GroupId,
    meta::skips::Decided,
    parts::Parts,
    raft::{Group, GroupConfig, Member, snapshot::Snapshots},
    replicas::Replica,
    shard::Kept,
    snapshots::StoreSnapshots,
    store::{LogReach, ShardStore, StoreError},
};

const RETRY: Duration = Duration::from_secs(5);

/// Shards of which this node is to hold a replica, with the replica id.
pub(crate) fn assigned(state: &MetaState, node_id: u64) -> impl Iterator<Item = (&ShardReplicas, u64)> {
    state.shards.iter().filter_map(move |shard| {
        let own = shard.replicas.iter().find(|replica| replica.node_id == node_id)?;
        Some((shard, own.replica_id))
    })
}

/// Follows the meta state until `end` fires. Owned by the node, which awaits it.
pub(crate) async fn run(parts: Arc<Parts>, end: CancellationToken) {
    let mut kept = parts.keeper.kept();
    loop {
        let state = Arc::clone(&kept.borrow_and_update());
        let mut failed = false;
        for (shard, replica) in assigned(&state, parts.config.node.id) {
            if end.is_cancelled() {
                return;
            }
            let group = GroupId(shard.shard + 1);
            if parts.replicas.holds(group) {
                continue;
            }
            if let Err(why) = open(&parts, &state, shard, group, replica).await {
                tracing::error!(shard = shard.shard, replica, %why, "a replica cannot be opened");
                parts.replicas.refuse(group, why.to_string());
                failed = true;
            }
        }
        tokio::select! {
            () = end.cancelled() => return,
            () = tokio::time::sleep(RETRY), if failed => {}
            changed = kept.changed() => if changed.is_err() { return },
        }
    }
}

async fn open(
    parts: &Parts,
    state: &MetaState,
    shard: &ShardReplicas,
    group: GroupId,
    replica: u64,
) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
    let rows = open_rows(parts, group, replica).await?;
    let kept: Arc<dyn Kept> = rows.clone();
    let served = parts.shards.load(Shard(u16::try_from(shard.shard)?), kept)?;
    let config = GroupConfig {
        group,
        replica,
        preference: shard.replicas.iter().map(|replica| replica.replica_id).collect(),
        settings: parts.config.raft.clone(),
        decisions: Arc::new(Decided::new(shard.shard, parts.keeper.kept())),
        time: served.clone(),
        snapshots: snapshots(parts, group, &rows),
    };
    let group = Group::start(config, &parts.log, Box::new(served.machine()), &parts.network).await?;
    if shard.replicas.first().is_some_and(|first| first.replica_id == replica) {
        group.initialize(members(state, shard)).await?;
    }
    parts.shards.open(served, Arc::new(group.clone()));
    parts.replicas.insert(Replica { id: replica, group, rows });
    Ok(())
}

/// The rows of a replica; those that are bad or gone are made again from base and log.
pub(crate) async fn open_rows(
    parts: &Parts,
    group: GroupId,
    replica: u64,
) -> Result<Arc<ShardStore>, Box<dyn std::error::Error + Send + Sync>> {
    let log = parts.log.group(group);
    let begun = log.vote().is_some() || log.last().is_some();
    let reach = LogReach { purged: log.purged().map(|at| at.index), begun };
    let store = Arc::clone(&parts.store);
    let opened = tokio::task::spawn_blocking(move || store.open_shard(replica, group.0, reach)).await?;
    opened.map_err(|error| match error {
        // Whoever reads it looks at both.
        StoreError::Lost { .. } => format!("{error}; the log is in {}", log.dir().display()).into(),
        error => error.into(),
    })
}

/// The snapshots of a replica.
pub(crate) fn snapshots(parts: &Parts, group: GroupId, rows: &Arc<ShardStore>) -> Arc<dyn Snapshots> {
    let (store, metrics) = (Arc::clone(&parts.store), Arc::clone(&parts.metrics));
    Arc::new(StoreSnapshots { store, rows: Arc::clone(rows), group, metrics })
}

fn members(state: &MetaState, shard: &ShardReplicas) -> BTreeMap<u64, Member> {
    let address = |node_id| {
        state.nodes.iter().find(|node| node.node_id == node_id).map(|node| node.address.clone()).unwrap_or_default()
    };
    shard
        .replicas
        .iter()
        .map(|replica| (replica.replica_id, Member { node: replica.node_id, address: address(replica.node_id) }))
        .collect()
}

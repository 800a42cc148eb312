//! Moves what is old from memory and log to sled, and lets the log forget it.
//!
//! The store decides which shards are due; this drives it, once a second, and first those that hold up old segments of a log that
//! has grown ([`crate::log::Log::pins`]). What the base file holds ([`crate::bases`]) the group may purge; while the log is short it
//! keeps what a replica of its own still lacks. One that comes back later gets a snapshot.

use std::{sync::Arc, time::Duration};

use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;

use crate::{
    bug::Bug,
    parts::Parts,
    replicas::Replica,
    store::{StoreError, Which},
};

/// Between two looks.
const TICK: Duration = Duration::from_secs(1);
/// Looks between two purges without a cycle: a peer may have caught up meanwhile.
const EVERY: u32 = 10;
/// Longest one group's purge is waited for; it goes on next time.
const PURGE_MAX: Duration = Duration::from_secs(5);

/// Runs cycles until `end` fires, or the store says that only opening it anew helps: then the node must stop, and the log holds
/// what the store could not keep. Owned by the node, which awaits it.
pub(crate) async fn run(parts: Arc<Parts>, end: CancellationToken) -> Result<(), StoreError> {
    for tick in 1_u32.. {
        tokio::select! { () = end.cancelled() => return Ok(()), () = sleep(TICK) => {} }
        let now_and_then = tick % EVERY == 0;
        let moved = match cycle(&parts, wanted(&parts)).await {
            Ok(moved) => moved,
            Err(error @ StoreError::Broken(_)) => return Err(error),
            Err(_) => false,
        };
        if moved || now_and_then {
            for replica in parts.replicas.all() {
                purge(&parts, &replica).await;
            }
        }
    }
    Ok(())
}

/// What the next cycle takes: who holds up old segments of a log that is long comes first, if a checkpoint helps.
fn wanted(parts: &Parts) -> Which {
    let pins = parts.log.pins();
    let pinning = |replica: &Replica| {
        let pin = pins.iter().find(|pin| pin.group == replica.group.id());
        pin.is_some_and(|pin| replica.rows.checkpointed().is_none_or(|at| at < pin.upto))
    };
    let pinning: Vec<_> = parts.replicas.all().iter().filter(|replica| pinning(replica)).map(|r| r.id).collect();
    if pinning.is_empty() { Which::Due } else { Which::Replicas(pinning) }
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

/// Lets the log forget what the replica's base holds.
pub(crate) async fn purge(parts: &Parts, replica: &Replica) {
    let (group, mut upto) = (replica.group.id(), replica.rows.based().unwrap_or(0));
    if Bug::PurgeBeforeBase.is_in() {
        upto = replica.checkpointed();
    }
    let pinned = parts.log.pins().iter().find(|pin| pin.group == group).map_or(0, |pin| pin.upto);
    match timeout(PURGE_MAX, replica.group.purge_upto(upto, pinned)).await {
        Ok(Ok(_)) => {}
        Ok(Err(error)) => tracing::warn!(%error, %group, upto, "the log could not be purged"),
        Err(_) => tracing::warn!(%group, upto, "the purge of the log takes long"),
    }
}

//! Writes base files when the log since the last one has outgrown it, so that the log can be purged.
//!
//! One at a time, beside checkpoints: a shard's base is as of its last checkpoint. Those that hold up old segments of a log that
//! has grown ([`crate::log::Log::pins`]) come first, once [`crate::checkpoints`] has checkpointed them. A base costs the writing of
//! all rows: a shard that has many and whose log is short waits until the node's log is halfway to its bound.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use tokio::time::{Instant, sleep};
use tokio_util::sync::CancellationToken;

use crate::{
    checkpoints,
    log::{GroupId, Pin},
    parts::Parts,
    replicas::Replica,
    store::{Store, StoreError},
};

/// Between two looks.
const TICK: Duration = Duration::from_secs(1);
/// A pass that failed is not tried again for this long: it would cost a disk that is full, or sled, more than it helps, and keep
/// the other shards from theirs.
const REST: Duration = Duration::from_secs(10);
/// A base of a shard that pins the log is written when the log since it is this part of it.
const PINNED_PART: u64 = 4;

/// Writes what is due until `end` fires. Owned by the node, which awaits it.
pub(crate) async fn run(parts: Arc<Parts>, end: CancellationToken) {
    let mut resting = BTreeMap::new();
    loop {
        tokio::select! { () = end.cancelled() => return, () = sleep(TICK) => {} }
        resting.retain(|_, until| Instant::now() < *until);
        while let Some(replica) = due(&parts, |group| resting.contains_key(&group)) {
            if end.is_cancelled() {
                return;
            }
            if write(&parts, &replica).await {
                checkpoints::purge(&parts, &replica).await;
            } else {
                resting.insert(replica.group.id(), Instant::now() + REST);
            }
        }
    }
}

/// What is known of a replica when it is decided whether a base is due.
#[derive(Debug, Clone, Copy)]
struct Standing {
    /// Index of the last checkpoint.
    checkpointed: u64,
    /// Index of a base that reads back.
    based: Option<u64>,
    /// Bytes of that base.
    bytes: u64,
    /// The log was purged up to here.
    purged: u64,
    /// Up to here it holds up old segments.
    pinned: u64,
}

/// Whether a base is due: `grown` tells whether the log since the base has at least so many bytes.
fn is_due(standing: Standing, log_is_long: bool, floor: u64, factor: u64, grown: impl Fn(u64) -> bool) -> bool {
    let Standing { checkpointed, based, bytes, purged, pinned } = standing;
    let at = based.unwrap_or(0);
    if checkpointed <= at {
        return false;
    }
    // The log does not reach back to it: sled alone holds what is between.
    if purged > at {
        return true;
    }
    if pinned > at && (log_is_long || grown(bytes / PINNED_PART)) {
        return true;
    }
    grown(bytes.saturating_mul(factor).max(floor))
}

/// The replica whose base is written next, among those that do not rest.
fn due(parts: &Parts, rests: impl Fn(GroupId) -> bool) -> Option<Replica> {
    let pins = parts.log.pins();
    let (config, bounds) = (&parts.config.store, &parts.config.log);
    let half = bounds.checkpoint_bytes + bounds.kept_bytes_max.saturating_sub(bounds.checkpoint_bytes) / 2;
    let log_is_long = parts.log.bytes() > half;
    let mut found: Vec<_> = parts
        .replicas
        .all()
        .into_iter()
        .filter(|replica| !rests(replica.group.id()))
        .filter_map(|replica| {
            let based = replica.rows.based();
            let standing = Standing {
                checkpointed: replica.checkpointed(),
                based,
                bytes: replica.rows.base().map_or(0, |base| base.bytes),
                purged: replica.group.purged(),
                pinned: pinned(&pins, &replica),
            };
            let grown = |bytes| replica.group.has_grown(based.unwrap_or(0), bytes);
            let due = is_due(standing, log_is_long, config.base_log_bytes_min, config.base_log_factor, grown);
            due.then_some((standing.pinned == 0, standing.based, replica))
        })
        .collect();
    found.sort_by_key(|(free, based, _)| (*free, *based));
    found.into_iter().next().map(|(_, _, replica)| replica)
}

fn pinned(pins: &[Pin], replica: &Replica) -> u64 {
    pins.iter().find(|pin| pin.group == replica.group.id()).map_or(0, |pin| pin.upto)
}

/// Whether a base was written.
async fn write(parts: &Parts, replica: &Replica) -> bool {
    let (store, rows, group) = (Arc::clone(&parts.store), Arc::clone(&replica.rows), replica.group.id());
    let begun = parts.clock.now();
    let work = move || Store::write_base(&store, &rows, group.0);
    let written =
        tokio::task::spawn_blocking(work).await.unwrap_or_else(|error| Err(StoreError::Broken(error.to_string())));
    match written {
        Ok(Some(base)) => {
            parts.metrics.bases.inc();
            let took = parts.clock.now().saturating_duration_since(begun);
            parts.metrics.base_seconds.observe(took.as_secs_f64());
            tracing::debug!(%group, index = base.mark.index, bytes = base.bytes, "a base file was written");
            true
        }
        Ok(None) => false,
        Err(error) => {
            parts.metrics.base_failures.inc();
            tracing::error!(%error, %group, "a base file was not written; the one before stays, and the log behind it");
            false
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    fn standing() -> Standing {
        Standing { checkpointed: 100, based: Some(50), bytes: 40 * MIB, purged: 40, pinned: 0 }
    }

    fn due(standing: Standing, log_is_long: bool, log_bytes: u64) -> bool {
        is_due(standing, log_is_long, 16 * MIB, 1, |bytes| log_bytes >= bytes)
    }

    #[test]
    fn a_base_is_due_when_the_log_since_it_outgrows_it_and_never_for_little() {
        assert!(!due(standing(), false, 39 * MIB));
        assert!(due(standing(), false, 40 * MIB));
        assert!(!due(Standing { bytes: MIB, ..standing() }, false, 15 * MIB));
        assert!(due(Standing { bytes: MIB, ..standing() }, false, 16 * MIB));
        assert!(due(Standing { based: None, bytes: 0, purged: 0, ..standing() }, false, 16 * MIB));
    }

    #[test]
    fn nothing_is_due_without_a_checkpoint_behind_the_base() {
        assert!(!due(Standing { checkpointed: 50, pinned: 60, ..standing() }, true, 900 * MIB));
    }

    #[test]
    fn who_holds_up_old_segments_is_due_early_and_at_once_when_the_log_is_long() {
        let pinned = Standing { pinned: 60, ..standing() };
        assert!(!due(pinned, false, 9 * MIB));
        assert!(due(pinned, false, 10 * MIB));
        assert!(due(pinned, true, 0));
        assert!(!due(Standing { pinned: 50, ..standing() }, true, 0), "its base reaches that far");
    }

    #[test]
    fn a_log_that_does_not_reach_back_to_the_base_has_one_written_at_once() {
        assert!(due(Standing { purged: 51, ..standing() }, false, 0));
        assert!(due(Standing { based: None, purged: 1, ..standing() }, false, 0));
    }
}

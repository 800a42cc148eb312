//! Keeps leaders where the shard map wants them: with the first live replica of each shard's list.
//!
//! A leader looks after its own shards: one whose list names a live replica before this one is handed to it, once that node has
//! been up for `raft.balance_after` and is caught up. One move at a time on each node, and the next only when the last has been
//! seen to end, so that a node that comes back is not run over. Decides nothing itself: [`crate::raft::Group::preferred`] does.

use std::{sync::Arc, time::Duration};

use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;

use crate::parts::Parts;

/// Between two looks.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// Looks until `end` fires. Owned by the node, which awaits it.
pub(crate) async fn run(parts: Arc<Parts>, end: CancellationToken) {
    loop {
        tokio::select! {
            () = end.cancelled() => return,
            () = sleep(LOOK_EVERY) => {}
        }
        let next = parts.replicas.all().into_iter().find_map(|replica| {
            let to = replica.group.preferred()?;
            Some((replica.group, to))
        });
        let Some((group, to)) = next else { continue };
        if let Err(error) = group.transfer_leader(to).await {
            tracing::debug!(%error, "a leader is not moved to where it is preferred");
            continue;
        }
        let mut leadership = group.leadership();
        let settled = leadership.wait_for(|now| now.leader == Some(to));
        match timeout(parts.config.raft.election_max * 2, settled).await {
            Ok(Ok(_)) => {
                parts.metrics.moves.inc();
                tracing::info!(group = %group.id(), to, "leadership went to the replica that is preferred");
            }
            Ok(Err(_)) | Err(_) => {
                tracing::warn!(group = %group.id(), to, "leadership did not arrive where it was sent")
            }
        }
    }
}

//! Follows a running group: tells who leads and that it has stopped, and ends its quiet time.

use std::sync::{Arc, atomic::Ordering};

use openraft::async_runtime::watch::WatchReceiver;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::{
    group::{Leadership, leadership},
    local::Local,
    network::Network,
    settings::RaftSettings,
    types::{Raft, plain_vote, position},
};

/// Starts the two tasks that follow a group. They end with `ending`, the network, or the group.
pub(super) fn follow(
    network: &Network,
    local: &Arc<Local>,
    raft: &Raft,
    led: watch::Receiver<u64>,
    settings: &RaftSettings,
    ending: CancellationToken,
) -> (watch::Receiver<Leadership>, watch::Receiver<Option<String>>) {
    let (leadership_tx, leadership_rx) = watch::channel(leadership(raft, local.replica, 0));
    let (stopped_tx, stopped_rx) = watch::channel(None);
    let (task_local, task_raft) = (local.clone(), raft.clone());
    network.spawn(async move {
        let why = tell(&task_local, &task_raft, led, leadership_tx, ending).await;
        tracing::info!(group = %task_local.group, replica = task_local.replica, why, "the group has stopped");
        stopped_tx.send_replace(Some(why));
    });
    if local.is_quiet() {
        let (local, raft, pause) = (local.clone(), raft.clone(), settings.election_max);
        network.spawn(async move {
            if !is_sole_voter(&local, &raft) {
                // Until every lease that it may have granted before it restarted has run out.
                tokio::time::sleep(pause).await;
            }
            catch_up(&local, &raft).await;
        });
    }
    (leadership_rx, stopped_rx)
}

/// Tells who leads until the group stops; returns why it did.
async fn tell(
    local: &Local,
    raft: &Raft,
    mut led: watch::Receiver<u64>,
    told: watch::Sender<Leadership>,
    ending: CancellationToken,
) -> String {
    let mut server = raft.server_metrics();
    loop {
        let now = leadership(raft, local.replica, *led.borrow_and_update());
        let changed = told.send_if_modified(|before| std::mem::replace(before, now) != now);
        if changed {
            let Leadership { term, leader, is_leader, first_applied } = now;
            tracing::info!(group = %local.group, term, leader, is_leader, first_applied, "leadership changed");
        }
        tokio::select! {
            alive = server.changed() => if alive.is_err() { break },
            // Its sender ends with the machine, which ends with the group.
            alive = led.changed() => if alive.is_err() { break },
            () = ending.cancelled() => break,
        }
    }
    told.send_modify(|leadership| *leadership = Leadership { term: leadership.term, ..Leadership::default() });
    let mut metrics = raft.metrics();
    loop {
        if let Err(fatal) = metrics.borrow_watched().running_state.clone() {
            return fatal.to_string();
        }
        // The machine may end a moment before the core has said why.
        if metrics.changed().await.is_err() {
            return "ended without a reason".to_owned();
        }
    }
}

/// Waits until a leader has caught the replica up, if it dropped a drain, then lets it vote and campaign.
async fn catch_up(local: &Local, raft: &Raft) {
    if local.log.is_behind() {
        let mut metrics = raft.data_metrics();
        while !is_sole_voter(local, raft) && !has_caught_up(local, raft) {
            if metrics.changed().await.is_err() {
                return;
            }
        }
        if let Err(e) = local.log.caught_up().await {
            tracing::warn!(group = %local.group, error = %e, "it cannot be noted that the group was caught up");
            return;
        }
        tracing::info!(group = %local.group, replica = local.replica, "a leader has caught the replica up");
    }
    local.quiet.store(false, Ordering::SeqCst);
    raft.runtime_config().elect(true);
}

/// An entry of the term of the leader that is heard now is committed and here: so is everything that was committed before.
fn has_caught_up(local: &Local, raft: &Raft) -> bool {
    let server = raft.server_metrics();
    let (vote, leader) = {
        let server = server.borrow_watched();
        (plain_vote(&server.vote), server.current_leader)
    };
    let data = raft.data_metrics();
    let committed = data.borrow_watched().local_committed;
    vote.committed
        && leader.is_some_and(|leader| leader != local.replica)
        && committed.is_some_and(|committed| position(&committed).term == vote.term)
}

/// Nobody else can lead.
pub(super) fn is_sole_voter(local: &Local, raft: &Raft) -> bool {
    let server = raft.server_metrics();
    let membership = server.borrow_watched().membership_config.clone();
    let mut voters = membership.voter_ids();
    voters.next() == Some(local.replica) && voters.next().is_none()
}

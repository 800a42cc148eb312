//! Follows a running group: tells who leads and that it has stopped, and ends its quiet time.

use std::{
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use openraft::async_runtime::watch::WatchReceiver;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::{
    client::{Clients, Standing},
    group::{Leadership, leadership},
    local::{Floor, Local},
    network::Network,
    park::{Parking, Stop},
    settings::RaftSettings,
    types::{Raft, position},
};

/// Starts the two tasks that follow a group. They end with `ending`, the network, or the group.
pub(super) fn follow(
    network: &Network,
    local: &Arc<Local>,
    raft: &Raft,
    led: watch::Receiver<u64>,
    parking: &Parking,
    settings: &RaftSettings,
    ending: CancellationToken,
) -> (watch::Receiver<Leadership>, watch::Receiver<Option<String>>) {
    let (leadership_tx, leadership_rx) = watch::channel(leadership(raft, local.replica, 0));
    let (stopped_tx, stopped_rx) = watch::channel(None);
    let (task_local, task_raft, parked) = (local.clone(), raft.clone(), parking.follow());
    network.spawn(async move {
        let why = tell(&task_local, &task_raft, led, parked, leadership_tx, ending).await;
        tracing::info!(group = %task_local.group, replica = task_local.replica, why, "the group has stopped");
        stopped_tx.send_replace(Some(why));
    });
    if local.is_quiet() {
        let (raft, pause) = (raft.clone(), settings.election_max);
        let clients = Clients { network: network.clone(), local: local.clone() };
        network.spawn(async move {
            if !is_sole_voter(&clients.local, &raft) {
                // Until every lease that it may have granted before it restarted has run out.
                tokio::time::sleep(pause).await;
            }
            catch_up(&clients, &raft, pause).await;
        });
    }
    (leadership_rx, stopped_rx)
}

/// Tells who leads until the group stops; returns why it did.
async fn tell(
    local: &Local,
    raft: &Raft,
    mut led: watch::Receiver<u64>,
    mut parked: watch::Receiver<Option<Stop>>,
    told: watch::Sender<Leadership>,
    ending: CancellationToken,
) -> String {
    let mut server = raft.server_metrics();
    loop {
        let waits = parked.borrow_and_update().is_some();
        local.set_waiting(waits);
        let now = leadership(raft, local.replica, *led.borrow_and_update()).unless(waits);
        let changed = told.send_if_modified(|before| std::mem::replace(before, now) != now);
        if changed {
            let Leadership { term, leader, is_leader, first_applied } = now;
            tracing::debug!(group = %local.group, term, leader, is_leader, first_applied, "leadership changed");
        }
        tokio::select! {
            alive = server.changed() => if alive.is_err() { break },
            // Its sender ends with the machine, which ends with the group.
            alive = led.changed() => if alive.is_err() { break },
            alive = parked.changed() => if alive.is_err() { break },
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

/// Waits until a leader has caught the replica up, if it dropped a drain, then lets it vote and campaign. Until then it votes
/// once every voter has answered, and only for what is newer than all of them.
async fn catch_up(clients: &Clients, raft: &Raft, pause: Duration) {
    let local = &clients.local;
    if local.log.is_behind() {
        let mut metrics = raft.data_metrics();
        while !is_sole_voter(local, raft) && !has_caught_up(local, raft) {
            tokio::select! {
                alive = metrics.changed() => if alive.is_err() { return },
                () = tokio::time::sleep(pause) => {}
            }
            if local.floor().is_none()
                && let Some(floor) = ask_all(clients, raft, pause).await
            {
                tracing::info!(group = %local.group, replica = local.replica, ?floor, "every voter has answered");
                local.set_floor(Some(floor));
                local.quiet.store(false, Ordering::SeqCst);
                raft.runtime_config().elect(local.last() >= floor.last);
            }
        }
        if let Err(e) = local.log.caught_up().await {
            tracing::warn!(group = %local.group, error = %e, "it cannot be noted that the group was caught up");
            return;
        }
        tracing::info!(group = %local.group, replica = local.replica, "the replica is caught up");
    }
    local.set_floor(None);
    local.quiet.store(false, Ordering::SeqCst);
    // Unless it is about to stop.
    raft.runtime_config().elect(!local.is_leaving());
}

/// The newest of what all voters have; `None` while one of them does not answer, or the voters are not known.
async fn ask_all(clients: &Clients, raft: &Raft, timeout: Duration) -> Option<Floor> {
    let local = &clients.local;
    let membership = raft.server_metrics().borrow_watched().membership_config.clone();
    let mut floor = Floor { term: local.own_vote().leader_id().term, last: local.last() };
    let others: Vec<u64> = membership.voter_ids().filter(|id| *id != local.replica).collect();
    if others.is_empty() {
        return None;
    }
    for id in others {
        let Standing { term, last, .. } = clients.standing(id, membership.get_node(&id)?, timeout).await?;
        floor = Floor { term: floor.term.max(term), last: floor.last.max(last) };
    }
    Some(floor)
}

/// Everything that may have been committed is here: a leader of this process's time has said how far it goes, and it is here
/// that far; or this replica was elected above every voter and has committed an entry of its own. (What openraft knows of a
/// leader and of commits right after a start comes from the log itself and proves nothing.)
fn has_caught_up(local: &Local, raft: &Raft) -> bool {
    let data = raft.data_metrics();
    let Some(committed) = data.borrow_watched().local_committed else { return false };
    if local.heard_committed().is_some_and(|heard| committed >= heard) {
        return true;
    }
    let vote = local.own_vote();
    let elected = local.floor().is_some_and(|floor| vote.leader_id().term > floor.term)
        && vote.is_committed()
        && vote.leader_id().voted_for == local.replica;
    elected && position(&committed).term == vote.leader_id().term
}

/// Nobody else can lead.
pub(super) fn is_sole_voter(local: &Local, raft: &Raft) -> bool {
    let server = raft.server_metrics();
    let membership = server.borrow_watched().membership_config.clone();
    let mut voters = membership.voter_ids();
    voters.next() == Some(local.replica) && voters.next().is_none()
}

//! The heartbeats of all groups that this node leads, at one moment.
//!
//! openraft would send them by each group's own timer, one frame each. Here one task of the node asks every led group for its
//! heartbeat at once, so that those to one peer leave in one frame ([`super::line`]). Owns when; whether one is due at all, or left
//! out for an append that was acknowledged lately, stays openraft's. The invariant: a group whose core is busy or stuck holds up no
//! other's heartbeat.

use std::time::Duration;

use futures::FutureExt;
use openraft::{ServerState, async_runtime::watch::WatchReceiver};
use tokio::{
    task::coop::unconstrained,
    time::{MissedTickBehavior, interval},
};

use super::network::Network;

/// Until the network is shut down, which drops it.
pub(super) async fn beat(network: Network, every: Duration) {
    let mut beats = interval(every);
    beats.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        beats.tick().await;
        for local in network.locals() {
            let Some(raft) = local.raft.get() else { continue };
            // Also of one that waits before an entry: its followers are not to elect.
            if raft.server_metrics().borrow_watched().state == ServerState::Leader {
                // Not now means that the core's queue is full; it is asked again at the next beat. Failed: the group has stopped.
                let _ = unconstrained(raft.trigger().heartbeat()).now_or_never();
            }
        }
    }
}

//! Ask first: what the followers of a leader do when its connections close (design.md section 4, "Failure detection").
//!
//! Timers find a silent death in two or three seconds. A killed process is not silent: its connections close. Whoever loses the
//! last connection of a node asks the other voters of the groups led there whether they lost it too. With a majority, the
//! replica with the newest log campaigns at once, among equals the first in the group's list; each next one [`TURN`] later. Voters
//! refuse a vote while the leader's lease runs, unless they have lost that leader themselves: then the lease is void.
//!
//! Lost means: no liveness stream of the node is open here, and dialling it fails. So a link that flaps disturbs nobody (the
//! dial succeeds, or the others say no), a leader whose process hangs or whose host is gone is left to the timers, and a leader
//! that is cut off knows by its own lines that its lease is void (`Network`). Nothing here decides who wins: openraft does.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use futures::future::join_all;
use martlet_proto::cluster::raft::{LostCall, liveness_call, liveness_reply};
use openraft::{async_runtime::watch::WatchReceiver, raft::TransferLeaderRequest};

use super::{
    client::Clients,
    group::Member,
    local::Local,
    network::{Asked, Network},
    types::{LogId, Raft, StoredMembership, Vote},
};

/// Between the campaigns of two followers. Source: design.md section 4.
const TURN: Duration = Duration::from_millis(200);
/// Longest that a dial or an answer is waited for: whoever takes longer is left to the timers.
const ASK_MAX: Duration = Duration::from_millis(300);
/// The others may notice a little later: they are asked again after each of these.
const PAUSES: [Duration; 4] =
    [Duration::from_millis(20), Duration::from_millis(60), Duration::from_millis(150), Duration::from_millis(300)];

/// Whether this node has lost that one.
pub(super) async fn is_lost(network: &Network, member: &Member) -> bool {
    if member.node == network.node() || network.presence().is_connected(member.node) {
        return false;
    }
    let call = ask_lost(network.node(), String::new());
    match network.peer(member).ask(network.next_key(), (0, 0, 0), call, ASK_MAX).await {
        // Whatever it says: it lives.
        Asked::Answered(_) => false,
        // Of a host that says nothing it is not known that the process has ended.
        Asked::Silent => false,
        Asked::Broken(_) | Asked::Unreachable(_) => !network.presence().is_connected(member.node),
    }
}

/// Whether the leader that this replica knows is on `node`, and this node has lost it.
pub(super) async fn has_lost_leader(network: &Network, raft: &Raft, node: u64) -> bool {
    match leader(raft) {
        Some((_, member)) if member.node == node => is_lost(network, &member).await,
        _ => false,
    }
}

/// The last connection from `node` has closed: has the groups that it leads campaign, if it is lost. Ends within seconds.
pub(super) async fn ask_around(network: Network, node: u64) {
    let led: Vec<_> = network.locals().into_iter().filter_map(|local| Bereft::of(local, node)).collect();
    let Some(member) = led.first().map(|bereft| bereft.leader.clone()) else { return };
    let mut waiting = led;
    for pause in PAUSES {
        if !is_lost(&network, &member).await {
            return;
        }
        let others: BTreeMap<u64, Member> = waiting.iter().flat_map(|bereft| bereft.others()).collect();
        let asked = others.values().map(|other| async {
            let call = ask_lost(member.node, member.address.clone());
            let answer = network.peer(other).ask(network.next_key(), (0, 0, 0), call, ASK_MAX).await;
            matches!(answer, Asked::Answered(liveness_reply::Outcome::Lost(true))).then_some(other.node)
        });
        let bereft_nodes: Vec<u64> = join_all(asked).await.into_iter().flatten().collect();
        waiting.retain(|bereft| {
            let agreed = bereft.is_majority(&bereft_nodes);
            if agreed {
                network.spawn(campaign(network.clone(), bereft.clone(), bereft_nodes.clone()));
            }
            !agreed
        });
        if waiting.is_empty() {
            return;
        }
        tokio::time::sleep(pause).await;
    }
    tracing::debug!(node, groups = waiting.len(), "no majority has lost the leader");
}

fn ask_lost(node: u64, address: String) -> liveness_call::Kind {
    liveness_call::Kind::Lost(LostCall { node, address })
}

/// A group that may have lost its leader.
#[derive(Clone)]
struct Bereft {
    local: Arc<Local>,
    raft: Raft,
    /// The vote that made the leader; any other ends the matter.
    vote: Vote,
    leader_replica: u64,
    leader: Member,
    membership: StoredMembership,
}

impl Bereft {
    /// `None` unless a leader on `node` is followed here by a voter that may campaign.
    fn of(local: Arc<Local>, node: u64) -> Option<Bereft> {
        let raft = local.raft.get()?.clone();
        let (leader_replica, leader) = leader(&raft).filter(|(_, member)| member.node == node)?;
        let vote = local.own_vote();
        let membership = raft.server_metrics().borrow_watched().membership_config.as_ref().clone();
        let is_voter = membership.voter_ids().any(|id| id == local.replica);
        let fits = vote.is_committed() && vote.leader_id().voted_for == leader_replica && is_voter;
        (fits && !local.is_unwilling()).then_some(Bereft { local, raft, vote, leader_replica, leader, membership })
    }

    /// Where the other voters live, without the leader's.
    fn others(&self) -> Vec<(u64, Member)> {
        self.voters().filter(|(id, _)| *id != self.local.replica).map(|(_, member)| (member.node, member)).collect()
    }

    /// Voters but the leader, in the order in which they are to lead.
    fn voters(&self) -> impl Iterator<Item = (u64, Member)> {
        let mut ids: Vec<u64> = self.membership.voter_ids().filter(|id| *id != self.leader_replica).collect();
        ids.sort_by_key(|id| self.local.place(*id));
        ids.into_iter().filter_map(|id| Some((id, self.membership.get_node(&id)?.clone())))
    }

    fn is_majority(&self, bereft_nodes: &[u64]) -> bool {
        let agreed = self.others().iter().filter(|(node, _)| bereft_nodes.contains(node)).count() + 1;
        2 * agreed > self.membership.voter_ids().count()
    }

    fn is_current(&self) -> bool {
        self.local.own_vote() == self.vote && !self.local.is_unwilling()
    }
}

/// Campaigns in this replica's turn, unless another has begun by then.
async fn campaign(network: Network, bereft: Bereft, bereft_nodes: Vec<u64>) {
    let local = &bereft.local;
    let clients = Clients { network: network.clone(), local: local.clone() };
    let own: Option<LogId> = local.last();
    let standings = bereft.voters().map(|(id, member)| {
        let clients = &clients;
        async move {
            if id == local.replica {
                return Some((id, own));
            }
            let standing = clients.standing(id, &member, ASK_MAX).await?;
            standing.is_willing.then_some((id, standing.last))
        }
    });
    let mut able: Vec<(u64, Option<LogId>)> = join_all(standings).await.into_iter().flatten().collect();
    // Stable: among equal logs the order of the list stays.
    able.sort_by_key(|(_, last)| std::cmp::Reverse(*last));
    let turn = able.iter().position(|(id, _)| *id == local.replica).unwrap_or(able.len());
    tokio::time::sleep(TURN * u32::try_from(turn).unwrap_or(u32::MAX)).await;
    if !bereft.is_current() || !is_lost(&network, &bereft.leader).await {
        return;
    }
    let term = bereft.vote.leader_id().term;
    tracing::info!(
        group = %local.group, replica = local.replica, term, leader = bereft.leader.node, lost_by = ?bereft_nodes,
        "a majority has lost the leader: campaigns"
    );
    local.claim(term + 1, bereft.leader.node);
    // To itself: the way to begin an election whose votes override the lease.
    let request = TransferLeaderRequest::new(bereft.vote, local.replica, local.last());
    if let Err(fatal) = bereft.raft.handle_transfer_leader(request).await {
        tracing::debug!(group = %local.group, %fatal, "the group has stopped and does not campaign");
    }
}

/// The leader that this replica knows of, if it is another: its replica and where it lives.
fn leader(raft: &Raft) -> Option<(u64, Member)> {
    let metrics = raft.server_metrics();
    let metrics = metrics.borrow_watched();
    let leader = metrics.current_leader.filter(|leader| *leader != metrics.id)?;
    Some((leader, metrics.membership_config.get_node(&leader)?.clone()))
}

//! Who may lead and hand out: leases of leaders that are cut off, leadership handed over at a stop and taken back afterwards, and
//! links that are cut for everything.

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use martlet_node::{
    Config, Surroundings,
    disk::forgetful::ForgetfulDisk,
    metrics::{HandoverKind, HandoverLabel},
    raft::{DirectLinks, links::cuttable::Wiring},
};
use martlet_proto::cluster::{
    admin::{ListProjectsRequest, StatusRequest},
    queue::{answer, refused::Reason},
};

use crate::{
    nodes::{Nodes, until},
    serving::{DEVICE, Device, Submit, ask, enqueue, leader_seen_by, register},
};

/// Three nodes whose links can be cut; their logs are in memory, so that no busy disk holds up an election.
async fn wired(shards: u32) -> (Nodes, Wiring, [ForgetfulDisk; 3]) {
    let wiring = Wiring::new(Arc::new(DirectLinks));
    let disks = std::array::from_fn(|_| ForgetfulDisk::new());
    let mut nodes = Nodes::new(3);
    for id in 1..=3 {
        let config = small(&nodes, id);
        nodes.start_in(id, config, around(id, &wiring, &disks)).await.unwrap();
    }
    nodes.create(1, shards).await.unwrap();
    for id in 1..=3 {
        nodes.ready(id).await;
    }
    (nodes, wiring, disks)
}

fn small(nodes: &Nodes, id: usize) -> Config {
    let mut config = nodes.config(id);
    config.log.segment_bytes = 1 << 20;
    config.raft.balance_after = Duration::from_secs(2);
    config
}

fn around(id: usize, wiring: &Wiring, disks: &[ForgetfulDisk; 3]) -> Surroundings {
    let disk = Arc::new(disks[id - 1].clone());
    Surroundings { disk, links: wiring.of(id as u64), ..Surroundings::default() }
}

/// Groups that a node leads, as it says itself.
async fn led_by(nodes: &Nodes, id: usize) -> BTreeSet<u32> {
    let status = nodes.admin(id).status(StatusRequest { cluster_wide: false }).await.unwrap().into_inner();
    let groups = status.nodes.into_iter().flat_map(|node| node.groups);
    groups.filter(|group| group.leader_replica == group.replica_id).map(|group| group.group).collect()
}

fn cut_off(wiring: &Wiring, node: usize) {
    for other in (1..=3).filter(|other| *other != node) {
        wiring.cut(node as u64, other as u64);
    }
}

fn heal(wiring: &Wiring, node: usize) {
    for other in (1..=3).filter(|other| *other != node) {
        wiring.heal(node as u64, other as u64);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn promise_4_a_leader_that_is_cut_off_hands_out_nothing_and_the_next_one_everything_core() {
    let (mut nodes, wiring, _) = wired(1).await;
    ask(&nodes, &[1, 2, 3], 1, register()).await;
    let old = leader_seen_by(&nodes, 1).await;
    let left: Vec<usize> = (1..=3).filter(|id| *id != old).collect();
    let mut stale = Device::attach_without_credit(&nodes, old, DEVICE).await.expect("it leads");
    let accepted = ask(&nodes, &[old], 2, enqueue(b"kept")).await;
    assert!(matches!(accepted, answer::Kind::Accepted(_)), "{accepted:?}");

    cut_off(&wiring, old);
    let accepted = ask(&nodes, &left, 3, enqueue(b"later")).await;
    assert!(matches!(accepted, answer::Kind::Accepted(_)), "{accepted:?}");
    // It still thinks that it leads; but it knows that it has no lease.
    let mut submit = Submit::open(&nodes, old).await;
    until_refused(&mut submit, Reason::NoLease).await;
    stale.give_credit().await;
    let handed_out = tokio::time::timeout(Duration::from_secs(2), stale.delivery()).await;
    assert!(handed_out.is_err(), "handed out without a lease: {handed_out:?}");

    let mut device = Device::attach_anywhere(&nodes, &left).await;
    for payload in [&b"kept"[..], b"later"] {
        let delivery = device.delivery().await;
        assert_eq!(delivery.message.unwrap().payload, payload);
        device.ack(delivery.sequence).await;
    }
    heal(&wiring, old);
    // Back, it follows; and what was acknowledged elsewhere is not handed out either.
    until("the old leader follows", async || {
        let mut submit = Submit::open(&nodes, old).await;
        submit.once(9, enqueue(b"x")).await.is_none() && submit.refused.is_none()
    })
    .await;
    let handed_out = tokio::time::timeout(Duration::from_secs(1), stale.delivery()).await;
    assert!(!matches!(handed_out, Ok(delivery) if delivery.message.is_some()), "handed out by a follower");
    nodes.stop_all().await;
}

async fn until_refused(submit: &mut Submit, reason: Reason) {
    let refused = async {
        while submit.refused != Some(reason) {
            let answered = submit.once(8, enqueue(b"refused")).await;
            assert_eq!(answered, None, "a leader that is cut off answered");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(60), refused).await.expect("its lease ends");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_that_stops_hands_over_every_shard_that_it_leads_and_takes_back_its_own_later() {
    let (mut nodes, wiring, disks) = wired(6).await;
    let shards = nodes.state(1).await.shards;
    let own: BTreeSet<u32> = shards.iter().filter(|s| s.replicas[0].node_id == 1).map(|s| s.shard + 1).collect();
    assert!(!own.is_empty());
    until("node 1 leads its shards", async || led_by(&nodes, 1).await.is_superset(&own)).await;
    let metrics = Arc::clone(&nodes.started(1).metrics);
    nodes.stop(1).await;
    let handed = |how| metrics.handovers.get_or_create(&HandoverLabel { how }).get();
    assert!(handed(HandoverKind::Moved) >= own.len() as u64, "{} moved", handed(HandoverKind::Moved));
    assert_eq!((handed(HandoverKind::NobodyWilling), handed(HandoverKind::Late)), (0, 0));
    until("the others lead everything", async || {
        let (second, third) = (led_by(&nodes, 2).await, led_by(&nodes, 3).await);
        (1..=6).all(|group| second.contains(&group) || third.contains(&group))
    })
    .await;

    let config = small(&nodes, 1);
    nodes.start_in(1, config, around(1, &wiring, &disks)).await.unwrap();
    nodes.ready(1).await;
    until("node 1 leads its shards again", async || led_by(&nodes, 1).await.is_superset(&own)).await;
    nodes.stop_all().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn reads_of_operators_see_what_was_answered_before_or_say_that_there_is_no_quorum() {
    let (mut nodes, wiring, _) = wired(1).await;
    nodes.create_project(1, "100000000001").await.unwrap();
    for at in 1..=3 {
        let listed = nodes.admin(at).list_projects(ListProjectsRequest {}).await.unwrap().into_inner();
        assert_eq!(listed.projects.len(), 1, "at node {at}");
        assert_eq!(nodes.status(at).await.meta_unconfirmed, "");
    }
    cut_off(&wiring, 2);
    let status = nodes.status(2).await;
    assert!(!status.meta_unconfirmed.is_empty());
    let unreachable = status.nodes.iter().filter(|node| !node.unreachable.is_empty()).count();
    assert_eq!(unreachable, 2, "links that are cut are cut for operators too");
    let refused = nodes.admin(2).list_projects(ListProjectsRequest {}).await.unwrap_err();
    assert_eq!(refused.code(), tonic::Code::Unavailable);
    heal(&wiring, 2);
    nodes.create_project(1, "100000000002").await.unwrap();
    let listed = nodes.admin(2).list_projects(ListProjectsRequest {}).await.unwrap().into_inner();
    assert_eq!(listed.projects.len(), 2);
    nodes.stop_all().await;
}

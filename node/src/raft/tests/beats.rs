//! Heartbeats of many groups: they leave together, and all of them leave.

use super::*;

/// Further groups of the nodes of `cluster`, all created on node 1; by group, those of all nodes.
async fn more_groups(cluster: &Cluster, count: u32) -> Vec<Vec<Group>> {
    let mut started = Vec::new();
    for group in (2..).map(GroupId).take(usize::try_from(count).unwrap()) {
        let mut replicas = Vec::new();
        for node in cluster.nodes.values() {
            let config = GroupConfig {
                group,
                replica: node.id * 10,
                preference: (1..=9).map(|id| id * 10).collect(),
                settings: cluster.settings.clone(),
                decisions: cluster.decisions.clone(),
                time: Arc::new(Timeless),
                snapshots: Arc::new(snapshot::NoSnapshots),
            };
            let machine = Box::new(Counter(Arc::default()));
            replicas.push(Group::start(config, &node.log, machine, &node.network).await.unwrap());
        }
        assert!(replicas[0].initialize(cluster.members()).await.unwrap());
        started.push(replicas);
    }
    for replicas in &started {
        let led = replicas.iter().map(|replica| {
            Box::pin(
                async move { replica.leadership().wait_for(|leadership| leadership.first_applied).await.map(drop) },
            )
        });
        tokio::time::timeout(PATIENCE, futures::future::select_all(led)).await.unwrap().0.unwrap();
    }
    started
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn heartbeats_of_all_groups_to_one_peer_leave_in_one_frame_and_all_of_them_leave() {
    let RaftSettings { heartbeat, heartbeat_min, .. } = RaftSettings::default();
    let cluster = Cluster::with(3, RaftSettings { heartbeat, heartbeat_min, ..patient() }).await;
    cluster.leader().await;
    let groups = more_groups(&cluster, 11).await;
    let sent = || {
        let of_each = cluster.nodes.values().map(|node| node.network.liveness_sent());
        of_each.fold((0, 0), |all, one| (all.0 + one.frames.get(), all.1 + one.calls.get()))
    };
    let (frames_before, calls_before) = sent();
    // Ten heartbeats of twelve groups to two peers each: while everything is idle.
    let beats = async {
        while sent().1 < calls_before + 240 {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(PATIENCE, beats).await.unwrap();
    let (frames, calls) = sent();
    let (frames, calls) = (frames - frames_before, calls - calls_before);
    // Led by openraft's own timers they would come at five moments of a heartbeat, by timers of their own each in its own frame.
    assert!(calls >= 6 * frames, "{calls} calls in {frames} frames");
    for replicas in &groups {
        let leads = |replica: &&Group| replica.leadership().borrow().is_leader;
        assert!(replicas.iter().find(leads).unwrap().lease_valid(), "its heartbeats were answered");
    }
    for replica in groups.iter().flatten() {
        replica.shutdown().await;
    }
    cluster.stop().await;
}

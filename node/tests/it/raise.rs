//! A cluster of older and newer programs: new behaviour of a shard begins when every replica knows it, at one entry for all.

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use martlet_node::{
    Config, Surroundings,
    disk::RealDisk,
    log::{GroupId, Log, LogConfig},
    metrics::GroupLabel,
};
use martlet_proto::cluster::{
    admin::{GroupStatus, StatusReply},
    command::{self, command::Kind},
};
use prost::Message;

use crate::{
    nodes::{Nodes, until},
    serving::{ask_shard, enqueue, register},
};

const ALL: [usize; 3] = [1, 2, 3];
const SHARDS: u32 = 3;
const OLDER: u32 = 1;
const NEWER: u32 = 2;
/// First byte of a command's entry in the log.
const COMMAND: u8 = 1;

/// Leaders look often what there is to do.
fn config(nodes: &Nodes, id: usize) -> Config {
    let mut config = nodes.config(id);
    config.shard.expire_every = LOOK;
    config
}

const LOOK: Duration = Duration::from_millis(20);

/// Starts a node whose program knows state versions up to `version`.
async fn start(nodes: &mut Nodes, id: usize, version: u32) {
    let around = Surroundings { state_version: version, ..Surroundings::default() };
    nodes.start_in(id, config(nodes, id), around).await.unwrap();
}

/// A cluster of nodes that know these versions.
async fn created(versions: [u32; 3]) -> Nodes {
    let mut nodes = Nodes::new(3);
    for (id, version) in (1..).zip(versions) {
        start(&mut nodes, id, version).await;
    }
    nodes.create(1, SHARDS).await.unwrap();
    for id in ALL {
        nodes.ready(id).await;
    }
    nodes
}

fn shards(status: &StatusReply) -> impl Iterator<Item = &GroupStatus> {
    status.nodes.iter().flat_map(|node| &node.groups).filter(|group| group.group > 0)
}

/// The state versions that the replicas of all shards have, at however many nodes run.
async fn versions(nodes: &Nodes, at: usize) -> BTreeSet<u32> {
    shards(&nodes.status(at).await).map(|group| group.state_version).collect()
}

async fn until_all_have(nodes: &Nodes, version: u32) {
    until(&format!("every replica has version {version}"), async || {
        let status = nodes.status(1).await;
        shards(&status).count() == 3 * SHARDS as usize && shards(&status).all(|group| group.state_version == version)
    })
    .await;
}

/// Waits until the replicas of each shard are at one index, and finds one state there.
async fn alike(nodes: &Nodes) {
    for shard in 1..=SHARDS {
        until(&format!("the replicas of shard {} are alike", shard - 1), async || {
            let status = nodes.status(1).await;
            let states: Vec<_> = shards(&status)
                .filter(|group| group.group == shard)
                .map(|group| (group.applied_index, group.state_hash, group.state_version))
                .collect();
            states.len() == 3 && states.iter().all(|state| *state == states[0])
        })
        .await;
    }
}

/// Time for leaders to look a few times. What must not happen may only be missed by it, never made up.
async fn looks() {
    tokio::time::sleep(LOOK * 25).await;
}

/// Sends something to every shard.
async fn send_to_all(nodes: &Nodes, of: &[usize], id: u8) {
    for shard in 0..SHARDS {
        let id = id * 10 + u8::try_from(shard).unwrap();
        ask_shard(nodes, of, shard, id, if id < 20 { register() } else { enqueue(b"x") }).await;
    }
}

/// Index and version of each raise in the log of a node that has stopped, by shard.
fn raises(nodes: &Nodes, id: usize, shard: u32) -> Vec<(u64, u32)> {
    let (log, _) = Log::open(LogConfig::new(nodes.data(id).join("log")), Arc::new(RealDisk)).unwrap();
    let group = log.group(GroupId(shard));
    let first = group.purged().map_or(0, |at| at.index) + 1;
    let entries = group.read(first..group.last().unwrap().index + 1).unwrap();
    let found = entries.iter().flat_map(|entry| {
        // One byte says what kind of entry it is.
        let commands = match entry.payload.first() {
            Some(&COMMAND) => command::Entry::decode(entry.payload.slice(1..)).unwrap().commands,
            _ => Vec::new(),
        };
        commands.into_iter().filter_map(|command| match command.kind {
            Some(Kind::Raise(raise)) => Some((entry.at.index, raise.version)),
            _ => None,
        })
    });
    let found = found.collect();
    assert_eq!(first, 1, "nothing was purged, so that no raise is overlooked");
    found
}

/// Each shard was raised once, by one entry that all replicas have.
fn raised_once(nodes: &Nodes, version: u32) {
    for shard in 1..=SHARDS {
        let found = ALL.map(|id| raises(nodes, id, shard));
        assert_eq!(found[0].len(), 1, "shard {}: {found:?}", shard - 1);
        assert_eq!(found[0][0].1, version);
        assert!(found.iter().all(|raises| *raises == found[0]), "shard {}: {found:?}", shard - 1);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn one_older_node_holds_the_raise_back_over_changes_of_leaders_and_then_all_are_raised_at_one_entry() {
    let mut nodes = created([NEWER, NEWER, OLDER]).await;
    send_to_all(&nodes, &ALL, 1).await;
    looks().await;
    assert_eq!(versions(&nodes, 1).await, BTreeSet::from([OLDER]));
    let known: Vec<_> = nodes.status(1).await.nodes.iter().map(|node| node.state_version_known).collect();
    assert_eq!(known, [NEWER, NEWER, OLDER]);

    // Without the older node it is not known what it will be when it returns; and others lead meanwhile.
    nodes.stop(3).await;
    send_to_all(&nodes, &[1, 2], 2).await;
    looks().await;
    assert_eq!(versions(&nodes, 1).await, BTreeSet::from([OLDER]));
    start(&mut nodes, 3, OLDER).await;
    nodes.ready(3).await;
    nodes.stop(1).await;
    send_to_all(&nodes, &[2, 3], 3).await;
    looks().await;
    assert_eq!(versions(&nodes, 2).await, BTreeSet::from([OLDER]));
    start(&mut nodes, 1, NEWER).await;
    nodes.ready(1).await;
    looks().await;
    assert_eq!(versions(&nodes, 1).await, BTreeSet::from([OLDER]));

    nodes.stop(3).await;
    start(&mut nodes, 3, NEWER).await;
    nodes.ready(3).await;
    until_all_have(&nodes, NEWER).await;
    send_to_all(&nodes, &ALL, 4).await;
    alike(&nodes).await;
    until("the metric says so", async || {
        let shown = |group| nodes.started(2).metrics.state_version.get_or_create(&GroupLabel { group }).get();
        (1..=SHARDS).all(|group| shown(group) == i64::from(NEWER))
    })
    .await;

    // Another leader finds nothing to raise; and a restart keeps the version.
    nodes.stop(1).await;
    send_to_all(&nodes, &[2, 3], 5).await;
    start(&mut nodes, 1, NEWER).await;
    nodes.ready(1).await;
    looks().await;
    until_all_have(&nodes, NEWER).await;
    alike(&nodes).await;
    nodes.stop_all().await;
    raised_once(&nodes, NEWER);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_new_shard_has_the_version_that_all_its_nodes_know() {
    let mut nodes = created([NEWER; 3]).await;
    until_all_have(&nodes, NEWER).await;
    send_to_all(&nodes, &ALL, 1).await;
    alike(&nodes).await;
    nodes.stop_all().await;
    raised_once(&nodes, NEWER);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_that_does_not_know_a_shards_version_does_not_open_it_and_says_why() {
    let mut nodes = created([NEWER; 3]).await;
    until_all_have(&nodes, NEWER).await;
    send_to_all(&nodes, &ALL, 1).await;
    nodes.stop(3).await;
    start(&mut nodes, 3, OLDER).await;
    let says = "the shard has state version 2, this program knows up to 1";
    until("the node says why it is not ready", async || {
        let checks = nodes.started(3).readiness().checks;
        checks.iter().any(|(name, found)| *name == "replicas" && found.as_ref().is_err_and(|why| why.contains(says)))
    })
    .await;
    assert!(nodes.status(3).await.nodes[2].groups.iter().all(|group| group.group == 0), "it serves no shard");
    send_to_all(&nodes, &[1, 2], 2).await;
    nodes.stop(3).await;
    start(&mut nodes, 3, NEWER).await;
    nodes.ready(3).await;
    alike(&nodes).await;
    nodes.stop_all().await;
}

//! A cluster is created once, comes back by itself, and keeps its keys to itself.

use std::{collections::BTreeMap, fs, path::Path};

use martlet_node::NodeError;
use martlet_proto::seal::ClusterSecret;
use tonic::Code;

use crate::nodes::{Nodes, secret, until};

#[tokio::test(flavor = "multi_thread")]
async fn three_nodes_make_a_cluster_and_go_on_with_one_away() {
    let mut nodes = Nodes::created(3, 4).await;
    nodes.create_project(2, "100000000001").await.unwrap();
    for id in 1..=3 {
        nodes.knows_projects(id, 1).await;
    }

    nodes.stop(3).await;
    nodes.create_project(1, "100000000002").await.unwrap();
    nodes.knows_projects(2, 2).await;
    until("the status names the node that is away", async || {
        let status = nodes.status(1).await;
        status.nodes.iter().filter(|node| !node.unreachable.is_empty()).map(|node| node.node_id).eq([3])
    })
    .await;

    nodes.start(3).await;
    nodes.ready(3).await;
    nodes.knows_projects(3, 2).await;
    nodes.stop_all().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn every_group_gets_a_leader_and_its_replicas_agree_on_their_state() {
    let mut nodes = Nodes::created(3, 6).await;
    until("every group has one leader that all of its replicas know", async || {
        let mut leaders: BTreeMap<u32, Vec<u64>> = BTreeMap::new();
        for group in nodes.status(1).await.nodes.iter().flat_map(|node| &node.groups) {
            leaders.entry(group.group).or_default().push(group.leader_replica);
        }
        leaders.len() == 7
            && leaders.values().all(|known| known.len() == 3 && known[0] != 0 && known.iter().all(|l| *l == known[0]))
    })
    .await;
    nodes.create_project(1, "").await.unwrap();
    until("all replicas are at one index with one state", async || {
        let mut states: BTreeMap<u32, Vec<(u64, u64)>> = BTreeMap::new();
        for group in nodes.status(2).await.nodes.iter().flat_map(|node| &node.groups) {
            assert_eq!(group.stopped, "");
            states.entry(group.group).or_default().push((group.applied_index, group.state_hash));
        }
        states.values().all(|found| found.iter().all(|state| *state == found[0]))
    })
    .await;
    nodes.stop_all().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_whole_cluster_comes_back_by_itself() {
    let mut nodes = Nodes::created(3, 2).await;
    nodes.create_project(1, "100000000001").await.unwrap();
    nodes.stop_all().await;
    for id in 1..=3 {
        nodes.start(id).await;
    }
    for id in 1..=3 {
        nodes.ready(id).await;
        nodes.knows_projects(id, 1).await;
    }
    nodes.create_project(3, "100000000002").await.unwrap();
    nodes.stop_all().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn creation_waits_for_every_node_and_happens_once() {
    let mut nodes = Nodes::new(3);
    nodes.start(1).await;
    nodes.start(2).await;
    let early = nodes.create(1, 2).await.unwrap_err();
    assert_eq!(early.code(), Code::Unavailable, "{early}");
    assert!(early.message().starts_with("node 3 at "), "{early}");
    nodes.start(3).await;
    nodes.create(1, 2).await.unwrap();
    let again = nodes.create(1, 2).await.unwrap_err();
    assert_eq!(again.code(), Code::AlreadyExists, "{again}");
    nodes.ready(2).await;
    let elsewhere = nodes.create(2, 2).await.unwrap_err();
    assert_eq!(elsewhere.code(), Code::AlreadyExists, "{elsewhere}");
    nodes.stop_all().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_creation_that_failed_half_way_is_finished_by_asking_again() {
    let mut nodes = Nodes::new(3);
    nodes.start(1).await;
    nodes.start(2).await;
    fs::write(nodes.path().join("other"), ClusterSecret::new([1; 32]).to_file_text()).unwrap();
    let mut stranger = nodes.config(3);
    stranger.node.secret_file = nodes.path().join("other");
    nodes.start_as(3, stranger).await.unwrap();
    let refused = nodes.create(1, 2).await.unwrap_err();
    assert!(refused.message().contains("holds another cluster secret"), "{refused}");
    nodes.stop(3).await;
    nodes.start(3).await;
    nodes.create(1, 2).await.unwrap();
    nodes.ready(3).await;
    nodes.stop_all().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_directory_starts_only_as_its_node_with_its_secret_and_once() {
    let mut nodes = Nodes::created(1, 1).await;
    let mut twice = nodes.config(1);
    twice.node.listen.set_port(0);
    assert!(matches!(nodes.start_as(1, twice).await, Err(NodeError::Dir(_))));
    nodes.stop(1).await;

    let mut other_id = nodes.config(1);
    other_id.node.id = 2;
    let error = nodes.start_as(1, other_id).await.unwrap_err();
    assert!(error.to_string().contains("belongs to node 1"), "{error}");

    fs::write(nodes.path().join("other"), ClusterSecret::new([1; 32]).to_file_text()).unwrap();
    let mut other_secret = nodes.config(1);
    other_secret.node.secret_file = nodes.path().join("other");
    let error = nodes.start_as(1, other_secret).await.unwrap_err();
    assert!(error.to_string().contains("not that of cluster"), "{error}");

    nodes.start(1).await;
    nodes.ready(1).await;
    nodes.stop(1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn no_file_of_a_node_holds_a_key_or_the_secret_in_clear() {
    let mut nodes = Nodes::created(1, 1).await;
    let server_key = nodes.create_project(1, "").await.unwrap().server_key;
    let state = nodes.state(1).await;
    let keys: Vec<_> = state.keys.iter().map(|key| secret().unseal(&state.cluster_id, key).unwrap()).collect();
    assert_eq!(keys.len(), 3);
    for key in &state.keys {
        assert!(ClusterSecret::new([1; 32]).unseal(&state.cluster_id, key).is_err());
    }
    nodes.stop(1).await;

    let text = secret().to_file_text();
    let mut looked_at = 0;
    for file in files(&nodes.data(1)) {
        let bytes = fs::read(&file).unwrap();
        looked_at += bytes.len();
        let holds = |what: &[u8]| bytes.windows(what.len()).any(|window| window == what);
        assert!(!keys.iter().any(|key| holds(&key[..16])), "a key in {}", file.display());
        assert!(!holds(&[0xc5; 16]) && !holds(&text.as_bytes()[..16]), "the secret in {}", file.display());
        assert!(!holds(server_key.as_bytes()), "a server key in {}", file.display());
    }
    assert!(looked_at > 0);
}

fn files(dir: &Path) -> Vec<std::path::PathBuf> {
    let entries = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path());
    entries.flat_map(|path| if path.is_dir() { files(&path) } else { vec![path] }).collect()
}

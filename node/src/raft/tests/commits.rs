//! How followers learn of commits: at little cost, and always.

use futures::StreamExt;
use openraft::{
    network::{NetStreamAppend, RPCOption},
    raft::AppendEntriesRequest,
};

use super::*;
use crate::raft::{
    client::Clients,
    types::{Types, Vote, log_id, vote},
};

/// No heartbeat tells of a commit, and no election interferes, while a test has patience.
fn without_heartbeats() -> RaftSettings {
    RaftSettings {
        heartbeat: 3 * PATIENCE,
        heartbeat_min: 2 * PATIENCE,
        election_min: 8 * PATIENCE,
        election_max: 16 * PATIENCE,
        ..settings()
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_follower_learns_of_a_commit_although_no_entry_comes_after_it() {
    let cluster = Cluster::with(3, without_heartbeats()).await;
    let leader = cluster.leader().await;
    leader.propose("a").await.unwrap();
    for node in cluster.nodes.values() {
        assert_eq!(node.has_applied(1).await, words(&["a"]));
    }
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn entries_that_come_one_after_the_other_take_one_append_each_and_follower_not_two() {
    const ENTRIES: usize = 300;
    let cluster = Cluster::with(3, without_heartbeats()).await;
    let leader = cluster.leader().await;
    leader.propose("a").await.unwrap();
    let appends = || leader.network.appends_sent().calls.get();
    let before = appends();
    for _ in 0..ENTRIES {
        leader.propose("a").await.unwrap();
    }
    for node in cluster.nodes.values() {
        node.has_applied(ENTRIES + 1).await;
    }
    let appends = appends() - before;
    // Two followers. Some commits go alone, on a machine where an entry takes longer than they wait.
    assert!(appends <= ENTRIES as u64 * 3, "{appends} appends of {ENTRIES} entries");
    cluster.stop().await;
}

/// Of a stream to a follower, that tells it nothing that it does not know: the answers.
async fn answers(cluster: &Cluster, appends: usize) -> usize {
    let leader = cluster.leader().await;
    let follower = cluster.others(leader.id)[0];
    let last = leader.group.read_barrier().await.unwrap();
    let term = leader.group.leadership().borrow().term;
    let last = log_id(Index { term, index: last });
    let vote: Vote = vote(crate::log::Vote { term, replica: leader.group.replica(), committed: true });
    let append =
        AppendEntriesRequest::<Types> { vote, prev_log_id: Some(last), entries: Vec::new(), leader_commit: Some(last) };
    let local = leader.network.local(GROUP).unwrap();
    let mut clients = Clients { network: leader.network.clone(), local };
    let member = cluster.members().remove(&follower.group.replica()).unwrap();
    let mut client = openraft::RaftNetworkFactory::new_client(&mut clients, follower.group.replica(), &member).await;
    let appends = futures::stream::iter(vec![append; appends]);
    let answers = client.stream_append(appends, RPCOption::new(PATIENCE)).await.unwrap();
    let stored = answers.map(|answer| assert_eq!(answer.unwrap().unwrap(), Some(last)));
    tokio::time::timeout(PATIENCE, stored.count()).await.unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_stream_of_appends_begins_and_ends_with_is_sent_and_answered() {
    let cluster = Cluster::of(3).await;
    cluster.leader().await.propose("a").await.unwrap();
    for node in cluster.nodes.values() {
        node.has_applied(1).await;
    }
    assert_eq!(answers(&cluster, 1).await, 1, "the first, which may be a question");
    let sent = answers(&cluster, 9).await;
    assert!((2..9).contains(&sent), "{sent}: not the first, and the newest commit of the others");
    cluster.stop().await;
}

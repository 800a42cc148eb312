//! How followers learn what is committed: with the entry that comes next, or a moment later without one.

use super::*;

/// Leaders that send no heartbeat in the time a test takes: a heartbeat tells of commits too.
async fn without_heartbeats() -> Cluster {
    let settings = RaftSettings {
        heartbeat: Duration::from_secs(20),
        heartbeat_min: Duration::from_secs(19),
        election_min: Duration::from_secs(60),
        election_max: Duration::from_secs(90),
        ..settings()
    };
    Cluster::with(3, settings).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn followers_learn_of_the_last_commit_though_no_entry_comes_after_it() {
    let cluster = without_heartbeats().await;
    let leader = cluster.leader().await;
    leader.propose("a").await.unwrap();
    leader.propose("b").await.unwrap();
    for node in cluster.nodes.values() {
        assert_eq!(node.has_applied(2).await, words(&["a", "b"]));
    }
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn entries_one_after_the_other_cost_a_follower_one_append_each_and_not_one_more_for_the_commit() {
    const ENTRIES: u64 = 200;
    let cluster = without_heartbeats().await;
    let leader = cluster.leader().await;
    leader.propose("first").await.unwrap();
    let sent = leader.network.appends_sent();
    let before = sent.calls.get();
    for _ in 0..ENTRIES {
        leader.propose("next").await.unwrap();
        // So that a commit would have the time to leave alone.
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    let calls = sent.calls.get() - before;
    // One to the follower that makes the majority, at most one more to the other, which may take several entries at once. Commits
    // that told of themselves would make it up to four; where the machine stalls, some do.
    assert!(calls >= ENTRIES, "{calls} appends for {ENTRIES} entries");
    assert!(calls < 5 * ENTRIES / 2, "{calls} appends for {ENTRIES} entries");
    for node in cluster.nodes.values() {
        node.has_applied(1 + usize::try_from(ENTRIES).unwrap()).await;
    }
    cluster.stop().await;
}

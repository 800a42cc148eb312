//! Replicas that cannot apply an entry: they wait, keep the group alive, and go on when it is decided.

use std::collections::BTreeMap;

use futures::future::BoxFuture;
use tokio::sync::watch;

use super::*;

/// Decided by the test, for every node at once.
#[derive(Debug)]
pub(super) struct ByHand(watch::Sender<BTreeMap<u64, Decision>>);

impl Default for ByHand {
    fn default() -> Self {
        ByHand(watch::channel(BTreeMap::new()).0)
    }
}

impl ByHand {
    fn decide(&self, index: u64, decision: Decision) {
        self.0.send_modify(|decided| {
            decided.insert(index, decision);
        });
    }
}

impl Decisions for ByHand {
    fn of(&self, index: u64) -> Decision {
        self.0.borrow().get(&index).copied().unwrap_or(Decision::None)
    }

    fn changed(&self) -> BoxFuture<'static, ()> {
        let mut decided = self.0.subscribe();
        Box::pin(async move { drop(decided.changed().await) })
    }
}

impl Node {
    /// The stop this replica comes to, once it is one that `fits`.
    async fn waits(&self, fits: impl Fn(&Stop) -> bool) -> Stop {
        let waiting = async {
            loop {
                if let Some(stop) = self.group.status().waits.filter(&fits) {
                    return stop;
                }
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        tokio::time::timeout(PATIENCE, waiting).await.unwrap()
    }

    async fn goes_on(&self) {
        let going = async {
            while self.group.status().waits.is_some() {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        tokio::time::timeout(PATIENCE, going).await.unwrap();
    }
}

fn is_poison(stop: &Stop) -> bool {
    matches!(&stop.why, Why::Poison { operation, .. } if operation == "command 0, Poison")
}

/// Whoever leads answers; asked until one does.
async fn proposed(cluster: &Cluster, what: &'static str) {
    let answered = async {
        while !matches!(cluster.leader().await.propose(what).await, Ok(Reply::Shard(_))) {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(PATIENCE, answered).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_entry_that_nobody_can_apply_is_met_by_all_again_after_a_restart_and_skipped_by_all_once_decided() {
    let mut cluster = Cluster::of(3).await;
    let leader = cluster.leader().await;
    leader.propose("a").await.unwrap();
    let outcome = leader.propose("poison").await;
    assert!(matches!(&outcome, Err(ProposeError::Stopped(why)) if why.contains("command 0, Poison")), "{outcome:?}");
    let first = leader.waits(is_poison).await;
    for node in cluster.nodes.values() {
        assert_eq!(node.waits(is_poison).await, first);
        let status = node.group.status();
        assert_eq!(status.stopped, Some(first.to_string()));
        node.becomes(|l| !l.is_leader).await;
        assert!(!node.group.lease_valid());
        assert!(matches!(node.propose("b").await, Err(ProposeError::NotLeader { leader: None, .. })));
    }

    // One that is started again meets it again; one that knows of a hold does not even try.
    let disk = cluster.nodes.remove(&1).unwrap().kill().await;
    cluster.start(1, disk).await;
    assert_eq!(cluster.nodes[&1].waits(is_poison).await, first);
    let Index { index, term } = first.at;
    cluster.decisions.decide(index, Decision::Held);
    let disk = cluster.nodes.remove(&2).unwrap().kill().await;
    cluster.start(2, disk).await;
    let held = cluster.nodes[&2].waits(|stop| stop.why == Why::Held).await;
    assert_eq!((held.at, held.digest), (first.at, first.digest));

    // A skip of another entry moves nobody past this one.
    cluster.decisions.decide(index, Decision::Skip { term, digest: [7; 32] });
    for node in cluster.nodes.values() {
        node.waits(|stop| stop.why == Why::OtherEntry).await;
    }
    let digest = first.digest;
    cluster.decisions.decide(index, Decision::None);
    for node in cluster.nodes.values() {
        node.waits(is_poison).await;
    }
    cluster.decisions.decide(index, Decision::Skip { term, digest });
    for node in cluster.nodes.values() {
        node.goes_on().await;
    }
    proposed(&cluster, "b").await;
    // The restarted ones forgot with their process what they had applied before, and applied it again.
    for node in cluster.nodes.values() {
        let applied = node.has_applied(2).await;
        assert_eq!(applied[..2], words(&["a", "b"])[..], "node {}", node.id);
    }

    // One that replays the log from its beginning does the same.
    let disk = cluster.nodes.remove(&3).unwrap().kill().await;
    cluster.start(3, disk).await;
    assert_eq!(cluster.nodes[&3].has_applied(2).await[..2], words(&["a", "b"])[..]);
    assert_eq!(cluster.nodes[&3].group.status().waits, None);
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replica_that_alone_cannot_apply_an_entry_hands_over_and_ends_when_it_is_left_behind() {
    let cluster = Cluster::of(3).await;
    let sick = cluster.leader().await;
    for node in cluster.nodes.values().filter(|node| node.id != sick.id) {
        node.seen.lock().unwrap().knows_poison = true;
    }
    sick.propose("a").await.unwrap();
    assert!(matches!(sick.propose("poison").await, Err(ProposeError::Stopped(_))));
    sick.waits(is_poison).await;

    // Another applies what it could not, and leads.
    proposed(&cluster, "b").await;
    let leader = cluster.leader().await;
    assert_ne!(leader.id, sick.id);
    assert_eq!(leader.has_applied(3).await, words(&["a", "poison", "b"]));
    assert!(is_poison(&sick.group.status().waits.unwrap()), "it keeps its log and waits");

    for _ in 0..20 {
        let many = (0..50).map(|_| leader.propose("more"));
        assert!(futures::future::join_all(many).await.iter().all(Result::is_ok));
    }
    let mut stopped = sick.group.stopped();
    let why =
        tokio::time::timeout(PATIENCE, stopped.wait_for(Option::is_some)).await.unwrap().unwrap().clone().unwrap();
    assert!(why.contains("command 0, Poison") && why.contains("have gone on"), "{why}");
    assert_eq!(sick.seen.lock().unwrap().applied, words(&["a"]));
    cluster.stop().await;
}

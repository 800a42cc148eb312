//! An entry that no replica can apply: its shard stops, the others go on, and it is skipped by decision of the meta group.

use std::collections::BTreeSet;

use martlet_node::{bug, metrics::GroupLabel};
use martlet_proto::cluster::{
    admin::{GroupStatus, SkipEntryReply, SkipEntryRequest},
    meta::SkipState,
    queue::{Resolve, Resolved, answer, batch_reply::Outcome, operation, refused::Reason},
};
use tonic::{Code, Status};

use crate::{
    nodes::{Nodes, until},
    serving::{DEVICE, Submit, ask, ask_shard, enqueue, payloads_at, register},
};

const ALL: [usize; 3] = [1, 2, 3];

/// What each node says of shard 0.
async fn statuses(nodes: &Nodes) -> Vec<GroupStatus> {
    let nodes = nodes.status(1).await.nodes;
    nodes.into_iter().flat_map(|node| node.groups).filter(|group| group.group == 1).collect()
}

/// Sends a message that cannot be applied to whoever leads; its id, once its outcome is not known.
async fn poison(nodes: &Nodes, id: u8) -> bytes::Bytes {
    let poisoned = async {
        loop {
            for at in ALL {
                let mut submit = Submit::open(nodes, at).await;
                for _ in 0..2 {
                    match submit.outcome(id, enqueue(bug::POISON)).await {
                        Outcome::Unknown(_) => return submit.last_id,
                        Outcome::Answers(answers) => panic!("poison was applied: {answers:?}"),
                        Outcome::Redirect(_) | Outcome::Refused(_) => {}
                    }
                }
            }
            tokio::time::sleep(std::time::Duration::from_millis(50)).await;
        }
    };
    tokio::time::timeout(std::time::Duration::from_secs(60), poisoned).await.expect("shard 0 gets a leader")
}

/// Waits until every replica of shard 0 waits before one entry; what they say of it.
async fn all_stopped(nodes: &Nodes) -> GroupStatus {
    until("every replica has stopped", async || {
        let statuses = statuses(nodes).await;
        statuses.len() == 3 && statuses.iter().all(|status| status.poison.is_some())
    })
    .await;
    let statuses = statuses(nodes).await;
    assert!(statuses.iter().all(|status| status.poison == statuses[0].poison), "{statuses:?}");
    assert!(statuses.iter().all(|status| status.stopped == statuses[0].stopped), "{statuses:?}");
    statuses.into_iter().next().unwrap()
}

async fn skip(nodes: &Nodes, at: usize, index: u64, digest: &[u8]) -> Result<SkipEntryReply, Status> {
    let request = SkipEntryRequest {
        shard: 0,
        index,
        reason: "a test put it there".into(),
        by: "tester".into(),
        digest: digest.to_vec().into(),
    };
    nodes.admin(at).skip_entry(request).await.map(tonic::Response::into_inner)
}

#[tokio::test(flavor = "multi_thread")]
async fn poison_stops_one_shard_names_the_entry_again_after_a_restart_and_is_skipped_on_every_replica_alike() {
    bug::poison();
    let mut nodes = Nodes::created(3, 2).await;
    ask(&nodes, &ALL, 1, register()).await;
    ask(&nodes, &ALL, 2, enqueue(b"before")).await;
    let poisoned = poison(&nodes, 3).await;

    // Named, with what was at it; nothing of it was kept; no process has ended.
    let stop = all_stopped(&nodes).await;
    let entry = stop.poison.clone().unwrap();
    assert_eq!((entry.operation.as_str(), entry.what.as_str()), ("command 0, Enqueue", "panicked: poisoned by a test"));
    for words in [
        &format!("shard 0 waits before entry {} of term {}", entry.index, entry.term),
        "command 0, Enqueue",
        "poisoned by a test",
    ] {
        assert!(stop.stopped.contains(words), "{words} is not in {}", stop.stopped);
    }
    assert_eq!(stop.applied_index, entry.index - 1);
    let hashes: BTreeSet<_> =
        statuses(&nodes).await.iter().map(|status| (status.applied_index, status.state_hash)).collect();
    assert_eq!(hashes.len(), 1, "{hashes:?}");
    until("the metric names the entry", async || {
        let label = GroupLabel { group: 1 };
        let metrics = &nodes.started(1).metrics;
        metrics.poisoned.get_or_create(&label).get() == i64::try_from(entry.index).unwrap()
            && metrics.groups_stopped.get() == 1
    })
    .await;

    // Its operations are refused for now, and that is definite; the other shard goes on.
    for at in ALL {
        match Submit::open(&nodes, at).await.outcome(4, enqueue(b"refused")).await {
            Outcome::Redirect(_) => {}
            Outcome::Refused(refused) => assert_eq!(refused.reason(), Reason::NoLease),
            outcome => panic!("not refused but {outcome:?}"),
        }
    }
    let registered = ask_shard(&nodes, &ALL, 1, 5, register()).await;
    assert!(matches!(registered, answer::Kind::Registered(_)), "{registered:?}");

    // A restart meets it again, in the same words.
    nodes.stop(2).await;
    nodes.start(2).await;
    nodes.ready(2).await;
    assert_eq!(all_stopped(&nodes).await.stopped, stop.stopped);

    // Another index, another digest, or no reason: refused, and nothing moves.
    for (index, digest) in [(entry.index + 1, &[][..]), (entry.index - 1, &[]), (entry.index, b"not it")] {
        let refused = skip(&nodes, 3, index, digest).await.unwrap_err();
        assert_eq!(refused.code(), Code::FailedPrecondition, "{refused}");
    }
    let request = SkipEntryRequest { shard: 0, index: entry.index, ..SkipEntryRequest::default() };
    let refused = nodes.admin(1).skip_entry(request).await.unwrap_err();
    assert!(refused.message().contains("needs a reason"), "{refused}");
    assert!(nodes.state(1).await.skips.is_empty());
    assert_eq!(all_stopped(&nodes).await.stopped, stop.stopped);

    // Skipped: all go on without a restart, and are alike.
    let SkipEntryReply { skip: decided, waiting_nodes } =
        skip(&nodes, 3, entry.index, &entry.digest[..4]).await.unwrap();
    let decided = decided.unwrap();
    assert_eq!((decided.state(), decided.by.as_str()), (SkipState::Skipped, "tester"));
    assert_eq!((decided.term, &decided.digest), (entry.term, &entry.digest));
    assert_eq!(waiting_nodes, [0; 0]);
    assert_eq!(
        skip(&nodes, 1, entry.index, &[]).await.unwrap().skip,
        Some(decided.clone()),
        "asked again it says the same"
    );
    assert_eq!(nodes.state(2).await.skips, [decided]);
    let accepted = ask(&nodes, &ALL, 6, enqueue(b"after")).await;
    assert!(matches!(accepted, answer::Kind::Accepted(_)), "{accepted:?}");
    // What was skipped was not done, and never will be.
    let resolved = ask(&nodes, &ALL, 7, operation::Kind::Resolve(Resolve { id: poisoned })).await;
    assert!(
        matches!(&resolved, answer::Kind::Resolved(resolved) if **resolved == Resolved { answer: None }),
        "{resolved:?}"
    );
    alike(&nodes).await;
    assert_eq!(payloads_at(&nodes, &ALL, DEVICE, 2).await, [b"before".to_vec(), b"after".to_vec()]);

    // And stay so: over a restart of all, and where a second entry of the kind comes.
    for id in ALL {
        nodes.stop(id).await;
        nodes.start(id).await;
        nodes.ready(id).await;
    }
    alike(&nodes).await;
    poison(&nodes, 8).await;
    let second = all_stopped(&nodes).await.poison.unwrap();
    assert!(second.index > entry.index);
    skip(&nodes, 1, second.index, &[]).await.unwrap();
    alike(&nodes).await;
    nodes.stop_all().await;
}

/// Waits until all replicas of shard 0 run and are at one index with one state.
async fn alike(nodes: &Nodes) {
    until("all replicas run and are alike", async || {
        let statuses = statuses(nodes).await;
        statuses.len() == 3
            && statuses.iter().all(|status| status.stopped.is_empty() && status.poison.is_none())
            && statuses.iter().all(|status| {
                (status.applied_index, status.state_hash) == (statuses[0].applied_index, statuses[0].state_hash)
            })
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_entry_is_not_skipped_while_a_node_does_not_answer_and_its_hold_is_lifted() {
    bug::poison();
    let mut nodes = Nodes::created(3, 1).await;
    ask(&nodes, &ALL, 1, register()).await;
    poison(&nodes, 2).await;
    let entry = all_stopped(&nodes).await.poison.unwrap();
    nodes.stop(3).await;
    let refused = skip(&nodes, 1, entry.index, &[]).await.unwrap_err();
    assert!(refused.message().contains("node 3 does not answer"), "{refused}");
    assert!(nodes.state(1).await.skips.iter().all(|skip| skip.state() == SkipState::Lifted));
    nodes.start(3).await;
    nodes.ready(3).await;
    all_stopped(&nodes).await;
    skip(&nodes, 1, entry.index, &[]).await.unwrap();
    alike(&nodes).await;
    nodes.stop_all().await;
}

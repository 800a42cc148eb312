//! Skips: entries of shards that no replica can apply, and what was decided of them.
//!
//! Owns the rules by which the meta state takes and decides them, what they mean to a replica ([`Decided`]), and the verdict
//! whether all replicas of a shard have confirmed ([`judge`]). A skip takes two commands. `HoldEntry` names the entry, why and by
//! whom; a node that has it on disk does not let its replica try the entry any more. When every replica has tried the entry in
//! vain *and* has the hold on disk, `SkipEntry` decides, and every replica passes over the entry: those that wait, those that
//! restart, those that replay the log later. `LiftHold` gives it up. Which of the two comes first in the meta group's log decides;
//! a hold that was replaced or lifted cannot be decided any more. So no replica can have applied what others skip.

use std::sync::Arc;

use futures::future::{BoxFuture, pending};
use martlet_proto::cluster::{
    admin::{NodeStatus, Poison},
    meta::{HoldEntry, LiftHold, MetaState, Skip, SkipEntry, SkipState},
};
use tokio::sync::watch;

use crate::{
    log::GroupId,
    raft::{Decision, Decisions},
};

/// Most skips, lifted ones included. They are kept for good; each is a defect of a program that somebody has looked at.
pub const SKIPS_MAX: usize = 1_000;
/// Most bytes of a reason.
pub const REASON_MAX: usize = 1_024;
/// Most bytes of who says so.
pub const BY_MAX: usize = 128;

/// Takes a hold. The skip as it is now, and whether it changed.
pub(super) fn hold(state: &mut MetaState, index: u64, now_ms: u64, hold: &HoldEntry) -> Result<(Skip, bool), String> {
    let HoldEntry { shard, index: entry, term, digest, reason, by } = hold;
    if *shard >= state.shard_count {
        return Err(format!("there is no shard {shard}; the cluster has {}", state.shard_count));
    }
    if *entry == 0 || digest.len() != 32 {
        return Err("an entry is named by its index and a digest of 32 bytes".into());
    }
    let is_text = |text: &str, max| text.len() <= max && !text.chars().any(char::is_control);
    if reason.trim().is_empty() || !is_text(reason, REASON_MAX) || !is_text(by, BY_MAX) {
        return Err(format!(
            "a skip needs a reason, of at most {REASON_MAX} bytes without control characters; its author has at most {BY_MAX}"
        ));
    }
    let asked = Skip {
        shard: *shard,
        index: *entry,
        term: *term,
        digest: digest.clone(),
        reason: reason.clone(),
        by: by.clone(),
        asked_ms: now_ms,
        decided_ms: 0,
        hold: index,
        state: SkipState::Held.into(),
    };
    match find(&state.skips, *shard, *entry) {
        Ok(at) => {
            let known = &mut state.skips[at];
            let same = known.term == *term && known.digest == *digest;
            let repeated = same && known.reason == *reason && known.by == *by;
            match known.state() {
                SkipState::Skipped if same => Ok((known.clone(), false)),
                SkipState::Skipped => {
                    Err(format!("another entry at index {entry} of shard {shard} is skipped already"))
                }
                SkipState::Held if repeated => Ok((known.clone(), false)),
                SkipState::Held | SkipState::Lifted | SkipState::Unspecified => {
                    *known = asked.clone();
                    Ok((asked, true))
                }
            }
        }
        Err(_) if state.skips.len() >= SKIPS_MAX => Err(format!("{SKIPS_MAX} entries have been skipped already")),
        Err(at) => {
            state.skips.insert(at, asked.clone());
            Ok((asked, true))
        }
    }
}

/// Decides a hold.
pub(super) fn skip(state: &mut MetaState, now_ms: u64, skip: &SkipEntry) -> Result<(Skip, bool), String> {
    decide(state, now_ms, (skip.shard, skip.index, skip.hold), SkipState::Skipped)
}

/// Gives a hold up.
pub(super) fn lift(state: &mut MetaState, now_ms: u64, lift: &LiftHold) -> Result<(Skip, bool), String> {
    decide(state, now_ms, (lift.shard, lift.index, lift.hold), SkipState::Lifted)
}

fn decide(
    state: &mut MetaState,
    now_ms: u64,
    (shard, index, hold): (u32, u64, u64),
    to: SkipState,
) -> Result<(Skip, bool), String> {
    let at =
        find(&state.skips, shard, index).map_err(|_| format!("nobody asked to skip entry {index} of shard {shard}"))?;
    let known = &mut state.skips[at];
    if known.hold != hold {
        return Err(format!("the skip of entry {index} of shard {shard} was asked for again meanwhile"));
    }
    match known.state() {
        now if now == to => Ok((known.clone(), false)),
        SkipState::Held => {
            (known.state, known.decided_ms) = (to.into(), now_ms);
            Ok((known.clone(), true))
        }
        SkipState::Skipped => Err(format!("entry {index} of shard {shard} is skipped already")),
        SkipState::Lifted | SkipState::Unspecified => {
            Err(format!("the skip of entry {index} of shard {shard} was given up meanwhile"))
        }
    }
}

fn find(skips: &[Skip], shard: u32, index: u64) -> Result<usize, usize> {
    skips.binary_search_by_key(&(shard, index), |skip| (skip.shard, skip.index))
}

/// What the newest meta state on this node says of the entries of one shard.
#[derive(Debug)]
pub struct Decided {
    shard: u32,
    kept: watch::Receiver<Arc<MetaState>>,
}

impl Decided {
    /// Follows what is kept.
    pub fn new(shard: u32, kept: watch::Receiver<Arc<MetaState>>) -> Self {
        Self { shard, kept }
    }
}

impl Decisions for Decided {
    fn of(&self, index: u64) -> Decision {
        let kept = self.kept.borrow();
        let Ok(at) = find(&kept.skips, self.shard, index) else { return Decision::None };
        let skip = &kept.skips[at];
        match skip.state() {
            SkipState::Held => Decision::Held,
            // Of another length it would not be in the state; should it be, no entry has it.
            SkipState::Skipped => {
                Decision::Skip { term: skip.term, digest: skip.digest[..].try_into().unwrap_or([0; 32]) }
            }
            SkipState::Lifted | SkipState::Unspecified => Decision::None,
        }
    }

    fn changed(&self) -> BoxFuture<'static, ()> {
        let mut kept = self.kept.clone();
        kept.mark_unchanged();
        Box::pin(async move {
            if kept.changed().await.is_err() {
                pending().await
            }
        })
    }
}

/// Whether an entry can be skipped, as far as the replicas of its shard are known.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// Every replica has tried it in vain, and, if that was asked for, has the hold on disk.
    Confirmed {
        /// Term of the entry.
        term: u64,
        /// Its digest.
        digest: bytes::Bytes,
    },
    /// Not yet, for people.
    NotYet(String),
    /// It must not be, for people.
    Never(String),
}

/// Judges by what the nodes say of themselves. `digest` is how the digest must begin; `hold` must be on every node's disk.
pub fn judge(
    meta: &MetaState,
    nodes: &[NodeStatus],
    (shard, index): (u32, u64),
    digest: &[u8],
    hold: Option<u64>,
) -> Verdict {
    let Some(map) = meta.shards.iter().find(|map| map.shard == shard) else {
        return Verdict::Never(format!("there is no shard {shard}; the cluster has {}", meta.shard_count));
    };
    let group = GroupId(shard + 1).0;
    let mut found: Option<&Poison> = None;
    let mut not_yet = Vec::new();
    for replica in &map.replicas {
        let node_id = replica.node_id;
        let Some(node) = nodes.iter().find(|node| node.node_id == node_id && node.unreachable.is_empty()) else {
            not_yet.push(format!("node {node_id} does not answer"));
            continue;
        };
        let Some(status) = node.groups.iter().find(|status| status.group == group) else {
            not_yet.push(format!("node {node_id} has not opened its replica"));
            continue;
        };
        if status.replica_id == replica.replica_id && status.applied_index >= index {
            return Verdict::Never(format!(
                "node {node_id} has applied it; to skip it elsewhere would make the replicas differ. Only the others are wrong: \
                 start them again with the program that runs there"
            ));
        }
        match &status.poison {
            Some(poison) if poison.index == index && !poison.digest.starts_with(digest) => {
                return Verdict::Never(format!(
                    "node {node_id} has another entry there: its digest is {}",
                    hex(&poison.digest)
                ));
            }
            Some(poison) if poison.index == index && !poison.operation.is_empty() => {
                if found.is_some_and(|found| (found.term, &found.digest) != (poison.term, &poison.digest)) {
                    return Verdict::Never("the replicas have different entries there: the log of one is wrong".into());
                }
                found = Some(poison);
                if hold.is_some_and(|hold| status.hold != hold) {
                    not_yet.push(format!("node {node_id} has not confirmed that it waits"));
                }
            }
            Some(poison) if poison.index == index => {
                not_yet.push(format!(
                    "node {node_id} has not tried it since it started: it was held by an earlier command"
                ));
            }
            Some(poison) => {
                return Verdict::Never(format!(
                    "node {node_id} waits before entry {} and comes to it only after that",
                    poison.index
                ));
            }
            None if status.stopped.is_empty() => {
                not_yet.push(format!(
                    "node {node_id} has not stopped there: it has applied up to {}",
                    status.applied_index
                ));
            }
            None => not_yet.push(format!("the replica of node {node_id} has stopped: {}", status.stopped)),
        }
    }
    match found {
        Some(poison) if not_yet.is_empty() => Verdict::Confirmed { term: poison.term, digest: poison.digest.clone() },
        _ => Verdict::NotYet(not_yet.join("; ")),
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use martlet_proto::cluster::{
        admin::GroupStatus,
        meta::{Replica, ShardReplicas},
    };

    use super::*;

    fn cluster() -> MetaState {
        let replica = |id| Replica { node_id: id, replica_id: 10 + id };
        let map = ShardReplicas { shard: 1, epoch: 1, replicas: [1, 2, 3].map(replica).into() };
        MetaState { shard_count: 2, shards: vec![map], ..MetaState::default() }
    }

    fn asked(digest: u8, by: &str) -> HoldEntry {
        HoldEntry {
            shard: 1,
            index: 17,
            term: 3,
            digest: vec![digest; 32].into(),
            reason: "a defect".into(),
            by: by.into(),
        }
    }

    /// What node `id` says of shard 1: stopped at entry 17.
    fn node(id: u64) -> NodeStatus {
        let poison = Poison {
            index: 17,
            term: 3,
            digest: vec![5; 32].into(),
            operation: "command 0, Enqueue".into(),
            what: "panicked".into(),
        };
        let group = GroupStatus {
            group: 2,
            replica_id: 10 + id,
            applied_index: 16,
            stopped: "it waits".into(),
            poison: Some(poison),
            hold: 9,
            ..GroupStatus::default()
        };
        NodeStatus { node_id: id, groups: vec![group], ..NodeStatus::default() }
    }

    fn judged(change: impl FnOnce(&mut Vec<NodeStatus>), digest: &[u8], hold: Option<u64>) -> Verdict {
        let mut nodes = vec![node(1), node(2), node(3)];
        change(&mut nodes);
        judge(&cluster(), &nodes, (1, 17), digest, hold)
    }

    fn confirmed() -> Verdict {
        Verdict::Confirmed { term: 3, digest: Bytes::from(vec![5; 32]) }
    }

    #[test]
    fn all_replicas_must_have_tried_the_entry_and_have_the_hold() {
        assert_eq!(judged(|_| {}, &[], None), confirmed());
        assert_eq!(judged(|_| {}, &[5, 5], Some(9)), confirmed());
        let not_yet = |change: fn(&mut Vec<NodeStatus>), word: &str| match judged(change, &[], Some(9)) {
            Verdict::NotYet(why) => assert!(why.contains("node 2") && why.contains(word), "{why}"),
            verdict => panic!("{verdict:?} where {word}"),
        };
        not_yet(|nodes| drop(nodes.remove(1)), "does not answer");
        not_yet(|nodes| nodes[1].unreachable = "no".into(), "does not answer");
        not_yet(|nodes| nodes[1].groups.clear(), "has not opened");
        not_yet(|nodes| nodes[1].groups[0].hold = 8, "has not confirmed");
        not_yet(|nodes| nodes[1].groups[0].poison.as_mut().unwrap().operation.clear(), "has not tried");
        not_yet(|nodes| nodes[1].groups[0].poison = None, "has stopped: it waits");
        not_yet(
            |nodes| {
                nodes[1].groups[0].poison = None;
                nodes[1].groups[0].stopped.clear();
            },
            "applied up to 16",
        );
    }

    #[test]
    fn an_entry_that_a_replica_has_applied_or_that_differs_is_never_skipped() {
        let never = |change: fn(&mut Vec<NodeStatus>), digest: &[u8], word: &str| match judged(change, digest, None) {
            Verdict::Never(why) => assert!(why.contains(word), "{why}"),
            verdict => panic!("{verdict:?} where {word}"),
        };
        never(
            |nodes| {
                nodes[2].groups[0].applied_index = 17;
                nodes[2].groups[0].poison = None;
            },
            &[],
            "node 3 has applied it",
        );
        never(|_| {}, &[6], "another entry there");
        never(
            |nodes| nodes[2].groups[0].poison.as_mut().unwrap().digest = vec![6; 32].into(),
            &[],
            "different entries",
        );
        never(|nodes| nodes[0].groups[0].poison.as_mut().unwrap().index = 12, &[], "waits before entry 12");
        assert!(matches!(judge(&cluster(), &[], (7, 1), &[], None), Verdict::Never(_)));
    }

    #[test]
    fn a_skip_is_decided_once_and_only_under_the_newest_hold() {
        let mut state = cluster();
        let (first, changed) = hold(&mut state, 100, 1_000, &asked(5, "a")).unwrap();
        assert!(changed && first.hold == 100);
        assert_eq!(
            hold(&mut state, 101, 1_001, &asked(5, "a")).unwrap(),
            (first, false),
            "repeated, it answers the same"
        );
        let (second, _) = hold(&mut state, 102, 1_002, &asked(5, "b")).unwrap();
        let of = |hold| SkipEntry { shard: 1, index: 17, hold };
        assert!(skip(&mut state, 1_003, &of(100)).is_err(), "that hold was replaced");
        let (decided, changed) = skip(&mut state, 1_003, &of(second.hold)).unwrap();
        assert!(changed && decided.state() == SkipState::Skipped && decided.decided_ms == 1_003);
        assert_eq!(skip(&mut state, 1_004, &of(102)).unwrap(), (decided.clone(), false));
        assert!(lift(&mut state, 1_005, &LiftHold { shard: 1, index: 17, hold: 102 }).is_err());
        assert_eq!(hold(&mut state, 106, 1_006, &asked(5, "c")).unwrap(), (decided, false));
        assert!(hold(&mut state, 106, 1_006, &asked(6, "c")).is_err(), "another entry");
    }

    #[test]
    fn a_lifted_hold_cannot_be_decided_and_may_be_asked_for_again() {
        let mut state = cluster();
        hold(&mut state, 100, 1_000, &asked(5, "a")).unwrap();
        lift(&mut state, 1_001, &LiftHold { shard: 1, index: 17, hold: 100 }).unwrap();
        assert!(skip(&mut state, 1_002, &SkipEntry { shard: 1, index: 17, hold: 100 }).is_err());
        let (again, changed) = hold(&mut state, 103, 1_003, &asked(5, "a")).unwrap();
        assert!(changed && again.hold == 103);
    }

    #[test]
    fn a_hold_names_its_entry_reason_and_author_within_bounds() {
        let mut state = cluster();
        let mut refused = |change: fn(&mut HoldEntry)| {
            let mut asked = asked(5, "a");
            change(&mut asked);
            assert!(hold(&mut state, 1, 1, &asked).is_err(), "{asked:?}");
        };
        refused(|asked| asked.shard = 2);
        refused(|asked| asked.index = 0);
        refused(|asked| asked.digest = Bytes::from_static(b"short"));
        refused(|asked| asked.reason = " ".into());
        refused(|asked| asked.reason = "x".repeat(REASON_MAX + 1));
        refused(|asked| asked.by = "a\nb".into());
        let entries = u64::try_from(SKIPS_MAX).unwrap();
        for index in 1..=entries {
            hold(&mut state, index, 1, &HoldEntry { index, ..asked(5, "a") }).unwrap();
        }
        assert!(hold(&mut state, 1, 1, &HoldEntry { index: entries + 1, ..asked(5, "a") }).is_err());
        assert!(state.skips.is_sorted_by_key(|skip| (skip.shard, skip.index)));
    }

    #[tokio::test]
    async fn a_replica_is_told_what_is_decided_of_its_shard_and_when_that_changes() {
        let mut state = cluster();
        let (kept, following) = watch::channel(Arc::new(state.clone()));
        let decided = Decided::new(1, following.clone());
        let changed = decided.changed();
        assert_eq!(decided.of(17), Decision::None);
        hold(&mut state, 100, 1, &asked(5, "a")).unwrap();
        kept.send_replace(Arc::new(state.clone()));
        changed.await;
        assert_eq!((decided.of(17), decided.of(16)), (Decision::Held, Decision::None));
        assert_eq!(Decided::new(0, following).of(17), Decision::None, "another shard");
        skip(&mut state, 2, &SkipEntry { shard: 1, index: 17, hold: 100 }).unwrap();
        kept.send_replace(Arc::new(state));
        assert_eq!(decided.of(17), Decision::Skip { term: 3, digest: [5; 32] });
    }
}

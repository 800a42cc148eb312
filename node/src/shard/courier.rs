//! Carries publishes from the homes that this node leads to the leaders of all shards.
//!
//! Owns one task of the node, and its calls: to itself directly, to other nodes over the stream that gateways submit on, one call to
//! a node at a time. [`super::hand_over`] decides; what a leader refuses, or does not answer in time, is carried again.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    sync::Arc,
    time::{Duration, Instant},
};

use futures::{StreamExt, future::BoxFuture, stream::FuturesUnordered};
use martlet_proto::{
    cluster::queue::{Batch, BatchReply, Operation, answer, batch_reply::Outcome},
    message::Sequence,
    shard::Shard,
};
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;

use super::{
    hand_over::{HandOver, Place},
    replies::Replies,
    shards::Shards,
};

/// Publishes read at a time for one home.
const READ_AT_ONCE: usize = 256;
/// Longest wait for a node's answers; without a quorum they do not come.
const ANSWERS_MAX: Duration = Duration::from_secs(2);
/// Between two looks at what this node keeps, where nothing was published.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// Reaches other nodes.
pub trait Courier: Send + Sync + fmt::Debug + 'static {
    /// Submits batches to a node and gives back what it answered before the call ended.
    fn submit(&self, node: u64, batches: Vec<Batch>) -> BoxFuture<'static, Result<Vec<BatchReply>, String>>;
}

/// What one call came back with.
struct Returned {
    node: u64,
    sent: BTreeMap<Shard, Vec<Place>>,
    replies: Vec<BatchReply>,
}

impl Shards {
    /// Hands over what is published until `end` fires. One task of the node; [`Shards::shutdown`] awaits it.
    pub(super) async fn hand_over_all(self: Arc<Self>, end: CancellationToken) {
        let mut book = HandOver::default();
        // Where a reply said that the leader is, for shards without a replica here.
        let mut hints: BTreeMap<Shard, u64> = BTreeMap::new();
        let mut busy: BTreeSet<u64> = BTreeSet::new();
        let mut calls: FuturesUnordered<BoxFuture<'static, Returned>> = FuturesUnordered::new();
        loop {
            let now = self.now();
            self.look_at_homes(&mut book);
            for (home, place) in book.over(now, |home| self.home_ms(home)) {
                self.publish_is_over(home, place, now);
            }
            for (node, batches) in self.by_node(book.due(now, |home| self.home_ms(home)), &hints) {
                let sent: BTreeMap<Shard, Vec<Place>> = batches
                    .iter()
                    .map(|(shard, batch)| (*shard, batch.iter().map(|(place, _)| *place).collect()))
                    .collect();
                // Nobody is known to lead.
                if node == 0 {
                    sent.keys().for_each(|shard| book.answered(*shard, &[], false, now));
                    continue;
                }
                if !busy.insert(node) {
                    sent.keys().for_each(|shard| book.not_sent(*shard));
                    continue;
                }
                calls.push(self.call(node, batches, sent));
            }
            let next_at = book.next_at().map_or(LOOK_EVERY, |at| at.saturating_duration_since(now).min(LOOK_EVERY));
            tokio::select! {
                Some(returned) = calls.next(), if !calls.is_empty() => {
                    busy.remove(&returned.node);
                    came_back(&mut book, &mut hints, returned, self.now());
                }
                () = self.published().notified() => {}
                () = sleep(next_at) => {}
                () = end.cancelled() => return,
            }
        }
    }

    /// Takes up what the homes keep that this node leads.
    fn look_at_homes(&self, book: &mut HandOver) {
        let homes = self.led();
        book.leads(&homes.iter().map(|lead| lead.replica.shard).collect());
        for lead in homes {
            let shard = lead.replica.shard;
            match lead.replica.publishes(READ_AT_ONCE) {
                Ok(rows) => book.keeps(shard, rows, || self.all_shards()),
                Err(error) => tracing::error!(shard = shard.0, %error, "what is published cannot be read"),
            }
        }
    }

    fn publish_is_over(&self, home: Shard, place: Sequence, now: Instant) {
        if let Some(lead) = self.led().into_iter().find(|lead| lead.replica.shard == home) {
            lead.packer().publish_done(place, now);
            lead.wake.notify_one();
        }
    }

    /// Groups batches by the node that leads their shard.
    fn by_node(
        &self,
        due: BTreeMap<Shard, Vec<(Place, Operation)>>,
        hints: &BTreeMap<Shard, u64>,
    ) -> BTreeMap<u64, BTreeMap<Shard, Vec<(Place, Operation)>>> {
        let mut by_node: BTreeMap<u64, BTreeMap<Shard, Vec<(Place, Operation)>>> = BTreeMap::new();
        for (shard, batch) in due {
            let node = self.leader_node(shard).or_else(|| hints.get(&shard).copied());
            let node = node.or_else(|| self.directory().nodes_of(shard).first().copied()).unwrap_or(0);
            by_node.entry(node).or_default().insert(shard, batch);
        }
        by_node
    }

    fn call(
        self: &Arc<Self>,
        node: u64,
        batches: BTreeMap<Shard, Vec<(Place, Operation)>>,
        sent: BTreeMap<Shard, Vec<Place>>,
    ) -> BoxFuture<'static, Returned> {
        let batches: Vec<Batch> = batches
            .into_iter()
            .map(|(shard, batch)| Batch {
                call: u64::from(shard.0),
                shard: u32::from(shard.0),
                epoch: self.directory().epoch(shard),
                operations: batch.into_iter().map(|(_, operation)| operation).collect(),
            })
            .collect();
        let this = Arc::clone(self);
        Box::pin(async move {
            let answers = async {
                if node == this.node() {
                    Ok(this.submit_here(batches).await)
                } else {
                    this.courier().submit(node, batches).await
                }
            };
            let replies = match timeout(ANSWERS_MAX, answers).await {
                Ok(Ok(replies)) => replies,
                Ok(Err(why)) => {
                    tracing::debug!(node, why, "publishes could not be handed over; tried again");
                    Vec::new()
                }
                Err(_) => Vec::new(),
            };
            Returned { node, sent, replies }
        })
    }

    pub(super) async fn submit_here(&self, batches: Vec<Batch>) -> Vec<BatchReply> {
        let replies = Arc::new(Replies::new(batches.len()));
        for batch in batches {
            replies.expect();
            self.submit(batch, &replies);
        }
        replies.end();
        let mut all = Vec::new();
        while let Some(some) = replies.next().await {
            all.extend(some.replies);
        }
        all
    }
}

fn came_back(book: &mut HandOver, hints: &mut BTreeMap<Shard, u64>, returned: Returned, now: Instant) {
    let Returned { sent, replies, .. } = returned;
    let mut by_shard: BTreeMap<u32, Outcome> =
        replies.into_iter().filter_map(|reply| Some((reply.shard, reply.outcome?))).collect();
    for (shard, places) in sent {
        let outcome = by_shard.remove(&u32::from(shard.0));
        let confirmed: Vec<Place> = match outcome {
            Some(Outcome::Answers(answers)) => {
                let is_taken = |answer: &martlet_proto::cluster::queue::Answer| {
                    matches!(answer.kind, Some(answer::Kind::FannedOut(_)))
                };
                let each = places.iter().zip(&answers.answers);
                each.filter(|(_, answer)| is_taken(answer)).map(|(place, _)| *place).collect()
            }
            Some(Outcome::Redirect(redirect)) if redirect.leader_node > 0 => {
                hints.insert(shard, redirect.leader_node);
                Vec::new()
            }
            _ => {
                hints.remove(&shard);
                Vec::new()
            }
        };
        book.answered(shard, &confirmed, confirmed.len() == places.len(), now);
    }
}

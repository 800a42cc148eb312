//! Brings operations to the leaders of their shards and waits for what became of them.
//!
//! Owns the tries: whom to ask, how long, the pauses between. What a try means is decided by [`Pursuit`]. Batches for one node
//! leave together in one request ([`super::link`] packs them), answers come back in the order of the question.

use std::{collections::BTreeMap, time::Duration};

use bytes::Bytes;
use futures::future::join_all;
use martlet_proto::{
    cluster::queue::{Operation, batch_reply},
    message::OperationId,
    shard::Shard,
};
use prost::Message;
use rand::Rng;

use super::{
    Route,
    pursuit::{Next, Outcome, Pause, Pursuit, Tried},
};
use crate::metrics::{Limit, Retry};

impl Route {
    /// Carries out operations, each on the leader of its shard; outcomes in the order of the operations.
    ///
    /// Returns within `route.deadline`. Dropped, operations may be done all the same.
    pub async fn submit(&self, operations: Vec<(Shard, Operation)>) -> Vec<Outcome> {
        let deadline = self.0.clock.now() + self.0.config.deadline;
        if let [(shard, _)] = operations[..] {
            let batch = operations.into_iter().map(|(_, operation)| operation).collect();
            return self.pursue(shard, Pursuit::new(batch, deadline, self.0.config.resolve_reserve)).await;
        }
        let mut outcomes: Vec<Option<Outcome>> = operations.iter().map(|_| None).collect();
        let pursuits = self.batches(operations).into_iter().map(|(shard, indexes, batch)| async move {
            let pursuit = Pursuit::new(batch, deadline, self.0.config.resolve_reserve);
            (indexes, self.pursue(shard, pursuit).await)
        });
        for (indexes, answered) in join_all(pursuits).await {
            for (index, outcome) in indexes.into_iter().zip(answered) {
                outcomes[index] = Some(outcome);
            }
        }
        outcomes.into_iter().map(|outcome| outcome.expect("every operation is in one batch")).collect()
    }

    /// A fresh operation id.
    pub fn operation_id(&self) -> OperationId {
        let micros = self.0.clock.wall_micros();
        self.0.entropy.draw(|rng| OperationId::mint(micros, rng))
    }

    /// Draws something.
    pub fn draw<T>(&self, with: impl FnOnce(&mut rand::rngs::StdRng) -> T) -> T {
        self.0.entropy.draw(with)
    }

    /// Operations of one shard together, in their order, cut into pieces that fit an entry of the log.
    fn batches(&self, operations: Vec<(Shard, Operation)>) -> Vec<(Shard, Vec<usize>, Vec<Operation>)> {
        let mut open: BTreeMap<Shard, (usize, Vec<usize>, Vec<Operation>)> = BTreeMap::new();
        let mut full = Vec::new();
        for (index, (shard, operation)) in operations.into_iter().enumerate() {
            let size = operation.encoded_len();
            let (bytes, indexes, batch) = open.entry(shard).or_default();
            if !batch.is_empty()
                && (*bytes + size > self.0.config.pack_bytes || batch.len() >= self.0.config.batch_operations)
            {
                full.push((shard, std::mem::take(indexes), std::mem::take(batch)));
                *bytes = 0;
            }
            *bytes += size;
            indexes.push(index);
            batch.push(operation);
        }
        full.extend(open.into_iter().map(|(shard, (_, indexes, batch))| (shard, indexes, batch)));
        full
    }

    async fn pursue(&self, shard: Shard, mut pursuit: Pursuit) -> Vec<Outcome> {
        let config = &self.0.config;
        let metrics = &self.0.metrics;
        let mut wait = config.retry_min;
        let mut tries = 0;
        loop {
            let now = self.0.clock.now();
            let time_ms = self.times().at(shard, now);
            let resolve_id = || {
                metrics.retry(Retry::Resolve);
                Bytes::copy_from_slice(&self.operation_id().to_bytes())
            };
            let operations = match pursuit.next(now, time_ms, resolve_id) {
                Next::Done(outcomes) => {
                    let unknown = outcomes.iter().filter(|outcome| **outcome == Outcome::Unknown).count();
                    metrics.unknown_outcomes.inc_by(unknown as u64);
                    return outcomes;
                }
                Next::Send(operations) => operations,
            };
            let (tried, shard_time_ms) = self.attempt(shard, tries, operations, pursuit.left(now)).await;
            self.times().heard(shard, shard_time_ms, self.0.clock.now());
            if pursuit.tried(tried, shard_time_ms) == Pause::Backoff {
                tries += 1;
                let jitter = self.0.entropy.draw(|rng| rng.random_range(0.5..1.0));
                tokio::time::sleep(wait.mul_f64(jitter).min(pursuit.left(self.0.clock.now()))).await;
                wait = (wait * 2).min(config.retry_max);
            }
        }
    }

    /// One try at one node; what it tells about leaders goes into the map.
    async fn attempt(&self, shard: Shard, tries: usize, operations: Vec<Operation>, left: Duration) -> (Tried, u64) {
        let metrics = &self.0.metrics;
        let (node, epoch) = {
            let map = self.leaders();
            (map.target(shard, tries), map.epoch(shard))
        };
        let Some((node, link)) = node.and_then(|node| Some((node, self.link(node)?))) else {
            metrics.retry(Retry::Unreachable);
            return (Tried::NotSent, 0);
        };
        let within = self.0.config.try_timeout.min(left);
        let (tried, shard_time_ms) = link.call(shard, epoch, operations, within).await;
        let mut map = self.leaders();
        match &tried {
            Tried::Reply(batch_reply::Outcome::Answers(_)) => map.answered(shard, node),
            Tried::Reply(batch_reply::Outcome::Redirect(redirect)) => {
                metrics.retry(Retry::Redirect);
                map.redirected(shard, node, redirect);
            }
            Tried::Reply(batch_reply::Outcome::Refused(refused)) => match refused.reason() {
                martlet_proto::cluster::queue::refused::Reason::TimeNeeded => {
                    metrics.retry(Retry::Time);
                    map.answered(shard, node);
                }
                // It may lead still, but not soon again: whoever is next knows better.
                _ => {
                    metrics.retry(Retry::Refused);
                    map.lost(shard, node);
                }
            },
            Tried::Reply(batch_reply::Outcome::Unknown(_)) | Tried::Lost => {
                metrics.retry(Retry::Lost);
                map.lost(shard, node);
            }
            Tried::NotSent => {
                metrics.retry(Retry::Unreachable);
                map.lost(shard, node);
            }
            Tried::Full => metrics.limit(Limit::Calls),
        }
        (tried, shard_time_ms)
    }
}

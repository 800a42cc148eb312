//! An operation of this node's own, brought to whoever leads its shard.
//!
//! Owns the search for the leader and the tries: under one id, so that it is done once however often it is tried. What the operation
//! means is the caller's and the state's.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use martlet_proto::{
    cluster::queue::{Answer, Batch, BatchReply, Operation, batch_reply::Outcome, operation, refused::Reason},
    message::OperationId,
    shard::Shard,
};
use tokio::time::{sleep, timeout};

use super::shards::Shards;

/// Longest that one try waits for its answer.
const ANSWER_MAX: Duration = Duration::from_secs(2);
/// Between two tries.
const PAUSE: Duration = Duration::from_millis(100);
/// Tries before it is given up: some seconds, in which a shard elects a leader.
const TRIES_MAX: usize = 50;

impl Shards {
    /// Has an operation done. An error says nothing of whether it was: the same id may be tried again within the dedupe window.
    ///
    /// # Errors
    /// Why the last try had no answer.
    pub async fn operate(
        self: &Arc<Self>,
        shard: Shard,
        id: OperationId,
        kind: operation::Kind,
    ) -> Result<Answer, String> {
        let mut operation = Operation { id: Bytes::copy_from_slice(&id.to_bytes()), first_try_ms: 0, kind: Some(kind) };
        let (mut hint, mut why) = (None, String::new());
        for _ in 0..TRIES_MAX {
            let known = hint.take().or_else(|| self.leader_node(shard));
            let node = known.or_else(|| self.directory().nodes_of(shard).first().copied()).unwrap_or(0);
            match timeout(ANSWER_MAX, self.try_once(node, shard, operation.clone())).await {
                Err(_) => why = format!("node {node} does not answer"),
                Ok(Err(error)) => why = error,
                Ok(Ok(reply)) => match reply.outcome {
                    Some(Outcome::Answers(answers)) => {
                        return answers.answers.into_iter().next().ok_or_else(|| "an empty answer".to_owned());
                    }
                    Some(Outcome::Redirect(redirect)) => {
                        hint = (redirect.leader_node > 0).then_some(redirect.leader_node);
                        why = format!("shard {shard} has no leader that node {node} knows");
                    }
                    Some(Outcome::Refused(refused)) if refused.reason() == Reason::TimeNeeded => {
                        operation.first_try_ms = reply.shard_time_ms;
                        hint = Some(node);
                        continue;
                    }
                    Some(Outcome::Refused(refused)) => why = format!("node {node} refuses: {}", refused.detail),
                    Some(Outcome::Unknown(_)) | None => why = format!("node {node} does not know what came of it"),
                },
            }
            sleep(PAUSE).await;
        }
        Err(why)
    }

    async fn try_once(self: &Arc<Self>, node: u64, shard: Shard, operation: Operation) -> Result<BatchReply, String> {
        let (epoch, operations) = (self.directory().epoch(shard), vec![operation]);
        let batches = vec![Batch { call: 0, shard: u32::from(shard.0), epoch, operations }];
        let replies = if node == self.node() {
            self.submit_here(batches).await
        } else {
            self.courier().submit(node, batches).await?
        };
        replies.into_iter().next().ok_or_else(|| format!("node {node} ended the call"))
    }
}

//! `Admin.SkipEntry`: asks every replica of a shard, has the meta group decide, and waits until they go on.
//!
//! Owns the order of the steps and what an operator is told; the rules are those of [`crate::meta::skips`]. Broken off anywhere it
//! may be called again: a hold that was left behind is lifted first.

use std::time::Duration;

use martlet_proto::cluster::{
    admin::{NodeStatus, SkipEntryReply, SkipEntryRequest},
    meta::{HoldEntry, LiftHold, MetaState, Skip, SkipEntry, SkipState, meta_answer, meta_command},
};
use tokio::time::{Instant, sleep};
use tonic::Status;

use super::admin::AdminService;
use crate::{
    log::GroupId,
    meta::skips::{Verdict, judge},
};

/// What the replicas are given to meet the entry, then to confirm the hold, then to go on.
const PATIENCE: Duration = Duration::from_secs(10);
/// Between two looks at them.
const PAUSE: Duration = Duration::from_millis(200);

impl AdminService {
    /// Skips an entry, or says in words why not.
    pub(super) async fn skip(&self, request: SkipEntryRequest) -> Result<SkipEntryReply, Status> {
        let SkipEntryRequest { shard, index, reason, by, digest } = request;
        let known =
            |state: &MetaState| state.skips.iter().find(|skip| (skip.shard, skip.index) == (shard, index)).cloned();
        let skip = match known(&self.kept()) {
            Some(skip) if skip.state() == SkipState::Skipped => {
                if !skip.digest.starts_with(&digest) {
                    return Err(Status::failed_precondition(format!(
                        "entry {index} of shard {shard} is skipped already, and has another digest"
                    )));
                }
                skip
            }
            before => {
                if let Some(Skip { hold, .. }) = before.filter(|skip| skip.state() == SkipState::Held) {
                    // Of a command that was broken off: a replica that restarted since has not tried the entry.
                    self.propose_skip(meta_command::Kind::LiftHold(LiftHold { shard, index, hold })).await?;
                }
                self.decide((shard, index), &digest, reason, by).await?
            }
        };
        let waiting_nodes = self.gone_on((shard, index)).await;
        tracing::warn!(shard, index, by = skip.by, reason = skip.reason, "an entry is skipped");
        Ok(SkipEntryReply { skip: Some(skip), waiting_nodes })
    }

    async fn decide(&self, entry: (u32, u64), digest: &[u8], reason: String, by: String) -> Result<Skip, Status> {
        let (shard, index) = entry;
        let (term, digest) = self.confirmed_by_all(entry, digest, None).await.map_err(|why| refused(entry, &why))?;
        let hold = HoldEntry { shard, index, term, digest: digest.clone(), reason, by };
        let Skip { hold, .. } = self.propose_skip(meta_command::Kind::HoldEntry(hold)).await?;
        match self.confirmed_by_all(entry, &digest, Some(hold)).await {
            Ok(_) => self.propose_skip(meta_command::Kind::SkipEntry(SkipEntry { shard, index, hold })).await,
            Err(why) => {
                self.propose_skip(meta_command::Kind::LiftHold(LiftHold { shard, index, hold })).await?;
                Err(refused(entry, &why))
            }
        }
    }

    /// Waits until every replica has confirmed; why it has not, or must not.
    async fn confirmed_by_all(
        &self,
        entry: (u32, u64),
        digest: &[u8],
        hold: Option<u64>,
    ) -> Result<(u64, bytes::Bytes), String> {
        let until = Instant::now() + PATIENCE;
        loop {
            let meta = self.kept();
            let (nodes, _) = self.everywhere(&meta.nodes).await;
            match judge(&meta, &nodes, entry, digest, hold) {
                Verdict::Confirmed { term, digest } => return Ok((term, digest)),
                Verdict::Never(why) => return Err(why),
                Verdict::NotYet(why) if Instant::now() >= until => return Err(why),
                Verdict::NotYet(_) => sleep(PAUSE).await,
            }
        }
    }

    /// Waits until every replica is past the entry; the nodes whose replica is not.
    async fn gone_on(&self, (shard, index): (u32, u64)) -> Vec<u64> {
        let until = Instant::now() + PATIENCE;
        loop {
            let meta = self.kept();
            let (nodes, _) = self.everywhere(&meta.nodes).await;
            let past = |node: &NodeStatus| {
                node.groups.iter().any(|status| status.group == GroupId(shard + 1).0 && status.applied_index >= index)
            };
            let replicas = meta.shards.iter().filter(|map| map.shard == shard).flat_map(|map| &map.replicas);
            let waiting: Vec<u64> = replicas
                .map(|replica| replica.node_id)
                .filter(|id| !nodes.iter().any(|node| node.node_id == *id && past(node)))
                .collect();
            if waiting.is_empty() || Instant::now() >= until {
                return waiting;
            }
            sleep(PAUSE).await;
        }
    }

    async fn propose_skip(&self, kind: meta_command::Kind) -> Result<Skip, Status> {
        match self.propose(kind).await? {
            meta_answer::Kind::Skip(skip) => Ok(skip),
            meta_answer::Kind::Revision(_) | meta_answer::Kind::Project(_) | meta_answer::Kind::Refused(_) => {
                Err(Status::internal("the meta group answered without a skip"))
            }
        }
    }
}

fn refused((shard, index): (u32, u64), why: &str) -> Status {
    Status::failed_precondition(format!(
        "entry {index} of shard {shard} is not skipped: every replica must have stopped at it, and {why}"
    ))
}

//! The instruments of a node: name, unit and meaning together.
//!
//! Labels come from closed sets; never a token, a sender, a message id. Counters are raised where the thing happens; gauges
//! of the groups are sampled once a second, those of what is open or under way are true at every moment.

use std::sync::atomic::AtomicU64;

use prometheus_client::{
    encoding::{EncodeLabelSet, EncodeLabelValue},
    metrics::{
        counter::Counter,
        family::Family,
        gauge::Gauge,
        histogram::{Histogram, exponential_buckets},
    },
    registry::{Registry, Unit},
};

use crate::{
    raft::{Sent, snapshot::Way},
    state::End,
};

/// Label of what belongs to one Raft group: `meta` or the shard's number.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct GroupLabel {
    /// 0 is the meta group, n is shard n - 1, as in `Admin.Status`.
    pub group: u32,
}

/// Kind of an answer to an operation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, EncodeLabelValue)]
#[expect(missing_docs, reason = "the names of `queue.proto`")]
pub enum AnswerKind {
    Accepted,
    Refused,
    Registered,
    Unregistered,
    Resolved,
    Group,
    Subscribed,
    Published,
    FannedOut,
    TokenInfo,
    Recalled,
}

/// Label of answers.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct AnswerLabel {
    /// What was answered.
    pub kind: AnswerKind,
}

/// How a message ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, EncodeLabelValue)]
#[expect(missing_docs, reason = "the names of `state::End`")]
pub enum FateKind {
    Delivered,
    Expired,
    Collapsed,
    Overflow,
    Unregistered,
    Recalled,
}

impl From<End> for FateKind {
    fn from(end: End) -> Self {
        match end {
            End::Delivered { .. } => Self::Delivered,
            End::Expired => Self::Expired,
            End::Collapsed { .. } => Self::Collapsed,
            End::Overflow => Self::Overflow,
            End::Unregistered => Self::Unregistered,
            End::Recalled => Self::Recalled,
        }
    }
}

/// Label of messages that are over.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct FateLabel {
    /// How they ended.
    pub fate: FateKind,
}

/// Why a batch was refused before it was proposed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, EncodeLabelValue)]
#[expect(missing_docs, reason = "the names of `queue.proto`, `Refused.Reason`, and Redirect")]
pub enum RefusalReason {
    NoLease,
    Overloaded,
    Draining,
    TimeNeeded,
    NoReplica,
    Redirect,
}

/// Label of refusals.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct RefusalLabel {
    /// Why.
    pub reason: RefusalReason,
}

/// Which rate was above its limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, EncodeLabelValue)]
pub enum RateLimit {
    /// `shard.device_messages_per_…_max`.
    Device,
    /// `shard.topic_messages_per_minute_max`.
    Topic,
}

/// Label of refusals for a rate.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct RateLabel {
    /// Which.
    pub limit: RateLimit,
}

/// What was short when an operation was refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, EncodeLabelValue)]
pub enum Mark {
    /// Memory for rows that are not yet in sled (`store.budget_bytes`).
    Memory,
    /// The disk is down to its reserve (`node.disk_reserve_percent`), or had no room for a log segment.
    Disk,
    /// The log is longer than its bound (`log.kept_bytes_max`).
    Log,
    /// Too much of the shard is proposed and not applied (`shard.uncommitted_bytes_max`).
    Uncommitted,
}

/// Label of refusals for want of room.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct MarkLabel {
    /// What was short.
    pub mark: Mark,
}

/// What came of handing a group over before a stop.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, EncodeLabelValue)]
#[expect(missing_docs, reason = "the names of `raft::HandedOver`")]
pub enum HandoverKind {
    Moved,
    NobodyWilling,
    Late,
}

/// Label of groups handed over.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct HandoverLabel {
    /// What came of it.
    pub how: HandoverKind,
}

/// Label of snapshots.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct TransferLabel {
    /// Whether they left or came.
    pub way: TransferWay,
}

/// Whether a snapshot leaves this node or comes to it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, EncodeLabelValue)]
#[expect(missing_docs, reason = "the names of `raft::snapshot::Way`")]
pub enum TransferWay {
    Sent,
    Received,
}

impl From<Way> for TransferLabel {
    fn from(way: Way) -> Self {
        let way = match way {
            Way::Sent => TransferWay::Sent,
            Way::Received => TransferWay::Received,
        };
        TransferLabel { way }
    }
}

/// All instruments of one node.
#[derive(Debug)]
pub struct Metrics {
    /// Groups this node leads.
    pub groups_led: Gauge,
    /// Groups this node has a replica of.
    pub groups: Gauge,
    /// Replicas that have stopped.
    pub groups_stopped: Gauge,
    /// Groups handed over, or not, before this node stopped.
    pub handovers: Family<HandoverLabel, Counter>,
    /// Leaders that were moved to the replica that is preferred.
    pub moves: Counter,
    /// Term of each group.
    pub term: Family<GroupLabel, Gauge>,
    /// Applied index of each group.
    pub applied: Family<GroupLabel, Gauge>,
    /// Checkpointed index of each group.
    pub checkpointed: Family<GroupLabel, Gauge>,
    /// Index up to which the log of each group is purged.
    pub purged: Family<GroupLabel, Gauge>,
    /// Log index of the entry before which a replica waits because it cannot apply it; 0 when it goes on.
    pub poisoned: Family<GroupLabel, Gauge>,
    /// State version of each shard.
    pub state_version: Family<GroupLabel, Gauge>,
    /// fdatasync calls of the log.
    pub log_fdatasyncs: Counter,
    /// How long one took, seconds.
    pub log_fdatasync_seconds: Histogram,
    /// Bytes of log that are kept.
    pub log_bytes: Gauge,
    /// Log segments that are kept.
    pub log_segments: Gauge,
    /// Bytes in memtables.
    pub memtable_bytes: Gauge,
    /// Entries proposed to shards.
    pub proposals: Counter,
    /// Entries with operations of gateways that were handed to Raft and whose outcome is not known yet.
    pub proposals_unanswered: Gauge,
    /// Answers to operations.
    pub answers: Family<AnswerLabel, Counter>,
    /// Messages that ended in shards led here, by fate.
    pub ended: Family<FateLabel, Counter>,
    /// Stories of messages that were forgotten before their time (`shard.stories_max`).
    pub stories_cut: Counter,
    /// Batches refused before they were proposed.
    pub refusals: Family<RefusalLabel, Counter>,
    /// Batches refused because something was short; also counted in `refusals`.
    pub overloads: Family<MarkLabel, Counter>,
    /// Messages refused because they came too often.
    pub rate_refusals: Family<RateLabel, Counter>,
    /// Devices and topics whose rate was forgotten for want of room (`shard.rates_remembered_max`).
    pub rates_forgotten: Counter,
    /// Waits of followers' replicas that did not apply because memory was short, one every 50 ms.
    pub apply_waits: Gauge<u64, AtomicU64>,
    /// Spare log segments that are allocated.
    pub log_spares: Gauge,
    /// Bytes free on the disk of the data directory.
    pub disk_free: Gauge,
    /// Messages handed to gateways.
    pub deliveries: Counter,
    /// Acks taken from gateways.
    pub acks: Counter,
    /// Devices attached to this node.
    pub attached: Gauge,
    /// Checkpoint cycles that ended well.
    pub checkpoints: Counter,
    /// Checkpoint cycles that failed.
    pub checkpoint_failures: Counter,
    /// How long a cycle took, seconds.
    pub checkpoint_seconds: Histogram,
    /// Base files written.
    pub bases: Counter,
    /// Base files that could not be written.
    pub base_failures: Counter,
    /// How long one took, seconds.
    pub base_seconds: Histogram,
    /// Index of the base file of each group; 0: none that reads back.
    pub based: Family<GroupLabel, Gauge>,
    /// Bytes of the base file of each group.
    pub base_bytes: Family<GroupLabel, Gauge>,
    /// Seconds since the base file of each group was written, or found at the start.
    pub base_age: Family<GroupLabel, Gauge>,
    /// Snapshots sent or received, and installed.
    pub snapshots: Family<TransferLabel, Counter>,
    /// Snapshots that were not; each is begun anew.
    pub snapshot_failures: Family<TransferLabel, Counter>,
    /// Snapshots on their way.
    pub snapshots_under_way: Family<TransferLabel, Gauge>,
    /// How long one took from its begin to its end, seconds.
    pub snapshot_seconds: Histogram,
    /// What left on lines for appends.
    pub appends: Sent,
    /// What left on liveness lines.
    pub liveness: Sent,
    /// Watches of the meta state that are open.
    pub watches: Gauge,
    /// Revision of the meta state that is served.
    pub meta_revision: Gauge<u64, AtomicU64>,
}

impl Default for Metrics {
    fn default() -> Self {
        Self {
            groups_led: Gauge::default(),
            groups: Gauge::default(),
            groups_stopped: Gauge::default(),
            handovers: Family::default(),
            moves: Counter::default(),
            term: Family::default(),
            applied: Family::default(),
            checkpointed: Family::default(),
            purged: Family::default(),
            poisoned: Family::default(),
            state_version: Family::default(),
            log_fdatasyncs: Counter::default(),
            log_fdatasync_seconds: Histogram::new(exponential_buckets(0.0001, 2.0, 16)),
            log_bytes: Gauge::default(),
            log_segments: Gauge::default(),
            memtable_bytes: Gauge::default(),
            proposals: Counter::default(),
            proposals_unanswered: Gauge::default(),
            answers: Family::default(),
            ended: Family::default(),
            stories_cut: Counter::default(),
            refusals: Family::default(),
            overloads: Family::default(),
            rate_refusals: Family::default(),
            rates_forgotten: Counter::default(),
            apply_waits: Gauge::default(),
            log_spares: Gauge::default(),
            disk_free: Gauge::default(),
            deliveries: Counter::default(),
            acks: Counter::default(),
            attached: Gauge::default(),
            checkpoints: Counter::default(),
            checkpoint_failures: Counter::default(),
            checkpoint_seconds: Histogram::new(exponential_buckets(0.001, 2.0, 16)),
            bases: Counter::default(),
            base_failures: Counter::default(),
            base_seconds: Histogram::new(exponential_buckets(0.001, 2.0, 18)),
            based: Family::default(),
            base_bytes: Family::default(),
            base_age: Family::default(),
            snapshots: Family::default(),
            snapshot_failures: Family::default(),
            snapshots_under_way: Family::default(),
            snapshot_seconds: Histogram::new(exponential_buckets(0.01, 2.0, 16)),
            appends: Sent::default(),
            liveness: Sent::default(),
            watches: Gauge::default(),
            meta_revision: Gauge::default(),
        }
    }
}

impl Metrics {
    /// Adds every instrument to `registry`, all under `martlet_node_`.
    pub fn register(&self, registry: &mut Registry) {
        let r = registry.sub_registry_with_prefix("martlet_node");
        r.register("groups", "Raft groups this node has a replica of", self.groups.clone());
        r.register("groups_led", "Raft groups this node leads", self.groups_led.clone());
        r.register("groups_stopped", "Replicas that have stopped and say why in the log", self.groups_stopped.clone());
        r.register("handovers", "Groups handed over before this node stopped, by outcome", self.handovers.clone());
        r.register("leader_moves", "Leaders moved to the replica that is preferred", self.moves.clone());
        r.register("term", "Term of each Raft group", self.term.clone());
        r.register("applied_index", "Log index applied in each Raft group", self.applied.clone());
        r.register("checkpointed_index", "Log index checkpointed in each Raft group", self.checkpointed.clone());
        r.register("purged_index", "Log index up to which the log of each Raft group is purged", self.purged.clone());
        r.register(
            "poisoned_index",
            "Log index of the entry that a replica cannot apply and waits before, of each Raft group; 0: none",
            self.poisoned.clone(),
        );
        r.register("state_version", "State version of each shard, by its Raft group", self.state_version.clone());
        r.register("log_fdatasyncs", "fdatasync calls of the log", self.log_fdatasyncs.clone());
        r.register_with_unit(
            "log_fdatasync",
            "Time of one fdatasync of the log",
            Unit::Seconds,
            self.log_fdatasync_seconds.clone(),
        );
        r.register_with_unit("log", "Log that is kept", Unit::Bytes, self.log_bytes.clone());
        r.register("log_segments", "Log segments that are kept", self.log_segments.clone());
        r.register_with_unit("memtable", "Changes since the last checkpoint", Unit::Bytes, self.memtable_bytes.clone());
        r.register("proposals", "Entries proposed to shards", self.proposals.clone());
        r.register(
            "proposals_unanswered",
            "Entries with operations of gateways handed to Raft and not answered yet",
            self.proposals_unanswered.clone(),
        );
        r.register("answers", "Answers to operations", self.answers.clone());
        r.register("messages_ended", "Messages that ended in shards led here, by fate", self.ended.clone());
        r.register("stories_cut", "Stories of messages forgotten before their time", self.stories_cut.clone());
        r.register("refusals", "Batches refused before they were proposed", self.refusals.clone());
        r.register("overloads", "Batches refused because memory, disk or log was short", self.overloads.clone());
        r.register("rate_refusals", "Messages refused because they came too often", self.rate_refusals.clone());
        r.register("rates_forgotten", "Devices and topics whose rate was forgotten", self.rates_forgotten.clone());
        r.register("apply_waits", "Looks at which a follower's replica waited for memory", self.apply_waits.clone());
        r.register("log_spare_segments", "Spare log segments that are allocated", self.log_spares.clone());
        r.register_with_unit(
            "disk_free",
            "Room on the disk of the data directory",
            Unit::Bytes,
            self.disk_free.clone(),
        );
        r.register("deliveries", "Messages handed to gateways", self.deliveries.clone());
        r.register("acks", "Acks taken from gateways", self.acks.clone());
        r.register("attached_devices", "Devices attached to this node", self.attached.clone());
        r.register("checkpoints", "Checkpoint cycles that ended well", self.checkpoints.clone());
        r.register("checkpoint_failures", "Checkpoint cycles that failed", self.checkpoint_failures.clone());
        r.register_with_unit(
            "checkpoint",
            "Time of one checkpoint cycle",
            Unit::Seconds,
            self.checkpoint_seconds.clone(),
        );
        r.register("bases", "Base files written", self.bases.clone());
        r.register("base_failures", "Base files that could not be written", self.base_failures.clone());
        r.register_with_unit("base_write", "Time of writing one base file", Unit::Seconds, self.base_seconds.clone());
        r.register("based_index", "Log index of the base file of each Raft group; 0: none", self.based.clone());
        r.register_with_unit("base", "Base file of each Raft group", Unit::Bytes, self.base_bytes.clone());
        r.register_with_unit(
            "base_age",
            "Time since the base file of each Raft group was written, or found at the start",
            Unit::Seconds,
            self.base_age.clone(),
        );
        r.register("snapshots", "Snapshots sent or received, and installed", self.snapshots.clone());
        r.register(
            "snapshot_failures",
            "Snapshots sent or received that broke off or were refused; each is begun anew",
            self.snapshot_failures.clone(),
        );
        r.register("snapshots_under_way", "Snapshots on their way", self.snapshots_under_way.clone());
        r.register_with_unit(
            "snapshot",
            "Time of one snapshot, from its begin until it was installed",
            Unit::Seconds,
            self.snapshot_seconds.clone(),
        );
        r.register(
            "append_frames",
            "Frames sent to other nodes with appends of log entries",
            self.appends.frames.clone(),
        );
        r.register(
            "append_calls",
            "Appends sent in them, each of one shard to one replica",
            self.appends.calls.clone(),
        );
        r.register(
            "liveness_frames",
            "Frames sent to other nodes with heartbeats and requests for votes",
            self.liveness.frames.clone(),
        );
        r.register("liveness_calls", "Heartbeats and requests for votes sent in them", self.liveness.calls.clone());
        r.register("watches", "Watches of the meta state that are open", self.watches.clone());
        r.register("meta_revision", "Revision of the meta state that is served", self.meta_revision.clone());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_instrument_is_registered_under_the_nodes_prefix() {
        let mut registry = Registry::default();
        let metrics = Metrics::default();
        metrics.register(&mut registry);
        metrics.answers.get_or_create(&AnswerLabel { kind: AnswerKind::Accepted }).inc();
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &registry).unwrap();
        assert!(text.contains("martlet_node_answers_total{kind=\"Accepted\"} 1"), "{text}");
        assert!(text.contains("martlet_node_memtable_bytes 0"), "{text}");
        assert!(text.lines().filter(|l| l.starts_with("# HELP")).all(|l| l.contains("martlet_node_")));
    }
}

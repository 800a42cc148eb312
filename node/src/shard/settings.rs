//! How a leader packs, waits and refuses.

use std::time::Duration;

use martlet_proto::{
    cluster::command::Limits,
    limits::{BATCH_BYTES_MAX, BATCH_OPERATIONS_MAX, GROUP_MEMBERS_MAX, MULTICAST_MAX, TOPICS_OF_REGISTRATION_MAX},
};
use serde::{Deserialize, Serialize};

/// Bounds of the shards of a node. Those of messages are stamped into each command, so nodes may differ for a while.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ShardSettings {
    /// Bytes of operations in one entry, 1 to 2097152. More makes fewer, larger writes; the first waits for the last. A batch that is larger
    /// goes alone.
    pub entry_bytes_max: usize,
    /// Operations in one entry, 1 to 4096.
    pub entry_commands_max: usize,
    /// Proposals of one shard under way at once. A second one starts only when a whole entry waits, so that few are made.
    pub pipeline_max: usize,
    /// Bytes of one shard that wait to be proposed or are proposed and not applied. Beyond, operations are refused.
    pub uncommitted_bytes_max: usize,
    /// Longest that an acknowledgement waits for company.
    #[serde(with = "humantime_serde")]
    pub ack_wait: Duration,
    /// Acknowledgements of one shard that wait; beyond, they are refused and the gateway sends them again.
    pub acks_waiting_max: usize,
    /// Between two looks for what has expired.
    #[serde(with = "humantime_serde")]
    pub expire_every: Duration,
    /// Rows that one `Expire` removes at most.
    pub expire_rows_max: u32,
    /// Longest that a message with time to live 0 waits for credit.
    #[serde(with = "humantime_serde")]
    pub now_or_never: Duration,
    /// Messages with time to live 0 that wait for one device; beyond, they are dropped.
    pub now_or_never_max: usize,
    /// Bytes of one shard's deliveries held in memory before they are handed out; beyond, they are read again from the store.
    pub held_bytes_max: u64,
    /// Bytes held for one device.
    pub held_bytes_per_device_max: u64,
    /// Rows read at once for a device that is behind.
    pub pull_rows: usize,
    /// Batches of one gateway stream that are not answered; beyond, the stream is not read.
    pub batches_per_stream_max: usize,
    /// Attach batches of one gateway stream under way; beyond, the stream is not read.
    pub attach_batches_per_link_max: usize,
    /// Replies that wait on one control stream before its requests are not read; at sixteen times as many the pair is closed.
    pub control_replies_max: usize,
    /// Waiting non-collapsible messages of one device, application, subtype and sender. Source: GCM, 100.
    pub waiting_max: u32,
    /// Distinct collapse keys waiting of one device, application, subtype and sender. Source: GCM, 4.
    pub collapse_keys_max: u32,
    /// Written and unacknowledged messages of one device.
    pub unacked_max: u32,
    /// Their bytes.
    pub unacked_bytes_max: u64,
    /// Live registrations of one device.
    pub registrations_max: u32,
    /// Operation ids are known this long: a gateway's request deadline plus 30 s.
    #[serde(with = "humantime_serde")]
    pub dedupe_window: Duration,
    /// Stored bytes of one device; 0 is without limit. Beyond, sends to it are answered `Unavailable`.
    pub device_bytes_max: u64,
    /// Stored bytes of one project in one shard, bodies of topics' messages apart; 0 is without limit. Beyond, sends are answered
    /// `Unavailable`. A project whose devices are spread over all shards has as many times this in all.
    pub project_bytes_max: u64,
    /// Messages to one device a minute, and as many at once; 0 is without limit. Beyond, they are refused as `DeviceMessageRateExceeded`.
    /// Those with time to live 0 and those of topics do not count. Leaders count in memory: a new one begins anew. Source: FCM, 240.
    pub device_messages_per_minute_max: u32,
    /// The same an hour. Source: FCM, 5,000.
    pub device_messages_per_hour_max: u32,
    /// Messages to one topic of a project a minute, and as many at once; 0 is without limit. Beyond, they are refused as
    /// `TopicsMessageRateExceeded`. A condition over several topics has a home shard of its own: there it counts, for each of them.
    pub topic_messages_per_minute_max: u32,
    /// Devices whose messages are counted in one shard at once, and topics as many, 1 or more. Beyond, those of the fewest messages are
    /// forgotten and begin anew. About 100 bytes each, once a rate is limited.
    pub rates_remembered_max: usize,
    /// Members of one device group, 1 to 1000: a message to it is as many. Source: GCM, 20. A group that has more keeps them.
    pub group_members_max: u32,
    /// Topics of one registration. Source: FCM, 2,000.
    pub topics_max: u32,
    /// Messages to topics of one home shard that not every shard has yet; beyond, they are refused as `TopicsMessageRateExceeded`.
    /// Source: FCM, 1,000 fan-outs at once.
    pub publishes_max: u32,
    /// Messages of one shard whose end is remembered for operators, in memory on each replica, 112 bytes each; the oldest go first.
    pub stories_max: usize,
    /// How long it is remembered.
    #[serde(with = "humantime_serde")]
    pub stories_for: Duration,
    /// Subscribers that one entry of a fan-out looks at, 5 to 1000: more makes fewer entries, each of which others wait for longer.
    pub fan_out_max: u32,
}

impl Default for ShardSettings {
    fn default() -> Self {
        ShardSettings {
            entry_bytes_max: 64 << 10,
            entry_commands_max: 256,
            pipeline_max: 3,
            uncommitted_bytes_max: 16 << 20,
            ack_wait: Duration::from_millis(200),
            acks_waiting_max: 16_384,
            expire_every: Duration::from_secs(1),
            expire_rows_max: 1_000,
            now_or_never: Duration::from_secs(1),
            now_or_never_max: 16,
            held_bytes_max: 4 << 20,
            held_bytes_per_device_max: 64 << 10,
            pull_rows: 16,
            batches_per_stream_max: 1_024,
            attach_batches_per_link_max: 64,
            control_replies_max: 4_096,
            waiting_max: 100,
            collapse_keys_max: 4,
            unacked_max: 1_000,
            unacked_bytes_max: 4 << 20,
            registrations_max: 1_000,
            dedupe_window: Duration::from_secs(90),
            device_bytes_max: 0,
            project_bytes_max: 0,
            device_messages_per_minute_max: 0,
            device_messages_per_hour_max: 0,
            topic_messages_per_minute_max: 0,
            rates_remembered_max: 16_384,
            group_members_max: GROUP_MEMBERS_MAX,
            topics_max: TOPICS_OF_REGISTRATION_MAX,
            publishes_max: 1_000,
            stories_max: 2_048,
            stories_for: Duration::from_secs(3_600),
            fan_out_max: 1_000,
        }
    }
}

impl ShardSettings {
    /// What cannot be run, by its key and why.
    pub(crate) fn check(&self) -> Result<(), (&'static str, String)> {
        // An entry of the log must hold what is packed into it: see `Pack`. A group is sent to as a multicast.
        for (key, value, most) in [
            ("shard.entry_bytes_max", self.entry_bytes_max, BATCH_BYTES_MAX),
            ("shard.entry_commands_max", self.entry_commands_max, BATCH_OPERATIONS_MAX),
            ("shard.group_members_max", self.group_members_max as usize, MULTICAST_MAX),
        ] {
            if value == 0 || value > most {
                return Err((key, format!("must be 1 to {most}")));
            }
        }
        if !(5..=1_000).contains(&self.fan_out_max) {
            return Err(("shard.fan_out_max", "must be 5 to 1000".into()));
        }
        for (key, value) in [
            ("shard.pipeline_max", self.pipeline_max),
            ("shard.acks_waiting_max", self.acks_waiting_max),
            ("shard.pull_rows", self.pull_rows),
            ("shard.batches_per_stream_max", self.batches_per_stream_max),
            ("shard.attach_batches_per_link_max", self.attach_batches_per_link_max),
            ("shard.control_replies_max", self.control_replies_max),
            ("shard.rates_remembered_max", self.rates_remembered_max),
            ("shard.expire_rows_max", self.expire_rows_max as usize),
        ] {
            if value == 0 {
                return Err((key, "must be 1 or more: nothing would go on".into()));
            }
        }
        Ok(())
    }

    /// What is stamped into each command.
    pub fn limits(&self) -> Limits {
        Limits {
            waiting_max: self.waiting_max,
            unacked_max: self.unacked_max,
            unacked_bytes_max: self.unacked_bytes_max,
            registrations_max: self.registrations_max,
            dedupe_window_ms: u64::try_from(self.dedupe_window.as_millis()).unwrap_or(u64::MAX),
            collapse_keys_max: self.collapse_keys_max,
            device_bytes_max: self.device_bytes_max,
            project_bytes_max: self.project_bytes_max,
            group_members_max: self.group_members_max,
            topics_max: self.topics_max,
            publishes_max: self.publishes_max,
            fan_out_max: self.fan_out_max,
        }
    }
}

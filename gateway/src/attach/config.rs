//! Settings of the attach streams.

use std::time::Duration;

use martlet_proto::limits::ATTACH_BATCH_MAX;
use serde::{Deserialize, Serialize};

use crate::config::{ConfigError, wrong};

/// Least credit of a device: the largest message with its envelope.
const DEVICE_CREDIT_MIN: u64 = 16 * 1024;

/// How queues are brought to connections.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct AttachConfig {
    /// Pairs of streams to each node; devices are spread over them by tag. More use more cores; 1 to 16.
    pub links: u32,
    /// Bytes of deliveries that may be under way to one device. Too low slows the catch-up after long absence, too high lets
    /// slow devices fill the stream credit.
    pub device_credit_bytes: u64,
    /// Bytes of deliveries that may be under way on one stream; `links` times nodes times this bounds the gateway's memory
    /// for deliveries.
    pub stream_credit_bytes: u64,
    /// Attaches of one shard wait this long for company. Longer saves read checks of nodes, shorter saves latency at login.
    #[serde(with = "humantime_serde")]
    pub batch_wait: Duration,
    /// Attaches of one shard that go together at most, 1 to 4096.
    pub batch_max: usize,
    /// After the loss of a leader, devices attach again spread over this time per thousand of them in the shard.
    #[serde(with = "humantime_serde")]
    pub reattach_spread: Duration,
    /// First wait before a refused attach or ack is tried again, or a lost stream opened; doubles up to `retry_max`.
    #[serde(with = "humantime_serde")]
    pub retry_min: Duration,
    /// Longest wait between tries.
    #[serde(with = "humantime_serde")]
    pub retry_max: Duration,
    /// Requests that may wait to be sent on one stream; a node that lets more pile up is given up and dialled again.
    pub outbound_max: usize,
}

impl Default for AttachConfig {
    fn default() -> Self {
        Self {
            links: 2,
            device_credit_bytes: 64 * 1024,
            stream_credit_bytes: 8 * 1024 * 1024,
            batch_wait: Duration::from_millis(5),
            batch_max: 256,
            reattach_spread: Duration::from_millis(200),
            retry_min: Duration::from_millis(50),
            retry_max: Duration::from_secs(1),
            outbound_max: 65_536,
        }
    }
}

impl AttachConfig {
    pub(crate) fn check(&self) -> Result<(), ConfigError> {
        if !(1..=16).contains(&self.links) {
            return wrong("attach.links", "must be 1 to 16");
        }
        if self.device_credit_bytes < DEVICE_CREDIT_MIN {
            return wrong("attach.device_credit_bytes", "must be 16384 or more: one message has to fit");
        }
        if self.stream_credit_bytes < self.device_credit_bytes {
            return wrong("attach.stream_credit_bytes", "must not be below attach.device_credit_bytes");
        }
        if !(1..=ATTACH_BATCH_MAX).contains(&self.batch_max) {
            return wrong("attach.batch_max", "must be 1 to 4096");
        }
        if self.retry_min.is_zero() || self.retry_max < self.retry_min {
            return wrong("attach.retry_max", "must not be below attach.retry_min, which is longer than 0s");
        }
        if self.outbound_max < 2 {
            return wrong("attach.outbound_max", "must be 2 or more");
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_defaults_can_be_run_and_a_wrong_key_is_named() {
        AttachConfig::default().check().unwrap();
        let wrong = AttachConfig { stream_credit_bytes: 20_000, ..AttachConfig::default() };
        assert_eq!(wrong.check().unwrap_err().key, "attach.stream_credit_bytes");
        let wrong = AttachConfig { batch_max: 5_000, ..AttachConfig::default() };
        assert_eq!(wrong.check().unwrap_err().key, "attach.batch_max");
    }
}

//! Settings of the MCS listener.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::config::{ConfigError, wrong};

/// Least silence that may end a connection. Source: device.md section 8.4.
const SILENCE_MIN: Duration = Duration::from_secs(30 * 60);

/// How device connections are served.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct McsConfig {
    /// Device connections at once, over all MCS addresses; more wait to be served.
    pub connections_max: usize,
    /// From accept to the end of the TLS handshake.
    #[serde(with = "humantime_serde")]
    pub handshake_timeout: Duration,
    /// From the end of the handshake to the whole LoginRequest. Source: device.md section 6, "Timers".
    #[serde(with = "humantime_serde")]
    pub login_timeout: Duration,
    /// A frame that has begun must be whole within this time.
    #[serde(with = "humantime_serde")]
    pub frame_timeout: Duration,
    /// How long the answer to a login waits for the acks in it to be applied; after that the device is answered all the
    /// same and may see a message twice.
    #[serde(with = "humantime_serde")]
    pub login_ack_wait: Duration,
    /// A write that a device does not take for this long ends its connection.
    #[serde(with = "humantime_serde")]
    pub write_timeout: Duration,
    /// Interval that devices are told to ping at (`heartbeat_config`); zero tells them nothing.
    #[serde(with = "humantime_serde")]
    pub heartbeat_interval: Duration,
    /// The server pings after this silence of a device that asked for no interval of its own.
    #[serde(with = "humantime_serde")]
    pub ping_after: Duration,
    /// A device that has answered a ping before must answer within this time.
    #[serde(with = "humantime_serde")]
    pub ping_timeout: Duration,
    /// Silence that ends any connection; not below 30 minutes, because Chromium pings every 28 on cellular.
    #[serde(with = "humantime_serde")]
    pub silence_max: Duration,
    /// Messages written and not acknowledged that one connection remembers; the oldest are forgotten first. They stay
    /// stored at the node; a late cumulative ack no longer reaches them.
    pub unacked_max: usize,
    /// TCP keepalive: first probe after this idle time.
    #[serde(with = "humantime_serde")]
    pub tcp_keepalive: Duration,
    /// At shutdown, connections are closed spread over this time.
    #[serde(with = "humantime_serde")]
    pub drain_spread: Duration,
}

impl Default for McsConfig {
    fn default() -> Self {
        Self {
            connections_max: 200_000,
            handshake_timeout: Duration::from_secs(10),
            login_timeout: Duration::from_secs(30),
            frame_timeout: Duration::from_secs(30),
            login_ack_wait: Duration::from_secs(5),
            write_timeout: Duration::from_secs(60),
            heartbeat_interval: Duration::ZERO,
            ping_after: Duration::from_secs(15 * 60),
            ping_timeout: Duration::from_secs(60),
            silence_max: Duration::from_secs(40 * 60),
            unacked_max: 1_000,
            tcp_keepalive: Duration::from_secs(5 * 60),
            drain_spread: Duration::from_secs(5),
        }
    }
}

impl McsConfig {
    pub(crate) fn check(&self) -> Result<(), ConfigError> {
        for (key, value) in [
            ("mcs.handshake_timeout", self.handshake_timeout),
            ("mcs.login_timeout", self.login_timeout),
            ("mcs.frame_timeout", self.frame_timeout),
            ("mcs.write_timeout", self.write_timeout),
            ("mcs.ping_after", self.ping_after),
            ("mcs.ping_timeout", self.ping_timeout),
            ("mcs.tcp_keepalive", self.tcp_keepalive),
        ] {
            if value.is_zero() {
                return wrong(key, "must be longer than 0s");
            }
        }
        if self.silence_max < SILENCE_MIN {
            return wrong(
                "mcs.silence_max",
                "must be 30m or more: a device on a cellular network pings every 28 minutes",
            );
        }
        for (key, value) in [("mcs.connections_max", self.connections_max), ("mcs.unacked_max", self.unacked_max)] {
            if value == 0 {
                return wrong(key, "must be 1 or more");
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mc_19_core_silence_below_half_an_hour_cannot_be_configured() {
        McsConfig::default().check().unwrap();
        let wrong = McsConfig { silence_max: Duration::from_secs(1_799), ..McsConfig::default() };
        assert_eq!(wrong.check().unwrap_err().key, "mcs.silence_max");
    }
}

//! Settings of the HTTP listeners.

use std::time::Duration;

use martlet_proto::{bucket::Rate, limits::MULTICAST_MAX};
use serde::{Deserialize, Serialize};

use crate::config::{ConfigError, wrong};

/// Section `[http]`: bounds of the app-server and device HTTP listeners.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct HttpConfig {
    /// Connections at once, over all HTTP addresses; more wait to be served.
    pub connections_max: usize,
    /// From accept to the end of the TLS handshake.
    #[serde(with = "humantime_serde")]
    pub handshake_timeout: Duration,
    /// From the end of one request to the end of the next one's head: also how long a kept-alive connection may idle. Too
    /// short breaks the connection pools of app servers, too long lets idle ones hold slots.
    #[serde(with = "humantime_serde")]
    pub header_timeout: Duration,
    /// From the head to the end of the body.
    #[serde(with = "humantime_serde")]
    pub body_timeout: Duration,
    /// Header lines of one request at most.
    pub headers_max: usize,
    /// Bytes of a request's head at most.
    pub header_bytes_max: usize,
    /// Requests that are open at once on one HTTP/2 connection; more are refused, and clients send those again. Fewer slow down app
    /// servers that send everything over one connection, more let one client take more of everything.
    pub http2_streams_max: u32,
    /// Bytes of all bodies that are held at once; beyond it requests are answered 503. A quarter is for devices, whom anybody
    /// can play, the rest for app servers with a key.
    pub body_bytes_total: usize,
    /// What `Retry-After` says on a 503, seconds, 1 or more.
    pub retry_after_secs: u32,
    /// Targets a second that one project may send to through one gateway, in the long run; 0 is without limit. A multicast is as many as
    /// it names, a device group or a topic is one, a token that joins or leaves a topic is one; dry runs are none. Beyond, 503 with the
    /// seconds until there is room. A project may send this many through each gateway.
    pub project_messages_per_second_max: u32,
    /// Targets that one project may send to at once, 1 or more. A larger multicast passes too, and is made up for by the wait after it.
    pub project_messages_burst: u32,
}

impl Default for HttpConfig {
    fn default() -> Self {
        Self {
            connections_max: 16_384,
            handshake_timeout: Duration::from_secs(10),
            header_timeout: Duration::from_secs(75),
            body_timeout: Duration::from_secs(30),
            headers_max: 100,
            header_bytes_max: 32 << 10,
            http2_streams_max: 100,
            body_bytes_total: 256 << 20,
            retry_after_secs: 5,
            project_messages_per_second_max: 0,
            project_messages_burst: MULTICAST_MAX as u32,
        }
    }
}

impl HttpConfig {
    /// The part of `body_bytes_total` that devices may take.
    pub(crate) fn body_bytes_of_devices(&self) -> usize {
        self.body_bytes_total / 4
    }

    /// The part of `body_bytes_total` that app servers may take.
    pub(crate) fn body_bytes_of_senders(&self) -> usize {
        self.body_bytes_total - self.body_bytes_of_devices()
    }

    /// How much one project may send; none: without limit.
    pub(crate) fn project_rate(&self) -> Option<Rate> {
        Rate::per_second(self.project_messages_per_second_max, self.project_messages_burst)
    }

    pub(crate) fn check(&self) -> Result<(), ConfigError> {
        if self.connections_max == 0 {
            return wrong("http.connections_max", "must be 1 or more");
        }
        if self.header_bytes_max < 8 << 10 {
            return wrong("http.header_bytes_max", "must be 8192 or more");
        }
        if self.http2_streams_max == 0 {
            return wrong("http.http2_streams_max", "must be 1 or more");
        }
        if self.body_bytes_of_senders() < martlet_proto::limits::BODY_MAX_BYTES {
            return wrong("http.body_bytes_total", "three quarters of it must hold one body of 4 MiB");
        }
        if self.project_messages_burst == 0 {
            return wrong("http.project_messages_burst", "must be 1 or more");
        }
        if self.retry_after_secs == 0 {
            return wrong("http.retry_after_secs", "must be 1 or more: clients read 0 as no header");
        }
        Ok(())
    }
}

//! MCS: the connection a device keeps open, over TLS on port 5228.
//!
//! Owns the life of device connections: accept, handshake, login, the session until it ends. `frame` and `stanza` codecs are
//! `martlet_proto::mcs`; which messages there are is the node's business and comes through [`crate::attach`].
//!
//! | file | what |
//! | --- | --- |
//! | `config` | limits and intervals, with defaults |
//! | `login` | value: who may connect, and what the answer says |
//! | `session` | value: stream ids, the window of written messages, acks, what each frame means |
//! | `heartbeat` | value: when to ping, when silence ends a connection |
//! | `conn` | driver: moves bytes between socket, session and attachment |
//! | `listener` | accept loop, drain |
//! | `tls` | value: a device's TLS, which keeps no buffer while it is idle |
//! | `stream` | driver: moves bytes between socket and `tls` |
//! | `metrics` | instruments |
//!
//! Invariant: no byte of a client grows memory past the caps in `config`, and no stream id is reported to a device before
//! everything that its frame acknowledged is applied by a node.

pub mod config;
mod conn;
pub mod heartbeat;
mod listener;
pub mod login;
pub mod metrics;
pub mod session;
mod stream;
mod tls;

use std::{fmt, net::IpAddr};

use martlet_proto::tag::{AndroidId, DeviceTag, SecurityToken};

pub use self::{config::McsConfig, listener::Mcs, metrics::McsMetrics};

/// Who checks a device's identity; `route` does, with the check-in keys it follows.
pub trait Credentials: Send + Sync + fmt::Debug {
    /// Verifies a pair against the live check-in keys, newest first, in constant time.
    fn authenticate(&self, android_id: AndroidId, token: SecurityToken) -> Identity;
}

/// What [`Credentials::authenticate`] found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Identity {
    /// The pair belongs together; this is the device's tag.
    Device(DeviceTag),
    /// No live key made this token of this id.
    Wrong,
    /// No keys are known yet: neither right nor wrong. The connection is closed unanswered.
    Unknown,
}

/// Bounds on connections and logins per address; `admit` has them.
pub trait Doorkeeper: Send + Sync + fmt::Debug {
    /// Whether one more connection of this address may try to log in now. False: the socket is closed at once.
    fn admit_login(&self, address: IpAddr) -> bool;
}

/// Lets everybody in.
#[derive(Debug, Default, Clone, Copy)]
pub struct OpenDoor;

impl Doorkeeper for OpenDoor {
    fn admit_login(&self, _address: IpAddr) -> bool {
        true
    }
}

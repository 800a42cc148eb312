//! A group's own time, as its replicas tell it each other beside the log: a leader with every append and heartbeat, any replica
//! that is asked how it stands.
//!
//! Owns the seam only. What is done with it is the business of whoever gives the group its [`GroupTime`]; a group without a time of
//! its own has [`Timeless`].

use std::fmt;

/// The time of one group at one replica. Called from any task, often: it must not block.
pub trait GroupTime: fmt::Debug + Send + Sync + 'static {
    /// What it is now, milliseconds since 1970; `None` when this replica does not know.
    fn known_ms(&self) -> Option<u64>;
    /// A leader that is not outvoted, as far as this replica knows, says that it is `time_ms`.
    fn told(&self, time_ms: u64);
}

/// Nobody asks.
#[derive(Debug, Clone, Copy)]
pub struct Timeless;

impl GroupTime for Timeless {
    fn known_ms(&self) -> Option<u64> {
        None
    }

    fn told(&self, _: u64) {}
}

//! Where openraft begins and ends: no other module names its types.
//!
//! A [`Group`] is a running replica: proposals in, entries applied to its [`Machine`], leadership told. Its log is the node's
//! (`storage` over [`crate::log`]), its network is shared by all groups of the node ([`Network`]): `client` asks peers,
//! `service` answers them, `line` carries both, [`links`] is where connections are made and tests cut them; [`snapshot`] brings a
//! replica that lies behind the others' logs up to them. `presence` is what it knows of other nodes, `lost` what followers do when a
//! leader's connections close; `time` is how the replicas of a group tell each other its time. `beats` sends the
//! heartbeats of all groups together, `ticks` has their timers wake together; `company` spares commits an append of their own.

mod beats;
mod client;
mod company;
mod encode;
mod group;
mod line;
pub mod links;
mod local;
mod lost;
mod machine;
mod network;
mod park;
mod presence;
mod service;
mod settings;
pub mod snapshot;
mod storage;
mod ticks;
mod time;
mod types;
mod watcher;

#[cfg(test)]
mod tests;

pub use group::{Group, GroupConfig, GroupError, GroupStatus, HandedOver, Leadership, Member, ProposeError, ReadError};
pub use line::{Dialer, Sent};
pub use links::{DirectLinks, Links, Wire};
pub use machine::{Fault, Machine, MachineError, Reply};
pub use network::Network;
pub use park::{Decision, Decisions, Digest, Stop, Undecided, Why};
pub use service::RaftService;
pub use settings::RaftSettings;
pub use time::{GroupTime, Timeless};

pub use crate::log::{GroupId, Index};

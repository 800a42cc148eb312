//! Where openraft begins and ends: no other module names its types.

mod encode;
mod group;
mod links;
mod machine;
mod network;
mod settings;
mod storage;
mod types;

pub use group::{Group, GroupConfig, GroupError, GroupStatus, Leadership, Member, ProposeError, ReadError};
pub use links::{DirectLinks, Links, Wire};
pub use machine::{Machine, MachineError, Reply};
pub use network::{Network, RaftService};
pub use settings::RaftSettings;

pub use crate::log::{GroupId, Index};

//! A shard on this node: operations in, entries proposed, answers out; and what its leader does besides.
//!
//! In the order of an operation: [`propose`] admits and stamps, [`pack`] decides what goes together, [`consensus`] is the group,
//! [`machine`] applies, [`replies`] carries the answers back. [`lead`] turns a follower into a leader and back; [`time`] is its
//! clock; [`raise`] raises its state version; [`sight`] has last-seen days written; [`shards`] holds all of them.

pub mod consensus;
mod lead;
pub mod machine;
pub mod pack;
mod propose;
mod raise;
mod reads;
pub mod replies;
pub mod settings;
pub mod shards;
mod sight;
pub mod time;

#[cfg(test)]
mod tests;

pub use consensus::Consensus;
pub use lead::Directory;
pub use machine::{Kept, Replica, ShardMachine};
pub use settings::ShardSettings;
pub use shards::{Shards, ShardsConfig};

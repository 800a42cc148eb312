//! A shard on this node: operations in, entries proposed, answers out; and what its leader does besides.
//!
//! In the order of an operation: [`propose`] admits and stamps, [`pack`] decides what goes together, [`consensus`] is the group,
//! [`machine`] applies, [`replies`] carries the answers back. [`lead`] turns a follower into a leader and back; [`time`] is its
//! clock; [`raise`] raises its state version; [`rates`] refuses what comes too often; [`sight`] has last-seen days written;
//! [`hand_over`] and [`courier`] bring what is published to topics to every shard; [`stories`] remembers what became of messages,
//! [`inspect`] reads for operators and [`operate`] acts for them; [`shards`] holds all of them.

pub mod consensus;
mod courier;
mod hand_over;
pub mod inspect;
mod lead;
pub mod machine;
mod operate;
pub mod pack;
mod propose;
mod raise;
mod rates;
mod reads;
pub mod replies;
pub mod settings;
pub mod shards;
mod sight;
mod stories;
pub mod time;

#[cfg(test)]
mod tests;

pub use consensus::Consensus;
pub use courier::Courier;
pub use lead::Directory;
pub use machine::{Kept, Replica, ShardMachine};
pub use settings::ShardSettings;
pub use shards::{Shards, ShardsConfig};

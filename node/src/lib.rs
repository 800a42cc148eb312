//! A Martlet node: it owns the queues of the shards it holds a replica of.
//!
//! In the order in which a message passes: [`rpc`] takes it from a gateway, [`shard`] packs and proposes it, [`raft`] and
//! [`log`] make it durable on a majority, [`state`] decides, [`store`] keeps, [`delivery`] hands it to an attached gateway.
//! [`meta`] knows which shard lives where.

pub mod delivery;
pub mod log;
pub mod meta;
pub mod raft;
pub mod rpc;
pub mod shard;
pub mod state;
pub mod store;

pub mod admission;
pub mod bug;
pub mod clock;
pub mod config;
pub mod data_dir;
pub mod disk;
pub mod metrics;
pub mod node;
pub mod parts;
pub mod replicas;

mod balance;
mod bases;
mod checkpoints;
mod metered;
mod opening;
mod panicked;
mod snapshots;

pub use config::Config;
pub use metrics::Metrics;
pub use node::{Node, NodeError, Readiness, Started, Surroundings, run};

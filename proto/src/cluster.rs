//! The gRPC contracts between gateways, nodes and the admin command, generated from `proto/cluster`.
//!
//! Owns nothing by hand: meaning, units and bounds stand in the .proto files.

#![allow(
    missing_docs,
    unused_qualifications,
    unreachable_pub,
    clippy::all,
    clippy::pedantic,
    reason = "generated; documented in the .proto files"
)]

/// Operations, attachments, deliveries.
pub mod queue {
    tonic::include_proto!("martlet.v1.queue");
}

/// What a shard's log holds.
pub mod command {
    tonic::include_proto!("martlet.v1.command");
}

/// What the meta group knows.
pub mod meta {
    tonic::include_proto!("martlet.v1.meta");
}

/// What operators ask.
pub mod admin {
    tonic::include_proto!("martlet.v1.admin");
}

/// Raft between nodes.
pub mod raft {
    tonic::include_proto!("martlet.v1.raft");
}

//! The gRPC services of a node.

pub mod admin;
pub mod meta;
pub mod peers;
pub mod queue;
mod skip;

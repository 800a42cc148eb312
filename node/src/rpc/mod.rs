//! The gRPC services of a node.

pub mod admin;
pub mod carry;
mod group;
pub mod meta;
pub mod peers;
pub mod queue;
mod skip;

//! The gRPC services of a node.

pub mod admin;
mod ask;
pub mod carry;
mod census;
mod group;
pub mod meta;
pub mod peers;
pub mod queue;
mod skip;
mod story;

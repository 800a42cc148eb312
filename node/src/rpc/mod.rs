//! The gRPC services of a node.

pub mod peers;

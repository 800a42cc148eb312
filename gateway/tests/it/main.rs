//! The gateway's edges over real sockets, with a node in memory behind the real gRPC trait.

#![expect(clippy::unwrap_used, reason = "tests may unwrap")]

mod fake_node;
mod http;
mod mcs;

//! The gateway's edges over real sockets, with a node in memory behind the real gRPC trait.

#![expect(clippy::unwrap_used, clippy::disallowed_methods, reason = "tests may unwrap, wait and spawn")]
#![expect(clippy::await_holding_lock, reason = "each guard is dropped before the await, which the lint does not see")]

mod fake_node;
mod http;
mod mcs;

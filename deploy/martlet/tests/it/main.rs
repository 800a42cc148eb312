//! End-to-end tests: the built executable, driven over real sockets.
//!
//! A test is named after the statement of the protocol documents that it proves. `.ci/statements` prints which test proves
//! which.

#![expect(
    clippy::unwrap_used,
    clippy::disallowed_methods,
    clippy::print_stdout,
    reason = "a test may unwrap, print, and wait by the system's clock"
)]

mod app_server;
mod broker;
mod clients;
mod cluster;
mod contract;
mod delivery;
mod device;
mod enroll;
mod faults;
mod group_commit;
mod groups;
mod hostile;
mod http;
mod http2;
mod mcs;
mod operators;
mod queue_rules;
mod quickstart;
mod rates;
mod revocations;
mod senders;
mod stories;
mod topics;

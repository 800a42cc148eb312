//! End-to-end tests: the built executable, driven over real sockets.
//!
//! A test is named after the statement of the protocol documents that it proves. `.ci/statements` prints which test proves
//! which.

mod app_server;
mod broker;
mod clients;
mod cluster;
mod contract;
mod delivery;
mod device;
mod enroll;
mod http;
mod mcs;
mod quickstart;

//! HTTP: clients on real sockets, a gateway, nodes in memory.

mod client;
mod cluster;
mod enroll;
mod fake_groups;
mod groups;
mod rates;
mod routing;
mod send;

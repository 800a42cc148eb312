//! The load generator: devices, app servers, scenarios, and the ledger that judges a run.
//!
//! A run passes through [`scenario`]: [`cluster`] starts the broker, [`fleet`] holds the devices, [`app_server`] sends at the
//! pace of [`pace`], [`history`] records, [`ledger`] judges, [`report`] tells. [`faults`] does the same to a cluster that it keeps
//! breaking. [`device`] and [`http`] serve `martlet device` and the end-to-end tests as well.

pub mod app_server;
pub mod clock;
pub mod cluster;
pub mod device;
pub mod faults;
pub mod fleet;
pub mod history;
pub mod http;
pub mod ledger;
pub mod machine;
pub mod pace;
pub mod patience;
pub mod ports;
pub mod process;
pub mod report;
pub mod scenario;

#[cfg(test)]
mod scripted;

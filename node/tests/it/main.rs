//! Tests of the node from outside: what only the public seams show.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking, also in what its tests share")]

mod checkpoints;
mod creation;
mod damage;
mod faults;
mod group_model;
mod leases;
mod log;
mod log_seeds;
mod model;
mod must_hold;
mod nodes;
mod poison;
mod put_back;
mod raise;
mod serving;
mod snapshots;
mod state;
mod times;
mod watching;

//! `martlet`.

mod ca;
mod connection;
mod ops;
mod private_file;
mod shutdown;
mod telemetry;

fn main() {}

//! `martlet-loadtest`.

fn main() {}

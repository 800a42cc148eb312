//! `martlet`.

fn main() {}

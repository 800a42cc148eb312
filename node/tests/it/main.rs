//! Tests of the node from outside: what only the public seams show.

mod model;
mod state;

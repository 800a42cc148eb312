//! Tests of the node from outside: what only the public seams show.

mod creation;
mod model;
mod nodes;
mod state;
mod watching;

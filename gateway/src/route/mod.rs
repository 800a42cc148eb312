//! From a token to the node that leads its shard.

mod config;

pub use config::RouteConfig;

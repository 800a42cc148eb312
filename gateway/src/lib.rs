//! A Martlet gateway: it ends the connections of app servers and devices, routes by token, and holds nothing that matters.
//!
//! In the order in which a message passes: [`http`] takes it from an app server, [`route`] brings it to the node that leads
//! its shard; [`attach`] brings a device's queue to its connection, [`mcs`] is that connection. [`enroll`] gives devices their
//! identity and their tokens, [`admit`] bounds what one address may ask, `project_rate` what one project may send.

pub mod admit;
pub mod attach;
mod downstream;
pub mod enroll;
mod groups;
pub mod http;
pub mod mcs;
mod project_rate;
pub mod route;
mod topics;

pub mod clock;
pub mod config;
pub mod entropy;
pub mod gateway;
pub mod metrics;
pub mod tls;

pub use config::Config;
pub use gateway::{Gateway, GatewayError, Readiness, Started, run};
pub use metrics::Metrics;

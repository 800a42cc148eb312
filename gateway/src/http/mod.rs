//! HTTP for app servers and for the enrolment of devices, on one port, routed by path alone.

mod config;

pub use config::HttpConfig;

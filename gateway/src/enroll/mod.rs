//! How a device becomes known: check-in, registration, Firebase installations.

mod config;

pub use config::{EnrollConfig, Foreign};

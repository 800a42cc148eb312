//! How a device becomes known: check-in, registration, Firebase installations.
//!
//! Owns the order in which a device is judged, and the statuses it is told (device.md sections 2.4, 3.3 and 5.1). Check-in and
//! installations ask no node: identities and installation tokens are MACs. A registration goes to the device's shard.
//!
//! | file | what |
//! | --- | --- |
//! | `config` | settings, policy |
//! | `checkin` | `/checkin` |
//! | `register` | `/c2dm/register3`, `/c2dm/register` |
//! | `install` | `/v1/projects/…/installations` |
//!
//! Not built: topic subscription by register3 (`INVALID_PARAMETERS`), `authTokens:generate`, FCM registrations.

mod checkin;
mod config;
mod install;
mod register;

pub use self::config::{EnrollConfig, Foreign};
pub(crate) use self::{checkin::checkin, install::install, register::register};

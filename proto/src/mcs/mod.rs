//! MCS, the long-lived connection of devices: frames on the wire, the stanzas in them, and a queued message as a stanza.
//!
//! Pure values, for both ends: the gateway serves it, `martlet device` and the load generator are clients of it. Owns no
//! socket, window or clock; who says what when is the session's business (device.md section 8).

pub mod downstream;
pub mod frame;
pub mod stanza;

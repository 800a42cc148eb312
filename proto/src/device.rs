//! Messages of devices, generated from `proto/device` (proto2).
//!
//! prost fills a missing required field with its default: whoever decodes must test emptiness (device.md section 11).

#![allow(
    missing_docs,
    unused_qualifications,
    unreachable_pub,
    clippy::all,
    clippy::pedantic,
    reason = "generated; documented in the .proto files"
)]

/// The long-lived connection.
pub mod mcs {
    tonic::include_proto!("mcs");
}

/// The check-in.
pub mod checkin {
    tonic::include_proto!("checkin");
}

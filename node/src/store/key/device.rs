//! Key family `Device` (0x02): one row per device. Key: `OF_DEVICE | device tag u64 | tag`, 10 bytes. Value: [`DeviceRow`], protocol
//! buffers.

use bytes::Bytes;
use martlet_proto::tag::DeviceTag;
use prost::Message;

use super::{BadRow, Family, device_body, of_device};

/// What is known of a device beyond its registrations and messages.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct DeviceRow {
    /// Days since 1970 when it was last here; 0 when it never was.
    #[prost(uint32, tag = "1")]
    pub last_seen_day: u32,
    /// Highest sequence the state was told was written to it, 16 bytes, or empty. Kept only while rows at or below it wait
    /// for their ack: later rows are above it anyway, and so a device that acks promptly costs no write here.
    #[prost(bytes = "bytes", tag = "2")]
    pub written_through: Bytes,
}

/// The key of a device.
#[must_use]
pub fn key(device: DeviceTag) -> Bytes {
    of_device(Family::Device, device, 0).into()
}

/// Reads a key.
#[must_use]
pub fn decode_key(key: &[u8]) -> Option<DeviceTag> {
    device_body(Family::Device, key).filter(|(_, rest)| rest.is_empty()).map(|(device, _)| device)
}

/// The value.
#[must_use]
pub fn encode(row: &DeviceRow) -> Bytes {
    row.encode_to_vec().into()
}

/// Reads the value found under `key`.
///
/// # Errors
/// When it is not a [`DeviceRow`].
pub fn decode(key: &[u8], value: Bytes) -> Result<DeviceRow, BadRow> {
    let row = DeviceRow::decode(value).map_err(|_| BadRow::new(Family::Device, "not protocol buffers", key))?;
    if !matches!(row.written_through.len(), 0 | 16) {
        return Err(BadRow::new(Family::Device, "written_through is not a sequence", key));
    }
    Ok(row)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn round_trips_and_sorts_by_device(a: u64, b: u64, last_seen_day: u32, written: Option<[u8; 16]>) {
            prop_assert_eq!(decode_key(&key(DeviceTag(a))), Some(DeviceTag(a)));
            prop_assert_eq!(key(DeviceTag(a)).cmp(&key(DeviceTag(b))), a.cmp(&b));
            let written_through = written.map_or_else(Bytes::new, |bytes| Bytes::copy_from_slice(&bytes));
            let row = DeviceRow { last_seen_day, written_through };
            prop_assert_eq!(decode(&key(DeviceTag(a)), encode(&row)), Ok(row));
        }
    }
}

//! Key family `Registration` (0x03): one registration of a device. Key: `OF_DEVICE | device tag u64 | tag | registration id 16`,
//! 26 bytes. Value: [`RegistrationRow`], protocol buffers.

use bytes::Bytes;
use martlet_proto::{tag::DeviceTag, token::RegistrationId};
use prost::Message;

use super::{BadRow, Family, after_prefix, device_body, of_device, take};

/// A registration: what a token stands for.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct RegistrationRow {
    /// `app` of the form.
    #[prost(string, tag = "1")]
    pub application: String,
    /// Second-level application id; empty when none.
    #[prost(string, tag = "2")]
    pub subtype: String,
    /// `GCM`, `*`, or empty for the legacy form.
    #[prost(string, tag = "3")]
    pub scope: String,
    /// Who may send: sorted, without repeats.
    #[prost(string, repeated, tag = "4")]
    pub senders: Vec<String>,
    /// Instance ID, the token's text before the colon.
    #[prost(string, tag = "5")]
    pub iid: String,
    /// Whether the gateway drew the Instance ID because the client named none.
    #[prost(bool, tag = "6")]
    pub iid_invented: bool,
    /// SHA-1 of the application's certificate, hex; empty when none.
    #[prost(string, tag = "7")]
    pub cert: String,
    /// As last registered.
    #[prost(string, tag = "8")]
    pub app_version: String,
    /// Key the token was minted with.
    #[prost(uint32, tag = "9")]
    pub token_key_id: u32,
    /// Shard time when it was made, milliseconds since 1970.
    #[prost(uint64, tag = "10")]
    pub created_ms: u64,
    /// Shard time from which on it is gone; 0: never.
    #[prost(uint64, tag = "11")]
    pub expires_ms: u64,
    /// Id of the registration that took its place, 16 bytes; empty while it is the current one.
    #[prost(bytes = "bytes", tag = "12")]
    pub superseded_by: Bytes,
    /// Shard time when that happened; 0 while it is the current one.
    #[prost(uint64, tag = "13")]
    pub superseded_ms: u64,
}

/// The key of one registration.
#[must_use]
pub fn key(device: DeviceTag, id: RegistrationId) -> Bytes {
    let mut key = prefix(device);
    key.extend_from_slice(&id.0);
    key.into()
}

/// The registrations of a device are those with `range.0 <= key < range.1`.
#[must_use]
pub fn range(device: DeviceTag) -> (Bytes, Bytes) {
    let prefix = prefix(device);
    let end = after_prefix(&prefix);
    (prefix.into(), end)
}

fn prefix(device: DeviceTag) -> Vec<u8> {
    of_device(Family::Registration, device, 16)
}

/// Reads a key.
#[must_use]
pub fn decode_key(key: &[u8]) -> Option<(DeviceTag, RegistrationId)> {
    let (device, mut rest) = device_body(Family::Registration, key)?;
    let id = RegistrationId(take(&mut rest)?);
    rest.is_empty().then_some((device, id))
}

/// The value.
#[must_use]
pub fn encode(row: &RegistrationRow) -> Bytes {
    row.encode_to_vec().into()
}

/// Reads the value found under `key`.
///
/// # Errors
/// When it is not a [`RegistrationRow`].
pub fn decode(key: &[u8], value: Bytes) -> Result<RegistrationRow, BadRow> {
    let bad = |what| BadRow::new(Family::Registration, what, key);
    let row = RegistrationRow::decode(value).map_err(|_| bad("not protocol buffers"))?;
    if !matches!(row.superseded_by.len(), 0 | 16) {
        return Err(bad("superseded_by is not a registration id"));
    }
    Ok(row)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn round_trips_and_sorts_by_device_then_id(a: (u64, [u8; 16]), b: (u64, [u8; 16])) {
            let encode = |(device, id): (u64, [u8; 16])| key(DeviceTag(device), RegistrationId(id));
            let (device, id) = decode_key(&encode(a)).unwrap();
            prop_assert_eq!((device.0, id.0), a);
            prop_assert_eq!(encode(a).cmp(&encode(b)), a.cmp(&b));
            let (from, to) = range(DeviceTag(a.0));
            prop_assert_eq!(from <= encode(b) && encode(b) < to, a.0 == b.0);
        }

        #[test]
        fn a_value_round_trips_and_any_bytes_answer(application: String, senders: Vec<String>, expires_ms: u64, junk: Vec<u8>) {
            let row = RegistrationRow { application, senders, expires_ms, ..Default::default() };
            prop_assert_eq!(decode(&[], encode(&row)), Ok(row));
            let _ = decode(&[], junk.into());
        }
    }
}

//! A queued message as the stanza a device sees. Source: device.md sections 9.1 and 9.4.
//!
//! The service's own fields win: `subtype` is the registered one whatever the sender wrote (FI-09), a notice holds nothing of
//! a sender's.

use prost::Message as _;

use crate::{
    cluster::queue::{Message, Payload},
    device::mcs::{AppData, DataMessageStanza},
    limits::TTL_MAX_SECS,
    message::MessageId,
};

/// A message of the queue that cannot be shown to a device: a defect of whoever stored it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NotDeliverable {
    /// The message id is not 16 bytes.
    #[error("message id of {0} bytes")]
    MessageId(usize),
    /// The payload is no `Payload`.
    #[error("malformed payload")]
    Payload,
}

/// The stanza of a message. `last_stream_id_received`: what to acknowledge with it, if it is news.
pub fn stanza(message: &Message, last_stream_id_received: Option<i32>) -> Result<DataMessageStanza, NotDeliverable> {
    let id = MessageId::from_bytes(&message.message_id).ok_or(NotDeliverable::MessageId(message.message_id.len()))?;
    let is_notice = message.total_deleted > 0;
    let (mut app_data, raw_data) = if is_notice { (notice(message.total_deleted), None) } else { payload(message)? };
    if !message.subtype.is_empty() {
        app_data.push(pair("subtype", &message.subtype));
    }
    // A message for now or never is not kept, so nothing may ask for it again (decisions: TTL 0). A notice is always kept.
    let is_kept = is_notice || message.ttl_secs > 0;
    let ttl_secs = if is_notice && message.ttl_secs == 0 { TTL_MAX_SECS } else { message.ttl_secs };
    Ok(DataMessageStanza {
        // 8 upper-case hex digits, as the original; nothing hangs on it.
        id: Some(format!("{:08X}", id.random & 0xffff_ffff)),
        from: message.wire_from.clone(),
        category: message.application.clone(),
        token: Some(message.collapse_key.clone()).filter(|key| !key.is_empty()),
        app_data,
        persistent_id: is_kept.then(|| id.to_string()),
        last_stream_id_received,
        ttl: Some(i32::try_from(ttl_secs).unwrap_or(i32::MAX)),
        sent: Some(i64::try_from(message.accepted_ms).unwrap_or(i64::MAX)),
        raw_data,
        delivery_receipt_requested: message.receipt_wanted.then_some(true),
        ..DataMessageStanza::default()
    })
}

fn payload(message: &Message) -> Result<(Vec<AppData>, Option<bytes::Bytes>), NotDeliverable> {
    let payload = Payload::decode(message.payload.clone()).map_err(|_| NotDeliverable::Payload)?;
    let pairs = payload.app_data.into_iter().filter(|pair| pair.key != "subtype");
    let app_data = pairs.map(|pair| AppData { key: pair.key, value: pair.value }).collect();
    Ok((app_data, Some(payload.raw_data).filter(|data| !data.is_empty())))
}

/// `total_deleted` is a string on the wire, and the plural of the type is what all but one client wait for.
fn notice(total_deleted: u64) -> Vec<AppData> {
    vec![pair("message_type", "deleted_messages"), pair("total_deleted", &total_deleted.to_string())]
}

fn pair(key: &str, value: &str) -> AppData {
    AppData { key: key.to_owned(), value: value.to_owned() }
}

//! A device's mailbox: what waits for it, in the order of the sequences.
//!
//! Owns how a row comes in and how it leaves: the message, its place in the expiry index, its fate in the counters, the
//! effect, its story. Every way out goes through `drop_row`, so none can forget one of them. A notice is no message: it has no fate.

use std::sync::Arc;

use bytes::Bytes;
use martlet_proto::{message::Sequence, tag::DeviceTag};

use super::{
    StateError, body, count,
    draft::Draft,
    effect::Effect,
    rows::Rows,
    story::{End, Ended},
    warm::Brief,
};
use crate::store::key;
pub use crate::store::key::mailbox::MailboxRow;

/// What waits for a device above `after`, in order, at most `limit` rows. Also what has just run out: look at
/// [`MailboxRow::remaining_ms`].
///
/// # Errors
/// When the rows cannot be read or are not what they should be.
pub fn waiting(
    rows: &dyn Rows,
    device: DeviceTag,
    after: Option<Sequence>,
    limit: usize,
) -> Result<Vec<(Sequence, MailboxRow)>, StateError> {
    let (from, to) = key::mailbox::range(device, after);
    let page = rows.scan(&from, &to, limit)?;
    page.into_iter()
        .map(|(key, value)| {
            let misshapen = StateError::Broken("a mailbox key is misshapen");
            let (_, sequence) = key::mailbox::decode_key(&key).ok_or(misshapen)?;
            Ok((sequence, body::whole(rows, key::mailbox::decode(&key, value)?)?))
        })
        .collect()
}

/// Puts a row at the end of the mailbox. `value` is the row as it is stored: one that names a body has neither payload nor `from`.
pub(super) fn store(
    draft: &mut Draft<'_>,
    device: DeviceTag,
    sequence: Sequence,
    row: MailboxRow,
    value: Bytes,
) -> Result<(), StateError> {
    count::stored(draft, &row.sender, value.len() as u64)?;
    draft.warm.enqueued(device, sequence, &row, value.len());
    draft.rows.put_fresh(key::mailbox::key(device, sequence), value);
    draft.rows.put_fresh(key::expiry::key(row.expiry_ms, device, sequence), Bytes::new());
    draft.effects.push(Effect::Enqueued { device_tag: device, sequence, row: Arc::new(row) });
    Ok(())
}

/// Takes a row out and counts what became of it.
pub(super) fn drop_row(draft: &mut Draft<'_>, device: DeviceTag, row: &Brief, end: End) -> Result<(), StateError> {
    let sequence = row.sequence;
    draft.warm.removed(device, sequence);
    draft.rows.remove(key::mailbox::key(device, sequence));
    draft.rows.remove(key::expiry::key(row.expiry_ms, device, sequence));
    if let Some(body) = row.body {
        body::release(draft, body)?;
    }
    count::freed(draft, &row.kin.sender, row.bytes)?;
    if !row.is_notice() {
        count::add(draft, &row.kin.sender, &[end.fate()])?;
        draft.ended.push(Ended::brief(row, device, draft.now_ms(), end));
    }
    draft.effects.push(Effect::Removed { device_tag: device, sequence });
    Ok(())
}

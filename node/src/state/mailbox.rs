//! A device's mailbox: what waits for it, in the order of the sequences.
//!
//! Owns how a row comes in and how it leaves: the message, its place in the expiry index, its fate in the counters, the
//! effect. Every way out goes through `drop_row`, so none can forget one of them. A notice is no message: it has no fate.

use std::sync::Arc;

use bytes::Bytes;
use martlet_proto::{message::Sequence, tag::DeviceTag};

use super::{
    StateError,
    count::{self, Fate},
    draft::Draft,
    effect::Effect,
    rows::Rows,
};
use crate::store::key;
pub use crate::store::key::mailbox::MailboxRow;

/// Rows read at a time where all of a mailbox is read.
const PAGE_ROWS: usize = 256;

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
    let held = page(rows, device, after, limit)?;
    Ok(held.into_iter().map(|held| (held.sequence, held.row)).collect())
}

/// A row with its place and size.
#[derive(Debug, Clone)]
pub(super) struct Held {
    pub(super) sequence: Sequence,
    pub(super) row: MailboxRow,
    /// Of the value as it is stored.
    pub(super) bytes: u64,
}

/// All that waits for a device.
pub(super) fn all(rows: &dyn Rows, device: DeviceTag) -> Result<Vec<Held>, StateError> {
    let mut mailbox: Vec<Held> = Vec::new();
    loop {
        let page = page(rows, device, mailbox.last().map(|held| held.sequence), PAGE_ROWS)?;
        let end = page.len() < PAGE_ROWS;
        mailbox.extend(page);
        if end {
            return Ok(mailbox);
        }
    }
}

/// One row.
pub(super) fn get(rows: &dyn Rows, device: DeviceTag, sequence: Sequence) -> Result<Option<Held>, StateError> {
    let key = key::mailbox::key(device, sequence);
    rows.get(&key)?.map(|value| held(sequence, &key, value)).transpose()
}

/// Puts a row at the end of the mailbox.
pub(super) fn store(draft: &mut Draft<'_>, device: DeviceTag, sequence: Sequence, row: MailboxRow, value: Bytes) {
    draft.rows.put_fresh(key::mailbox::key(device, sequence), value);
    draft.rows.put_fresh(key::expiry::key(row.expiry_ms, device, sequence), Bytes::new());
    draft.effects.push(Effect::Enqueued { device_tag: device, sequence, row: Arc::new(row) });
}

/// Takes a row out and counts what became of it.
pub(super) fn drop_row(draft: &mut Draft<'_>, device: DeviceTag, held: &Held, fate: Fate) -> Result<(), StateError> {
    draft.rows.remove(key::mailbox::key(device, held.sequence));
    draft.rows.remove(key::expiry::key(held.row.expiry_ms, device, held.sequence));
    if !held.row.is_notice() {
        count::add(&mut draft.rows, &held.row.sender, &[fate])?;
    }
    draft.effects.push(Effect::Removed { device_tag: device, sequence: held.sequence });
    Ok(())
}

fn page(rows: &dyn Rows, device: DeviceTag, after: Option<Sequence>, limit: usize) -> Result<Vec<Held>, StateError> {
    let (from, to) = key::mailbox::range(device, after);
    let page = rows.scan(&from, &to, limit)?;
    page.into_iter()
        .map(|(key, value)| {
            let (_, sequence) =
                key::mailbox::decode_key(&key).ok_or(StateError::Broken("a mailbox key is misshapen"))?;
            held(sequence, &key, value)
        })
        .collect()
}

fn held(sequence: Sequence, key: &[u8], value: Bytes) -> Result<Held, StateError> {
    let bytes = value.len() as u64;
    Ok(Held { sequence, row: key::mailbox::decode(key, value)?, bytes })
}

//! Fate counters of projects.
//!
//! Owns the one rule: what is accepted has exactly one fate or waits. A counter is raised together with the row it speaks
//! of, never apart; so are the stored bytes, which follow the rows of the mailboxes, notices included.

use super::{StateError, draft::Draft, rows::Rows};
use crate::store::key::count;
pub use crate::store::key::count::CountRow;

/// What became of a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Fate {
    /// Taken from the app server; every other fate follows this one.
    Accepted,
    /// Acked by the device.
    Delivered,
    /// Its time to live ended.
    Expired,
    /// A newer one of its collapse key took its place, or there were too many keys.
    Collapsed,
    /// Dropped by a limit.
    Overflow,
    /// Its registration went.
    Unregistered,
    /// Taken back by an operator.
    Recalled,
}

/// The counters of a project (by its sender id) in this shard; zeros when it never sent here.
///
/// # Errors
/// When the row cannot be read or does not balance.
pub fn counters(rows: &dyn Rows, sender: &str) -> Result<CountRow, StateError> {
    let key = count::key(sender);
    match rows.get(&key)? {
        Some(value) => Ok(count::decode(&key, value)?),
        None => Ok(CountRow::default()),
    }
}

/// Counts fates of one message of `sender`. Written by [`write()`].
pub(super) fn add(draft: &mut Draft<'_>, sender: &str, fates: &[Fate]) -> Result<(), StateError> {
    let row = row(draft, sender)?;
    for fate in fates {
        let counter = match fate {
            Fate::Accepted => &mut row.accepted,
            Fate::Delivered => &mut row.delivered,
            Fate::Expired => &mut row.expired,
            Fate::Collapsed => &mut row.collapsed,
            Fate::Overflow => &mut row.overflow,
            Fate::Unregistered => &mut row.unregistered,
            Fate::Recalled => &mut row.recalled,
        };
        *counter += 1;
    }
    row.waiting().ok_or(StateError::Broken("a message met two fates"))?;
    Ok(())
}

/// Bytes of `sender` that are stored in this shard.
pub(super) fn stored_bytes(draft: &mut Draft<'_>, sender: &str) -> Result<u64, StateError> {
    Ok(row(draft, sender)?.stored_bytes)
}

/// A row of `sender` with so many bytes came into a mailbox.
pub(super) fn stored(draft: &mut Draft<'_>, sender: &str, bytes: u64) -> Result<(), StateError> {
    row(draft, sender)?.stored_bytes += bytes;
    Ok(())
}

/// A row of `sender` with so many bytes left its mailbox.
pub(super) fn freed(draft: &mut Draft<'_>, sender: &str, bytes: u64) -> Result<(), StateError> {
    let row = row(draft, sender)?;
    let left = row.stored_bytes.checked_sub(bytes);
    row.stored_bytes = left.ok_or(StateError::Broken("more bytes left a project's mailboxes than came in"))?;
    Ok(())
}

fn row<'d>(draft: &'d mut Draft<'_>, sender: &str) -> Result<&'d mut CountRow, StateError> {
    if !draft.counts.contains_key(sender) {
        let row = counters(&draft.rows, sender)?;
        draft.counts.insert(sender.to_owned(), row);
    }
    Ok(draft.counts.get_mut(sender).expect("there, or put there just now"))
}

/// Writes what the entry counted.
pub(super) fn write(draft: &mut Draft<'_>) {
    for (sender, row) in std::mem::take(&mut draft.counts) {
        draft.rows.put(count::key(&sender), count::encode(&row));
    }
}

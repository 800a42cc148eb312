//! Fate counters of projects.
//!
//! Owns the one rule: what is accepted has exactly one fate or waits. A counter is raised together with the row it speaks
//! of, never apart.

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
    /// Dropped by a limit.
    Overflow,
    /// Its registration went.
    Unregistered,
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
    if !draft.counts.contains_key(sender) {
        let row = counters(&draft.rows, sender)?;
        draft.counts.insert(sender.to_owned(), row);
    }
    let row = draft.counts.get_mut(sender).expect("there, or put there just now");
    for fate in fates {
        let counter = match fate {
            Fate::Accepted => &mut row.accepted,
            Fate::Delivered => &mut row.delivered,
            Fate::Expired => &mut row.expired,
            Fate::Overflow => &mut row.overflow,
            Fate::Unregistered => &mut row.unregistered,
        };
        *counter += 1;
    }
    row.waiting().ok_or(StateError::Broken("a message met two fates"))?;
    Ok(())
}

/// Writes what the entry counted.
pub(super) fn write(draft: &mut Draft<'_>) {
    for (sender, row) in std::mem::take(&mut draft.counts) {
        draft.rows.put(count::key(&sender), count::encode(&row));
    }
}

//! What is known of a device as such: when it was here, and up to where its mailbox was written to it.
//!
//! Owns the device row. The mark of what was written only rises, and is kept only while something at or below it waits for
//! an ack: later rows lie above it anyway, so a device that acks promptly costs no write here.

use martlet_proto::{cluster::command::Seen, message::Sequence, tag::DeviceTag};

use super::{StateError, draft::Draft};
use crate::store::key::{self, device::DeviceRow};

/// A day, milliseconds.
const DAY_MS: u64 = 24 * 60 * 60 * 1000;

/// The day of a time in milliseconds since 1970.
pub(crate) fn day(time_ms: u64) -> u32 {
    u32::try_from(time_ms / DAY_MS).unwrap_or(u32::MAX)
}

/// Notes that a device was here.
pub(super) fn seen(draft: &mut Draft<'_>, seen: &Seen) -> Result<(), StateError> {
    seen_on(draft, DeviceTag(seen.device_tag), seen.day)
}

/// Notes that a device is here now.
pub(super) fn seen_now(draft: &mut Draft<'_>, device: DeviceTag) -> Result<(), StateError> {
    let today = today(draft);
    seen_on(draft, device, today)
}

fn seen_on(draft: &mut Draft<'_>, device: DeviceTag, day: u32) -> Result<(), StateError> {
    let row = draft.warm.row(&draft.rows, device)?;
    if row.is_none_or(|row| row.last_seen_day < day) {
        let row = DeviceRow { last_seen_day: day, ..row.cloned().unwrap_or_default() };
        save(draft, device, &row);
    }
    Ok(())
}

/// Up to where the mailbox was written to the device, as far as the state was ever told, now by `told`.
pub(super) fn written_through(
    draft: &mut Draft<'_>,
    device: DeviceTag,
    told: Option<Sequence>,
) -> Result<Option<Sequence>, StateError> {
    let row = draft.warm.row(&draft.rows, device)?;
    let known = row.and_then(|row| Sequence::from_bytes(&row.written_through));
    let Some(told) = told.filter(|told| known < Some(*told)) else { return Ok(known) };
    let row = row.cloned();
    if draft.warm.mailbox(&draft.rows, device)?.first().is_some_and(|first| first.sequence <= told) {
        let row = row.unwrap_or_else(|| DeviceRow { last_seen_day: today(draft), ..Default::default() });
        save(draft, device, &DeviceRow { written_through: told.to_bytes().to_vec().into(), ..row });
    }
    Ok(Some(told))
}

fn today(draft: &Draft<'_>) -> u32 {
    day(draft.now_ms())
}

fn save(draft: &mut Draft<'_>, device: DeviceTag, row: &DeviceRow) {
    draft.warm.device_saved(device, row);
    draft.rows.put(key::device::key(device), key::device::encode(row));
}

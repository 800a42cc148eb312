//! What is known of a device as such: when it was here, and up to where its mailbox was written to it.
//!
//! Owns the device row. The mark of what was written only rises, and is kept only while something at or below it waits for
//! an ack: later rows lie above it anyway, so a device that acks promptly costs no write here.

use martlet_proto::{cluster::command::Seen, message::Sequence, tag::DeviceTag};

use super::{StateError, draft::Draft, rows::Rows};
use crate::store::key::{self, device::DeviceRow};

const DAY_MS: u64 = 24 * 60 * 60 * 1000;

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
    let row = load(&draft.rows, device)?;
    if row.as_ref().is_none_or(|row| row.last_seen_day < day) {
        save(draft, device, &DeviceRow { last_seen_day: day, ..row.unwrap_or_default() });
    }
    Ok(())
}

/// Up to where the mailbox was written to the device, as far as the state was ever told, now by `told`.
pub(super) fn written_through(
    draft: &mut Draft<'_>,
    device: DeviceTag,
    told: Option<Sequence>,
) -> Result<Option<Sequence>, StateError> {
    let row = load(&draft.rows, device)?;
    let known = row.as_ref().and_then(|row| Sequence::from_bytes(&row.written_through));
    let Some(told) = told.filter(|told| known < Some(*told)) else { return Ok(known) };
    let (from, _) = key::mailbox::range(device, None);
    let (above, _) = key::mailbox::range(device, Some(told));
    if !draft.rows.scan(&from, &above, 1)?.is_empty() {
        let row = row.unwrap_or_else(|| DeviceRow { last_seen_day: today(draft), ..Default::default() });
        save(draft, device, &DeviceRow { written_through: told.to_bytes().to_vec().into(), ..row });
    }
    Ok(Some(told))
}

fn today(draft: &Draft<'_>) -> u32 {
    u32::try_from(draft.now_ms() / DAY_MS).unwrap_or(u32::MAX)
}

fn load(rows: &dyn Rows, device: DeviceTag) -> Result<Option<DeviceRow>, StateError> {
    let key = key::device::key(device);
    Ok(rows.get(&key)?.map(|value| key::device::decode(&key, value)).transpose()?)
}

fn save(draft: &mut Draft<'_>, device: DeviceTag, row: &DeviceRow) {
    draft.rows.put(key::device::key(device), key::device::encode(row));
}

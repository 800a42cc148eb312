//! Collapse keys: a message in place of those before it.
//!
//! Owns which rows a new one drives out. Of one application, subtype and sender on a device: every row of its key, whether it waits
//! or was written and not acked, for a device that comes back is to have the newest only; and the oldest waiting rows of other keys
//! where there are more keys than may wait. Nobody is told (gcm-http.md 6.2); they are counted `collapsed`.
//!
//! Sources: gcm-http.md 6.2; device.md 9.5; decisions.md "collapse scope", "limit of 4 and 100", "H116 and collapse".

use martlet_proto::{cluster::command::Limits, message::Sequence};

use super::{mailbox::MailboxRow, warm::Brief};

/// Those of `mailbox`, which is in the order of the sequences, that go when `row` comes; none for a row without a collapse key.
pub(super) fn victims<'m>(
    row: &MailboxRow,
    mailbox: &[&'m Brief],
    written: Option<Sequence>,
    limits: &Limits,
) -> Vec<&'m Brief> {
    let key = &row.message.collapse_key;
    if key.is_empty() {
        return Vec::new();
    }
    let kin = mailbox.iter().copied().filter(|brief| brief.kin.is_of(row));
    let collapsible = kin.filter_map(|brief| Some((brief, &**brief.collapse_key.as_ref()?)));
    let (mut victims, others): (Vec<_>, Vec<_>) = collapsible.partition(|(_, of)| *of == key);
    let waiting: Vec<_> = others.into_iter().filter(|(brief, _)| Some(brief.sequence) > written).collect();
    // One row a key: so many rows are so many keys.
    let excess = (waiting.len() + 1).saturating_sub(limits.collapse_keys_max.max(1) as usize);
    victims.extend(&waiting[..excess]);
    victims.into_iter().map(|(brief, _)| brief).collect()
}

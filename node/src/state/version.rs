//! Which behaviour a shard has: new behaviour begins at a logged `Raise`, at the same entry on every replica.

use super::{StateError, draft::Draft};

/// The newest version this program knows.
pub const KNOWN: u32 = 1;

/// The version of a shard whose row says `version`: 0 is 1, for no `Raise` came yet.
pub(super) fn of(version: u32) -> Result<u32, StateError> {
    if version > KNOWN { Err(StateError::Version { found: version, known: KNOWN }) } else { Ok(version.max(1)) }
}

/// Raises the version; to one that it has or had: nothing. To one unknown here: this replica stops, it would go astray.
pub(super) fn raise(draft: &mut Draft<'_>, version: u32) -> Result<(), StateError> {
    of(version)?;
    draft.shard.version = draft.shard.version.max(version);
    Ok(())
}

//! Which behaviour a shard has: new behaviour begins at a logged `Raise`, at the same entry on every replica.
//!
//! Owns what a version number means to `apply`. When a `Raise` is proposed is the leader's business (`shard/raise.rs`).

use super::{StateError, draft::Draft};

/// The newest version this program knows.
pub const KNOWN: u32 = 1;

/// Refuses a version that a program which knows up to `known` would go astray in.
pub(super) fn check(version: u32, known: u32) -> Result<(), StateError> {
    if version > known { Err(StateError::Version { found: version, known }) } else { Ok(()) }
}

/// Raises the version; to one that it has or had: nothing. To one unknown here: this replica stops.
pub(super) fn raise(draft: &mut Draft<'_>, version: u32, known: u32) -> Result<(), StateError> {
    check(version, known)?;
    draft.shard.version = draft.shard.version.max(version);
    Ok(())
}

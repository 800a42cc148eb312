//! What happens at the open of a store, before a row is read: the redo file, and what must not be there.

use std::{collections::BTreeMap, path::Path};

use super::{
    StoreError,
    checkpoint::clear_redo,
    engine::Engine,
    head::Head,
    redo::{self, Found, Redo},
};
use crate::disk::Disk;

/// Ends the checkpoint that a crash interrupted. Returns the replicas whose rows in the engine are older than the file says
/// they were: the engine lost a checkpoint that it had confirmed.
pub(super) fn finish_checkpoint(
    disk: &dyn Disk,
    engine: &dyn Engine,
    path: &Path,
) -> Result<BTreeMap<u64, String>, StoreError> {
    let mut damaged = BTreeMap::new();
    match Redo::find(disk, path)? {
        Found::Nothing => return Ok(damaged),
        Found::Torn => tracing::warn!(path = %path.display(), "a redo file without an end is dropped"),
        Found::Complete(redo) => {
            let operations = redo.apply(path, engine, |section| {
                let head = match Head::read(engine, section.replica) {
                    Ok(head) => head,
                    Err(StoreError::Damaged { replica, what, .. }) => {
                        damaged.insert(replica, what);
                        return Ok(false);
                    }
                    Err(error) => return Err(error),
                };
                let current = redo::is_current(section, head.as_ref());
                let at = head.as_ref().and_then(|head| head.seal.as_ref()).map(|seal| seal.mark.index);
                if !current && !head.as_ref().is_some_and(|head| head.dropped) && at < section.base {
                    let what = format!("sled is at index {at:?}, and confirmed {:?} before", section.base);
                    damaged.insert(section.replica, what);
                }
                Ok(current)
            })?;
            engine.make_durable()?;
            tracing::info!(path = %path.display(), operations, "a redo file was applied again");
        }
    }
    clear_redo(disk, path)?;
    Ok(damaged)
}

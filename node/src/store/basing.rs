//! The writing of a base file: a pass over the rows of one shard in sled, beside everything else.
//!
//! sled has no view of one point in time, but what stands there changes only by checkpoints: the shard is kept out of those while
//! its base is written, and its memtable takes what is applied meanwhile. So the rows read are those of the last checkpoint's
//! index, and must be as many, with the sum, as the head says: a pass also finds rows that sled lost. Until the new file is
//! whole, synced and renamed, the old one is the base; any error of disk or sled leaves it so.
//!
//! At most one pass of a shard at a time; one that a snapshot waits for gives up.

use std::{io, path::PathBuf, sync::Arc};

use super::{
    Store, StoreError,
    base::{self, BaseFile, BaseHead, BaseWriter},
    head::{Head, Seal},
    redo::failed,
    shard::{Base, ShardStore},
};

impl Store {
    /// Writes the base of a shard as of its last checkpoint; `None` when there is nothing newer than the base, or the shard is
    /// busy. Blocks on the disk for as long as reading all its rows and writing them takes.
    ///
    /// `group` is the number of its Raft group; a base of another is never taken for its own.
    pub fn write_base(&self, rows: &Arc<ShardStore>, group: u32) -> Result<Option<Base>, StoreError> {
        let replica = rows.replica();
        // As long as the one before, and half of that again for what came since. One that does not fit would take the last room from
        // the log first.
        self.has_room(rows.base().map_or(0, |base| base.bytes).saturating_mul(3) / 2)?;
        let (hold, seal) = {
            let mut cycle = self.cycle.lock().expect("no panic under this lock");
            cycle.usable()?;
            self.go_on(&mut cycle)?;
            let head = Head::read(&*self.engine, replica).inspect_err(|error| rows.note(error))?;
            let Some(seal) = head.and_then(|head| head.seal) else { return Ok(None) };
            if rows.based() >= Some(seal.mark.index) || rows.is_wanted() {
                return Ok(None);
            }
            let Some(hold) = rows.hold() else { return Ok(None) };
            (hold, seal)
        };
        let (new, path) = (self.base_path(replica, "new"), self.base_path(replica, "base"));
        let written = self.pass(rows, group, &seal, &new).and_then(|()| base::publish(&*self.disk, &new, &path));
        drop(hold);
        match written {
            Ok(()) => {
                let bytes = BaseFile::open(&*self.disk, &path)?.map_or(0, |base| base.bytes());
                let base = Base { mark: seal.mark, bytes, since: self.clock.now(), damaged: false };
                rows.set_base(Some(base.clone()));
                Ok(Some(base))
            }
            Err(error) => {
                rows.note(&error);
                // It only takes room; the next pass or start removes it too.
                let _ = self.disk.remove(&new);
                match error {
                    StoreError::Busy { .. } => Ok(None),
                    error => Err(error),
                }
            }
        }
    }

    fn pass(&self, rows: &ShardStore, group: u32, seal: &Seal, new: &std::path::Path) -> Result<(), StoreError> {
        let replica = rows.replica();
        let head = BaseHead { group, replica, seal: seal.clone() };
        let mut writer = BaseWriter::create(&*self.disk, new, head)?;
        rows.region().each(|key, value| {
            if rows.is_wanted() {
                return Err(StoreError::Busy { replica, what: "a snapshot is about to replace its rows" });
            }
            writer.row(key, value)
        })?;
        writer.finish()
    }

    /// Opens the base of a shard for reading; `None` when there is none.
    pub fn open_base(&self, rows: &ShardStore) -> Result<Option<BaseFile>, StoreError> {
        let opened = BaseFile::open(&*self.disk, &self.base_path(rows.replica(), "base"));
        opened.inspect_err(|error| self.note_base(rows, error))
    }

    /// Takes note that a base does not read back, so that it is written again.
    pub fn note_base(&self, rows: &ShardStore, error: &StoreError) {
        if matches!(error, StoreError::Base { .. }) {
            tracing::error!(%error, replica = rows.replica(), "a base file is damaged; it is written again from sled");
            rows.base_is_damaged();
        }
    }

    pub(super) fn has_room(&self, bytes: u64) -> Result<(), StoreError> {
        let dir = &self.config.dir;
        let free = self.disk.space(dir).map_err(|e| failed("ask for room in", dir, e))?.free;
        if free >= bytes {
            return Ok(());
        }
        let what = format!("{free} bytes are free, {bytes} are needed");
        Err(failed("write to", dir, io::Error::new(io::ErrorKind::StorageFull, what)))
    }

    /// A file of one replica beside sled: its base (`base`), one that is being written (`new`) or received (`got`).
    pub(super) fn base_path(&self, replica: u64, kind: &str) -> PathBuf {
        self.config.dir.join(format!("{replica:016x}.{kind}"))
    }
}

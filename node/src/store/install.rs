//! Rows that replace all rows of a shard: those of a snapshot, or of its own base.
//!
//! 1. What a peer sends is gathered in a file of its own, chunk by chunk, and synced.
//! 2. Its rows go to sled under a generation that nothing stands under, are made durable and read back: number and sum must be
//!    those that the head tells of. Nobody sees them. From here on checkpoints leave the shard out; one that is running, or that
//!    sled did not let end, ends first.
//! 3. One synced record, the head, switches generation and index together; memtable and old rows are forgotten.
//! 4. The file becomes the base; only after that may the log be purged to it.
//!
//! A crash before 3 leaves the old rows, their base and the log as they were: what was staged is an orphan. A crash between 3
//! and 4 leaves the received file, whose seal is the head's: the next open makes it the base ([`super::rebuild`]).
//!
//! The invariant: the steps before 3 change nothing that anybody reads, and may fail and be repeated; 3 happens or does not.

use std::{path::PathBuf, sync::Arc, thread, time::Duration};

use super::{
    Store, StoreError,
    base::{self, BaseFile, BaseHead, BaseWriter},
    checkpoint::clear_redo,
    engine::{BATCH_MAX, Engine, Op},
    head::{Head, Seal},
    orphan::Orphan,
    row::Region,
    shard::{Base, Hold, ShardStore},
};
use crate::disk::Disk;

/// Between two looks whether a shard can be held.
const PAUSE: Duration = Duration::from_millis(20);
/// Longest a running base pass or a checkpoint that sled does not let end is waited for.
const LOOKS_MAX: u32 = 500;
/// Tries to write the record that switches, before the store counts as broken.
const SWITCHES_MAX: u32 = 20;

/// A snapshot that comes from a peer.
#[derive(Debug)]
pub struct Incoming {
    store: Arc<Store>,
    rows: Arc<ShardStore>,
    /// Nothing else is received for this shard.
    alone: Alone,
    head: BaseHead,
    got: Got,
    writer: BaseWriter,
}

/// The file that is received; removed unless it becomes the base. A crash leaves it, and the next open removes it.
#[derive(Debug)]
struct Got {
    disk: Arc<dyn Disk>,
    path: PathBuf,
    is_kept: bool,
}

impl Drop for Got {
    fn drop(&mut self) {
        if !self.is_kept {
            let _ = self.disk.remove(&self.path);
        }
    }
}

/// Held while one snapshot of a shard is received or waits to be switched to.
#[derive(Debug)]
struct Alone(Arc<ShardStore>);

impl Drop for Alone {
    fn drop(&mut self) {
        self.0.receive(false);
    }
}

/// A snapshot whose rows are in sled and wait to be switched to. Dropped, they are orphans.
#[derive(Debug)]
pub struct Staged {
    store: Arc<Store>,
    rows: Arc<ShardStore>,
    seal: Seal,
    generation: u32,
    got: Got,
    /// The switch was tried: what came of it is for the next open to see.
    is_tried: bool,
    _hold: Hold,
    _alone: Alone,
}

impl Store {
    /// Begins to take a snapshot of a shard; `head` tells of the peer's base, for this replica, and `bytes` how long that is.
    ///
    /// [`StoreError::Busy`] while another is received, [`StoreError::Disk`] when there is no room for it.
    pub fn receive(
        self: &Arc<Self>,
        rows: &Arc<ShardStore>,
        head: BaseHead,
        bytes: u64,
    ) -> Result<Incoming, StoreError> {
        let replica = rows.replica();
        // The file, and its rows in sled, which takes up to twice their bytes.
        self.has_room(bytes.saturating_mul(3))?;
        if !rows.receive(true) {
            return Err(StoreError::Busy { replica, what: "a snapshot is being received" });
        }
        let alone = Alone(Arc::clone(rows));
        let got = Got { disk: Arc::clone(&self.disk), path: self.base_path(replica, "got"), is_kept: false };
        let writer = BaseWriter::create(&*self.disk, &got.path, head.clone())?;
        let (store, rows) = (Arc::clone(self), Arc::clone(rows));
        Ok(Incoming { store, rows, alone, head, got, writer })
    }

    /// Puts the rows of a base under a generation of their own, durably, and reads them back.
    pub(super) fn stage(
        &self,
        base: &BaseFile,
        region: Region<'_>,
        mut staged: impl FnMut(u64),
    ) -> Result<(), StoreError> {
        let engine = &*self.engine;
        let (mut ops, mut count) = (Vec::with_capacity(BATCH_MAX), 0);
        for row in base.rows() {
            let (key, value) = row?;
            region.put(&key, &value, 0, |op| ops.push(op));
            count += 1;
            while ops.len() >= BATCH_MAX {
                let rest = ops.split_off(BATCH_MAX);
                engine.batch(&ops)?;
                ops = rest;
                staged(count);
            }
        }
        engine.batch(&ops)?;
        engine.hand_over()?;
        engine.make_durable().map_err(|error| self.sync_failed(error.into()))?;
        let Seal { rows, sum, .. } = base.head().seal;
        let mut looked = 0;
        let mut tally = (0, 0u64);
        region.each(|key, value| {
            tally = (tally.0 + 1, tally.1.wrapping_add(super::row::row_hash(key, value)));
            looked += 1;
            if looked % 1_024 == 0 {
                staged(count + looked);
            }
            Ok(())
        })?;
        if tally == (rows, sum) {
            return Ok(());
        }
        let what = format!("{} rows with sum {:016x} read back of {rows} with sum {sum:016x}", tally.0, tally.1);
        Err(StoreError::Damaged { replica: region.replica, path: engine.path().to_owned(), what })
    }

    /// A sync of sled's file failed: the store is broken.
    fn sync_failed(&self, error: StoreError) -> StoreError {
        self.suspect(&error);
        self.cycle.lock().expect("no panic under this lock").fail(&error)
    }

    /// Keeps the shard out of checkpoints once none of its own is unfinished and nobody else holds it.
    fn hold(&self, rows: &Arc<ShardStore>) -> Result<Hold, StoreError> {
        let mut last = Ok(None);
        for _ in 0..LOOKS_MAX {
            rows.want(true);
            {
                let mut cycle = self.cycle.lock().expect("no panic under this lock");
                cycle.usable()?;
                last = self.go_on(&mut cycle);
                if last.is_ok()
                    && let Some(hold) = rows.hold()
                {
                    rows.want(false);
                    return Ok(hold);
                }
            }
            thread::sleep(PAUSE);
        }
        rows.want(false);
        last?;
        Err(StoreError::Busy { replica: rows.replica(), what: "its rows are in use" })
    }

    pub(super) fn orphaned(&self, replica: u64, from: u32, to: u32) {
        self.orphans.lock().expect("no panic under this lock").push(Orphan::generations(replica, from, to));
    }
}

impl Incoming {
    /// Adds the next chunk of the peer's base, not empty and at most [`base::CHUNK_MAX`] bytes.
    pub fn chunk(&mut self, bytes: &[u8]) -> Result<(), StoreError> {
        let replica = self.rows.replica();
        if bytes.is_empty() || bytes.len() > base::CHUNK_MAX {
            return Err(StoreError::Busy { replica, what: "a chunk of a snapshot has a wrong length" });
        }
        self.writer.chunk(bytes)
    }

    /// All chunks are here: makes the file durable and stages its rows. `staged` is told, now and then, how many were handled, so
    /// that the peer can be told that it goes on.
    pub fn finish(self, staged: impl FnMut(u64)) -> Result<Staged, StoreError> {
        let Self { store, rows, alone, head, got, mut writer } = self;
        writer.end()?;
        let dir = &store.config.dir;
        store.disk.sync_dir(dir).map_err(|e| super::redo::failed("sync", dir, e))?;
        let gone = || StoreError::Base { path: got.path.clone(), offset: 0, what: "it is gone".into() };
        let base = BaseFile::open(&*store.disk, &got.path)?.ok_or_else(gone)?;

        let hold = store.hold(&rows)?;
        // From here on what was staged is swept if it comes to nothing.
        let generation = rows.fresh_generation();
        let staging =
            Staged { store, rows, seal: head.seal, generation, got, is_tried: false, _hold: hold, _alone: alone };
        let Staged { store, rows, .. } = &staging;
        store.stage(&base, rows.region_of(generation), staged).inspect_err(|error| rows.note(error))?;
        Ok(staging)
    }
}

impl Staged {
    /// What the rows amount to once they are switched to.
    pub fn seal(&self) -> &Seal {
        &self.seal
    }

    /// Shows these rows from now on, durably, and makes their file the base.
    ///
    /// An error stops the replica: either nothing was switched, or all of it was and the next start goes on from there.
    pub fn switch(mut self) -> Result<(), StoreError> {
        let (store, replica) = (Arc::clone(&self.store), self.rows.replica());
        let before = self.rows.generation();
        {
            let mut cycle = store.cycle.lock().expect("no panic under this lock");
            cycle.usable()?;
            if cycle.is_finished() {
                // No redo file may outlive the head that makes it obsolete. One of an unfinished cycle began after the hold.
                clear_redo(&*store.disk, &store.redo_path)?;
            }
            let head = Head { dropped: false, generation: self.generation, seal: Some(self.seal.clone()) };
            (self.is_tried, self.got.is_kept) = (true, true);
            let switched = self.rows.switch(self.generation, &self.seal, || write_head(&*store.engine, replica, &head));
            if let Err(error) = switched {
                store.suspect(&error);
                return Err(cycle.fail(&error));
            }
        }
        store.orphaned(replica, before, before + 1);
        base::publish(&*store.disk, &self.got.path, &store.base_path(replica, "base"))?;
        let bytes = store.open_base(&self.rows)?.map_or(0, |base| base.bytes());
        let base = Base { mark: self.seal.mark.clone(), bytes, since: store.clock.now(), damaged: false };
        self.rows.set_base(Some(base));
        Ok(())
    }
}

impl Drop for Staged {
    fn drop(&mut self) {
        if !self.is_tried {
            self.store.orphaned(self.rows.replica(), self.generation, self.generation + 1);
        }
    }
}

/// Writes the record that switches. A sled that refuses it is opened again and asked again; a sync that fails is final.
pub(super) fn write_head(engine: &dyn Engine, replica: u64, head: &Head) -> Result<(), StoreError> {
    let mut tries = 0;
    let put: [Op; 1] = [head.put(replica)];
    while let Err(error) = engine.batch(&put).and_then(|()| engine.hand_over()) {
        tries += 1;
        if tries == SWITCHES_MAX {
            return Err(error.into());
        }
        tracing::warn!(%error, replica, "sled refused a record; it is opened again and asked again");
        thread::sleep(PAUSE);
        engine.reopen()?;
    }
    Ok(engine.make_durable()?)
}

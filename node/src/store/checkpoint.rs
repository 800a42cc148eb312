//! The checkpoint: what the memtables hold goes to sled, for all due shards in one cycle, wholly or not at all.
//!
//! 1. The memtables of the shards that are due are frozen.
//! 2. Their physical changes go to the redo file; it and its name are synced.
//! 3. The changes go to sled in small batches, each shard's head last.
//! 4. sled is made durable.
//! 5. The redo file goes.
//! 6. The frozen levels are dropped, and the log may be purged to the new index.
//!
//! Until 2 is done an error only puts the frozen levels back. From 3 on the redo file makes up for whatever sled did: one that
//! refuses a batch is opened again and the file applied again, and if it still refuses (a full disk, for one) the next cycle goes
//! on from there, until it ends; reads see the frozen levels meanwhile. After a failed sync of sled's file nothing is retried:
//! pages that the kernel dropped would pass for written. The store is broken then, the process must stop, and the next start
//! makes sled anew from bases and log ([`super::rebuild`]).
//!
//! A read that sled failed is noted by whoever read; the next cycle opens sled again before anything else.
//!
//! The pace: a cycle that took a while is followed by nine times that of rest, so that checkpoints have at most a tenth of the
//! disk's time; only a full memory and an explicit wish do not wait.

use std::{
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};

use super::{
    Pressure, Store, StoreError,
    head::{Head, Seal},
    memtable::Frozen,
    redo::{self, Redo, RedoWriter, Section},
    shard::ShardStore,
};
use crate::{bug::Bug, disk::Disk};

/// Rest after a cycle, as a multiple of what it took.
const REST: u32 = 9;

/// Which shards a checkpoint takes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Which {
    /// Those that are due by age or bytes (all, when memory is short), if the disk has rested enough.
    Due,
    /// These replicas, now.
    Replicas(Vec<u64>),
    /// All, now.
    All,
}

/// What a checkpoint cycle did.
#[derive(Debug, Default)]
pub struct Checkpointed {
    /// Per replica, what sled now holds durably. To be noted in the log as well: at the next open both must agree.
    pub seals: Vec<(u64, Seal)>,
    /// Physical operations written to sled.
    pub operations: u64,
    /// Replicas that were left out because their rows in sled are damaged; they must stop.
    pub damaged: Vec<(u64, StoreError)>,
}

/// What outlives a cycle.
#[derive(Debug, Default)]
pub(super) struct Cycle {
    /// Why no cycle may run any more.
    pub(super) broken: Option<String>,
    /// A cycle whose changes sled did not take: they are in the redo file and in the frozen levels.
    unfinished: Option<Unfinished>,
    rest_until: Option<Instant>,
    /// Leaves out the redo file, to show that the comparison in the crash tests finds it missing.
    #[cfg(test)]
    pub(super) without_redo: bool,
}

impl Cycle {
    pub(super) fn usable(&self) -> Result<(), StoreError> {
        self.broken.clone().map_or(Ok(()), |why| Err(StoreError::Broken(why)))
    }

    /// Whether no cycle waits for sled to take its changes.
    pub(super) fn is_finished(&self) -> bool {
        self.unfinished.is_none()
    }

    /// Marks the store as broken by `error`.
    pub(super) fn fail(&mut self, error: &StoreError) -> StoreError {
        let why = error.to_string();
        tracing::error!(error = why, "the store is broken until it is opened anew");
        self.broken = Some(why.clone());
        StoreError::Broken(why)
    }
}

#[derive(Debug)]
struct Unfinished {
    redo: Redo,
    moving: Vec<Moving>,
}

#[derive(Debug)]
struct Moving {
    shard: Arc<ShardStore>,
    frozen: Arc<Frozen>,
    base: Option<u64>,
    /// Per change, how many parts of an older value it replaces.
    replaced: Vec<usize>,
}

impl Store {
    /// Runs one checkpoint cycle; blocks on the disk. With [`Which::Due`] it is cheap when nothing is due: call it often.
    pub fn checkpoint(&self, which: Which) -> Result<Checkpointed, StoreError> {
        let mut cycle = self.cycle.lock().expect("no panic under this lock");
        cycle.usable()?;
        if let Some(done) = self.go_on(&mut cycle)? {
            return Ok(done);
        }
        if self.budget.take_failed_read() {
            let failed = StoreError::Engine {
                doing: "read from",
                path: self.engine.path().to_owned(),
                what: "a read failed before; it is opened again".into(),
                damaged: false,
            };
            if let error @ StoreError::Broken(_) = self.mend(&mut cycle, failed) {
                return Err(error);
            }
        }
        let begun = self.clock.now();
        let due = self.due(&which, &cycle, begun);
        if due.is_empty() {
            return Ok(Checkpointed::default());
        }
        clear_redo(&*self.disk, &self.redo_path)?;
        let result = self.run(&mut cycle, due);
        let ended = self.clock.now();
        cycle.rest_until = ended.checked_add(ended.duration_since(begun).saturating_mul(REST));
        result
    }

    fn due(&self, which: &Which, cycle: &Cycle, now: Instant) -> Vec<Arc<ShardStore>> {
        let shards = self.shards.lock().expect("no panic under this lock");
        let pressure = self.pressure();
        let resting = pressure < Pressure::Full && cycle.rest_until.is_some_and(|until| now < until);
        let age = if pressure == Pressure::None { self.config.checkpoint_age } else { Duration::ZERO };
        let is_due = |shard: &ShardStore| match which {
            Which::Due => !resting && shard.due(now, age, self.config.checkpoint_bytes),
            Which::Replicas(replicas) => replicas.contains(&shard.replica()),
            Which::All => true,
        };
        shards.values().filter(|shard| !shard.is_held() && is_due(shard)).cloned().collect()
    }

    fn run(&self, cycle: &mut Cycle, due: Vec<Arc<ShardStore>>) -> Result<Checkpointed, StoreError> {
        let mut done = Checkpointed::default();
        let mut moving = Vec::new();
        for shard in due {
            let Some((frozen, base)) = shard.freeze() else { continue };
            match replaced(&shard, &frozen) {
                Ok(replaced) => moving.push(Moving { shard, frozen, base, replaced }),
                Err(error) => {
                    shard.thaw();
                    if !matches!(error, StoreError::Damaged { .. }) {
                        thaw(&moving);
                        return Err(self.mend(cycle, error));
                    }
                    done.damaged.push((shard.replica(), error));
                }
            }
        }
        if moving.is_empty() {
            return Ok(done);
        }
        let redo = match self.write_redo(&moving) {
            Ok(redo) => redo,
            Err(error) => {
                thaw(&moving);
                // A torn one would be dropped at the next open anyway; it only takes room.
                let _ = clear_redo(&*self.disk, &self.redo_path);
                return Err(error);
            }
        };
        if Bug::CheckpointWithoutRedo.is_in() {
            clear_redo(&*self.disk, &self.redo_path)?;
        }
        #[cfg(test)]
        if cycle.without_redo {
            clear_redo(&*self.disk, &self.redo_path)?;
        }
        let moved = self.move_down(&redo);
        let landed = self.land(cycle, Unfinished { redo, moving }, moved)?;
        Ok(Checkpointed { damaged: done.damaged, ..landed })
    }

    /// Goes on with the cycle that sled did not let end, if there is one; nothing else may touch the redo file before.
    pub(super) fn go_on(&self, cycle: &mut Cycle) -> Result<Option<Checkpointed>, StoreError> {
        let Some(unfinished) = cycle.unfinished.take() else { return Ok(None) };
        let moved = self.move_again(&unfinished.redo);
        self.land(cycle, unfinished, moved).map(Some)
    }

    /// The rest of a cycle whose changes sled took, or not.
    fn land(
        &self,
        cycle: &mut Cycle,
        unfinished: Unfinished,
        moved: Result<u64, StoreError>,
    ) -> Result<Checkpointed, StoreError> {
        let operations = match moved {
            Ok(operations) => operations,
            Err(error @ StoreError::Engine { .. }) => {
                cycle.unfinished = Some(unfinished);
                return Err(error);
            }
            Err(error) => return Err(cycle.fail(&error)),
        };
        self.engine.make_durable().map_err(|error| {
            let error = error.into();
            self.suspect(&error);
            cycle.fail(&error)
        })?;
        let mut done = Checkpointed { operations, ..Checkpointed::default() };
        if let Err(error) = clear_redo(&*self.disk, &self.redo_path) {
            // It only repeats what sled holds; the next cycle begins with removing it.
            tracing::warn!(%error, "a redo file that was done with stays");
        }
        for Moving { shard, frozen, .. } in unfinished.moving {
            shard.moved(&frozen.seal);
            done.seals.push((shard.replica(), frozen.seal.clone()));
        }
        Ok(done)
    }

    fn write_redo(&self, moving: &[Moving]) -> Result<Redo, StoreError> {
        let mut writer = RedoWriter::create(&*self.disk, &self.redo_path)?;
        for Moving { shard, frozen, base, replaced } in moving {
            let region = shard.region();
            let (replica, generation) = (region.replica, region.generation);
            writer.section(&Section { replica, generation, base: *base, seal: frozen.seal.clone() })?;
            let mut written = Ok(());
            let mut op = |op| {
                if written.is_ok() {
                    written = writer.op(&op);
                }
            };
            for ((key, value, _), replaced) in frozen.level.changes().zip(replaced) {
                match value {
                    Some(value) => region.put(key, value, *replaced, &mut op),
                    None => region.remove(key, *replaced, &mut op),
                }
            }
            op(Head { dropped: false, generation, seal: Some(frozen.seal.clone()) }.put(replica));
            written?;
        }
        writer.finish(&*self.disk)
    }

    fn move_down(&self, redo: &Redo) -> Result<u64, StoreError> {
        let engine = &*self.engine;
        let taken = redo.apply(&self.redo_path, engine, |_| Ok(true));
        taken.and_then(|operations| Ok(engine.hand_over().map(|()| operations)?)).or_else(|error| {
            tracing::warn!(%error, "sled refused a batch; it is opened again and the redo file applied again");
            self.move_again(redo)
        })
    }

    /// Opens sled again and applies the redo file from its beginning.
    fn move_again(&self, redo: &Redo) -> Result<u64, StoreError> {
        let engine = &*self.engine;
        engine.reopen()?;
        let operations = redo.apply(&self.redo_path, engine, |section| {
            let head = Head::read(engine, section.replica)?;
            let lost = || StoreError::Broken(format!("replica {}: sled lost its checkpoint", section.replica));
            if redo::is_current(section, head.as_ref()) { Ok(true) } else { Err(lost()) }
        })?;
        engine.hand_over()?;
        Ok(operations)
    }

    /// After an error of sled outside of a move: opens it again, and breaks the store if a checkpoint is no longer there. One that
    /// cannot be opened now is tried again by the next cycle.
    pub(super) fn mend(&self, cycle: &mut Cycle, error: StoreError) -> StoreError {
        if let Err(worse) = self.engine.reopen() {
            self.budget.read_failed();
            return worse.into();
        }
        let mended: Result<(), StoreError> = (|| {
            let shards = self.shards.lock().expect("no panic under this lock");
            for shard in shards.values() {
                let head = Head::read(&*self.engine, shard.replica())?;
                if head.and_then(|head| head.seal).map(|seal| seal.mark.index) != shard.checkpointed() {
                    return Err(StoreError::Broken(format!("replica {}: sled lost its checkpoint", shard.replica())));
                }
            }
            Ok(())
        })();
        match mended {
            Ok(()) => error,
            Err(worse) => cycle.fail(&worse),
        }
    }
}

/// Removes the redo file, if there is one, durably.
pub(super) fn clear_redo(disk: &dyn Disk, path: &Path) -> Result<(), StoreError> {
    match disk.remove(path) {
        Ok(()) => (),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        Err(e) => return Err(redo::failed("remove", path, e)),
    }
    let dir = path.parent().expect("the redo file lies in the store's directory");
    disk.sync_dir(dir).map_err(|e| redo::failed("sync", dir, e))
}

fn replaced(shard: &ShardStore, frozen: &Frozen) -> Result<Vec<usize>, StoreError> {
    let region = shard.region();
    frozen.level.changes().map(|(key, _, below)| if below { region.part_count(key) } else { Ok(0) }).collect()
}

fn thaw(moving: &[Moving]) {
    for Moving { shard, .. } in moving {
        shard.thaw();
    }
}

//! Rows that no replica will read again, and their removal in small batches.
//!
//! A replica is dropped by marking its head, durably; then its rows go, then its head. So a crash in between leaves a head that
//! says what is to be done. Rows of a generation that a head does not name are the rest of a snapshot that was replaced, or of
//! one whose installing did not end. Rows of a replica *without* a head are none of these: sled lost the head, they are left for
//! the one who repairs.

use super::{
    Store, StoreError, base,
    checkpoint::clear_redo,
    engine::{BATCH_MAX, Engine, Op},
    head::Head,
    row,
};

/// Batches that one call of [`Store::sweep`] removes at most.
const SWEEP_BATCHES: usize = 8;

/// Physical keys to be removed.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Orphan {
    from: Vec<u8>,
    to: Vec<u8>,
    /// The replica whose head goes after them.
    dropped: Option<u64>,
}

impl Orphan {
    /// The rows of a replica under these generations, the second not included.
    pub(super) fn generations(replica: u64, from: u32, to: u32) -> Self {
        Self { from: row::generation_start(replica, from), to: row::generation_start(replica, to), dropped: None }
    }
}

/// The last generation of a replica that anything stands under; 0 when there is at most a head.
pub(super) fn last_generation(engine: &dyn Engine, replica: u64) -> Result<u32, StoreError> {
    let last = engine.scan_back(&row::generation_start(replica, 0), &row::replica_end(replica), 1)?;
    Ok(last.first().and_then(|(key, _)| row::generation_of(key)).unwrap_or(0))
}

/// What the engine holds, by its heads.
#[derive(Debug, Default)]
pub(super) struct Inventory {
    /// Replicas with a live head.
    pub(super) replicas: Vec<u64>,
    pub(super) orphans: Vec<Orphan>,
}

/// Looks at the head of every replica in the engine.
pub(super) fn inventory(engine: &dyn Engine) -> Result<Inventory, StoreError> {
    let mut found = Inventory::default();
    let mut from = Vec::new();
    loop {
        let first = engine.scan(&from, &[0xff; 16], 1)?;
        let Some(replica) = first.first().and_then(|(key, _)| row::replica_of(key)) else { return Ok(found) };
        from = row::replica_end(replica);
        let head = match Head::read(engine, replica) {
            Ok(Some(head)) => head,
            // Said when that replica is opened.
            Ok(None) | Err(StoreError::Damaged { .. }) => continue,
            Err(error) => return Err(error),
        };
        if head.dropped {
            found.orphans.push(rows_of(replica));
            continue;
        }
        found.replicas.push(replica);
        let generation = head.generation;
        let before = (row::generation_start(replica, 1), row::generation_start(replica, generation));
        // Not what is staged from now on: that goes under generations above these.
        let last = last_generation(engine, replica)?;
        let after = (last > generation).then(|| {
            (row::generation_start(replica, generation + 1), row::generation_start(replica, last.saturating_add(1)))
        });
        for (from, to) in std::iter::once(before).chain(after) {
            if !engine.scan(&from, &to, 1)?.is_empty() {
                found.orphans.push(Orphan { from, to, dropped: None });
            }
        }
    }
}

fn rows_of(replica: u64) -> Orphan {
    Orphan { from: row::generation_start(replica, 1), to: row::replica_end(replica), dropped: Some(replica) }
}

impl Store {
    /// Forgets a replica for ever; its id must never come back. Returns when that is durable; its rows go with later calls of
    /// [`Store::sweep`]. Holders of its [`ShardStore`](super::ShardStore) get errors from now on.
    pub fn drop_replica(&self, replica: u64) -> Result<(), StoreError> {
        let mut cycle = self.cycle.lock().expect("no panic under this lock");
        cycle.usable()?;
        self.go_on(&mut cycle)?;
        // No redo file may outlive the head that makes it obsolete.
        clear_redo(&*self.disk, &self.redo_path)?;
        let mut orphans = self.orphans.lock().expect("no panic under this lock");
        // Held until the head says it, so that nobody opens the replica meanwhile.
        let mut shards = self.shards.lock().expect("no panic under this lock");
        if let Some(shard) = shards.remove(&replica) {
            shard.abandon();
        }
        let head = Head { dropped: true, generation: 1, seal: None };
        let written = self.engine.batch(&[head.put(replica)]).and_then(|()| self.engine.make_durable());
        written.map_err(|error| cycle.fail(&error.into()))?;
        for kind in ["base", "new", "got"] {
            // They only take room, and are never read again.
            if let Err(error) = base::remove(&*self.disk, &self.base_path(replica, kind)) {
                tracing::warn!(%error, replica, "a file of a replica that was dropped stays");
            }
        }
        orphans.push(rows_of(replica));
        Ok(())
    }

    /// Removes some of the rows that no replica reads any more; blocks on the disk, briefly. True: there are more.
    pub fn sweep(&self) -> Result<bool, StoreError> {
        let mut cycle = self.cycle.lock().expect("no panic under this lock");
        cycle.usable()?;
        self.go_on(&mut cycle)?;
        let mut orphans = self.orphans.lock().expect("no panic under this lock");
        for _ in 0..SWEEP_BATCHES {
            let Some(orphan) = orphans.last() else { return Ok(false) };
            match self.sweep_batch(orphan) {
                Ok(true) => (),
                Ok(false) => drop(orphans.pop()),
                Err(error) => return Err(self.mend(&mut cycle, error)),
            }
        }
        Ok(!orphans.is_empty())
    }

    /// Removes one batch; false when nothing is left.
    fn sweep_batch(&self, orphan: &Orphan) -> Result<bool, StoreError> {
        let rows = self.engine.scan(&orphan.from, &orphan.to, BATCH_MAX)?;
        if !rows.is_empty() {
            let removals: Vec<_> = rows.into_iter().map(|(key, _)| Op::Remove(key)).collect();
            self.engine.batch(&removals)?;
            return Ok(true);
        }
        if let Some(replica) = orphan.dropped {
            // The head says that rows may be left: it goes only after they are gone from the disk.
            self.engine.make_durable()?;
            self.engine.batch(&[Head::remove(replica)])?;
            self.engine.make_durable()?;
        }
        Ok(false)
    }
}

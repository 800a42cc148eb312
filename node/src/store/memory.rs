//! An engine in memory that can crash and fail, for tests.
//!
//! [`MemoryEngine::crash`] forgets what was not made durable, or keeps some of the batches, as a disk may. A [`Fuse`] that it
//! shares with a disk of the test counts their steps and stops both at one of them.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
};

use bytes::Bytes;

use super::engine::{BATCH_MAX, Engine, EngineError, Op, PhysicalRows};

/// Counts steps that change something durable, and fails them all from a given one on.
#[derive(Debug, Clone)]
pub struct Fuse(Arc<AtomicU64>);

impl Default for Fuse {
    fn default() -> Self {
        Self(Arc::new(AtomicU64::new(u64::MAX)))
    }
}

impl Fuse {
    /// Lets `steps` more steps succeed and no further one.
    pub fn burn_after(&self, steps: u64) {
        self.0.store(steps, Ordering::SeqCst);
    }

    /// Lets every step succeed again.
    pub fn repair(&self) {
        self.burn_after(u64::MAX);
    }

    /// Whether a step was refused, or the next one would be.
    pub fn burnt(&self) -> bool {
        self.0.load(Ordering::SeqCst) == 0
    }

    /// Takes one step; false when the fuse is burnt.
    pub fn step(&self) -> bool {
        self.0
            .fetch_update(Ordering::SeqCst, Ordering::SeqCst, |left| match left {
                0 => None,
                u64::MAX => Some(u64::MAX),
                left => Some(left - 1),
            })
            .is_ok()
    }
}

#[derive(Debug, Default)]
struct Inner {
    live: BTreeMap<Bytes, Bytes>,
    durable: BTreeMap<Bytes, Bytes>,
    batches: Vec<Vec<Op>>,
}

/// An ordered map in memory.
#[derive(Debug)]
pub struct MemoryEngine {
    inner: Mutex<Inner>,
    fuse: Fuse,
    refuse: AtomicBool,
    path: PathBuf,
}

impl Default for MemoryEngine {
    fn default() -> Self {
        Self::new(Fuse::default())
    }
}

impl MemoryEngine {
    /// An empty one that fails when `fuse` does.
    pub fn new(fuse: Fuse) -> Self {
        Self { inner: Mutex::default(), fuse, refuse: AtomicBool::new(false), path: PathBuf::from("memory") }
    }

    /// Loses what was not made durable, except the first `keep` batches since.
    pub fn crash(&self, keep: usize) {
        let mut inner = self.lock();
        let Inner { live, durable, batches } = &mut *inner;
        for op in batches.drain(..).take(keep).flatten() {
            change(durable, op);
        }
        live.clone_from(durable);
    }

    /// Refuses the next batch, once, and forgets what is not durable when it is opened again.
    pub fn refuse_once(&self) {
        self.refuse.store(true, Ordering::SeqCst);
    }

    /// Batches that a crash may lose.
    pub fn batches_not_durable(&self) -> usize {
        self.lock().batches.len()
    }

    /// All physical rows, as reads see them.
    pub fn rows(&self) -> PhysicalRows {
        self.lock().live.iter().map(|(k, v)| (k.clone(), v.clone())).collect()
    }

    /// Sets or removes a physical row behind the store's back, durably.
    pub fn tamper(&self, key: &[u8], value: Option<Bytes>) {
        let op = match value {
            Some(value) => Op::Put(Bytes::copy_from_slice(key), value),
            None => Op::Remove(Bytes::copy_from_slice(key)),
        };
        let mut inner = self.lock();
        change(&mut inner.durable, op.clone());
        change(&mut inner.live, op);
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Inner> {
        self.inner.lock().expect("no panic under this lock")
    }

    fn step(&self, doing: &'static str) -> Result<(), EngineError> {
        if self.fuse.step() {
            Ok(())
        } else {
            Err(EngineError { doing, path: self.path.clone(), what: "the fuse is burnt".into(), damaged: false })
        }
    }
}

fn change(rows: &mut BTreeMap<Bytes, Bytes>, op: Op) {
    match op {
        Op::Put(key, value) => drop(rows.insert(key, value)),
        Op::Remove(key) => drop(rows.remove(&key)),
    }
}

impl Engine for MemoryEngine {
    fn path(&self) -> &Path {
        &self.path
    }

    fn get(&self, key: &[u8]) -> Result<Option<Bytes>, EngineError> {
        Ok(self.lock().live.get(key).cloned())
    }

    fn scan(&self, from: &[u8], to: &[u8], limit: usize) -> Result<PhysicalRows, EngineError> {
        if from >= to {
            return Ok(Vec::new());
        }
        let inner = self.lock();
        Ok(inner.live.range::<[u8], _>(super::memtable::between(from, to)).take(limit).map(cloned).collect())
    }

    fn scan_back(&self, from: &[u8], to: &[u8], limit: usize) -> Result<PhysicalRows, EngineError> {
        if from >= to {
            return Ok(Vec::new());
        }
        let inner = self.lock();
        Ok(inner.live.range::<[u8], _>(super::memtable::between(from, to)).rev().take(limit).map(cloned).collect())
    }

    fn batch(&self, ops: &[Op]) -> Result<(), EngineError> {
        assert!(ops.len() <= BATCH_MAX, "a batch of {} operations", ops.len());
        self.step("write a batch to")?;
        if self.refuse.swap(false, Ordering::SeqCst) {
            return Err(EngineError {
                doing: "write a batch to",
                path: self.path.clone(),
                what: "refused once".into(),
                damaged: false,
            });
        }
        let mut inner = self.lock();
        inner.batches.push(ops.to_vec());
        for op in ops {
            change(&mut inner.live, op.clone());
        }
        Ok(())
    }

    fn make_durable(&self) -> Result<(), EngineError> {
        self.step("make durable")?;
        let mut inner = self.lock();
        inner.durable = inner.live.clone();
        inner.batches.clear();
        Ok(())
    }

    fn reopen(&self) -> Result<(), EngineError> {
        self.step("reopen")?;
        self.crash(0);
        Ok(())
    }
}

fn cloned((key, value): (&Bytes, &Bytes)) -> (Bytes, Bytes) {
    (key.clone(), value.clone())
}

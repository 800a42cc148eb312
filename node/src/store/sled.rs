//! The engine of a real node: sled, one database per node.
//!
//! sled is not trusted. Its `flush` is not a sync (it only asks the kernel to begin writing): [`SledEngine::make_durable`] syncs
//! sled's own file after it. Its cache capacity is not a hard bound. Records over a quarter of a segment go to files that sled
//! never syncs, so one of those is an error here; `row` keeps physical values small enough that a full leaf stays below.

use std::{
    fs::{self, File},
    io,
    panic::{AssertUnwindSafe, catch_unwind},
    path::{Path, PathBuf},
    sync::RwLock,
    thread,
    time::Duration,
};

use bytes::Bytes;

use super::engine::{BATCH_MAX, Engine, EngineError, Op, PhysicalRows};
use crate::panicked;

/// sled in a directory of its own.
#[derive(Debug)]
pub struct SledEngine {
    dir: PathBuf,
    cache_bytes: u64,
    /// `None` only after a reopening that failed.
    db: RwLock<Option<::sled::Db>>,
}

impl SledEngine {
    /// Opens or creates the database in `dir`, with a page cache of about `cache_bytes`.
    pub fn open(dir: &Path, cache_bytes: u64) -> Result<Self, EngineError> {
        let db = open(dir, cache_bytes)?;
        let engine = Self { dir: dir.to_owned(), cache_bytes, db: RwLock::new(Some(db)) };
        engine.refuse_blobs()?;
        // The names of `db` and `conf` themselves; later growth needs no directory.
        sync_dir(dir).and_then(|()| dir.parent().map_or(Ok(()), sync_dir)).map_err(|e| engine.error("sync", e))?;
        Ok(engine)
    }

    fn with<T>(
        &self,
        doing: &'static str,
        act: impl FnOnce(&::sled::Db) -> Result<T, ::sled::Error>,
    ) -> Result<T, EngineError> {
        let db = self.db.read().expect("no panic under this lock");
        let db = db.as_ref().ok_or_else(|| self.error(doing, "it could not be opened again"))?;
        // On bytes that it does not expect sled may panic instead of saying so.
        match catch_unwind(AssertUnwindSafe(|| act(db))) {
            Ok(acted) => acted.map_err(|e| EngineError { damaged: is_damage(&e), ..self.error(doing, e) }),
            Err(panic) => Err(EngineError {
                damaged: true,
                ..self.error(doing, format!("panicked: {}", panicked::said(&*panic)))
            }),
        }
    }

    fn error(&self, doing: &'static str, what: impl ToString) -> EngineError {
        EngineError { doing, path: self.dir.clone(), what: what.to_string(), damaged: false }
    }

    fn refuse_blobs(&self) -> Result<(), EngineError> {
        let blobs = self.dir.join("blobs");
        let failed =
            |e: io::Error| EngineError { doing: "list", path: blobs.clone(), what: e.to_string(), damaged: false };
        let Some(entry) = fs::read_dir(&blobs).map_err(failed)?.next() else { return Ok(()) };
        let path = entry.map_err(failed)?.path();
        Err(EngineError { doing: "accept", path, what: "sled never syncs such files".into(), damaged: false })
    }
}

/// Tries to open it while its file is still locked, and the pause between two. The last handle of one that was closed is let go of
/// by a thread of sled's own, a moment later; another process is kept out by the lock of the data directory.
const TRIES_MAX: u32 = 40;
const TRY_PAUSE: Duration = Duration::from_millis(50);

fn open(dir: &Path, cache_bytes: u64) -> Result<::sled::Db, EngineError> {
    for _ in 1..TRIES_MAX {
        match open_once(dir, cache_bytes) {
            Err(error) if error.what.contains("could not acquire lock") => thread::sleep(TRY_PAUSE),
            opened => return opened,
        }
    }
    open_once(dir, cache_bytes)
}

fn open_once(dir: &Path, cache_bytes: u64) -> Result<::sled::Db, EngineError> {
    // No flusher thread: durability is asked for, and background writes would only compete with the log.
    let config = ::sled::Config::new().path(dir).cache_capacity(cache_bytes).flush_every_ms(None);
    let failed = |what: String, damaged| EngineError { doing: "open", path: dir.to_owned(), what, damaged };
    match catch_unwind(AssertUnwindSafe(|| config.open())) {
        Ok(opened) => opened.map_err(|e| failed(e.to_string(), is_damage(&e))),
        Err(panic) => Err(failed(format!("panicked: {}", panicked::said(&*panic)), true)),
    }
}

/// Whether sled says that its file is not what it wrote; a full disk, a lock or a right that is missing are not that.
fn is_damage(error: &::sled::Error) -> bool {
    match error {
        ::sled::Error::Corruption { .. } | ::sled::Error::ReportableBug(_) => true,
        ::sled::Error::Io(e) => matches!(e.kind(), io::ErrorKind::InvalidData | io::ErrorKind::UnexpectedEof),
        ::sled::Error::CollectionNotFound(_) | ::sled::Error::Unsupported(_) => false,
    }
}

fn sync_dir(dir: &Path) -> io::Result<()> {
    File::open(dir)?.sync_all()
}

fn owned(row: Result<(::sled::IVec, ::sled::IVec), ::sled::Error>) -> Result<(Bytes, Bytes), ::sled::Error> {
    row.map(|(key, value)| (Bytes::copy_from_slice(&key), Bytes::copy_from_slice(&value)))
}

impl Engine for SledEngine {
    fn path(&self) -> &Path {
        &self.dir
    }

    fn get(&self, key: &[u8]) -> Result<Option<Bytes>, EngineError> {
        self.with("read", |db| Ok(db.get(key)?.map(|value| Bytes::copy_from_slice(&value))))
    }

    fn scan(&self, from: &[u8], to: &[u8], limit: usize) -> Result<PhysicalRows, EngineError> {
        if from >= to {
            return Ok(Vec::new());
        }
        self.with("scan", |db| db.range(from..to).take(limit).map(owned).collect())
    }

    fn scan_back(&self, from: &[u8], to: &[u8], limit: usize) -> Result<PhysicalRows, EngineError> {
        if from >= to {
            return Ok(Vec::new());
        }
        self.with("scan", |db| db.range(from..to).rev().take(limit).map(owned).collect())
    }

    fn batch(&self, ops: &[Op]) -> Result<(), EngineError> {
        assert!(ops.len() <= BATCH_MAX, "sled leaks beyond {BATCH_MAX} operations in a batch");
        let mut batch = ::sled::Batch::default();
        for op in ops {
            match op {
                Op::Put(key, value) => batch.insert(&key[..], &value[..]),
                Op::Remove(key) => batch.remove(&key[..]),
            }
        }
        self.with("write a batch to", |db| db.apply_batch(batch))
    }

    fn hand_over(&self) -> Result<(), EngineError> {
        self.with("flush", |db| db.flush().map(drop))
    }

    fn make_durable(&self) -> Result<(), EngineError> {
        self.with("flush", |db| db.flush().map(drop))?;
        let path = self.dir.join("db");
        let synced = File::open(&path).and_then(|file| file.sync_data());
        synced.map_err(|e| EngineError { doing: "sync", path, what: e.to_string(), damaged: false })?;
        self.refuse_blobs()
    }

    fn reopen(&self) -> Result<(), EngineError> {
        let mut db = self.db.write().expect("no panic under this lock");
        // The old one holds a lock on its file until it is dropped.
        *db = None;
        *db = Some(open(&self.dir, self.cache_bytes)?);
        Ok(())
    }
}

//! The real sled on a real disk, and processes that are killed: what a copy of the directory holds while sled is open.

use std::fs;

use tempfile::TempDir;

use super::*;
use crate::{
    disk::RealDisk,
    store::{
        LogReach, Which,
        engine::{Engine, EngineError, Op, PhysicalRows},
        sled::SledEngine,
    },
};

/// sled, until the fuse burns.
#[derive(Debug)]
struct Fused(SledEngine, Fuse);

impl Fused {
    fn step(&self) -> Result<(), EngineError> {
        let what = "the fuse is burnt".into();
        let burnt = || EngineError { doing: "reach", path: self.path().into(), what, damaged: false };
        if self.1.step() { Ok(()) } else { Err(burnt()) }
    }
}

impl Engine for Fused {
    fn path(&self) -> &Path {
        self.0.path()
    }

    fn get(&self, key: &[u8]) -> Result<Option<Bytes>, EngineError> {
        self.0.get(key)
    }

    fn scan(&self, from: &[u8], to: &[u8], limit: usize) -> Result<PhysicalRows, EngineError> {
        self.0.scan(from, to, limit)
    }

    fn scan_back(&self, from: &[u8], to: &[u8], limit: usize) -> Result<PhysicalRows, EngineError> {
        self.0.scan_back(from, to, limit)
    }

    fn batch(&self, ops: &[Op]) -> Result<(), EngineError> {
        self.step().and_then(|()| self.0.batch(ops))
    }

    fn make_durable(&self) -> Result<(), EngineError> {
        self.step().and_then(|()| self.0.make_durable())
    }

    fn reopen(&self) -> Result<(), EngineError> {
        self.step().and_then(|()| self.0.reopen())
    }
}

fn open(dir: &Path) -> Result<Store, StoreError> {
    let config = StoreConfig { dir: dir.into(), cache_bytes: 8 << 20, ..StoreConfig::default() };
    Store::open(config, Arc::new(RealDisk), Arc::new(SystemClock))
}

fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let to = to.join(entry.file_name());
        if entry.file_type().unwrap().is_dir() {
            copy(&entry.path(), &to)
        } else {
            fs::copy(entry.path(), to).map(drop).unwrap()
        }
    }
}

#[test]
fn rows_survive_a_restart_and_a_kill_and_scans_go_both_ways() {
    let (dir, killed) = (TempDir::new().unwrap(), TempDir::new().unwrap());
    let entries = script(1, 300);
    let store = open(dir.path()).unwrap();
    let shard = store.shard(1).unwrap();
    replay(&shard, &entries, 200).unwrap();
    store.checkpoint(Which::All).unwrap();
    replay(&shard, &entries, 300).unwrap();
    copy(dir.path(), killed.path());
    let mut back = shard.scan_back(b"", b"\xff", usize::MAX).unwrap();
    back.reverse();
    assert_eq!(back, rows(&shard));
    drop((shard, store));
    for dir in [&dir, &killed] {
        let store = open(dir.path()).unwrap();
        assert_eq!(store.replicas(), [1]);
        let shard = store.shard(1).unwrap();
        assert_eq!(shard.checkpointed(), Some(199));
        assert_eq!(differs(&shard, &entries, 200), None);
        replay(&shard, &entries, 300).unwrap();
        assert_eq!(differs(&shard, &entries, 300), None);
    }
}

#[test]
fn promise_4_a_kill_after_any_step_on_sled_leaves_one_log_index() {
    let entries = script(1, 120);
    for step in 0.. {
        let (dir, killed) = (TempDir::new().unwrap(), TempDir::new().unwrap());
        let fuse = Fuse::default();
        let engine = Fused(SledEngine::open(&dir.path().join("sled"), 8 << 20).unwrap(), fuse.clone());
        let config = StoreConfig { dir: dir.path().into(), ..StoreConfig::default() };
        let store = Store::open_with(config, Arc::new(RealDisk), Arc::new(SystemClock), Arc::new(engine)).unwrap();
        let shard = store.shard(1).unwrap();
        replay(&shard, &entries, 40).unwrap();
        store.checkpoint(Which::All).unwrap();
        replay(&shard, &entries, 120).unwrap();
        fuse.burn_after(step);
        let ended = store.checkpoint(Which::All).is_ok();
        copy(dir.path(), killed.path());
        // Left by what the process did after the step; it was killed there.
        let _ = fs::remove_file(killed.path().join("suspect"));
        let store = open(killed.path()).unwrap();
        let shard = store.shard(1).unwrap();
        assert_eq!(shard.checkpointed(), Some(119), "the redo file was complete before sled was touched");
        assert_eq!(differs(&shard, &entries, 120), None, "killed after step {step}");
        if ended {
            assert!(step > 2, "only {step} steps");
            break;
        }
    }
}

#[test]
fn sled_writes_no_file_of_its_own_for_full_leaves_and_large_values() {
    let dir = TempDir::new().unwrap();
    let store = open(dir.path()).unwrap();
    let shard = store.shard(1).unwrap();
    let mut rng = StdRng::seed_from_u64(9);
    for index in 0..8 {
        let writes: BTreeMap<u16, Write> = (0..60)
            .map(|_| {
                let name: u16 = rng.random();
                let len = if name.is_multiple_of(16) { 100_000 } else { 6 * 1024 };
                let key = Bytes::from([&name.to_be_bytes()[..], &[b'k'; 300]].concat());
                (name, Write::Put { key, value: vec![index as u8; len].into(), fresh: false })
            })
            .collect();
        shard.commit(mark(index), writes.into_values().collect()).unwrap();
        // Fails if there is a file under `blobs`.
        store.checkpoint(Which::All).unwrap();
    }
    let before = rows(&shard);
    drop((shard, store));
    assert_eq!(rows(&open(dir.path()).unwrap().shard(1).unwrap()), before);
}

#[test]
fn promise_5_a_file_that_sled_never_syncs_is_an_error() {
    let dir = TempDir::new().unwrap();
    drop(open(dir.path()).unwrap());
    let engine = SledEngine::open(&dir.path().join("sled"), 1 << 20).unwrap();
    fs::write(dir.path().join("sled/blobs/77"), b"x").unwrap();
    let error = engine.make_durable().unwrap_err();
    assert!(error.path.ends_with("blobs/77"), "{error}");
}

#[test]
fn promise_5_a_flipped_bit_in_the_file_of_sled_never_shows_as_other_rows() {
    let dir = TempDir::new().unwrap();
    let entries = script(1, 60);
    let store = open(dir.path()).unwrap();
    let shard = store.shard(1).unwrap();
    replay(&shard, &entries, 30).unwrap();
    store.checkpoint(Which::All).unwrap();
    replay(&shard, &entries, 60).unwrap();
    store.checkpoint(Which::All).unwrap();
    drop((shard, store));
    let len = fs::read(dir.path().join("sled/db")).unwrap().iter().rposition(|byte| *byte != 0).unwrap();
    let mut rng = StdRng::seed_from_u64(4);
    let mut noticed = 0;
    for _ in 0..24 {
        let bad = TempDir::new().unwrap();
        copy(dir.path(), bad.path());
        let path = bad.path().join("sled/db");
        let mut bytes = fs::read(&path).unwrap();
        bytes[rng.random_range(0..len)] ^= 1 << rng.random_range(0..8);
        fs::write(&path, bytes).unwrap();
        let Ok(shard) = open(bad.path()).and_then(|store| store.shard(1)) else {
            noticed += 1;
            continue;
        };
        // sled may fall back to an older checkpoint, whole; the caller compares the index with its log.
        let Some(at) = shard.checkpointed() else {
            noticed += 1;
            continue;
        };
        assert!([29, 59].contains(&at));
        assert_eq!(differs(&shard, &entries, at as usize + 1), None);
        noticed += usize::from(at == 29);
    }
    assert!(noticed > 0);
}

#[test]
fn promise_5_a_sled_that_is_damaged_or_whose_sync_failed_is_moved_aside_and_its_rows_are_made_again() {
    #[derive(Debug, PartialEq)]
    enum Ill {
        /// It does not open.
        Closed,
        /// It opens, and has silently dropped what it could not read.
        Emptied,
        /// The kernel may have dropped what it was given.
        Suspect,
    }
    for ill in [Ill::Closed, Ill::Emptied, Ill::Suspect] {
        let dir = TempDir::new().unwrap();
        let entries = script(1, 200);
        {
            let store = Arc::new(open(dir.path()).unwrap());
            let shard = store.shard(1).unwrap();
            replay(&shard, &entries, 100).unwrap();
            store.checkpoint(Which::All).unwrap();
            store.write_base(&shard, 3).unwrap().unwrap();
            replay(&shard, &entries, 200).unwrap();
            store.checkpoint(Which::All).unwrap();
        }
        match ill {
            Ill::Suspect => fs::write(dir.path().join("suspect"), "").unwrap(),
            Ill::Closed => fs::write(dir.path().join("sled/conf"), "this is no configuration of sled").unwrap(),
            Ill::Emptied => {
                let db = dir.path().join("sled/db");
                let mut bytes = fs::read(&db).unwrap();
                let len = bytes.len();
                bytes[len / 8..len / 2].fill(0xa5);
                fs::write(&db, bytes).unwrap();
            }
        }
        let reach = LogReach { purged: Some(99), begun: true };
        let store = open(dir.path()).unwrap();
        let shard = store.open_shard(1, 3, reach).unwrap();
        assert_eq!(differs(&shard, &entries, 100), None, "{ill:?}");
        replay(&shard, &entries, 200).unwrap();
        assert_eq!(differs(&shard, &entries, 200), None);
        store.checkpoint(Which::All).unwrap();
        drop((shard, store));
        // What was there is kept, and the next start finds nothing wrong.
        let mut kept = fs::read_dir(dir.path()).unwrap().map(|entry| entry.unwrap().file_name());
        assert_eq!(kept.any(|name| name.to_string_lossy().contains("aside")), ill != Ill::Emptied, "{ill:?}");
        let store = open(dir.path()).unwrap();
        assert_eq!(differs(&store.open_shard(1, 3, reach).unwrap(), &entries, 200), None);
    }
}

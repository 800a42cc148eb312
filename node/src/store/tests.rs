//! What the tests of the store share: a script of entries, the rows they must lead to, a disk and a clock to play with.

mod bases;
mod crash;
mod damage;
mod install;
mod meanwhile;
mod model;
mod real;
mod rules;

use std::{
    collections::BTreeMap,
    io,
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use bytes::Bytes;
use rand::{Rng, SeedableRng, rngs::StdRng};

use super::{
    Mark, ShardStore, Store, StoreConfig, StoreError,
    memory::{Fuse, MemoryEngine},
};
use crate::{
    clock::{Clock, SystemClock},
    disk::{Disk, DiskFile, Space, forgetful::ForgetfulDisk},
    state::{Rows, Write},
};

type Model = BTreeMap<Vec<u8>, Vec<u8>>;

const DIR: &str = "store";
const REDO: &str = "store/redo";

/// A clock that moves by `step` whenever it is asked.
#[derive(Debug)]
struct Ticking {
    now: Mutex<Instant>,
    step: Duration,
}

impl Ticking {
    fn new(step: Duration) -> Self {
        Self { now: Mutex::new(SystemClock.now()), step }
    }

    fn advance(&self, by: Duration) {
        *self.now.lock().unwrap() += by;
    }
}

impl Clock for Ticking {
    fn now(&self) -> Instant {
        self.advance(self.step);
        *self.now.lock().unwrap()
    }

    fn wall_ms(&self) -> u64 {
        0
    }
}

/// A forgetful disk on which every change is a step of a fuse.
#[derive(Debug, Clone)]
struct FusedDisk(ForgetfulDisk, Fuse);

impl FusedDisk {
    fn step(&self) -> io::Result<()> {
        if self.1.step() { Ok(()) } else { Err(io::Error::other("the fuse is burnt")) }
    }
}

#[derive(Debug)]
struct FusedFile(Box<dyn DiskFile>, FusedDisk);

impl Disk for FusedDisk {
    fn create(&self, path: &Path, len: u64) -> io::Result<Box<dyn DiskFile>> {
        self.step()?;
        Ok(Box::new(FusedFile(self.0.create(path, len)?, self.clone())))
    }

    fn open(&self, path: &Path) -> io::Result<Box<dyn DiskFile>> {
        Ok(Box::new(FusedFile(self.0.open(path)?, self.clone())))
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.step()?;
        self.0.rename(from, to)
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        self.step()?;
        self.0.remove(path)
    }

    fn list(&self, dir: &Path) -> io::Result<Vec<PathBuf>> {
        self.0.list(dir)
    }

    fn sync_dir(&self, dir: &Path) -> io::Result<()> {
        self.step()?;
        self.0.sync_dir(dir)
    }

    fn space(&self, dir: &Path) -> io::Result<Space> {
        self.0.space(dir)
    }
}

impl DiskFile for FusedFile {
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.0.read_at(offset, buf)
    }

    fn write_at(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.1.step()?;
        self.0.write_at(offset, bytes)
    }

    fn sync_data(&self) -> io::Result<()> {
        self.1.step()?;
        self.0.sync_data()
    }

    fn len(&self) -> io::Result<u64> {
        self.0.len()
    }
}

/// Everything of a node's store that survives its process.
#[derive(Debug)]
struct World {
    disk: ForgetfulDisk,
    engine: Arc<MemoryEngine>,
    fuse: Fuse,
}

impl World {
    fn new() -> Self {
        let fuse = Fuse::default();
        Self { disk: ForgetfulDisk::new(), engine: Arc::new(MemoryEngine::new(fuse.clone())), fuse }
    }

    fn open(&self) -> Result<Store, StoreError> {
        self.open_with(config(), Ticking::new(Duration::ZERO))
    }

    fn open_with(&self, config: StoreConfig, clock: Ticking) -> Result<Store, StoreError> {
        let disk = FusedDisk(self.disk.clone(), self.fuse.clone());
        Store::open_with(config, Arc::new(disk), Arc::new(clock), self.engine.clone())
    }

    /// The same bytes in another engine and on another disk.
    fn copy(&self) -> Self {
        let copy = Self { disk: self.disk.restart(), ..Self::new() };
        for (key, value) in self.engine.rows() {
            copy.engine.tamper(&key, Some(value));
        }
        copy
    }
}

fn config() -> StoreConfig {
    StoreConfig { dir: DIR.into(), ..StoreConfig::default() }
}

/// Entries of one replica's log: the writes at index n are at place n.
fn script(seed: u64, len: usize) -> Vec<Vec<Write>> {
    let mut rng = StdRng::seed_from_u64(seed);
    let mut model = Model::new();
    let mut entries = Vec::with_capacity(len);
    for _ in 0..len {
        let mut writes = BTreeMap::new();
        for _ in 0..rng.random_range(0..12) {
            let key = format!("k{:03}", rng.random_range(0..250));
            let fill: u8 = rng.random();
            let len = if rng.random_bool(0.05) { rng.random_range(0..30_000) } else { rng.random_range(0..200) };
            let value = vec![fill; len];
            let at = Bytes::from(key.clone());
            let write = match rng.random_range(0..4) {
                0 => Write::Remove { key: at },
                1 => Write::Append { key: at, tail: value.into() },
                _ => {
                    let fresh = !model.contains_key(key.as_bytes());
                    Write::Put { key: at, value: value.into(), fresh }
                }
            };
            writes.entry(key).or_insert(write);
        }
        let writes: Vec<_> = writes.into_values().collect();
        apply(&mut model, &writes);
        entries.push(writes);
    }
    entries
}

fn apply(model: &mut Model, writes: &[Write]) {
    for write in writes {
        match write {
            Write::Put { key, value, .. } => drop(model.insert(key.to_vec(), value.to_vec())),
            Write::Remove { key } => drop(model.remove(&key[..])),
            Write::Append { key, tail } => model.entry(key.to_vec()).or_default().extend_from_slice(tail),
        }
    }
}

fn mark(index: usize) -> Mark {
    Mark { index: index as u64, bytes: format!("mark {index}").into() }
}

/// Commits what the replica has not applied yet, up to (not including) index `to`, as the log does at a start.
fn replay(shard: &ShardStore, entries: &[Vec<Write>], to: usize) -> Result<(), StoreError> {
    let from = shard.mark().map_or(0, |mark| mark.index as usize + 1);
    for (index, writes) in entries.iter().enumerate().take(to).skip(from) {
        shard.commit(mark(index), writes.clone())?;
    }
    Ok(())
}

fn rows(shard: &ShardStore) -> Vec<(Bytes, Bytes)> {
    shard.scan(b"", b"\xff", usize::MAX).unwrap()
}

/// What the rows must be after the entries before index `to`, and their sum, by the slow way.
fn expected(entries: &[Vec<Write>], to: usize) -> (Vec<(Bytes, Bytes)>, u64) {
    let mut model = Model::new();
    entries.iter().take(to).for_each(|writes| apply(&mut model, writes));
    let sum = model.iter().fold(0u64, |sum, (key, value)| sum.wrapping_add(super::row::row_hash(key, value)));
    (model.into_iter().map(|(key, value)| (key.into(), value.into())).collect(), sum)
}

fn differs(shard: &ShardStore, entries: &[Vec<Write>], to: usize) -> Option<String> {
    let (want, sum) = expected(entries, to);
    if shard.mark() != Some(mark(to - 1)) {
        return Some(format!("mark {:?}", shard.mark()));
    }
    if rows(shard) != want {
        return Some(format!("{} rows, not the {} that must be", rows(shard).len(), want.len()));
    }
    (shard.hash() != sum).then(|| "the sum of the rows".into())
}

//! What is done at a start about rows that are bad, fell back, or are gone: they are made again from base and log.
//!
//! sled is judged as a whole when the store is opened ([`Store::open`]): one that does not open, of which pages do not read, or
//! whose last sync failed before the process ended, is moved aside, never deleted, and an empty one begun. A single replica is
//! judged when it is opened ([`Store::open_shard`]): rows whose checksums, number or sum do not agree are first copied to a file
//! beside sled (`….aside-N`, in the form of a base, with the physical rows), then replaced by the base's rows, or by none when the
//! log reaches back to its beginning; the log is applied again from there. The log is purged only to the base, so that this
//! succeeds unless the base is damaged too: then the replica is refused, with file and offset.
//!
//! What is set aside is for people to look at and to remove; nothing reads it again.

use std::{
    fs::{self, File},
    path::{Path, PathBuf},
    sync::Arc,
};

use super::{
    Checked, Store, StoreConfig, StoreError,
    base::{self, BaseFile, BaseHead, BaseWriter},
    head::{Head, Mark, Seal},
    install::write_head,
    orphan,
    redo::failed,
    row,
    shard::{Base, ShardStore},
    sled::SledEngine,
};
use crate::{clock::Clock, disk::Disk};

/// Left behind when a sync of sled's file failed: what the file seems to hold may be gone from the disk.
const SUSPECT: &str = "suspect";
/// Physical rows copied aside at once.
const PAGE: usize = 256;
/// Names tried for what is set aside.
const ASIDE_MAX: u32 = 10_000;

/// What the log of a replica's group holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct LogReach {
    /// Entries up to here are gone; `None`: it reaches back to its beginning.
    pub purged: Option<u64>,
    /// It holds a vote or an entry: without either it may have been lost, and proves nothing.
    pub begun: bool,
}

impl Store {
    /// Opens the store below `config.dir`, which is created if it is missing, and ends a checkpoint that a crash interrupted. Reads
    /// every row once. A sled that is damaged is moved aside and an empty one begun: [`Store::open_shard`] makes its rows again.
    pub fn open(config: StoreConfig, disk: Arc<dyn Disk>, clock: Arc<dyn Clock>) -> Result<Self, StoreError> {
        fs::create_dir_all(&config.dir).map_err(|e| failed("create", &config.dir, e))?;
        let (sled, suspect) = (config.dir.join("sled"), config.dir.join(SUSPECT));
        let mut aside = None;
        match disk.open(&suspect) {
            Ok(_) => {
                aside =
                    set_aside(&sled, "a sync of its file failed, and what it seems to hold may not be on the disk")?;
                disk.remove(&suspect).map_err(|e| failed("remove", &suspect, e))?;
                disk.sync_dir(&config.dir).map_err(|e| failed("sync", &config.dir, e))?;
            }
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {}
            Err(e) => return Err(failed("open", &suspect, e)),
        }
        let open = || -> Result<Self, StoreError> {
            let engine = SledEngine::open(&sled, config.cache_bytes)?;
            let store = Self::open_with(config.clone(), Arc::clone(&disk), Arc::clone(&clock), Arc::new(engine))?;
            store.survey()?;
            Ok(store)
        };
        let mut store = match open() {
            Err(error @ StoreError::Engine { damaged: true, .. }) => {
                aside = set_aside(&sled, &error.to_string())?;
                open()?
            }
            opened => opened?,
        };
        store.aside = aside;
        Ok(store)
    }

    /// Reads all rows, so that a sled with pages that do not read is found before anything depends on it. What was found of each
    /// replica is taken by the first [`Store::shard`].
    fn survey(&self) -> Result<(), StoreError> {
        let mut checked = self.checked.lock().expect("no panic under this lock");
        for replica in &self.replicas {
            let Ok(Some(head)) = Head::read(&*self.engine, *replica) else { continue };
            let region = row::Region { engine: &*self.engine, replica: *replica, generation: head.generation };
            match region.tally() {
                Ok(tally) => drop(checked.insert(*replica, Checked::Tally(tally))),
                Err(StoreError::Damaged { what, .. }) => drop(checked.insert(*replica, Checked::Damaged(what))),
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// As [`Store::shard`], but rows that are damaged, that lie before what the log still holds, or that are gone are made again:
    /// from the base, or from nothing when the log reaches back to its beginning. `group` is the number of the Raft group.
    ///
    /// [`StoreError::Lost`] says why that cannot be.
    pub fn open_shard(&self, replica: u64, group: u32, log: LogReach) -> Result<Arc<ShardStore>, StoreError> {
        self.tidy(replica)?;
        let (base, base_error) = match BaseFile::open(&*self.disk, &self.base_path(replica, "base")) {
            Ok(base) => (base, None),
            Err(error @ StoreError::Base { .. }) => (None, Some(error)),
            Err(error) => return Err(error),
        };
        if let Some(base) = base.as_ref().filter(|base| (base.head().group, base.head().replica) != (group, replica)) {
            let BaseHead { group: of_group, replica: of, .. } = base.head();
            let what = format!("it is of replica {of} of group {of_group}, not of replica {replica} of group {group}");
            return Err(StoreError::Base { path: self.base_path(replica, "base"), offset: 0, what });
        }
        let based = base.as_ref().map(|base| base.head().seal.mark.index);
        let why = match self.shard(replica) {
            // A log that lost everything is for the group to refuse.
            Ok(shard) if !log.begun => return Ok(self.with_base(shard, base.as_ref(), base_error)),
            Ok(shard) => {
                let at = shard.checkpointed();
                let needed = log.purged.max(based);
                if at >= needed {
                    return Ok(self.with_base(shard, base.as_ref(), base_error));
                }
                fell_back(at, needed.unwrap_or(0), self.aside.as_deref())
            }
            Err(error @ StoreError::Damaged { .. }) => error.to_string(),
            Err(error) => return Err(error),
        };
        let lost = |what: String| StoreError::Lost { replica, why: why.clone(), what };
        match (&base, &base_error) {
            (Some(base), _) if Some(base.head().seal.mark.index) < log.purged => {
                return Err(lost(format!(
                    "its base is at index {}, the log begins after {}",
                    base.head().seal.mark.index,
                    log.purged.unwrap_or(0)
                )));
            }
            (None, _) if !log.begun => return Err(lost("the log holds nothing of its group".into())),
            (None, Some(error)) if log.purged.is_some() => return Err(lost(error.to_string())),
            (None, None) if let Some(purged) = log.purged => {
                return Err(lost(format!(
                    "there is no base file {}, and the log begins after index {purged}",
                    self.base_path(replica, "base").display()
                )));
            }
            _ => {}
        }
        tracing::error!(replica, group, why, base = based, "the rows of a replica are made again from base and log");
        self.remake(replica, base.as_ref(), &why).map_err(|error| match error {
            error @ StoreError::Base { .. } => lost(error.to_string()),
            error => error,
        })?;
        Ok(self.with_base(self.shard(replica)?, base.as_ref(), base_error))
    }

    /// Ends what a crash interrupted beside sled: a snapshot that was switched to becomes the base; what else was being written or
    /// received is removed.
    fn tidy(&self, replica: u64) -> Result<(), StoreError> {
        base::remove(&*self.disk, &self.base_path(replica, "new"))?;
        let (got, path) = (self.base_path(replica, "got"), self.base_path(replica, "base"));
        let received = match BaseFile::open(&*self.disk, &got) {
            Ok(None) => return Ok(()),
            Ok(received) => received.map(|received| received.head().seal.clone()),
            Err(StoreError::Base { .. }) => None,
            Err(error) => return Err(error),
        };
        let seal = match Head::read(&*self.engine, replica) {
            Ok(head) => head.and_then(|head| head.seal),
            Err(StoreError::Damaged { .. }) => None,
            Err(error) => return Err(error),
        };
        if received.is_some() && received == seal {
            tracing::info!(replica, "a snapshot that was switched to becomes the base");
            return base::publish(&*self.disk, &got, &path);
        }
        base::remove(&*self.disk, &got)
    }

    fn with_base(&self, shard: Arc<ShardStore>, base: Option<&BaseFile>, error: Option<StoreError>) -> Arc<ShardStore> {
        let since = self.clock.now();
        if let Some(error) = error {
            tracing::error!(%error, replica = shard.replica(), "a base file is damaged; it is written again from sled");
            let mark = Mark { index: 0, bytes: bytes::Bytes::new() };
            shard.set_base(Some(Base { mark, bytes: 0, since, damaged: true }));
        } else if let Some(base) = base {
            let (mark, bytes) = (base.head().seal.mark.clone(), base.bytes());
            shard.set_base(Some(Base { mark, bytes, since, damaged: false }));
        }
        shard
    }

    /// Replaces the rows of a replica by those of its base, or by none.
    fn remake(&self, replica: u64, base: Option<&BaseFile>, why: &str) -> Result<(), StoreError> {
        let engine = &*self.engine;
        let generation = orphan::last_generation(engine, replica)?.checked_add(1).expect("generations do not run out");
        let generation = match Head::read(engine, replica) {
            Ok(head) => generation.max(head.map_or(1, |head| head.generation.saturating_add(1))),
            Err(_) => generation,
        };
        self.copy_aside(replica, why)?;
        let region = row::Region { engine, replica, generation };
        if let Some(base) = base {
            self.stage(base, region, |_| ())?;
        }
        let head = Head { dropped: false, generation, seal: base.map(|base| base.head().seal.clone()) };
        write_head(engine, replica, &head).inspect_err(|error| self.suspect(error))?;
        self.orphaned(replica, 1, generation);
        self.shards.lock().expect("no panic under this lock").remove(&replica);
        self.damaged.lock().expect("no panic under this lock").remove(&replica);
        self.checked.lock().expect("no panic under this lock").remove(&replica);
        Ok(())
    }

    /// Copies everything that sled has of a replica to a file of its own, as it is.
    fn copy_aside(&self, replica: u64, why: &str) -> Result<(), StoreError> {
        let (mut from, to) = (row::generation_start(replica, 0), row::replica_end(replica));
        if self.engine.scan(&from, &to, 1)?.is_empty() {
            return Ok(());
        }
        let taken = |path: &PathBuf| self.disk.open(path).is_ok();
        let names = (1..ASIDE_MAX).map(|n| self.base_path(replica, &format!("aside-{n}")));
        let path = names.into_iter().find(|path| !taken(path)).ok_or_else(|| {
            let full = std::io::Error::other("too much was set aside before");
            failed("name", &self.base_path(replica, "aside"), full)
        })?;
        let nothing = Seal { mark: Mark { index: 0, bytes: bytes::Bytes::new() }, rows: 0, sum: 0 };
        let mut writer = BaseWriter::create(&*self.disk, &path, BaseHead { group: 0, replica, seal: nothing })?;
        loop {
            let rows = self.engine.scan(&from, &to, PAGE)?;
            let Some((last, _)) = rows.last() else { break };
            from = [last, &[0][..]].concat();
            for (key, value) in &rows {
                writer.row(key, value)?;
            }
        }
        writer.end()?;
        self.disk.sync_dir(&self.config.dir).map_err(|e| failed("sync", &self.config.dir, e))?;
        tracing::error!(replica, why, path = %path.display(), "the damaged rows of a replica were copied aside");
        Ok(())
    }

    /// Leaves word for the next start that sled's file is not to be believed.
    pub(super) fn suspect(&self, error: &StoreError) {
        let path = self.config.dir.join(SUSPECT);
        let left = self.disk.create(&path, 0).and_then(|file| {
            file.write_at(0, error.to_string().as_bytes())?;
            file.sync_data()?;
            self.disk.sync_dir(&self.config.dir)
        });
        if let Err(source) = left {
            // The rows' checksums and sums are still compared at the next start.
            tracing::error!(%source, path = %path.display(), "it could not be noted that a sync of sled's file failed");
        }
    }
}

fn fell_back(at: Option<u64>, needed: u64, aside: Option<&Path>) -> String {
    let at = at.map_or_else(|| "its store is empty".into(), |at| format!("its store ends at index {at}"));
    match aside {
        Some(aside) => format!("{at}, what it held was moved to {}", aside.display()),
        None => format!("{at}, and has fallen back or was replaced: it once held index {needed}"),
    }
}

/// Renames sled's directory, if there is one, to a name that says so; which.
fn set_aside(sled: &Path, why: &str) -> Result<Option<PathBuf>, StoreError> {
    if !sled.exists() {
        return Ok(None);
    }
    let names = (1..ASIDE_MAX).map(|n| sled.with_extension(format!("aside-{n}")));
    let to = names
        .into_iter()
        .find(|path| !path.exists())
        .ok_or_else(|| failed("name", sled, std::io::Error::other("too much was set aside before")))?;
    fs::rename(sled, &to).map_err(|e| failed("rename", sled, e))?;
    let dir = sled.parent().expect("sled lies in the store's directory");
    File::open(dir).and_then(|dir| dir.sync_all()).map_err(|e| failed("sync", dir, e))?;
    tracing::error!(from = %sled.display(), to = %to.display(), why, "sled was moved aside; its rows are made again from bases and log");
    Ok(Some(to))
}

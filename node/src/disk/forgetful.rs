//! A disk in memory for tests: it forgets what was not synced, counts what was, fails and fills up on demand.
//!
//! A crash keeps, of the bytes written since the last sync, any set of whole sectors; of the names made since the last sync of
//! their directory, any or none (renames are all or nothing). That is what a power cut may leave; a killed process leaves
//! everything, which [`ForgetfulDisk::restart`] plays.

use std::{
    collections::BTreeMap,
    fmt, io,
    path::{Path, PathBuf},
    sync::{
        Arc, Condvar, Mutex, MutexGuard,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
    },
};

use rand::{Rng, SeedableRng, rngs::StdRng};

use super::{Disk, DiskFile, Space};

/// What a write reaches the platter in.
pub const SECTOR: usize = 512;

/// See the module. Cloning gives another handle on the same disk.
#[derive(Clone, Default)]
pub struct ForgetfulDisk(Arc<Inner>);

#[derive(Default)]
struct Inner {
    names: Mutex<Names>,
    syncs: AtomicU64,
    switches: Switches,
}

struct Switches {
    syncs_fail: AtomicBool,
    writes_fail: AtomicBool,
    full: AtomicBool,
    /// No more files than this.
    files_max: AtomicUsize,
    space: Mutex<Option<Space>>,
    held: Mutex<Held>,
    changed: Condvar,
}

impl Default for Switches {
    fn default() -> Self {
        Switches {
            syncs_fail: AtomicBool::new(false),
            writes_fail: AtomicBool::new(false),
            full: AtomicBool::new(false),
            files_max: AtomicUsize::new(usize::MAX),
            space: Mutex::default(),
            held: Mutex::default(),
            changed: Condvar::new(),
        }
    }
}

#[derive(Default)]
struct Held {
    holding: bool,
    /// Syncs that wait.
    waiting: usize,
}

#[derive(Default, Clone)]
struct Names {
    live: BTreeMap<PathBuf, Arc<Mutex<Content>>>,
    durable: BTreeMap<PathBuf, Arc<Mutex<Content>>>,
}

#[derive(Default, Clone)]
struct Content {
    live: Vec<u8>,
    durable: Vec<u8>,
}

impl ForgetfulDisk {
    /// An empty disk.
    pub fn new() -> ForgetfulDisk {
        ForgetfulDisk::default()
    }

    /// The disk after a killed process: everything written is still there. Handles of the old disk do not reach it.
    pub fn restart(&self) -> ForgetfulDisk {
        self.after(|content| content.live.clone(), |names| names.live.clone())
    }

    /// The disk after a power cut that kept nothing but what was synced.
    pub fn power_cut(&self) -> ForgetfulDisk {
        self.after(|content| content.durable.clone(), |names| names.durable.clone())
    }

    /// The disk after a power cut that kept, by the seed, some of the sectors written since the last sync.
    pub fn torn_power_cut(&self, seed: u64) -> ForgetfulDisk {
        let mut rng = StdRng::seed_from_u64(seed);
        let live_names = rng.random_bool(0.5);
        let keep = rng.random_range(0.0..=1.0);
        self.after(
            |content| torn(content, keep, &mut rng),
            |names| if live_names { names.live.clone() } else { names.durable.clone() },
        )
    }

    /// How often file contents were synced.
    pub fn syncs(&self) -> u64 {
        self.0.syncs.load(Ordering::SeqCst)
    }

    /// Syncs fail from now on, or work again.
    pub fn fail_syncs(&self, fail: bool) {
        self.0.switches.syncs_fail.store(fail, Ordering::SeqCst);
    }

    /// Writes fail from now on, or work again.
    pub fn fail_writes(&self, fail: bool) {
        self.0.switches.writes_fail.store(fail, Ordering::SeqCst);
    }

    /// No file can be allocated from now on, or again.
    pub fn fill(&self, full: bool) {
        self.0.switches.full.store(full, Ordering::SeqCst);
    }

    /// There is room for this many files and no more; one that goes makes room for another.
    pub fn fill_at(&self, files: usize) {
        self.0.switches.files_max.store(files, Ordering::SeqCst);
    }

    /// What [`Disk::space`] says from now on; nothing is refused for it. Without it, room has no end until [`fill`](Self::fill).
    pub fn set_space(&self, space: Space) {
        *lock(&self.0.switches.space) = Some(space);
    }

    /// Syncs wait until [`ForgetfulDisk::release`].
    pub fn hold(&self) {
        lock(&self.0.switches.held).holding = true;
    }

    /// Waits until a sync waits because of [`ForgetfulDisk::hold`]: what it is to make durable is written, and not durable.
    pub fn until_held(&self) {
        let mut held = lock(&self.0.switches.held);
        while held.waiting == 0 {
            held = self.0.switches.changed.wait(held).unwrap_or_else(|poisoned| poisoned.into_inner());
        }
    }

    /// Ends [`ForgetfulDisk::hold`].
    pub fn release(&self) {
        lock(&self.0.switches.held).holding = false;
        self.0.switches.changed.notify_all();
    }

    /// Names of all files, sorted.
    pub fn files(&self) -> Vec<PathBuf> {
        lock(&self.0.names).live.keys().cloned().collect()
    }

    /// What a file holds.
    ///
    /// # Panics
    /// When there is no such file.
    pub fn bytes(&self, path: &Path) -> Vec<u8> {
        lock(&self.content(path).expect("the test names a file that is there")).live.clone()
    }

    /// Changes a file behind everyone's back: what a bad sector does.
    ///
    /// # Panics
    /// When there is no such file.
    pub fn tamper(&self, path: &Path, change: impl FnOnce(&mut Vec<u8>)) {
        let content = self.content(path).expect("the test names a file that is there");
        let mut content = lock(&content);
        change(&mut content.live);
        content.durable = content.live.clone();
    }

    fn content(&self, path: &Path) -> io::Result<Arc<Mutex<Content>>> {
        let missing = || io::Error::new(io::ErrorKind::NotFound, path.display().to_string());
        lock(&self.0.names).live.get(path).cloned().ok_or_else(missing)
    }

    fn after(
        &self,
        mut keep: impl FnMut(&Content) -> Vec<u8>,
        names: impl FnOnce(&Names) -> BTreeMap<PathBuf, Arc<Mutex<Content>>>,
    ) -> ForgetfulDisk {
        let names = names(&lock(&self.0.names));
        let files: BTreeMap<_, _> = names
            .into_iter()
            .map(|(path, content)| {
                let kept = keep(&lock(&content));
                (path, Arc::new(Mutex::new(Content { live: kept.clone(), durable: kept })))
            })
            .collect();
        let disk = ForgetfulDisk::new();
        *lock(&disk.0.names) = Names { live: files.clone(), durable: files };
        disk
    }
}

fn torn(content: &Content, keep: f64, rng: &mut StdRng) -> Vec<u8> {
    let mut kept = content.durable.clone();
    kept.resize(content.live.len().max(kept.len()), 0);
    for start in (0..content.live.len()).step_by(SECTOR) {
        let end = content.live.len().min(start + SECTOR);
        if kept[start..end] != content.live[start..end] && rng.random_bool(keep) {
            kept[start..end].copy_from_slice(&content.live[start..end]);
        }
    }
    kept
}

impl fmt::Debug for ForgetfulDisk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ForgetfulDisk").field("files", &self.files()).finish()
    }
}

impl Disk for ForgetfulDisk {
    fn create(&self, path: &Path, len: u64) -> io::Result<Box<dyn DiskFile>> {
        if self.0.switches.full.load(Ordering::SeqCst) {
            return Err(io::Error::new(io::ErrorKind::StorageFull, path.display().to_string()));
        }
        let mut names = lock(&self.0.names);
        if names.live.len() >= self.0.switches.files_max.load(Ordering::SeqCst) {
            return Err(io::Error::new(io::ErrorKind::StorageFull, path.display().to_string()));
        }
        if names.live.contains_key(path) {
            return Err(io::Error::new(io::ErrorKind::AlreadyExists, path.display().to_string()));
        }
        let zeros = vec![0; usize::try_from(len).map_err(io::Error::other)?];
        let content = Arc::new(Mutex::new(Content { live: zeros, durable: Vec::new() }));
        names.live.insert(path.to_owned(), content.clone());
        Ok(Box::new(ForgetfulFile { content, disk: self.0.clone() }))
    }

    fn open(&self, path: &Path) -> io::Result<Box<dyn DiskFile>> {
        Ok(Box::new(ForgetfulFile { content: self.content(path)?, disk: self.0.clone() }))
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        let content = self.content(from)?;
        let mut names = lock(&self.0.names);
        names.live.remove(from);
        names.live.insert(to.to_owned(), content);
        Ok(())
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        self.content(path)?;
        lock(&self.0.names).live.remove(path);
        Ok(())
    }

    fn list(&self, dir: &Path) -> io::Result<Vec<PathBuf>> {
        Ok(self.files().into_iter().filter(|path| path.parent() == Some(dir)).collect())
    }

    fn sync_dir(&self, dir: &Path) -> io::Result<()> {
        if self.0.switches.syncs_fail.load(Ordering::SeqCst) {
            return Err(io::Error::other("sync failed on demand"));
        }
        let mut names = lock(&self.0.names);
        let Names { live, durable } = &mut *names;
        durable.retain(|path, _| path.parent() != Some(dir));
        durable.extend(live.iter().filter(|(path, _)| path.parent() == Some(dir)).map(|(p, c)| (p.clone(), c.clone())));
        Ok(())
    }

    fn space(&self, _: &Path) -> io::Result<Space> {
        let space = lock(&self.0.switches.space).unwrap_or(Space { free: u64::MAX, total: u64::MAX });
        Ok(if self.0.switches.full.load(Ordering::SeqCst) { Space { free: 0, ..space } } else { space })
    }
}

struct ForgetfulFile {
    content: Arc<Mutex<Content>>,
    disk: Arc<Inner>,
}

impl fmt::Debug for ForgetfulFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ForgetfulFile")
    }
}

impl DiskFile for ForgetfulFile {
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        let content = lock(&self.content);
        let start = usize::try_from(offset).map_err(io::Error::other)?;
        let bytes = content.live.get(start..start + buf.len()).ok_or(io::ErrorKind::UnexpectedEof)?;
        buf.copy_from_slice(bytes);
        Ok(())
    }

    fn write_at(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        if self.disk.switches.writes_fail.load(Ordering::SeqCst) {
            return Err(io::Error::other("write failed on demand"));
        }
        let mut content = lock(&self.content);
        let start = usize::try_from(offset).map_err(io::Error::other)?;
        let end = start + bytes.len();
        if content.live.len() < end {
            content.live.resize(end, 0);
        }
        content.live[start..end].copy_from_slice(bytes);
        Ok(())
    }

    fn sync_data(&self) -> io::Result<()> {
        let Switches { held, changed, .. } = &self.disk.switches;
        let mut held = lock(held);
        held.waiting += 1;
        changed.notify_all();
        while held.holding {
            held = changed.wait(held).unwrap_or_else(|poisoned| poisoned.into_inner());
        }
        held.waiting -= 1;
        drop(held);
        if self.disk.switches.syncs_fail.load(Ordering::SeqCst) {
            return Err(io::Error::other("sync failed on demand"));
        }
        self.disk.syncs.fetch_add(1, Ordering::SeqCst);
        let mut content = lock(&self.content);
        content.durable = content.live.clone();
        Ok(())
    }

    fn len(&self) -> io::Result<u64> {
        Ok(lock(&self.content).live.len() as u64)
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn written(disk: &ForgetfulDisk) -> Box<dyn DiskFile> {
        let file = disk.create(Path::new("d/f"), 2048).unwrap();
        file.sync_data().unwrap();
        disk.sync_dir(Path::new("d")).unwrap();
        file.write_at(0, &[7; 2048]).unwrap();
        file
    }

    #[test]
    fn a_power_cut_forgets_what_was_not_synced() {
        let disk = ForgetfulDisk::new();
        let file = written(&disk);
        assert_eq!(disk.power_cut().bytes(Path::new("d/f")), [0; 2048]);
        assert_eq!(disk.restart().bytes(Path::new("d/f")), [7; 2048]);
        file.sync_data().unwrap();
        assert_eq!(disk.power_cut().bytes(Path::new("d/f")), [7; 2048]);
        assert_eq!(disk.syncs(), 2);
    }

    #[test]
    fn a_name_that_was_not_synced_is_forgotten() {
        let disk = ForgetfulDisk::new();
        disk.create(Path::new("d/f"), 16).unwrap();
        assert!(disk.power_cut().files().is_empty());
        disk.sync_dir(Path::new("d")).unwrap();
        assert_eq!(disk.power_cut().files().len(), 1);
    }

    #[test]
    fn a_torn_power_cut_keeps_whole_sectors() {
        let disk = ForgetfulDisk::new();
        let _file = written(&disk);
        let mut mixed = false;
        for seed in 0..32 {
            let bytes = disk.torn_power_cut(seed).bytes(Path::new("d/f"));
            assert!(bytes.chunks(SECTOR).all(|sector| sector.iter().all(|b| *b == sector[0])));
            mixed |= bytes.contains(&0) && bytes.contains(&7);
        }
        assert!(mixed);
    }
}

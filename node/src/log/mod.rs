//! The write-ahead log of a node, shared by all its Raft groups.
//!
//! Knows nothing of Raft but what must survive: per group the entries, the vote, the committed index, the purge point. One
//! thread (`writer`) drains what all groups have queued: one write, one fdatasync, then all callbacks. The bytes are
//! `record`s in `segment`s; `recover` judges what a start finds; `kept` is what is known in memory, `written` what is on disk;
//! `group` is what Raft uses.
//!
//! The log is cleaned from its old end: `clean` decides which segments go, who is to be checkpointed first ([`Log::pins`]) and
//! what little is copied forward; `janitor`, a second thread, removes, reads what is to be copied, and keeps two spare segments
//! allocated. The kept bytes are bounded by whoever asks [`Log::is_over_bound`] before it takes work; the log itself refuses
//! nothing that Raft needs.
//!
//! The invariant: nothing is reported done before its bytes are synced, and nothing that was synced is ever silently missing.

mod clean;
mod group;
mod janitor;
mod kept;
mod record;
mod recover;
mod segment;
mod writer;
mod written;

#[cfg(test)]
mod tests;

use std::{
    collections::BTreeMap,
    fmt, io,
    path::PathBuf,
    sync::{
        Arc, Mutex, MutexGuard,
        atomic::{AtomicBool, Ordering},
    },
};

pub use self::{clean::Pin, group::GroupLog, janitor::SPARES};
use bytes::Bytes;
use tokio::sync::{Semaphore, mpsc, oneshot};

use self::{
    clean::Marks,
    janitor::{Janitor, Yard},
    kept::Kept,
    segment::Segment,
    writer::{Op, Queued, Writer, Writing},
};
use crate::disk::Disk;

/// Items that may wait for the writer.
const QUEUE_ITEMS: usize = 4096;
/// Bytes of entries that may wait for the writer.
const QUEUE_BYTES: usize = 16 << 20;

/// A Raft group on this node: 0 is the meta group, n is shard n - 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct GroupId(pub u32);

impl GroupId {
    /// The meta group.
    pub const META: GroupId = GroupId(0);

    /// The group of a shard.
    pub const fn of_shard(shard: u16) -> GroupId {
        GroupId(shard as u32 + 1)
    }

    /// The shard, unless it is the meta group.
    pub fn shard(self) -> Option<u16> {
        self.0.checked_sub(1).and_then(|shard| u16::try_from(shard).ok())
    }
}

impl fmt::Display for GroupId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.shard() {
            None => f.write_str("meta"),
            Some(shard) => write!(f, "shard {shard}"),
        }
    }
}

/// Position of an entry in one group's log.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Index {
    /// Term of the leader that proposed it.
    pub term: u64,
    /// Place in the log, from 0.
    pub index: u64,
}

impl fmt::Display for Index {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.term, self.index)
    }
}

/// What a replica promised in an election.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Vote {
    /// Term.
    pub term: u64,
    /// Replica voted for.
    pub replica: u64,
    /// A quorum granted it.
    pub committed: bool,
}

/// One entry as the log keeps it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Where it stands.
    pub at: Index,
    /// What it says; the log does not look inside.
    pub payload: Bytes,
}

/// Called when what it stands for is on disk, or the log has failed.
pub type Done = Box<dyn FnOnce(io::Result<()>) + Send>;

/// Called with the reason when the log can no longer promise anything; the default ends the process.
pub type Fatal = Arc<dyn Fn(&str) + Send + Sync>;

/// Where and how the log writes.
#[derive(Clone)]
pub struct LogConfig {
    /// Directory of the segments; must exist.
    pub dir: PathBuf,
    /// Bytes allocated per segment. Default 64 MiB; smaller segments free disk sooner and cost more copies of small records.
    pub segment_bytes: u64,
    /// Most bytes written by one drain, and of one entry. Default 4 MiB, at most 16.
    pub drain_bytes: usize,
    /// Bytes of newest entries of each group kept in memory; older ones are read from disk. Default 8 MiB.
    pub cache_bytes: usize,
    /// Bytes of segments in use above which groups that pin old ones are named ([`Log::pins`]). Default 512 MiB.
    pub clean_bytes: u64,
    /// Bytes of segments in use above which [`Log::is_over_bound`] says so. Halfway there from `clean_bytes` the last entries of
    /// old segments are copied forward. Default 4 GiB.
    pub kept_bytes_max: u64,
    /// Called after a failed write or sync.
    pub fatal: Fatal,
}

impl LogConfig {
    /// Defaults, in this directory.
    pub fn new(dir: impl Into<PathBuf>) -> LogConfig {
        LogConfig {
            dir: dir.into(),
            segment_bytes: 64 << 20,
            drain_bytes: 4 << 20,
            cache_bytes: 8 << 20,
            clean_bytes: 512 << 20,
            kept_bytes_max: 4 << 30,
            fatal: Arc::new(|reason| {
                tracing::error!(reason, "the log has failed: this process ends, so that nothing unsynced is promised");
                std::process::abort()
            }),
        }
    }
}

impl fmt::Debug for LogConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LogConfig").field("dir", &self.dir).finish_non_exhaustive()
    }
}

/// What was found at start.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Recovered {
    /// The last drain was torn and was dropped: `file:offset`, drain number, why.
    pub dropped: Option<String>,
    /// Nothing is promised in elections until a leader has caught this node up.
    pub catch_up: bool,
    /// Segments read.
    pub segments: usize,
    /// The log ended with the mark of a clean stop.
    pub clean: bool,
}

/// Why a log cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum LogError {
    /// Bytes that were once synced do not read back.
    #[error("log damaged at {file}:{offset}: {what}")]
    Damaged {
        /// Segment.
        file: String,
        /// Byte offset in it.
        offset: u64,
        /// What is wrong there.
        what: String,
    },
    /// The disk refused.
    #[error("log in {path}: {source}")]
    Io {
        /// Directory of the log, or a file in it.
        path: String,
        /// What the disk said.
        source: io::Error,
    },
}

/// The log of this node. Cloning gives another handle; when all handles are gone what is queued is written, without an end
/// mark.
#[derive(Clone, Debug)]
pub struct Log {
    shared: Arc<Shared>,
    queue: mpsc::Sender<Queued>,
    room: Arc<Semaphore>,
}

/// What writer and readers share.
struct Shared {
    config: LogConfig,
    disk: Arc<dyn Disk>,
    groups: Mutex<BTreeMap<GroupId, Arc<Mutex<Kept>>>>,
    /// In use, the current one included.
    segments: Mutex<BTreeMap<u64, Segment>>,
    /// The node dropped a drain: groups that are not marked caught up are behind.
    behind: AtomicBool,
    /// No spare segment could be allocated.
    full: AtomicBool,
    failed: Mutex<Option<String>>,
    yard: Yard,
    pins: Mutex<Vec<Pin>>,
    over_bound: AtomicBool,
}

impl Shared {
    fn marks(&self) -> Marks {
        Marks { ask: self.config.clean_bytes, bound: self.config.kept_bytes_max }
    }

    fn has_failed(&self) -> bool {
        lock(&self.failed).is_some()
    }

    /// Nothing can be promised any more.
    fn fail(&self, reason: &str) {
        {
            let mut failed = lock(&self.failed);
            if failed.is_some() {
                return;
            }
            *failed = Some(reason.to_owned());
        }
        (self.config.fatal)(reason);
        self.yard.wake();
    }

    fn all_caught_up(&self) -> bool {
        lock(&self.groups).values().all(|kept| lock(kept).caught_up)
    }
}

impl fmt::Debug for Shared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Shared").field("config", &self.config).finish_non_exhaustive()
    }
}

impl Log {
    /// Opens or creates the log, makes what it kept durable again, and starts the writer.
    pub fn open(config: LogConfig, disk: Arc<dyn Disk>) -> Result<(Log, Recovered), LogError> {
        let config = LogConfig { drain_bytes: config.drain_bytes.min(QUEUE_BYTES), ..config };
        let mut found = recover::recover(&config, &*disk)?;
        if let Some(dropped) = &found.recovered.dropped {
            tracing::warn!(
                dropped,
                "the last drain of the log was torn; this node has to be caught up before it votes"
            );
        }
        let path = config.dir.display().to_string();
        let spare_bytes = config.segment_bytes;
        let (queue, receiver) = mpsc::channel(QUEUE_ITEMS);
        let shared = Arc::new(Shared {
            config,
            disk,
            groups: Mutex::default(),
            segments: Mutex::new(std::mem::take(&mut found.segments)),
            behind: AtomicBool::new(found.behind),
            full: AtomicBool::new(false),
            failed: Mutex::default(),
            yard: Yard::new(found.next_sequence, spare_bytes),
            pins: Mutex::default(),
            over_bound: AtomicBool::new(false),
        });
        let written = Writing::of(&found);
        let kept = found.groups.into_iter().map(|(group, kept)| (group, Arc::new(Mutex::new(kept))));
        *lock(&shared.groups) = kept.collect();
        let io = |source| LogError::Io { path: path.clone(), source };
        // Ends when the writer does, which awaits it.
        let janitor = Janitor::new(shared.clone(), queue.downgrade());
        let janitor =
            std::thread::Builder::new().name("log-janitor".to_owned()).spawn(move || janitor.run()).map_err(io)?;
        let mut writer = Writer::new(shared.clone(), receiver, janitor, written);
        writer.plan();
        // Ends when the log is closed or its last handle is dropped; `close` waits for it.
        std::thread::Builder::new().name("log".to_owned()).spawn(move || writer.run()).map_err(io)?;
        Ok((Log { shared, queue, room: Arc::new(Semaphore::new(QUEUE_BYTES)) }, found.recovered))
    }

    /// The log of one group, new or as it was kept. At most one owner may write to it at a time.
    pub fn group(&self, id: GroupId) -> GroupLog {
        let kept = lock(&self.shared.groups).entry(id).or_default().clone();
        GroupLog { id, kept, shared: self.shared.clone(), queue: self.queue.clone(), room: self.room.clone() }
    }

    /// Writes what is queued and the end mark. Nothing can be appended afterwards.
    pub async fn close(&self) -> io::Result<()> {
        let (tx, rx) = oneshot::channel();
        let done: Done = Box::new(move |result| {
            // Whoever closed may have gone; the log is closed all the same.
            let _ = tx.send(result);
        });
        let queued = Queued { group: GroupId::META, op: Op::Close, done: Some(done), room: None };
        self.queue.send(queued).await.map_err(|_| group::closed())?;
        rx.await.map_err(|_| group::closed())?
    }

    /// Bytes of all segments in use.
    pub fn bytes(&self) -> u64 {
        lock(&self.shared.segments).values().map(|segment| segment.header.allocated).sum()
    }

    /// Segments in use.
    pub fn segments(&self) -> u64 {
        lock(&self.shared.segments).len() as u64
    }

    /// The disk has no room for another spare segment: refuse what can be refused, so that what is left serves votes, acks and
    /// checkpoints. It is tried again all the time.
    pub fn is_full(&self) -> bool {
        self.shared.full.load(Ordering::SeqCst)
    }

    /// Spare segments that are allocated, at most [`SPARES`].
    pub fn spares(&self) -> usize {
        self.shared.yard.spares()
    }

    /// Which groups hold up the removal of old segments while the log is longer than [`LogConfig::clean_bytes`], and up to which
    /// index each of them would have to be purged for the log to be shorter again: checkpoint those first. Empty when nothing is
    /// to be done.
    pub fn pins(&self) -> Vec<Pin> {
        lock(&self.shared.pins).clone()
    }

    /// More is kept than [`LogConfig::kept_bytes_max`]: nothing could be removed or copied. Refuse what makes it grow.
    pub fn is_over_bound(&self) -> bool {
        self.shared.over_bound.load(Ordering::SeqCst)
    }
}

/// A panic elsewhere does not make what is guarded wrong: every change under a lock is complete.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

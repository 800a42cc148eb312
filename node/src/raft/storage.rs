//! A group's log, as openraft uses it. Order of votes and appends, and one sync for all groups, are the log's.

use std::{
    fmt::Debug,
    io,
    ops::{Bound, Range, RangeBounds},
};

use openraft::{
    LogState, OptionalSend, RaftLogReader,
    storage::{IOFlushed, RaftLogStorage},
};

use super::{
    encode::{from_log, to_log},
    types::{Entry, LogId, Types, Vote, log_id, plain_vote, position, vote},
};
use crate::log::{self, GroupLog};

/// Bytes of entries that one append between nodes carries, about.
const APPEND_BYTES: usize = 1 << 20;

#[derive(Debug, Clone)]
pub(super) struct Storage {
    log: GroupLog,
    /// What is replayed at a start; else what is known committed.
    replayed: Option<Option<LogId>>,
}

impl Storage {
    pub(super) fn new(log: GroupLog) -> Storage {
        Storage { log, replayed: None }
    }

    /// The group replays nothing beyond `upto` at its start, whatever is known to be committed: a leader tells it again.
    pub(super) fn replaying_upto(log: GroupLog, upto: Option<LogId>) -> Storage {
        Storage { log, replayed: Some(upto) }
    }

    /// Known committed and here.
    pub(super) fn committed(&self) -> Option<LogId> {
        // Written along, not synced for: a crash may have kept the index and lost the entries.
        let committed = self.log.committed().filter(|committed| self.log.last() >= Some(*committed));
        self.replayed.unwrap_or_else(|| committed.map(log_id))
    }

    async fn read(&self, range: Range<u64>) -> io::Result<Vec<log::Entry>> {
        if let Some(entries) = self.log.read_cached(range.clone()) {
            return Ok(entries);
        }
        let log = self.log.clone();
        tokio::task::spawn_blocking(move || log.read(range)).await.map_err(io::Error::other)?
    }
}

impl RaftLogReader<Types> for Storage {
    async fn try_get_log_entries<RB: RangeBounds<u64> + Clone + Debug + OptionalSend>(
        &mut self,
        range: RB,
    ) -> io::Result<Vec<Entry>> {
        self.read(half_open(&range)).await?.into_iter().map(from_log).collect()
    }

    async fn read_vote(&mut self) -> io::Result<Option<Vote>> {
        Ok(self.log.vote().map(vote))
    }

    async fn limited_get_log_entries(&mut self, start: u64, end: u64) -> io::Result<Vec<Entry>> {
        let entries = self.read(start..end).await?;
        let mut bytes = 0;
        let within = |entry: &log::Entry| {
            let first = bytes == 0;
            bytes += entry.payload.len().max(1);
            first || bytes <= APPEND_BYTES
        };
        entries.into_iter().take_while(within).map(from_log).collect()
    }
}

impl RaftLogStorage<Types> for Storage {
    type LogReader = Self;

    async fn get_log_state(&mut self) -> io::Result<LogState<Types>> {
        Ok(LogState { last_purged_log_id: self.log.purged().map(log_id), last_log_id: self.log.last().map(log_id) })
    }

    async fn get_log_reader(&mut self) -> Self {
        self.clone()
    }

    async fn save_vote(&mut self, vote: &Vote) -> io::Result<()> {
        self.log.save_vote(plain_vote(vote)).await
    }

    async fn save_committed(&mut self, committed: Option<LogId>) -> io::Result<()> {
        self.log.save_committed(committed.as_ref().map(position));
        Ok(())
    }

    async fn read_committed(&mut self) -> io::Result<Option<LogId>> {
        Ok(self.committed())
    }

    async fn append<I>(&mut self, entries: I, callback: IOFlushed<Types>) -> io::Result<()>
    where
        I: IntoIterator<Item = Entry> + OptionalSend,
        I::IntoIter: OptionalSend,
    {
        let entries = entries.into_iter().map(|entry| to_log(&entry)).collect();
        self.log.append(entries, Box::new(|result| callback.io_completed(result))).await
    }

    async fn truncate_after(&mut self, last: Option<LogId>) -> io::Result<()> {
        self.log.truncate(last.map_or(0, |last| last.index() + 1)).await
    }

    async fn purge(&mut self, upto: LogId) -> io::Result<()> {
        self.log.purge(position(&upto)).await
    }
}

fn half_open(range: &impl RangeBounds<u64>) -> Range<u64> {
    let start = match range.start_bound() {
        Bound::Included(start) => *start,
        Bound::Excluded(before) => before + 1,
        Bound::Unbounded => 0,
    };
    let end = match range.end_bound() {
        Bound::Included(last) => last + 1,
        Bound::Excluded(end) => *end,
        Bound::Unbounded => u64::MAX,
    };
    start..end
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use futures::{Stream, StreamExt};
    use openraft::{
        RaftSnapshotBuilder, StorageError,
        storage::{EntryResponder, RaftStateMachine, Snapshot, SnapshotMeta},
        testing::log::{StoreBuilder, Suite},
    };

    use super::*;
    use crate::{
        disk::forgetful::ForgetfulDisk,
        log::{GroupId, Log, LogConfig},
        raft::{Reply, types::StoredMembership},
    };

    /// Applies nothing and remembers how far it came.
    #[derive(Clone, Default)]
    struct Follower(Arc<Mutex<Applied>>);

    /// How far, under which membership, and the newest snapshot.
    type Applied = (Option<LogId>, StoredMembership, Option<Meta>);

    type Meta = openraft::type_config::alias::SnapshotMetaOf<Types>;
    type Snap = openraft::type_config::alias::SnapshotOf<Types, ()>;

    impl Follower {
        fn meta(&self) -> Meta {
            let (last_log_id, last_membership, _) = self.0.lock().unwrap().clone();
            SnapshotMeta { last_log_id, last_membership }
        }
    }

    impl RaftSnapshotBuilder<Types> for Follower {
        type SnapshotData = ();

        async fn build_snapshot(&mut self) -> io::Result<Snap> {
            let meta = self.meta();
            self.0.lock().unwrap().2 = Some(meta.clone());
            Ok(Snapshot { meta, snapshot: () })
        }
    }

    impl RaftStateMachine<Types> for Follower {
        type SnapshotData = ();
        type SnapshotBuilder = Self;

        async fn applied_state(&mut self) -> io::Result<(Option<LogId>, StoredMembership)> {
            let meta = self.meta();
            Ok((meta.last_log_id, meta.last_membership))
        }

        async fn apply<S>(&mut self, mut entries: S) -> io::Result<()>
        where
            S: Stream<Item = io::Result<EntryResponder<Types>>> + Unpin + OptionalSend,
        {
            while let Some(next) = entries.next().await {
                let (entry, responder) = next?;
                let mut state = self.0.lock().unwrap();
                state.0 = Some(entry.log_id);
                if let openraft::EntryPayload::Membership(membership) = entry.payload {
                    state.1 = StoredMembership::new(Some(entry.log_id), membership);
                }
                if let Some(responder) = responder {
                    responder.send(Reply::None);
                }
            }
            Ok(())
        }

        async fn get_snapshot_builder(&mut self) -> Self {
            self.clone()
        }

        async fn install_snapshot(&mut self, meta: &Meta, (): ()) -> io::Result<()> {
            *self.0.lock().unwrap() = (meta.last_log_id, meta.last_membership.clone(), Some(meta.clone()));
            Ok(())
        }

        async fn get_current_snapshot(&mut self) -> io::Result<Option<Snap>> {
            Ok(self.0.lock().unwrap().2.clone().map(|meta| Snapshot { meta, snapshot: () }))
        }
    }

    struct Fresh;

    impl StoreBuilder<Types, Storage, Follower, Log> for Fresh {
        async fn build(&self) -> Result<(Log, Storage, Follower), StorageError<Types>> {
            // No cache: every read comes from a segment.
            let config =
                LogConfig { segment_bytes: 64 << 10, drain_bytes: 16 << 10, cache_bytes: 0, ..LogConfig::new("wal") };
            let (log, _) = Log::open(config, Arc::new(ForgetfulDisk::new())).unwrap();
            let storage = Storage::new(log.group(GroupId(1)));
            Ok((log, storage, Follower::default()))
        }
    }

    #[test]
    fn openrafts_own_suite_passes_on_our_log() {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        runtime.block_on(Suite::test_all(Fresh)).unwrap();
    }
}

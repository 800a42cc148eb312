//! Replicas that lie behind the others' logs are brought up by snapshots: in bounded pieces, a few at a time, begun anew when they
//! break, and finished after a crash.

use std::sync::{
    Condvar,
    atomic::{AtomicU64, Ordering},
};

use super::{
    super::{
        encode::{from_mark, to_mark},
        snapshot::{CHUNK_MAX, Described, Incoming, Outgoing, Snapshots, Staged, UNTAKEN_MAX, Way},
        types::{StoredMembership, log_id},
    },
    *,
};
use crate::log::Vote;

/// Chunks that only make a snapshot long.
const FILLERS: u64 = 40;

/// What all nodes of a cluster send and take, together.
#[derive(Debug, Default)]
pub(super) struct Meter {
    read: AtomicU64,
    written: AtomicU64,
    untaken_most: AtomicU64,
    begun: AtomicU64,
    broken: AtomicU64,
    /// Fillers are not taken beyond this many, while it is set.
    held: Mutex<Option<u64>>,
    changed: Condvar,
}

impl Meter {
    fn hold_after(&self, fillers: u64) {
        *self.held.lock().unwrap() = Some(fillers);
    }

    fn release(&self) {
        *self.held.lock().unwrap() = None;
        self.changed.notify_all();
    }
}

/// Snapshots of a [`Counter`]: the words it has applied.
#[derive(Debug)]
pub(super) struct Words {
    seen: Arc<Mutex<Seen>>,
    meter: Arc<Meter>,
    base: Mutex<Option<(Bytes, Vec<Bytes>)>>,
}

impl Words {
    pub(super) fn new(seen: &Arc<Mutex<Seen>>, meter: Arc<Meter>) -> Words {
        Words { seen: seen.clone(), meter, base: Mutex::default() }
    }

    /// What is applied now is the base; its index.
    fn take(&self) -> u64 {
        let seen = self.seen.lock().unwrap();
        let mark = seen.mark.clone().unwrap();
        let index = index_of(&mark);
        *self.base.lock().unwrap() = Some((mark, seen.applied.clone()));
        index
    }
}

fn index_of(mark: &Bytes) -> u64 {
    from_mark(mark.clone()).unwrap().0.unwrap().index()
}

impl Snapshots for Words {
    fn newest(&self) -> Option<Bytes> {
        self.base.lock().unwrap().as_ref().map(|(mark, _)| mark.clone())
    }

    fn open(&self) -> Result<Option<Box<dyn Outgoing>>, String> {
        let base = self.base.lock().unwrap().clone();
        let read = |(mark, words)| -> Box<dyn Outgoing> {
            Box::new(Read { mark, words, next: 0, fillers: FILLERS, meter: self.meter.clone() })
        };
        Ok(base.map(read))
    }

    fn receive(&self, told: Described) -> Result<Box<dyn Incoming>, String> {
        let (seen, meter) = (self.seen.clone(), self.meter.clone());
        Ok(Box::new(Taken { mark: told.mark, words: Vec::new(), fillers: 0, seen, meter }))
    }

    fn begun(&self, way: Way) {
        if way == Way::Received {
            self.meter.begun.fetch_add(1, Ordering::SeqCst);
        }
    }

    fn ended(&self, way: Way, _: Duration, done: bool) {
        if way == Way::Received && !done {
            self.meter.broken.fetch_add(1, Ordering::SeqCst);
        }
    }
}

#[derive(Debug)]
struct Read {
    mark: Bytes,
    words: Vec<Bytes>,
    next: usize,
    fillers: u64,
    meter: Arc<Meter>,
}

impl Outgoing for Read {
    fn described(&self) -> Described {
        Described {
            index: index_of(&self.mark),
            mark: self.mark.clone(),
            rows: self.words.len() as u64,
            sum: 7,
            bytes: 0,
        }
    }

    fn chunk(&mut self) -> Result<Option<Bytes>, String> {
        let chunk = if self.fillers > 0 {
            self.fillers -= 1;
            Some(Bytes::from(vec![0; CHUNK_MAX]))
        } else {
            self.next += 1;
            self.words.get(self.next - 1).cloned()
        };
        if chunk.is_some() {
            let read = self.meter.read.fetch_add(1, Ordering::SeqCst) + 1;
            let untaken = read - self.meter.written.load(Ordering::SeqCst);
            self.meter.untaken_most.fetch_max(untaken, Ordering::SeqCst);
        }
        Ok(chunk)
    }
}

struct Taken {
    mark: Bytes,
    words: Vec<Bytes>,
    fillers: u64,
    seen: Arc<Mutex<Seen>>,
    meter: Arc<Meter>,
}

impl Incoming for Taken {
    fn chunk(&mut self, bytes: &[u8]) -> Result<(), String> {
        assert!(bytes.len() <= CHUNK_MAX);
        let mut held = self.meter.held.lock().unwrap();
        while held.is_some_and(|upto| self.fillers >= upto) {
            held = self.meter.changed.wait(held).unwrap();
        }
        drop(held);
        match bytes.len() {
            CHUNK_MAX => self.fillers += 1,
            _ => self.words.push(Bytes::copy_from_slice(bytes)),
        }
        self.meter.written.fetch_add(1, Ordering::SeqCst);
        Ok(())
    }

    fn finish(self: Box<Self>, _: &mut dyn FnMut(u64)) -> Result<Box<dyn Staged>, String> {
        assert_eq!(self.fillers, FILLERS);
        Ok(self)
    }
}

impl Staged for Taken {
    fn switch(self: Box<Self>) -> Result<(), String> {
        let mut seen = self.seen.lock().unwrap();
        (seen.applied, seen.mark) = (self.words, Some(self.mark));
        Ok(())
    }
}

impl Cluster {
    /// Cuts one follower off, has the others go on and purge what it lacks; its node.
    async fn left_behind(&self) -> u64 {
        let leader = self.leader().await;
        let behind = self.others(leader.id)[0].id;
        leader.propose("before").await.unwrap();
        self.nodes[&behind].has_applied(1).await;
        for other in self.others(behind) {
            self.wiring.cut(behind, other.id);
        }
        for _ in 0..20 {
            leader.propose("behind").await.unwrap();
        }
        for other in self.others(behind) {
            other.has_applied(21).await;
            let base = other.snapshots.take();
            let purging = async {
                while other.group.purged() < base {
                    other.group.purge_upto(base, base).await.unwrap();
                    tokio::time::sleep(Duration::from_millis(20)).await;
                }
            };
            tokio::time::timeout(PATIENCE, purging).await.unwrap();
        }
        behind
    }

    fn heal(&self, id: u64) {
        self.others(id).into_iter().for_each(|other| self.wiring.heal(id, other.id));
    }
}

async fn until(what: &str, holds: impl Fn() -> bool) {
    let waiting = async {
        while !holds() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    assert!(tokio::time::timeout(PATIENCE, waiting).await.is_ok(), "waited in vain until {what}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_snapshot_goes_in_bounded_pieces_of_which_few_are_under_way() {
    let cluster = Cluster::of(3).await;
    let behind = cluster.left_behind().await;
    cluster.heal(behind);
    assert_eq!(cluster.nodes[&behind].has_applied(21).await.len(), 21);
    cluster.leader().await.propose("after").await.unwrap();
    assert_eq!(cluster.nodes[&behind].has_applied(22).await.len(), 22);
    let most = cluster.meter.untaken_most.load(Ordering::SeqCst);
    assert!((1..=UNTAKEN_MAX).contains(&most), "{most} chunks were under way");
    assert!(cluster.meter.written.load(Ordering::SeqCst) >= FILLERS);
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_snapshot_whose_link_breaks_is_begun_anew_and_the_log_is_kept_for_its_receiver() {
    let cluster = Cluster::of(3).await;
    let behind = cluster.left_behind().await;
    cluster.meter.hold_after(5);
    cluster.heal(behind);
    let meter = &cluster.meter;
    until("a snapshot is on its way", || meter.written.load(Ordering::SeqCst) >= 5).await;
    let limits = cluster.nodes.values().map(|node| node.network.local(GROUP).unwrap().purge_limit());
    let sent = limits.min().filter(|limit| *limit < u64::MAX).expect("one is sent");
    for other in cluster.others(behind) {
        cluster.wiring.cut(behind, other.id);
    }
    cluster.meter.release();
    until("it has broken", || meter.broken.load(Ordering::SeqCst) > 0).await;
    // Whoever goes on from it finds the log behind it, whatever holds up the cleaning.
    let leader = cluster.leader().await;
    for _ in 0..5 {
        leader.propose("meanwhile").await.unwrap();
    }
    let base = leader.snapshots.take();
    assert!(base > sent);
    assert_eq!(leader.group.purge_upto(base, base).await, Ok(sent));
    cluster.heal(behind);
    cluster.nodes[&behind].has_applied(26).await;
    assert!(meter.begun.load(Ordering::SeqCst) >= 2);
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replica_that_ended_between_the_switch_to_a_snapshot_and_the_purge_of_its_log_goes_on_from_the_snapshot() {
    // Entries of a leader of term 3 that was never heard of again, and a snapshot of what others committed.
    for last in [5, 60] {
        let disk = ForgetfulDisk::new();
        let config = || LogConfig { segment_bytes: 256 << 10, drain_bytes: 64 << 10, ..LogConfig::new("wal") };
        let (log, _) = Log::open(config(), Arc::new(disk.clone())).unwrap();
        let group = log.group(GROUP);
        let entry = |index| crate::log::Entry { at: Index { term: 3, index }, payload: Bytes::from_static(&[0]) };
        group.append((0..=last).map(entry).collect(), Box::new(|_| ())).await.unwrap();
        group.save_vote(Vote { term: 4, replica: 20, committed: true }).await.unwrap();
        let applied = Index { term: 2, index: 50 };
        let mark = to_mark(&log_id(applied), &StoredMembership::default());
        let seen = Arc::new(Mutex::new(Seen { mark: Some(mark), ..Seen::default() }));
        let wiring = Wiring::new(Arc::new(DirectLinks));
        let network = Network::new(1, wiring.of(1), Arc::new(SystemClock), 1);
        let config = GroupConfig {
            group: GROUP,
            replica: 10,
            preference: Vec::new(),
            settings: settings(),
            decisions: Arc::new(Undecided),
            time: Arc::new(Timeless),
            snapshots: Arc::new(Words::new(&seen, Arc::default())),
        };
        let started = Group::start(config, &log, Box::new(Counter(seen)), &network).await.unwrap();
        assert_eq!((group.purged(), group.last()), (Some(applied), Some(applied)), "{last}");
        started.shutdown().await;
        network.shutdown();
        log.close().await.unwrap();
    }
}

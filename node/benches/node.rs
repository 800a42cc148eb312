//! What a node does for each message: apply it to the state, append it to the log, commit it to the memtable, checkpoint.
//!
//! Files are below the system's directory for temporary ones (`TMPDIR`): name a directory of the disk that is to be measured.

use std::{
    hint::black_box,
    sync::{Arc, mpsc},
};

use bytes::Bytes;
use divan::{Bencher, counter::ItemsCount};
use martlet_node::{
    clock::SystemClock,
    disk::RealDisk,
    log::{self, GroupId, GroupLog, Index, Log, LogConfig},
    state::{State, memory::MemoryRows},
    store::{Mark, Store, StoreConfig, Which},
};
use martlet_proto::{
    cluster::{
        command::{Acks, Command, DeviceAck, Entry, Limits, Stamped, command},
        queue::{Enqueue, Operation, Register, operation::Kind},
    },
    message::Sequence,
};
use tempfile::TempDir;

fn main() {
    divan::main();
}

const START_MS: u64 = 1_700_000_000_000;
const SENDER: &str = "100000000001";

/// Size of a message's payload, bytes: that of the load scenarios.
const PAYLOAD_BYTES: usize = 1_024;

/// Devices that messages are spread over.
const DEVICES: u64 = 1_000;

const LIMITS: Limits = Limits {
    waiting_max: 100,
    unacked_max: 1_000,
    unacked_bytes_max: 1 << 20,
    registrations_max: 5,
    dedupe_window_ms: 40_000,
    collapse_keys_max: 4,
    device_bytes_max: 0,
    project_bytes_max: 0,
    group_members_max: 20,
    topics_max: 2_000,
    publishes_max: 1_000,
    fan_out_max: 1_000,
};

/// Makes the entries of a shard whose devices acknowledge each message in the entry after its own.
struct Traffic {
    now_ms: u64,
    index: u64,
    drawn: u64,
    unacked: Vec<(u64, Sequence)>,
}

impl Traffic {
    fn new() -> Self {
        Self { now_ms: START_MS, index: 0, drawn: 0, unacked: Vec::new() }
    }

    fn stamped(&mut self, kind: Kind) -> Command {
        self.drawn += 1;
        let id = [(self.now_ms * 1_000).to_be_bytes(), self.drawn.to_be_bytes()].concat();
        let operation = Some(Operation { id: id.into(), first_try_ms: self.now_ms, kind: Some(kind) });
        let stamped = Stamped { operation, written_through: Bytes::new(), limits: Some(LIMITS) };
        Command { kind: Some(command::Kind::Stamped(stamped)) }
    }

    /// The first entry: all devices register.
    fn registrations(&mut self) -> (u64, Entry) {
        let register = |device: u64| {
            Kind::Register(Register {
                device_tag: device,
                registration_id: [device.to_be_bytes(); 2].concat().into(),
                token_key_id: 1,
                application: "com.example.app".into(),
                senders: vec![SENDER.into()],
                scope: "GCM".into(),
                iid: format!("fXk2_ab{device:04}"),
                ..Register::default()
            })
        };
        let commands = (0..DEVICES).map(|device| self.stamped(register(device))).collect();
        self.index += 1;
        (self.index, Entry { shard_time_ms: self.now_ms, commands, term: 0 })
    }

    /// The next entry: what was enqueued before is acknowledged, `messages` are enqueued.
    fn next(&mut self, messages: u64) -> (u64, Entry) {
        self.index += 1;
        self.now_ms += 10;
        let acks = std::mem::take(&mut self.unacked).into_iter().map(|(device_tag, sequence)| DeviceAck {
            device_tag,
            sequences: vec![sequence.to_bytes().to_vec().into()],
            message_ids: Vec::new(),
            gateway: 0,
        });
        let mut commands = vec![Command { kind: Some(command::Kind::Acks(Acks { acks: acks.collect() })) }];
        for _ in 0..messages {
            let device = self.drawn % DEVICES;
            let position = u32::try_from(commands.len()).expect("a few hundred");
            self.unacked.push((device, Sequence { incarnation: 0, index: self.index, position }));
            let enqueue = Enqueue {
                device_tag: device,
                registration_id: [device.to_be_bytes(); 2].concat().into(),
                sender: SENDER.into(),
                wire_from: SENDER.into(),
                ttl_secs: 86_400,
                payload: vec![b'x'; PAYLOAD_BYTES].into(),
                ..Enqueue::default()
            };
            commands.push(self.stamped(Kind::Enqueue(enqueue)));
        }
        (self.index, Entry { shard_time_ms: self.now_ms, commands, term: 0 })
    }
}

/// Messages of one entry, enqueued and later acknowledged: the pure value, over rows in memory.
#[divan::bench(args = [1, 16, 64])]
fn state_apply(bencher: Bencher<'_, '_>, messages: u64) {
    let (mut traffic, mut rows) = (Traffic::new(), MemoryRows::default());
    let mut state = State::load(&rows).expect("an empty shard");
    let mut apply = |(index, entry): (u64, Entry)| {
        let applied = state.apply(&rows, index, &entry).expect("entries of ours");
        rows.write(&applied.writes);
        applied.answers.len()
    };
    apply(traffic.registrations());
    bencher
        .counter(ItemsCount::new(messages))
        .with_inputs(|| traffic.next(messages))
        .bench_local_values(|entry| black_box(apply(entry)));
}

/// The same over the store: what a replica does for an entry once it is committed.
#[divan::bench(args = [1, 16, 64])]
fn store_commit(bencher: Bencher<'_, '_>, messages: u64) {
    let dir = tempfile::tempdir().expect("a directory for temporary files");
    let store = store(&dir);
    let rows = store.shard(1).expect("a new shard");
    let mut traffic = Traffic::new();
    let mut state = State::load(&*rows).expect("an empty shard");
    let mut apply = |(index, entry): (u64, Entry)| {
        let applied = state.apply(&*rows, index, &entry).expect("entries of ours");
        rows.commit(Mark { index, bytes: Bytes::new() }, applied.writes).expect("room in the memtable");
    };
    apply(traffic.registrations());
    bencher.counter(ItemsCount::new(messages)).with_inputs(|| traffic.next(messages)).bench_local_values(apply);
}

/// A checkpoint of so many messages that wait: redo file, sled, both synced.
#[divan::bench(args = [100, 1_000], sample_count = 10, sample_size = 1)]
fn store_checkpoint(bencher: Bencher<'_, '_>, messages: u64) {
    let dir = tempfile::tempdir().expect("a directory for temporary files");
    let store = store(&dir);
    let rows = store.shard(1).expect("a new shard");
    let mut traffic = Traffic::new();
    let mut state = State::load(&*rows).expect("an empty shard");
    let mut apply = |(index, entry): (u64, Entry)| {
        let applied = state.apply(&*rows, index, &entry).expect("entries of ours");
        rows.commit(Mark { index, bytes: Bytes::new() }, applied.writes).expect("room in the memtable");
    };
    apply(traffic.registrations());
    bencher
        .counter(ItemsCount::new(messages))
        .with_inputs(|| {
            // Those before are acknowledged and leave sled again.
            apply(traffic.next(messages));
        })
        .bench_local_values(|()| store.checkpoint(Which::All).expect("a disk that writes"));
}

fn store(dir: &TempDir) -> Store {
    let config = StoreConfig { dir: dir.path().into(), ..StoreConfig::default() };
    Store::open(config, Arc::new(RealDisk), Arc::new(SystemClock)).expect("an empty directory")
}

/// So many entries of a message each, in one append of one group; ready when they are on disk.
#[divan::bench(args = [1, 16, 64])]
fn log_append_with_fdatasync(bencher: Bencher<'_, '_>, entries: u64) {
    let (_dir, log, runtime) = opened();
    let mut groups = [Appender::new(log.group(GroupId(1)))];
    let payload = Bytes::from(vec![b'x'; PAYLOAD_BYTES]);
    bencher.counter(ItemsCount::new(entries)).bench_local(|| runtime.block_on(append(&mut groups, entries, &payload)));
}

/// One entry of each of so many groups at once: they share writes and syncs.
#[divan::bench(args = [16, 64])]
fn log_append_of_groups_with_fdatasync(bencher: Bencher<'_, '_>, groups: u32) {
    let (_dir, log, runtime) = opened();
    let mut appenders: Vec<Appender> = (1..=groups).map(|id| Appender::new(log.group(GroupId(id)))).collect();
    let payload = Bytes::from(vec![b'x'; PAYLOAD_BYTES]);
    bencher.counter(ItemsCount::new(groups)).bench_local(|| runtime.block_on(append(&mut appenders, 1, &payload)));
}

struct Appender {
    group: GroupLog,
    next: u64,
}

impl Appender {
    fn new(group: GroupLog) -> Self {
        Self { group, next: 0 }
    }
}

fn opened() -> (TempDir, Log, tokio::runtime::Runtime) {
    let dir = tempfile::tempdir().expect("a directory for temporary files");
    let (log, _) = Log::open(LogConfig::new(dir.path()), Arc::new(RealDisk)).expect("an empty directory");
    let runtime = tokio::runtime::Builder::new_current_thread().build().expect("a runtime");
    (dir, log, runtime)
}

async fn append(appenders: &mut [Appender], entries: u64, payload: &Bytes) {
    let (synced, done) = mpsc::sync_channel(appenders.len());
    for appender in &mut *appenders {
        let from = appender.next;
        appender.next += entries;
        let entry = |index| log::Entry { at: Index { term: 1, index }, payload: payload.clone() };
        let synced = synced.clone();
        let called = Box::new(move |result: std::io::Result<()>| {
            result.expect("a disk that syncs");
            synced.send(()).expect("the bench waits");
        });
        appender.group.append((from..appender.next).map(entry).collect(), called).await.expect("an open log");
    }
    for _ in 0..appenders.len() {
        done.recv().expect("one call each");
    }
}

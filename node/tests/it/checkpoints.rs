//! The real state over the real store: what reaches sled, and what a crash in a checkpoint leaves.

use std::{
    io,
    path::{Path, PathBuf},
    sync::Arc,
};

use bytes::Bytes;
use martlet_node::{
    clock::SystemClock,
    disk::{Disk, DiskFile, RealDisk, Space, forgetful::ForgetfulDisk},
    state::State,
    store::{
        Mark, ShardStore, Store, StoreConfig, Which,
        engine::Engine,
        key::Family,
        memory::{Fuse, MemoryEngine},
        sled::SledEngine,
    },
};
use martlet_proto::{
    cluster::{
        command::{Acks, Command, DeviceAck, Entry, Expire, Limits, Seen, Stamped, command},
        queue::{Enqueue, Operation, Register, Unregister, answer, operation::Kind, unregister::What},
    },
    message::Sequence,
};

const START_MS: u64 = 1_700_000_000_000;
const SENDER: &str = "100000000001";
const REPLICA: u64 = 1;
const LIMITS: Limits = Limits {
    waiting_max: 1_000,
    unacked_max: 50,
    unacked_bytes_max: 1 << 20,
    registrations_max: 5,
    dedupe_window_ms: 90_000,
    collapse_keys_max: 4,
    device_bytes_max: 0,
    project_bytes_max: 0,
    group_members_max: 20,
    topics_max: 3,
    publishes_max: 4,
    fan_out_max: 1_000,
};

fn stamped(number: u64, now_ms: u64, kind: Kind) -> Command {
    let mut id = (now_ms * 1_000).to_be_bytes().to_vec();
    id.extend(number.to_be_bytes());
    let operation = Some(Operation { id: id.into(), first_try_ms: now_ms, kind: Some(kind) });
    let stamped = Stamped { operation, written_through: Bytes::new(), limits: Some(LIMITS) };
    Command { kind: Some(command::Kind::Stamped(stamped)) }
}

fn register(device: u64) -> Kind {
    Kind::Register(Register {
        device_tag: device,
        registration_id: vec![device as u8; 16].into(),
        token_key_id: 1,
        application: "com.example.app".into(),
        senders: vec![SENDER.into()],
        scope: "GCM".into(),
        iid: format!("fXk2_abcd{device:02}"),
        ..Register::default()
    })
}

fn enqueue(device: u64, payload_len: usize, ttl_secs: u32) -> Kind {
    Kind::Enqueue(Enqueue {
        device_tag: device,
        registration_id: vec![device as u8; 16].into(),
        sender: SENDER.into(),
        wire_from: SENDER.into(),
        ttl_secs,
        payload: vec![b'x'; payload_len].into(),
        ..Enqueue::default()
    })
}

fn acks(device_tag: u64, sequences: impl IntoIterator<Item = Sequence>) -> Command {
    let sequences = sequences.into_iter().map(|sequence| sequence.to_bytes().to_vec().into()).collect();
    let acks = vec![DeviceAck { device_tag, sequences, message_ids: Vec::new(), gateway: 0 }];
    Command { kind: Some(command::Kind::Acks(Acks { acks })) }
}

/// Applies one entry as a replica does; how many operations were accepted or registered.
fn apply(state: &mut State, rows: &ShardStore, index: u64, entry: &Entry) -> usize {
    let applied = state.apply(rows, index, entry).unwrap();
    rows.commit(Mark { index, bytes: Bytes::new() }, applied.writes).unwrap();
    let done = |kind: &answer::Kind| matches!(kind, answer::Kind::Accepted(_) | answer::Kind::Registered(_));
    applied.answers.iter().flatten().filter(|answer| answer.kind.as_ref().is_some_and(done)).count()
}

fn physical(engine: &dyn Engine) -> Vec<(Bytes, Bytes)> {
    engine.scan(&[], &[0xff; 16], usize::MAX).unwrap()
}

/// Family of a physical row: behind replica, generation and space; `None` for the replica's head.
fn family(physical: &[u8]) -> Option<u8> {
    physical.get(13).copied()
}

#[test]
fn must_hold_sleds_rows_are_unchanged_by_10_000_messages_enqueued_delivered_and_acked_between_two_checkpoints() {
    let dir = tempfile::tempdir().unwrap();
    let engine = Arc::new(SledEngine::open(&dir.path().join("sled"), 8 << 20).unwrap());
    let config = StoreConfig { dir: dir.path().into(), ..StoreConfig::default() };
    let store = Store::open_with(config, Arc::new(RealDisk), Arc::new(SystemClock), engine.clone()).unwrap();
    let rows = store.shard(REPLICA).unwrap();
    let mut state = State::load(&*rows).unwrap();
    let (mut now_ms, mut index) = (START_MS, 1);
    // One message waits all the time, so that there is something to spoil.
    let commands = vec![stamped(1, now_ms, register(7)), stamped(2, now_ms, enqueue(7, 100, 86_400))];
    assert_eq!(apply(&mut state, &rows, index, &Entry { shard_time_ms: now_ms, commands, term: 0 }), 2);
    store.checkpoint(Which::All).unwrap();
    let before = physical(&*engine);

    let (mut accepted, mut last): (usize, Vec<Sequence>) = (0, Vec::new());
    for round in 0..=200_u64 {
        (now_ms, index) = (now_ms + 20, index + 1);
        let mut commands = Vec::new();
        if let Some(written) = last.last().copied() {
            // The device has the last fifty: what the leader knows of it travels with the next enqueue.
            commands.push(acks(7, std::mem::take(&mut last)));
            assert_eq!(written.index, index - 1);
        }
        for n in 0..if round < 200 { 50 } else { 0 } {
            last.push(Sequence { incarnation: 0, index, position: commands.len() as u32 });
            commands.push(stamped(10 + round * 50 + n, now_ms, enqueue(7, 1_000, 86_400)));
        }
        accepted += apply(&mut state, &rows, index, &Entry { shard_time_ms: now_ms, commands, term: 0 });
    }
    assert_eq!(accepted, 10_000);
    store.checkpoint(Which::All).unwrap();
    assert_eq!(rows.checkpointed(), Some(index));

    let may_differ = [Family::Dedupe, Family::Count, Family::Shard].map(Family::tag);
    let lasting = |rows: Vec<(Bytes, Bytes)>| -> Vec<_> {
        rows.into_iter().filter(|(key, _)| family(key).is_some_and(|family| !may_differ.contains(&family))).collect()
    };
    let (before, after) = (lasting(before), lasting(physical(&*engine)));
    assert_eq!(after, before);
    // Registration, the waiting message, its expiry at least: the comparison compares something.
    assert!(before.len() >= 3, "{} rows", before.len());
}

/// A forgetful disk on which every change is a step of a fuse.
#[derive(Debug, Clone)]
struct FusedDisk(ForgetfulDisk, Fuse);

#[derive(Debug)]
struct FusedFile(Box<dyn DiskFile>, FusedDisk);

impl FusedDisk {
    fn step(&self) -> io::Result<()> {
        if self.1.step() { Ok(()) } else { Err(io::Error::other("the fuse is burnt")) }
    }
}

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

/// What survives a process: its disk and the engine's file.
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

    fn open(&self) -> Result<Store, martlet_node::store::StoreError> {
        let config = StoreConfig { dir: "store".into(), ..StoreConfig::default() };
        let disk = Arc::new(FusedDisk(self.disk.clone(), self.fuse.clone()));
        Store::open_with(config, disk, Arc::new(SystemClock), self.engine.clone())
    }
}

/// A log: registrations, sends (some short-lived, some sent twice), acks, a registration that goes, time that passes.
fn log() -> Vec<Entry> {
    let (mut entries, mut now_ms, mut waiting) = (Vec::new(), START_MS, Vec::new());
    for index in 0..120_u64 {
        now_ms += 700;
        let mut commands = Vec::new();
        if index % 3 == 2 {
            // Every second one; the others wait to the end.
            for (device, sequence) in waiting.drain(..).step_by(2) {
                commands.push(acks(device, [sequence]));
            }
        }
        if index % 10 == 9 {
            commands.push(Command { kind: Some(command::Kind::Expire(Expire { upto_ms: now_ms, rows_max: 5 })) });
        }
        if index < 6 {
            commands.push(stamped(1, now_ms, register(index + 1)));
        }
        if index == 70 {
            let (application, what) = ("com.example.app".into(), Some(What::WholeApplication(true)));
            commands.push(stamped(2, now_ms, Kind::Unregister(Unregister { device_tag: 3, application, what })));
        }
        if index % 40 == 7 {
            let seen = Seen { device_tag: 1 + index % 6, day: 19_000 + index as u32 };
            commands.push(Command { kind: Some(command::Kind::Seen(seen)) });
        }
        for n in 0..8 {
            let device = 1 + (index * 5 + n) % 6;
            waiting.push((device, Sequence { incarnation: 0, index, position: commands.len() as u32 }));
            let kind = enqueue(device, 100 + (index as usize * 37) % 3_000, if n == 2 { 5 } else { 86_400 });
            // The last two are one, sent twice.
            commands.push(stamped(100 + n.min(6), now_ms, kind));
        }
        entries.push(Entry { shard_time_ms: now_ms, commands, term: 0 });
    }
    entries
}

const FIRST: usize = 50;

/// Applies what the replica has not applied yet, before index `to`.
fn replay(rows: &ShardStore, entries: &[Entry], to: usize) -> State {
    let mut state = State::load(rows).unwrap();
    let from = rows.mark().map_or(0, |mark| mark.index as usize + 1);
    for (index, entry) in entries.iter().enumerate().take(to).skip(from) {
        apply(&mut state, rows, index as u64, entry);
    }
    state
}

/// State and hash of a replica that applied everything and never crashed or checkpointed.
fn uncrashed(entries: &[Entry]) -> (State, u64) {
    let rows = World::new().open().unwrap().shard(REPLICA).unwrap();
    let state = replay(&rows, entries, entries.len());
    (state, rows.hash())
}

/// What a process killed, or a machine cut off, `step` steps into a checkpoint leaves; `None` when it has fewer steps.
fn crash(entries: &[Entry], step: u64, power: bool) -> Option<World> {
    let mut world = World::new();
    let store = world.open().unwrap();
    let rows = store.shard(REPLICA).unwrap();
    replay(&rows, entries, FIRST);
    store.checkpoint(Which::All).unwrap();
    replay(&rows, entries, entries.len());
    world.fuse.burn_after(step);
    let _ = store.checkpoint(Which::All);
    if !world.fuse.burnt() {
        return None;
    }
    drop((rows, store));
    world.fuse.repair();
    let batches = world.engine.batches_not_durable();
    if power {
        // The engine's file may still have got some of what was written to it.
        world.disk = world.disk.power_cut();
        world.engine.crash(batches / 2);
    } else {
        world.disk = world.disk.restart();
        world.engine.crash(batches);
    }
    Some(world)
}

/// Whether the log, replayed on what the crash left, gives what the replica has that did not crash; and again after a checkpoint.
fn judge(world: &World, entries: &[Entry], (state, hash): &(State, u64)) -> Result<(), String> {
    for _ in 0..2 {
        let store = world.open().map_err(|error| error.to_string())?;
        let rows = store.shard(REPLICA).map_err(|error| error.to_string())?;
        let replayed = replay(&rows, entries, entries.len());
        if (&replayed, rows.hash()) != (state, *hash) {
            return Err(format!("hash {:016x} instead of {hash:016x}", rows.hash()));
        }
        store.checkpoint(Which::All).map_err(|error| error.to_string())?;
    }
    Ok(())
}

#[test]
fn must_hold_a_crash_after_each_step_of_a_checkpoint_and_the_log_give_the_state_of_a_replica_that_did_not_crash() {
    let entries = log();
    let uncrashed = uncrashed(&entries);
    for power in [false, true] {
        let mut steps = 0;
        while let Some(world) = crash(&entries, steps, power) {
            judge(&world, &entries, &uncrashed)
                .unwrap_or_else(|what| panic!("power cut {power}, step {steps}: {what}"));
            steps += 1;
        }
        assert!(steps > 8, "the checkpoint of this test has only {steps} steps");
    }
}

#[test]
fn must_hold_with_the_redo_file_left_out_the_same_comparison_fails() {
    let entries = log();
    let uncrashed = uncrashed(&entries);
    let failed = (0..)
        .map_while(|step| crash(&entries, step, false))
        .filter(|world| {
            // Not there, as if it had never been written.
            let _ = world.disk.remove(Path::new("store/redo"));
            judge(world, &entries, &uncrashed).is_err()
        })
        .count();
    assert!(failed > 0, "a checkpoint cut off half-way is not noticed");
}

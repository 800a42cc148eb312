//! Snapshots: a crash at each step of taking one, and what runs beside it.

use super::*;
use crate::store::{
    Incoming, LogReach, Which,
    base::{BaseFile, BaseHead},
};

const GROUP: u32 = 3;
const OLD: usize = 20;
const NEW: usize = 90;
const LAST: usize = 120;
const SOURCE: &str = "store/0000000000000007.base";
const BASE: &str = "store/0000000000000001.base";

/// The base of another replica of the shard.
fn source() -> BaseFile {
    let world = World::new();
    let store = world.open().unwrap();
    let shard = store.shard(7).unwrap();
    replay(&shard, &script(1, LAST), NEW).unwrap();
    store.checkpoint(Which::All).unwrap();
    store.write_base(&shard, GROUP).unwrap().unwrap();
    BaseFile::open(&world.disk, Path::new(SOURCE)).unwrap().unwrap()
}

/// A replica that was away, with some of what it had in sled and some in memory.
fn behind(world: &World) -> (Arc<Store>, Arc<ShardStore>) {
    let store = Arc::new(world.open().unwrap());
    let shard = store.open_shard(1, GROUP, LogReach { purged: None, begun: true }).unwrap();
    replay(&shard, &script(1, LAST), OLD / 2).unwrap();
    store.checkpoint(Which::All).unwrap();
    replay(&shard, &script(1, LAST), OLD).unwrap();
    (store, shard)
}

fn begin(store: &Arc<Store>, shard: &Arc<ShardStore>, source: &BaseFile) -> Result<Incoming, StoreError> {
    store.receive(shard, BaseHead { replica: 1, ..source.head().clone() }, source.bytes())
}

fn receive(store: &Arc<Store>, shard: &Arc<ShardStore>, source: &BaseFile) -> Result<Incoming, StoreError> {
    let mut incoming = begin(store, shard, source)?;
    let mut place = source.begin();
    while let Some(chunk) = source.chunk(&mut place)? {
        incoming.chunk(&chunk)?;
    }
    Ok(incoming)
}

fn install(store: &Arc<Store>, shard: &Arc<ShardStore>, source: &BaseFile) -> Result<(), StoreError> {
    receive(store, shard, source)?.finish(|_| ())?.switch()
}

#[test]
fn a_snapshot_replaces_rows_memtable_and_base_and_the_old_rows_are_swept() {
    let (world, source, entries) = (World::new(), source(), script(1, LAST));
    let (store, shard) = behind(&world);
    install(&store, &shard, &source).unwrap();
    assert_eq!((shard.checkpointed(), shard.based()), (Some(NEW as u64 - 1), Some(NEW as u64 - 1)));
    assert_eq!((shard.bytes(), store.memtable_bytes()), (0, 0));
    assert_eq!(differs(&shard, &entries, NEW), None);
    replay(&shard, &entries, LAST).unwrap();
    store.checkpoint(Which::All).unwrap();
    assert_eq!(differs(&shard, &entries, LAST), None);
    while store.sweep().unwrap() {}
    let (fresh, other) = (World::new(), script(1, LAST));
    let plain = fresh.open().unwrap();
    replay(&plain.shard(1).unwrap(), &other, LAST).unwrap();
    plain.checkpoint(Which::All).unwrap();
    assert_eq!(world.engine.rows().len(), fresh.engine.rows().len(), "nothing is left of the old rows");
    assert_eq!(world.disk.files(), [Path::new(BASE)]);
}

#[test]
fn promise_4_a_crash_after_any_step_of_an_install_leaves_the_old_rows_or_the_new_ones_with_their_base() {
    let (source, entries) = (source(), script(1, LAST));
    let (mut old, mut new) = (0, 0);
    for kept in [None, Some(0), Some(1), Some(2)] {
        for step in 0.. {
            let mut world = World::new();
            let (store, shard) = behind(&world);
            world.fuse.burn_after(step);
            let installed = install(&store, &shard, &source);
            let done = !world.fuse.burnt();
            assert!(!done || installed.is_ok());
            drop((shard, store));
            world.fuse.repair();
            let batches = world.engine.batches_not_durable();
            match kept {
                None => (world.disk, _) = (world.disk.restart(), world.engine.crash(batches)),
                Some(0) => (world.disk, _) = (world.disk.power_cut(), world.engine.crash(0)),
                Some(seed) => (world.disk, _) = (world.disk.torn_power_cut(seed), world.engine.crash(batches / 2)),
            }
            let _ = world.disk.remove(Path::new("store/suspect"));
            for again in [false, true] {
                let store = world.open().unwrap();
                let shard = store.open_shard(1, GROUP, LogReach { purged: None, begun: true }).unwrap();
                let at = shard.checkpointed().unwrap() as usize + 1;
                if !again {
                    assert!([OLD / 2, NEW].contains(&at), "kept {kept:?}, step {step}: at {at}");
                    assert!(!done || at == NEW);
                    (old, new) = (old + usize::from(at != NEW), new + usize::from(at == NEW));
                    assert_eq!(shard.based(), (at == NEW).then_some(NEW as u64 - 1), "kept {kept:?}, step {step}");
                }
                assert_eq!(differs(&shard, &entries, at), None, "kept {kept:?}, step {step}");
                replay(&shard, &entries, LAST).unwrap();
                assert_eq!(differs(&shard, &entries, LAST), None);
                store.checkpoint(Which::All).unwrap();
                while store.sweep().unwrap() {}
                assert!(world.disk.files().iter().all(|path| path == Path::new(BASE)), "{:?}", world.disk.files());
            }
            if done {
                assert!(step > 12, "taking the snapshot of this test has only {step} steps");
                break;
            }
        }
    }
    assert!(old > 20 && new > 8, "{old} {new}");
}

#[test]
fn what_is_staged_and_not_switched_to_is_seen_by_nobody_and_swept() {
    let (world, source, entries) = (World::new(), source(), script(1, LAST));
    let (store, shard) = behind(&world);
    let staged = receive(&store, &shard, &source).unwrap().finish(|_| ()).unwrap();
    assert_eq!(differs(&shard, &entries, OLD), None);
    assert!(matches!(begin(&store, &shard, &source), Err(StoreError::Busy { .. })), "one at a time");
    assert!(store.checkpoint(Which::All).unwrap().seals.is_empty(), "the shard is kept out");
    drop(staged);
    assert_eq!(store.checkpoint(Which::All).unwrap().seals.len(), 1);
    while store.sweep().unwrap() {}
    assert_eq!(differs(&shard, &entries, OLD), None);
    drop((store, shard));
    let again = world.open().unwrap();
    assert_eq!(differs(&again.shard(1).unwrap(), &entries, OLD), None);
}

#[test]
fn an_old_generation_that_is_swept_takes_nothing_of_one_that_is_staged_meanwhile() {
    let (world, source, entries) = (World::new(), source(), script(1, LAST));
    {
        let (store, shard) = behind(&world);
        // As a crash leaves it: staged rows without an owner.
        std::mem::forget(receive(&store, &shard, &source).unwrap().finish(|_| ()).unwrap());
    }
    let store = Arc::new(world.open().unwrap());
    let shard = store.open_shard(1, GROUP, LogReach { purged: None, begun: true }).unwrap();
    let staged = receive(&store, &shard, &source).unwrap().finish(|_| ()).unwrap();
    while store.sweep().unwrap() {}
    staged.switch().unwrap();
    while store.sweep().unwrap() {}
    assert_eq!(differs(&shard, &entries, NEW), None);
}

#[test]
fn promise_5_a_snapshot_whose_rows_are_not_what_its_head_tells_of_is_not_staged() {
    let (world, source, entries) = (World::new(), source(), script(1, LAST));
    let (store, shard) = behind(&world);
    let mut incoming = begin(&store, &shard, &source).unwrap();
    let (mut place, mut chunks) = (source.begin(), Vec::new());
    while let Some(chunk) = source.chunk(&mut place).unwrap() {
        chunks.push(chunk.to_vec());
    }
    let last = chunks.last_mut().unwrap();
    let len = last.len();
    last[len - 1] ^= 1;
    chunks.iter().for_each(|chunk| incoming.chunk(chunk).unwrap());
    match incoming.finish(|_| ()) {
        Err(StoreError::Base { path, .. }) => assert_eq!(path, Path::new("store/0000000000000001.got")),
        other => panic!("{other:?}"),
    }
    assert_eq!(differs(&shard, &entries, OLD), None);
    assert!(incoming_is_possible(&store, &shard, &source));
}

fn incoming_is_possible(store: &Arc<Store>, shard: &Arc<ShardStore>, source: &BaseFile) -> bool {
    begin(store, shard, source).is_ok()
}

#[test]
fn promise_6_an_engine_that_refuses_once_only_delays_a_snapshot() {
    let (world, source, entries) = (World::new(), source(), script(1, LAST));
    let (store, shard) = behind(&world);
    let staged = receive(&store, &shard, &source).unwrap().finish(|_| ()).unwrap();
    world.engine.refuse_once();
    staged.switch().unwrap();
    assert_eq!(differs(&shard, &entries, NEW), None);
    let incoming = receive(&store, &shard, &source).unwrap();
    world.engine.refuse_once();
    assert!(incoming.finish(|_| ()).is_err());
    install(&store, &shard, &source).unwrap();
    assert_eq!(differs(&shard, &entries, NEW), None);
}

#[test]
fn promise_6_a_snapshot_or_a_base_that_does_not_fit_the_disk_is_not_begun() {
    let (world, source, entries) = (World::new(), source(), script(1, LAST));
    let (store, shard) = behind(&world);
    install(&store, &shard, &source).unwrap();
    replay(&shard, &entries, LAST).unwrap();
    store.checkpoint(Which::All).unwrap();
    world.disk.set_space(Space { free: source.bytes(), total: 1 << 40 });
    assert!(matches!(begin(&store, &shard, &source), Err(StoreError::Disk { .. })));
    assert!(matches!(store.write_base(&shard, GROUP), Err(StoreError::Disk { .. })));
    assert_eq!(world.disk.files(), [Path::new(BASE)]);
    world.disk.set_space(Space { free: 3 * source.bytes(), total: 1 << 40 });
    assert!(store.write_base(&shard, GROUP).unwrap().is_some());
    assert!(begin(&store, &shard, &source).is_ok());
}

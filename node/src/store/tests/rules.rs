//! What a node relies on: what reaches sled and when, errors that pass, replicas that go.

use super::*;
use crate::store::{Pressure, Which, row};

fn put(key: String) -> Write {
    Write::Put { key: key.into(), value: vec![7; 1024].into(), fresh: true }
}

#[test]
fn must_hold_messages_that_are_acked_between_two_checkpoints_leave_sled_as_it_was() {
    let world = World::new();
    let store = world.open().unwrap();
    let shard = store.shard(1).unwrap();
    shard.commit(mark(0), vec![put("waiting".into())]).unwrap();
    store.checkpoint(Which::All).unwrap();
    let head = row::generation_start(1, 0);
    let but_head = |rows: Vec<(Bytes, Bytes)>| rows.into_iter().filter(|(key, _)| *key != head).collect::<Vec<_>>();
    let before = but_head(world.engine.rows());
    let hash = shard.hash();
    let mut index = 0;
    for message in 0u32..10_000 {
        index += 1;
        shard.commit(mark(index), vec![put(format!("m{message}")), put(format!("x{message}"))]).unwrap();
        // The device is attached, but fifty messages are on their way to it.
        if let Some(acked) = message.checked_sub(50) {
            index += 1;
            let gone = ["m", "x"].map(|family| Write::Remove { key: format!("{family}{acked}").into() });
            shard.commit(mark(index), gone.into()).unwrap();
        }
    }
    for acked in 9_950..10_000 {
        index += 1;
        let gone = ["m", "x"].map(|family| Write::Remove { key: format!("{family}{acked}").into() });
        shard.commit(mark(index), gone.into()).unwrap();
    }
    let done = store.checkpoint(Which::All).unwrap();
    assert_eq!(done.operations, 1, "only the head is written");
    assert_eq!(but_head(world.engine.rows()), before);
    assert_eq!((shard.hash(), shard.checkpointed(), shard.bytes()), (hash, Some(index as u64), 0));
}

#[test]
fn promise_6_a_full_disk_only_delays_a_checkpoint() {
    let world = World::new();
    let store = world.open().unwrap();
    let shard = store.shard(1).unwrap();
    let entries = script(5, 90);
    replay(&shard, &entries, 30).unwrap();
    world.disk.fill(true);
    assert!(matches!(store.checkpoint(Which::All), Err(StoreError::Disk { .. })));
    replay(&shard, &entries, 60).unwrap();
    world.disk.fill(false);
    world.disk.fail_syncs(true);
    assert!(matches!(store.checkpoint(Which::All), Err(StoreError::Disk { .. })));
    assert_eq!(differs(&shard, &entries, 60), None);
    world.disk.fail_syncs(false);
    replay(&shard, &entries, 90).unwrap();
    assert_eq!(store.checkpoint(Which::All).unwrap().seals.len(), 1);
    assert_eq!(store.memtable_bytes(), 0);
    let store = world.open().unwrap();
    assert_eq!(differs(&store.shard(1).unwrap(), &entries, 90), None);
}

#[test]
fn an_engine_that_refuses_a_batch_is_opened_again_and_the_checkpoint_ends() {
    let world = World::new();
    let store = world.open().unwrap();
    let shard = store.shard(1).unwrap();
    let entries = script(5, 90);
    replay(&shard, &entries, 90).unwrap();
    world.engine.refuse_once();
    store.checkpoint(Which::All).unwrap();
    world.engine.crash(0);
    assert_eq!(differs(&world.open().unwrap().shard(1).unwrap(), &entries, 90), None);
}

#[test]
fn promise_6_a_checkpoint_that_sled_refuses_goes_on_when_it_takes_it_and_loses_nothing_meanwhile() {
    let world = World::new();
    let store = world.open().unwrap();
    let shard = store.shard(1).unwrap();
    let entries = script(5, 90);
    replay(&shard, &entries, 60).unwrap();
    // Room for the redo file, none for sled: its first batch is refused, and opening it again.
    let steps = (0..).find(|steps| {
        world.fuse.burn_after(*steps);
        let refused = matches!(store.checkpoint(Which::All), Err(StoreError::Engine { .. }));
        world.fuse.repair();
        if !refused {
            // Before that, the redo file itself: nothing happened.
            assert_eq!(shard.checkpointed(), None);
        }
        refused
    });
    assert!(steps.is_some());
    world.fuse.burn_after(0);
    for _ in 0..3 {
        assert!(matches!(store.checkpoint(Which::Due), Err(StoreError::Engine { .. })));
        assert!(store.drop_replica(7).is_err() && store.sweep().is_err());
    }
    // Entries are applied on, and a crash at this moment loses nothing.
    replay(&shard, &entries, 90).unwrap();
    assert_eq!(differs(&shard, &entries, 90), None);
    world.fuse.repair();
    assert_eq!(store.checkpoint(Which::Due).unwrap().seals.len(), 1);
    assert_eq!(store.checkpoint(Which::All).unwrap().seals.len(), 1);
    assert_eq!((store.memtable_bytes(), shard.checkpointed()), (0, Some(89)));
    world.engine.crash(0);
    assert_eq!(differs(&world.open().unwrap().shard(1).unwrap(), &entries, 90), None);
}

#[test]
fn a_store_whose_engine_failed_for_good_stays_broken_until_it_is_opened_anew() {
    let mut broken = 0;
    for step in 0.. {
        let world = World::new();
        let store = world.open().unwrap();
        let entries = script(5, 90);
        replay(&store.shard(1).unwrap(), &entries, 90).unwrap();
        world.fuse.burn_after(step);
        let result = store.checkpoint(Which::All);
        if !world.fuse.burnt() {
            break;
        }
        world.fuse.repair();
        if let Err(StoreError::Broken(_)) = result {
            broken += 1;
            assert!(matches!(store.checkpoint(Which::All), Err(StoreError::Broken(_))));
            assert!(matches!(store.drop_replica(1), Err(StoreError::Broken(_))));
        } else {
            store.checkpoint(Which::All).unwrap();
        }
        assert_eq!(differs(&store.shard(1).unwrap(), &entries, 90), None);
        drop(store);
        let store = world.open().unwrap();
        let shard = store.shard(1).unwrap();
        replay(&shard, &entries, 90).unwrap();
        assert_eq!(differs(&shard, &entries, 90), None);
    }
    // Only the sync itself is never tried again.
    assert_eq!(broken, 1);
}

#[test]
fn checkpoints_are_due_by_age_and_rest_nine_times_what_they_took() {
    let world = World::new();
    let clock = Arc::new(Ticking::new(Duration::from_secs(1)));
    let config = StoreConfig { checkpoint_age: Duration::from_secs(30), ..config() };
    let disk = Arc::new(world.disk.clone());
    let store = Store::open_with(config, disk, clock.clone(), world.engine.clone()).unwrap();
    let shard = store.shard(1).unwrap();
    let moved = || store.checkpoint(Which::Due).unwrap().seals.len();
    shard.commit(mark(0), vec![]).unwrap();
    assert_eq!(moved(), 0);
    clock.advance(Duration::from_secs(3600));
    assert_eq!(moved(), 1);
    clock.advance(Duration::from_secs(3600));
    assert_eq!(moved(), 0, "nothing changed since");
    // Each look at the clock takes a second here: the cycle took one, the rest is nine.
    shard.commit(mark(1), vec![put("large".into())]).unwrap();
    let config = StoreConfig { checkpoint_bytes: 1, ..self::config() };
    let store = Store::open_with(config, Arc::new(world.disk.clone()), clock.clone(), world.engine.clone()).unwrap();
    let shard = store.shard(1).unwrap();
    let moved = || store.checkpoint(Which::Due).unwrap().seals.len();
    shard.commit(mark(1), vec![put("a".into())]).unwrap();
    assert_eq!(moved(), 1);
    shard.commit(mark(2), vec![put("b".into())]).unwrap();
    assert_eq!(moved(), 0);
    clock.advance(Duration::from_secs(9));
    assert_eq!(moved(), 1);
}

#[test]
fn memory_pressure_is_shared_by_all_shards_and_makes_checkpoints_early() {
    let world = World::new();
    let config = StoreConfig { budget_bytes: 10_000, ..config() };
    let store = world.open_with(config, Ticking::new(Duration::ZERO)).unwrap();
    assert_eq!(store.checkpoint(Which::Due).unwrap().seals.len(), 0);
    for replica in 1..=9 {
        store.shard(replica).unwrap().commit(mark(0), vec![put("a".into())]).unwrap();
        let pressure = match replica {
            1..=4 => Pressure::None,
            5..=8 => Pressure::Early,
            _ => Pressure::Full,
        };
        assert_eq!(store.pressure(), pressure, "{} bytes", store.memtable_bytes());
    }
    assert_eq!(store.checkpoint(Which::Due).unwrap().seals.len(), 9);
    assert_eq!((store.pressure(), store.memtable_bytes()), (Pressure::None, 0));
}

#[test]
fn a_dropped_replica_goes_in_small_batches_and_a_crash_only_delays_it() {
    let world = World::new();
    let store = world.open().unwrap();
    for replica in [1, 2, 3] {
        replay(&store.shard(replica).unwrap(), &script(replica, 200), 200).unwrap();
    }
    store.checkpoint(Which::All).unwrap();
    let held = store.shard(2).unwrap();
    held.commit(mark(200), vec![put("late".into())]).unwrap();
    store.drop_replica(2).unwrap();
    assert_eq!(store.memtable_bytes(), 0);
    assert!(held.get(b"late").is_err());
    assert!(matches!(held.commit(mark(201), vec![]), Err(StoreError::Dropped { replica: 2 })));
    drop(store);
    world.engine.crash(0);
    let store = world.open().unwrap();
    assert_eq!(store.replicas(), [1, 3]);
    assert!(matches!(store.shard(2), Err(StoreError::Dropped { replica: 2 })));
    while store.sweep().unwrap() {}
    world.engine.crash(0);
    assert!(world.engine.rows().iter().all(|(key, _)| row::replica_of(key) != Some(2)));
    let store = world.open().unwrap();
    for replica in [1, 3] {
        assert_eq!(differs(&store.shard(replica).unwrap(), &script(replica, 200), 200), None);
    }
    assert!(!store.sweep().unwrap());
}

#[test]
fn rows_of_a_generation_that_no_head_names_are_swept() {
    let world = World::new();
    let store = world.open().unwrap();
    replay(&store.shard(1).unwrap(), &script(1, 50), 50).unwrap();
    store.checkpoint(Which::All).unwrap();
    let before = world.engine.rows();
    let mut stray = row::generation_start(1, 2);
    stray.extend_from_slice(b"\x01row");
    world.engine.tamper(&stray, Some("an unfinished snapshot".into()));
    let store = world.open().unwrap();
    while store.sweep().unwrap() {}
    assert_eq!(world.engine.rows(), before);
}

#[test]
fn a_commit_that_breaks_a_rule_takes_nothing() {
    let world = World::new();
    let store = world.open().unwrap();
    let shard = store.shard(1).unwrap();
    shard.commit(mark(0), vec![put("a".into())]).unwrap();
    assert!(matches!(shard.commit(mark(0), vec![]), Err(StoreError::Backwards { have: 0, at: 0, .. })));
    assert!(matches!(shard.commit(mark(1), vec![put("a".into())]), Err(StoreError::Refused { .. })));
    assert!(matches!(shard.commit(mark(1), vec![put("k".repeat(401))]), Err(StoreError::Refused { .. })));
    assert_eq!((shard.mark(), rows(&shard).len()), (Some(mark(0)), 1));
}

#[test]
fn a_reader_sees_one_point_in_time_while_rows_move() {
    let world = World::new();
    let store = world.open().unwrap();
    let shard = store.shard(1).unwrap();
    shard.commit(mark(0), vec![Write::Put { key: "a".into(), value: "1".into(), fresh: true }]).unwrap();
    let done = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(std::sync::atomic::Ordering::Relaxed) {
                // One row is always there, now under one key and now under the other.
                assert_eq!(rows(&shard).len(), 1);
                assert_eq!(shard.scan_back(b"", b"\xff", 9).unwrap().len(), 1);
            }
        });
        for index in 1..2_000 {
            let (to, from) = if index % 2 == 1 { ("b", "a") } else { ("a", "b") };
            let put = Write::Put { key: to.into(), value: vec![1; 7_000].into(), fresh: true };
            shard.commit(mark(index), vec![put, Write::Remove { key: from.into() }]).unwrap();
            if index % 7 == 0 {
                store.checkpoint(Which::All).unwrap();
            }
        }
        done.store(true, std::sync::atomic::Ordering::Relaxed);
    });
}

//! Base files: a crash at each step of writing one, and rows that are made again from base and log.

use super::*;
use crate::store::{LogReach, Which, base::BaseFile, row};

const GROUP: u32 = 3;
const FIRST: usize = 60;
const SECOND: usize = 90;
const LAST: usize = 120;
const BASE: &str = "store/0000000000000001.base";

fn reach(purged: usize) -> LogReach {
    LogReach { purged: Some(purged as u64 - 1), begun: true }
}

/// A replica with a base at its first index, whose sled is at the second.
fn based() -> World {
    let world = World::new();
    let store = world.open().unwrap();
    let shard = store.shard(1).unwrap();
    replay(&shard, &script(1, LAST), FIRST).unwrap();
    store.checkpoint(Which::All).unwrap();
    let base = store.write_base(&shard, GROUP).unwrap().unwrap();
    assert_eq!((base.mark, shard.based()), (mark(FIRST - 1), Some(FIRST as u64 - 1)));
    assert_eq!(store.write_base(&shard, GROUP).unwrap(), None, "there is nothing newer");
    replay(&shard, &script(1, LAST), SECOND).unwrap();
    store.checkpoint(Which::All).unwrap();
    world
}

/// Breaks the rows that sled has.
fn break_sled(world: &World) {
    let (key, value) =
        world.engine.rows().into_iter().find(|(key, _)| row::generation_of(key) != Some(0)).expect("there are rows");
    let mut bad = value.to_vec();
    *bad.last_mut().unwrap() ^= 1;
    world.engine.tamper(&key, Some(bad.into()));
}

/// Rebuilds from the base at `at`, replays, and has what a replica has that nothing happened to.
fn rebuilds_from(world: &World, at: usize, purged: usize) {
    let entries = script(1, LAST);
    let store = world.open().unwrap();
    let shard = store.open_shard(1, GROUP, reach(purged)).unwrap();
    assert_eq!(differs(&shard, &entries, at), None);
    replay(&shard, &entries, LAST).unwrap();
    assert_eq!(differs(&shard, &entries, LAST), None);
    store.checkpoint(Which::All).unwrap();
    while store.sweep().unwrap() {}
    drop((shard, store));
    let store = world.open().unwrap();
    assert_eq!(differs(&store.open_shard(1, GROUP, reach(purged)).unwrap(), &entries, LAST), None);
}

#[test]
fn promise_4_a_crash_after_any_step_of_writing_a_base_leaves_one_that_is_whole() {
    for power in [None, Some(None), Some(Some(1)), Some(Some(2)), Some(Some(3))] {
        for step in 0.. {
            let mut world = based();
            let store = world.open().unwrap();
            let shard = store.open_shard(1, GROUP, reach(FIRST)).unwrap();
            world.fuse.burn_after(step);
            let written = store.write_base(&shard, GROUP);
            if !world.fuse.burnt() {
                assert!(step > 4, "writing a base of this test has only {step} steps");
                assert!(written.unwrap().is_some());
                break;
            }
            // What is purged by what this process knows is held by whatever the disk has.
            let purged = shard.based().unwrap() as usize + 1;
            drop((shard, store));
            world.fuse.repair();
            world.disk = match power {
                None => world.disk.restart(),
                Some(None) => world.disk.power_cut(),
                Some(Some(seed)) => world.disk.torn_power_cut(seed),
            };
            let base = BaseFile::open(&world.disk, Path::new(BASE)).unwrap().expect("there was one");
            let at = base.head().seal.mark.index as usize + 1;
            assert!([FIRST, SECOND].contains(&at) && at >= purged, "step {step}");
            break_sled(&world);
            rebuilds_from(&world, at, purged);
            assert!(world.disk.files().iter().all(|path| !path.ends_with("0000000000000001.new")));
        }
    }
}

#[test]
fn promise_5_damaged_rows_are_copied_aside_and_made_again_from_base_and_log() {
    let world = based();
    break_sled(&world);
    rebuilds_from(&world, FIRST, FIRST);
    let aside = world.disk.files().into_iter().filter(|path| path.to_string_lossy().contains("aside")).count();
    assert_eq!(aside, 1, "{:?}", world.disk.files());
}

#[test]
fn promise_5_rows_that_are_gone_or_fell_back_are_made_again() {
    let world = based();
    for (key, _) in world.engine.rows() {
        world.engine.tamper(&key, None);
    }
    rebuilds_from(&world, FIRST, FIRST);
    // As of its first checkpoint, with a log that begins behind it.
    let world = World::new();
    let (store, entries) = (world.open().unwrap(), script(1, LAST));
    let shard = store.shard(1).unwrap();
    replay(&shard, &entries, FIRST).unwrap();
    store.checkpoint(Which::All).unwrap();
    let old = world.engine.rows();
    replay(&shard, &entries, SECOND).unwrap();
    store.checkpoint(Which::All).unwrap();
    store.write_base(&shard, GROUP).unwrap().unwrap();
    drop((shard, store));
    for (key, _) in world.engine.rows() {
        world.engine.tamper(&key, None);
    }
    for (key, value) in old {
        world.engine.tamper(&key, Some(value));
    }
    rebuilds_from(&world, SECOND, SECOND);
}

#[test]
fn without_a_base_a_log_that_reaches_back_to_its_beginning_makes_the_rows_again() {
    let (world, entries) = (World::new(), script(1, LAST));
    let store = world.open().unwrap();
    replay(&store.shard(1).unwrap(), &entries, FIRST).unwrap();
    store.checkpoint(Which::All).unwrap();
    drop(store);
    break_sled(&world);
    let store = world.open().unwrap();
    let shard = store.open_shard(1, GROUP, LogReach { purged: None, begun: true }).unwrap();
    assert_eq!(shard.mark(), None);
    replay(&shard, &entries, LAST).unwrap();
    assert_eq!(differs(&shard, &entries, LAST), None);
}

#[test]
fn promise_5_what_cannot_be_made_again_is_refused_with_what_is_wrong() {
    let refused = |world: &World, reach: LogReach| match world.open().unwrap().open_shard(1, GROUP, reach) {
        Err(error @ StoreError::Lost { replica: 1, .. }) => error.to_string(),
        other => panic!("{other:?}"),
    };
    let world = based();
    break_sled(&world);
    let gap = refused(&world, reach(SECOND));
    assert!(gap.contains("its base is at index 59, the log begins after 89"), "{gap}");
    let len = world.disk.bytes(Path::new(BASE)).len();
    for at in [0, 30, len / 2, len - 1] {
        let copy = world.copy();
        copy.disk.tamper(Path::new(BASE), |bytes| bytes[at] ^= 16);
        let why = refused(&copy, reach(FIRST));
        assert!(why.contains(BASE) && why.contains(" is damaged at byte "), "{why}");
        assert!(why.contains("memory"), "both are named: {why}");
    }
    let bare = world.copy();
    bare.disk.remove(Path::new(BASE)).unwrap();
    assert!(refused(&bare, reach(FIRST)).contains("there is no base file"));
    let nothing = refused(&bare, LogReach::default());
    assert!(nothing.contains("the log holds nothing"), "{nothing}");
}

#[test]
fn a_damaged_base_beside_a_whole_sled_is_written_again() {
    let world = based();
    world.disk.tamper(Path::new(BASE), |bytes| bytes[30] ^= 16);
    let store = world.open().unwrap();
    let shard = store.open_shard(1, GROUP, reach(FIRST)).unwrap();
    assert_eq!((shard.based(), shard.base().map(|base| base.damaged)), (None, Some(true)));
    store.write_base(&shard, GROUP).unwrap().unwrap();
    assert_eq!(shard.based(), Some(SECOND as u64 - 1));
    break_sled(&world);
    rebuilds_from(&world, SECOND, SECOND);
}

#[test]
fn a_base_of_another_group_is_not_taken() {
    let world = based();
    match world.open().unwrap().open_shard(1, GROUP + 1, reach(FIRST)) {
        Err(StoreError::Base { what, .. }) => assert!(what.contains("of group 3, not"), "{what}"),
        other => panic!("{other:?}"),
    };
}

#[test]
fn promise_6_a_base_that_the_disk_refuses_leaves_the_one_before() {
    let world = based();
    let store = world.open().unwrap();
    let shard = store.open_shard(1, GROUP, reach(FIRST)).unwrap();
    let before = world.disk.bytes(Path::new(BASE));
    for refuse in [ForgetfulDisk::fill, ForgetfulDisk::fail_writes, ForgetfulDisk::fail_syncs] {
        refuse(&world.disk, true);
        assert!(matches!(store.write_base(&shard, GROUP), Err(StoreError::Disk { .. })));
        refuse(&world.disk, false);
        assert_eq!(shard.based(), Some(FIRST as u64 - 1));
        assert_eq!(world.disk.bytes(Path::new(BASE)), before);
        assert_eq!(world.disk.files(), [Path::new(BASE)]);
    }
    // Checkpoints go on meanwhile and afterwards, and so do bases.
    replay(&shard, &script(1, LAST), LAST).unwrap();
    assert_eq!(store.checkpoint(Which::All).unwrap().seals.len(), 1);
    assert!(store.write_base(&shard, GROUP).unwrap().is_some());
}

#[test]
fn a_pass_finds_rows_that_sled_lost() {
    let world = based();
    let store = world.open().unwrap();
    let shard = store.open_shard(1, GROUP, reach(FIRST)).unwrap();
    let (key, _) = world.engine.rows().into_iter().find(|(key, _)| row::generation_of(key) == Some(1)).unwrap();
    world.engine.tamper(&key, None);
    assert!(matches!(store.write_base(&shard, GROUP), Err(StoreError::Damaged { replica: 1, .. })));
    assert_eq!(shard.based(), Some(FIRST as u64 - 1));
}

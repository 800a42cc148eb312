//! A crash after each step of a checkpoint: what comes back must be what a store that never crashed holds.

use std::collections::BTreeSet;

use super::*;
use crate::store::Which;

const FIRST: usize = 60;
const LAST: usize = 200;
const REPLICAS: [u64; 2] = [1, 2];

/// What a crash leaves of what was not durable.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Crash {
    /// Nothing.
    Power,
    /// The disk forgets, the engine keeps a part.
    PowerAndHalf,
    /// Some sectors, and all batches of the engine.
    Torn(u64),
    /// Everything: the process was killed.
    Kill,
}

const CRASHES: [Crash; 6] =
    [Crash::Power, Crash::PowerAndHalf, Crash::Torn(1), Crash::Torn(2), Crash::Torn(3), Crash::Kill];

fn scripts() -> [Vec<Vec<Write>>; 2] {
    [script(1, LAST), script(2, LAST)]
}

/// Crashes after `step` steps of the second checkpoint. `None` when it has fewer steps.
fn crash(step: u64, crash: Crash, without_redo: bool) -> Option<World> {
    let scripts = scripts();
    let mut world = World::new();
    let store = world.open().unwrap();
    store.cycle.lock().unwrap().without_redo = without_redo;
    for (replica, entries) in REPLICAS.iter().zip(&scripts) {
        replay(&store.shard(*replica).unwrap(), entries, FIRST).unwrap();
    }
    store.checkpoint(Which::All).unwrap();
    for (replica, entries) in REPLICAS.iter().zip(&scripts) {
        replay(&store.shard(*replica).unwrap(), entries, LAST).unwrap();
    }
    world.fuse.burn_after(step);
    let _ = store.checkpoint(Which::All);
    if !world.fuse.burnt() {
        return None;
    }
    // Whatever happened, reads of the store that still runs see what was applied.
    for (replica, entries) in REPLICAS.iter().zip(&scripts) {
        assert_eq!(differs(&store.shard(*replica).unwrap(), entries, LAST), None);
    }
    drop(store);
    world.fuse.repair();
    let batches = world.engine.batches_not_durable();
    match crash {
        Crash::Power => (world.disk, _) = (world.disk.power_cut(), world.engine.crash(0)),
        Crash::PowerAndHalf => (world.disk, _) = (world.disk.power_cut(), world.engine.crash(batches / 2)),
        Crash::Torn(seed) => (world.disk, _) = (world.disk.torn_power_cut(seed), world.engine.crash(batches)),
        Crash::Kill => (world.disk, _) = (world.disk.restart(), world.engine.crash(batches)),
    }
    Some(world)
}

/// Opens what the crash left, replays the log, checkpoints and opens again; says what is not as it must be.
fn judge(world: &World) -> Result<(), String> {
    let scripts = scripts();
    for again in [false, true] {
        let store = world.open().map_err(|e| e.to_string())?;
        assert!(world.disk.files().is_empty(), "no redo file outlives the open");
        for (replica, entries) in REPLICAS.iter().zip(&scripts) {
            let shard = store.shard(*replica).map_err(|e| e.to_string())?;
            let at = shard.checkpointed().unwrap() as usize + 1;
            let possible: &[usize] = if again { &[LAST] } else { &[FIRST, LAST] };
            if !possible.contains(&at) {
                return Err(format!("replica {replica} came back at {at}"));
            }
            if let Some(what) = differs(&shard, entries, at) {
                return Err(format!("replica {replica} at {at}: {what}"));
            }
            replay(&shard, entries, LAST).map_err(|e| e.to_string())?;
            if let Some(what) = differs(&shard, entries, LAST) {
                return Err(format!("replica {replica} after the replay: {what}"));
            }
        }
        store.checkpoint(Which::All).map_err(|e| e.to_string())?;
    }
    Ok(())
}

#[test]
fn promise_4_a_crash_after_any_step_of_a_checkpoint_leaves_one_log_index_per_replica() {
    for kind in CRASHES {
        let mut steps = 0;
        while let Some(world) = crash(steps, kind, false) {
            judge(&world).unwrap_or_else(|what| panic!("{kind:?} after step {steps}: {what}"));
            steps += 1;
        }
        // create, write, sync, sync of the directory; batches; sync; removal, sync of the directory.
        assert!(steps > 10, "the checkpoint of this test has only {steps} steps");
    }
}

#[test]
fn without_the_redo_file_the_same_comparison_fails() {
    let mut failed = BTreeSet::new();
    for kind in CRASHES {
        let mut steps = 0;
        while let Some(world) = crash(steps, kind, true) {
            if judge(&world).is_err() {
                failed.insert(kind);
            }
            steps += 1;
        }
    }
    // When the engine forgets every batch that was not made durable, there is nothing half done.
    let expected = BTreeSet::from([Crash::PowerAndHalf, Crash::Torn(1), Crash::Torn(2), Crash::Torn(3), Crash::Kill]);
    assert_eq!(failed, expected);
}

#[test]
fn promise_5_a_damaged_redo_file_never_leads_to_wrong_rows() {
    // The file is complete and sled holds about half of it.
    let world = (0..)
        .map_while(|step| crash(step, Crash::Kill, false))
        .find(|world| !world.disk.files().is_empty() && world.engine.batches_not_durable() == 0 && half_done(world))
        .unwrap();
    let len = world.disk.bytes(Path::new(REDO)).len();
    let mut rng = StdRng::seed_from_u64(3);
    let mut refused = 0;
    for round in 0..120 {
        let copy = world.copy();
        let at = if round < 60 { round } else { rng.random_range(0..len) };
        copy.disk.tamper(Path::new(REDO), |bytes| match round % 3 {
            0 => bytes.truncate(at),
            _ => bytes[at] ^= 1 << rng.random_range(0..8),
        });
        refused += usize::from(judge(&copy).is_err_and(|what| {
            assert!(what.contains("is damaged in memory"), "{what}");
            true
        }));
    }
    assert_eq!(refused, 120, "sled holds half of the delta: without the file no replica of it may be served");
    judge(&world).unwrap();
}

/// Whether the engine fits neither index of replica 1, the first that a cycle moves.
fn half_done(world: &World) -> bool {
    let copy = world.copy();
    copy.disk.remove(Path::new(REDO)).unwrap();
    let store = copy.open().unwrap();
    store.shard(1).is_err()
}

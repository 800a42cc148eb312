//! Rows that are not what was written are refused, and only the replica they belong to.

use super::*;
use crate::store::{Which, row};

fn checkpointed() -> World {
    let world = World::new();
    let store = world.open().unwrap();
    for replica in [1, 2] {
        replay(&store.shard(replica).unwrap(), &script(replica, 40), 40).unwrap();
    }
    store.checkpoint(Which::All).unwrap();
    world
}

fn refused(world: &World) {
    let store = world.open().unwrap();
    assert!(matches!(store.shard(1), Err(StoreError::Damaged { replica: 1, .. })));
    assert_eq!(differs(&store.shard(2).unwrap(), &script(2, 40), 40), None);
}

#[test]
fn promise_5_a_flipped_bit_in_sled_is_refused_with_its_replica_and_place() {
    let world = checkpointed();
    let mine = world.engine.rows().into_iter().filter(|(key, _)| row::replica_of(key) == Some(1));
    for (key, value) in mine {
        let copy = world.copy();
        let mut bad = value.to_vec();
        let last = bad.len() - 1;
        bad[last] ^= 4;
        copy.engine.tamper(&key, Some(bad.into()));
        refused(&copy);
    }
}

#[test]
fn promise_5_a_row_that_sled_lost_is_noticed_and_so_is_a_head() {
    let world = checkpointed();
    for (key, _) in world.engine.rows().into_iter().filter(|(key, _)| row::replica_of(key) == Some(1)) {
        let copy = world.copy();
        copy.engine.tamper(&key, None);
        refused(&copy);
    }
}

#[test]
fn promise_5_a_row_that_sled_brings_back_is_noticed() {
    let world = World::new();
    let store = world.open().unwrap();
    let shard = store.shard(1).unwrap();
    shard.commit(mark(0), vec![Write::Put { key: "a".into(), value: "1".into(), fresh: true }]).unwrap();
    store.checkpoint(Which::All).unwrap();
    let old = world.engine.rows();
    shard.commit(mark(1), vec![Write::Remove { key: "a".into() }]).unwrap();
    store.checkpoint(Which::All).unwrap();
    assert_eq!(world.engine.rows().len(), 1);
    world.engine.tamper(&old[1].0, Some(old[1].1.clone()));
    assert!(matches!(world.open().unwrap().shard(1), Err(StoreError::Damaged { replica: 1, .. })));
}

#[test]
fn promise_5_a_read_error_is_an_error_and_a_commit_that_meets_it_takes_nothing() {
    let world = checkpointed();
    let store = world.open().unwrap();
    let shard = store.shard(1).unwrap();
    let (key, _) = rows(&shard)[0].clone();
    let (physical, _) = world.engine.rows().into_iter().find(|(physical, _)| physical.ends_with(&key)).unwrap();
    world.engine.tamper(&physical, Some("rubbish".into()));
    assert!(shard.get(&key).is_err());
    assert!(shard.scan(b"", b"\xff", 5).is_err());
    let (before, hash) = (shard.mark(), shard.hash());
    let other = Write::Put { key: "other".into(), value: "1".into(), fresh: true };
    assert!(matches!(shard.commit(mark(40), vec![other, Write::Remove { key }]), Err(StoreError::Damaged { .. })));
    assert_eq!((shard.mark(), shard.hash(), shard.get(b"other").unwrap()), (before, hash, None));
}

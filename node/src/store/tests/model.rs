//! A replica's rows are an ordered map, whatever lies where.

use proptest::{collection::vec, prelude::*};

use super::*;
use crate::store::Which;

#[derive(Debug, Clone)]
enum Step {
    Put(u8, usize),
    Remove(u8),
    Append(u8, usize),
    Scan(u8, u8, usize),
    Checkpoint,
    FailedCheckpoint,
    Reopen,
}

fn step() -> impl Strategy<Value = Step> {
    let key = 0u8..24;
    prop_oneof![
        6 => (key.clone(), prop_oneof![9 => 0usize..50, 1 => 6_000usize..20_000]).prop_map(|(k, l)| Step::Put(k, l)),
        5 => key.clone().prop_map(Step::Remove),
        3 => (key.clone(), prop_oneof![9 => 0usize..50, 1 => 3_000usize..9_000]).prop_map(|(k, l)| Step::Append(k, l)),
        4 => (key.clone(), key, 0usize..12).prop_map(|(a, b, l)| Step::Scan(a, b, l)),
        2 => Just(Step::Checkpoint),
        1 => Just(Step::FailedCheckpoint),
        1 => Just(Step::Reopen),
    ]
}

fn key(of: u8) -> Bytes {
    // Keys of different length, some a prefix of another.
    Bytes::from(vec![b'k'; usize::from(of % 4) + 1].into_iter().chain([of]).collect::<Vec<_>>())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    #[test]
    fn a_replica_reads_as_an_ordered_map(steps in vec(step(), 1..120)) {
        let world = World::new();
        let mut store = world.open().unwrap();
        let mut shard = store.shard(1).unwrap();
        let mut model = Model::new();
        let mut log = Vec::new();
        for (at, step) in steps.into_iter().enumerate() {
            let fill = at as u8;
            let write = match step {
                Step::Put(k, len) => {
                    let fresh = !model.contains_key(&key(k)[..]);
                    Write::Put { key: key(k), value: vec![fill; len].into(), fresh }
                }
                Step::Remove(k) => Write::Remove { key: key(k) },
                Step::Append(k, len) => Write::Append { key: key(k), tail: vec![fill; len].into() },
                Step::Scan(a, b, limit) => {
                    let (from, to) = (key(a), key(b));
                    let within = |k: &Vec<u8>| k[..] >= from[..] && k[..] < to[..];
                    let want = model.iter().filter(|(k, _)| within(k)).map(|(k, v)| (Bytes::from(k.clone()), Bytes::from(v.clone())));
                    let got = shard.scan(&from, &to, limit).unwrap();
                    prop_assert_eq!(got, want.clone().take(limit).collect::<Vec<_>>());
                    let got = shard.scan_back(&from, &to, limit).unwrap();
                    prop_assert_eq!(got, want.rev().take(limit).collect::<Vec<_>>());
                    continue;
                }
                Step::Checkpoint => {
                    store.checkpoint(Which::All).unwrap();
                    prop_assert_eq!(shard.checkpointed(), shard.mark().map(|mark| mark.index));
                    prop_assert_eq!(store.memtable_bytes(), 0);
                    continue;
                }
                Step::FailedCheckpoint => {
                    world.disk.fill(true);
                    let _ = store.checkpoint(Which::All);
                    world.disk.fill(false);
                    continue;
                }
                Step::Reopen => {
                    drop(store);
                    world.engine.crash(0);
                    store = world.open().unwrap();
                    shard = store.shard(1).unwrap();
                    replay(&shard, &log, log.len()).unwrap();
                    continue;
                }
            };
            apply(&mut model, std::slice::from_ref(&write));
            shard.commit(mark(log.len()), vec![write.clone()]).unwrap();
            log.push(vec![write]);
        }
        if !log.is_empty() {
            prop_assert_eq!(differs(&shard, &log, log.len()), None);
        }
    }
}

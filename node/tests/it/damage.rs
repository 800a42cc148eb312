//! Bits that flip on the disk: what was once synced is refused with its place, and never served.

use std::sync::Arc;

use bytes::Bytes;
use martlet_node::{
    clock::SystemClock,
    disk::forgetful::ForgetfulDisk,
    log::{Log, LogError},
    state::{Rows, Write},
    store::{Mark, Store, StoreConfig, Which, engine::Engine, memory::MemoryEngine},
};

use crate::log::{IDLE, append, config, entry, open};

#[tokio::test]
async fn promise_5_a_bit_flipped_in_a_synced_entry_is_refused_with_its_place() {
    let disk = ForgetfulDisk::new();
    let (log, _) = open(&disk);
    for index in 0..3 {
        append(&log.group(IDLE), vec![entry(index, 40)]).await.unwrap();
    }
    let mut in_use = disk.files().into_iter().filter(|path| disk.bytes(path)[12] == 1);
    let path = in_use.next().unwrap();
    // In the payload of the first entry: two drains were synced after it.
    let at = disk.bytes(&path).windows(40).position(|bytes| bytes == entry(0, 40).payload).unwrap();
    let disk = disk.power_cut();
    disk.tamper(&path, |bytes| bytes[at + 7] ^= 4);
    match Log::open(config(), Arc::new(disk)) {
        Err(LogError::Damaged { file, offset, .. }) => {
            assert_eq!(file, path.file_name().unwrap().to_string_lossy());
            assert!(offset <= at as u64 && at as u64 - offset < 64, "{offset} is not {at}");
        }
        other => panic!("a changed entry was taken: {other:?}"),
    }
}

#[test]
fn promise_5_a_bit_flipped_in_a_stored_row_is_never_read() {
    let engine = Arc::new(MemoryEngine::default());
    let config = StoreConfig { dir: "store".into(), ..StoreConfig::default() };
    let store =
        Store::open_with(config, Arc::new(ForgetfulDisk::new()), Arc::new(SystemClock), engine.clone()).unwrap();
    let rows = store.shard(1).unwrap();
    let (key, value) = (Bytes::from_static(b"a key"), Bytes::from_static(b"what was written"));
    let write = Write::Put { key: key.clone(), value: value.clone(), fresh: true };
    rows.commit(Mark { index: 1, bytes: Bytes::new() }, vec![write]).unwrap();
    store.checkpoint(Which::All).unwrap();
    assert_eq!(rows.get(&key).unwrap(), Some(value));

    let stored = engine.scan(&[], &[0xff; 32], usize::MAX).unwrap();
    let (physical, bytes) = stored.into_iter().find(|(physical, _)| physical.ends_with(&key)).unwrap();
    let mut changed = bytes.to_vec();
    *changed.last_mut().unwrap() ^= 1;
    engine.tamper(&physical, Some(changed.into()));
    let refused = rows.get(&key).unwrap_err().to_string();
    let scanned = rows.scan(&[], &[0xff], 9);
    assert!(scanned.is_err(), "{scanned:?}");
    assert!(!refused.is_empty());
}

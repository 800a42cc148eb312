//! A commit and the end of a checkpoint at once: the frozen level must not go between what a commit reads and what it writes.

use std::{
    sync::mpsc::{Receiver, SyncSender, sync_channel},
    thread,
};

use super::*;
use crate::store::{
    Which,
    engine::{Engine, EngineError, Op, PhysicalRows},
};

/// Longest that a commit waits here for the checkpoint to end beside it, which it must not.
const BESIDE: Duration = Duration::from_millis(300);

/// An engine that is made durable when it is told so.
#[derive(Debug)]
struct Gated {
    engine: Arc<MemoryEngine>,
    reached: SyncSender<()>,
    gate: Mutex<Receiver<()>>,
}

impl Engine for Gated {
    fn path(&self) -> &Path {
        self.engine.path()
    }

    fn get(&self, key: &[u8]) -> Result<Option<Bytes>, EngineError> {
        self.engine.get(key)
    }

    fn scan(&self, from: &[u8], to: &[u8], limit: usize) -> Result<PhysicalRows, EngineError> {
        self.engine.scan(from, to, limit)
    }

    fn scan_back(&self, from: &[u8], to: &[u8], limit: usize) -> Result<PhysicalRows, EngineError> {
        self.engine.scan_back(from, to, limit)
    }

    fn batch(&self, ops: &[Op]) -> Result<(), EngineError> {
        self.engine.batch(ops)
    }

    fn make_durable(&self) -> Result<(), EngineError> {
        self.reached.send(()).unwrap();
        self.gate.lock().unwrap().recv().unwrap();
        self.engine.make_durable()
    }

    fn reopen(&self) -> Result<(), EngineError> {
        self.engine.reopen()
    }
}

/// A clock that, once armed, lets the checkpoint end at the next look and waits for that. A commit looks at it after it has read
/// what it replaces and before it writes.
#[derive(Debug, Default)]
struct Meanwhile(Mutex<Option<(SyncSender<()>, Receiver<()>)>>);

impl Clock for Meanwhile {
    fn now(&self) -> Instant {
        let armed = self.0.lock().unwrap().take();
        if let Some((gate, ended)) = armed {
            gate.send(()).unwrap();
            // Not in time: it waits for the commit, as it must.
            let _ = ended.recv_timeout(BESIDE);
        }
        SystemClock.now()
    }

    fn wall_ms(&self) -> u64 {
        0
    }
}

#[test]
fn must_hold_a_commit_replaces_what_it_read_also_when_a_checkpoint_ends_beside_it() {
    let replacing = [
        Write::Put { key: "k".into(), value: "new".into(), fresh: false },
        Write::Remove { key: "k".into() },
        Write::Append { key: "k".into(), tail: "er".into() },
    ];
    for write in replacing {
        let entries =
            [vec![Write::Put { key: "k".into(), value: "old".into(), fresh: true }], vec![write.clone()], vec![]];
        let world = World::new();
        let ((reached, at_gate), (gate, opened)) = (sync_channel(16), sync_channel(16));
        let engine = Gated { engine: world.engine.clone(), reached, gate: Mutex::new(opened) };
        let clock = Arc::new(Meanwhile::default());
        let disk = Arc::new(world.disk.clone());
        let store = Arc::new(Store::open_with(config(), disk, clock.clone(), Arc::new(engine)).unwrap());
        let shard = store.shard(1).unwrap();
        shard.commit(mark(0), entries[0].clone()).unwrap();

        let (ended, end) = sync_channel(1);
        let checkpointing = {
            let store = store.clone();
            thread::spawn(move || {
                store.checkpoint(Which::All).unwrap();
                // Whoever waited has perhaps gone on.
                let _ = ended.send(());
            })
        };
        at_gate.recv().unwrap();
        *clock.0.lock().unwrap() = Some((gate.clone(), end));
        shard.commit(mark(1), entries[1].clone()).unwrap();
        checkpointing.join().unwrap();
        assert_eq!(differs(&shard, &entries, 2), None, "{write:?}");

        gate.send(()).unwrap();
        store.checkpoint(Which::All).unwrap();
        drop((shard, store));
        let shard = world.open().unwrap().shard(1).unwrap();
        assert_eq!(differs(&shard, &entries, 2), None, "{write:?}, opened again");
    }
}

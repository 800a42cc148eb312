//! The base files of the store as the snapshots of Raft, and what is counted of them.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;

use crate::{
    log::GroupId,
    metrics::{Metrics, TransferLabel},
    raft::snapshot::{Described, Incoming, Outgoing, Snapshots, Staged, Way},
    store::{
        self, Mark, Seal, ShardStore, Store,
        base::{BaseFile, BaseHead, Place},
    },
};

/// Snapshots of one replica.
#[derive(Debug)]
pub(crate) struct StoreSnapshots {
    pub(crate) store: Arc<Store>,
    pub(crate) rows: Arc<ShardStore>,
    pub(crate) group: GroupId,
    pub(crate) metrics: Arc<Metrics>,
}

impl Snapshots for StoreSnapshots {
    fn newest(&self) -> Option<Bytes> {
        self.rows.base().filter(|base| !base.damaged).map(|base| base.mark.bytes)
    }

    fn open(&self) -> Result<Option<Box<dyn Outgoing>>, String> {
        let Some(base) = self.store.open_base(&self.rows).map_err(|error| error.to_string())? else { return Ok(None) };
        let (store, rows, place) = (Arc::clone(&self.store), Arc::clone(&self.rows), base.begin());
        Ok(Some(Box::new(Reading { store, rows, base, place })))
    }

    fn receive(&self, told: Described) -> Result<Box<dyn Incoming>, String> {
        let Described { index, mark, rows, sum, bytes } = told;
        if mark.len() > store::MARK_MAX {
            return Err("the mark of the snapshot is too long".to_owned());
        }
        let seal = Seal { mark: Mark { index, bytes: mark }, rows, sum };
        let head = BaseHead { group: self.group.0, replica: self.rows.replica(), seal };
        let incoming = self.store.receive(&self.rows, head, bytes).map_err(|error| error.to_string())?;
        Ok(Box::new(incoming))
    }

    fn begun(&self, way: Way) {
        self.metrics.snapshots_under_way.get_or_create(&way.into()).inc();
    }

    fn ended(&self, way: Way, took: Duration, done: bool) {
        let label = TransferLabel::from(way);
        self.metrics.snapshots_under_way.get_or_create(&label).dec();
        let counted = if done { &self.metrics.snapshots } else { &self.metrics.snapshot_failures };
        counted.get_or_create(&label).inc();
        if done {
            self.metrics.snapshot_seconds.observe(took.as_secs_f64());
        }
    }
}

/// A base that is sent.
#[derive(Debug)]
struct Reading {
    store: Arc<Store>,
    rows: Arc<ShardStore>,
    base: BaseFile,
    place: Place,
}

impl Outgoing for Reading {
    fn described(&self) -> Described {
        let Seal { mark: Mark { index, bytes }, rows, sum } = self.base.head().seal.clone();
        Described { index, mark: bytes, rows, sum, bytes: self.base.bytes() }
    }

    fn chunk(&mut self) -> Result<Option<Bytes>, String> {
        let chunk = self.base.chunk(&mut self.place);
        chunk.map_err(|error| {
            self.store.note_base(&self.rows, &error);
            error.to_string()
        })
    }
}

impl Incoming for store::Incoming {
    fn chunk(&mut self, bytes: &[u8]) -> Result<(), String> {
        store::Incoming::chunk(self, bytes).map_err(|error| error.to_string())
    }

    fn finish(self: Box<Self>, staged: &mut dyn FnMut(u64)) -> Result<Box<dyn Staged>, String> {
        let staged = store::Incoming::finish(*self, staged).map_err(|error| error.to_string())?;
        Ok(Box::new(staged))
    }
}

impl Staged for store::Staged {
    fn switch(self: Box<Self>) -> Result<(), String> {
        store::Staged::switch(*self).map_err(|error| error.to_string())
    }
}

//! The meta state under Raft: takes committed commands, keeps the rows, and leaves the new state with the [`Keeper`].

use std::sync::Arc;

use bytes::Bytes;
use martlet_proto::cluster::meta::MetaCommand;
use prost::Message;

use super::{
    keep::Keeper,
    state::{RowError, State},
};
use crate::{
    raft::{Fault, Index, Machine, MachineError, Reply, snapshot::Staged},
    state::{Rows, RowsError, Write},
    store::{Mark, ShardStore},
};

/// Rows read at once at the start.
const PAGE: usize = 256;

/// Why the state cannot be read back.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// The store refused.
    #[error(transparent)]
    Rows(#[from] RowsError),
    /// A row is none of the state's.
    #[error(transparent)]
    Row(#[from] RowError),
}

/// The meta group's state machine on this node.
#[derive(Debug)]
pub struct MetaMachine {
    state: State,
    rows: Arc<ShardStore>,
    keeper: Keeper,
}

impl MetaMachine {
    /// Reads the state as of the store's mark.
    pub fn load(rows: Arc<ShardStore>, keeper: Keeper) -> Result<Self, LoadError> {
        let state = State::from_rows(all(&*rows)?)?;
        keeper.applied(state.get());
        Ok(Self { state, rows, keeper })
    }

    fn commit(&self, at: Index, mark: Bytes, writes: Vec<Write>) -> Result<(), MachineError> {
        self.rows.commit(Mark { index: at.index, bytes: mark }, writes).map_err(|error| stopped(at, &error))
    }
}

impl Machine for MetaMachine {
    fn mark(&self) -> Option<Bytes> {
        self.rows.mark().map(|mark| mark.bytes)
    }

    fn apply(&mut self, at: Index, mark: Bytes, payload: &Bytes) -> Result<Reply, MachineError> {
        let command = MetaCommand::decode(&payload[..]).map_err(|error| stopped(at, &error))?;
        let mut next = self.state.clone();
        let (answer, rows) = next.apply(at.index, &command);
        let writes = rows.into_iter().map(|row| Write::Put { key: row.key, value: row.value, fresh: false }).collect();
        self.commit(at, mark, writes)?;
        self.state = next;
        self.keeper.applied(self.state.get());
        Ok(Reply::Meta(answer))
    }

    fn install(&mut self, staged: Box<dyn Staged>) -> Result<(), String> {
        staged.switch()?;
        let rows = all(&*self.rows).map_err(|error| error.to_string())?;
        self.state = State::from_rows(rows).map_err(|error| error.to_string())?;
        self.keeper.applied(self.state.get());
        Ok(())
    }

    fn advance(&mut self, at: Index, mark: Bytes) -> Result<(), MachineError> {
        self.commit(at, mark, Vec::new())
    }
}

/// Nothing is skipped in this group: nobody could decide it.
fn stopped(at: Index, error: &dyn std::error::Error) -> MachineError {
    MachineError { at, what: error.to_string(), fault: Fault::Replica }
}

fn all(rows: &dyn Rows) -> Result<Vec<(Bytes, Bytes)>, RowsError> {
    let mut all = Vec::new();
    let mut from = Vec::new();
    loop {
        let page = rows.scan(&from, &[0xff], PAGE)?;
        let full = page.len() == PAGE;
        if let Some((last, _)) = page.last() {
            from = [last, &[0][..]].concat();
        }
        all.extend(page);
        if !full {
            return Ok(all);
        }
    }
}

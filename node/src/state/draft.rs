//! An entry half applied: everything its commands have changed so far.
//!
//! Owns all of it until [`super::State`] takes it over; when a command fails the draft is dropped and nothing has happened.

use martlet_proto::cluster::queue::{Answer, Refusal, answer::Kind};

use super::{dedupe, effect::Effect, overlay::Overlay, rows::Rows};
use crate::store::key::shard::ShardRow;

/// What the commands of one entry work on.
pub(super) struct Draft<'a> {
    /// The rows as the commands so far left them.
    pub(super) rows: Overlay<'a>,
    /// What whoever delivers is to know, in order.
    pub(super) effects: Vec<Effect>,
    /// Operations answered in this entry.
    pub(super) answered: dedupe::Fresh,
    /// The shard's own row; `time_ms` is the time of this entry.
    pub(super) shard: ShardRow,
}

impl<'a> Draft<'a> {
    /// Nothing done yet, over `rows`.
    pub(super) fn new(rows: &'a dyn Rows, shard: ShardRow) -> Self {
        Self { rows: Overlay::over(rows), effects: Vec::new(), answered: dedupe::Fresh::default(), shard }
    }

    /// Shard time, milliseconds since 1970.
    pub(super) fn now_ms(&self) -> u64 {
        self.shard.time_ms
    }
}

/// An answer that refuses.
pub(super) fn refused(refusal: Refusal) -> Answer {
    Answer { kind: Some(Kind::Refusal(refusal as i32)) }
}

//! An entry half applied: everything its commands have changed so far.
//!
//! Owns all of it until [`super::State`] takes it over; when a command fails the draft is dropped and nothing has happened.

use std::collections::BTreeMap;

use martlet_proto::{
    cluster::queue::{Answer, Refusal, answer::Kind},
    message::Sequence,
};

use super::{
    count::CountRow,
    dedupe,
    effect::Effect,
    fan_out::FanOutRoom,
    overlay::Overlay,
    rows::Rows,
    story::Ended,
    warm::{Warm, Warming},
};
use crate::store::key::shard::ShardRow;

/// What the commands of one entry work on.
pub(super) struct Draft<'a> {
    /// The rows as the commands so far left them.
    pub(super) rows: Overlay<'a>,
    /// Busy devices as those rows have them.
    pub(super) warm: Warming<'a>,
    /// Counters that were raised, by sender: written once, when the entry is through.
    pub(super) counts: BTreeMap<String, CountRow>,
    /// What whoever delivers is to know, in order.
    pub(super) effects: Vec<Effect>,
    /// Messages that ended, in order.
    pub(super) ended: Vec<Ended>,
    /// Term of the entry.
    pub(super) term: u64,
    /// Operations answered in this entry.
    pub(super) answered: dedupe::Fresh,
    /// The shard's own row; `time_ms` is the time of this entry.
    pub(super) shard: ShardRow,
    /// What fan-outs did in this entry: it is bounded, however many publishes it brings.
    pub(super) fan_out: FanOutRoom,
    /// Position of the next row that gets one; commands that make many go on from where they were.
    position: u32,
}

impl<'a> Draft<'a> {
    /// Nothing done yet, over `rows`.
    pub(super) fn new(rows: &'a dyn Rows, warm: &'a Warm, shard: ShardRow, term: u64) -> Self {
        Self {
            rows: Overlay::over(rows),
            warm: Warming::over(warm),
            counts: BTreeMap::new(),
            effects: Vec::new(),
            ended: Vec::new(),
            term,
            answered: dedupe::Fresh::default(),
            shard,
            fan_out: FanOutRoom::default(),
            position: 0,
        }
    }

    /// A place in a mailbox for what the command at `at` makes: above all that this entry gave before.
    pub(super) fn place(&mut self, at: Sequence) -> Sequence {
        let position = self.position.max(at.position);
        self.position = position + 1;
        Sequence { position, ..at }
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

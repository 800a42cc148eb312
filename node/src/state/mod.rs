//! The replicated state of a shard, as a pure value: `apply(entry) -> (answers, effects, writes)`.
//!
//! Owns what the commands of the log mean: registrations, mailboxes, limits, expiry, acks, deduplication, counters. Knows
//! nothing of Raft, sled, tokio or clocks: it reads the entry and the shard's rows and nothing else, walks ordered maps only,
//! and so comes to the same result on every replica. Time is shard time, stamped into each entry by the leader; it never
//! falls. The caller carries out the writes together, hands the effects to delivery when it leads, and sends the answers.
//!
//! The invariant: an entry happens whole or not at all. Commands work on a draft over the rows; the resident part changes
//! only after the last of them. A malformed operation is answered so; a row that is not what it should be, a command that
//! this program does not know, or a panic stops the replica: going on would be guessing.
//!
//! Not yet: receipts and upstream have no commands.

mod ack;
mod body;
mod collapse;
mod count;
mod dedupe;
mod device;
mod draft;
mod effect;
mod enqueue;
mod expiry;
mod failure;
mod fan_out;
mod group;
pub mod mailbox;
pub mod memory;
mod overflow;
mod overlay;
pub mod publish;
mod recall;
mod registry;
mod rows;
mod story;
mod topic;
mod version;
mod warm;

#[cfg(test)]
mod tests;

use std::panic::{AssertUnwindSafe, catch_unwind};

use martlet_proto::{
    cluster::{
        command::{Command, Entry, Stamped, command},
        queue::{Answer, Check, GroupGet, Operation, Publish, Refusal, TokenInfo, operation},
    },
    message::Sequence,
};

pub(crate) use self::device::day;
use self::draft::{Draft, refused};
pub use self::{
    count::{CountRow, counters},
    effect::Effect,
    failure::ApplyError,
    mailbox::{MailboxRow, waiting},
    rows::{Rows, RowsError, Write},
    story::{End, Ended},
    version::KNOWN as VERSION_KNOWN,
};
use crate::{
    bug, panicked,
    store::key::{self, BadRow},
};

/// The resident part of a shard's state; the rest is its rows.
#[derive(Debug, Clone, PartialEq)]
pub struct State {
    shard: key::shard::ShardRow,
    /// Highest version that is applied here.
    known: u32,
    dedupe: dedupe::Dedupe,
    warm: warm::Warm,
}

/// What an entry did.
#[derive(Debug, Clone, PartialEq)]
pub struct Applied {
    /// One for each command of the entry; operations have an answer, the leader's own commands none.
    pub answers: Vec<Option<Answer>>,
    /// For whoever delivers, in the order in which it happened.
    pub effects: Vec<Effect>,
    /// Messages that are over, in the order in which they ended.
    pub ended: Vec<Ended>,
    /// To be carried out together.
    pub writes: Vec<Write>,
}

/// Why the state cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// The rows cannot be read.
    #[error(transparent)]
    Rows(#[from] RowsError),
    /// A row is not what its family says.
    #[error(transparent)]
    BadRow(#[from] BadRow),
    /// The shard is ahead of this program.
    #[error("the shard has state version {found}, this program knows up to {known}")]
    Version {
        /// Of the shard.
        found: u32,
        /// Of the program.
        known: u32,
    },
    /// A command that this program does not know.
    #[error("the entry holds a command that is unknown here")]
    UnknownCommand,
    /// Rows contradict each other.
    #[error("the rows contradict each other: {0}")]
    Broken(&'static str),
    /// A command panicked: a defect of this program.
    #[error("panicked: {0}")]
    Panicked(String),
}

impl State {
    /// Takes up the state that `rows` hold; no rows are the state of a new shard.
    ///
    /// # Errors
    /// When the rows cannot be read, are not what they should be, or are of a version unknown here.
    pub fn load(rows: &dyn Rows) -> Result<Self, StateError> {
        Self::load_knowing(rows, VERSION_KNOWN)
    }

    /// As [`State::load`], of a program that knows versions up to `known`: for tests of programs older and newer than this one.
    /// What a version beyond [`VERSION_KNOWN`] does is what this one does.
    ///
    /// # Errors
    /// As [`State::load`].
    pub fn load_knowing(rows: &dyn Rows, known: u32) -> Result<Self, StateError> {
        let shard = match rows.get(&key::shard::key())? {
            Some(value) => key::shard::decode(value)?,
            None => key::shard::ShardRow::default(),
        };
        version::check(shard.version, known)?;
        Ok(Self { shard, known, dedupe: dedupe::Dedupe::load(rows)?, warm: warm::Warm::default() })
    }

    /// Takes up other rows instead of those before, those of a snapshot.
    ///
    /// # Errors
    /// As [`State::load`]; the state is then as before.
    pub fn replace(&mut self, rows: &dyn Rows) -> Result<(), StateError> {
        *self = Self::load_knowing(rows, self.known)?;
        Ok(())
    }

    /// Applies the entry at log `index` to `rows`, which hold all entries before it and nothing of this one.
    ///
    /// # Errors
    /// When a row cannot be read or is wrong, a command is unknown here, or panics. The state is then as before; the replica stops.
    pub fn apply(&mut self, rows: &dyn Rows, index: u64, entry: &Entry) -> Result<Applied, ApplyError> {
        let mut shard = self.shard;
        shard.time_ms = shard.time_ms.max(entry.shard_time_ms);
        let mut draft = Draft::new(rows, &self.warm, shard, entry.term);
        let mut answers = Vec::with_capacity(entry.commands.len());
        let mut position = 0;
        let commands = catch_unwind(AssertUnwindSafe(|| {
            while let Some(command) = entry.commands.get(position) {
                answers.push(self.command(&mut draft, index, position, command)?);
                position += 1;
            }
            Ok(())
        }));
        // The draft goes with everything in it.
        let done = commands.unwrap_or_else(|panic| Err(StateError::Panicked(panicked::said(&*panic).to_owned())));
        done.map_err(|source| {
            let kind = failure::kind(entry.commands.get(position));
            ApplyError { index, position, kind, source }
        })?;

        count::write(&mut draft);
        let Draft { mut rows, warm, counts: _, effects, ended, answered, shard, .. } = draft;
        let touched = warm.into_touched();
        if shard != self.shard {
            rows.put(key::shard::key(), key::shard::encode(&shard));
        }
        let mut writes = rows.into_writes();
        self.dedupe.take_over(answered, shard.time_ms, shard.dedupe_floor_ms, &mut writes);
        self.warm.take_over(touched);
        self.shard = shard;
        Ok(Applied { answers, effects, ended, writes })
    }

    /// Answers what an `Enqueue` with these fields would be answered, limits apart; changes nothing.
    ///
    /// # Errors
    /// When a row cannot be read or is wrong.
    pub fn check(&self, rows: &dyn Rows, check: &Check) -> Result<Answer, StateError> {
        enqueue::check(rows, self.shard.time_ms, check)
    }

    /// Reads a device group; changes nothing.
    ///
    /// # Errors
    /// When a row cannot be read or is wrong.
    pub fn group(&self, rows: &dyn Rows, get: &GroupGet) -> Result<Answer, StateError> {
        group::get(rows, get)
    }

    /// What a token is, with at most some `bytes_max` of its topics; changes nothing.
    ///
    /// # Errors
    /// When a row cannot be read or is wrong.
    pub fn token_info(&self, rows: &dyn Rows, info: &TokenInfo, bytes_max: usize) -> Result<Answer, StateError> {
        topic::info(rows, self.shard.time_ms, info, bytes_max)
    }

    /// Whether anybody here subscribes to a topic of the publish.
    ///
    /// # Errors
    /// When a row cannot be read or is wrong.
    pub fn has_audience(&self, rows: &dyn Rows, publish: &Publish) -> Result<bool, StateError> {
        fan_out::has_audience(rows, publish)
    }

    /// Publishes at home here that are not over everywhere.
    #[must_use]
    pub fn publishes_open(&self) -> u32 {
        self.shard.publishes_open
    }

    /// Whether a fan-out waits for its next step.
    ///
    /// # Errors
    /// When a row cannot be read or is wrong.
    pub fn fans_out(&self, rows: &dyn Rows) -> Result<bool, StateError> {
        fan_out::is_under_way(rows)
    }

    /// Shard time, milliseconds since 1970: the greatest of any entry applied.
    #[must_use]
    pub fn time_ms(&self) -> u64 {
        self.shard.time_ms
    }

    /// How the state behaves and what it writes.
    #[must_use]
    pub fn version(&self) -> u32 {
        self.shard.version.max(1)
    }

    /// First part of the sequences given now.
    #[must_use]
    pub fn incarnation(&self) -> u32 {
        self.shard.incarnation
    }

    /// Operation ids known, all of them in memory.
    #[must_use]
    pub fn operations_known(&self) -> usize {
        self.dedupe.len()
    }

    /// Shard time from which on the leader has something to `Expire`; nothing when all lasts for ever.
    ///
    /// # Errors
    /// When a row cannot be read or is wrong.
    pub fn next_due_ms(&self, rows: &dyn Rows) -> Result<Option<u64>, StateError> {
        expiry::next_due_ms(rows)
    }

    fn command(
        &self,
        draft: &mut Draft<'_>,
        index: u64,
        position: usize,
        command: &Command,
    ) -> Result<Option<Answer>, StateError> {
        let position =
            u32::try_from(position).map_err(|_| StateError::Broken("an entry of more than 2^32 commands"))?;
        match command.kind.as_ref().ok_or(StateError::UnknownCommand)? {
            command::Kind::Stamped(stamped) => {
                let sequence = Sequence { incarnation: self.shard.incarnation, index, position };
                return self.operation(draft, sequence, stamped).map(Some);
            }
            command::Kind::Acks(acks) => ack::acks(draft, acks)?,
            command::Kind::Expire(expire) => expiry::expire(draft, expire)?,
            command::Kind::Raise(raise) => version::raise(draft, raise.version, self.known)?,
            command::Kind::Seen(seen) => device::seen(draft, seen)?,
            command::Kind::PublishesDone(done) => publish::done(draft, done)?,
            command::Kind::FanStep(step) => {
                let at = Sequence { incarnation: self.shard.incarnation, index, position };
                let limits = step.limits.as_ref().ok_or(StateError::UnknownCommand)?;
                fan_out::step(draft, at, limits)?;
            }
        }
        Ok(None)
    }

    /// A gateway's operation: never malformed enough to stop the replica.
    fn operation(&self, draft: &mut Draft<'_>, sequence: Sequence, stamped: &Stamped) -> Result<Answer, StateError> {
        let Some((operation, limits)) = stamped.operation.as_ref().zip(stamped.limits.as_ref()) else {
            return Ok(refused(Refusal::Malformed));
        };
        let Operation { id, first_try_ms, kind: Some(kind) } = operation else {
            return Ok(refused(Refusal::Malformed));
        };
        let (first_try_ms, window_ms) = (*first_try_ms, limits.dedupe_window_ms);
        if let operation::Kind::Resolve(asked) = kind {
            let Ok(asked) = dedupe::OperationId::try_from(&asked.id[..]) else {
                return Ok(refused(Refusal::Malformed));
            };
            return Ok(dedupe::resolve(&self.dedupe, draft, asked, first_try_ms, window_ms));
        }
        // Known by the publish it names, for longer than operations are.
        if let operation::Kind::FanOut(fan_out) = kind {
            return fan_out::begin(draft, sequence, fan_out, limits);
        }
        let Ok(id) = dedupe::OperationId::try_from(&id[..]) else {
            return Ok(refused(Refusal::Malformed));
        };
        if let Some(answer) = dedupe::admit(&self.dedupe, draft, id, first_try_ms, window_ms) {
            return Ok(answer);
        }
        let answer = match kind {
            operation::Kind::Enqueue(enqueue) if bug::poisons(&enqueue.payload) => panic!("poisoned by a test"),
            operation::Kind::Enqueue(enqueue) => {
                let sequence = draft.place(sequence);
                enqueue::enqueue(draft, sequence, id, stamped, enqueue, limits)?
            }
            operation::Kind::Register(register) => registry::register(draft, register, limits)?,
            operation::Kind::Unregister(unregister) => registry::unregister(draft, unregister)?,
            operation::Kind::GroupChange(change) => group::change(draft, change, limits)?,
            operation::Kind::Subscribe(subscribe) => topic::subscribe(draft, subscribe, limits)?,
            operation::Kind::Unsubscribe(unsubscribe) => topic::unsubscribe(draft, unsubscribe)?,
            operation::Kind::Publish(publish) => publish::publish(draft, sequence, id, publish, limits)?,
            operation::Kind::Recall(recall) => recall::recall(draft, recall)?,
            // The leader answers a Check, GroupGet or TokenInfo from its state; the others were dealt with above.
            operation::Kind::Check(_)
            | operation::Kind::GroupGet(_)
            | operation::Kind::TokenInfo(_)
            | operation::Kind::FanOut(_)
            | operation::Kind::Resolve(_) => refused(Refusal::Malformed),
        };
        // What is malformed stays so: a second try gets the same answer without being remembered.
        if answer != refused(Refusal::Malformed) {
            dedupe::keep(draft, id, &answer);
        }
        Ok(answer)
    }
}

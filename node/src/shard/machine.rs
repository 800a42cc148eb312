//! One replica of a shard: its state over its rows, as the log applies to it, and what its leader reads of it.
//!
//! Owns the join of [`State`], rows, shard time and delivery: an entry's writes are kept together with its mark, then its effects go
//! to delivery, then its answers back to whoever proposed it. The invariant: nobody reads between an entry's state and its rows.

use std::{
    collections::BTreeMap,
    fmt,
    sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard},
    time::Instant,
};

use bytes::Bytes;
use martlet_proto::{
    cluster::{
        command::Entry,
        queue::{Answer, Check, Enqueue, GroupGet, Message, Publish, Refusal, TokenInfo, answer::Kind},
    },
    message::Sequence,
    shard::Shard,
    tag::DeviceTag,
    token::RegistrationId,
};
use prost::Message as _;

use super::{stories::Stories, time::ShardTime};
use crate::{
    clock::Clock,
    delivery::{desk::Desk, window::Waiting},
    metrics::{FateKind, FateLabel, Metrics},
    raft::{Fault, GroupTime, Index, Machine, MachineError, Reply, snapshot::Staged},
    state::{ApplyError, Effect, Ended, MailboxRow, Rows, State, StateError, Write, waiting},
    store::{
        Mark, ShardStore,
        key::{self, publish::HomeRow},
    },
};

/// The rows of one replica, and the mark kept with them.
pub trait Kept: Rows + Send + Sync + fmt::Debug + 'static {
    /// Takes the writes of one applied entry.
    fn commit(&self, mark: Mark, writes: Vec<Write>) -> Result<(), String>;
    /// Up to where reads see.
    fn mark(&self) -> Option<Mark>;
    /// Whether memory for more rows is used up.
    fn must_wait(&self) -> bool {
        false
    }
}

impl Kept for ShardStore {
    fn commit(&self, mark: Mark, writes: Vec<Write>) -> Result<(), String> {
        ShardStore::commit(self, mark, writes).map_err(|error| error.to_string())
    }

    fn mark(&self) -> Option<Mark> {
        ShardStore::mark(self)
    }

    fn must_wait(&self) -> bool {
        ShardStore::must_wait(self)
    }
}

/// What is shared by the machine, which applies, and the leader, which reads.
#[derive(Debug)]
pub struct Replica {
    /// Which shard.
    pub shard: Shard,
    state: RwLock<State>,
    rows: Arc<dyn Kept>,
    time: Mutex<ShardTime>,
    stories: Mutex<Stories>,
    desk: Desk,
    metrics: Arc<Metrics>,
    clock: Arc<dyn Clock>,
}

/// Applies a shard's log.
#[derive(Debug)]
pub struct ShardMachine(pub(super) Arc<Replica>);

impl Replica {
    /// Takes up what `rows` hold, and applies state versions up to `version_known`.
    ///
    /// # Errors
    /// When the rows cannot be read, are wrong, or are of a version beyond.
    pub fn load(
        shard: Shard,
        rows: Arc<dyn Kept>,
        desk: Desk,
        stories: Stories,
        metrics: Arc<Metrics>,
        clock: Arc<dyn Clock>,
        version_known: u32,
    ) -> Result<Self, StateError> {
        let state = State::load_knowing(&Seen(&*rows), version_known)?;
        let time = Mutex::new(ShardTime::restarted(state.time_ms(), clock.now()));
        let stories = Mutex::new(stories);
        Ok(Replica { shard, state: RwLock::new(state), rows, time, stories, desk, metrics, clock })
    }

    /// The machine that applies to it; one of each.
    pub fn machine(self: &Arc<Self>) -> ShardMachine {
        ShardMachine(Arc::clone(self))
    }

    /// Who is attached.
    pub fn desk(&self) -> &Desk {
        &self.desk
    }

    /// Shard time, for a leader to change and read.
    pub fn time(&self) -> MutexGuard<'_, ShardTime> {
        self.time.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A leader's time now, milliseconds; `None` when it does not lead.
    pub fn time_ms(&self) -> Option<u64> {
        let (now, wall_ms) = (self.clock.now(), self.clock.wall_ms());
        self.time().read_ms(now, wall_ms)
    }

    /// The state version of what is applied.
    pub fn state_version(&self) -> u32 {
        self.state().version()
    }

    /// What an `Enqueue` with these fields would be answered.
    pub fn check(&self, check: &Check) -> Result<Answer, StateError> {
        self.state().check(&Seen(&*self.rows), check)
    }

    /// A device group, as it is here now.
    pub fn group(&self, get: &GroupGet) -> Result<Answer, StateError> {
        self.state().group(&Seen(&*self.rows), get)
    }

    /// What a token is, with at most some `bytes_max` of its topics.
    pub fn token_info(&self, info: &TokenInfo, bytes_max: usize) -> Result<Answer, StateError> {
        self.state().token_info(&Seen(&*self.rows), info, bytes_max)
    }

    /// Whether anybody here subscribes to a topic of the publish.
    pub fn has_audience(&self, publish: &Publish) -> Result<bool, StateError> {
        self.state().has_audience(&Seen(&*self.rows), publish)
    }

    /// Whether a fan-out waits for its next step.
    pub fn fans_out(&self) -> Result<bool, StateError> {
        self.state().fans_out(&Seen(&*self.rows))
    }

    /// The first `limit` publishes that are kept here.
    pub fn publishes(&self, limit: usize) -> Result<Vec<(Sequence, HomeRow)>, StateError> {
        let state = self.state();
        if state.publishes_open() == 0 {
            return Ok(Vec::new());
        }
        crate::state::publish::kept(&Seen(&*self.rows), None, limit)
    }

    /// What a device is to see of a message with time to live 0, or the answer that refuses it.
    pub fn compose(&self, id: &Bytes, enqueue: &Enqueue, now_ms: u64) -> Result<(Answer, Option<Message>), StateError> {
        let state = self.state();
        let rows = Seen(&*self.rows);
        let answer = state.check(&rows, &check_of(enqueue))?;
        let Some(Kind::Accepted(_)) = answer.kind else { return Ok((answer, None)) };
        let (device, registration) =
            (DeviceTag(enqueue.device_tag), RegistrationId::from_bytes(&enqueue.registration_id));
        let Some(registration) = registration.filter(|_| id.len() == 16) else {
            return Ok((Answer { kind: Some(Kind::Refusal(Refusal::Malformed.into())) }, None));
        };
        let at = key::registration::key(device, registration);
        let Some(value) = rows.get(&at)? else { return Ok((answer, None)) };
        let to = key::registration::decode(&at, value)?;
        let message = Message {
            message_id: id.clone(),
            registration_id: enqueue.registration_id.clone(),
            wire_from: enqueue.wire_from.clone(),
            application: to.application,
            subtype: to.subtype,
            collapse_key: enqueue.collapse_key.clone(),
            ttl_secs: 0,
            accepted_ms: now_ms,
            priority: enqueue.priority,
            payload: enqueue.payload.clone(),
            total_deleted: 0,
            receipt_wanted: enqueue.receipt_wanted,
            body_id: Bytes::new(),
        };
        Ok((answer, Some(message)))
    }

    /// Shard time from which on something is to be removed.
    pub fn next_due_ms(&self) -> Result<Option<u64>, StateError> {
        self.state().next_due_ms(&Seen(&*self.rows))
    }

    /// Those of these devices that the state knows and was not told of on `day`.
    pub fn not_seen_on(&self, day: u32, devices: Vec<DeviceTag>) -> Result<Vec<DeviceTag>, StateError> {
        let _state = self.state();
        let mut found = Vec::with_capacity(devices.len());
        for device in devices {
            let at = key::device::key(device);
            let Some(value) = Seen(&*self.rows).get(&at)? else { continue };
            if key::device::decode(&at, value)?.last_seen_day < day {
                found.push(device);
            }
        }
        Ok(found)
    }

    /// Rows of a mailbox above `after`, in order, at most `limit`, and whether there are no more.
    pub fn waiting(
        &self,
        device: DeviceTag,
        after: Option<Sequence>,
        limit: usize,
    ) -> Result<(Vec<Waiting>, bool), StateError> {
        // Under the state's lock, so that no entry is half in the rows.
        let _state = self.state();
        let rows = waiting(&Seen(&*self.rows), device, after, limit)?;
        let complete = rows.len() < limit;
        Ok((rows.iter().map(|(sequence, row)| ready(*sequence, row)).collect(), complete))
    }

    /// Takes up the rows of a snapshot instead of its own.
    fn install(&self, staged: Box<dyn Staged>) -> Result<(), String> {
        let time_ms = {
            // Nobody reads rows of one and state of the other.
            let mut state = self.state.write().unwrap_or_else(PoisonError::into_inner);
            staged.switch()?;
            state.replace(&Seen(&*self.rows)).map_err(|error| error.to_string())?;
            state.time_ms()
        };
        let now: Instant = self.clock.now();
        self.time().applied(time_ms, now);
        Ok(())
    }

    /// Remembers what an entry ended, and counts it where it is led.
    fn tell(&self, ended: Vec<Ended>, time_ms: u64) {
        if ended.is_empty() {
            return;
        }
        if self.desk.term().is_some() {
            let mut fates: BTreeMap<FateKind, u64> = BTreeMap::new();
            for one in &ended {
                *fates.entry(one.end.into()).or_default() += 1;
            }
            for (fate, count) in fates {
                self.metrics.ended.get_or_create(&FateLabel { fate }).inc_by(count);
            }
        }
        let cut = self.stories().applied(ended, time_ms);
        self.metrics.stories_cut.inc_by(cut as u64);
    }

    /// Reads rows, with no entry half in them.
    pub(super) fn with_rows<T>(&self, read: impl FnOnce(&dyn Rows) -> T) -> T {
        let _state = self.state();
        read(&Seen(&*self.rows))
    }

    /// Shard time of what is applied, milliseconds since 1970.
    pub fn applied_ms(&self) -> u64 {
        self.state().time_ms()
    }

    /// How messages ended.
    pub(super) fn stories(&self) -> MutexGuard<'_, Stories> {
        self.stories.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn state(&self) -> RwLockReadGuard<'_, State> {
        self.state.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn apply(&self, at: Index, mark: Bytes, entry: &Entry) -> Result<Reply, MachineError> {
        let (mut applied, time_ms) = {
            let mut state = self.state.write().unwrap_or_else(PoisonError::into_inner);
            let mut applied =
                state.apply(&Seen(&*self.rows), at.index, entry).map_err(|error| not_applied(at, &error))?;
            self.rows
                .commit(Mark { index: at.index, bytes: mark }, std::mem::take(&mut applied.writes))
                .map_err(|what| not_kept(at, what))?;
            (applied, state.time_ms())
        };
        let now: Instant = self.clock.now();
        self.time().applied(time_ms, now);
        self.tell(std::mem::take(&mut applied.ended), time_ms);
        self.desk.applied(applied.effects.iter().map(|effect| match effect {
            Effect::Enqueued { device_tag, sequence, row } => Change::Enqueued(*device_tag, *sequence, row),
            Effect::Removed { device_tag, sequence } => Change::Removed(*device_tag, *sequence),
            Effect::RegistrationGone { .. } => Change::None,
        }));
        Ok(Reply::Shard(applied.answers))
    }
}

/// What an effect is to delivery.
#[derive(Debug)]
pub enum Change<'a> {
    /// A row is in the mailbox.
    Enqueued(DeviceTag, Sequence, &'a MailboxRow),
    /// A row has left it.
    Removed(DeviceTag, Sequence),
    /// Nothing: the rows concerned are named by effects of their own.
    None,
}

/// A row as delivery takes it, out of an effect: what it keeps must not hold the row's whole entry in memory.
pub fn copied(sequence: Sequence, row: &MailboxRow) -> Waiting {
    let payload = Bytes::copy_from_slice(&row.message.payload);
    let message = Arc::new(Message { payload, body_id: Bytes::new(), ..row.message.clone() });
    Waiting { sequence, expires_ms: row.expiry_ms, message }
}

/// A row of the store as delivery takes it.
pub fn ready(sequence: Sequence, row: &MailboxRow) -> Waiting {
    Waiting { sequence, expires_ms: row.expiry_ms, message: Arc::new(row.message.clone()) }
}

/// What is to be checked of an enqueue before it is taken.
fn check_of(enqueue: &Enqueue) -> Check {
    Check {
        device_tag: enqueue.device_tag,
        registration_id: enqueue.registration_id.clone(),
        sender: enqueue.sender.clone(),
        restricted_package_name: enqueue.restricted_package_name.clone(),
    }
}

/// Rows behind the trait that also keeps them.
struct Seen<'a>(&'a dyn Kept);

impl Rows for Seen<'_> {
    fn get(&self, key: &[u8]) -> Result<Option<Bytes>, crate::state::RowsError> {
        self.0.get(key)
    }

    fn scan(&self, from: &[u8], to: &[u8], limit: usize) -> Result<Vec<(Bytes, Bytes)>, crate::state::RowsError> {
        self.0.scan(from, to, limit)
    }

    fn scan_back(&self, from: &[u8], to: &[u8], limit: usize) -> Result<Vec<(Bytes, Bytes)>, crate::state::RowsError> {
        self.0.scan_back(from, to, limit)
    }
}

fn not_applied(at: Index, error: &ApplyError) -> MachineError {
    let fault = match error.is_of_the_entry() {
        true => Fault::Entry { operation: error.operation() },
        false => Fault::Replica,
    };
    MachineError { at, what: error.source.to_string(), fault }
}

fn not_kept(at: Index, what: String) -> MachineError {
    MachineError { at, what, fault: Fault::Replica }
}

impl GroupTime for Replica {
    fn known_ms(&self) -> Option<u64> {
        let now = self.clock.now();
        self.time().known_ms(now)
    }

    fn told(&self, time_ms: u64) {
        let now = self.clock.now();
        self.time().told(time_ms, now);
    }
}

impl Machine for ShardMachine {
    fn must_wait(&self) -> bool {
        self.0.rows.must_wait()
    }

    fn mark(&self) -> Option<Bytes> {
        self.0.rows.mark().map(|mark| mark.bytes)
    }

    fn apply(&mut self, at: Index, mark: Bytes, payload: &Bytes) -> Result<Reply, MachineError> {
        // Its fields are slices of the payload. The state copies what it keeps, delivery what is for an attached device: the other
        // replicas copy no message but into its row.
        let mut entry = Entry::decode(payload.clone()).map_err(|error| {
            let operation = "the entry as a whole".to_owned();
            MachineError { at, what: error.to_string(), fault: Fault::Entry { operation } }
        })?;
        entry.term = at.term;
        self.0.apply(at, mark, &entry)
    }

    fn install(&mut self, staged: Box<dyn Staged>) -> Result<(), String> {
        self.0.install(staged)
    }

    fn advance(&mut self, at: Index, mark: Bytes) -> Result<(), MachineError> {
        let mark = Mark { index: at.index, bytes: mark };
        self.0.rows.commit(mark, vec![]).map_err(|what| not_kept(at, what))
    }
}

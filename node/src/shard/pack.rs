//! Which operations and acknowledgements go into the next entry of a shard, and when: a value.
//!
//! Owns what waits and how much of it is under way. Owns no clock and no group: [`super::propose`] asks. The invariants: an entry
//! begins with every acknowledgement there is, so an enqueue never overtakes one; batches keep their order; what waits is bounded.

use std::{
    collections::{BTreeMap, VecDeque},
    time::{Duration, Instant},
};

use martlet_proto::{limits::ACKS_BYTES_MAX, message::Sequence, tag::DeviceTag};

use super::settings::ShardSettings;

/// Devices in one entry, and at most that wait for one, whose last-seen day is to be written: some 4 KiB.
pub const SEEN_MAX: usize = 256;

/// Publishes in one entry, and at most that wait for one, that are over everywhere: 18 KiB.
pub const DONE_MAX: usize = 1_024;

/// Longest that what is said of publishes that are over waits for an entry to ride along with: nothing depends on it but room.
const DONE_WAIT: Duration = Duration::from_secs(10);

/// What goes into one entry.
///
/// It holds all acknowledgements ([`ACKS_BYTES_MAX`]) and at least one whole batch (`BATCH_BYTES_MAX`, `BATCH_OPERATIONS_MAX`), or
/// several up to the entry's bounds, which are not above those of a batch; each operation is stamped with some 70 bytes. Together they
/// stay below what the log takes as one entry, 4 MiB ([`crate::log::LogConfig::drain_bytes`]): one that the log refuses stops its group.
#[derive(Debug, PartialEq, Eq)]
pub struct Pack<B, A> {
    /// State version to raise the shard to, before everything else: the whole entry is of that version. Its end is told with
    /// [`Packer::raise_ended`].
    pub raise: Option<u32>,
    /// Before all that adds.
    pub acks: Vec<A>,
    /// Devices that were here, with the day, after the acknowledgements.
    pub seen: BTreeMap<DeviceTag, u32>,
    /// Publishes that every shard has.
    pub done: Vec<Sequence>,
    /// Whether a fan-out is to go on. Its end is told with [`Packer::fan_step_ended`].
    pub fan_step: bool,
    /// Whether what has run out is to be removed.
    pub expire: bool,
    /// In the order in which they came.
    pub batches: Vec<B>,
    /// To be given back with [`Packer::ended`].
    pub bytes: usize,
}

/// There is no room; try later.
#[derive(Debug, PartialEq, Eq)]
pub struct Full<T>(pub T);

/// What waits to be proposed. `B` is a batch, `A` an acknowledgement.
#[derive(Debug)]
pub struct Packer<B, A> {
    bounds: Bounds,
    batches: VecDeque<Queued<B>>,
    queued_bytes: usize,
    queued_commands: usize,
    acks: Vec<A>,
    acks_bytes: usize,
    seen: BTreeMap<DeviceTag, u32>,
    /// When the first of the acknowledgements and devices seen came.
    oldest_ack: Option<Instant>,
    done: Vec<Sequence>,
    /// When the first of them came.
    oldest_done: Option<Instant>,
    fan_step: bool,
    fan_step_in_flight: bool,
    expire: bool,
    raise: Option<u32>,
    raise_in_flight: bool,
    in_flight: usize,
    in_flight_bytes: usize,
}

#[derive(Debug)]
struct Bounds {
    entry_bytes_max: usize,
    entry_commands_max: usize,
    pipeline_max: usize,
    uncommitted_bytes_max: usize,
    ack_wait: Duration,
    acks_waiting_max: usize,
}

#[derive(Debug)]
struct Queued<B> {
    batch: B,
    bytes: usize,
    commands: usize,
}

impl<B, A> Packer<B, A> {
    /// Nothing waits.
    pub fn new(settings: &ShardSettings) -> Self {
        Packer {
            bounds: Bounds {
                entry_bytes_max: settings.entry_bytes_max,
                entry_commands_max: settings.entry_commands_max,
                pipeline_max: settings.pipeline_max,
                uncommitted_bytes_max: settings.uncommitted_bytes_max,
                ack_wait: settings.ack_wait,
                acks_waiting_max: settings.acks_waiting_max,
            },
            batches: VecDeque::new(),
            queued_bytes: 0,
            queued_commands: 0,
            acks: Vec::new(),
            acks_bytes: 0,
            seen: BTreeMap::new(),
            oldest_ack: None,
            done: Vec::new(),
            oldest_done: None,
            fan_step: false,
            fan_step_in_flight: false,
            expire: false,
            raise: None,
            raise_in_flight: false,
            in_flight: 0,
            in_flight_bytes: 0,
        }
    }

    /// A batch of `commands` operations and `bytes` bytes. One that is too large in itself is taken when nothing else is there.
    pub fn push(&mut self, batch: B, bytes: usize, commands: usize) -> Result<(), Full<B>> {
        let there = self.queued_bytes + self.in_flight_bytes;
        if there > 0 && there + bytes > self.bounds.uncommitted_bytes_max {
            return Err(Full(batch));
        }
        self.queued_bytes += bytes;
        self.queued_commands += commands;
        self.batches.push_back(Queued { batch, bytes, commands });
        Ok(())
    }

    /// An acknowledgement of `bytes` bytes came at `now`.
    pub fn ack(&mut self, ack: A, bytes: usize, now: Instant) -> Result<(), Full<A>> {
        if self.acks.len() >= self.bounds.acks_waiting_max || self.acks_bytes + bytes > ACKS_BYTES_MAX {
            return Err(Full(ack));
        }
        self.acks_bytes += bytes;
        self.oldest_ack.get_or_insert(now);
        self.acks.push(ack);
        Ok(())
    }

    /// A device was here on `day`, as was found at `now`. It waits for company as an acknowledgement does; beyond the room it is dropped.
    pub fn seen(&mut self, device: DeviceTag, day: u32, now: Instant) {
        if self.seen.len() < SEEN_MAX {
            self.seen.insert(device, day);
            self.oldest_ack.get_or_insert(now);
        }
    }

    /// How many more devices seen it takes.
    pub fn seen_room(&self) -> usize {
        SEEN_MAX - self.seen.len()
    }

    /// A publish is over everywhere, as was found at `now`. It waits for company; beyond the room it is dropped, and said again.
    pub fn publish_done(&mut self, place: Sequence, now: Instant) {
        if self.done.len() < DONE_MAX {
            self.done.push(place);
            self.oldest_done.get_or_insert(now);
        }
    }

    /// A fan-out is not through. Nothing changes while a step is under way.
    pub fn fan_step(&mut self) {
        self.fan_step |= !self.fan_step_in_flight;
    }

    /// The step that was handed out is applied, or was not proposed, or its outcome is known not to be learned.
    pub fn fan_step_ended(&mut self) {
        self.fan_step_in_flight = false;
    }

    /// Something has run out.
    pub fn expire(&mut self) {
        self.expire = true;
    }

    /// The shard is to be raised to this state version. `false`, and nothing changes, while one waits or is under way.
    pub fn raise(&mut self, version: u32) -> bool {
        let free = self.raise.is_none() && !self.raise_in_flight;
        if free {
            self.raise = Some(version);
        }
        free
    }

    /// The raise that was handed out is applied, or its outcome is known not to be learned, or it was not proposed.
    pub fn raise_ended(&mut self) {
        self.raise_in_flight = false;
    }

    /// The next entry, if one should be proposed now. A second one while another is under way only when it is full.
    pub fn next(&mut self, now: Instant) -> Option<Pack<B, A>> {
        let full =
            self.queued_bytes >= self.bounds.entry_bytes_max || self.queued_commands >= self.bounds.entry_commands_max;
        if self.in_flight >= self.bounds.pipeline_max || (self.in_flight > 0 && !full) {
            return None;
        }
        let acks_due = self.acks_due().is_some_and(|due| due <= now)
            || self.acks.len() >= self.bounds.acks_waiting_max
            || self.acks_bytes >= ACKS_BYTES_MAX / 2;
        let done_due = self.done_due().is_some_and(|due| due <= now);
        let own = self.expire || self.fan_step || self.raise.is_some();
        if self.batches.is_empty() && !acks_due && !done_due && !own {
            return None;
        }
        self.raise_in_flight |= self.raise.is_some();
        self.fan_step_in_flight |= self.fan_step;
        self.oldest_done = None;
        let mut pack = Pack {
            raise: self.raise.take(),
            acks: self.take_acks(),
            seen: std::mem::take(&mut self.seen),
            done: std::mem::take(&mut self.done),
            fan_step: std::mem::take(&mut self.fan_step),
            expire: std::mem::take(&mut self.expire),
            batches: vec![],
            bytes: 0,
        };
        let mut commands = 0;
        while let Some(first) = self.batches.front() {
            let fits = pack.bytes + first.bytes <= self.bounds.entry_bytes_max
                && commands + first.commands <= self.bounds.entry_commands_max;
            if !pack.batches.is_empty() && !fits {
                break;
            }
            if let Some(queued) = self.batches.pop_front() {
                self.queued_bytes -= queued.bytes;
                self.queued_commands -= queued.commands;
                pack.bytes += queued.bytes;
                commands += queued.commands;
                pack.batches.push(queued.batch);
            }
        }
        self.in_flight += 1;
        self.in_flight_bytes += pack.bytes;
        Some(pack)
    }

    /// An entry of `bytes` is applied, or its outcome is known not to be learned.
    pub fn ended(&mut self, bytes: usize) {
        self.in_flight = self.in_flight.saturating_sub(1);
        self.in_flight_bytes = self.in_flight_bytes.saturating_sub(bytes);
    }

    /// When [`Packer::next`] should be asked again if nothing else happens.
    pub fn deadline(&self) -> Option<Instant> {
        self.acks_due().into_iter().chain(self.done_due()).min().filter(|_| self.in_flight == 0)
    }

    /// Everything that waits, and was not proposed: this replica does not lead any more.
    pub fn give_up(&mut self) -> (Vec<B>, Vec<A>) {
        self.queued_bytes = 0;
        self.queued_commands = 0;
        self.expire = false;
        self.fan_step = false;
        self.done.clear();
        self.oldest_done = None;
        self.raise = None;
        self.seen.clear();
        (self.batches.drain(..).map(|queued| queued.batch).collect(), self.take_acks())
    }

    fn acks_due(&self) -> Option<Instant> {
        self.oldest_ack.map(|oldest| oldest + self.bounds.ack_wait)
    }

    fn done_due(&self) -> Option<Instant> {
        self.oldest_done.map(|oldest| oldest + DONE_WAIT)
    }

    fn take_acks(&mut self) -> Vec<A> {
        self.oldest_ack = None;
        self.acks_bytes = 0;
        std::mem::take(&mut self.acks)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[expect(clippy::disallowed_methods, reason = "an origin for made-up instants")]
    fn origin() -> Instant {
        Instant::now()
    }

    fn packer() -> Packer<u32, u32> {
        Packer::new(&ShardSettings {
            entry_bytes_max: 100,
            entry_commands_max: 10,
            pipeline_max: 2,
            uncommitted_bytes_max: 1_000,
            ack_wait: Duration::from_millis(200),
            acks_waiting_max: 3,
            ..ShardSettings::default()
        })
    }

    #[test]
    fn the_first_batch_goes_at_once() {
        let mut packer = packer();
        packer.push(1, 10, 1).unwrap();
        assert_eq!(packer.next(origin()).unwrap().batches, [1]);
    }

    #[test]
    fn what_arrives_while_a_proposal_is_under_way_goes_into_the_next_entry() {
        let mut packer = packer();
        packer.push(1, 10, 1).unwrap();
        packer.next(origin()).unwrap();
        packer.push(2, 10, 1).unwrap();
        packer.push(3, 10, 1).unwrap();
        assert_eq!(packer.next(origin()), None);
        packer.ended(10);
        assert_eq!(packer.next(origin()).unwrap().batches, [2, 3]);
    }

    #[test]
    fn a_full_entry_does_not_wait_for_the_one_before() {
        let mut packer = packer();
        packer.push(1, 10, 1).unwrap();
        packer.next(origin()).unwrap();
        packer.push(2, 60, 1).unwrap();
        packer.push(3, 60, 1).unwrap();
        assert_eq!(packer.next(origin()).unwrap().batches, [2]);
        assert_eq!(packer.next(origin()), None);
    }

    #[test]
    fn a_batch_that_is_larger_than_an_entry_goes_alone() {
        let mut packer = packer();
        packer.push(1, 500, 50).unwrap();
        packer.push(2, 10, 1).unwrap();
        assert_eq!(packer.next(origin()).unwrap().batches, [1]);
    }

    #[test]
    fn an_entry_begins_with_all_acks_there_are() {
        let now = origin();
        let mut packer = packer();
        packer.ack(7, 10, now).unwrap();
        packer.ack(8, 10, now).unwrap();
        packer.push(1, 10, 1).unwrap();
        let pack = packer.next(now).unwrap();
        assert_eq!((pack.acks, pack.batches), (vec![7, 8], vec![1]));
    }

    #[test]
    fn devices_seen_go_with_the_next_entry_or_alone_once_each_and_are_bounded() {
        let now = origin();
        let mut packer = packer();
        packer.seen(DeviceTag(1), 9, now);
        packer.seen(DeviceTag(1), 9, now);
        assert_eq!(packer.next(now), None);
        let due = packer.deadline().unwrap();
        assert_eq!(packer.next(due).unwrap().seen, BTreeMap::from([(DeviceTag(1), 9)]));
        packer.ended(0);
        (0..1_000).for_each(|device| packer.seen(DeviceTag(device), 9, now));
        assert_eq!(packer.seen_room(), 0);
        packer.push(1, 10, 1).unwrap();
        assert_eq!(packer.next(now).unwrap().seen.len(), SEEN_MAX);
    }

    #[test]
    fn one_raise_is_under_way_at_most_and_one_that_was_not_proposed_is_dropped() {
        let mut packer = packer();
        assert!(packer.raise(2));
        assert!(!packer.raise(2), "it waits already");
        assert_eq!(packer.next(origin()).unwrap().raise, Some(2));
        assert!(!packer.raise(3), "it is under way");
        packer.ended(0);
        packer.raise_ended();
        assert_eq!(packer.next(origin()), None);
        assert!(packer.raise(3));
        packer.give_up();
        assert_eq!(packer.next(origin()), None);
    }

    #[test]
    fn the_largest_entry_is_one_that_the_log_takes() {
        use martlet_proto::{
            cluster::{
                command::{Acks, Command, DeviceAck, Entry, Stamped, command::Kind},
                queue::{Enqueue, Operation, operation},
            },
            limits::{BATCH_BYTES_MAX, BATCH_OPERATIONS_MAX},
        };
        use prost::Message;

        // As many acks as fit: one sequence each.
        let ack =
            DeviceAck { device_tag: u64::MAX, sequences: vec![vec![0xff; 16].into()], message_ids: vec![], gateway: 0 };
        let acks = vec![ack.clone(); ACKS_BYTES_MAX / ack.encoded_len()];
        let enqueue = Enqueue { payload: vec![7; BATCH_BYTES_MAX / BATCH_OPERATIONS_MAX].into(), ..Enqueue::default() };
        let stamped = Stamped {
            operation: Some(Operation {
                id: vec![0xff; 16].into(),
                first_try_ms: u64::MAX,
                kind: Some(operation::Kind::Enqueue(enqueue)),
            }),
            written_through: vec![0xff; 16].into(),
            limits: Some(ShardSettings { device_bytes_max: u64::MAX, ..ShardSettings::default() }.limits()),
        };
        let mut commands = vec![Command { kind: Some(Kind::Acks(Acks { acks })) }];
        commands.extend(vec![Command { kind: Some(Kind::Stamped(stamped)) }; BATCH_OPERATIONS_MAX]);
        let entry = Entry { shard_time_ms: u64::MAX, commands, term: 0 };
        assert!(entry.encoded_len() + 16 < crate::log::LogConfig::new("").drain_bytes, "{} bytes", entry.encoded_len());
    }

    #[test]
    fn acks_alone_wait_for_company_and_no_longer() {
        let now = origin();
        let mut packer = packer();
        packer.ack(7, 10, now).unwrap();
        packer.ack(8, 10, now + Duration::from_millis(150)).unwrap();
        assert_eq!(packer.next(now + Duration::from_millis(199)), None);
        let due = packer.deadline().unwrap();
        assert_eq!(due, now + Duration::from_millis(200));
        assert_eq!(packer.next(due).unwrap().acks, [7, 8]);
        assert_eq!(packer.deadline(), None);
    }

    #[test]
    fn promise_8_beyond_its_bounds_it_takes_neither_batches_nor_acks_core() {
        let mut packer = packer();
        packer.push(1, 900, 1).unwrap();
        assert_eq!(packer.push(2, 101, 1), Err(Full(2)));
        packer.next(origin()).unwrap();
        assert_eq!(packer.push(2, 101, 1), Err(Full(2)));
        packer.ended(900);
        assert_eq!(packer.push(2, 101, 1), Ok(()));
        (0..3).for_each(|ack| packer.ack(ack, 10, origin()).unwrap());
        assert_eq!(packer.ack(3, 10, origin()), Err(Full(3)));
    }

    #[test]
    fn a_lost_leader_gives_back_what_it_did_not_propose() {
        let mut packer = packer();
        packer.push(1, 10, 1).unwrap();
        packer.next(origin()).unwrap();
        packer.push(2, 10, 1).unwrap();
        packer.ack(7, 10, origin()).unwrap();
        assert_eq!(packer.give_up(), (vec![2], vec![7]));
        packer.ended(10);
        assert_eq!(packer.next(origin()), None);
    }

    #[test]
    fn the_bytes_of_waiting_acks_are_bounded_and_half_of_them_go_at_once() {
        let mut packer = packer();
        packer.ack(1, ACKS_BYTES_MAX / 2, origin()).unwrap();
        assert_eq!(packer.ack(2, ACKS_BYTES_MAX / 2 + 1, origin()), Err(Full(2)));
        assert_eq!(packer.next(origin()).unwrap().acks, [1]);
        packer.ack(2, ACKS_BYTES_MAX, origin()).unwrap();
    }
}

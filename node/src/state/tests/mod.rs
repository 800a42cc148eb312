//! What a shard answers, keeps and tells, one sentence each.
//!
//! [`Shard`] applies entries and judges each: the state taken up from its rows is the state that went on, counters balance,
//! every waiting message stands in the expiry index, and what was told to delivery is what happened to the mailboxes.

mod acks;
mod collapse;
mod dedupe;
mod enqueues;
mod entries;
mod expiry;
mod groups;
mod overflow;
mod recall;
mod registrations;
mod topics;

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;
use martlet_proto::{
    cluster::{
        command::{Acks, Command, DeviceAck, Entry, Expire, Limits, Stamped, command},
        queue::{
            Answer, Enqueue, OneToken, Operation, Refusal, Register, RegistrationRef, Resolve, Unregister,
            answer::Kind as Answered, operation::Kind, unregister::What,
        },
    },
    message::Sequence,
    tag::DeviceTag,
};

use super::{Applied, CountRow, Effect, End, MailboxRow, State, StateError, counters, memory::MemoryRows, waiting};
use crate::store::key;

pub(super) const PHONE: u64 = 7;
pub(super) const START_MS: u64 = 1_700_000_000_000;
pub(super) const LIMITS: Limits = Limits {
    waiting_max: 100,
    unacked_max: 50,
    unacked_bytes_max: 1 << 20,
    registrations_max: 5,
    dedupe_window_ms: 60_000,
    collapse_keys_max: 4,
    device_bytes_max: 0,
    project_bytes_max: 0,
    group_members_max: 20,
    topics_max: 3,
    publishes_max: 4,
    fan_out_max: 1_000,
};

/// A shard and its rows.
pub(super) struct Shard {
    pub(super) state: State,
    pub(super) rows: MemoryRows,
    pub(super) index: u64,
    pub(super) now_ms: u64,
    pub(super) limits: Limits,
    mailboxes: BTreeMap<u64, BTreeSet<Sequence>>,
    ended: CountRow,
    ids: u64,
}

impl Shard {
    pub(super) fn new() -> Self {
        let rows = MemoryRows::default();
        let state = State::load(&rows).unwrap();
        Self {
            state,
            rows,
            index: 0,
            now_ms: START_MS,
            limits: LIMITS,
            mailboxes: BTreeMap::new(),
            ended: CountRow::default(),
            ids: 0,
        }
    }

    /// Applies an entry and judges it.
    pub(super) fn apply(&mut self, commands: Vec<Command>) -> Applied {
        self.index += 1;
        let entry = Entry { shard_time_ms: self.now_ms, commands, term: 0 };
        let applied = self.state.apply(&self.rows, self.index, &entry).unwrap();
        self.rows.write(&applied.writes);
        for effect in &applied.effects {
            match effect {
                Effect::Enqueued { device_tag, sequence, row } => {
                    assert!(self.mailboxes.entry(device_tag.0).or_default().insert(*sequence));
                    assert!(row.remaining_ms(self.now_ms) > 0);
                }
                Effect::Removed { device_tag, sequence } => {
                    assert!(self.mailboxes.entry(device_tag.0).or_default().remove(sequence));
                }
                Effect::RegistrationGone { .. } => {}
            }
        }
        for one in &applied.ended {
            let counter = match one.end {
                End::Delivered { .. } => &mut self.ended.delivered,
                End::Expired => &mut self.ended.expired,
                End::Collapsed { .. } => &mut self.ended.collapsed,
                End::Overflow => &mut self.ended.overflow,
                End::Unregistered => &mut self.ended.unregistered,
                End::Recalled => &mut self.ended.recalled,
            };
            *counter += 1;
            assert!(one.accepted_ms <= one.ended_ms);
        }
        self.judge();
        applied
    }

    fn judge(&self) {
        assert_eq!(State::load(&self.rows).unwrap(), self.state, "a restart changes nothing");
        let mut waiting: BTreeMap<String, u64> = BTreeMap::new();
        let mut stored_bytes: BTreeMap<String, u64> = BTreeMap::new();
        let mut mailboxes: BTreeMap<u64, BTreeSet<Sequence>> = BTreeMap::new();
        let mut due = BTreeSet::new();
        for (key, value) in self.rows.iter() {
            if let Some((device, sequence)) = key::mailbox::decode_key(key) {
                let row = key::mailbox::decode(key, value.clone()).unwrap();
                *waiting.entry(row.sender.clone()).or_default() += u64::from(!row.is_notice());
                *stored_bytes.entry(row.sender.clone()).or_default() += value.len() as u64;
                mailboxes.entry(device.0).or_default().insert(sequence);
                assert!(due.insert(key::expiry::key(row.expiry_ms, device, sequence)));
            }
        }
        let expiry: BTreeSet<Bytes> =
            self.rows.iter().map(|(key, _)| key.clone()).filter(|key| key::expiry::decode_key(key).is_some()).collect();
        assert_eq!(expiry, due, "every message runs out when its row says");
        let told: BTreeMap<_, _> = self.mailboxes.iter().filter(|(_, held)| !held.is_empty()).collect();
        assert_eq!(told, mailboxes.iter().collect(), "delivery was told what happened");
        let mut fates = CountRow::default();
        for (key, value) in self.rows.iter() {
            if let Some(sender) = key::count::decode_key(key) {
                let row = key::count::decode(key, value.clone()).unwrap();
                fates.delivered += row.delivered;
                fates.expired += row.expired;
                fates.collapsed += row.collapsed;
                fates.overflow += row.overflow;
                fates.unregistered += row.unregistered;
                fates.recalled += row.recalled;
                assert_eq!(row.waiting(), Some(waiting.remove(sender).unwrap_or(0)), "the counters balance");
                assert_eq!(row.stored_bytes, stored_bytes.remove(sender).unwrap_or(0), "so do the bytes");
            }
        }
        assert_eq!(fates, self.ended, "every story ends as it is counted");
        assert!(waiting.values().all(|left| *left == 0), "messages of nobody: {waiting:?}");
        assert!(stored_bytes.is_empty(), "bytes of nobody: {stored_bytes:?}");
    }

    /// Applies an entry of one command.
    pub(super) fn one(&mut self, kind: command::Kind) -> Applied {
        self.apply(vec![Command { kind: Some(kind) }])
    }

    /// Applies one operation under an id of its own.
    pub(super) fn operation(&mut self, kind: Kind) -> Answer {
        let operation = self.tried_now(kind);
        self.stamped(operation, None)
    }

    pub(super) fn tried_now(&mut self, kind: Kind) -> Operation {
        self.ids += 1;
        Operation { id: id(self.ids), first_try_ms: self.now_ms, kind: Some(kind) }
    }

    pub(super) fn stamped(&mut self, operation: Operation, written: Option<Sequence>) -> Answer {
        let stamped = self.stamp(operation, written);
        let applied = self.apply(vec![stamped]);
        applied.answers.into_iter().next().flatten().unwrap()
    }

    pub(super) fn stamp(&self, operation: Operation, written: Option<Sequence>) -> Command {
        let written_through = written.map_or_else(Bytes::new, |at| at.to_bytes().to_vec().into());
        let stamped = Stamped { operation: Some(operation), written_through, limits: Some(self.limits) };
        Command { kind: Some(command::Kind::Stamped(stamped)) }
    }

    pub(super) fn register(&mut self, register: Register) -> RegistrationRef {
        match self.operation(Kind::Register(register)).kind {
            Some(Answered::Registered(registered)) => registered.registration.unwrap(),
            other => panic!("not registered: {other:?}"),
        }
    }

    pub(super) fn unregister(&mut self, application: &str, what: What) -> u32 {
        let application = application.to_owned();
        let unregister = Unregister { device_tag: PHONE, application, what: Some(what) };
        match self.operation(Kind::Unregister(unregister)).kind {
            Some(Answered::Unregistered(unregistered)) => unregistered.count,
            other => panic!("not unregistered: {other:?}"),
        }
    }

    /// Sends one message.
    pub(super) fn send(&mut self, to: &RegistrationRef) -> Answer {
        self.operation(Kind::Enqueue(message(to)))
    }

    /// Sends one message with a collapse key.
    pub(super) fn send_key(&mut self, to: &RegistrationRef, key: &str) -> Answer {
        self.operation(Kind::Enqueue(Enqueue { collapse_key: key.into(), ..message(to) }))
    }

    /// Sends one message to a device that was written to.
    pub(super) fn send_written(&mut self, to: &RegistrationRef, written: Option<Sequence>) -> Answer {
        let operation = self.tried_now(Kind::Enqueue(message(to)));
        self.stamped(operation, written)
    }

    pub(super) fn ack(&mut self, sequences: &[Sequence]) {
        let sequences = sequences.iter().map(|at| at.to_bytes().to_vec().into()).collect();
        self.device_ack(DeviceAck { device_tag: PHONE, sequences, message_ids: vec![], gateway: 0 });
    }

    pub(super) fn device_ack(&mut self, ack: DeviceAck) {
        self.one(command::Kind::Acks(Acks { acks: vec![ack] }));
    }

    pub(super) fn expire(&mut self, rows_max: u32) -> Applied {
        self.one(command::Kind::Expire(Expire { upto_ms: self.now_ms, rows_max }))
    }

    pub(super) fn mailbox(&self) -> Vec<(Sequence, MailboxRow)> {
        waiting(&self.rows, DeviceTag(PHONE), None, usize::MAX).unwrap()
    }

    pub(super) fn places(&self) -> Vec<Sequence> {
        self.mailbox().into_iter().map(|(at, _)| at).collect()
    }

    pub(super) fn count(&self) -> CountRow {
        counters(&self.rows, "1001").unwrap()
    }
}

pub(super) fn id(n: u64) -> Bytes {
    [START_MS.to_be_bytes(), n.to_be_bytes()].concat().into()
}

/// A message for a registration, from sender 1001, for an hour.
pub(super) fn message(to: &RegistrationRef) -> Enqueue {
    Enqueue {
        device_tag: PHONE,
        registration_id: to.registration_id.clone(),
        sender: "1001".into(),
        wire_from: "1001".into(),
        ttl_secs: 3600,
        payload: Bytes::from_static(b"payload"),
        ..Default::default()
    }
}

/// An Instance ID registration of application `app.one`, sender 1001, under this Instance ID.
pub(super) fn instance(iid: &str, number: u8) -> Register {
    Register {
        device_tag: PHONE,
        registration_id: vec![number; 16].into(),
        token_key_id: 3,
        application: "app.one".into(),
        scope: "GCM".into(),
        senders: vec!["1001".into()],
        iid: iid.into(),
        ..Default::default()
    }
}

/// A legacy registration of application `app.one`; its Instance ID is drawn by the gateway.
pub(super) fn legacy(senders: &[&str], number: u8) -> Register {
    Register {
        scope: String::new(),
        senders: senders.iter().map(|sender| (*sender).to_owned()).collect(),
        iid_invented: true,
        ..instance(&format!("cInvented{:02}", number % 100), number)
    }
}

pub(super) const IID: &str = "cAAAAAAAAA1";
pub(super) const IID_2: &str = "cAAAAAAAAA2";

pub(super) fn refusal(answer: &Answer) -> Option<Refusal> {
    match answer.kind {
        Some(Answered::Refusal(refusal)) => Refusal::try_from(refusal).ok(),
        _ => None,
    }
}

/// Accepted, and no newer token to tell of.
pub(super) fn is_accepted(answer: &Answer) -> bool {
    matches!(&answer.kind, Some(Answered::Accepted(accepted)) if accepted.canonical.is_none())
}

pub(super) fn canonical(answer: &Answer) -> Option<RegistrationRef> {
    match &answer.kind {
        Some(Answered::Accepted(accepted)) => accepted.canonical.clone(),
        other => panic!("not accepted: {other:?}"),
    }
}

pub(super) fn resolve(of: &Operation) -> Kind {
    Kind::Resolve(Resolve { id: of.id.clone() })
}

pub(super) fn one_token(iid: &str, sender: &str) -> What {
    What::OneToken(OneToken { iid: iid.into(), sender: sender.into(), scope: "GCM".into(), subtype: String::new() })
}

pub(super) fn broken(error: &StateError) -> bool {
    matches!(error, StateError::Broken(_))
}

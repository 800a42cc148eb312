//! Random entries against the model; and the same entries on a second replica that keeps its rows otherwise and restarts.

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;
use martlet_node::state::{Rows, RowsError, State, Write, counters, memory::MemoryRows, waiting};
use martlet_proto::{
    cluster::{
        command::{Acks, Command, DeviceAck, Entry, Expire, FanStep, Limits, Seen, Stamped, command},
        queue::{
            Enqueue, FanOut, GroupChange, GroupGet, GroupMember, OneToken, Operation, Publish, Recall, RecallKey,
            Register, Resolve, Subscribe, Unregister, Unsubscribe, answer::Kind as Answered, group_get::By,
            operation::Kind, recall, unregister::What,
        },
    },
    message::Sequence,
    tag::DeviceTag,
};
use proptest::{collection::vec, option, prelude::*, sample::Index};

use crate::model::{Fates, Model};

const DEVICES: [u64; 2] = [3, u64::MAX];
const SENDERS: [&str; 2] = ["1001", "1002"];
/// Names of groups and their tags; two have one tag.
const GROUPS: [(&str, u64); 3] = [("a", 5), ("b", 5), ("c", u64::MAX)];
const KEYS: [&str; 3] = ["one", "two", "three"];
const TOPICS: [&str; 4] = ["a", "b", "c", "d"];
const IIDS: [&str; 3] = ["cAAAAAAAAA1", "cAAAAAAAAA2", "cAAAAAAAAA3AAAAAAAAAAA"];

const LIMITS: Limits = Limits {
    waiting_max: 3,
    unacked_max: 2,
    unacked_bytes_max: u64::MAX,
    registrations_max: 3,
    dedupe_window_ms: 5000,
    collapse_keys_max: 2,
    device_bytes_max: 0,
    project_bytes_max: 0,
    group_members_max: 3,
    topics_max: 3,
    publishes_max: 4,
    fan_out_max: 2,
};

/// Something that happens; what it points at is chosen among what there is.
#[derive(Debug, Clone)]
enum Step {
    Send {
        to: Index,
        sender: Index,
        collapse: Option<Index>,
        ttl_secs: u32,
        package: bool,
        written: Option<Index>,
    },
    Register {
        device: Index,
        application: bool,
        subtype: bool,
        scope: Index,
        senders: u8,
        iid: Option<Index>,
        ttl: bool,
    },
    Unregister {
        of: Index,
        what: u8,
    },
    Ack {
        which: Vec<Index>,
        by_id: bool,
    },
    Recall {
        which: Index,
        by_key: bool,
    },
    Expire {
        rows_max: u32,
    },
    Repeat {
        which: Index,
    },
    Resolve {
        which: Option<Index>,
    },
    Untimely {
        early: bool,
    },
    Seen {
        device: Index,
        day: u32,
    },
    MakeGroup {
        name: Index,
        sender: Index,
        join: Vec<Index>,
    },
    ChangeGroup {
        which: Index,
        stranger: bool,
        named: Option<bool>,
        leave: Vec<Index>,
        join: Vec<Index>,
    },
    Subscribe {
        who: Index,
        sender: Option<Index>,
        topic: Index,
        ends: bool,
    },
    FanOut {
        sender: Index,
        topic: Index,
        collapse: Option<Index>,
        remaining_ms: u64,
        again: bool,
    },
    GoOn,
}

fn step() -> impl Strategy<Value = Step> {
    let index = any::<Index>;
    let ttl_secs = prop_oneof![1 => Just(0u32), 3 => 1..5u32, 9 => Just(2_419_200u32)];
    prop_oneof![
        12 => (index(), index(), option::weighted(0.3, index()), ttl_secs, prop::bool::weighted(0.1), option::of(index())).prop_map(
            |(to, sender, collapse, ttl_secs, package, written)| Step::Send { to, sender, collapse, ttl_secs, package, written }
        ),
        4 => (index(), any::<bool>(), prop::bool::weighted(0.2), index(), 1..4u8, option::of(index()), prop::bool::weighted(0.2))
            .prop_map(|(device, application, subtype, scope, senders, iid, ttl)| {
                Step::Register { device, application, subtype, scope, senders, iid, ttl }
            }),
        1 => (index(), 0..4u8).prop_map(|(of, what)| Step::Unregister { of, what }),
        4 => (vec(index(), 1..4), any::<bool>()).prop_map(|(which, by_id)| Step::Ack { which, by_id }),
        1 => (index(), any::<bool>()).prop_map(|(which, by_key)| Step::Recall { which, by_key }),
        2 => (1..4u32).prop_map(|rows_max| Step::Expire { rows_max }),
        2 => index().prop_map(|which| Step::Repeat { which }),
        2 => option::of(index()).prop_map(|which| Step::Resolve { which }),
        1 => any::<bool>().prop_map(|early| Step::Untimely { early }),
        1 => (index(), 19_000..21_000u32).prop_map(|(device, day)| Step::Seen { device, day }),
        2 => (index(), index(), vec(index(), 0..5)).prop_map(|(name, sender, join)| Step::MakeGroup { name, sender, join }),
        4 => (index(), prop::bool::weighted(0.1), option::weighted(0.3, any::<bool>()), vec(index(), 0..4), vec(index(), 0..3))
            .prop_map(|(which, stranger, named, leave, join)| Step::ChangeGroup { which, stranger, named, leave, join }),
        6 => (index(), option::of(index()), index(), prop::bool::weighted(0.2))
            .prop_map(|(who, sender, topic, ends)| Step::Subscribe { who, sender, topic, ends }),
        4 => (index(), index(), option::weighted(0.3, index()), prop_oneof![1 => 1..2000u64, 4 => Just(2_419_200_000u64)], prop::bool::weighted(0.2))
            .prop_map(|(sender, topic, collapse, remaining_ms, again)| Step::FanOut { sender, topic, collapse, remaining_ms, again }),
        3 => Just(Step::GoOn),
    ]
}

/// How time goes on before an entry, milliseconds; it is told wrongly at times.
fn pause() -> impl Strategy<Value = i64> {
    prop_oneof![12 => 0..900i64, 3 => 1000..8000i64, 1 => Just(-500i64), 1 => Just(2_000_000_000i64)]
}

/// Turns steps into commands, knowing what the model holds and what was tried.
#[derive(Default)]
struct Player {
    tried: Vec<Operation>,
    drawn: u64,
}

impl Player {
    fn draw(&mut self) -> Bytes {
        self.drawn += 1;
        [[0xAA; 8], self.drawn.to_be_bytes()].concat().into()
    }

    fn operation(&mut self, first_try_ms: u64, kind: Kind) -> Operation {
        let operation = Operation { id: self.draw(), first_try_ms, kind: Some(kind) };
        self.tried.push(operation.clone());
        operation
    }

    fn command(&mut self, model: &Model, now_ms: u64, step: &Step) -> Option<Command> {
        let pick = |from: &[&'static str], index: &Index| (*index.get(from)).to_owned();
        let mut written_through = Bytes::new();
        let operation = match step {
            Step::Send { to, sender, collapse, ttl_secs, package, written } => {
                let to = (!model.registrations.is_empty()).then(|| to.get(&model.registrations));
                let device_tag = to.map_or(DEVICES[0], |to| to.device);
                let held: Vec<_> = model.messages.iter().filter(|held| held.device == device_tag).collect();
                if let Some(written) = written.as_ref().filter(|_| !held.is_empty()) {
                    written_through = sequence(written.get(&held).place).to_bytes().to_vec().into();
                }
                let enqueue = Enqueue {
                    device_tag,
                    registration_id: to.map_or_else(|| vec![0; 16], |to| to.id.clone()).into(),
                    sender: pick(&SENDERS, sender),
                    wire_from: "from".into(),
                    collapse_key: collapse.as_ref().map_or_else(String::new, |key| pick(&KEYS, key)),
                    ttl_secs: *ttl_secs,
                    restricted_package_name: if *package { "app.a".into() } else { String::new() },
                    payload: Bytes::from_static(b"payload"),
                    ..Default::default()
                };
                self.operation(now_ms, Kind::Enqueue(enqueue))
            }
            Step::Register { device, application, subtype, scope, senders, iid, ttl } => {
                let scope = pick(&["", "GCM", "*"], scope);
                let mut senders: Vec<String> =
                    (0..2).filter(|n| senders & (1 << n) > 0).map(|n| SENDERS[n].into()).collect();
                senders.truncate(if scope.is_empty() { 2 } else { 1 });
                let register = Register {
                    device_tag: *device.get(&DEVICES),
                    registration_id: self.draw(),
                    token_key_id: u32::try_from(self.drawn).unwrap(),
                    application: if *application { "app.a".into() } else { "app.b".into() },
                    subtype: if *subtype { "sub".into() } else { String::new() },
                    scope,
                    senders,
                    iid: iid.as_ref().map_or_else(|| format!("c{:010}", self.drawn), |iid| pick(&IIDS, iid)),
                    iid_invented: iid.is_none(),
                    ttl_secs: if *ttl { 3 } else { 0 },
                    ..Default::default()
                };
                self.operation(now_ms, Kind::Register(register))
            }
            Step::Unregister { of, what } => {
                let forms: Vec<&Register> = self
                    .tried
                    .iter()
                    .filter_map(|tried| match &tried.kind {
                        Some(Kind::Register(form)) => Some(form),
                        _ => None,
                    })
                    .collect();
                let form = (!forms.is_empty()).then(|| (*of.get(&forms)).clone())?;
                let iid = if *what == 1 { String::new() } else { form.iid.clone() };
                let (scope, subtype, sender) = (form.scope, form.subtype, form.senders[0].clone());
                let what = match what {
                    0 => What::WholeApplication(true),
                    1 | 2 => What::OneToken(OneToken { iid, sender, scope, subtype }),
                    _ => What::InstanceId(iid),
                };
                let unregister =
                    Unregister { device_tag: form.device_tag, application: form.application, what: Some(what) };
                self.operation(now_ms, Kind::Unregister(unregister))
            }
            Step::Recall { which, by_key } => {
                let held = (!model.messages.is_empty()).then(|| which.get(&model.messages))?;
                let what = if *by_key {
                    let collapse_key =
                        if held.collapse_key.is_empty() { KEYS[0].into() } else { held.collapse_key.clone() };
                    recall::What::CollapseKey(RecallKey {
                        registration_id: held.registration.clone().into(),
                        collapse_key,
                    })
                } else {
                    // A notice is no message: naming it recalls nothing.
                    let id = if held.id.is_empty() { vec![0; 16] } else { held.id.clone() };
                    recall::What::MessageId(id.into())
                };
                self.operation(now_ms, Kind::Recall(Recall { device_tag: held.device, what: Some(what) }))
            }
            Step::Repeat { which } => (!self.tried.is_empty()).then(|| which.get(&self.tried).clone())?,
            Step::Resolve { which } => {
                // As a gateway does: with the first-try time of what it asks about. What it asks about may never have come.
                let never = Operation { id: self.draw(), first_try_ms: now_ms, kind: None };
                let of = match which {
                    Some(which) if !self.tried.is_empty() => which.get(&self.tried).clone(),
                    _ => never,
                };
                let kind = Some(Kind::Resolve(Resolve { id: of.id }));
                Operation { id: self.draw(), first_try_ms: of.first_try_ms, kind }
            }
            Step::Untimely { early } => {
                let enqueue =
                    Enqueue { device_tag: DEVICES[0], registration_id: vec![0; 16].into(), ..Default::default() };
                let first_try_ms = if *early { now_ms + 1500 } else { now_ms - 6000 };
                self.operation(first_try_ms, Kind::Enqueue(enqueue))
            }
            Step::MakeGroup { name, sender, join } => {
                let (name, group_tag) = *name.get(&GROUPS);
                self.drawn += 1;
                let change = GroupChange {
                    group_tag,
                    sender: pick(&SENDERS, sender),
                    name: name.into(),
                    key_bits: self.drawn,
                    create: true,
                    token_key_id: 4,
                    join: join.iter().map(member).collect(),
                    ..Default::default()
                };
                self.operation(now_ms, Kind::GroupChange(change))
            }
            Step::ChangeGroup { which, stranger, named, leave, join } => {
                let of = (!model.groups.ever.is_empty()).then(|| which.get(&model.groups.ever).clone())?;
                let change = GroupChange {
                    group_tag: of.tag,
                    sender: if *stranger { "1003".into() } else { of.sender },
                    name: named.map_or_else(String::new, |right| if right { of.name } else { "another".into() }),
                    key_bits: of.bits,
                    leave: leave.iter().map(|who| member(who).registration_id).collect(),
                    join: join.iter().map(member).collect(),
                    ..Default::default()
                };
                self.operation(now_ms, Kind::GroupChange(change))
            }
            Step::Ack { which, by_id } => {
                let mut acks: BTreeMap<u64, DeviceAck> = BTreeMap::new();
                for held in which.iter().filter(|_| !model.messages.is_empty()).map(|which| which.get(&model.messages))
                {
                    let ack = acks.entry(held.device).or_default();
                    ack.device_tag = held.device;
                    match by_id {
                        true => ack.message_ids.push(held.id.clone().into()),
                        false => ack.sequences.push(sequence(held.place).to_bytes().to_vec().into()),
                    }
                }
                return command(command::Kind::Acks(Acks { acks: acks.into_values().collect() }));
            }
            Step::Expire { rows_max } => {
                return command(command::Kind::Expire(Expire { upto_ms: now_ms + 100, rows_max: *rows_max }));
            }
            Step::Subscribe { who, sender, topic, ends } => {
                let who = (!model.registrations.is_empty()).then(|| who.get(&model.registrations));
                let device_tag = who.map_or(DEVICES[0], |who| who.device);
                let registration_id: Bytes = who.map_or_else(|| vec![0; 16], |who| who.id.clone()).into();
                let sender = sender.as_ref().map_or_else(String::new, |sender| pick(&SENDERS, sender));
                let topic = pick(&TOPICS, topic);
                let kind = match ends {
                    false => Kind::Subscribe(Subscribe { device_tag, registration_id, sender, topic }),
                    true => Kind::Unsubscribe(Unsubscribe { device_tag, registration_id, sender, topic }),
                };
                self.operation(now_ms, kind)
            }
            Step::FanOut { sender, topic, collapse, remaining_ms, again } => {
                let before = self.tried.iter().rev().find(|tried| matches!(tried.kind, Some(Kind::FanOut(_))));
                if let Some(before) = before.filter(|_| *again) {
                    before.clone()
                } else {
                    let publish = Publish {
                        sender: pick(&SENDERS, sender),
                        topics: vec![pick(&TOPICS, topic)],
                        condition: Bytes::from_static(&[0]),
                        wire_from: "/topics/t".into(),
                        collapse_key: collapse.as_ref().map_or_else(String::new, |key| pick(&KEYS, key)),
                        ttl_secs: 2_419_200,
                        payload: Bytes::from_static(b"for all"),
                        ..Default::default()
                    };
                    let publish_id = self.draw();
                    let fan_out = FanOut {
                        publish_id,
                        home: 3,
                        place: sequence((self.drawn, 0)).to_bytes().to_vec().into(),
                        open_from: Bytes::new(),
                        remaining_ms: *remaining_ms,
                        publish: Some(publish),
                    };
                    self.operation(0, Kind::FanOut(fan_out))
                }
            }
            Step::GoOn => return command(command::Kind::FanStep(FanStep { limits: Some(LIMITS) })),
            Step::Seen { device, day } => {
                return command(command::Kind::Seen(Seen { device_tag: *device.get(&DEVICES), day: *day }));
            }
        };
        command(command::Kind::Stamped(Stamped { operation: Some(operation), written_through, limits: Some(LIMITS) }))
    }
}

/// One of few registrations: members of several groups, and known there or not.
fn member(which: &Index) -> GroupMember {
    let number = *which.get(&[1u8, 2, 3, 4, 5]);
    GroupMember {
        device_tag: DEVICES[usize::from(number) % 2],
        registration_id: vec![number; 16].into(),
        token_key_id: 1,
        iid: IIDS[0].into(),
    }
}

fn command(kind: command::Kind) -> Option<Command> {
    Some(Command { kind: Some(kind) })
}

fn sequence((index, position): (u64, u32)) -> Sequence {
    Sequence { incarnation: 0, index, position }
}

/// Rows in a sorted list: a second way to keep them.
#[derive(Default)]
struct ListedRows(Vec<(Bytes, Bytes)>);

impl ListedRows {
    fn write(&mut self, writes: &[Write]) {
        for write in writes {
            let (Write::Put { key, .. } | Write::Remove { key } | Write::Append { key, .. }) = write;
            let at = self.0.binary_search_by(|(found, _)| found.cmp(key));
            match (write, at) {
                (Write::Put { value, fresh, .. }, Ok(at)) => {
                    assert!(!fresh, "a fresh key was there before");
                    self.0[at].1 = value.clone();
                }
                (Write::Put { value, .. }, Err(at)) => self.0.insert(at, (key.clone(), value.clone())),
                (Write::Remove { .. }, Ok(at)) => drop(self.0.remove(at)),
                (Write::Remove { .. }, Err(_)) => {}
                (Write::Append { tail, .. }, Ok(at)) => self.0[at].1 = [&self.0[at].1[..], tail].concat().into(),
                (Write::Append { tail, .. }, Err(at)) => self.0.insert(at, (key.clone(), tail.clone())),
            }
        }
    }

    fn between<'a>(&'a self, from: &'a [u8], to: &'a [u8]) -> impl DoubleEndedIterator<Item = (Bytes, Bytes)> + 'a {
        self.0.iter().filter(move |(key, _)| *from <= key[..] && key[..] < *to).cloned()
    }
}

impl Rows for ListedRows {
    fn get(&self, key: &[u8]) -> Result<Option<Bytes>, RowsError> {
        Ok(self.0.iter().find(|(found, _)| found == key).map(|(_, value)| value.clone()))
    }

    fn scan(&self, from: &[u8], to: &[u8], limit: usize) -> Result<Vec<(Bytes, Bytes)>, RowsError> {
        Ok(self.between(from, to).take(limit).collect())
    }

    fn scan_back(&self, from: &[u8], to: &[u8], limit: usize) -> Result<Vec<(Bytes, Bytes)>, RowsError> {
        Ok(self.between(from, to).rev().take(limit).collect())
    }
}

/// Sees that the shard holds what the model holds, and tells the model the ids of notices.
fn compare(model: &mut Model, rows: &MemoryRows, notices: &mut BTreeSet<Vec<u8>>) {
    let mut found = 0;
    for device in DEVICES {
        for (place, row) in waiting(rows, DeviceTag(device), None, usize::MAX).unwrap() {
            let at = (place.index, place.position);
            let held = model.messages.iter_mut().find(|held| held.device == device && held.place == at);
            let held = held.unwrap_or_else(|| panic!("the model holds nothing at {place:?}"));
            if held.id.is_empty() {
                held.id = row.message.message_id.to_vec();
                assert!(notices.insert(held.id.clone()), "a notice or a topic's message has an id that was used");
                let (from, payload) =
                    if held.deleted > 0 { (&*held.sender, &b""[..]) } else { ("/topics/t", &b"for all"[..]) };
                assert_eq!((&*row.message.wire_from, &row.message.payload[..]), (from, payload));
            }
            assert_eq!(row.message.message_id, held.id);
            assert_eq!(row.message.total_deleted, held.deleted);
            assert_eq!(row.message.registration_id, held.registration);
            assert_eq!(row.message.collapse_key, held.collapse_key);
            assert_eq!((&row.sender, &row.message.application), (&held.sender, &held.application));
            assert_eq!((&row.message.subtype, row.expiry_ms), (&held.subtype, held.expiry));
            found += 1;
        }
    }
    let bodies = (Bytes::from_static(&[0x0d]), Bytes::from_static(&[0x0e]));
    let shared = model.messages.iter().any(|held| held.is_shared);
    if !shared && !model.fans_out() {
        assert_eq!(rows.scan(&bodies.0, &bodies.1, 1).unwrap(), [], "a body that nobody holds");
    }
    assert_eq!(found, model.messages.len(), "the shard lost what the model holds: {:?}", model.messages);
    let mailboxes: Vec<_> =
        rows.scan(&[0x02], &[0x03], usize::MAX).unwrap().into_iter().filter(|(key, _)| key[9] == 0x04).collect();
    let stored_bytes: u64 = SENDERS.iter().map(|sender| counters(rows, sender).unwrap().stored_bytes).sum();
    assert_eq!(stored_bytes, mailboxes.iter().map(|(_, value)| value.len() as u64).sum::<u64>());
    for sender in SENDERS {
        let row = counters(rows, sender).unwrap();
        let fates = Fates {
            accepted: row.accepted,
            delivered: row.delivered,
            expired: row.expired,
            collapsed: row.collapsed,
            overflow: row.overflow,
            unregistered: row.unregistered,
            recalled: row.recalled,
        };
        assert_eq!(fates, model.fates.get(sender).copied().unwrap_or_default());
        let waiting = model.messages.iter().filter(|held| held.sender == sender && held.deleted == 0).count();
        assert_eq!(row.waiting(), Some(waiting as u64), "the counters balance");
    }
}

/// Sees that the shard's groups are the model's, asked for by name and by key.
fn compare_groups(model: &Model, state: &State, rows: &MemoryRows) {
    let read = |group_tag, sender: &str, by| {
        let get = GroupGet { group_tag, sender: sender.into(), by: Some(by) };
        match state.group(rows, &get).unwrap().kind {
            Some(Answered::Group(group)) => Some(group),
            Some(Answered::Refusal(_)) => None,
            other => panic!("{other:?}"),
        }
    };
    for sender in SENDERS {
        for (name, tag) in GROUPS {
            let held = model.groups.live.iter().find(|one| (&*one.sender, &*one.name) == (sender, name));
            assert_eq!(read(tag, sender, By::Name(name.into())), held.map(|one| one.told(true)));
        }
    }
    for one in &model.groups.ever {
        let held = model.groups.live.iter().find(|held| (held.tag, held.bits) == (one.tag, one.bits));
        assert_eq!(read(one.tag, &one.sender, By::KeyBits(one.bits)), held.map(|one| one.told(true)));
    }
}

proptest! {
    #[test]
    fn a_shard_answers_and_keeps_what_the_model_says_and_so_does_a_replica_that_restarts(
        entries in vec((pause(), vec(step(), 1..6), prop::bool::weighted(0.3)), 1..40),
    ) {
        let mut model = Model::default();
        let mut player = Player::default();
        let mut notices = BTreeSet::new();
        let (mut rows, mut listed) = (MemoryRows::default(), ListedRows::default());
        let (mut state, mut replica) = (State::load(&rows).unwrap(), State::load(&listed).unwrap());
        let mut now_ms = 1_700_000_000_000u64;
        for (index, (pause, steps, restart)) in (1u64..).zip(&entries) {
            now_ms = now_ms.saturating_add_signed(*pause);
            let commands: Vec<Command> =
                steps.iter().filter_map(|step| player.command(&model, now_ms.max(model.now), step)).collect();
            let entry = Entry { shard_time_ms: now_ms, commands, term: 0 };

            let applied = state.apply(&rows, index, &entry).unwrap();
            let expected = model.apply(index, &entry);
            prop_assert_eq!(applied.answers.len(), expected.len());
            for (at, (answer, expected)) in applied.answers.iter().zip(&expected).enumerate() {
                prop_assert!(expected.contains(answer), "{:?} was answered {:?}, not {:?}", entry.commands[at], answer, expected);
            }
            rows.write(&applied.writes);
            compare(&mut model, &rows, &mut notices);
            compare_groups(&model, &state, &rows);

            if *restart {
                replica = State::load(&listed).unwrap();
            }
            prop_assert_eq!(&replica.apply(&listed, index, &entry).unwrap(), &applied);
            listed.write(&applied.writes);
            prop_assert!(rows.iter().eq(listed.0.iter().map(|(key, value)| (key, value))));
        }
    }
}

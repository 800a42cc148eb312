//! A small model of a shard: what it must answer and keep, said as plainly as possible.
//!
//! Shares nothing with the state but the commands and answers. Everything is a list that is walked; nothing is indexed,
//! stored or forgotten. Stored bytes are not modelled.

use std::collections::{BTreeMap, BTreeSet};

use martlet_proto::cluster::{
    command::{Command, Entry, Expire, Limits, Stamped, command},
    queue::{
        Accepted, Answer, Enqueue, FannedOut, Operation, Recall, Recalled, Refusal, Register, Registered,
        RegistrationRef, Resolved, Subscribe, Subscribed, Unregister, Unregistered, Unsubscribe,
        answer::Kind as Answered, operation::Kind, recall, unregister::What,
    },
};

use crate::group_model::Groups;

/// Log index and position.
pub(crate) type Place = (u64, u32);

/// Device and registration.
pub(crate) type Subscriber = (u64, Vec<u8>);

#[derive(Debug, Clone)]
pub(crate) struct Registration {
    pub(crate) device: u64,
    pub(crate) id: Vec<u8>,
    form: Register,
    created: u64,
    expires: Option<u64>,
    /// Who took its place, and since when it has one that did.
    successor: Option<(Vec<u8>, u64)>,
}

#[derive(Debug, Clone)]
pub(crate) struct Message {
    pub(crate) device: u64,
    pub(crate) place: Place,
    /// Of a notice: as found, once it was seen.
    pub(crate) id: Vec<u8>,
    pub(crate) registration: Vec<u8>,
    pub(crate) sender: String,
    pub(crate) application: String,
    pub(crate) subtype: String,
    pub(crate) collapse_key: String,
    pub(crate) expiry: u64,
    /// 0: no notice.
    pub(crate) deleted: u64,
    /// Whether it came by a topic, and is no notice.
    pub(crate) is_shared: bool,
}

/// Of one topic; the model knows no conditions.
#[derive(Debug, Clone)]
pub(crate) struct FanOut {
    form: martlet_proto::cluster::queue::FanOut,
    expiry: u64,
    cursor: Option<Subscriber>,
    through: bool,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Fates {
    pub(crate) accepted: u64,
    pub(crate) delivered: u64,
    pub(crate) expired: u64,
    pub(crate) collapsed: u64,
    pub(crate) overflow: u64,
    pub(crate) unregistered: u64,
    pub(crate) recalled: u64,
}

/// The answers that are right: more than one only for an operation that came too late, which may be known still.
pub(crate) type Expected = Vec<Option<Answer>>;

#[derive(Debug, Default)]
pub(crate) struct Model {
    pub(crate) now: u64,
    pub(crate) registrations: Vec<Registration>,
    pub(crate) messages: Vec<Message>,
    pub(crate) fates: BTreeMap<String, Fates>,
    pub(crate) groups: Groups,
    written: BTreeMap<u64, Place>,
    /// Of sender and topic.
    pub(crate) topics: BTreeMap<(String, String), BTreeSet<Subscriber>>,
    /// In the order of their homes and places there.
    pub(crate) fan_outs: BTreeMap<(u32, Vec<u8>), FanOut>,
    /// Next position in the entry.
    position: u32,
    /// Subscribers that may still be looked at in the entry.
    fan_out_left: Option<u32>,
    /// What each operation was answered; nothing: barred.
    operations: BTreeMap<Vec<u8>, Option<Answer>>,
}

const THIRTY_DAYS: u64 = 30 * 86_400_000;

fn answer(kind: Answered) -> Answer {
    Answer { kind: Some(kind) }
}

fn refuse(refusal: Refusal) -> Answer {
    answer(Answered::Refusal(refusal as i32))
}

impl Model {
    /// What the entry must be answered, command by command.
    pub(crate) fn apply(&mut self, index: u64, entry: &Entry) -> Vec<Expected> {
        self.now = self.now.max(entry.shard_time_ms);
        (self.position, self.fan_out_left) = (0, None);
        let commands = entry.commands.iter().enumerate();
        commands.map(|(position, command)| self.command((index, position as u32), command)).collect()
    }

    fn command(&mut self, place: Place, command: &Command) -> Expected {
        match command.kind.as_ref().unwrap() {
            command::Kind::Stamped(stamped) => self.operation(place, stamped).into_iter().map(Some).collect(),
            command::Kind::Acks(acks) => {
                for ack in &acks.acks {
                    let at = |message: &Message| {
                        let place =
                            [&[0; 4][..], &message.place.0.to_be_bytes(), &message.place.1.to_be_bytes()].concat();
                        message.device == ack.device_tag
                            && (ack.sequences.iter().any(|named| *named == place)
                                || ack.message_ids.iter().any(|named| *named == message.id))
                    };
                    self.take(at, |fates| &mut fates.delivered);
                }
                vec![None]
            }
            command::Kind::Expire(expire) => {
                self.expire(expire);
                vec![None]
            }
            command::Kind::FanStep(step) => {
                let first = self.fan_outs.iter().find(|(_, one)| !one.through).map(|(at, _)| at.clone());
                if let Some(at) = first {
                    self.go_on(place, &at, &step.limits.unwrap());
                }
                vec![None]
            }
            command::Kind::Raise(_) | command::Kind::Seen(_) => vec![None],
            command::Kind::PublishesDone(_) => unreachable!("not asked of the model"),
        }
    }

    fn operation(&mut self, place: Place, stamped: &Stamped) -> Vec<Answer> {
        let limits = stamped.limits.unwrap();
        let Operation { id, first_try_ms, kind } = stamped.operation.as_ref().unwrap();
        let late = *first_try_ms < self.now.saturating_sub(limits.dedupe_window_ms);
        let early = *first_try_ms > self.now + 1000;
        let expired = refuse(Refusal::ExpiredOperation);
        if let Some(Kind::Resolve(asked)) = kind {
            let known = self.operations.get(&asked.id[..]).cloned();
            let resolved = |answer: Option<Answer>| {
                self::answer(Answered::Resolved(Box::new(Resolved { answer: answer.map(Box::new) })))
            };
            return match known {
                Some(known) if late => vec![resolved(known), expired],
                Some(known) => vec![resolved(known)],
                None if late || early => vec![expired],
                None => {
                    self.operations.insert(asked.id.to_vec(), None);
                    vec![resolved(None)]
                }
            };
        }
        if let Some(Kind::FanOut(form)) = kind {
            let at = (form.home, form.place.to_vec());
            if !self.fan_outs.contains_key(&at) {
                let expiry = self.now + form.remaining_ms;
                let one = FanOut { form: form.clone(), expiry, cursor: None, through: false };
                self.fan_outs.insert(at.clone(), one);
                self.go_on(place, &at, &limits);
            }
            return vec![answer(Answered::FannedOut(FannedOut {}))];
        }
        if let Some(known) = self.operations.get(&id[..]) {
            let known = known.clone().unwrap_or_else(|| expired.clone());
            return if late { vec![known, expired] } else { vec![known] };
        }
        if late {
            return vec![expired];
        }
        if early {
            // Further ahead it may be tried anew, once it is in time.
            if *first_try_ms <= self.now + limits.dedupe_window_ms {
                self.operations.insert(id.to_vec(), None);
            }
            return vec![expired];
        }
        let answer = match kind.as_ref().unwrap() {
            Kind::Enqueue(enqueue) => self.enqueue(place, id, stamped, enqueue, &limits),
            Kind::Register(register) => self.register(register, &limits),
            Kind::Unregister(unregister) => self.unregister(unregister),
            Kind::Recall(recall) => self.recall(recall),
            Kind::GroupChange(change) => self.groups.change(change, &limits, self.now),
            Kind::Subscribe(Subscribe { device_tag, registration_id, sender, topic }) => {
                self.subscribe(*device_tag, registration_id, sender, topic, Some(limits.topics_max))
            }
            Kind::Unsubscribe(Unsubscribe { device_tag, registration_id, sender, topic }) => {
                self.subscribe(*device_tag, registration_id, sender, topic, None)
            }
            Kind::Resolve(_)
            | Kind::Check(_)
            | Kind::GroupGet(_)
            | Kind::FanOut(_)
            | Kind::Publish(_)
            | Kind::TokenInfo(_) => unreachable!("not asked of the model, or answered above"),
        };
        self.operations.insert(id.to_vec(), Some(answer.clone()));
        vec![answer]
    }

    fn enqueue(&mut self, place: Place, id: &[u8], stamped: &Stamped, enqueue: &Enqueue, limits: &Limits) -> Answer {
        let (device, place) = (enqueue.device_tag, self.place(place));
        let told = &stamped.written_through;
        if !told.is_empty() {
            let index = u64::from_be_bytes(told[4..12].try_into().unwrap());
            let position = u32::from_be_bytes(told[12..].try_into().unwrap());
            let written = self.written.entry(device).or_default();
            *written = (*written).max((index, position));
        }
        let Some((addressed, current)) = self.current(device, &enqueue.registration_id) else {
            return refuse(Refusal::NotRegistered);
        };
        if !current.form.senders.contains(&enqueue.sender) {
            return refuse(Refusal::MismatchSenderId);
        }
        if !enqueue.restricted_package_name.is_empty() && enqueue.restricted_package_name != current.form.application {
            return refuse(Refusal::InvalidPackageName);
        }
        let canonical = addressed.successor.is_some().then(|| current.reference());
        let accepted = answer(Answered::Accepted(Accepted { canonical }));
        let message = Message {
            device,
            place,
            id: id.to_vec(),
            registration: current.id.clone(),
            sender: enqueue.sender.clone(),
            application: current.form.application.clone(),
            subtype: current.form.subtype.clone(),
            collapse_key: enqueue.collapse_key.clone(),
            expiry: self.now + u64::from(enqueue.ttl_secs) * 1000,
            deleted: 0,
            is_shared: false,
        };
        self.fates.entry(enqueue.sender.clone()).or_default().accepted += 1;
        if enqueue.ttl_secs == 0 {
            self.fates.get_mut(&enqueue.sender).unwrap().expired += 1;
            return accepted;
        }
        self.put(message, limits);
        accepted
    }

    /// Whether a fan-out is not through.
    pub(crate) fn fans_out(&self) -> bool {
        self.fan_outs.values().any(|one| !one.through)
    }

    /// A place for what the command at `place` makes.
    fn place(&mut self, place: Place) -> Place {
        let position = self.position.max(place.1);
        self.position = position + 1;
        (place.0, position)
    }

    /// What a token names, and whom it means.
    fn current(&self, device: u64, id: &[u8]) -> Option<(&Registration, &Registration)> {
        let find = |id: &[u8]| {
            self.registrations.iter().find(|one| one.device == device && one.id == id && one.is_live(self.now))
        };
        let addressed = find(id)?;
        Some(match &addressed.successor {
            None => (addressed, addressed),
            Some((successor, _)) => (addressed, find(successor)?),
        })
    }

    /// Takes an accepted message into the mailbox, within the limits.
    fn put(&mut self, mut message: Message, limits: &Limits) {
        let (device, sender) = (message.device, message.sender.clone());

        // Written and not acked: only the newest so many stay.
        let (now, written) = (self.now, self.written.get(&device).copied().unwrap_or_default());
        let unacked: Vec<Place> = self
            .messages
            .iter()
            .filter(|held| held.device == device && held.expiry > now && held.place <= written)
            .map(|held| held.place)
            .collect();
        let excess = unacked.len().saturating_sub(limits.unacked_max as usize);
        let excess: BTreeSet<Place> = unacked[..excess].iter().copied().collect();
        self.take(|held| held.device == device && excess.contains(&held.place), |fates| &mut fates.overflow);

        // Waiting of this kind.
        let kin = {
            let message = message.clone();
            move |held: &Message| {
                held.device == device
                    && held.expiry > now
                    && held.place > written
                    && held.collapse_key.is_empty()
                    && (&held.sender, &held.application, &held.subtype)
                        == (&message.sender, &message.application, &message.subtype)
            }
        };
        let waiting: Vec<&Message> = self.messages.iter().filter(|held| kin(held)).collect();
        let deleted: u64 = waiting.iter().map(|held| held.deleted).sum();
        let full = deleted > 0 || waiting.len() >= limits.waiting_max as usize;
        if message.collapse_key.is_empty() && full {
            let messages = waiting.iter().filter(|held| held.deleted == 0).count() as u64;
            self.take(kin, |fates| &mut fates.overflow);
            self.fates.get_mut(&sender).unwrap().overflow += 1;
            message.deleted = deleted + messages + 1;
            message.id = vec![];
            message.is_shared = false;
            message.expiry = now + 28 * 86_400_000;
        }
        if !message.collapse_key.is_empty() {
            self.collapse(&message, written, limits);
        }
        self.messages.push(message);
    }

    /// Takes out what a message with a collapse key comes in place of.
    fn collapse(&mut self, message: &Message, written: Place, limits: &Limits) {
        let now = self.now;
        let same = |held: &Message| {
            held.device == message.device
                && held.expiry > now
                && !held.collapse_key.is_empty()
                && (&held.sender, &held.application, &held.subtype)
                    == (&message.sender, &message.application, &message.subtype)
        };
        self.take(|held| same(held) && held.collapse_key == message.collapse_key, |fates| &mut fates.collapsed);
        let waiting = |held: &&Message| same(held) && held.place > written;
        let keys: BTreeSet<&String> = self.messages.iter().filter(waiting).map(|held| &held.collapse_key).collect();
        let excess = (keys.len() + 1).saturating_sub(limits.collapse_keys_max as usize);
        let oldest: Vec<Place> = self.messages.iter().filter(waiting).map(|held| held.place).take(excess).collect();
        self.take(|held| same(held) && oldest.contains(&held.place), |fates| &mut fates.collapsed);
    }

    fn recall(&mut self, recall: &Recall) -> Answer {
        let (device, now) = (recall.device_tag, self.now);
        let before = self.messages.len();
        match recall.what.as_ref().unwrap() {
            recall::What::MessageId(id) => self.take(
                |held| held.device == device && held.expiry > now && held.deleted == 0 && held.id == *id,
                |fates| &mut fates.recalled,
            ),
            recall::What::CollapseKey(of) => {
                let Some((_, current)) = self.current(device, &of.registration_id) else {
                    return refuse(Refusal::NotRegistered);
                };
                let id = current.id.clone();
                self.take(
                    |held| {
                        held.device == device
                            && held.expiry > now
                            && held.registration == id
                            && held.collapse_key == of.collapse_key
                    },
                    |fates| &mut fates.recalled,
                );
            }
        }
        answer(Answered::Recalled(Recalled { count: u32::try_from(before - self.messages.len()).unwrap() }))
    }

    /// Subscribes, with how many topics it may have, or unsubscribes.
    fn subscribe(&mut self, device: u64, id: &[u8], sender: &str, topic: &str, topics_max: Option<u32>) -> Answer {
        let Some((_, current)) = self.current(device, id) else { return refuse(Refusal::NotRegistered) };
        let (senders, id) = (current.form.senders.clone(), current.id.clone());
        let senders = if sender.is_empty() {
            senders
        } else if senders.iter().any(|allowed| allowed == sender) {
            vec![sender.to_owned()]
        } else {
            return refuse(Refusal::MismatchSenderId);
        };
        let who = (device, id);
        let of = |sender: &String| (sender.clone(), topic.to_owned());
        match topics_max {
            Some(max) => {
                let is_new = |sender: &&String| self.topics.get(&of(sender)).is_none_or(|all| !all.contains(&who));
                let new: Vec<&String> = senders.iter().filter(is_new).collect();
                let has = self.topics.values().filter(|all| all.contains(&who)).count();
                if !new.is_empty() && has + new.len() > max as usize {
                    return refuse(Refusal::TooManyTopics);
                }
                for sender in senders {
                    self.topics.entry(of(&sender)).or_default().insert(who.clone());
                }
            }
            None => {
                for sender in senders {
                    self.topics.entry(of(&sender)).or_default().remove(&who);
                }
            }
        }
        answer(Answered::Subscribed(Subscribed {}))
    }

    /// The next step of a fan-out.
    fn go_on(&mut self, place: Place, at: &(u32, Vec<u8>), limits: &Limits) {
        let left = self.fan_out_left.get_or_insert(limits.fan_out_max);
        if *left == 0 {
            return;
        }
        let one = &self.fan_outs[at];
        let (form, expiry, after) = (one.form.clone(), one.expiry, one.cursor.clone());
        let publish = form.publish.unwrap();
        let topic = self.topics.get(&(publish.sender.clone(), publish.topics[0].clone()));
        let is_next = |who: &&Subscriber| expiry > self.now && after.as_ref().is_none_or(|after| *who > after);
        let next: Vec<_> = topic.into_iter().flatten().filter(is_next).take(*left as usize).cloned().collect();
        let is_full = next.len() == *left as usize;
        *left -= u32::try_from(next.len()).unwrap();
        for (device, id) in &next {
            let Some((addressed, current)) = self.current(*device, id) else { continue };
            if addressed.successor.is_some() || !current.form.senders.contains(&publish.sender) {
                continue;
            }
            let message = Message {
                device: *device,
                place: (0, 0),
                id: vec![],
                registration: id.clone(),
                sender: publish.sender.clone(),
                application: current.form.application.clone(),
                subtype: current.form.subtype.clone(),
                collapse_key: publish.collapse_key.clone(),
                expiry,
                deleted: 0,
                is_shared: true,
            };
            let message = Message { place: self.place(place), ..message };
            self.fates.entry(publish.sender.clone()).or_default().accepted += 1;
            self.put(message, limits);
        }
        let one = self.fan_outs.get_mut(at).unwrap();
        one.cursor = next.last().cloned().or(after);
        one.through = !is_full;
    }

    fn register(&mut self, form: &Register, limits: &Limits) -> Answer {
        let (now, max) = (self.now, limits.registrations_max as usize);
        let device = form.device_tag;
        let line: Vec<usize> = (0..self.registrations.len())
            .filter(|at| {
                let one = &self.registrations[*at];
                one.device == device && one.is_live(now) && one.is_of_line(form)
            })
            .collect();
        let same = line.iter().copied().filter(|at| {
            let old = &self.registrations[*at].form;
            old.senders == form.senders && (old.iid == form.iid || old.iid_invented && form.iid_invented)
        });
        let found = same.max_by_key(|at| {
            let one = &self.registrations[*at];
            (one.successor.is_none(), one.created, one.id.clone())
        });
        let expires = (form.ttl_secs > 0).then(|| now + form.ttl_secs * 1000);
        let current = match found {
            Some(at) => {
                let one = &mut self.registrations[at];
                one.expires = expires;
                one.successor = None;
                one.clone()
            }
            None => {
                let others = self.registrations.iter().filter(|one| {
                    one.device == device && one.is_live(now) && one.successor.is_none() && !one.is_of_line(form)
                });
                if others.count() >= max {
                    return refuse(Refusal::TooManyRegistrations);
                }
                let id = form.registration_id.to_vec();
                let one = Registration { device, id, form: form.clone(), created: now, expires, successor: None };
                self.registrations.push(one.clone());
                one
            }
        };
        for at in line {
            let one = &mut self.registrations[at];
            if one.id != current.id {
                let since = one.successor.as_ref().map_or(now, |(_, since)| *since);
                one.successor = Some((current.id.clone(), since));
            }
        }
        let mut old: Vec<(u64, Vec<u8>)> = self
            .registrations
            .iter()
            .filter(|one| one.device == device)
            .filter_map(|one| one.successor.as_ref().map(|(_, since)| (*since, one.id.clone())))
            .collect();
        old.sort();
        old.truncate(old.len().saturating_sub(max));
        self.bury(device, &old.into_iter().map(|(_, id)| id).collect());
        let registered = Registered { registration: Some(current.reference()), created: found.is_none() };
        answer(Answered::Registered(registered))
    }

    fn unregister(&mut self, unregister: &Unregister) -> Answer {
        let device = unregister.device_tag;
        let named = |one: &Registration| {
            one.device == device
                && one.form.application == unregister.application
                && match unregister.what.as_ref().unwrap() {
                    What::WholeApplication(_) => true,
                    What::InstanceId(iid) => one.form.iid == *iid,
                    What::OneToken(token) => {
                        let iid = if token.iid.is_empty() { one.form.iid_invented } else { one.form.iid == token.iid };
                        iid && one.form.scope == token.scope
                            && one.form.subtype == token.subtype
                            && one.form.senders.contains(&token.sender)
                    }
                }
        };
        let named = self.registrations.iter().filter(|one| named(one)).map(|one| one.id.clone()).collect();
        let victims = self.with_superseded(device, &named);
        let live = |one: &&Registration| one.device == device && victims.contains(&one.id) && one.is_live(self.now);
        let count = self.registrations.iter().filter(live).count() as u32;
        self.bury(device, &victims);
        answer(Answered::Unregistered(Unregistered { count }))
    }

    fn expire(&mut self, expire: &Expire) {
        let upto = expire.upto_ms.min(self.now);
        let mut left = (expire.rows_max as usize).min(1000);
        let mut due: Vec<(u64, u64, Place)> =
            self.messages.iter().filter(|held| held.expiry <= upto).map(|m| (m.expiry, m.device, m.place)).collect();
        due.sort_unstable();
        due.truncate(left);
        left -= due.len();
        let due: BTreeSet<(u64, Place)> = due.into_iter().map(|(_, device, place)| (device, place)).collect();
        self.take(|held| due.contains(&(held.device, held.place)), |fates| &mut fates.expired);

        while left > 0 {
            let due = self.registrations.iter().filter_map(|one| Some((one.due()?, one.device, one.id.clone()))).min();
            let Some((_, device, id)) = due.filter(|(due, ..)| *due <= upto) else { return };
            let victims = self.with_superseded(device, &BTreeSet::from([id]));
            let of = |held: &&Message| held.device == device && victims.contains(&held.registration);
            let places: Vec<Place> = self.messages.iter().filter(of).map(|held| held.place).collect();
            if places.len() > left {
                let places = &places[..left];
                self.take(
                    |held| held.device == device && places.contains(&held.place),
                    |fates| &mut fates.unregistered,
                );
                return;
            }
            let subscribed = |all: &BTreeSet<Subscriber>| {
                all.iter().filter(|(of, id)| *of == device && victims.contains(id)).count()
            };
            let subscriptions: usize = self.topics.values().map(subscribed).sum();
            left = left.saturating_sub(places.len() + victims.len() + subscriptions);
            self.bury(device, &victims);
        }
    }

    fn with_superseded(&self, device: u64, named: &BTreeSet<Vec<u8>>) -> BTreeSet<Vec<u8>> {
        let goes = |one: &&Registration| {
            one.device == device
                && (named.contains(&one.id) || one.successor.as_ref().is_some_and(|(by, _)| named.contains(by)))
        };
        self.registrations.iter().filter(goes).map(|one| one.id.clone()).collect()
    }

    fn bury(&mut self, device: u64, ids: &BTreeSet<Vec<u8>>) {
        self.registrations.retain(|one| one.device != device || !ids.contains(&one.id));
        for all in self.topics.values_mut() {
            all.retain(|(of, id)| *of != device || !ids.contains(id));
        }
        self.take(|held| held.device == device && ids.contains(&held.registration), |fates| &mut fates.unregistered);
    }

    /// Takes messages out, and counts what became of them.
    fn take(&mut self, which: impl Fn(&Message) -> bool, fate: impl Fn(&mut Fates) -> &mut u64) {
        for held in self.messages.extract_if(.., |held| which(held)) {
            if held.deleted == 0 {
                *fate(self.fates.entry(held.sender).or_default()) += 1;
            }
        }
    }
}

impl Registration {
    fn due(&self) -> Option<u64> {
        let superseded = self.successor.as_ref().map(|(_, since)| since + THIRTY_DAYS);
        self.expires.into_iter().chain(superseded).min()
    }

    fn is_live(&self, now: u64) -> bool {
        self.due().is_none_or(|due| now < due)
    }

    fn is_of_line(&self, form: &Register) -> bool {
        let own = &self.form;
        (&own.application, &own.cert, &own.subtype, &own.scope)
            == (&form.application, &form.cert, &form.subtype, &form.scope)
            && (own.scope.is_empty() || own.senders == form.senders)
    }

    fn reference(&self) -> RegistrationRef {
        RegistrationRef {
            registration_id: self.id.clone().into(),
            token_key_id: self.form.token_key_id,
            iid: self.form.iid.clone(),
        }
    }
}

//! Topics: who subscribes, who gets a publish, in which steps, and what is left afterwards.

use martlet_proto::{
    cluster::{
        command::{FanStep, PublishesDone},
        queue::{FanOut, FannedOut, KnownToken, Publish, Published, Subscribe, Subscribed, TokenInfo, Unsubscribe},
    },
    topic::Condition,
};

use super::*;
use crate::state::publish;

impl Shard {
    fn register_on(&mut self, device: u64, iid: &str) -> RegistrationRef {
        let number = u8::try_from(self.ids % 200 + 1).unwrap();
        let mut id = vec![number; 16];
        id[..8].copy_from_slice(&self.ids.to_be_bytes());
        let form = Register { device_tag: device, registration_id: id.into(), ..instance(iid, number) };
        self.register(form)
    }

    fn subscribe(&mut self, device: u64, to: &RegistrationRef, topic: &str) -> Answer {
        self.operation(Kind::Subscribe(Subscribe {
            device_tag: device,
            registration_id: to.registration_id.clone(),
            sender: "1001".into(),
            topic: topic.into(),
        }))
    }

    fn unsubscribe(&mut self, device: u64, to: &RegistrationRef, topic: &str) -> Answer {
        self.operation(Kind::Unsubscribe(Unsubscribe {
            device_tag: device,
            registration_id: to.registration_id.clone(),
            sender: "1001".into(),
            topic: topic.into(),
        }))
    }

    fn fan_out(&mut self, place: u64, open_from: u64, publish: Publish) -> Applied {
        let fan_out = FanOut {
            publish_id: id(1_000_000 + place),
            home: 5,
            place: at(place).to_bytes().to_vec().into(),
            open_from: at(open_from).to_bytes().to_vec().into(),
            remaining_ms: 3_600_000,
            publish: Some(publish),
        };
        let operation = Operation { id: id(0), first_try_ms: 0, kind: Some(Kind::FanOut(fan_out)) };
        let command = self.stamp(operation, None);
        let applied = self.apply(vec![command]);
        assert_eq!(applied.answers[0].as_ref().unwrap().kind, Some(Answered::FannedOut(FannedOut {})));
        applied
    }

    fn step(&mut self) -> Applied {
        let limits = Some(self.limits);
        self.one(command::Kind::FanStep(FanStep { limits }))
    }

    fn given(&self, applied: &Applied) -> Vec<u64> {
        let given = applied.effects.iter().filter_map(|effect| match effect {
            Effect::Enqueued { device_tag, row, .. } => {
                assert_eq!((&*row.message.wire_from, &row.message.payload[..]), ("/topics/news", &b"payload"[..]));
                Some(device_tag.0)
            }
            _ => None,
        });
        given.collect()
    }

    fn rows_of(&self, family: key::Family) -> usize {
        self.rows.iter().filter(|(key, _)| family.is_of(key)).count()
    }
}

fn at(index: u64) -> Sequence {
    Sequence { incarnation: 0, index, position: 0 }
}

fn to(condition: &Condition) -> Publish {
    Publish {
        sender: "1001".into(),
        topics: condition.topics().to_vec(),
        condition: Bytes::copy_from_slice(condition.program()),
        wire_from: "/topics/news".into(),
        ttl_secs: 3600,
        payload: Bytes::from_static(b"payload"),
        ..Default::default()
    }
}

fn news() -> Publish {
    to(&Condition::topic("news"))
}

fn is_subscribed(answer: &Answer) -> bool {
    answer.kind == Some(Answered::Subscribed(Subscribed {}))
}

#[test]
fn every_subscriber_gets_a_message_once_in_bounded_steps_and_the_body_is_kept_once() {
    let mut shard = Shard::new();
    shard.limits.fan_out_max = 40;
    for device in 1..=100 {
        let to = shard.register_on(device, IID);
        assert!(is_subscribed(&shard.subscribe(device, &to, "news")));
    }
    let begun = shard.fan_out(1, 1, news());
    let first = shard.given(&begun);
    assert!(shard.state.fans_out(&shard.rows).unwrap());
    let second = shard.step();
    let third = shard.step();
    let all = [first.clone(), shard.given(&second), shard.given(&third)].concat();
    assert_eq!(all, (1..=100).collect::<Vec<u64>>());
    assert_eq!(first.len(), 40);
    assert!(!shard.state.fans_out(&shard.rows).unwrap());
    let nothing = shard.step();
    assert!(shard.given(&nothing).is_empty(), "nothing is left to do");
    assert_eq!(shard.rows_of(key::Family::Body), 2, "the body and who holds it");
    assert_eq!(shard.count().accepted, 100);
    for device in 1..=100 {
        let mailbox = waiting(&shard.rows, DeviceTag(device), None, 9).unwrap();
        assert_eq!(mailbox.len(), 1);
        assert_eq!(
            (&*mailbox[0].1.message.wire_from, &mailbox[0].1.message.payload[..]),
            ("/topics/news", &b"payload"[..])
        );
        let sequences = vec![mailbox[0].0.to_bytes().to_vec().into()];
        shard.device_ack(DeviceAck { device_tag: device, sequences, message_ids: vec![], gateway: 0 });
    }
    assert_eq!(shard.rows_of(key::Family::Body), 0, "it went with the last row");
}

#[test]
fn a_condition_is_asked_once_for_each_subscriber_of_any_of_its_topics() {
    let mut shard = Shard::new();
    shard.limits.fan_out_max = 7;
    let text = "'a' in topics && ('b' in topics || 'c' in topics)";
    let mut expected = Vec::new();
    for device in 1..=64u64 {
        let to = shard.register_on(device, IID);
        let of = |bit: u64| device & bit != 0;
        for (topic, bit) in [("a", 1), ("b", 2), ("c", 4)] {
            if of(bit) {
                assert!(is_subscribed(&shard.subscribe(device, &to, topic)));
            }
        }
        if of(1) && (of(2) || of(4)) {
            expected.push(device);
        }
    }
    let begun = shard.fan_out(1, 1, to(&Condition::parse(text).unwrap()));
    let mut given = shard.given(&begun);
    while shard.state.fans_out(&shard.rows).unwrap() {
        let applied = shard.step();
        given.extend(shard.given(&applied));
    }
    assert_eq!(given, expected);
}

#[test]
fn a_step_ends_by_its_bytes_where_names_are_long() {
    let mut shard = Shard::new();
    let application = "a".repeat(1_000);
    for device in 1..=400u64 {
        let iid = IID;
        let form = Register { application: application.clone(), ..instance(iid, 1) };
        let mut id = vec![7; 16];
        id[..8].copy_from_slice(&device.to_be_bytes());
        let to = shard.register(Register { device_tag: device, registration_id: id.into(), ..form });
        shard.subscribe(device, &to, "news");
    }
    let begun = shard.fan_out(1, 1, news());
    let bytes = |applied: &Applied| -> usize {
        let size = |write: &crate::state::Write| match write {
            crate::state::Write::Put { value, .. } => value.len(),
            _ => 0,
        };
        applied.writes.iter().map(size).sum()
    };
    assert!(bytes(&begun) <= 256 << 10, "{}", bytes(&begun));
    let mut given = shard.given(&begun);
    assert!((200..300).contains(&given.len()), "{}", given.len());
    while shard.state.fans_out(&shard.rows).unwrap() {
        let applied = shard.step();
        given.extend(shard.given(&applied));
    }
    assert_eq!(given, (1..=400).collect::<Vec<u64>>());
}

#[test]
fn what_is_handed_over_again_changes_nothing_also_when_it_was_forgotten_since() {
    let mut shard = Shard::new();
    let to = shard.register_on(PHONE, IID);
    shard.subscribe(PHONE, &to, "news");
    let once = shard.fan_out(3, 3, news());
    assert_eq!(shard.given(&once), [PHONE]);
    let twice = shard.fan_out(3, 3, news());
    assert_eq!(shard.given(&twice), [0u64; 0]);
    let next = shard.fan_out(9, 9, news());
    assert_eq!(shard.given(&next), [PHONE]);
    let late = shard.fan_out(3, 3, news());
    assert_eq!(shard.given(&late), [0u64; 0], "over everywhere, and known to be");
    assert_eq!(shard.rows_of(key::Family::Publish), 2, "the newest, and before which all is over");
}

#[test]
fn superseded_unregistered_and_unsubscribed_ones_get_nothing() {
    let mut shard = Shard::new();
    let old = shard.register_on(1, IID);
    shard.subscribe(1, &old, "news");
    shard.register_on(1, IID_2);
    let gone = shard.register_on(PHONE, IID);
    shard.subscribe(PHONE, &gone, "news");
    shard.unregister("app.one", What::WholeApplication(true));
    let left = shard.register_on(3, IID);
    shard.subscribe(3, &left, "news");
    assert!(is_subscribed(&shard.unsubscribe(3, &left, "news")));
    assert!(is_subscribed(&shard.unsubscribe(3, &left, "news")), "also when it does not subscribe");
    let applied = shard.fan_out(1, 1, news());
    assert_eq!(shard.given(&applied), [0u64; 0]);
    assert_eq!(shard.rows_of(key::Family::Subscribed), 1, "that of the superseded one");
    let after = shard.subscribe(PHONE, &gone, "news");
    assert_eq!(refusal(&after), Some(Refusal::NotRegistered));
}

#[test]
fn a_registration_has_so_many_topics_and_loses_them_with_itself_in_bounded_steps() {
    let mut shard = Shard::new();
    shard.limits.topics_max = 350;
    let to = shard.register_on(PHONE, IID);
    for topic in 0..350 {
        assert!(is_subscribed(&shard.subscribe(PHONE, &to, &format!("t{topic}"))));
    }
    let one_more = shard.subscribe(PHONE, &to, "one-more");
    assert_eq!(refusal(&one_more), Some(Refusal::TooManyTopics));
    assert!(is_subscribed(&shard.subscribe(PHONE, &to, "t5")), "that is none more");
    assert_eq!(shard.unregister("app.one", What::WholeApplication(true)), 1);
    let left = shard.rows_of(key::Family::Subscribed);
    assert!((1..350).contains(&left), "{left}");
    for _ in 0..9 {
        shard.expire(1_000);
    }
    for family in [key::Family::Subscribed, key::Family::Subscription, key::Family::Subscriptions, key::Family::Lapse] {
        assert_eq!(shard.rows_of(family), 0, "{family:?}");
    }
}

#[test]
fn a_home_keeps_publishes_in_their_order_until_they_are_over_and_no_more_than_its_limit() {
    let mut shard = Shard::new();
    for _ in 0..4 {
        let answer = shard.operation(Kind::Publish(news()));
        assert_eq!(answer.kind, Some(Answered::Published(Published {})));
    }
    let full = shard.operation(Kind::Publish(news()));
    assert_eq!(refusal(&full), Some(Refusal::TopicsRateExceeded));
    let places = |shard: &Shard| -> Vec<Sequence> {
        publish::kept(&shard.rows, None, 9).unwrap().into_iter().map(|(place, _)| place).collect()
    };
    let kept = places(&shard);
    assert_eq!((kept.len(), kept.is_sorted()), (4, true));
    let done = |places: &[Sequence]| {
        let places = places.iter().map(|place| place.to_bytes().to_vec().into()).collect();
        command::Kind::PublishesDone(PublishesDone { places })
    };
    shard.one(done(&kept[..2]));
    shard.one(done(&kept[..2]));
    assert_eq!(places(&shard), kept[2..]);
    assert_eq!(shard.state.publishes_open(), 2);
    let answer = shard.operation(Kind::Publish(news()));
    assert_eq!(answer.kind, Some(Answered::Published(Published {})));
}

#[test]
fn a_malformed_publish_is_answered_so() {
    let mut shard = Shard::new();
    for publish in [
        Publish { sender: String::new(), ..news() },
        Publish { topics: vec![], ..news() },
        Publish { topics: vec!["a b".into()], ..news() },
        Publish { condition: Bytes::from_static(&[0, 0xff]), ..news() },
        Publish { condition: Bytes::from_static(&[1]), ..news() },
        Publish { ttl_secs: u32::MAX, ..news() },
    ] {
        let answer = shard.operation(Kind::Publish(publish));
        assert_eq!(refusal(&answer), Some(Refusal::Malformed));
    }
}

#[test]
fn what_a_token_is_comes_in_parts_where_its_topics_are_many() {
    let mut shard = Shard::new();
    shard.limits.topics_max = 300;
    let to = shard.register_on(PHONE, IID);
    for topic in 0..300 {
        shard.subscribe(PHONE, &to, &format!("t{topic}"));
    }
    let mut topics = BTreeSet::new();
    let mut info = TokenInfo {
        device_tag: PHONE,
        registration_id: to.registration_id.clone(),
        sender: "1001".into(),
        details: true,
        after: Bytes::new(),
    };
    loop {
        let answer = shard.state.token_info(&shard.rows, &info, 1_000).unwrap();
        let Some(Answered::TokenInfo(KnownToken { application, topics: some, next, .. })) = answer.kind else {
            panic!("not known: {answer:?}")
        };
        assert_eq!(application, "app.one");
        topics.extend(some.into_iter().map(|one| (one.topic, one.added_ms)));
        if next.is_empty() {
            break;
        }
        info.after = next;
    }
    assert_eq!(topics.len(), 300);
    assert!(topics.iter().all(|(_, added_ms)| *added_ms == START_MS));
    let nothing = shard.state.token_info(&shard.rows, &info, 0).unwrap();
    assert!(matches!(nothing.kind, Some(Answered::TokenInfo(KnownToken { topics, .. })) if topics.is_empty()));
}

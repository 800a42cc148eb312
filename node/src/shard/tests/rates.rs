//! What a leader refuses because it comes too often, and what it does not.

use martlet_proto::{
    cluster::queue::{FanOut, Publish, Refusal},
    topic::Condition,
};

use super::*;
use crate::metrics::{RateLabel, RateLimit};

/// Time that stands still, so that nothing is refilled behind a slow test's back.
#[derive(Debug)]
struct StillClock(Mutex<Instant>);

impl StillClock {
    fn advance(&self, by: Duration) {
        *self.0.lock().unwrap() += by;
    }
}

impl Clock for StillClock {
    fn now(&self) -> Instant {
        *self.0.lock().unwrap()
    }

    fn wall_ms(&self) -> u64 {
        20_000 * DAY_MS
    }
}

/// A leader that takes `per_minute` messages a minute for a device, and `per_topic` for a topic.
async fn limited(per_minute: u32, per_topic: u32) -> (Node, Arc<StillClock>) {
    let settings = ShardSettings {
        device_messages_per_minute_max: per_minute,
        topic_messages_per_minute_max: per_topic,
        rates_remembered_max: 4,
        ..ShardSettings::default()
    };
    let clock = Arc::new(StillClock(Mutex::new(SystemClock.now())));
    let node = Node::new(1, settings, Arc::clone(&clock) as Arc<dyn Clock>);
    node.lead(0, TERM).await;
    node.register(SHARD).await;
    (node, clock)
}

/// The refusals of a batch; none where something was accepted.
async fn refusals(node: &Node, kinds: Vec<operation::Kind>) -> Vec<Option<Refusal>> {
    let operations = kinds.into_iter().map(|kind| node.operation(kind)).collect();
    let answers = accepted(&node.outcome(SHARD, operations).await);
    let refusal = |answer: &answer::Kind| match answer {
        answer::Kind::Refusal(refusal) => Some(Refusal::try_from(*refusal).unwrap()),
        _ => None,
    };
    answers.iter().map(refusal).collect()
}

fn message() -> operation::Kind {
    enqueue("hello", 60)
}

fn message_of(change: impl FnOnce(&mut Enqueue)) -> operation::Kind {
    let operation::Kind::Enqueue(mut enqueue) = message() else { unreachable!() };
    change(&mut enqueue);
    operation::Kind::Enqueue(enqueue)
}

fn publish(topics: &[&str]) -> operation::Kind {
    let condition = match topics {
        [one] => Condition::topic(one),
        _ => {
            let terms: Vec<String> = topics.iter().map(|topic| format!("'{topic}' in topics")).collect();
            Condition::parse(&terms.join(" || ")).unwrap()
        }
    };
    operation::Kind::Publish(Publish {
        sender: SENDER.into(),
        topics: condition.topics().to_vec(),
        condition: Bytes::copy_from_slice(condition.program()),
        ttl_secs: 60,
        ..Publish::default()
    })
}

fn rate_refusals(node: &Node, limit: RateLimit) -> u64 {
    node.metrics.rate_refusals.get_or_create(&RateLabel { limit }).get()
}

const TOO_OFTEN: Option<Refusal> = Some(Refusal::DeviceRateExceeded);

#[tokio::test]
async fn above_a_devices_rate_a_message_is_refused_without_an_entry_until_the_bucket_has_one_again() {
    let (node, clock) = limited(2, 0).await;
    assert_eq!(refusals(&node, vec![message(), message(), message()]).await, [None, None, TOO_OFTEN]);
    let entries = node.entries(0).len();
    assert_eq!(refusals(&node, vec![message()]).await, [TOO_OFTEN]);
    assert_eq!((node.entries(0).len(), node.waiting()), (entries, 2));
    assert_eq!(rate_refusals(&node, RateLimit::Device), 2);
    clock.advance(Duration::from_secs(30));
    assert_eq!(refusals(&node, vec![message(), message()]).await, [None, TOO_OFTEN]);
}

#[tokio::test]
async fn without_a_limit_nothing_is_counted() {
    let (node, _) = limited(0, 0).await;
    assert_eq!(refusals(&node, vec![message(); 300]).await, [None; 300]);
    assert_eq!(refusals(&node, vec![publish(&["news"]); 300]).await, [None; 300]);
}

#[tokio::test]
async fn what_the_shard_would_refuse_anyhow_is_told_as_that_and_not_as_too_often() {
    let (node, _) = limited(1, 0).await;
    let gone = || message_of(|enqueue| enqueue.registration_id = vec![8; 16].into());
    let foreign = || message_of(|enqueue| enqueue.sender = "1".into());
    let restricted = || message_of(|enqueue| enqueue.restricted_package_name = "org.example.other".into());
    let both = || message_of(|enqueue| (enqueue.sender, enqueue.restricted_package_name) = ("1".into(), "x".into()));
    let expected = [Refusal::NotRegistered, Refusal::MismatchSenderId, Refusal::InvalidPackageName]
        .into_iter()
        .chain([Refusal::MismatchSenderId])
        .map(Some);
    let batch = vec![message(), gone(), foreign(), restricted(), both(), message()];
    let expected: Vec<_> = [None].into_iter().chain(expected).chain([TOO_OFTEN]).collect();
    assert_eq!(refusals(&node, batch).await, expected);
    assert_eq!(rate_refusals(&node, RateLimit::Device), 1);
    assert_eq!(node.entries(0).last().unwrap().commands.len(), 1, "no entry holds what was refused");
}

#[tokio::test]
async fn time_to_live_0_and_a_dry_run_are_never_too_often_and_take_nothing() {
    let (node, _) = limited(1, 0).await;
    let now = || enqueue("now", 0);
    let check = || {
        let registration_id = REGISTRATION.to_vec().into();
        operation::Kind::Check(Check { device_tag: DEVICE, registration_id, sender: SENDER.into(), ..Check::default() })
    };
    let batch = vec![now(), check(), now(), message(), message(), now(), check()];
    assert_eq!(refusals(&node, batch).await, [None, None, None, None, TOO_OFTEN, None, None]);
}

#[tokio::test]
async fn a_fan_out_is_not_counted_for_the_devices_it_reaches() {
    let (node, _) = limited(1, 0).await;
    let subscribe = operation::Kind::Subscribe(martlet_proto::cluster::queue::Subscribe {
        device_tag: DEVICE,
        registration_id: REGISTRATION.to_vec().into(),
        sender: SENDER.into(),
        topic: "news".into(),
    });
    assert_eq!(refusals(&node, vec![subscribe]).await, [None]);
    let operation::Kind::Publish(published) = publish(&["news"]) else { unreachable!() };
    for nth in 0..3_u8 {
        let fan_out = operation::Kind::FanOut(FanOut {
            publish_id: vec![nth; 16].into(),
            place: vec![nth; 16].into(),
            remaining_ms: 60_000,
            publish: Some(published.clone()),
            ..FanOut::default()
        });
        assert_eq!(refusals(&node, vec![fan_out]).await, [None]);
    }
    let all_there = async {
        while node.waiting() < 3 {
            tokio::time::sleep(LOOK).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(30), all_there).await.unwrap();
    assert_eq!(refusals(&node, vec![message(), message()]).await, [None, TOO_OFTEN]);
}

#[tokio::test]
async fn a_topic_of_a_project_has_a_rate_and_a_condition_counts_for_each_it_names() {
    let (node, clock) = limited(1, 2).await;
    let too_often = Some(Refusal::TopicsRateExceeded);
    let batch = vec![publish(&["a"]), publish(&["a", "b"]), publish(&["a"]), publish(&["a", "b"]), publish(&["b"])];
    assert_eq!(refusals(&node, batch).await, [None, None, too_often, too_often, None]);
    let operation::Kind::Publish(mut of_another) = publish(&["a"]) else { unreachable!() };
    of_another.sender = "1".into();
    assert_eq!(refusals(&node, vec![operation::Kind::Publish(of_another)]).await, [None]);
    assert_eq!(rate_refusals(&node, RateLimit::Topic), 2);
    clock.advance(Duration::from_secs(30));
    assert_eq!(refusals(&node, vec![publish(&["a"]), publish(&["a"])]).await, [None, too_often]);
    assert_eq!(rate_refusals(&node, RateLimit::Device), 0);
}

#[tokio::test]
async fn a_new_leader_begins_with_full_buckets() {
    let (node, _) = limited(1, 1).await;
    assert_eq!(refusals(&node, vec![message(), publish(&["a"])]).await, [None, None]);
    node.follow(TERM + 1);
    let outcome = node.outcome(SHARD, vec![node.operation(message())]).await;
    assert!(matches!(outcome, Outcome::Redirect(_)), "{outcome:?}");
    node.lead(0, TERM + 2).await;
    let batch = vec![message(), message(), publish(&["a"]), publish(&["a"])];
    assert_eq!(refusals(&node, batch).await, [None, TOO_OFTEN, None, Some(Refusal::TopicsRateExceeded)]);
}

#[tokio::test]
async fn more_devices_than_are_remembered_are_all_served_and_the_flooded_one_stays_refused() {
    let (node, _) = limited(2, 0).await;
    assert_eq!(refusals(&node, vec![message(), message(), message()]).await, [None, None, TOO_OFTEN]);
    // Not registered, so the log refuses them: they were counted before.
    let others = (0..40).map(|nth| message_of(|enqueue| enqueue.device_tag = DEVICE + 1 + nth)).collect();
    assert_eq!(refusals(&node, others).await, [Some(Refusal::NotRegistered); 40]);
    assert!(node.metrics.rates_forgotten.get() >= 36, "{}", node.metrics.rates_forgotten.get());
    assert_eq!(refusals(&node, vec![message()]).await, [TOO_OFTEN]);
}

//! From an app server's message for topics to their home shard. Shared by HTTP and CCS.
//!
//! Owns the publish: it is at home in one shard, which answers once it is stored there and hands it to the others by itself. The
//! number that the app server is told names nothing here: it is drawn, as real ones were.

use bytes::Bytes;
use martlet_proto::{
    cluster::queue::{Operation, Publish, Subscribe, TokenInfo, TopicSubscription, Unsubscribe, answer, operation},
    http::iid::BatchError,
    message::SenderId,
    refusal::Refusal,
    shard::Shard,
    token::RegistrationToken,
    topic::{self, Condition},
};

use crate::{
    downstream::{self, Order},
    metrics::{Fate, Metrics},
    route::{Facts, Outcome, Route},
};

/// Publishes one message.
pub(crate) async fn publish(
    route: &Route,
    facts: &Facts,
    metrics: &Metrics,
    condition: &Condition,
    order: &Order<'_>,
) -> Result<(), Refusal> {
    if order.dry_run {
        metrics.fate(Fate::DryRun);
        return Ok(());
    }
    let sender = order.sender.as_str();
    // A condition has no name of its own: the device sees the first topic it was about.
    let wire_from = format!("{}{}", topic::PREFIX, condition.topics().first().map_or("", String::as_str));
    let publish = Publish {
        sender: sender.to_owned(),
        topics: condition.topics().to_vec(),
        condition: Bytes::copy_from_slice(condition.program()),
        wire_from,
        collapse_key: order.collapse_key.unwrap_or_default().to_owned(),
        ttl_secs: order.ttl_secs,
        priority: martlet_proto::cluster::queue::Priority::from(order.priority).into(),
        restricted_package_name: order.restricted_package_name.unwrap_or_default().to_owned(),
        payload: order.payload.clone(),
    };
    let outcome = submit(route, facts.home(condition, sender), operation::Kind::Publish(publish)).await;
    let published = match outcome {
        Outcome::Answered(answer::Kind::Published(_)) => Ok(()),
        Outcome::Answered(answer::Kind::Refusal(refusal)) => {
            Err(martlet_proto::cluster::queue::Refusal::try_from(refusal).unwrap_or_default().into())
        }
        Outcome::Unavailable => Err(Refusal::Unavailable),
        Outcome::Answered(_) | Outcome::Unknown => Err(Refusal::InternalServerError),
    };
    metrics.fate(match published {
        Ok(()) => Fate::Accepted,
        Err(Refusal::Unavailable) => Fate::Unavailable,
        Err(Refusal::InternalServerError) => Fate::Unknown,
        Err(_) => Fate::Refused,
    });
    published
}

/// Each token joins the topic of this sender, or leaves it; what became of them, in their order.
pub(crate) async fn join(
    route: &Route,
    facts: &Facts,
    sender: &SenderId,
    topic: &str,
    tokens: &[String],
    joins: bool,
) -> Vec<Result<(), BatchError>> {
    let mut joined: Vec<Option<Result<(), BatchError>>> = tokens.iter().map(|_| None).collect();
    let (mut places, mut operations) = (Vec::new(), Vec::new());
    for (place, token) in tokens.iter().enumerate() {
        match downstream::verified(route, facts, token).await {
            Ok(token) => {
                places.push(place);
                let kind = joining(&token, sender, topic, joins);
                operations.push((facts.shard(token.device_tag()), operation(route, kind)));
            }
            Err(Refusal::Unavailable) => joined[place] = Some(Err(BatchError::Internal)),
            Err(_) => joined[place] = Some(Err(BatchError::NotFound)),
        }
    }
    for (place, outcome) in places.into_iter().zip(route.submit(operations).await) {
        joined[place] = Some(match outcome {
            Outcome::Answered(answer::Kind::Subscribed(_)) => Ok(()),
            Outcome::Answered(answer::Kind::Refusal(refusal)) => Err(meaning(refusal)),
            Outcome::Unavailable => Err(BatchError::Internal),
            Outcome::Answered(_) | Outcome::Unknown => Err(BatchError::DeadlineExceeded),
        });
    }
    joined.into_iter().map(|joined| joined.expect("refused at once or asked for")).collect()
}

/// Why a shard did not let a token join.
fn meaning(refusal: i32) -> BatchError {
    use martlet_proto::cluster::queue::Refusal;
    match Refusal::try_from(refusal).unwrap_or_default() {
        Refusal::NotRegistered => BatchError::NotFound,
        Refusal::MismatchSenderId => BatchError::InvalidArgument,
        Refusal::TooManyTopics => BatchError::TooManyTopics,
        Refusal::QuotaExceeded => BatchError::ResourceExhausted,
        _ => BatchError::Internal,
    }
}

/// What a shard says of a token: all of it, with `details` every topic.
pub(crate) async fn info(
    route: &Route,
    facts: &Facts,
    sender: &SenderId,
    token: &RegistrationToken,
    details: bool,
) -> Outcome {
    let mut topics: Vec<TopicSubscription> = Vec::new();
    let mut after = Bytes::new();
    loop {
        let wanted = TokenInfo {
            device_tag: token.device_tag().0,
            registration_id: Bytes::copy_from_slice(&token.registration_id().0),
            sender: sender.as_str().to_owned(),
            details,
            after: after.clone(),
        };
        match submit(route, facts.shard(token.device_tag()), operation::Kind::TokenInfo(wanted)).await {
            Outcome::Answered(answer::Kind::TokenInfo(mut known)) => {
                topics.append(&mut known.topics);
                after = std::mem::take(&mut known.next);
                if after.is_empty() {
                    known.topics = topics;
                    return Outcome::Answered(answer::Kind::TokenInfo(known));
                }
            }
            other => return other,
        }
    }
}

fn joining(token: &RegistrationToken, sender: &SenderId, topic: &str, joins: bool) -> operation::Kind {
    let (device_tag, registration_id) = (token.device_tag().0, Bytes::copy_from_slice(&token.registration_id().0));
    let (sender, topic) = (sender.as_str().to_owned(), topic.to_owned());
    if joins {
        operation::Kind::Subscribe(Subscribe { device_tag, registration_id, sender, topic })
    } else {
        operation::Kind::Unsubscribe(Unsubscribe { device_tag, registration_id, sender, topic })
    }
}

async fn submit(route: &Route, shard: Shard, kind: operation::Kind) -> Outcome {
    let outcome = route.submit(vec![(shard, operation(route, kind))]).await.pop();
    outcome.expect("one operation has one outcome")
}

fn operation(route: &Route, kind: operation::Kind) -> Operation {
    let id = Bytes::copy_from_slice(&route.operation_id().to_bytes());
    Operation { id, first_try_ms: 0, kind: Some(kind) }
}

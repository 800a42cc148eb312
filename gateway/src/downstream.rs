//! From an app server's message to its targets: token, shard, leader, outcome. Shared by HTTP and CCS.
//!
//! Owns what a token means at the gateway: its form and MAC are checked here, so a forged one costs no node anything, and a key
//! that is not known yet makes it unavailable, never invalid (app servers delete tokens on that word). Liveness, sender and
//! limits are the shard's to judge. Mints the message ids: each is also the operation id, so a repeated try names the same
//! message. Each edge has its own words for what comes back.

use bytes::Bytes;
use martlet_proto::{
    cluster::queue::{Check, Enqueue, Operation, RegistrationRef, answer, operation},
    http::reply::TargetOutcome,
    message::{MessageId, Priority, SenderId},
    refusal::Refusal,
    shard::Shard,
    tag::DeviceTag,
    token::{Iid, RegistrationId, RegistrationToken},
};

use crate::{
    metrics::{Fate, Metrics},
    route::{Facts, Outcome, Route},
};

/// One message, checked, for any number of tokens.
#[derive(Debug, Clone)]
pub(crate) struct Order<'a> {
    /// Of the key that sends.
    pub(crate) sender: &'a SenderId,
    pub(crate) collapse_key: Option<&'a str>,
    pub(crate) ttl_secs: u32,
    pub(crate) priority: Priority,
    pub(crate) restricted_package_name: Option<&'a str>,
    /// An encoded `queue.Payload`.
    pub(crate) payload: Bytes,
    /// Check everything, store nothing.
    pub(crate) dry_run: bool,
}

/// One registration and the id of its message.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Target {
    pub(crate) tag: DeviceTag,
    pub(crate) registration: RegistrationId,
    pub(crate) id: MessageId,
}

/// Sends to every token; what became of them in their order.
pub(crate) async fn send(
    route: &Route,
    facts: &Facts,
    metrics: &Metrics,
    tokens: &[String],
    order: &Order<'_>,
) -> Vec<TargetOutcome> {
    let mut sent: Vec<Option<TargetOutcome>> = tokens.iter().map(|_| None).collect();
    let (mut places, mut targets) = (Vec::new(), Vec::new());
    for (place, token) in tokens.iter().enumerate() {
        match verified(route, facts, token).await {
            Ok(token) => {
                places.push(place);
                let (tag, registration) = (token.device_tag(), token.registration_id());
                targets.push(Target { tag, registration, id: route.operation_id() });
            }
            Err(refusal) => sent[place] = Some(TargetOutcome::Refused(refusal)),
        }
    }
    for (place, outcome) in places.into_iter().zip(deliver(route, facts, &targets, order).await) {
        sent[place] = Some(outcome);
    }
    let sent: Vec<TargetOutcome> = sent.into_iter().map(|sent| sent.expect("refused at once or sent")).collect();
    count(metrics, &sent);
    sent
}

/// Sends to registrations; what became of them in their order.
pub(crate) async fn deliver(route: &Route, facts: &Facts, targets: &[Target], order: &Order<'_>) -> Vec<TargetOutcome> {
    let operations = targets.iter().map(|target| operation(facts, target, order)).collect();
    let mut outcomes = Vec::with_capacity(targets.len());
    for (target, outcome) in targets.iter().zip(route.submit(operations).await) {
        outcomes.push(judged(route, facts, target, outcome, order.dry_run).await);
    }
    outcomes
}

/// Counts what became of targets.
pub(crate) fn count(metrics: &Metrics, outcomes: &[TargetOutcome]) {
    for outcome in outcomes {
        metrics.fate(match outcome {
            TargetOutcome::Accepted { id: Some(_), .. } => Fate::Accepted,
            TargetOutcome::Accepted { id: None, .. } => Fate::DryRun,
            TargetOutcome::Refused(Refusal::Unavailable) => Fate::Unavailable,
            TargetOutcome::Refused(Refusal::InternalServerError) => Fate::Unknown,
            TargetOutcome::Refused(_) => Fate::Refused,
        });
    }
}

/// A token as it was spelled, if it is one of ours.
pub(crate) async fn verified(route: &Route, facts: &Facts, target: &str) -> Result<RegistrationToken, Refusal> {
    if target.is_empty() {
        return Err(Refusal::MissingRegistration);
    }
    let token = RegistrationToken::parse(target).map_err(|_| Refusal::InvalidRegistration)?;
    let key = route.token_key(facts, token.key_id()).await.ok_or(Refusal::Unavailable)?;
    token.verify(&key).map_err(|_| Refusal::InvalidRegistration)
}

fn operation(facts: &Facts, target: &Target, order: &Order<'_>) -> (Shard, Operation) {
    let device_tag = target.tag.0;
    let registration_id = Bytes::copy_from_slice(&target.registration.0);
    let sender = order.sender.as_str().to_owned();
    let restricted_package_name = order.restricted_package_name.unwrap_or_default().to_owned();
    let kind = if order.dry_run {
        operation::Kind::Check(Check { device_tag, registration_id, sender, restricted_package_name })
    } else {
        operation::Kind::Enqueue(Enqueue {
            device_tag,
            registration_id,
            wire_from: sender.clone(),
            sender,
            collapse_key: order.collapse_key.unwrap_or_default().to_owned(),
            ttl_secs: order.ttl_secs,
            priority: martlet_proto::cluster::queue::Priority::from(order.priority).into(),
            restricted_package_name,
            payload: order.payload.clone(),
            ..Enqueue::default()
        })
    };
    let operation = Operation { id: Bytes::copy_from_slice(&target.id.to_bytes()), first_try_ms: 0, kind: Some(kind) };
    (facts.shard(target.tag), operation)
}

async fn judged(route: &Route, facts: &Facts, target: &Target, outcome: Outcome, dry_run: bool) -> TargetOutcome {
    match outcome {
        Outcome::Answered(answer::Kind::Accepted(accepted)) => {
            let canonical = match accepted.canonical {
                Some(registration) => token_of(route, facts, target.tag, &registration).await,
                None => None,
            };
            let canonical = canonical.map(|token| token.to_string());
            TargetOutcome::Accepted { id: (!dry_run).then_some(target.id), canonical }
        }
        Outcome::Answered(answer::Kind::Refusal(refusal)) => {
            let refusal = martlet_proto::cluster::queue::Refusal::try_from(refusal).unwrap_or_default();
            TargetOutcome::Refused(refusal.into())
        }
        Outcome::Unavailable => TargetOutcome::Refused(Refusal::Unavailable),
        // Another kind of answer than was asked for is a defect of the node: what it did is not known.
        Outcome::Answered(_) | Outcome::Unknown => TargetOutcome::Refused(Refusal::InternalServerError),
    }
}

/// The token of a registration that a shard named. `None` when its key is not known here yet, or the row is not one of ours:
/// the message itself was accepted, so its sender learns the token at another time.
pub(crate) async fn token_of(
    route: &Route,
    facts: &Facts,
    tag: DeviceTag,
    registration: &RegistrationRef,
) -> Option<RegistrationToken> {
    let key = route.token_key(facts, registration.token_key_id).await?;
    let iid = Iid::parse(&registration.iid).ok()?;
    let id = RegistrationId::from_bytes(&registration.registration_id)?;
    RegistrationToken::mint(&key, &iid, tag, id).ok()
}

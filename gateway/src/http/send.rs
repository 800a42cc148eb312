//! `/gcm/send` and `/fcm/send`: one message for one or many tokens, or for a device group.
//!
//! Owns the order of checks (gcm-http.md section 3.4): the key, before any byte of the body; the form of the request; what is
//! wrong with the message as a whole; how much the project sends; then each token. And the table from what became of the targets to a status: 503 means
//! that nothing was accepted and nothing will be, because many clients send again by themselves on it.

use hyper::{
    StatusCode,
    body::Incoming,
    header::{AUTHORIZATION, CONTENT_TYPE, HeaderValue},
    http::request::Parts,
};
use martlet_proto::{
    http::{
        SendRequest, Targets,
        reply::{self, TargetOutcome},
        send_form, send_json,
    },
    limits::BODY_MAX_BYTES,
    message::SenderId,
    refusal::Refusal,
};
use rand::Rng;

use super::{Answer, Http};
use crate::{
    downstream::{self, Order},
    groups::{Groups, Sent},
    metrics::Fate,
    route::Facts,
};

/// Numbers beyond this lose precision in JavaScript clients.
const MULTICAST_ID_END: u64 = 1 << 53;

/// Answers one send.
pub(super) async fn send(http: &Http, head: &Parts, body: Incoming) -> Answer {
    let Some(key) = head.headers.get(AUTHORIZATION).and_then(server_key) else { return Answer::unauthorized() };
    let Ok(facts) = http.route.facts() else { return Answer::unavailable(http.config.retry_after_secs) };
    let Some(sender) = facts.sender_of(key) else { return Answer::unauthorized() };
    let body = match http.room.read(body, BODY_MAX_BYTES).await {
        Ok(body) => body,
        Err(answer) => return answer,
    };
    let is_json = head.headers.get(CONTENT_TYPE).is_some_and(is_json);
    let request = if is_json { send_json::parse(&body.bytes) } else { Ok(send_form::parse(&body.bytes)) };
    let request = match request {
        Ok(request) => request,
        Err(bad) => return Answer::text(StatusCode::BAD_REQUEST, bad.0),
    };
    if let Some(secs) = too_much(http, sender, &request) {
        return Answer::unavailable(secs);
    }
    if is_json {
        json_send(http, &facts, sender, &request).await
    } else {
        let outcomes = outcomes(http, &facts, sender, &request).await;
        plain(&outcomes[0], http.config.retry_after_secs)
    }
}

/// How many seconds the project must wait, if it sends too much. What is wrong with the message as a whole is told instead, and a dry
/// run sends nothing.
fn too_much(http: &Http, sender: &SenderId, request: &SendRequest) -> Option<u32> {
    let targets = match &request.targets {
        Targets::None => return None,
        Targets::One(_) | Targets::Group(_) | Targets::Topics(_) => 1,
        Targets::Many(tokens) => tokens.len(),
    };
    if request.dry_run || request.refusal().is_some() { None } else { http.too_much(sender, targets) }
}

/// Each kind of target has its kind of answer.
async fn json_send(http: &Http, facts: &Facts, sender: &SenderId, request: &SendRequest) -> Answer {
    let outcomes = match &request.targets {
        Targets::Group(key) if request.refusal().is_none() => {
            let groups = Groups { route: &http.route, facts, sender };
            match groups.send(&http.metrics, key, &order(sender, request)).await {
                Sent::Members(members) => return group(&members, http.config.retry_after_secs),
                Sent::Refused(refusal) => vec![TargetOutcome::Refused(refusal)],
            }
        }
        Targets::Topics(_) => return topics(published(http, facts, sender, request).await, http),
        Targets::None | Targets::One(_) | Targets::Many(_) | Targets::Group(_) => {
            outcomes(http, facts, sender, request).await
        }
    };
    json(drawn_id(http), &outcomes, http.config.retry_after_secs)
}

/// What became of each target; one entry also where there is none.
async fn outcomes(http: &Http, facts: &Facts, sender: &SenderId, request: &SendRequest) -> Vec<TargetOutcome> {
    let targets = request.targets.as_slice();
    let for_all = if targets.is_empty() { Some(Refusal::MissingRegistration) } else { request.refusal() };
    if let Some(refusal) = for_all {
        let count = targets.len().max(1);
        (0..count).for_each(|_| http.metrics.fate(Fate::Refused));
        return vec![TargetOutcome::Refused(refusal); count];
    }
    downstream::send(&http.route, facts, &http.metrics, targets, &order(sender, request)).await
}

/// What became of a message for topics.
async fn published(http: &Http, facts: &Facts, sender: &SenderId, request: &SendRequest) -> Result<u64, Refusal> {
    let Targets::Topics(condition) = &request.targets else { return Err(Refusal::InternalServerError) };
    if let Some(refusal) = request.refusal() {
        http.metrics.fate(Fate::Refused);
        return Err(refusal);
    }
    let published = crate::topics::publish(&http.route, facts, &http.metrics, condition, &order(sender, request)).await;
    published.map(|()| drawn_id(http))
}

/// Multicasts and messages for topics are named by a number that names nothing here.
fn drawn_id(http: &Http) -> u64 {
    http.entropy.draw(|rng| rng.random_range(1..MULTICAST_ID_END))
}

/// The message of a request that is in order.
fn order<'a>(sender: &'a SenderId, request: &'a SendRequest) -> Order<'a> {
    Order {
        sender,
        collapse_key: request.collapse_key.as_deref(),
        ttl_secs: request.ttl_secs(),
        priority: request.priority,
        restricted_package_name: request.restricted_package_name.as_deref(),
        payload: request.payload(),
        dry_run: request.dry_run,
    }
}

/// The key of `key=KEY`; white space around both is passed over, `key` in any case.
pub(super) fn server_key(header: &HeaderValue) -> Option<&str> {
    let (word, key) = header.to_str().ok()?.split_once('=')?;
    let key = key.trim();
    (word.trim().eq_ignore_ascii_case("key") && !key.is_empty()).then_some(key)
}

/// Parameters are passed over; whatever is not JSON is plain text.
fn is_json(header: &HeaderValue) -> bool {
    let media_type = header.to_str().unwrap_or_default().split(';').next().unwrap_or_default();
    media_type.trim().eq_ignore_ascii_case("application/json")
}

fn json(multicast_id: u64, outcomes: &[TargetOutcome], retry_after_secs: u32) -> Answer {
    if outcomes.iter().all(|outcome| *outcome == TargetOutcome::Refused(Refusal::Unavailable)) {
        return Answer::unavailable(retry_after_secs);
    }
    Answer::ok_json(reply::json(multicast_id, outcomes))
}

/// 503 only where nothing was accepted and nothing will be, for want of servers.
fn group(members: &[(Option<String>, TargetOutcome)], retry_after_secs: u32) -> Answer {
    let refused = |refusal| members.iter().any(|(_, outcome)| *outcome == TargetOutcome::Refused(refusal));
    let accepted = members.iter().any(|(_, outcome)| matches!(outcome, TargetOutcome::Accepted { .. }));
    if !accepted && refused(Refusal::Unavailable) && !refused(Refusal::InternalServerError) {
        return Answer::unavailable(retry_after_secs);
    }
    Answer::ok_json(reply::group(members))
}

/// A number or a word; `Unavailable` is a 503, as for tokens.
fn topics(published: Result<u64, Refusal>, http: &Http) -> Answer {
    match published {
        Err(Refusal::Unavailable) => Answer::unavailable(http.config.retry_after_secs),
        outcome => Answer::ok_json(reply::topics(outcome)),
    }
}

/// `Unavailable` and an unknown outcome are never a line of text: clients would take them as final.
fn plain(outcome: &TargetOutcome, retry_after_secs: u32) -> Answer {
    match outcome {
        TargetOutcome::Refused(Refusal::Unavailable) => Answer::unavailable(retry_after_secs),
        TargetOutcome::Refused(Refusal::InternalServerError) => {
            Answer::text(StatusCode::INTERNAL_SERVER_ERROR, "Internal Server Error\n")
        }
        outcome => Answer::text(StatusCode::OK, reply::plain(outcome)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn h090_h160_core_every_refusal_has_its_status_in_both_forms() {
        for refusal in Refusal::ALL {
            let refused = TargetOutcome::Refused(refusal);
            let (form, one) = (plain(&refused, 5), json(1, std::slice::from_ref(&refused), 5));
            let mixed = json(1, &[refused.clone(), TargetOutcome::Refused(Refusal::NotRegistered)], 5);
            let (form_status, one_status) = match refusal {
                Refusal::Unavailable => (503, 503),
                Refusal::InternalServerError => (500, 200),
                _ => (200, 200),
            };
            assert_eq!(
                (form.status.as_u16(), one.status.as_u16(), mixed.status.as_u16()),
                (form_status, one_status, 200)
            );
            assert!(!form.body.is_empty() && !one.body.is_empty());
        }
    }

    #[test]
    fn h149_h161_core_a_group_is_503_only_where_nothing_was_and_nothing_will_be_accepted() {
        let accepted = TargetOutcome::Accepted { id: None, canonical: None };
        let status = |outcomes: &[TargetOutcome]| {
            let members: Vec<_> = outcomes.iter().map(|outcome| (None, outcome.clone())).collect();
            group(&members, 5).status.as_u16()
        };
        let [later, unknown, gone] =
            [Refusal::Unavailable, Refusal::InternalServerError, Refusal::NotRegistered].map(TargetOutcome::Refused);
        assert_eq!(status(&[later.clone(), later.clone()]), 503);
        assert_eq!(status(&[later.clone(), gone.clone()]), 503);
        assert_eq!(status(&[later.clone(), accepted]), 200);
        assert_eq!(status(&[later, unknown.clone()]), 200);
        assert_eq!(status(&[unknown]), 200);
        assert_eq!(status(&[gone]), 200);
    }

    #[test]
    fn h005_h006_core_a_server_key_is_read_as_clients_write_it() {
        let key = |text: &str| server_key(&HeaderValue::from_str(text).unwrap()).map(str::to_owned);
        for text in ["key=abc", "KEY=abc", " key = abc ", "key=\tabc"] {
            assert_eq!(key(text).as_deref(), Some("abc"), "{text}");
        }
        for text in ["abc", "key", "key=", "Bearer abc", "monkey=abc", ""] {
            assert_eq!(key(text), None, "{text}");
        }
        assert_eq!(key("key=a=b").as_deref(), Some("a=b"));
    }

    #[test]
    fn h012_core_json_is_told_by_its_media_type_alone() {
        let json = |text: &str| is_json(&HeaderValue::from_str(text).unwrap());
        assert!(json("application/json") && json("Application/JSON; charset=UTF-8"));
        assert!(!json("text/json") && !json("application/x-www-form-urlencoded;charset=UTF-8"));
    }
}

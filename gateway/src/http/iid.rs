//! `/iid/…`: what a token is, and which topics it is in, for app servers. Source: gcm-http.md section 10.
//!
//! Owns the paths below `/iid` and the statuses. The invariant: every error but a wrong key is JSON with `error`: clients read it whatever
//! the status.

use std::time::{Duration, UNIX_EPOCH};

use hyper::{Method, StatusCode, body::Incoming, header::AUTHORIZATION, http::request::Parts};
use martlet_proto::{
    cluster::queue::{Refusal, answer},
    http::iid::{self, BAD_TOPIC, BatchError, TokenDetails, TokenFacts},
    limits::BODY_MAX_BYTES,
    message::SenderId,
    refusal, topic,
};

use super::{Answer, Http, send::server_key};
use crate::{
    downstream,
    route::{Facts, Outcome},
    topics,
};

/// The text for a token that is none of ours, or is gone.
const UNKNOWN_TOKEN: &str = "No information found about this instance id.";

/// A path below `/iid`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum IidPath<'a> {
    Info { token: &'a str },
    Topic { token: &'a str, topic: &'a str },
    Batch { joins: bool },
}

impl<'a> IidPath<'a> {
    /// Reads what follows `/iid/`.
    pub(super) fn parse(rest: &'a str) -> Option<Self> {
        let is_segment = |text: &str| !text.is_empty() && !text.contains('/');
        match rest {
            "v1:batchAdd" => return Some(Self::Batch { joins: true }),
            "v1:batchRemove" => return Some(Self::Batch { joins: false }),
            _ => {}
        }
        if let Some(token) = rest.strip_prefix("info/") {
            return is_segment(token).then_some(Self::Info { token });
        }
        let (token, topic) = rest.strip_prefix("v1/")?.split_once("/rel/topics/")?;
        (is_segment(token) && is_segment(topic)).then_some(Self::Topic { token, topic })
    }

    /// The methods that it takes.
    pub(super) fn allow(self) -> &'static str {
        match self {
            Self::Info { .. } => "GET",
            Self::Topic { .. } => "POST, DELETE",
            Self::Batch { .. } => "POST",
        }
    }
}

/// Answers one request.
pub(super) async fn answer(http: &Http, path: IidPath<'_>, head: &Parts, body: Incoming) -> Answer {
    let Some(key) = head.headers.get(AUTHORIZATION).and_then(server_key) else { return Answer::unauthorized() };
    let Ok(facts) = http.route.facts() else { return Answer::unavailable(http.config.retry_after_secs) };
    let Some(sender) = facts.sender_of(key) else { return Answer::unauthorized() };
    let body = match http.room.read(body, BODY_MAX_BYTES).await {
        Ok(body) => body,
        Err(answer) => return answer,
    };
    match path {
        IidPath::Info { token } => {
            let details = head.uri.query().is_some_and(|query| query.split('&').any(|pair| pair == "details=true"));
            info(http, &facts, sender, &decoded(token), details).await
        }
        IidPath::Topic { token, topic } => {
            if !topic::is_name(topic) {
                return refused(StatusCode::BAD_REQUEST, BAD_TOPIC);
            }
            if let Some(secs) = http.too_much(sender, 1) {
                return unavailable(secs);
            }
            let joins = head.method == Method::POST;
            let joined = topics::join(&http.route, &facts, sender, topic, &[decoded(token)], joins).await;
            one(joined[0], http.config.retry_after_secs)
        }
        IidPath::Batch { joins } => match iid::parse_batch(&body.bytes) {
            Ok(batch) => {
                if let Some(secs) = http.too_much(sender, batch.tokens.len()) {
                    return unavailable(secs);
                }
                let joined = topics::join(&http.route, &facts, sender, &batch.topic, &batch.tokens, joins).await;
                if joined.iter().all(|one| *one == Err(BatchError::Internal)) {
                    return unavailable(http.config.retry_after_secs);
                }
                Answer::ok_json(iid::batch(&joined))
            }
            Err(bad) => refused(StatusCode::BAD_REQUEST, &bad.0),
        },
    }
}

async fn info(http: &Http, facts: &Facts, sender: &SenderId, spelled: &str, details: bool) -> Answer {
    let retry_after_secs = http.config.retry_after_secs;
    let token = match downstream::verified(&http.route, facts, spelled).await {
        Ok(token) => token,
        Err(refusal::Refusal::Unavailable) => return unavailable(retry_after_secs),
        Err(_) => return refused(StatusCode::NOT_FOUND, UNKNOWN_TOKEN),
    };
    match topics::info(&http.route, facts, sender, &token, details).await {
        Outcome::Answered(answer::Kind::TokenInfo(known)) => {
            let connected = (known.last_seen_day > 0).then(|| day(u64::from(known.last_seen_day) * DAY_MS));
            let topics = known.topics.into_iter().map(|one| (one.topic, day(one.added_ms))).collect();
            Answer::ok_json(iid::info(&TokenFacts {
                application: known.application,
                authorized_entity: sender.as_str().to_owned(),
                application_version: known.app_version,
                app_signer: known.cert,
                details: details.then_some(TokenDetails { connected, topics }),
            }))
        }
        Outcome::Answered(answer::Kind::Refusal(refusal)) => match Refusal::try_from(refusal).unwrap_or_default() {
            Refusal::NotRegistered => refused(StatusCode::NOT_FOUND, UNKNOWN_TOKEN),
            Refusal::MismatchSenderId => refused(StatusCode::FORBIDDEN, "MismatchSenderId"),
            _ => refused(StatusCode::INTERNAL_SERVER_ERROR, "InternalServerError"),
        },
        Outcome::Unavailable => unavailable(retry_after_secs),
        Outcome::Answered(_) | Outcome::Unknown => refused(StatusCode::INTERNAL_SERVER_ERROR, "InternalServerError"),
    }
}

/// What became of one token.
fn one(joined: Result<(), BatchError>, retry_after_secs: u32) -> Answer {
    match joined {
        Ok(()) => Answer::ok_json("{}"),
        Err(BatchError::NotFound) => refused(StatusCode::NOT_FOUND, UNKNOWN_TOKEN),
        Err(BatchError::InvalidArgument) => refused(StatusCode::FORBIDDEN, "MismatchSenderId"),
        Err(error @ BatchError::TooManyTopics) => refused(StatusCode::BAD_REQUEST, error.word()),
        Err(BatchError::Internal | BatchError::ResourceExhausted) => unavailable(retry_after_secs),
        Err(error @ BatchError::DeadlineExceeded) => refused(StatusCode::INTERNAL_SERVER_ERROR, error.word()),
    }
}

pub(super) fn refused(status: StatusCode, text: &str) -> Answer {
    Answer::json(status, iid::error(text))
}

fn unavailable(retry_after_secs: u32) -> Answer {
    refused(StatusCode::SERVICE_UNAVAILABLE, "ServiceUnavailable").retry_after(retry_after_secs)
}

/// A token as it stands in a path: clients escape its colon. Source: decisions.md, "`/iid/info`".
fn decoded(token: &str) -> String {
    token.replace("%3A", ":").replace("%3a", ":")
}

/// Milliseconds of a day.
const DAY_MS: u64 = 86_400_000;

/// The last millisecond of the year 9999, beyond which a date has another form.
const LATEST_MS: u64 = 253_402_300_799_999;

/// The day of a time since 1970, as `YYYY-MM-DD`.
fn day(millis: u64) -> String {
    let at = UNIX_EPOCH + Duration::from_millis(millis.min(LATEST_MS));
    humantime::format_rfc3339_seconds(at).to_string().chars().take(10).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_below_iid_are_told_apart() {
        assert_eq!(IidPath::parse("v1:batchAdd"), Some(IidPath::Batch { joins: true }));
        assert_eq!(IidPath::parse("v1:batchRemove"), Some(IidPath::Batch { joins: false }));
        assert_eq!(IidPath::parse("info/i:T"), Some(IidPath::Info { token: "i:T" }));
        let topic = IidPath::Topic { token: "i%3AT", topic: "a%20b" };
        assert_eq!(IidPath::parse("v1/i%3AT/rel/topics/a%20b"), Some(topic));
        for unknown in ["", "v1", "info/", "info/a/b", "v1/i:T/rel/topics/", "v1//rel/topics/x", "v1:batchDelete"] {
            assert_eq!(IidPath::parse(unknown), None, "{unknown}");
        }
        assert_eq!(decoded("i%3AT"), "i:T");
    }

    #[test]
    fn every_error_of_one_token_has_its_status_and_is_json() {
        for error in BatchError::ALL {
            let answer = one(Err(error), 5);
            let expected = match error {
                BatchError::NotFound => 404,
                BatchError::InvalidArgument => 403,
                BatchError::TooManyTopics => 400,
                BatchError::Internal | BatchError::ResourceExhausted => 503,
                BatchError::DeadlineExceeded => 500,
            };
            assert_eq!(answer.status.as_u16(), expected);
            assert!(answer.body.starts_with(b"{\"error\":"), "{error:?}");
        }
    }

    #[test]
    fn days_are_those_of_the_calendar() {
        for (days, text) in [(0, "1970-01-01"), (11_016, "2000-02-29"), (11_017, "2000-03-01"), (20_784, "2026-11-27")]
        {
            assert_eq!(day(days * DAY_MS + 5), text);
        }
        assert_eq!(day(u64::MAX), "9999-12-31");
    }
}

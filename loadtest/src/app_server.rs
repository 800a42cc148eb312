//! An app server: it sends messages over HTTP and says what became of each.
//!
//! Owns the mapping from answers to outcomes: what is definite, what is unknown (gcm-http.md section 7, decisions "unknown
//! outcome"). Each target of a multicast is an op of its own.

use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use bytes::Bytes;
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use crate::{
    clock::RunClock,
    history::{Recorder, What},
    http::{HttpAnswer, HttpClient, was_never_sent},
};

/// Words for one target that say "later". Source: gcm-http.md section 7.
const LATER: [&str; 2] = ["Unavailable", "DeviceMessageRateExceeded"];

/// A project and its key.
#[derive(Debug, Clone)]
pub struct Project {
    /// Decimal digits.
    pub sender_id: String,
    /// In clear.
    pub server_key: String,
}

/// One recipient of a send.
#[derive(Debug, Clone)]
pub struct Target {
    /// Name of the device.
    pub device: String,
    /// Its registration token.
    pub token: String,
}

/// Name of the op that `send` (unique in the run) is for one device: all recipients of a multicast get one payload, which
/// names the send, and each knows its own name.
#[must_use]
pub fn op_of(send: &str, device: &str) -> String {
    format!("{send}@{device}")
}

/// How one target of a send ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Sent {
    /// Stored: the message id.
    Acked(String),
    /// Definitely not stored: the broker's word.
    Failed(String),
    /// Definitely not stored, and worth another try later: the broker's word.
    Busy {
        /// What it said.
        word: String,
        /// How long it asks to wait, if it says so.
        retry_after: Option<Duration>,
    },
    /// It may be stored.
    Unknown(String),
}

/// Sends and records.
#[derive(Debug, Clone)]
pub struct AppServer {
    /// Where to.
    pub http: HttpClient,
    /// As whom.
    pub project: Project,
    /// Size of the `body` value, bytes.
    pub payload_bytes: usize,
    /// Time to live, seconds; none: the protocol's default.
    pub ttl_secs: Option<u32>,
}

impl AppServer {
    /// Sends one message, `send` by name, to all targets in one request. `intended` is the moment (seconds of the run) at which it was due:
    /// devices measure latency from it.
    pub async fn send(
        &self,
        clock: &RunClock,
        recorder: &Recorder,
        send: &str,
        targets: &[Target],
        intended: f64,
    ) -> Vec<Sent> {
        let body = body_of(send, self.payload_bytes);
        let sha = digest(&body);
        for target in targets {
            let what = What::SendInvoked {
                op: op_of(send, &target.device),
                token: target.token.clone(),
                tenant: self.project.sender_id.clone(),
                ttl: self.ttl_secs.map(f64::from),
                collapse_key: None,
                priority: None,
                receipt: None,
                sha: Some(sha.clone()),
            };
            recorder.record(clock.secs(), what);
        }
        let request = self.request(send, targets, &body, intended);
        let outcomes = match self.post("/gcm/send", request).await {
            Ok(answer) => outcomes(&answer, targets.len()),
            Err(error) if was_never_sent(&error) => vec![Sent::Failed(format!("{error:#}")); targets.len()],
            Err(error) => vec![Sent::Unknown(format!("{error:#}")); targets.len()],
        };
        for (target, outcome) in targets.iter().zip(&outcomes) {
            let op = op_of(send, &target.device);
            let what = match outcome.clone() {
                Sent::Acked(id) => What::SendAcked { op, message_id: Some(id) },
                Sent::Failed(error) | Sent::Busy { word: error, .. } => What::SendFailed { op, error: Some(error) },
                Sent::Unknown(error) => What::SendUnknown { op, error: Some(error) },
            };
            recorder.record(clock.secs(), what);
        }
        outcomes
    }

    /// Sends one message, `send` by name, to a topic. `targets` are subscribers whose history is kept: for each of them it is an op.
    pub async fn publish(
        &self,
        clock: &RunClock,
        recorder: &Recorder,
        topic: &str,
        send: &str,
        targets: &[Target],
    ) -> Sent {
        let body = body_of(send, self.payload_bytes);
        let sha = digest(&body);
        for target in targets {
            let what = What::SendInvoked {
                op: op_of(send, &target.device),
                token: target.token.clone(),
                tenant: self.project.sender_id.clone(),
                ttl: self.ttl_secs.map(f64::from),
                collapse_key: None,
                priority: None,
                receipt: None,
                sha: Some(sha.clone()),
            };
            recorder.record(clock.secs(), what);
        }
        // Without a time: devices measure what is sent to them alone.
        let request = serde_json::json!({ "to": format!("/topics/{topic}"), "data": { "op": send, "body": body } });
        let outcome = match self.post("/gcm/send", request.to_string().into()).await {
            Ok(answer) => published(&answer),
            Err(error) if was_never_sent(&error) => Sent::Failed(format!("{error:#}")),
            Err(error) => Sent::Unknown(format!("{error:#}")),
        };
        for target in targets {
            let op = op_of(send, &target.device);
            let what = match outcome.clone() {
                // Each subscriber's id is its own, and nobody is told it.
                Sent::Acked(_) => What::SendAcked { op, message_id: None },
                Sent::Failed(error) | Sent::Busy { word: error, .. } => What::SendFailed { op, error: Some(error) },
                Sent::Unknown(error) => What::SendUnknown { op, error: Some(error) },
            };
            recorder.record(clock.secs(), what);
        }
        outcome
    }

    /// Has tokens subscribe to a topic, a thousand at most; those that are to be tried again.
    ///
    /// # Errors
    /// What the broker refused for good.
    pub async fn subscribe(&self, topic: &str, tokens: Vec<String>) -> Result<Vec<String>> {
        let request = serde_json::json!({ "to": format!("/topics/{topic}"), "registration_tokens": tokens });
        let answer = self.post("/iid/v1:batchAdd", request.to_string().into()).await?;
        let text = || String::from_utf8_lossy(&answer.body).chars().take(200).collect::<String>();
        match answer.status {
            200 => {}
            503 => return Ok(tokens),
            status => bail!("subscribing was answered {status} {}", text()),
        }
        let reply: Subscribing = serde_json::from_slice(&answer.body).with_context(text)?;
        if reply.results.len() != tokens.len() {
            bail!("{} tokens were answered by {} results", tokens.len(), reply.results.len());
        }
        let mut again = Vec::new();
        for (token, result) in tokens.into_iter().zip(reply.results) {
            match result.error.as_deref() {
                None => {}
                Some("RESOURCE_EXHAUSTED" | "INTERNAL" | "DEADLINE_EXCEEDED") => again.push(token),
                Some(error) => bail!("a token's subscription was refused: {error}"),
            }
        }
        Ok(again)
    }

    async fn post(&self, path: &str, body: Bytes) -> Result<HttpAnswer> {
        let authorization = format!("key={}", self.project.server_key);
        let headers = [("authorization", authorization.as_str()), ("content-type", "application/json")];
        self.http.post(path, &headers, body).await
    }

    fn request(&self, send: &str, targets: &[Target], body: &str, intended: f64) -> Bytes {
        let tokens = targets.iter().map(|target| target.token.as_str());
        let (to, registration_ids) = match targets {
            [one] => (Some(one.token.as_str()), None),
            _ => (None, Some(tokens.collect())),
        };
        let data = Data { op: send, at: format!("{intended:.6}"), body };
        let request = Request { to, registration_ids, time_to_live: self.ttl_secs, data };
        serde_json::to_vec(&request).expect("strings and numbers always encode").into()
    }
}

/// A send in JSON.
#[derive(Serialize)]
struct Request<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    to: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    registration_ids: Option<Vec<&'a str>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    time_to_live: Option<u32>,
    data: Data<'a>,
}

/// What a device finds.
#[derive(Serialize)]
struct Data<'a> {
    op: &'a str,
    at: String,
    body: &'a str,
}

/// What is read of an answer.
#[derive(Deserialize)]
struct Reply {
    results: Vec<OneResult>,
}

#[derive(Debug, Deserialize)]
struct OneResult {
    message_id: Option<String>,
    error: Option<String>,
}

/// What is read of an answer about a topic.
#[derive(Deserialize)]
struct PublishReply {
    message_id: Option<u64>,
    error: Option<String>,
}

/// What is read of an answer to a batch of subscriptions.
#[derive(Deserialize)]
struct Subscribing {
    results: Vec<OneSubscription>,
}

#[derive(Deserialize)]
struct OneSubscription {
    error: Option<String>,
}

/// What an answer says of a message to a topic.
fn published(answer: &HttpAnswer) -> Sent {
    let text = || String::from_utf8_lossy(&answer.body).chars().take(200).collect::<String>();
    let later = |word: String| Sent::Busy { word, retry_after: answer.asks_to_wait() };
    let reply = match answer.status {
        200 => serde_json::from_slice::<PublishReply>(&answer.body).ok(),
        503 => return later(format!("503 {}", text())),
        400..=499 => return Sent::Failed(format!("{} {}", answer.status, text())),
        status => return Sent::Unknown(format!("{status} {}", text())),
    };
    match reply.map(|reply| (reply.message_id, reply.error)) {
        Some((Some(id), None)) => Sent::Acked(id.to_string()),
        Some((None, Some(error))) if error == "TopicsMessageRateExceeded" => later(error),
        _ => Sent::Unknown(format!("not an answer about a topic: {}", text())),
    }
}

/// The payload of an op: `bytes` characters that no other op has, so that a mixed-up body is seen.
#[must_use]
pub fn body_of(op: &str, bytes: usize) -> String {
    let seed = digest(op);
    let mut body = seed.repeat(bytes.div_ceil(seed.len()));
    body.truncate(bytes);
    body
}

/// SHA-256 in hex, as the history holds it.
#[must_use]
pub fn digest(text: &str) -> String {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    let digit = |half: u8| char::from(DIGITS[usize::from(half)]);
    Sha256::digest(text.as_bytes()).iter().flat_map(|byte| [digit(byte >> 4), digit(byte & 15)]).collect()
}

/// What an answer says of each target.
fn outcomes(answer: &HttpAnswer, targets: usize) -> Vec<Sent> {
    let text = || String::from_utf8_lossy(&answer.body).chars().take(200).collect::<String>();
    match answer.status {
        200 => {}
        // Nothing was or will be accepted.
        503 => {
            let busy = Sent::Busy { word: format!("503 {}", text()), retry_after: answer.asks_to_wait() };
            return vec![busy; targets];
        }
        400..=499 => return vec![Sent::Failed(format!("{} {}", answer.status, text())); targets],
        status => return vec![Sent::Unknown(format!("{status} {}", text())); targets],
    }
    let parsed: Option<Reply> = serde_json::from_slice(&answer.body).ok();
    let Some(results) = parsed.map(|reply| reply.results).filter(|results| results.len() == targets) else {
        return vec![Sent::Unknown(format!("not an answer to {targets} targets: {}", text())); targets];
    };
    let outcome = |result: OneResult| match (result.message_id, result.error) {
        (Some(id), None) => Sent::Acked(id),
        (None, Some(error)) if error == "InternalServerError" => Sent::Unknown(error),
        (None, Some(error)) if LATER.contains(&error.as_str()) => {
            Sent::Busy { word: error, retry_after: answer.asks_to_wait() }
        }
        (None, Some(error)) => Sent::Failed(error),
        (message_id, error) => Sent::Unknown(format!("message id {message_id:?} and error {error:?}")),
    };
    results.into_iter().map(outcome).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(status: u16, body: &str) -> HttpAnswer {
        HttpAnswer { status, body: Bytes::from(body.to_owned()), retry_after: None }
    }

    #[test]
    fn internal_server_error_and_500_are_unknown_unavailable_and_503_are_not() {
        let body = r#"{"results":[{"message_id":"m"},{"error":"InternalServerError"},{"error":"Unavailable"}]}"#;
        let expected = [
            Sent::Acked("m".to_owned()),
            Sent::Unknown("InternalServerError".to_owned()),
            Sent::Busy { word: "Unavailable".to_owned(), retry_after: None },
        ];
        assert_eq!(outcomes(&answer(200, body), 3), expected);
        assert!(matches!(outcomes(&answer(500, ""), 1)[..], [Sent::Unknown(_)]));
        let later = HttpAnswer { retry_after: Some("5".to_owned()), ..answer(503, "") };
        let five = Some(Duration::from_secs(5));
        assert!(matches!(&outcomes(&later, 1)[..], [Sent::Busy { retry_after, .. }] if *retry_after == five));
        assert!(matches!(outcomes(&answer(401, ""), 1)[..], [Sent::Failed(_)]));
    }

    #[test]
    fn a_topic_s_answer_has_a_number_or_asks_to_slow_down() {
        assert_eq!(published(&answer(200, r#"{"message_id":17}"#)), Sent::Acked("17".to_owned()));
        let slower = published(&answer(200, r#"{"error":"TopicsMessageRateExceeded"}"#));
        assert!(matches!(slower, Sent::Busy { .. }), "{slower:?}");
        assert!(matches!(published(&answer(503, "")), Sent::Busy { .. }));
        assert!(matches!(published(&answer(400, "bad")), Sent::Failed(_)));
        for (status, body) in [(500, ""), (200, "{}"), (200, r#"{"message_id":"17"}"#)] {
            assert!(matches!(published(&answer(status, body)), Sent::Unknown(_)), "{body}");
        }
    }

    #[test]
    fn an_answer_that_does_not_fit_the_request_is_unknown() {
        assert!(matches!(outcomes(&answer(200, r#"{"results":[]}"#), 1)[..], [Sent::Unknown(_)]));
        assert!(matches!(outcomes(&answer(200, "<html>"), 1)[..], [Sent::Unknown(_)]));
    }

    #[test]
    fn bodies_of_two_ops_differ_and_have_the_asked_size() {
        assert_eq!(body_of("1", 1024).len(), 1024);
        assert_ne!(body_of("1", 64), body_of("2", 64));
    }
}

//! The Instance ID API for app servers: many tokens of one topic at once, and what a token is. Source: gcm-http.md section 10.
//!
//! Owns bodies and answers. Paths and headers are the gateway's.

use serde::{Deserialize, Serialize};

use super::send::BadRequest;
use crate::{limits::SUBSCRIBE_BATCH_MAX, topic};

/// The text for a bad topic. Source: gcm-http.md section 10.4.
pub const BAD_TOPIC: &str = "Topic name format is invalid";

/// The text for no tokens. Source: gcm-http.md section 10.4.
pub const NO_TOKENS: &str = "MissingIIdToken";

/// Tokens that join or leave a topic.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BatchRequest {
    /// Without `/topics/`.
    pub topic: String,
    /// 1 to 1,000, as they were spelled.
    pub tokens: Vec<String>,
}

#[derive(Deserialize)]
struct BatchBody {
    #[serde(default)]
    to: Option<String>,
    #[serde(default)]
    registration_tokens: Option<Vec<String>>,
}

/// Reads the body of `batchAdd` or `batchRemove`.
///
/// # Errors
/// The text of the 400's `error`.
pub fn parse_batch(body: &[u8]) -> Result<BatchRequest, BadRequest> {
    let BatchBody { to, registration_tokens } =
        serde_json::from_slice(body).map_err(|error| BadRequest::new(format!("JSON_PARSING_ERROR: {error}")))?;
    let to = to.unwrap_or_default();
    let name = to.strip_prefix(topic::PREFIX).filter(|name| topic::is_name(name));
    let topic = name.ok_or_else(|| BadRequest::new(BAD_TOPIC))?.to_owned();
    let tokens = registration_tokens.unwrap_or_default();
    match tokens.len() {
        0 => Err(BadRequest::new(NO_TOKENS)),
        1..=SUBSCRIBE_BATCH_MAX => Ok(BatchRequest { topic, tokens }),
        count => Err(BadRequest::new(format!("TooManyTokens: {count}, at most {SUBSCRIBE_BATCH_MAX}"))),
    }
}

/// Why one token did not join or leave.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum BatchError {
    /// Unknown or unregistered.
    NotFound,
    /// Of another sender.
    InvalidArgument,
    /// It has all the topics it may have.
    TooManyTopics,
    /// Too much is stored.
    ResourceExhausted,
    /// It did not happen: try again.
    Internal,
    /// Whether it happened is not known.
    DeadlineExceeded,
}

impl BatchError {
    /// Every variant, for tests that walk a table.
    pub const ALL: [Self; 6] = [
        Self::NotFound,
        Self::InvalidArgument,
        Self::TooManyTopics,
        Self::ResourceExhausted,
        Self::Internal,
        Self::DeadlineExceeded,
    ];

    /// The word of an entry. Source: gcm-http.md section 10.3.
    #[must_use]
    pub fn word(self) -> &'static str {
        match self {
            Self::NotFound => "NOT_FOUND",
            Self::InvalidArgument => "INVALID_ARGUMENT",
            Self::TooManyTopics => "TOO_MANY_TOPICS",
            Self::ResourceExhausted => "RESOURCE_EXHAUSTED",
            Self::Internal => "INTERNAL",
            Self::DeadlineExceeded => "DEADLINE_EXCEEDED",
        }
    }
}

#[derive(Serialize)]
struct Entry {
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<&'static str>,
}

#[derive(Serialize)]
struct Entries {
    results: Vec<Entry>,
}

/// The answer to a batch: an entry for each token, in order, empty for success.
#[must_use]
pub fn batch(outcomes: &[Result<(), BatchError>]) -> Vec<u8> {
    let entry = |outcome: &Result<(), BatchError>| Entry { error: outcome.err().map(BatchError::word) };
    let entries = Entries { results: outcomes.iter().map(entry).collect() };
    serde_json::to_vec(&entries).expect("strings always encode")
}

/// The body of every error of this API.
#[must_use]
pub fn error(text: &str) -> Vec<u8> {
    serde_json::json!({ "error": text }).to_string().into_bytes()
}

/// What a token is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TokenFacts {
    /// Application id.
    pub application: String,
    /// Sender id of the key that asks.
    pub authorized_entity: String,
    /// As it registered; empty when it did not say.
    pub application_version: String,
    /// Digest of its signing certificate; empty when it did not say.
    pub app_signer: String,
    /// Only where `details` were asked for.
    pub details: Option<TokenDetails>,
}

/// What `?details=true` adds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TokenDetails {
    /// Day when its device was last here, as `YYYY-MM-DD`, where that is known.
    pub connected: Option<String>,
    /// Each topic and the day it was added, as `YYYY-MM-DD`.
    pub topics: Vec<(String, String)>,
}

/// The answer about a token.
#[must_use]
pub fn info(facts: &TokenFacts) -> Vec<u8> {
    let mut answer = serde_json::json!({
        "application": facts.application,
        "authorizedEntity": facts.authorized_entity,
        "applicationVersion": facts.application_version,
        "appSigner": facts.app_signer,
        "attestStatus": "UNKNOWN",
        "platform": platform(&facts.application),
    });
    if let Some(TokenDetails { connected, topics }) = &facts.details {
        if let Some(day) = connected {
            answer["connectDate"] = day.as_str().into();
        }
        let topics: serde_json::Map<String, serde_json::Value> =
            topics.iter().map(|(topic, day)| (topic.clone(), serde_json::json!({ "addDate": day }))).collect();
        answer["rel"] = serde_json::json!({ "topics": topics });
    }
    answer.to_string().into_bytes()
}

/// Source: decisions.md, "`/iid/info`".
fn platform(application: &str) -> &'static str {
    let is_extension = application.len() == 32 && application.bytes().all(|byte| (b'a'..=b'p').contains(&byte));
    let is_chrome = application.starts_with("org.chromium") || application.starts_with("com.chrome") || is_extension;
    if is_chrome { "CHROME" } else { "ANDROID" }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn h128_core_a_batch_names_a_topic_and_1_to_1000_tokens() {
        let of = |count: usize| {
            let tokens = vec!["\"t\""; count].join(",");
            parse_batch(format!(r#"{{"to":"/topics/x","registration_tokens":[{tokens}]}}"#).as_bytes())
        };
        assert_eq!(of(1_000).unwrap().tokens.len(), 1_000);
        assert!(of(1_001).unwrap_err().0.contains("at most 1000"));
        assert_eq!(of(0).unwrap_err().0, NO_TOKENS);
        for body in
            [r#"{"registration_tokens":["t"]}"#, r#"{"to":"x","registration_tokens":["t"]}"#, r#"{"to":"/topics/a b"}"#]
        {
            assert_eq!(parse_batch(body.as_bytes()).unwrap_err().0, BAD_TOPIC);
        }
        assert!(parse_batch(b"[").unwrap_err().0.starts_with("JSON_PARSING_ERROR"));
        assert!(parse_batch(br#"{"to":"/topics/x","registration_tokens":"t"}"#).is_err());
    }

    #[test]
    fn h126_h127_core_an_empty_entry_is_success_and_every_error_has_its_word() {
        assert_eq!(batch(&[Ok(()), Err(BatchError::NotFound)]), br#"{"results":[{},{"error":"NOT_FOUND"}]}"#);
        let words: std::collections::BTreeSet<_> = BatchError::ALL.into_iter().map(BatchError::word).collect();
        assert_eq!(words.len(), BatchError::ALL.len());
    }

    #[test]
    fn h131_h132_core_rel_is_there_with_details_only() {
        let mut facts = TokenFacts {
            application: "a.b".to_owned(),
            authorized_entity: "7".to_owned(),
            application_version: String::new(),
            app_signer: String::new(),
            details: None,
        };
        let json = |facts: &TokenFacts| serde_json::from_slice::<serde_json::Value>(&info(facts)).unwrap();
        let answer = json(&facts);
        assert_eq!((answer["platform"].as_str(), answer.get("rel")), (Some("ANDROID"), None));
        let topics = vec![("x".to_owned(), "2026-11-27".to_owned())];
        facts.details = Some(TokenDetails { connected: None, topics });
        assert_eq!(json(&facts)["rel"]["topics"]["x"]["addDate"], "2026-11-27");
        for application in ["org.chromium.linux", "com.chrome.macosx", &"abcdefgh".repeat(4)] {
            assert_eq!(platform(application), "CHROME");
        }
        assert_eq!(platform(&"z".repeat(32)), "ANDROID");
    }

    proptest! {
        #[test]
        fn any_bytes_are_answered(body: Vec<u8>) {
            let _ = parse_batch(&body);
        }
    }
}

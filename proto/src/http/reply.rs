//! What became of a send, in the protocol's words. Source: gcm-http.md sections 4.1, 5.2, 7.1 and 12.
//!
//! Owns the table from a refusal to its word, and the exact bytes that clients search: compact JSON, integers as integers, no
//! `=` beyond the one of a line.

use serde::Serialize;

use crate::{message::MessageId, refusal::Refusal};

/// Media type of JSON answers.
pub const JSON_TYPE: &str = "application/json; charset=UTF-8";

/// Media type of plain-text answers.
pub const TEXT_TYPE: &str = "text/plain; charset=UTF-8";

/// Media type of [`UNAUTHORIZED_PAGE`].
pub const HTML_TYPE: &str = "text/html; charset=UTF-8";

/// The message id of a dry run. Source: gcm-http.md section 3.2.
pub const DRY_RUN_ID: &str = "fake_message_id";

/// The body of a 401: clients look for its word. Source: gcm-http.md section 7.1.
pub const UNAUTHORIZED_PAGE: &str = "<HTML>\n<HEAD>\n<TITLE>Unauthorized</TITLE>\n</HEAD>\n\
    <BODY BGCOLOR=\"#FFFFFF\" TEXT=\"#000000\">\n<H1>Unauthorized</H1>\n<H2>Error 401</H2>\n</BODY>\n</HTML>\n";

/// What became of one target.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TargetOutcome {
    /// Taken.
    Accepted {
        /// `None` for a dry run.
        id: Option<MessageId>,
        /// The token to use from now on, where the addressed one was superseded.
        canonical: Option<String>,
    },
    /// Not taken.
    Refused(Refusal),
}

/// The protocol's word for a refusal.
pub fn word(refusal: Refusal) -> &'static str {
    match refusal {
        Refusal::MissingRegistration => "MissingRegistration",
        Refusal::InvalidRegistration => "InvalidRegistration",
        Refusal::NotRegistered => "NotRegistered",
        Refusal::MismatchSenderId => "MismatchSenderId",
        Refusal::InvalidPackageName => "InvalidPackageName",
        Refusal::MessageTooBig => "MessageTooBig",
        Refusal::InvalidDataKey => "InvalidDataKey",
        Refusal::InvalidTtl => "InvalidTtl",
        Refusal::Unavailable => "Unavailable",
        Refusal::InternalServerError => "InternalServerError",
        Refusal::DeviceMessageRateExceeded => "DeviceMessageRateExceeded",
        Refusal::TopicsMessageRateExceeded => "TopicsMessageRateExceeded",
    }
}

/// The JSON answer for topics: an integer id, or the word for a refusal. `id`: below 2^53. Source: gcm-http.md section 4.2.
pub fn topics(outcome: Result<u64, Refusal>) -> Vec<u8> {
    match outcome {
        Ok(id) => format!("{{\"message_id\":{id}}}").into_bytes(),
        Err(refusal) => format!("{{\"error\":\"{}\"}}", word(refusal)).into_bytes(),
    }
}

#[derive(Serialize)]
struct Body {
    multicast_id: u64,
    success: usize,
    failure: usize,
    canonical_ids: usize,
    results: Vec<OneResult>,
}

#[derive(Serialize)]
struct OneResult {
    #[serde(skip_serializing_if = "Option::is_none")]
    message_id: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    registration_id: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<&'static str>,
}

/// The JSON answer for tokens, results in the order of the request. `multicast_id`: above 0 and below 2^53.
pub fn json(multicast_id: u64, outcomes: &[TargetOutcome]) -> Vec<u8> {
    let result = |outcome: &TargetOutcome| -> OneResult {
        match outcome {
            TargetOutcome::Accepted { id, canonical } => {
                OneResult { message_id: Some(spelled(*id)), registration_id: canonical.clone(), error: None }
            }
            TargetOutcome::Refused(refusal) => {
                OneResult { message_id: None, registration_id: None, error: Some(word(*refusal)) }
            }
        }
    };
    let results: Vec<OneResult> = outcomes.iter().map(result).collect();
    let success = results.iter().filter(|result| result.error.is_none()).count();
    let canonical_ids = results.iter().filter(|result| result.registration_id.is_some()).count();
    let body = Body { multicast_id, success, failure: results.len() - success, canonical_ids, results };
    serde_json::to_vec(&body).expect("numbers and strings always encode")
}

#[derive(Serialize)]
struct GroupBody<'a> {
    success: usize,
    failure: usize,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    failed_registration_ids: Vec<&'a str>,
}

/// The JSON answer for a device group: each member's token, as far as it can be spelled, and what became of it. Never `multicast_id` nor `results`, by which
/// clients tell the kinds of answers apart. Source: gcm-http.md section 4.3.
pub fn group(members: &[(Option<String>, TargetOutcome)]) -> Vec<u8> {
    let failed = || members.iter().filter(|(_, outcome)| matches!(outcome, TargetOutcome::Refused(_)));
    let failed_registration_ids = failed().filter_map(|(token, _)| token.as_deref()).collect();
    let failure = failed().count();
    let body = GroupBody { success: members.len() - failure, failure, failed_registration_ids };
    serde_json::to_vec(&body).expect("numbers and strings always encode")
}

/// The plain-text answer; a refusal that is a status instead (`Unavailable`, `InternalServerError`) is the caller's to tell.
pub fn plain(outcome: &TargetOutcome) -> String {
    match outcome {
        TargetOutcome::Accepted { id, canonical: None } => format!("id={}\n", spelled(*id)),
        TargetOutcome::Accepted { id, canonical: Some(token) } => {
            format!("id={}\nregistration_id={token}\n", spelled(*id))
        }
        TargetOutcome::Refused(refusal) => format!("Error={}\n", word(*refusal)),
    }
}

fn spelled(id: Option<MessageId>) -> String {
    id.map_or_else(|| DRY_RUN_ID.to_owned(), |id| id.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    const ID: MessageId = MessageId { micros: 1_700_000_000_000_001, random: 0xa1 };

    #[test]
    fn h149_core_the_answer_for_a_group_counts_members_and_names_those_that_failed() {
        let accepted =
            || (Some("t0".to_owned()), TargetOutcome::Accepted { id: Some(ID), canonical: Some("new".to_owned()) });
        let failed = |token: &str| (Some(token.to_owned()), TargetOutcome::Refused(Refusal::Unavailable));
        assert_eq!(group(&[accepted(), accepted()]), br#"{"success":2,"failure":0}"#);
        let partial = br#"{"success":1,"failure":2,"failed_registration_ids":["t1","t2"]}"#;
        assert_eq!(group(&[failed("t1"), accepted(), failed("t2")]), partial);
    }

    #[test]
    fn h020_h026_h027_h028_core_the_answer_of_the_documents_is_spelled_to_the_byte() {
        let outcomes = [
            TargetOutcome::Accepted { id: Some(ID), canonical: None },
            TargetOutcome::Accepted { id: Some(ID), canonical: Some("tokNew".to_owned()) },
            TargetOutcome::Refused(Refusal::NotRegistered),
        ];
        let expected = concat!(
            r#"{"multicast_id":4803120194,"success":2,"failure":1,"canonical_ids":1,"results":["#,
            r#"{"message_id":"0:1700000000000001%00000000000000a1"},"#,
            r#"{"message_id":"0:1700000000000001%00000000000000a1","registration_id":"tokNew"},"#,
            r#"{"error":"NotRegistered"}]}"#
        );
        assert_eq!(String::from_utf8(json(4_803_120_194, &outcomes)).unwrap(), expected);
    }

    #[test]
    fn h080_h081_h089_core_plain_text_has_one_equals_sign_a_line_and_an_end() {
        let accepted = TargetOutcome::Accepted { id: Some(ID), canonical: Some("tokNew".to_owned()) };
        assert_eq!(plain(&accepted), "id=0:1700000000000001%00000000000000a1\nregistration_id=tokNew\n");
        assert_eq!(plain(&TargetOutcome::Refused(Refusal::InvalidTtl)), "Error=InvalidTtl\n");
    }

    #[test]
    fn every_refusal_has_its_own_word() {
        let words: std::collections::BTreeSet<_> = Refusal::ALL.into_iter().map(word).collect();
        assert_eq!(words.len(), Refusal::ALL.len());
        assert!(words.iter().all(|word| word.bytes().all(|byte| byte.is_ascii_alphabetic())));
    }

    #[test]
    fn h008_core_the_page_of_a_401_says_its_word() {
        assert!(UNAUTHORIZED_PAGE.contains("Unauthorized"));
    }
}

//! The JSON form of a send. Source: gcm-http.md section 3.
//!
//! Types are strict: another type than the table's is a 400, a number out of range an error of the message. Bodies are bounded
//! before they are parsed: bytes by the caller, nesting by the parser, values by [`JSON_SEPARATORS_MAX`].

use serde_json::{Map, Value};

use super::send::{BadRequest, SendRequest, Targets, Ttl, named};
use crate::{
    group::NotificationKey,
    limits::{JSON_SEPARATORS_MAX, MULTICAST_MAX},
    message::Priority,
    topic::{self, Condition},
};

/// Reads a body.
///
/// # Errors
/// The text of the 400.
pub fn parse(body: &[u8]) -> Result<SendRequest, BadRequest> {
    let mut fields = object(body)?;
    let data = pairs(&mut fields, "data")?;
    let notification = pairs(&mut fields, "notification")?;
    for passed_on in ["content_available", "mutable_content", "delay_while_idle"] {
        // They change nothing for a device of ours; their type is checked.
        boolean(&fields, passed_on)?;
    }
    let default = if notification.is_empty() { Priority::Normal } else { Priority::High };
    Ok(SendRequest {
        targets: targets(&fields)?,
        collapse_key: string(&fields, "collapse_key")?.and_then(named),
        priority: priority(&fields)?.unwrap_or(default),
        ttl: ttl(&fields)?,
        dry_run: boolean(&fields, "dry_run")?,
        restricted_package_name: string(&fields, "restricted_package_name")?.and_then(named),
        data,
        notification,
    })
}

/// The fields of a body that is a JSON object.
pub(super) fn object(body: &[u8]) -> Result<Map<String, Value>, BadRequest> {
    bounded(body)?;
    let value: Value =
        serde_json::from_slice(body).map_err(|error| BadRequest::new(format!("JSON_PARSING_ERROR: {error}")))?;
    match value {
        Value::Object(fields) => Ok(fields),
        other => Err(BadRequest::new(format!("JSON_PARSING_ERROR: the body is {}, not an object", kind(&other)))),
    }
}

/// Refuses a body whose values would cost far more than its bytes.
fn bounded(body: &[u8]) -> Result<(), BadRequest> {
    // Nearly all bodies: each separator is a byte.
    if body.len() <= JSON_SEPARATORS_MAX {
        return Ok(());
    }
    let (mut in_string, mut escaped, mut separators) = (false, false, 0);
    for byte in body {
        match byte {
            _ if escaped => escaped = false,
            b'\\' if in_string => escaped = true,
            b'"' => in_string = !in_string,
            b',' | b':' | b'[' | b'{' if !in_string => separators += 1,
            _ => {}
        }
    }
    if separators > JSON_SEPARATORS_MAX {
        return Err(BadRequest::new(format!("JSON_PARSING_ERROR: more than {JSON_SEPARATORS_MAX} values")));
    }
    Ok(())
}

fn targets(fields: &Map<String, Value>) -> Result<Targets, BadRequest> {
    let given: Vec<&str> = ["to", "registration_ids", "notification_key", "condition"]
        .into_iter()
        .filter(|name| field(fields, name).is_some())
        .collect();
    match given[..] {
        [] => Ok(Targets::None),
        ["to"] => to(fields),
        ["registration_ids"] => registration_ids(fields),
        ["condition"] => {
            let text = string(fields, "condition")?.unwrap_or_default();
            Condition::parse(&text).map(Targets::Topics).map_err(|error| BadRequest::new(error.to_string()))
        }
        ["notification_key"] => {
            Ok(string(fields, "notification_key")?.and_then(named).map_or(Targets::None, Targets::Group))
        }
        _ => Err(BadRequest::new(format!("Must use only one of {}", given.join(", ")))),
    }
}

fn to(fields: &Map<String, Value>) -> Result<Targets, BadRequest> {
    let to = string(fields, "to")?.unwrap_or_default();
    if let Some(name) = to.strip_prefix(topic::PREFIX) {
        return if topic::is_name(name) {
            Ok(Targets::Topics(Condition::topic(name)))
        } else {
            Err(BadRequest::new("\"to\" is no topic: a name is 1 to 900 characters of [a-zA-Z0-9-_.~%]"))
        };
    }
    if NotificationKey::resembles(&to) {
        return Ok(Targets::Group(to));
    }
    Ok(named(to).map_or(Targets::None, Targets::One))
}

fn registration_ids(fields: &Map<String, Value>) -> Result<Targets, BadRequest> {
    let texts = tokens(fields)?;
    Ok(if texts.is_empty() { Targets::None } else { Targets::Many(texts) })
}

/// The entries of `registration_ids`, at most [`MULTICAST_MAX`].
pub(super) fn tokens(fields: &Map<String, Value>) -> Result<Vec<String>, BadRequest> {
    let Some(Value::Array(entries)) = field(fields, "registration_ids") else {
        // The words that real clients have seen, blank lines included.
        return Err(BadRequest::new("\"registration_ids\" field is not a JSON array\n\n"));
    };
    if entries.len() > MULTICAST_MAX {
        let count = entries.len();
        return Err(BadRequest::new(format!("\"registration_ids\" has {count} entries, at most {MULTICAST_MAX}")));
    }
    let texts = entries.iter().map(|entry| match entry {
        Value::String(text) => Ok(text.clone()),
        other => Err(BadRequest::new(format!("\"registration_ids\" holds {}, not only strings", kind(other)))),
    });
    texts.collect()
}

fn priority(fields: &Map<String, Value>) -> Result<Option<Priority>, BadRequest> {
    match field(fields, "priority") {
        None => Ok(None),
        Some(Value::String(word)) if word == "normal" => Ok(Some(Priority::Normal)),
        Some(Value::String(word)) if word == "high" => Ok(Some(Priority::High)),
        Some(Value::Number(number)) if number.as_f64() == Some(5.0) => Ok(Some(Priority::Normal)),
        Some(Value::Number(number)) if number.as_f64() == Some(10.0) => Ok(Some(Priority::High)),
        Some(_) => Err(BadRequest::new("\"priority\" must be \"normal\" or \"high\"")),
    }
}

fn ttl(fields: &Map<String, Value>) -> Result<Ttl, BadRequest> {
    match field(fields, "time_to_live") {
        None => Ok(Ttl::default()),
        Some(Value::Number(number)) => Ok(Ttl::of(number.as_f64())),
        Some(other) => Err(BadRequest::new(format!("\"time_to_live\" must be a number, not {}", kind(other)))),
    }
}

/// Values become strings: numbers and booleans in their spelling, the rest as compact JSON; null drops its key.
fn pairs(fields: &mut Map<String, Value>, name: &str) -> Result<Vec<(String, String)>, BadRequest> {
    let object = match fields.get_mut(name).map(Value::take) {
        None | Some(Value::Null) => return Ok(Vec::new()),
        Some(Value::Object(object)) => object,
        Some(other) => return Err(BadRequest::new(format!("\"{name}\" must be an object, not {}", kind(&other)))),
    };
    let text = |value: Value| match value {
        Value::Null => None,
        Value::String(text) => Some(text),
        other => Some(other.to_string()),
    };
    Ok(object.into_iter().filter_map(|(key, value)| Some((key, text(value)?))).collect())
}

pub(super) fn string(fields: &Map<String, Value>, name: &str) -> Result<Option<String>, BadRequest> {
    match field(fields, name) {
        None => Ok(None),
        Some(Value::String(text)) => Ok(Some(text.clone())),
        Some(other) => Err(BadRequest::new(format!("\"{name}\" must be a string, not {}", kind(other)))),
    }
}

fn boolean(fields: &Map<String, Value>, name: &str) -> Result<bool, BadRequest> {
    match field(fields, name) {
        None => Ok(false),
        Some(Value::Bool(value)) => Ok(*value),
        Some(other) => Err(BadRequest::new(format!("\"{name}\" must be a boolean, not {}", kind(other)))),
    }
}

/// A field that is there; null is absent, as serialisers of optional fields write it.
fn field<'a>(fields: &'a Map<String, Value>, name: &str) -> Option<&'a Value> {
    fields.get(name).filter(|value| !value.is_null())
}

fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "an array",
        Value::Object(_) => "an object",
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::refusal::Refusal;

    fn good(body: &str) -> SendRequest {
        parse(body.as_bytes()).unwrap()
    }

    fn bad(body: &str) -> String {
        parse(body.as_bytes()).unwrap_err().0
    }

    #[test]
    fn h040_h041_core_what_is_no_json_object_is_a_bad_request() {
        for body in ["", "{", "[]", "7", "null", "\"x\"", "{\"to\":\"x\"}}", &"[".repeat(100_000)] {
            assert!(bad(body).starts_with("JSON_PARSING_ERROR:"), "{body:.20}");
        }
    }

    #[test]
    fn h042_core_registration_ids_of_another_type_is_a_bad_request_in_known_words() {
        assert!(bad(r#"{"registration_ids":"x"}"#).starts_with("\"registration_ids\" field is not a JSON array"));
        assert!(bad(r#"{"registration_ids":["x",1]}"#).contains("registration_ids"));
    }

    #[test]
    fn h043_h044_h050_core_a_thousand_targets_are_taken_each_for_itself_and_one_more_is_not() {
        let ids = |count| format!(r#"{{"registration_ids":[{}]}}"#, vec![r#""x""#; count].join(","));
        assert_eq!(good(&ids(1000)).targets.as_slice().len(), 1000);
        assert!(bad(&ids(1001)).contains("at most 1000"));
    }

    #[test]
    fn h055_h056_core_options_of_another_type_are_a_bad_request() {
        for body in [
            r#"{"delay_while_idle":"yes"}"#,
            r#"{"dry_run":1}"#,
            r#"{"content_available":1}"#,
            r#"{"mutable_content":"true"}"#,
            r#"{"collapse_key":7}"#,
            r#"{"restricted_package_name":[]}"#,
            r#"{"data":[]}"#,
            r#"{"notification":"x"}"#,
            r#"{"to":["x"]}"#,
        ] {
            assert!(bad(body).contains(" must be "), "{body}");
        }
    }

    #[test]
    fn h066_core_unknown_fields_are_ignored_as_are_those_of_xmpp() {
        let body = r#"{"to":"x","fcm_options":{"a":1},"message_id":7,"delivery_receipt_requested":"x","new":[]}"#;
        assert_eq!(good(body), good(r#"{"to":"x"}"#));
    }

    #[test]
    fn an_object_that_poses_as_a_parsers_number_is_answered() {
        let posing = |text| format!(r#"{{"data":{{"k":{{"$serde_json::private::Number":"{text}"}}}}}}"#);
        assert!(bad(&posing("x")).starts_with("JSON_PARSING_ERROR:"));
        assert_eq!(good(&posing("1")).data, [("k".to_owned(), "1".to_owned())]);
    }

    #[test]
    fn h045_core_more_than_one_kind_of_target_is_a_bad_request() {
        assert!(bad(r#"{"to":"x","registration_ids":["x"]}"#).contains("only one of"));
        assert!(bad(r#"{"to":"x","condition":"c"}"#).contains("only one of"));
    }

    #[test]
    fn h046_h047_core_nobody_is_no_target() {
        for body in ["{}", r#"{"to":""}"#, r#"{"to":null}"#, r#"{"registration_ids":[]}"#] {
            assert_eq!(good(body).targets, Targets::None, "{body}");
        }
    }

    #[test]
    fn h051_h052_h053_h054_core_a_time_to_live_is_in_range_or_invalid_or_of_a_wrong_type() {
        for (text, expected) in [
            ("0", Ttl::Secs(0)),
            ("600.0", Ttl::Secs(600)),
            ("2419200", Ttl::Secs(2_419_200)),
            ("-1", Ttl::Invalid),
            ("2419201", Ttl::Invalid),
            ("1.5", Ttl::Invalid),
            ("1e400", Ttl::Invalid),
        ] {
            assert_eq!(good(&format!(r#"{{"time_to_live":{text}}}"#)).ttl, expected, "{text}");
        }
        assert!(bad(r#"{"time_to_live":"600"}"#).contains("time_to_live"));
    }

    #[test]
    fn h057_core_priorities_are_two_words_or_two_numbers() {
        assert_eq!(good(r#"{"priority":"high"}"#).priority, Priority::High);
        assert_eq!(good(r#"{"priority":5}"#).priority, Priority::Normal);
        assert_eq!(good(r#"{"notification":{"title":"t"}}"#).priority, Priority::High);
        assert!(bad(r#"{"priority":"urgent"}"#).contains("priority"));
    }

    #[test]
    fn h065_core_an_empty_notification_is_none() {
        let message = good(r#"{"notification":{}}"#);
        assert_eq!((message.notification.len(), message.priority), (0, Priority::Normal));
    }

    #[test]
    fn h067_h068_core_values_become_strings_and_numbers_keep_their_spelling() {
        let message =
            good(r#"{"data":{"n":1.50,"big":12345678901234567890123,"b":false,"z":null,"o":{"b":1,"a":[ ]}}}"#);
        let expected = [("n", "1.50"), ("big", "12345678901234567890123"), ("b", "false"), ("o", r#"{"b":1,"a":[]}"#)];
        assert_eq!(message.data, expected.map(|(key, value)| (key.to_owned(), value.to_owned())));
        assert_eq!(message.refusal(), None::<Refusal>);
    }

    #[test]
    fn a_notification_key_is_told_from_a_token_in_both_fields_it_may_stand_in() {
        let group = Targets::Group("APA91bxyz".to_owned());
        assert_eq!(good(r#"{"to":"APA91bxyz"}"#).targets, group);
        assert_eq!(good(r#"{"notification_key":"APA91bxyz"}"#).targets, group);
        assert_eq!(good(r#"{"notification_key":"x"}"#).targets, Targets::Group("x".to_owned()));
        assert_eq!(good(r#"{"to":"i:APA91bxyz"}"#).targets, Targets::One("i:APA91bxyz".to_owned()));
        assert_eq!(good(r#"{"registration_ids":["APA91bxyz"]}"#).targets, Targets::Many(vec!["APA91bxyz".to_owned()]));
        assert_eq!(good(r#"{"notification_key":""}"#).targets, Targets::None);
        assert!(bad(r#"{"notification_key":["x"]}"#).contains("notification_key"));
    }

    #[test]
    fn h122_h125_core_topics_and_conditions_are_told_apart_and_bad_ones_refused_in_plain_words() {
        assert_eq!(good(r#"{"to":"/topics/x"}"#).targets, Targets::Topics(Condition::topic("x")));
        let condition = good(r#"{"condition":"'x' in topics || 'y' in topics"}"#);
        assert!(matches!(condition.targets, Targets::Topics(found) if found.topics() == ["x", "y"]));
        for body in [r#"{"to":"/topics/"}"#, r#"{"to":"/topics/a b"}"#, r#"{"condition":"x"}"#, r#"{"condition":7}"#] {
            assert!(bad(body).starts_with('"'), "{body}");
        }
        assert_eq!(good(r#"{"to":"/topicz/x"}"#).targets, Targets::One("/topicz/x".to_owned()));
    }

    #[test]
    fn a_body_of_a_million_small_values_is_refused_before_it_is_parsed() {
        assert!(bad(&format!("[{}0]", "0,".repeat(1_000_000))).contains("values"));
    }

    proptest! {
        #[test]
        fn any_bytes_are_answered(body: Vec<u8>) {
            let _ = parse(&body);
        }

        #[test]
        fn any_json_of_known_fields_is_answered(
            name in "to|registration_ids|data|time_to_live|priority|dry_run|collapse_key|notification",
            value in r#"null|true|-?[0-9]{1,30}|"[a-z/:]{0,9}"|\[("x",){0,3}"y"\]|\{"k":[0-9]\}"#,
        ) {
            let _ = parse(format!(r#"{{"{name}":{value}}}"#).as_bytes());
        }
    }
}

//! Requests about device groups. Source: gcm-http.md section 9.
//!
//! Owns the form of a request and the words of its answers. Which tokens are alive, which keys are ours and what a group holds is
//! for others to say. Bodies are JSON whatever their media type says: there is no other form.

use serde::Serialize;
use serde_json::{Map, Value};

use super::{
    send::{BadRequest, named},
    send_json::{object, string, tokens},
};
use crate::limits::{GROUP_MEMBERS_MAX, GROUP_NAME_MAX_BYTES};

/// What a `POST` asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum GroupRequest {
    /// Make a group.
    Create {
        /// 1 to 900 bytes.
        name: String,
        /// At most 1,000, as given.
        registration_ids: Vec<String>,
    },
    /// Let devices join.
    Add(GroupMembers),
    /// Let devices go.
    Remove(GroupMembers),
}

/// Devices of a group that there is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GroupMembers {
    /// The notification key, not looked at yet.
    pub notification_key: String,
    /// The name the group must have, where the request has one.
    pub name: Option<String>,
    /// At most 1,000, as given.
    pub registration_ids: Vec<String>,
}

/// Why a request about a group is refused: a 400.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum GroupError {
    /// The name is taken.
    #[error("notification_key already exists")]
    Exists,
    /// No group of this key or name.
    #[error("notification_key not found")]
    NotFound,
    /// None of the tokens is one of a device that could join.
    #[error("no valid registration ids")]
    NoValidIds,
    /// The key is another group's.
    #[error("notification_key_name doesn't match the group name of the notification_key")]
    NameMismatch,
    /// More members than a group may have: the documents give no text. The number is the protocol's; a cluster may be set otherwise.
    #[error("too many registration ids: a notification_key has at most {GROUP_MEMBERS_MAX}")]
    Full,
    /// The header is missing: the documents give no text.
    #[error("the header project_id is missing")]
    NoProjectId,
    /// The header names another sender than the key's: the documents give no text.
    #[error("project_id doesn't match the sender id of the server key")]
    ForeignProjectId,
}

impl GroupError {
    /// Every variant, for tests that walk a table.
    pub const ALL: [GroupError; 7] = [
        GroupError::Exists,
        GroupError::NotFound,
        GroupError::NoValidIds,
        GroupError::NameMismatch,
        GroupError::Full,
        GroupError::NoProjectId,
        GroupError::ForeignProjectId,
    ];
}

/// Reads the body of a `POST`.
///
/// # Errors
/// The text of the 400.
pub fn parse(body: &[u8]) -> Result<GroupRequest, BadRequest> {
    let fields = object(body)?;
    let name = string(&fields, "notification_key_name")?.and_then(named);
    let registration_ids = match fields.get("registration_ids") {
        None | Some(Value::Null) => Vec::new(),
        Some(_) => tokens(&fields)?,
    };
    let members = |fields: &Map<String, Value>| {
        let notification_key = string(fields, "notification_key")?.and_then(named);
        let notification_key = notification_key.ok_or_else(|| BadRequest::new("notification_key is missing"))?;
        Ok(GroupMembers { notification_key, name: name.clone(), registration_ids: registration_ids.clone() })
    };
    match string(&fields, "operation")?.as_deref() {
        Some("create") => {
            let name = checked_name(name.as_deref().unwrap_or_default())?.to_owned();
            Ok(GroupRequest::Create { name, registration_ids })
        }
        Some("add") => Ok(GroupRequest::Add(members(&fields)?)),
        Some("remove") => Ok(GroupRequest::Remove(members(&fields)?)),
        Some(_) | None => Err(BadRequest::new("operation must be create, add or remove")),
    }
}

/// The name that a `GET` looks up, from its query.
///
/// # Errors
/// The text of the 400.
pub fn parse_query(query: &str) -> Result<String, BadRequest> {
    let mut pairs = form_urlencoded::parse(query.as_bytes());
    let name = pairs.find(|(name, _)| name == "notification_key_name").map(|(_, value)| value);
    Ok(checked_name(&name.unwrap_or_default())?.to_owned())
}

fn checked_name(name: &str) -> Result<&str, BadRequest> {
    if name.is_empty() {
        return Err(BadRequest::new("notification_key_name is missing"));
    }
    if name.len() > GROUP_NAME_MAX_BYTES {
        return Err(BadRequest::new(format!("notification_key_name is longer than {GROUP_NAME_MAX_BYTES} bytes")));
    }
    Ok(name)
}

#[derive(Serialize)]
struct Done<'a> {
    notification_key: &'a str,
}

#[derive(Serialize)]
struct Refused<'a> {
    error: &'a str,
}

/// The body of a success.
pub fn done(notification_key: &str) -> Vec<u8> {
    serde_json::to_vec(&Done { notification_key }).expect("strings always encode")
}

/// The body of a 400.
pub fn refused(error: &str) -> Vec<u8> {
    serde_json::to_vec(&Refused { error }).expect("strings always encode")
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn bad(body: &str) -> String {
        parse(body.as_bytes()).unwrap_err().0
    }

    fn ids(ids: &[&str]) -> Vec<String> {
        ids.iter().map(|id| (*id).to_owned()).collect()
    }

    #[test]
    fn h140_core_a_create_has_a_name_and_tokens() {
        let body = br#"{"operation":"create","notification_key_name":"user-7","registration_ids":["a","b"],"new":{}}"#;
        let create = GroupRequest::Create { name: "user-7".to_owned(), registration_ids: ids(&["a", "b"]) };
        assert_eq!(parse(body), Ok(create));
    }

    #[test]
    fn h143_core_add_and_remove_have_a_key_and_perhaps_a_name() {
        let members = |name: Option<&str>| GroupMembers {
            notification_key: "k".to_owned(),
            name: name.map(str::to_owned),
            registration_ids: ids(&["a"]),
        };
        let add = br#"{"operation":"add","notification_key":"k","registration_ids":["a"]}"#;
        assert_eq!(parse(add), Ok(GroupRequest::Add(members(None))));
        let remove =
            br#"{"operation":"remove","notification_key":"k","notification_key_name":"n","registration_ids":["a"]}"#;
        assert_eq!(parse(remove), Ok(GroupRequest::Remove(members(Some("n")))));
    }

    #[test]
    fn what_is_missing_or_of_another_type_is_named() {
        for (body, named) in [
            (r#"{}"#, "operation"),
            (r#"{"operation":"list"}"#, "operation"),
            (r#"{"operation":7}"#, "operation"),
            (r#"{"operation":"create"}"#, "notification_key_name"),
            (r#"{"operation":"create","notification_key_name":""}"#, "notification_key_name"),
            (r#"{"operation":"create","notification_key_name":{}}"#, "notification_key_name"),
            (r#"{"operation":"add","registration_ids":["a"]}"#, "notification_key is missing"),
            (r#"{"operation":"remove","notification_key":null}"#, "notification_key is missing"),
            (r#"{"operation":"add","notification_key":"k","registration_ids":"a"}"#, "registration_ids"),
            (r#"{"operation":"add","notification_key":"k","registration_ids":[1]}"#, "registration_ids"),
            ("[]", "JSON_PARSING_ERROR"),
            ("{", "JSON_PARSING_ERROR"),
            (&"[".repeat(100_000), "JSON_PARSING_ERROR"),
        ] {
            assert!(bad(body).contains(named), "{body:.60}: {}", bad(body));
        }
        let without = parse(br#"{"operation":"create","notification_key_name":"n"}"#);
        assert_eq!(without, Ok(GroupRequest::Create { name: "n".to_owned(), registration_ids: vec![] }));
    }

    #[test]
    fn names_are_bounded_in_bytes_and_lists_in_entries() {
        let create = |name: &str| bad(&format!(r#"{{"operation":"create","notification_key_name":"{name}"}}"#));
        assert!(create(&"ü".repeat(451)).contains("longer than 900 bytes"));
        assert!(parse_query(&format!("notification_key_name={}", "%C3%BC".repeat(450))).is_ok());
        assert!(parse_query(&format!("notification_key_name={}", "%C3%BC".repeat(451))).is_err());
        let many = vec![r#""x""#; 1001].join(",");
        assert!(bad(&format!(r#"{{"operation":"create","registration_ids":[{many}]}}"#)).contains("at most 1000"));
    }

    #[test]
    fn h142_core_the_name_of_a_look_up_is_decoded() {
        assert_eq!(
            parse_query("x=1&notification_key_name=a%20b+c%26d&notification_key_name=z"),
            Ok("a b c&d".to_owned())
        );
        for query in ["", "notification_key_name", "notification_key_name=", "name=x"] {
            assert!(parse_query(query).is_err(), "{query}");
        }
    }

    #[test]
    fn h141_h145_h146_h147_core_the_texts_are_those_that_clients_compare() {
        let texts = GroupError::ALL.map(|error| error.to_string());
        assert_eq!(
            texts[..4],
            [
                "notification_key already exists",
                "notification_key not found",
                "no valid registration ids",
                "notification_key_name doesn't match the group name of the notification_key",
            ]
        );
        assert_eq!(refused(&texts[0]), br#"{"error":"notification_key already exists"}"#);
        assert_eq!(done("K"), br#"{"notification_key":"K"}"#);
    }

    proptest! {
        #[test]
        fn any_bytes_are_answered(body: Vec<u8>, query: String) {
            let _ = (parse(&body), parse_query(&query));
        }
    }
}

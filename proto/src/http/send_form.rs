//! The plain-text form of a send. Source: gcm-http.md section 5.
//!
//! There is no 400 here: what is wrong is an error of the message.

use std::{borrow::Cow, collections::BTreeSet};

use super::send::{SendRequest, Targets, Ttl, named};
use crate::{limits::PAYLOAD_MAX_BYTES, message::Priority};

/// Reads a body. Of a repeated parameter the first counts; unknown ones are ignored.
pub fn parse(body: &[u8]) -> SendRequest {
    let mut fields = Fields::default();
    for (name, value) in form_urlencoded::parse(body) {
        fields.take(&name, value);
    }
    let time_to_live = fields.time_to_live.map_or_else(Ttl::default, |text| ttl(&text));
    let priority = match fields.priority.as_deref() {
        Some("high" | "10") => Priority::High,
        _ => Priority::Normal,
    };
    let target = fields.registration_id.and_then(named).or(fields.to.and_then(named));
    SendRequest {
        targets: target.map_or(Targets::None, Targets::One),
        collapse_key: fields.collapse_key.and_then(named),
        priority,
        ttl: time_to_live,
        dry_run: fields.dry_run.is_some_and(|text| is_true(&text)),
        restricted_package_name: fields.restricted_package_name.and_then(named),
        data: fields.data,
        notification: Vec::new(),
    }
}

/// What was kept of a form: its known parameters, and of the payload no more than it takes to see that it is too big.
#[derive(Default)]
struct Fields {
    registration_id: Option<String>,
    to: Option<String>,
    collapse_key: Option<String>,
    restricted_package_name: Option<String>,
    time_to_live: Option<String>,
    dry_run: Option<String>,
    priority: Option<String>,
    data: Vec<(String, String)>,
    keys: BTreeSet<String>,
    data_bytes: usize,
}

impl Fields {
    fn take(&mut self, name: &str, value: Cow<'_, str>) {
        let slot = match name {
            "registration_id" => &mut self.registration_id,
            "to" => &mut self.to,
            "collapse_key" => &mut self.collapse_key,
            "restricted_package_name" => &mut self.restricted_package_name,
            "time_to_live" => &mut self.time_to_live,
            "dry_run" => &mut self.dry_run,
            "priority" => &mut self.priority,
            _ => return name.strip_prefix("data.").map_or((), |key| self.take_data(key, value)),
        };
        slot.get_or_insert_with(|| value.into_owned());
    }

    /// Past the limit nothing more is kept: a pair costs twenty times its bytes, and the message is refused anyway.
    fn take_data(&mut self, key: &str, value: Cow<'_, str>) {
        if self.data_bytes <= PAYLOAD_MAX_BYTES && self.keys.insert(key.to_owned()) {
            self.data_bytes += key.len() + value.len();
            self.data.push((key.to_owned(), value.into_owned()));
        }
    }
}

fn ttl(text: &str) -> Ttl {
    let digits = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    Ttl::of(digits.then(|| text.parse().ok()).flatten())
}

fn is_true(text: &str) -> bool {
    text == "1" || text.eq_ignore_ascii_case("true")
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::refusal::Refusal;

    #[test]
    fn h083_h084_core_the_target_is_registration_id_or_to() {
        assert_eq!(parse(b"data.k=v").targets, Targets::None);
        assert_eq!(parse(b"to=a").targets, Targets::One("a".to_owned()));
        assert_eq!(parse(b"to=a&registration_id=b&registration_id=c").targets, Targets::One("b".to_owned()));
    }

    #[test]
    fn h085_h088_core_a_key_is_everything_after_the_first_dot_and_values_are_decoded() {
        let data = parse(b"data.a.b=gr%C3%BC+%26&data.=x&data=y").data;
        assert_eq!(data, [("a.b".to_owned(), "grü &".to_owned()), (String::new(), "x".to_owned())]);
    }

    #[test]
    fn h086_core_booleans_are_words_or_digits() {
        for (text, expected) in [("1", true), ("true", true), ("0", false), ("false", false), ("", false)] {
            assert_eq!(parse(format!("dry_run={text}").as_bytes()).dry_run, expected, "{text}");
        }
    }

    #[test]
    fn h087_core_a_time_to_live_that_is_no_number_in_range_is_invalid() {
        for text in ["abc", "", "-1", "2419201", "1.0", "+5", "99999999999999999999"] {
            assert_eq!(parse(format!("time_to_live={text}").as_bytes()).ttl, Ttl::Invalid, "{text}");
        }
        assert_eq!(parse(b"time_to_live=0").ttl, Ttl::Secs(0));
    }

    #[test]
    fn of_a_payload_beyond_the_limit_only_what_shows_it_is_kept() {
        let body: String = (0..100_000).map(|n| format!("x{n}=&data.k{n}=v&")).collect();
        let request = parse(format!("{body}to=a").as_bytes());
        assert!(request.data.len() < 1_000, "{}", request.data.len());
        assert_eq!(request.refusal(), Some(Refusal::MessageTooBig));
        assert_eq!(request.targets, Targets::One("a".to_owned()));
    }

    proptest! {
        #[test]
        fn any_bytes_are_answered(body: Vec<u8>) {
            let _ = parse(&body).refusal();
        }
    }
}

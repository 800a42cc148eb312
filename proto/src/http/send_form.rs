//! The plain-text form of a send. Source: gcm-http.md section 5.
//!
//! There is no 400 here: what is wrong is an error of the message.

use super::send::{SendRequest, Targets, Ttl, named};
use crate::message::Priority;

/// Reads a body. Of a repeated parameter the first counts; unknown ones are ignored.
pub fn parse(body: &[u8]) -> SendRequest {
    let mut request = SendRequest {
        targets: Targets::None,
        collapse_key: None,
        priority: Priority::Normal,
        ttl: Ttl::default(),
        dry_run: false,
        restricted_package_name: None,
        data: Vec::new(),
        notification: Vec::new(),
    };
    let mut seen = std::collections::BTreeSet::new();
    let (mut registration_id, mut to) = (None, None);
    for (name, value) in form_urlencoded::parse(body) {
        if !seen.insert(name.clone()) {
            continue;
        }
        let value = value.into_owned();
        match name.as_ref() {
            "registration_id" => registration_id = named(value),
            "to" => to = named(value),
            "collapse_key" => request.collapse_key = named(value),
            "restricted_package_name" => request.restricted_package_name = named(value),
            "time_to_live" => request.ttl = ttl(&value),
            "dry_run" => request.dry_run = is_true(&value),
            "priority" if value == "high" || value == "10" => request.priority = Priority::High,
            other => {
                if let Some(key) = other.strip_prefix("data.") {
                    request.data.push((key.to_owned(), value));
                }
            }
        }
    }
    if let Some(token) = registration_id.or(to) {
        request.targets = Targets::One(token);
    }
    request
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

    proptest! {
        #[test]
        fn any_bytes_are_answered(body: Vec<u8>) {
            let _ = parse(&body).refusal();
        }
    }
}

//! gcm-http.md section 15 on the wire: transport, answers, validation, plain text.

use serde_json::{Value, json};

use crate::{
    app_server::{Answer, Http, send_form, send_json},
    broker::{Broker, ONE, TWO, shared},
    device::{Identity, check_in, value},
};

const APP: &str = "com.example.app";
/// Longest time to live, seconds.
const TTL_MAX: u64 = 2_419_200;

/// A registered device that is away.
struct Away {
    broker: &'static Broker,
    identity: Identity,
    token: String,
}

fn away() -> Away {
    let broker = shared();
    let identity = check_in(broker);
    let token = identity.register(broker, APP, ONE.0);
    Away { broker, identity, token }
}

impl Away {
    fn send(&self, body: &Value) -> Answer {
        send_json(&self.broker.address("http"), ONE.1, body)
    }

    /// A send to this token with these further fields.
    fn send_with(&self, further: &[(&str, Value)]) -> Answer {
        let mut body = json!({ "to": self.token });
        for (key, value) in further {
            body[*key] = value.clone();
        }
        self.send(&body)
    }

    fn send_form(&self, further: &str) -> Answer {
        send_form(&self.broker.address("http"), ONE.1, &format!("registration_id={}{further}", self.token))
    }

    /// The one message that waits.
    fn receive(&self) -> martlet_proto::device::mcs::DataMessageStanza {
        self.identity.connect(self.broker).message()
    }
}

/// A post to `path` with these headers.
fn post(path: &str, headers: &[(&str, &str)], body: &[u8]) -> Answer {
    Http::connect(&shared().address("http")).request("POST", path, headers, body)
}

fn key_header() -> String {
    format!("key={}", ONE.1)
}

/// Asserts one result with this error.
fn one_error(answer: &Answer, error: &str) {
    assert_eq!(answer.status, 200, "{}", answer.text());
    assert_eq!(answer.json()["results"], json!([{ "error": error }]));
    assert_eq!(answer.json()["failure"], 1);
}

/// Asserts one result with a message id.
fn one_success(answer: &Answer) -> String {
    assert_eq!(answer.status, 200, "{}", answer.text());
    let json = answer.json();
    assert_eq!(json["success"], 1, "{json}");
    json["results"][0]["message_id"].as_str().unwrap().to_owned()
}

fn bad_request(answer: &Answer) {
    assert_eq!(answer.status, 400, "{}", answer.text());
    assert!(!answer.text().trim().is_empty(), "a 400 gives its reason");
}

// ------------------------------------------------------------------------------------------- transport and auth

#[test]
fn h001_a_valid_key_and_token_give_200() {
    one_success(&away().send_with(&[]));
}

#[test]
fn h002_fcm_send_answers_in_the_same_shape() {
    let (away, key) = (away(), key_header());
    let headers = [("Authorization", key.as_str()), ("Content-Type", "application/json")];
    let answer = post("/fcm/send", &headers, json!({ "to": away.token }).to_string().as_bytes());
    one_success(&answer);
    let shape = |answer: &Answer| answer.json().as_object().unwrap().keys().cloned().collect::<Vec<_>>();
    assert_eq!(shape(&answer), shape(&away.send_with(&[])));
}

#[test]
fn h003_get_gives_405_and_names_what_is_allowed() {
    let answer = Http::connect(&shared().address("http")).request("GET", "/gcm/send", &[], b"");
    assert_eq!(answer.status, 405);
    assert_eq!(answer.header("allow"), Some("POST"));
}

#[test]
fn h004_an_unknown_path_gives_404() {
    assert_eq!(post("/gcm/sent", &[], b"").status, 404);
    assert_eq!(post("/gcm/send/something", &[], b"").status, 404);
}

#[test]
fn h005_no_authorization_gives_401() {
    assert_eq!(post("/gcm/send", &[("Content-Type", "application/json")], b"{}").status, 401);
}

#[test]
fn h006_authorization_without_key_gives_401() {
    for value in [ONE.1, "Bearer x", &format!("kex={}", ONE.1), ""] {
        assert_eq!(post("/gcm/send", &[("Authorization", value)], b"{}").status, 401, "{value}");
    }
}

#[test]
fn h007_an_unknown_key_gives_401() {
    assert_eq!(send_json(&shared().address("http"), "unknown", &json!({})).status, 401);
}

#[test]
fn h008_the_401_page_says_unauthorized() {
    let answer = send_json(&shared().address("http"), "unknown", &json!({}));
    assert!(answer.text().contains("Unauthorized"), "{}", answer.text());
    assert!(answer.header("content-type").unwrap().starts_with("text/html"));
}

#[test]
fn h009_a_bad_key_is_seen_before_a_bad_body() {
    let headers = [("Authorization", "key=unknown"), ("Content-Type", "application/json")];
    assert_eq!(post("/gcm/send", &headers, b"{not json").status, 401);
}

#[test]
fn h010_a_chunked_body_is_accepted() {
    let away = away();
    let body = json!({ "to": away.token }).to_string();
    let (one, two) = body.split_at(7);
    let mut http = Http::connect(&away.broker.address("http"));
    let request = format!(
        "POST /gcm/send HTTP/1.1\r\nHost: x\r\nAuthorization: key={}\r\nContent-Type: application/json\r\n\
         Transfer-Encoding: chunked\r\n\r\n{:x}\r\n{one}\r\n{:x}\r\n{two}\r\n0\r\n\r\n",
        ONE.1,
        one.len(),
        two.len()
    );
    http.write(request.as_bytes());
    one_success(&http.answer());
}

#[test]
fn h011_two_requests_on_one_connection_both_succeed() {
    let (away, key) = (away(), key_header());
    let headers = [("Authorization", key.as_str()), ("Content-Type", "application/json")];
    let mut http = Http::connect(&away.broker.address("http"));
    let body = json!({ "to": away.token }).to_string();
    let ids = [0, 1].map(|_| one_success(&http.request("POST", "/gcm/send", &headers, body.as_bytes())));
    assert_ne!(ids[0], ids[1]);
}

#[test]
fn h012_a_json_content_type_may_have_parameters() {
    let (away, key) = (away(), key_header());
    let headers = [("Authorization", key.as_str()), ("Content-Type", "application/json; charset=UTF-8")];
    one_success(&post("/gcm/send", &headers, json!({ "to": away.token }).to_string().as_bytes()));
}

#[test]
fn h013_without_a_content_type_the_body_is_plain_text() {
    let (away, key) = (away(), key_header());
    let body = format!("registration_id={}", away.token);
    let answer = post("/gcm/send", &[("Authorization", key.as_str())], body.as_bytes());
    assert!(answer.text().starts_with("id="), "{}", answer.text());
}

#[test]
fn h014_a_json_body_without_a_content_type_has_no_registration() {
    let key = key_header();
    let answer = post("/gcm/send", &[("Authorization", key.as_str())], br#"{"to":"x"}"#);
    assert_eq!((answer.status, answer.text()), (200, "Error=MissingRegistration\n"));
}

#[test]
fn a_body_above_4_mib_gives_413_and_the_broker_goes_on() {
    let key = key_header();
    let mut http = Http::connect(&shared().address("http"));
    let head = format!(
        "POST /gcm/send HTTP/1.1\r\nHost: x\r\nAuthorization: {key}\r\nContent-Type: application/json\r\nContent-Length: 10485760\r\n\r\n"
    );
    http.write(head.as_bytes());
    assert_eq!(http.answer().status, 413);
    one_success(&away().send_with(&[]));
}

// ------------------------------------------------------------------------------------------- JSON answers

#[test]
fn h020_the_counts_are_integers_and_results_an_array() {
    let json = away().send_with(&[]).json();
    for key in ["multicast_id", "success", "failure", "canonical_ids"] {
        assert!(json[key].is_u64(), "{json}");
    }
    assert!(json["results"].is_array());
}

#[test]
fn h021_h022_results_come_in_the_request_s_order_and_counts_add_up() {
    let (one, two) = (away(), away());
    let json = one.send(&json!({ "registration_ids": [one.token, "nonsense", two.token, ""] })).json();
    let errors: Vec<_> = json["results"].as_array().unwrap().iter().map(|result| &result["error"]).collect();
    assert_eq!(errors, [&Value::Null, &json!("InvalidRegistration"), &Value::Null, &json!("MissingRegistration")]);
    assert_eq!((json["success"].as_u64(), json["failure"].as_u64()), (Some(2), Some(2)));
}

#[test]
fn h023_a_message_id_is_a_string_without_equals_sign() {
    assert!(!one_success(&away().send_with(&[])).contains('='));
}

#[test]
fn h024_message_ids_differ() {
    let away = away();
    let mut ids = std::collections::BTreeSet::new();
    for _ in 0..3 {
        let json = away.send(&json!({ "registration_ids": [away.token, away.token, away.token] })).json();
        ids.extend(json["results"].as_array().unwrap().iter().map(|result| result["message_id"].to_string()));
    }
    assert_eq!(ids.len(), 9);
}

#[test]
fn h025_a_multicast_id_is_positive_and_exact_in_every_language() {
    let id = away().send_with(&[]).json()["multicast_id"].as_u64().unwrap();
    // Below 2^53: JavaScript reads it without loss (decisions.md).
    assert!(id > 0 && id < 1 << 53, "{id}");
}

#[test]
fn h026_h027_a_result_has_an_id_or_an_error_and_no_null() {
    let away = away();
    let json = away.send(&json!({ "registration_ids": [away.token, "nonsense"] })).json();
    for result in json["results"].as_array().unwrap() {
        let keys: Vec<_> = result.as_object().unwrap().keys().collect();
        assert!(keys == ["message_id"] || keys == ["error"], "{result}");
    }
}

#[test]
fn h028_there_is_no_white_space_before_a_colon() {
    let text = away().send_with(&[]).text().to_owned();
    assert!(!text.contains("\" :") && text.contains("\"multicast_id\":"), "{text}");
}

#[test]
fn h029_h030_h031_json_answers_say_so_are_never_empty_and_ask_for_no_repeat() {
    let away = away();
    for body in [json!({ "to": away.token }), json!({ "to": "nonsense" }), json!({})] {
        let answer = away.send(&body);
        assert!(answer.header("content-type").unwrap().starts_with("application/json"));
        assert!(answer.header("content-length").unwrap().parse::<u64>().unwrap() > 0);
        assert_eq!(answer.header("retry-after"), None);
    }
}

// ------------------------------------------------------------------------------------------- validation

#[test]
fn h040_what_is_not_json_gives_400() {
    let key = key_header();
    let headers = [("Authorization", key.as_str()), ("Content-Type", "application/json")];
    for body in ["", "{", "{\"to\":}", "\u{feff}{}x"] {
        bad_request(&post("/gcm/send", &headers, body.as_bytes()));
    }
    // Nested beyond any reader's stack.
    bad_request(&post("/gcm/send", &headers, "[".repeat(1_000_000).as_bytes()));
}

#[test]
fn h041_json_that_is_no_object_gives_400() {
    for body in [json!([]), json!("x"), json!(7), json!(null)] {
        bad_request(&send_json(&shared().address("http"), ONE.1, &body));
    }
}

#[test]
fn h042_registration_ids_as_a_string_gives_400_in_the_words_that_were_seen() {
    let answer = away().send(&json!({ "registration_ids": "x" }));
    bad_request(&answer);
    assert!(answer.text().contains("\"registration_ids\" field is not a JSON array"), "{}", answer.text());
}

#[test]
fn h043_1000_registration_ids_give_1000_results() {
    let away = away();
    let mut tokens = vec![away.token.clone(); 1_000];
    tokens[500] = "nonsense".to_owned();
    let json = away.send(&json!({ "registration_ids": tokens, "dry_run": true })).json();
    let results = json["results"].as_array().unwrap();
    assert_eq!((results.len(), &results[500]["error"]), (1_000, &json!("InvalidRegistration")));
    assert_eq!(json["success"], 999);
    // And stored: a thousand devices in one request.
    let devices: Vec<_> = (0..10).map(|_| self::away()).collect();
    let tokens: Vec<_> = devices.iter().cycle().take(1_000).map(|device| device.token.clone()).collect();
    assert_eq!(away.send(&json!({ "registration_ids": tokens })).json()["success"], 1_000);
}

#[test]
fn h044_1001_registration_ids_give_400() {
    let away = away();
    bad_request(&away.send(&json!({ "registration_ids": vec![away.token.clone(); 1_001] })));
}

#[test]
fn h045_to_together_with_registration_ids_gives_400() {
    let away = away();
    bad_request(&away.send(&json!({ "to": away.token, "registration_ids": [away.token] })));
}

#[test]
fn h046_h047_no_target_and_an_empty_list_give_missing_registration() {
    one_error(&away().send(&json!({})), "MissingRegistration");
    one_error(&away().send(&json!({ "registration_ids": [] })), "MissingRegistration");
}

#[test]
fn h048_a_malformed_token_gives_invalid_registration() {
    let away = away();
    let mut changed = away.token.clone().into_bytes();
    let at = changed.len() - 40;
    changed[at] = if changed[at] == b'A' { b'B' } else { b'A' };
    let made_up = format!("{}:APA91b{}", "a".repeat(11), "b".repeat(134));
    let padded = format!("{}=", away.token);
    // The four spare bits of the last character must be zero: another spelling of the same bytes is no token.
    let last = away.token.chars().last().unwrap();
    let alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";
    let next = alphabet.chars().nth(alphabet.find(last).unwrap() + 1).unwrap();
    let respelled = format!("{}{next}", &away.token[..away.token.len() - 1]);
    for token in ["x", &String::from_utf8(changed).unwrap(), &made_up, &padded, &respelled, &away.token[1..]] {
        one_error(&away.send(&json!({ "to": token })), "InvalidRegistration");
    }
}

#[test]
fn h049_a_mistyped_topic_gives_invalid_registration() {
    one_error(&away().send(&json!({ "to": "/topicz/x" })), "InvalidRegistration");
}

#[test]
fn h050_a_duplicate_token_gives_two_results_and_two_messages() {
    let away = away();
    let json = away.send(&json!({ "registration_ids": [away.token, away.token] })).json();
    assert_eq!(json["success"], 2);
    let mut mcs = away.identity.connect(away.broker);
    assert_ne!(mcs.message().persistent_id, mcs.message().persistent_id);
}

#[test]
fn h051_h052_a_time_to_live_out_of_range_gives_invalid_ttl() {
    let away = away();
    one_error(&away.send_with(&[("time_to_live", json!(-1))]), "InvalidTtl");
    one_error(&away.send_with(&[("time_to_live", json!(TTL_MAX + 1))]), "InvalidTtl");
}

#[test]
fn h053_a_time_to_live_at_its_bounds_is_accepted() {
    let away = away();
    for ttl in [json!(0), json!(TTL_MAX), json!(600.0)] {
        one_success(&away.send_with(&[("time_to_live", ttl)]));
    }
}

#[test]
fn h054_h055_h056_options_of_a_wrong_type_give_400() {
    let away = away();
    bad_request(&away.send_with(&[("time_to_live", json!("600"))]));
    bad_request(&away.send_with(&[("delay_while_idle", json!("yes"))]));
    bad_request(&away.send_with(&[("dry_run", json!(1))]));
    bad_request(&away.send_with(&[("collapse_key", json!(1))]));
    bad_request(&away.send_with(&[("data", json!("x"))]));
    bad_request(&away.send(&json!({ "to": 7 })));
}

#[test]
fn h057_priority_is_normal_or_high() {
    let away = away();
    for priority in [json!("normal"), json!("high"), json!(5), json!(10)] {
        one_success(&away.send_with(&[("priority", priority)]));
    }
    bad_request(&away.send_with(&[("priority", json!("urgent"))]));
}

#[test]
fn h058_h059_reserved_data_keys_give_invalid_data_key_in_every_result() {
    let away = away();
    for key in ["from", "google.x", "Google", "gcm", "gcm.x", "message_type", "message_id"] {
        let json = away.send(&json!({ "registration_ids": [away.token, away.token], "data": { key: "v" } })).json();
        assert_eq!(json["results"], json!([{ "error": "InvalidDataKey" }, { "error": "InvalidDataKey" }]), "{key}");
    }
}

#[test]
fn h061_h062_data_of_4096_bytes_is_accepted_and_of_4097_is_too_big() {
    let away = away();
    let data = |bytes: usize| json!({ "key": "v".repeat(bytes - 3) });
    let id = one_success(&away.send_with(&[("data", data(4_096))]));
    let json = away.send(&json!({ "registration_ids": [away.token, away.token], "data": data(4_097) })).json();
    assert_eq!(json["results"], json!([{ "error": "MessageTooBig" }, { "error": "MessageTooBig" }]));
    let message = away.receive();
    assert_eq!(message.persistent_id, Some(id));
    assert_eq!(value(&message, "key").unwrap().len(), 4_093);
}

#[test]
fn h063_multi_byte_characters_count_in_bytes() {
    let away = away();
    // 2 bytes each: 2,047 of them and a key of 2 are 4,096.
    one_success(&away.send_with(&[("data", json!({ "kk": "ü".repeat(2_047) }))]));
    one_error(&away.send_with(&[("data", json!({ "kkk": "ü".repeat(2_047) }))]), "MessageTooBig");
}

#[test]
fn h065_an_empty_notification_is_accepted_and_is_none() {
    let away = away();
    one_success(&away.send_with(&[("notification", json!({})), ("data", json!({ "k": "v" }))]));
    let keys: Vec<_> = away.receive().app_data.iter().map(|pair| pair.key.clone()).collect();
    assert_eq!(keys, ["k"]);
}

#[test]
fn h066_unknown_fields_are_ignored() {
    one_success(&away().send_with(&[("fcm_options", json!({ "x": 1 })), ("novelty", json!([1]))]));
}

#[test]
fn h067_h068_values_arrive_as_strings_and_objects_as_json_text() {
    let away = away();
    let data = json!({ "n": 7, "f": 1.5, "b": true, "none": null, "o": { "a": [1, "x"] }, "l": [] });
    one_success(&away.send_with(&[("data", data)]));
    let message = away.receive();
    for (key, expected) in [("n", "7"), ("f", "1.5"), ("b", "true"), ("o", r#"{"a":[1,"x"]}"#), ("l", "[]")] {
        assert_eq!(value(&message, key), Some(expected), "{key}");
    }
    assert_eq!(value(&message, "none"), None);
}

#[test]
fn h070_a_token_of_another_sender_gives_mismatch_sender_id() {
    let away = away();
    one_error(&send_json(&away.broker.address("http"), TWO.1, &json!({ "to": away.token })), "MismatchSenderId");
}

#[test]
fn h071_a_token_of_two_senders_accepts_both_keys() {
    let broker = shared();
    let token = check_in(broker).register(broker, APP, &format!("{},{}", ONE.0, TWO.0));
    for key in [ONE.1, TWO.1] {
        one_success(&send_json(&broker.address("http"), key, &json!({ "to": token })));
    }
}

#[test]
fn h072_h082_an_unregistered_token_gives_not_registered() {
    let away = away();
    let answer = away.identity.register_form(away.broker, &format!("app={APP}&delete=true"));
    assert_eq!(answer.text(), format!("deleted={APP}"));
    one_error(&away.send_with(&[]), "NotRegistered");
    assert_eq!(away.send_form("").text(), "Error=NotRegistered\n");
}

#[test]
fn h073_a_mixed_multicast_has_successes_and_errors_side_by_side() {
    let (good, gone) = (away(), away());
    gone.identity.register_form(gone.broker, &format!("app={APP}&delete=1"));
    let other = check_in(good.broker).register(good.broker, APP, TWO.0);
    let answer = good.send(&json!({ "registration_ids": [gone.token, good.token, other, "x"] }));
    assert_eq!(answer.status, 200);
    let json = answer.json();
    let errors: Vec<_> = json["results"].as_array().unwrap().iter().map(|result| result["error"].as_str()).collect();
    assert_eq!(errors, [Some("NotRegistered"), None, Some("MismatchSenderId"), Some("InvalidRegistration")]);
    assert_eq!((json["success"].as_u64(), json["failure"].as_u64()), (Some(1), Some(3)));
}

#[test]
fn h074_a_dry_run_checks_everything_and_delivers_nothing() {
    let away = away();
    let id = one_success(&away.send_with(&[("dry_run", json!(true)), ("data", json!({ "dry": "1" }))]));
    assert_eq!(id, "fake_message_id");
    one_error(
        &send_json(&away.broker.address("http"), TWO.1, &json!({ "to": away.token, "dry_run": true })),
        "MismatchSenderId",
    );
    one_success(&away.send_with(&[("data", json!({ "wet": "1" }))]));
    let mut mcs = away.identity.connect(away.broker);
    assert_eq!(value(&mcs.message(), "wet"), Some("1"));
    mcs.no_message();
}

#[test]
fn h080_h089_a_plain_text_send_gives_one_line_with_an_end() {
    let away = away();
    let answer = away.send_form("&data.k=v");
    assert!(answer.header("content-type").unwrap().starts_with("text/plain"));
    let text = answer.text();
    assert!(text.starts_with("id=0:") && text.ends_with('\n') && text.lines().count() == 1, "{text:?}");
    assert_eq!(text.matches('=').count(), 1);
    assert_eq!(away.receive().persistent_id.as_deref(), text.trim_end().strip_prefix("id="));
}

#[test]
fn h083_no_registration_id_gives_missing_registration_with_200() {
    let answer = send_form(&shared().address("http"), ONE.1, "data.k=v");
    assert_eq!((answer.status, answer.text()), (200, "Error=MissingRegistration\n"));
}

#[test]
fn h084_to_works_as_the_target() {
    let away = away();
    let answer = send_form(&away.broker.address("http"), ONE.1, &format!("to={}", away.token));
    assert!(answer.text().starts_with("id="), "{}", answer.text());
}

#[test]
fn h085_everything_after_the_first_dot_is_the_key() {
    let away = away();
    away.send_form("&data.a.b=1");
    assert_eq!(value(&away.receive(), "a.b"), Some("1"));
}

#[test]
fn h086_booleans_are_words_or_digits() {
    let away = away();
    for further in ["&delay_while_idle=1", "&delay_while_idle=true", "&delay_while_idle=0", "&dry_run=1"] {
        assert!(away.send_form(further).text().starts_with("id="), "{further}");
    }
}

#[test]
fn h087_a_time_to_live_that_is_no_number_gives_invalid_ttl() {
    let answer = away().send_form("&time_to_live=abc");
    assert_eq!((answer.status, answer.text()), (200, "Error=InvalidTtl\n"));
}

#[test]
fn h088_percent_encoded_utf_8_arrives_decoded() {
    let away = away();
    away.send_form("&data.k=gr%C3%BC%C3%9F+dich%26%3D");
    assert_eq!(value(&away.receive(), "k"), Some("grüß dich&="));
}

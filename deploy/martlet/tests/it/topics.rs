//! Topics: who joins, who gets a message, and the Instance ID API: gcm-http.md sections 8 and 10, device.md "RG".

use std::sync::atomic::{AtomicU32, Ordering};

use serde_json::{Value, json};

use crate::{
    app_server::{Answer, Http, send_json},
    broker::{Broker, ONE, TWO, shared},
    device::{Identity, check_in, value},
};

const APP: &str = "com.example.topics";

/// A topic that no other test uses.
fn topic() -> String {
    static TOPICS: AtomicU32 = AtomicU32::new(0);
    format!("news-{}", TOPICS.fetch_add(1, Ordering::Relaxed))
}

struct Phone {
    identity: Identity,
    token: String,
}

fn phone(broker: &Broker) -> Phone {
    let identity = check_in(broker);
    let token = identity.register(broker, APP, ONE.0);
    Phone { identity, token }
}

fn call(broker: &Broker, method: &str, path: &str, key: &str, body: &str) -> Answer {
    let authorization = format!("key={key}");
    let headers = [("Authorization", &*authorization), ("Content-Type", "application/json")];
    Http::connect(&broker.address("http")).request(method, path, &headers, body.as_bytes())
}

fn subscribe(broker: &Broker, phone: &Phone, topic: &str) {
    let path = format!("/iid/v1/{}/rel/topics/{topic}", phone.token);
    let answer = call(broker, "POST", &path, ONE.1, "");
    assert_eq!((answer.status, answer.text()), (200, "{}"));
}

fn batch(broker: &Broker, what: &str, topic: &str, tokens: &[&str]) -> Answer {
    let body = json!({ "to": format!("/topics/{topic}"), "registration_tokens": tokens }).to_string();
    call(broker, "POST", &format!("/iid/v1:{what}"), ONE.1, &body)
}

fn send(broker: &Broker, body: &Value) -> Answer {
    send_json(&broker.address("http"), ONE.1, body)
}

/// Publishes `{"n": n}`.
fn publish(broker: &Broker, topic: &str, n: u32) -> u64 {
    let answer = send(broker, &json!({ "to": format!("/topics/{topic}"), "data": { "n": n.to_string() } }));
    assert_eq!(answer.status, 200);
    answer.json()["message_id"].as_u64().unwrap_or_else(|| panic!("{}", answer.text()))
}

#[test]
fn h120_h121_a_message_to_a_topic_without_subscribers_is_a_success_with_an_integer_id() {
    let answer = send(shared(), &json!({ "to": format!("/topics/{}", topic()), "data": { "k": "v" } }));
    assert_eq!(answer.status, 200);
    assert!(answer.json()["message_id"].as_u64().unwrap() < 1 << 53);
    assert_eq!(answer.json().as_object().unwrap().len(), 1);
}

#[test]
fn h122_a_bad_topic_name_gives_400() {
    for name in ["", "a b", "a/b", "ä", &"x".repeat(901)] {
        let answer = send(shared(), &json!({ "to": format!("/topics/{name}") }));
        assert_eq!(answer.status, 400, "{name:.20}");
        assert!(!answer.body.is_empty());
    }
    let longest = "x".repeat(900);
    assert_eq!(send(shared(), &json!({ "to": format!("/topics/{longest}") })).status, 200);
}

#[test]
fn h064_topic_data_of_2048_bytes_is_accepted_and_of_2049_is_too_big() {
    let sized = |bytes: usize| {
        let body = json!({ "to": format!("/topics/{}", topic()), "data": { "k": "v".repeat(bytes - 1) } });
        send(shared(), &body).json()
    };
    assert!(sized(2_048)["message_id"].is_u64());
    assert_eq!(sized(2_049), json!({ "error": "MessageTooBig" }));
}

#[test]
fn h123_h130_a_subscribed_device_gets_the_message_from_the_topic_and_another_does_not() {
    let (broker, topic) = (shared(), topic());
    let (in_it, away, outside) = (phone(broker), phone(broker), phone(broker));
    subscribe(broker, &in_it, &topic);
    subscribe(broker, &away, &topic);
    let (mut in_it, mut outside) = (in_it.identity.connect(broker), outside.identity.connect(broker));
    publish(broker, &topic, 1);
    let message = in_it.message();
    assert_eq!((&*message.from, &*message.category), (&*format!("/topics/{topic}"), APP));
    assert_eq!(value(&message, "n"), Some("1"));
    assert!(message.persistent_id.is_some());
    // It waits for who is away, with its body.
    publish(broker, &topic, 2);
    let mut away = away.identity.connect(broker);
    assert_eq!(value(&away.message(), "n"), Some("1"));
    assert_eq!(value(&away.message(), "n"), Some("2"));
    away.ack_all();
    outside.no_message();
}

#[test]
fn h124_a_condition_selects_the_right_devices_each_once() {
    let (broker, a, b, c) = (shared(), topic(), topic(), topic());
    let phones: Vec<Phone> = (0..4).map(|_| phone(broker)).collect();
    for (phone, topics) in phones.iter().zip([vec![&a, &b, &c], vec![&a, &c], vec![&a], vec![&b, &c]]) {
        topics.into_iter().for_each(|topic| subscribe(broker, phone, topic));
    }
    let mut lines: Vec<_> = phones.iter().map(|phone| phone.identity.connect(broker)).collect();
    let condition = format!("'{a}' in topics && ('{b}' in topics || '{c}' in topics)");
    let answer = send(broker, &json!({ "condition": condition, "data": { "n": "1" } }));
    assert!(answer.json()["message_id"].is_u64(), "{}", answer.text());
    for line in &mut lines[..2] {
        assert_eq!(value(&line.message(), "n"), Some("1"));
    }
    lines.iter_mut().for_each(|line| line.no_message());
}

#[test]
fn h125_six_topics_or_bad_syntax_give_400() {
    let six = ["'t' in topics"; 6].join(" || ");
    for condition in [&*six, "t in topics", "'t' in topics &&", "('t' in topics", "", &"(".repeat(4_000)] {
        let answer = send(shared(), &json!({ "condition": condition }));
        assert_eq!(answer.status, 400, "{condition:.30}");
    }
    let both = json!({ "condition": "'t' in topics", "to": "/topics/t" });
    assert_eq!(send(shared(), &both).status, 400);
}

#[test]
fn h126_h127_batch_add_answers_each_token_in_order() {
    let (broker, topic) = (shared(), topic());
    let (one, gone) = (phone(broker), phone(broker));
    gone.identity.register_form(broker, &format!("app={APP}&delete=true"));
    let foreign = check_in(broker).register(broker, APP, TWO.0);
    let answer = batch(broker, "batchAdd", &topic, &[&one.token, "nonsense", &gone.token, &foreign, &one.token]);
    assert_eq!(answer.status, 200);
    let error = |word: &str| json!({ "error": word });
    let expected = [json!({}), error("NOT_FOUND"), error("NOT_FOUND"), error("INVALID_ARGUMENT"), json!({})];
    assert_eq!(answer.json(), json!({ "results": expected }));
    let mut line = one.identity.connect(broker);
    publish(broker, &topic, 1);
    assert_eq!(value(&line.message(), "n"), Some("1"));
    line.no_message();
}

#[test]
fn h128_batches_of_none_and_of_1001_tokens_or_of_a_bad_topic_give_400_with_an_error() {
    let broker = shared();
    let one = phone(broker);
    let many = vec![&*one.token; 1_001];
    for answer in [
        batch(broker, "batchAdd", "x", &many),
        batch(broker, "batchRemove", "x", &[]),
        batch(broker, "batchAdd", "a b", &[&one.token]),
        call(broker, "POST", "/iid/v1:batchAdd", ONE.1, "["),
        call(broker, "POST", &format!("/iid/v1/{}/rel/topics/a@b", one.token), ONE.1, ""),
    ] {
        assert_eq!(answer.status, 400);
        assert!(answer.json()["error"].is_string());
    }
    // A thousand times the same one is no mistake.
    let answer = batch(broker, "batchAdd", &topic(), &many[..1_000]);
    assert_eq!(answer.json()["results"].as_array().unwrap().len(), 1_000);
}

#[test]
fn h129_batch_remove_and_delete_end_delivery() {
    let (broker, topic) = (shared(), topic());
    let (one, two) = (phone(broker), phone(broker));
    subscribe(broker, &one, &topic);
    subscribe(broker, &two, &topic);
    assert_eq!(batch(broker, "batchRemove", &topic, &[&one.token]).json(), json!({ "results": [{}] }));
    let path = format!("/iid/v1/{}/rel/topics/{topic}", two.token);
    assert_eq!(call(broker, "DELETE", &path, ONE.1, "").status, 200);
    let mut lines = [one.identity.connect(broker), two.identity.connect(broker)];
    publish(broker, &topic, 1);
    lines.iter_mut().for_each(|line| line.no_message());
}

#[test]
fn h131_h132_h133_what_a_token_is_its_topics_with_details_and_404_for_an_unknown_one() {
    let (broker, topic) = (shared(), topic());
    let one = phone(broker);
    subscribe(broker, &one, &topic);
    let escaped = one.token.replace(':', "%3A");
    let plain = call(broker, "GET", &format!("/iid/info/{}", one.token), ONE.1, "");
    assert_eq!(plain.status, 200);
    let facts = plain.json();
    assert_eq!(
        (&facts["application"], &facts["authorizedEntity"], &facts["platform"]),
        (&json!(APP), &json!(ONE.0), &json!("ANDROID"))
    );
    assert!(facts.get("rel").is_none());
    let detailed = call(broker, "GET", &format!("/iid/info/{escaped}?details=true"), ONE.1, "").json();
    let added = detailed["rel"]["topics"][&topic]["addDate"].as_str().unwrap();
    assert!(added.len() == 10 && added.starts_with("20"), "{added}");
    for unknown in ["nonsense", &format!("{}x", one.token)] {
        let answer = call(broker, "GET", &format!("/iid/info/{unknown}"), ONE.1, "");
        assert_eq!(answer.status, 404);
        assert!(answer.json()["error"].is_string());
    }
    assert_eq!(call(broker, "GET", &format!("/iid/info/{}", one.token), TWO.1, "").status, 403);
    assert_eq!(call(broker, "POST", &format!("/iid/info/{}", one.token), ONE.1, "").status, 405);
}

#[test]
fn h134_iid_calls_with_a_bad_key_give_401() {
    let broker = shared();
    for (method, path) in [
        ("GET", "/iid/info/x"),
        ("POST", "/iid/v1/x/rel/topics/y"),
        ("DELETE", "/iid/v1/x/rel/topics/y"),
        ("POST", "/iid/v1:batchAdd"),
        ("POST", "/iid/v1:batchRemove"),
    ] {
        let answer = call(broker, method, path, "wrong", "");
        assert_eq!(answer.status, 401, "{path}");
        assert!(answer.text().contains("Unauthorized"));
    }
}

#[test]
fn rg_17_a_device_subscribes_itself_by_its_token_and_no_other_device_can() {
    let (broker, topic) = (shared(), topic());
    let one = phone(broker);
    let form = format!("app={APP}&sender={}&scope=/topics/{topic}&X-gcm.topic=/topics/{topic}", one.token);
    let answer = one.identity.register_form(broker, &form);
    assert_eq!(answer.text(), format!("token={}", one.token));
    let mut line = one.identity.connect(broker);
    publish(broker, &topic, 1);
    assert_eq!(&*line.message().from, &*format!("/topics/{topic}"));
    let other = check_in(broker);
    assert_eq!(other.register_form(broker, &form).text(), "Error=INVALID_SENDER");
}

#[test]
fn rg_18_delete_unsubscribes_and_a_bad_topic_name_is_invalid_parameters() {
    let (broker, topic) = (shared(), topic());
    let one = phone(broker);
    subscribe(broker, &one, &topic);
    let form = format!("app={APP}&sender={}&scope=/topics/{topic}&delete=true", one.token);
    assert_eq!(one.identity.register_form(broker, &form).text(), format!("token={}", one.token));
    let mut line = one.identity.connect(broker);
    publish(broker, &topic, 1);
    line.no_message();
    for bad in ["scope=/topics/", "scope=/topics/a%20b", "X-gcm.topic=x"] {
        let form = format!("app={APP}&sender={}&{bad}", one.token);
        assert_eq!(one.identity.register_form(broker, &form).text(), "Error=INVALID_PARAMETERS", "{bad}");
    }
}

#[test]
fn options_hold_for_topics_too() {
    let (broker, topic) = (shared(), topic());
    let one = phone(broker);
    subscribe(broker, &one, &topic);
    let to = format!("/topics/{topic}");
    let mut line = one.identity.connect(broker);
    let dry = send(broker, &json!({ "to": to, "dry_run": true, "data": { "n": "0" } }));
    assert!(dry.json()["message_id"].is_u64());
    let other = send(broker, &json!({ "to": to, "restricted_package_name": "another.app", "data": { "n": "1" } }));
    assert!(other.json()["message_id"].is_u64());
    line.no_message();
    assert_eq!(send(broker, &json!({ "to": to, "time_to_live": -1 })).json(), json!({ "error": "InvalidTtl" }));
    assert_eq!(
        send(broker, &json!({ "to": to, "data": { "from": "x" } })).json(),
        json!({ "error": "InvalidDataKey" })
    );
    let now = send(broker, &json!({ "to": to, "time_to_live": 0, "collapse_key": "c", "data": { "n": "2" } }));
    assert!(now.json()["message_id"].is_u64());
    let message = line.message();
    assert_eq!((value(&message, "n"), message.token.as_deref()), (Some("2"), Some("c")));
}

#[test]
fn promise_1_a_message_to_a_topic_survives_kill_9_at_once_and_arrives_once() {
    let mut broker = Broker::start();
    let phones: Vec<Phone> = (0..20).map(|_| phone(&broker)).collect();
    let tokens: Vec<&str> = phones.iter().map(|phone| &*phone.token).collect();
    batch(&broker, "batchAdd", "all", &tokens);
    publish(&broker, "all", 1);
    broker.kill();
    broker.restart();
    let mut lines: Vec<_> = phones.iter().map(|phone| phone.identity.connect(&broker)).collect();
    for line in &mut lines {
        assert_eq!(value(&line.message(), "n"), Some("1"));
        line.ack_all();
    }
    for line in &mut lines {
        line.no_message();
    }
}

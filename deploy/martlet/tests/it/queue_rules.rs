//! What waits for a device that is away, and what of it is dropped on the way: gcm-http.md section 6; device.md 9.2 and 9.5.

use martlet_proto::device::mcs::DataMessageStanza;
use serde_json::{Value, json};

use crate::{
    app_server::{send_form, send_json},
    broker::{Broker, ONE, TWO, shared},
    device::{Identity, check_in, value},
};

const APP: &str = "com.example.app";
const OTHER_APP: &str = "com.example.other";

/// Sends `data` with options to a token; the message id.
fn send(broker: &Broker, key: &str, token: &str, data: &Value, options: &Value) -> String {
    let json = sent(broker, key, token, data, options);
    json["results"][0]["message_id"].as_str().unwrap_or_else(|| panic!("{json}")).to_owned()
}

/// The same; the whole answer.
fn sent(broker: &Broker, key: &str, token: &str, data: &Value, options: &Value) -> Value {
    let mut body = json!({ "to": token, "data": data });
    body.as_object_mut().unwrap().extend(options.as_object().unwrap().clone());
    send_json(&broker.address("http"), key, &body).json()
}

/// Sends number `n` with a collapse key.
fn send_key(broker: &Broker, token: &str, key: &str, n: u32) -> String {
    send(broker, ONE.1, token, &json!({ "n": n }), &json!({ "collapse_key": key }))
}

/// Connects; what had waited, which is `count` messages and not one more, acknowledged.
fn arrived(broker: &Broker, identity: &Identity, count: usize) -> Vec<DataMessageStanza> {
    let mut mcs = identity.connect(broker);
    let messages = (0..count).map(|_| mcs.message()).collect();
    mcs.no_message();
    mcs.ack_all();
    messages
}

fn numbers(messages: &[DataMessageStanza]) -> Vec<&str> {
    messages.iter().map(|message| value(message, "n").unwrap()).collect()
}

#[test]
fn h101_dl_14_of_two_waiting_messages_with_one_collapse_key_only_the_later_arrives() {
    let (broker, phone) = (shared(), check_in(shared()));
    let token = phone.register(broker, APP, ONE.0);
    let first = send_key(broker, &token, "score", 1);
    let second = send_key(broker, &token, "score", 2);
    assert_ne!(first, second);
    let messages = arrived(broker, &phone, 1);
    assert_eq!(numbers(&messages), ["2"]);
    assert_eq!((messages[0].token.as_deref(), messages[0].persistent_id.as_deref()), (Some("score"), Some(&*second)));
}

#[test]
fn h101_a_message_that_was_written_and_not_acked_does_not_come_again_once_another_took_its_place() {
    let (broker, phone) = (shared(), check_in(shared()));
    let token = phone.register(broker, APP, ONE.0);
    send_key(broker, &token, "score", 1);
    assert_eq!(value(&phone.connect(broker).message(), "n"), Some("1"), "never acknowledged");
    send_key(broker, &token, "score", 2);
    assert_eq!(numbers(&arrived(broker, &phone, 1)), ["2"]);
}

#[test]
fn h102_four_collapse_keys_wait_together() {
    let (broker, phone) = (shared(), check_in(shared()));
    let token = phone.register(broker, APP, ONE.0);
    for (n, key) in (1..).zip(["a", "b", "c", "d"]) {
        send_key(broker, &token, key, n);
    }
    assert_eq!(numbers(&arrived(broker, &phone, 4)), ["1", "2", "3", "4"]);
}

#[test]
fn h103_of_five_collapse_keys_exactly_four_arrive_without_the_oldest() {
    let (broker, phone) = (shared(), check_in(shared()));
    let token = phone.register(broker, APP, ONE.0);
    for (n, key) in (1..).zip(["a", "b", "c", "d", "e"]) {
        send_key(broker, &token, key, n);
    }
    assert_eq!(numbers(&arrived(broker, &phone, 4)), ["2", "3", "4", "5"]);
}

#[test]
fn h104_collapse_keys_of_two_applications_and_of_two_senders_do_not_affect_each_other() {
    let (broker, phone) = (shared(), check_in(shared()));
    let token = phone.register(broker, APP, &format!("{},{}", ONE.0, TWO.0));
    let other = phone.register(broker, OTHER_APP, ONE.0);
    for (n, key) in (1..).zip(["a", "b", "c", "d"]) {
        send_key(broker, &token, key, n);
        send_key(broker, &other, key, n + 10);
        send(broker, TWO.1, &token, &json!({ "n": n + 20 }), &json!({ "collapse_key": key }));
    }
    let messages = arrived(broker, &phone, 12);
    let of = |from: &str, app: &str| -> Vec<DataMessageStanza> {
        messages.iter().filter(|one| one.from == from && one.category == app).cloned().collect()
    };
    assert_eq!(numbers(&of(ONE.0, APP)), ["1", "2", "3", "4"]);
    assert_eq!(numbers(&of(ONE.0, OTHER_APP)), ["11", "12", "13", "14"]);
    assert_eq!(numbers(&of(TWO.0, APP)), ["21", "22", "23", "24"]);
}

#[test]
fn h108_dl_15_over_the_limit_one_notice_stands_for_all_but_the_collapsible_ones() {
    let (broker, phone) = (shared(), check_in(shared()));
    let token = phone.register(broker, APP, ONE.0);
    send_key(broker, &token, "score", 1);
    let body = json!({ "registration_ids": vec![&token; 101], "data": { "n": 0 } });
    assert_eq!(send_json(&broker.address("http"), ONE.1, &body).json()["success"], 101);
    let messages = arrived(broker, &phone, 2);
    assert_eq!(value(&messages[0], "n"), Some("1"));
    let notice = &messages[1];
    assert_eq!(value(notice, "message_type"), Some("deleted_messages"));
    assert_eq!(value(notice, "total_deleted"), Some("101"));
    assert_eq!(notice.app_data.len(), 2, "no user data: {notice:?}");
}

#[test]
fn h060_dl_16_a_key_named_as_an_option_arrives_and_keys_of_the_service_cannot_be_written() {
    let (broker, phone) = (shared(), check_in(shared()));
    let token = phone.register(broker, APP, ONE.0);
    for key in ["from", "message_type", "message_id", "google.sent_time", "GOOGLE.x", "googlex", "gcm", "gcm.n.e"] {
        let json = sent(broker, ONE.1, &token, &json!({ key: "x" }), &json!({}));
        assert_eq!(json["results"][0]["error"], "InvalidDataKey", "{key}");
    }
    let data = json!({ "collapse_key": "mine", "priority": "mine", "time_to_live": "mine", "From": "mine" });
    send(broker, ONE.1, &token, &data, &json!({ "collapse_key": "theirs", "time_to_live": 60 }));
    let message = arrived(broker, &phone, 1).pop().unwrap();
    for key in ["collapse_key", "priority", "time_to_live", "From"] {
        assert_eq!(value(&message, key), Some("mine"), "{key}");
    }
    // What the service sets has a field of its own, which clients take over a key of that name.
    assert_eq!((message.token.as_deref(), message.ttl, &*message.from), (Some("theirs"), Some(60), ONE.0));
}

#[test]
fn dl_17_a_notification_arrives_as_fields_that_old_and_new_libraries_read() {
    let (broker, phone) = (shared(), check_in(shared()));
    let token = phone.register(broker, APP, ONE.0);
    let notification = json!({
        "title": "Goal", "body": "2:1", "icon": "ball", "sound": "default", "badge": 3, "tag": "match", "color": "#ff0000",
        "click_action": "OPEN", "body_loc_key": "k", "body_loc_args": ["a", 1], "title_loc_key": "t",
        "title_loc_args": "[\"b\"]", "android_channel_id": "scores",
    });
    send(broker, ONE.1, &token, &json!({ "n": 7 }), &json!({ "notification": notification }));
    send(broker, ONE.1, &token, &json!({ "n": 8 }), &json!({ "notification": {} }));
    let messages = arrived(broker, &phone, 2);
    let shown = &messages[0];
    assert_eq!((value(shown, "n"), value(shown, "gcm.n.e")), (Some("7"), Some("1")));
    for (key, text) in [
        ("title", "Goal"),
        ("body", "2:1"),
        ("icon", "ball"),
        ("sound", "default"),
        ("badge", "3"),
        ("tag", "match"),
        ("color", "#ff0000"),
        ("click_action", "OPEN"),
        ("body_loc_key", "k"),
        ("body_loc_args", r#"["a",1]"#),
        ("title_loc_key", "t"),
        ("title_loc_args", r#"["b"]"#),
        ("android_channel_id", "scores"),
    ] {
        assert_eq!(value(shown, &format!("gcm.notification.{key}")), Some(text), "{key}");
    }
    assert_eq!(messages[1].app_data.len(), 1, "an empty notification is none");
}

#[test]
fn h069_a_message_is_restricted_to_the_application_of_its_package_name() {
    let (broker, phone) = (shared(), check_in(shared()));
    let token = phone.register(broker, APP, ONE.0);
    let json = sent(broker, ONE.1, &token, &json!({ "n": 1 }), &json!({ "restricted_package_name": OTHER_APP }));
    assert_eq!(json["results"][0]["error"], "InvalidPackageName");
    let form = format!("registration_id={token}&data.n=1&restricted_package_name={OTHER_APP}");
    assert_eq!(send_form(&broker.address("http"), ONE.1, &form).text(), "Error=InvalidPackageName\n");
    send(broker, ONE.1, &token, &json!({ "n": 2 }), &json!({ "restricted_package_name": APP }));
    assert_eq!(numbers(&arrived(broker, &phone, 1)), ["2"]);
}

#[test]
fn h113_messages_that_may_wait_for_an_active_device_arrive_on_a_fresh_connection() {
    let (broker, phone) = (shared(), check_in(shared()));
    let token = phone.register(broker, APP, ONE.0);
    let options = json!({ "delay_while_idle": true });
    send(broker, ONE.1, &token, &json!({ "n": 1 }), &options);
    let form = format!("registration_id={token}&data.n=2&delay_while_idle=1");
    assert!(send_form(&broker.address("http"), ONE.1, &form).text().starts_with("id="));
    assert_eq!(numbers(&arrived(broker, &phone, 2)), ["1", "2"]);
}

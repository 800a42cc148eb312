//! Who sends too much is told so, in GCM's words: gcm-http.md sections 6.6, 7, 8.2 and 12. On the built executable.

use serde_json::{Value, json};

use crate::{
    app_server::{Answer, send_form, send_json},
    broker::{Broker, ONE, TWO, text},
    device::{check_in, value},
    hostile::{APP, accepted, broker_with, config_file, limits},
};

fn send(broker: &Broker, body: &Value) -> Answer {
    send_json(&broker.address("http"), ONE.1, body)
}

/// The only result of a send.
fn result(broker: &Broker, body: &Value) -> Value {
    let answer = send(broker, body);
    // PyFCM repeats whatever carries the header.
    assert_eq!((answer.status, answer.header("retry-after")), (200, None));
    answer.json()["results"][0].clone()
}

#[test]
fn above_a_devices_rate_a_send_is_answered_device_message_rate_exceeded_and_time_to_live_0_never_is() {
    // Of three an hour one comes back in twenty minutes: the test is over by then.
    let config = config_file("[shard]\ndevice_messages_per_hour_max = 3\n");
    let mut broker = Broker::start_with(&["--config", text(config.path())]);
    let (phone, other) = (check_in(&broker), check_in(&broker));
    let (token, app) = (phone.register(&broker, APP, ONE.0), phone.register(&broker, "com.example.two", ONE.0));
    let message = |n: u32| json!({ "to": token, "data": { "n": n.to_string() } });
    let batch = json!({ "registration_ids": [&token, &app], "data": { "n": "1" } });
    assert_eq!(send(&broker, &batch).json()["success"], 2);
    accepted(&send(&broker, &message(2)));
    let too_often = json!({ "error": "DeviceMessageRateExceeded" });
    assert_eq!(result(&broker, &message(3)), too_often);
    assert_eq!(result(&broker, &json!({ "to": app })), too_often, "it is the device's");
    let form = send_form(&broker.address("http"), ONE.1, &format!("registration_id={token}&data.n=3"));
    assert_eq!((form.status, form.text()), (200, "Error=DeviceMessageRateExceeded\n"));
    assert_eq!(broker.metric("martlet_node_rate_refusals_total{limit=\"Device\"}"), 3.0);

    // What is wrong with the target is told first.
    let foreign = send_json(&broker.address("http"), TWO.1, &message(3)).json();
    assert_eq!(foreign["results"][0]["error"], "MismatchSenderId");
    let restricted = json!({ "to": token, "restricted_package_name": "com.example.other" });
    assert_eq!(result(&broker, &restricted)["error"], "InvalidPackageName");
    // Another device has its own, and each entry of a multicast is told by itself.
    let other_token = other.register(&broker, APP, ONE.0);
    let both = send(&broker, &json!({ "registration_ids": [&token, &other_token] })).json();
    assert_eq!((&both["success"], &both["failure"]), (&json!(1), &json!(1)));
    assert_eq!(both["results"][0], too_often);

    let mut line = phone.connect(&broker);
    assert_eq!([1, 2, 3].map(|_| value(&line.message(), "n").unwrap().to_owned()), ["1", "1", "2"]);
    line.ack_all();
    accepted(&send(&broker, &json!({ "to": token, "time_to_live": 0, "data": { "n": "now" } })));
    assert_eq!(value(&line.message(), "n"), Some("now"));
    line.no_message();

    // Leaders count in memory.
    broker.kill();
    broker.restart();
    accepted(&send(&broker, &message(4)));
    assert_eq!(value(&phone.connect(&broker).message(), "n"), Some("4"));
}

#[test]
fn above_a_topics_rate_a_send_is_answered_topics_message_rate_exceeded() {
    let broker = broker_with("[shard]\ntopic_messages_per_minute_max = 1\n");
    let to = |topic: &str| json!({ "to": format!("/topics/{topic}"), "data": { "k": "v" } });
    assert!(send(&broker, &to("news")).json()["message_id"].is_u64());
    let refused = send(&broker, &to("news"));
    assert_eq!((refused.status, refused.header("retry-after")), (200, None));
    assert_eq!(refused.json(), json!({ "error": "TopicsMessageRateExceeded" }));
    assert_eq!(broker.metric("martlet_node_rate_refusals_total{limit=\"Topic\"}"), 1.0);
    assert!(send(&broker, &to("sports")).json()["message_id"].is_u64());
    let of_another = send_json(&broker.address("http"), TWO.1, &to("news"));
    assert!(of_another.json()["message_id"].is_u64(), "{}", of_another.text());
}

#[test]
fn h161_a_project_that_sends_too_much_gets_503_with_whole_seconds_and_nothing_of_it_is_delivered() {
    let broker = broker_with("[http]\nproject_messages_per_second_max = 1\nproject_messages_burst = 5\n");
    let phone = check_in(&broker);
    let token = phone.register(&broker, APP, &format!("{},{}", ONE.0, TWO.0));
    let mut line = phone.connect(&broker);
    let many = json!({ "registration_ids": vec![&token; 90], "data": { "n": "1" } });
    let sent = send(&broker, &many);
    assert_eq!((sent.status, &sent.json()["success"]), (200, &json!(90)), "larger than the burst");
    let body = json!({ "to": token, "data": { "n": "refused" } });
    let form = format!("registration_id={token}&data.n=refused");
    let topic = json!({ "to": "/topics/news", "data": { "n": "refused" } });
    let http = broker.address("http");
    for refused in [send(&broker, &body), send(&broker, &topic), send_form(&http, ONE.1, &form)] {
        assert_eq!(refused.status, 503, "{}", refused.text());
        let wait: u32 = refused.header("retry-after").unwrap().parse().unwrap();
        assert!((1..=86).contains(&wait), "{wait} s");
        assert!(!refused.body.is_empty());
    }
    assert_eq!(limits(&broker, "Project"), 3.0);
    assert_eq!(send_json(&http, "no such key", &body).status, 401);
    // Another project is served, and its message comes behind those that passed.
    accepted(&send_json(&http, TWO.1, &json!({ "to": token, "data": { "n": "2" } })));
    for number in 0..91 {
        let expected = if number < 90 { "1" } else { "2" };
        assert_eq!(value(&line.message(), "n"), Some(expected));
    }
    line.no_message();
}

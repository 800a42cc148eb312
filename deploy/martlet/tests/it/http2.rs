//! HTTP/2 by ALPN: a client library asks the same as over HTTP/1.1, and clients that mean harm meet bounds.

use std::{
    path::Path,
    process::Command,
    thread,
    time::{Duration, Instant},
};

use serde_json::{Value, json};

use crate::{
    app_server::send_json,
    broker::{Broker, ONE, shared},
    clients::{Script, last_line, pip},
    device::{PATIENCE, check_in, value},
};

const APP: &str = "com.example.app";
/// Requests at once over one connection: more than it may have open.
const AT_ONCE: usize = 250;

fn python(dir: &Path, script: &str) -> Command {
    let mut command = Command::new(dir.join("venv/bin/python"));
    command.arg(dir.join(script));
    command
}

/// A client of `hostile.py`.
fn hostile(broker: &Broker, what: &str, token: &str) -> Command {
    let mut command = python(&pip("http2"), "hostile.py");
    command.args([what, &broker.address("https")]).arg(broker.ca_file()).args([ONE.1, token]);
    command
}

/// What becomes of a client of `hostile.py` that sends nothing whole.
fn met(broker: &Broker, what: &str) -> Value {
    last_line(&mut hostile(broker, what, "nobody"))
}

/// Asserts that app servers and devices are served, over HTTP/1.1 and beside what is under way, and that nothing has panicked.
fn others_are_served(broker: &Broker) {
    let identity = check_in(broker);
    let token = identity.register(broker, APP, ONE.0);
    let mut mcs = identity.connect(broker);
    let answer = send_json(&broker.address("http"), ONE.1, &json!({ "to": token, "data": { "k": "v" } }));
    assert_eq!(answer.json()["success"], 1);
    assert_eq!(value(&mcs.message(), "k"), Some("v"));
    let log = broker.log_text();
    assert!(!log.contains("panicked at"), "{log}");
}

/// What differs from one answer to the next: ids.
fn without_ids(body: &str) -> Value {
    let Ok(mut json) = serde_json::from_str::<Value>(body) else {
        let line = body.split_once("id=").map_or(body, |_| "id=");
        return json!(line);
    };
    if let Some(fields) = json.as_object_mut() {
        fields.remove("multicast_id");
    }
    for result in json["results"].as_array_mut().into_iter().flatten() {
        if let Some(id) = result.get_mut("message_id") {
            *id = json!("an id");
        }
    }
    json
}

#[test]
fn h015_an_http2_client_gets_the_same_answers() {
    let broker = shared();
    let dir = pip("http2");
    let identity = check_in(broker);
    let token = identity.register(broker, APP, ONE.0);
    // Connected: of those that wait for a device that is away there are never more than a hundred.
    let mut mcs = identity.connect(broker);
    let base = format!("https://{}", broker.address("https"));
    let mut command = python(&dir, "send.py");
    command.arg(&base).arg(broker.ca_file()).args([ONE.1, &token, &AT_ONCE.to_string()]);
    let answers = last_line(&mut command);
    let (h2, h1) = (answers["h2"].as_object().unwrap(), answers["h1"].as_object().unwrap());
    assert_eq!(h2.len(), 20, "{answers}");
    for (name, over2) in h2 {
        let over1 = &h1[name];
        assert_eq!(
            (&over2["version"], &over1["version"]),
            (&json!("HTTP/2"), &json!("HTTP/1.1")),
            "{name}: {over2}, {over1}"
        );
        assert_eq!(over2["status"], over1["status"], "{name}: {over2}, {over1}");
        assert_eq!(over2["connection"], Value::Null, "{name}");
        // A head that is not taken is answered by the library, in its own words.
        if over2["status"] == 431 {
            continue;
        }
        assert_eq!((&over2["type"], &over2["allow"]), (&over1["type"], &over1["allow"]), "{name}");
        let [text2, text1] = [over2, over1].map(|answer| answer["body"].as_str().unwrap());
        assert_eq!(without_ids(text2), without_ids(text1), "{name}");
        assert_eq!(over2["length"].as_str().map(str::parse), Some(Ok(text2.len())), "{name}");
    }
    let statuses: Vec<_> =
        h2.iter().map(|(name, answer)| (name.as_str(), answer["status"].as_u64().unwrap())).collect();
    assert_eq!(
        statuses,
        [
            ("one", 200),
            ("many", 200),
            ("thousand", 200),
            ("fcm", 200),
            ("parts", 200),
            ("plain", 200),
            ("plain_error", 200),
            ("no_type", 200),
            ("dry", 200),
            ("bad_ttl", 200),
            ("bad_json", 400),
            ("no_key", 401),
            ("wrong_key", 401),
            ("get", 405),
            ("elsewhere", 404),
            ("large", 413),
            ("many_headers", 431),
            ("huge_header", 431),
            ("checkin", 400),
            ("register", 401),
        ]
    );
    assert_eq!(answers["at_once"], json!(vec![1; AT_ONCE]));
    // Each message that was accepted arrives, once.
    let mut arrived: Vec<_> = (0..10 + AT_ONCE).map(|_| value(&mcs.message(), "n").unwrap().to_owned()).collect();
    mcs.no_message();
    assert_eq!(arrived[..10], ["1", "2", "3", "4", "5", "1", "2", "3", "4", "5"]);
    arrived.drain(..10);
    arrived.sort();
    let mut sent: Vec<_> = (0..AT_ONCE).map(|n| format!("at once {n}")).collect();
    sent.sort();
    assert_eq!(arrived, sent);
}

#[test]
fn h015_a_drain_says_goaway_and_answers_what_is_open() {
    let mut broker = Broker::start();
    let identity = check_in(&broker);
    let token = identity.register(&broker, APP, ONE.0);
    let script = Script::start(&mut hostile(&broker, "drain", &token));
    assert_eq!(script.next("open"), true);
    broker.ask_to_end();
    assert_eq!(script.next("goaway"), 0);
    assert_eq!(script.next("answered"), true);
    assert!(broker.ended().success());
}

#[test]
fn h015_promise_7_requests_taken_back_without_end_close_their_connection_and_are_counted() {
    let broker = shared();
    let limits = || broker.metric("martlet_gateway_limits_reached_total{limit=\"Resets\"}");
    let rapid = met(broker, "reset");
    assert_eq!(rapid["ended"], true, "{rapid}");
    assert!(rapid["sent"].as_u64() < Some(20_000), "{rapid}");
    let before = limits();
    let later = met(broker, "reset-later");
    assert_eq!(later["ended"], true, "{later}");
    assert!(later["sent"].as_u64() < Some(2_000), "{later}");
    // Where the broker's task of the connection ends, which is after its client has seen it close.
    let until = Instant::now() + PATIENCE;
    while limits() <= before {
        assert!(Instant::now() < until, "not counted");
        thread::sleep(Duration::from_millis(20));
    }
    others_are_served(broker);
}

#[test]
fn h015_promise_7_endless_heads_garbage_and_bodies_beyond_the_window_close_their_connection() {
    let broker = shared();
    let endless = met(broker, "continuation");
    assert_eq!(endless["ended"], true, "{endless}");
    assert!(endless["bytes"].as_u64() < Some(8 << 20), "{endless}");
    for what in ["preface", "window"] {
        let seen = met(broker, what);
        assert_eq!(seen["ended"], true, "{what}: {seen}");
    }
    others_are_served(broker);
}

#[test]
fn h015_promise_8_more_streams_than_allowed_are_refused_and_the_others_answered() {
    let broker = shared();
    let identity = check_in(broker);
    let token = identity.register(broker, APP, ONE.0);
    let seen = last_line(&mut hostile(broker, "streams", &token));
    assert_eq!((&seen["refused"], &seen["answered"]), (&json!(200), &json!(100)), "{seen}");
}

#[test]
fn h015_promise_7_promise_8_floods_of_settings_and_pings_hold_neither_memory_nor_others() {
    let broker = Broker::start();
    others_are_served(&broker);
    let before = broker.resident_bytes();
    for what in ["settings", "ping"] {
        let begun = Instant::now();
        let mut flood = hostile(&broker, what, "nobody").stdout(std::process::Stdio::null()).spawn().unwrap();
        while flood.try_wait().unwrap().is_none() {
            others_are_served(&broker);
            assert!(begun.elapsed() < Duration::from_secs(120), "{what}");
        }
        let more = broker.resident_bytes().saturating_sub(before);
        assert!(more < 64 << 20, "{what}: {more} bytes more");
    }
}

#[test]
fn h015_silent_clients_and_those_that_do_not_read_end_at_their_timeout() {
    let config = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(config.path(), "[http]\nheader_timeout = \"1s\"\n").unwrap();
    let broker = Broker::start_with(&["--config", config.path().to_str().unwrap()]);
    let seen = met(&broker, "idle");
    assert_eq!(
        (&seen["ended"], &seen["goaway"], &seen["mute_ended"]),
        (&json!(true), &json!(0), &json!(true)),
        "{seen}"
    );
    assert!(seen["after"].as_f64() < Some(20.0), "{seen}");
    let seen = met(&broker, "unread");
    assert_eq!((&seen["ended"], &seen["answered"]), (&json!(true), &json!(true)), "{seen}");
    others_are_served(&broker);
}

//! Published app-server libraries, unmodified and pinned, over TLS against the built executable: all that each can say, what it tells
//! its caller, what the device receives, and with how many requests.
//!
//! Each library has a script in tests/clients that says everything to one [`Stage`]; `clients` installs and runs them.

use std::{process::Command, time::Instant};

use martlet_proto::{device::mcs::DataMessageStanza, mcs::stanza::Stanza};
use serde_json::{Map, Value, json};

use crate::{
    app_server::{Http, send_json},
    broker::{Broker, ONE, TWO},
    clients::{Script, last_line, node, npm, pip, python, requests},
    device::{Identity, Mcs, QUIET, check_in, value},
};

const APP: &str = "com.example.app";
const TOPIC: &str = "news";

/// A broker of its own, so that requests can be counted, and who is there when a library speaks.
struct Stage {
    broker: Broker,
    /// `token` is its registration.
    phone: Identity,
    token: String,
    /// Another device, and its token; both are the group.
    second_phone: Identity,
    second: String,
    /// A device that registered a second time, as another instance: `old` is the former token, `new` the canonical one.
    moved_phone: Identity,
    old: String,
    new: String,
    /// Was unregistered.
    gone: String,
    /// Of the other project.
    foreign: String,
    group: String,
}

impl Stage {
    fn new() -> Self {
        let broker = Broker::start();
        let [phone, second_phone, moved_phone, gone_phone] = [(); 4].map(|()| check_in(&broker));
        let token = phone.register(&broker, APP, ONE.0);
        let second = second_phone.register(&broker, APP, ONE.0);
        let [old, new] = ["eAbCdEfGhIj", "dQw4w9WgXcQ"].map(|iid| {
            let form = format!("app={APP}&sender={}&scope=GCM&appid={iid}", ONE.0);
            moved_phone.register_form(&broker, &form).text().strip_prefix("token=").unwrap().to_owned()
        });
        let gone = gone_phone.register(&broker, APP, ONE.0);
        assert_eq!(gone_phone.register_form(&broker, &format!("app={APP}&delete=true")).status, 200);
        let foreign = check_in(&broker).register(&broker, APP, TWO.0);
        let body = json!({ "operation": "create", "notification_key_name": "g", "registration_ids": [token, second] });
        let made = post(&broker, "/gcm/notification", &body);
        let group = made["notification_key"].as_str().unwrap_or_else(|| panic!("{made}")).to_owned();
        Self { broker, phone, token, second_phone, second, moved_phone, old, new, gone, foreign, group }
    }

    /// Subscribes the phone and the second one, for a library that cannot.
    fn subscribe(&self) {
        let body = json!({ "to": format!("/topics/{TOPIC}"), "registration_tokens": [self.token, self.second] });
        assert_eq!(post(&self.broker, "/iid/v1:batchAdd", &body), json!({ "results": [{}, {}] }));
    }

    /// What a script is told.
    fn told(&self) -> String {
        let told = json!({
            "url": format!("https://{}", self.broker.address("https")), "key": ONE.1, "app": APP, "topic": TOPIC,
            "token": self.token, "second": self.second, "old": self.old, "gone": self.gone, "foreign": self.foreign,
            "group": self.group,
        });
        told.to_string()
    }

    fn node(&self, library: &str, script: &str) -> Command {
        let mut command = node(&self.broker, &npm(library), script);
        command.arg(self.told());
        command
    }

    fn python(&self, library: &str, script: &str) -> Command {
        let mut command = python(&self.broker, &pip(library), script);
        command.arg(self.told());
        command
    }

    /// Requests that the broker has answered: sends, and Instance ID calls of libraries.
    fn counted(&self) -> (f64, f64) {
        (requests(&self.broker, "Send"), requests(&self.broker, "Iid"))
    }
}

/// One call with the key of project one; its answer.
fn post(broker: &Broker, path: &str, body: &Value) -> Value {
    let authorization = format!("key={}", ONE.1);
    let headers = [("Authorization", &*authorization), ("Content-Type", "application/json"), ("project_id", ONE.0)];
    Http::connect(&broker.address("http")).request("POST", path, &headers, body.to_string().as_bytes()).json()
}

/// What an application sees of a message.
fn seen(message: &DataMessageStanza) -> Value {
    let data: Map<String, Value> = message.app_data.iter().map(|pair| (pair.key.clone(), json!(pair.value))).collect();
    assert_eq!(data.len(), message.app_data.len(), "a key twice: {message:?}");
    json!({ "from": message.from, "app": message.category, "collapse_key": message.token, "ttl": message.ttl, "data": data })
}

/// The next messages as applications see them, by their `n` (those without come last): between a topic
/// and others there is no order. Asserts that no more come.
fn all_seen(mcs: &mut Mcs, count: usize) -> Vec<Value> {
    let mut messages: Vec<Value> = (0..count).map(|_| seen(&mcs.message())).collect();
    mcs.no_message();
    messages.sort_by_key(|message| message["data"]["n"].to_string());
    messages
}

/// The values of `n` in messages as [`seen`].
fn numbers(messages: &[Value]) -> Vec<&str> {
    messages.iter().map(|message| message["data"]["n"].as_str().unwrap_or("-")).collect()
}

/// What the script's message number one is on the device: every option that matters to it, data of every type, a notification.
fn first(notification: Value) -> Value {
    let mut data = json!({ "n": "1", "word": "ü", "deep": r#"{"list":[1,true]}"# });
    for (key, value) in notification.as_object().unwrap() {
        data[format!("gcm.notification.{key}")] = value.clone();
    }
    data["gcm.n.e"] = json!("1");
    json!({ "from": ONE.0, "app": APP, "collapse_key": "demo", "ttl": 600, "data": data })
}

/// The errors of an answer's results, in order.
fn errors(answer: &Value) -> Vec<&str> {
    let results = answer["results"].as_array().unwrap_or_else(|| panic!("{answer}"));
    results.iter().map(|result| result["error"].as_str().unwrap_or("")).collect()
}

/// The one error of an answer's only result.
fn one_error(answer: &Value) -> &str {
    match errors(answer)[..] {
        [error] if answer["success"] == 0 && answer["failure"] == 1 => error,
        _ => panic!("{answer}"),
    }
}

/// Asserts success of one.
fn one_success(answer: &Value) {
    assert_eq!((&answer["success"], &answer["failure"]), (&json!(1), &json!(0)), "{answer}");
    assert!(answer["results"][0]["message_id"].is_string(), "{answer}");
}

/// What each of the errors is called that `fcm-node/say.cjs` and `fcm-push/say.cjs` run into one by one.
const ERRORS: [(&str, &str); 8] = [
    ("nobody", "MissingRegistration"),
    ("nonsense", "InvalidRegistration"),
    ("gone", "NotRegistered"),
    ("foreign", "MismatchSenderId"),
    ("package", "InvalidPackageName"),
    ("big", "MessageTooBig"),
    ("key", "InvalidDataKey"),
    ("ttl", "InvalidTtl"),
];

#[test]
fn h163_node_gcm_sends_each_message_once() {
    // Of its own, so that its requests can be counted.
    let broker = &Broker::start();
    let dir = npm("node-gcm");
    let identity = check_in(broker);
    let token = identity.register(broker, "com.example.app", ONE.0);
    let url = format!("https://{}/gcm/send", broker.address("https"));
    let answers = last_line(node(broker, &dir, "send.cjs").args([&url, ONE.1, &token]));
    assert_eq!((&answers["one"]["success"], &answers["alone"]["success"]), (&json!(1), &json!(1)), "{answers}");
    assert_eq!((&answers["many"]["success"], &answers["many"]["failure"]), (&json!(2), &json!(1)), "{answers}");
    assert_eq!(answers["many"]["results"][1]["error"], "InvalidRegistration");
    assert_eq!(answers["refused"], 401);
    let mut mcs = identity.connect(broker);
    assert_eq!(requests(broker, "Send"), 4.0, "one for each call of the library");
    let arrived: Vec<_> = (0..3).map(|_| value(&mcs.message(), "n").unwrap().to_owned()).collect();
    assert_eq!(arrived, ["1", "2", "3"], "of two with one collapse key the later waits");
    mcs.no_message();
}

#[test]
fn h163_python_gcm_and_pyfcm_send_each_message_once() {
    let broker = &Broker::start();
    let dir = pip("python");
    let identity = check_in(broker);
    let token = identity.register(broker, "com.example.app", ONE.0);
    let url = format!("https://{}/gcm/send", broker.address("https"));
    let answers = last_line(python(broker, &dir, "send.py").args([&url, ONE.1, &token]));
    assert!(answers["json"]["success"][&token].is_string(), "{answers}");
    assert_eq!(answers["json_mixed"]["errors"]["InvalidRegistration"], json!(["nonsense"]), "{answers}");
    assert_eq!(answers["plain_error"], "GCMInvalidRegistrationException");
    assert_eq!(answers["refused"], "GCMAuthenticationException");
    assert_eq!((&answers["fcm_single"]["success"], &answers["fcm_multiple"]["success"]), (&json!(1), &json!(2)));
    assert_eq!(answers["fcm_dry"]["success"], 1);
    assert_eq!(requests(broker, "Send"), 8.0, "one for each call of the libraries");
    let mut mcs = identity.connect(broker);
    let arrived: Vec<_> = (0..6).map(|_| value(&mcs.message(), "n").unwrap().to_owned()).collect();
    assert_eq!(arrived, ["1", "2", "3", "4", "5", "5"]);
    mcs.no_message();
}

#[test]
fn h126_h127_h163_fcm_node_says_all_that_it_can_with_one_request_each() {
    let stage = Stage::new();
    let told = last_line(&mut stage.node("fcm-node", "say.cjs"));
    // What failed for some comes as both error and answer.
    for name in ["one", "moved", "dry"] {
        assert!(told[name]["error"].is_null(), "{name}: {told}");
        one_success(&told[name]["answer"]);
    }
    assert_eq!(told["moved"]["answer"]["results"][0]["registration_id"], json!(stage.new));
    assert_eq!(told["many"]["error"], told["many"]["answer"]);
    assert_eq!(errors(&told["many"]["answer"]), ["", "InvalidRegistration", "", "NotRegistered", "MismatchSenderId"]);
    for (name, error) in ERRORS {
        assert_eq!(one_error(&told[name]["error"]), error, "{name}");
        assert!(told[name]["answer"].is_null(), "{name}: {told}");
    }
    assert_eq!(told["refused"], json!({ "error": "NotAuthorizedError", "answer": null }));
    let subscribed = json!({ "error": null, "answer": { "results": [{}, {}, { "error": "NOT_FOUND" }] } });
    assert_eq!(told["subscribed"], subscribed);
    assert_eq!(told["unsubscribed"], json!({ "error": null, "answer": { "results": [{}] } }));
    for name in ["topic", "condition", "after"] {
        assert!(told[name]["error"].is_null() && told[name]["answer"]["message_id"].is_u64(), "{name}: {told}");
    }
    assert_eq!(told["topic_big"], json!({ "error": { "error": "MessageTooBig" }, "answer": null }));
    assert_eq!(told["topic_refused"]["error"]["statusCode"], 401);
    assert_eq!(told["topic_bad"]["error"]["statusCode"], 400);
    let parallel = told["parallel"].as_array().unwrap();
    assert_eq!(parallel.len(), 8);
    parallel.iter().for_each(|each| one_success(&each["answer"]));
    assert_eq!(stage.counted(), (25.0, 4.0), "one for each call of the library");

    let messages = all_seen(&mut stage.phone.connect(&stage.broker), 13);
    let notification = json!({ "title": "Zwölf", "body": "b", "badge": "3", "body_loc_args": r#"["x"]"# });
    assert_eq!(messages[0], first(notification));
    assert_eq!(numbers(&messages), ["1", "2", "4", "5", "6", "7", "7", "7", "7", "7", "7", "7", "7"]);
    assert_eq!((&messages[2]["from"], &messages[2]["ttl"]), (&json!(format!("/topics/{TOPIC}")), &json!(6_000)));
    left_in_time(&mut stage.second_phone.connect(&stage.broker), &["2", "4", "5"], "6");
    assert_eq!(numbers(&all_seen(&mut stage.moved_phone.connect(&stage.broker), 1)), ["3"]);
}

#[test]
fn h163_fcm_push_says_all_that_it_can_with_one_request_each() {
    let stage = Stage::new();
    stage.subscribe();
    let told = last_line(&mut stage.node("fcm-push", "say.cjs"));
    for name in ["one", "moved", "dry", "callback"] {
        one_success(&told[name]["answer"]);
    }
    assert!(told["callback"]["error"].is_null(), "{told}");
    assert_eq!(told["moved"]["answer"]["results"][0]["registration_id"], json!(stage.new));
    // Where one succeeds it resolves; where none does it rejects with the first one's error.
    assert_eq!(errors(&told["many"]["answer"]), ["", "InvalidRegistration", "", "NotRegistered", "MismatchSenderId"]);
    assert_eq!(told["none"], json!({ "error": "NotRegistered" }));
    for (name, error) in ERRORS {
        assert_eq!(told[name], json!({ "error": error }), "{name}");
    }
    assert_eq!(told["refused"], json!({ "error": "NotAuthorizedError" }));
    for name in ["topic", "condition"] {
        assert!(told[name]["answer"]["message_id"].is_u64(), "{name}: {told}");
    }
    assert_eq!(told["topic_big"], json!({ "error": { "error": "MessageTooBig" } }));
    let parallel = told["parallel"].as_array().unwrap();
    assert_eq!(parallel.len(), 8);
    parallel.iter().for_each(|each| one_success(&each["answer"]));
    assert_eq!(stage.counted().0, 26.0, "one for each call of the library");

    let messages = all_seen(&mut stage.phone.connect(&stage.broker), 13);
    let notification = json!({ "title": "Zwölf", "body": "b", "badge": "3", "body_loc_args": r#"["x"]"# });
    assert_eq!(messages[0], first(notification));
    assert_eq!(numbers(&messages), ["1", "2", "4", "5", "6", "7", "7", "7", "7", "7", "7", "7", "7"]);
    assert_eq!((&messages[2]["from"], &messages[2]["ttl"]), (&json!(format!("/topics/{TOPIC}")), &json!(6_000)));
    assert_eq!(numbers(&all_seen(&mut stage.second_phone.connect(&stage.broker), 3)), ["2", "4", "5"]);
    assert_eq!(numbers(&all_seen(&mut stage.moved_phone.connect(&stage.broker), 1)), ["3"]);
}

#[test]
fn fcm_node_and_fcm_push_take_the_answer_of_a_group_for_none_and_send_again() {
    // A defect of theirs: they look for words that the answer of a group does not have (gcm-http.md section 11). fcm-node calls
    // back after four times; fcm-push hears the end of each answer twice, doubles its repetitions, and goes on after it rejected.
    let [node, push] = ["fcm-node", "fcm-push"].map(|library| {
        let stage = Stage::new();
        let script = Script::start(&mut stage.node(library, "group.cjs"));
        (stage, script)
    });
    assert_eq!(node.1.next("told"), json!({ "error": "InvalidServerResponse", "answer": null }));
    assert_eq!(node.0.counted().0, 4.0);
    assert_eq!(push.1.next("told"), json!({ "error": "InvalidServerResponse" }));
    assert!(push.0.counted().0 >= 4.0);
    // Each of the four was a success; here is what it costs.
    for phone in [node.0.phone, node.0.second_phone] {
        assert_eq!(numbers(&all_seen(&mut phone.connect(&node.0.broker), 4)), ["1"; 4]);
    }
}

/// What pushjack tells of ids that were all served: no failure, and nothing of errors.
fn all_served(told: &Value, ids: &[&str]) {
    assert_eq!((&told["successes"], &told["failures"]), (&json!(ids), &json!([])), "{told}");
    assert_eq!((&told["errors"], &told["statuses"]), (&json!([]), &json!([200])), "{told}");
}

#[test]
fn pushjack_says_all_that_it_can_with_one_request_each() {
    let stage = Stage::new();
    stage.subscribe();
    let told = last_line(&mut stage.python("pushjack", "say.py"));
    let (token, second) = (&*stage.token, &*stage.second);
    for (name, ids) in [
        ("one", &[token][..]),
        ("text", &[token]),
        ("moved", &[&stage.old, second]),
        ("dry", &[token]),
        ("now_or_never", &[token]),
    ] {
        all_served(&told[name], ids);
    }
    assert_eq!(told["moved"]["canonical"], json!([[stage.old, stage.new]]));
    assert_eq!(told["many"]["successes"], json!([token, second]));
    assert_eq!(
        told["many"]["errors"],
        json!([
            ["GCMInvalidRegistrationError", "nonsense"],
            ["GCMUnregisteredDeviceError", stage.gone],
            ["GCMMismatchedSenderError", stage.foreign]
        ])
    );
    for (name, error) in [
        ("package", "GCMInvalidPackageNameError"),
        ("big", "GCMMessageTooBigError"),
        ("key", "GCMInvalidDataKeyError"),
        ("ttl", "GCMInvalidTimeToLiveError"),
    ] {
        assert_eq!(told[name]["errors"], json!([[error, token]]), "{name}");
        assert_eq!(told[name]["failures"], json!([token]), "{name}");
    }
    // It has no word for a refusal: the status is all that its caller can see.
    assert_eq!((&told["refused"]["statuses"], &told["refused"]["data"]), (&json!([401]), &json!([])));
    assert!(told["topic"]["data"][0]["message_id"].is_u64(), "{told}");
    assert_eq!(told["group"]["data"], json!([{ "success": 2, "failure": 0 }]));
    assert_eq!(told["thousand"], json!({ "statuses": [200, 200], "successes": [token], "failures": 1_001 }));
    assert_eq!(stage.counted().0, 15.0, "one for each call of the library, two for 1,002 ids");

    let messages = all_seen(&mut stage.phone.connect(&stage.broker), 6);
    assert_eq!(messages[0], first(json!({ "title": "Zwölf", "body": "b", "icon": "i" })));
    assert_eq!(messages[1]["data"], json!({ "n": "2", "gcm.notification.title": "t", "gcm.n.e": "1" }));
    assert_eq!(numbers(&messages[2..5]), ["4", "5", "6"]);
    assert_eq!(messages[5]["data"], json!({ "message": "said" }));
    assert_eq!(numbers(&all_seen(&mut stage.second_phone.connect(&stage.broker), 4)), ["2", "3", "4", "5"]);
    assert_eq!(numbers(&all_seen(&mut stage.moved_phone.connect(&stage.broker), 1)), ["3"]);
}

#[test]
fn django_push_notifications_says_all_that_it_can_and_keeps_its_table() {
    let stage = Stage::new();
    stage.subscribe();
    let told = last_line(&mut stage.python("django", "say.py"));
    let (token, second) = (&*stage.token, &*stage.second);
    for name in ["gcm", "fcm", "fcm_plain", "dry"] {
        one_success(&told[name]);
    }
    for (name, error) in
        [("package", "InvalidPackageName"), ("big", "MessageTooBig"), ("key", "InvalidDataKey"), ("ttl", "InvalidTtl")]
    {
        assert_eq!(one_error(&told[name]["raised"]), error, "{name}");
    }
    // One request for FCM, one for GCM. What is gone or never was becomes inactive, what moved has its new token.
    let bulk = told["bulk"].as_array().unwrap();
    assert_eq!(bulk.len(), 2, "{told}");
    assert_eq!(errors(&bulk[0]), ["", "InvalidRegistration", "", "NotRegistered"]);
    one_success(&bulk[1]);
    assert_eq!(
        told["table"],
        json!([
            [token, "FCM", true],
            ["nonsense", "FCM", false],
            [stage.new, "FCM", true],
            [stage.gone, "FCM", false],
            [second, "GCM", true]
        ])
    );
    assert_eq!((&told["bulk_again"][0]["success"], &told["bulk_again"][0]["failure"]), (&json!(2), &json!(0)));
    assert_eq!(told["bulk_again"][0]["canonical_ids"], 0);
    assert_eq!(errors(&told["foreign"]["raised"]), ["", "MismatchSenderId"]);
    for name in ["topic", "condition"] {
        assert!(told[name]["message_id"].is_u64(), "{name}: {told}");
    }
    for name in ["group_to", "group_key"] {
        assert_eq!(told[name], json!({ "success": 2, "failure": 0 }), "{name}");
    }
    assert_eq!(told["refused"], json!({ "status": 401 }));
    assert_eq!(stage.counted().0, 18.0, "one for each call of the library, two for both kinds of devices");

    let messages = all_seen(&mut stage.phone.connect(&stage.broker), 9);
    let data = json!({ "message": "said", "n": "1", "word": "ü", "deep": r#"{"list":[1,true]}"# });
    let gcm = json!({ "from": ONE.0, "app": APP, "collapse_key": "other", "ttl": 600, "data": data });
    assert_eq!(messages[0], gcm);
    let notification = json!({ "title": "Zwölf", "body": "said", "badge": "3", "body_loc_args": r#"["x"]"# });
    assert_eq!(messages[1], first(notification));
    assert_eq!(messages[2]["data"], json!({ "message": "said", "n": "2", "title": "t" }));
    assert_eq!(numbers(&messages[3..]), ["3", "4", "6", "7", "8", "9"]);
    let messages = all_seen(&mut stage.second_phone.connect(&stage.broker), 7);
    assert_eq!(numbers(&messages), ["3", "4", "5", "6", "7", "8", "9"]);
    assert_eq!(numbers(&all_seen(&mut stage.moved_phone.connect(&stage.broker), 2)), ["3", "4"]);
}

#[test]
fn h120_h122_h163_node_gcm_publishes_in_each_of_its_ways_with_one_request_each() {
    let stage = Stage::new();
    stage.subscribe();
    let told = last_line(&mut stage.node("node-gcm", "topics.cjs"));
    for name in ["text", "array", "topic", "to", "condition", "elsewhere", "dry"] {
        assert!(told[name]["error"].is_null() && told[name]["answer"]["message_id"].is_u64(), "{name}: {told}");
    }
    assert_eq!(told["big"]["answer"], json!({ "error": "MessageTooBig" }));
    for name in ["bad_topic", "bad_condition"] {
        assert_eq!(told[name]["error"], 400, "{name}");
    }
    assert_eq!(stage.counted().0, 10.0, "one for each call of the library");
    for phone in [stage.phone, stage.second_phone] {
        let messages = all_seen(&mut phone.connect(&stage.broker), 5);
        let mut expected = first(json!({ "title": "Zwölf", "body": "b" }));
        expected["from"] = json!(format!("/topics/{TOPIC}"));
        for key in ["word", "deep"] {
            expected["data"].as_object_mut().unwrap().remove(key);
        }
        assert_eq!(messages[0], expected);
        assert_eq!(numbers(&messages), ["1", "2", "3", "4", "5"]);
    }
}

#[test]
fn h128_h129_h132_h163_pyfcm_subscribes_and_asks_and_python_gcm_and_pyfcm_publish_with_one_request_each() {
    let stage = Stage::new();
    let told = last_line(&mut stage.python("python", "topics.py"));
    // It tells nothing of a token that is gone.
    assert_eq!((&told["subscribe"], &told["unsubscribe"]), (&json!(true), &json!(true)));
    for name in ["subscribe_bad", "subscribe_many"] {
        assert_eq!(told[name][0], "InvalidDataError", "{name}");
        assert!(!told[name][1].as_str().unwrap().is_empty(), "{name}");
    }
    assert_eq!(told["subscribe_refused"][0], "FCMError");
    let info = &told["info"];
    assert_eq!((&info["application"], &info["authorizedEntity"]), (&json!(APP), &json!(ONE.0)));
    assert_eq!(info["platform"], "ANDROID");
    assert!(info["rel"]["topics"][TOPIC]["addDate"].is_string(), "{info}");
    assert!(told["info_gone"].is_null(), "{told}");
    assert_eq!(told["clean"], json!([stage.token, stage.second]));
    assert!(told["info_after"].is_object() && told["info_after"]["rel"]["topics"].get(TOPIC).is_none(), "{told}");
    for name in ["gcm_topic", "gcm_dry"] {
        assert!(told[name].is_u64(), "{name}: {told}");
    }
    assert_eq!(told["gcm_bad"][0], "GCMMalformedJsonException");
    for name in ["fcm_topic", "fcm_data", "fcm_condition", "fcm_after"] {
        assert_eq!((&told[name]["success"], &told[name]["failure"]), (&json!(1), &json!(0)), "{name}");
        assert!(told[name]["topic_message_id"].is_u64(), "{name}: {told}");
    }
    assert_eq!(told["fcm_bad"][0], "InvalidDataError");
    assert_eq!(stage.counted(), (8.0, 12.0), "one for each call of the libraries, one for each token that is cleaned");

    let messages = all_seen(&mut stage.phone.connect(&stage.broker), 5);
    assert_eq!(numbers(&messages), ["1", "2", "3", "4", "5"]);
    let data = json!({ "n": "1", "gcm.notification.title": "Zwölf", "gcm.n.e": "1" });
    let topic = format!("/topics/{TOPIC}");
    assert_eq!(messages[0], json!({ "from": topic, "app": APP, "collapse_key": "demo", "ttl": 600, "data": data }));
    let data = json!({ "n": "2", "gcm.notification.title": "t", "gcm.notification.body": "b", "gcm.n.e": "1" });
    assert_eq!(messages[1], json!({ "from": topic, "app": APP, "collapse_key": "other", "ttl": 600, "data": data }));
    assert_eq!(messages[2]["data"], json!({ "n": "3" }));
    left_in_time(&mut stage.second_phone.connect(&stage.broker), &["1", "2", "3", "4"], "5");
}

/// Asserts that a device that left a topic got nothing but these, in any order, and not what came after. What was published just
/// before it left may reach it or not.
fn left_in_time(mcs: &mut Mcs, before: &[&str], after: &str) {
    let until = Instant::now() + QUIET;
    while let Ok(Some(frame)) = mcs.frame(until.saturating_duration_since(Instant::now())) {
        if let Stanza::Data(message) = Stanza::decode(&frame).unwrap() {
            let n = value(&message, "n").unwrap();
            assert!(before.contains(&n) && n != after, "{n}");
        }
    }
}

#[test]
fn h164_what_java_s_sender_casts_has_the_type_that_it_casts_to() {
    let stage = Stage::new();
    stage.subscribe();
    // As `Sender` writes it: always JSON, `to` for one and `registration_ids` for a list, `delay_while_idle` and an empty object among
    // the rest.
    let sent = |target: &str, whom: Value| {
        let body = json!({
            "delay_while_idle": false, "collapse_key": "demo", "time_to_live": 600, "data": { "n": "1" }, target: whom,
        });
        let answer = send_json(&stage.broker.address("http"), ONE.1, &body);
        assert_eq!(answer.status, 200, "any other status is an InvalidRequestException");
        answer
    };
    // json-simple makes a Long of digits alone; a point or an exponent makes a Double, which is not cast to Long.
    let is_long = |text: &str, key: &str| {
        let (_, after) = text.split_once(&format!("\"{key}\":")).unwrap_or_else(|| panic!("{key}: {text}"));
        let digits = after[..after.find([',', '}']).unwrap()].trim();
        digits.bytes().all(|byte| byte.is_ascii_digit()) && digits.parse::<i64>().is_ok()
    };

    // One registration: exactly one result; its id, its canonical token and its error are Strings.
    let one = sent("to", json!(stage.old)).json();
    let results = one["results"].as_array().unwrap();
    assert_eq!(results.len(), 1);
    assert!(results[0]["message_id"].is_string() && results[0].get("error").is_none(), "{one}");
    assert_eq!(results[0]["registration_id"], json!(stage.new));
    let gone = sent("to", json!(stage.gone)).json();
    assert_eq!(one_error(&gone), "NotRegistered");
    assert!(gone["results"][0].get("message_id").is_none(), "{gone}");

    // A list: as many results as registrations, counts and the multicast's id as integers.
    let many = sent("registration_ids", json!([stage.token, stage.gone, stage.old]));
    assert_eq!(errors(&many.json()), ["", "NotRegistered", ""]);
    for key in ["success", "failure", "canonical_ids", "multicast_id"] {
        assert!(is_long(many.text(), key), "{key}: {}", many.text());
    }

    // A topic: no `results`, and a Long; an error is a String.
    let topic = sent("to", json!(format!("/topics/{TOPIC}")));
    assert!(topic.json().get("results").is_none() && is_long(topic.text(), "message_id"), "{}", topic.text());
    let big = json!({ "to": format!("/topics/{TOPIC}"), "data": { "n": "x".repeat(2_048) } });
    let big = send_json(&stage.broker.address("http"), ONE.1, &big).json();
    assert!(big["error"].is_string() && big.get("message_id").is_none(), "{big}");

    // A group: no `results`, both counts, and the failed ones as Strings.
    let answer = stage.second_phone.register_form(&stage.broker, &format!("app={APP}&delete=true"));
    assert_eq!(answer.status, 200);
    let group = sent("to", json!(stage.group));
    assert!(group.json().get("results").is_none(), "{}", group.text());
    assert!(is_long(group.text(), "success") && is_long(group.text(), "failure"), "{}", group.text());
    assert_eq!(group.json()["failed_registration_ids"], json!([stage.second]));
}

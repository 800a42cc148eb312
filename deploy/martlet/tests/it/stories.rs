//! What operators are told of messages: `martlet admin message`, `token inspect`, `recall`, `topic`, `project counts`.

use std::{sync::Arc, time::Duration};

use martlet_loadtest::{
    cluster::Cluster,
    device::{self, Connection, trusting},
    http::HttpClient,
};
use martlet_proto::{mcs::stanza::Stanza, token::fingerprint};
use serde_json::{Value, json};
use tokio::time::{sleep, timeout};

use crate::{
    app_server::send_json,
    broker::{Broker, ONE, martlet, shared},
    cluster::{self, PATIENCE},
    device::{Identity, check_in, value},
};

const APP: &str = "com.example.app";

/// A registered device.
struct Phone<'a> {
    broker: &'a Broker,
    identity: Identity,
    token: String,
}

fn phone(broker: &Broker) -> Phone<'_> {
    let identity = check_in(broker);
    let token = identity.register(broker, APP, ONE.0);
    Phone { broker, identity, token }
}

impl Phone<'_> {
    /// Sends a message with options; its id.
    fn send(&self, options: &Value) -> String {
        let mut body = json!({ "to": self.token, "data": { "n": 1 } });
        body.as_object_mut().unwrap().extend(options.as_object().unwrap().clone());
        let json = send_json(&self.broker.address("http"), ONE.1, &body).json();
        json["results"][0]["message_id"].as_str().unwrap_or_else(|| panic!("{json}")).to_owned()
    }

    /// What an operator is told; whether the command succeeded.
    fn admin(&self, words: &[&str]) -> (bool, String) {
        let (status, out, said) = martlet(&[&["admin", "--node", &self.broker.address("grpc")], words].concat());
        (status.success(), format!("{out}{said}"))
    }

    /// Asks until what is told has `part`: acks are applied soon, not at once.
    fn told(&self, words: &[&str], part: &str) -> String {
        for _ in 0..100 {
            let (known, told) = self.admin(words);
            if known && told.contains(part) {
                return told;
            }
            std::thread::sleep(Duration::from_millis(100));
        }
        panic!("never {part:?}: {}", self.admin(words).1);
    }
}

#[test]
fn a_waiting_message_is_told_with_its_place_in_the_log_and_then_as_delivered_through_its_gateway() {
    let phone = phone(shared());
    let id = phone.send(&json!({}));
    let told = phone.told(&["message", &id], "waits");
    assert!(told.contains("not connected") && told.contains("shard ") && told.contains("term "), "{told}");
    assert!(told.contains(&fingerprint(&phone.token)), "{told}");
    assert!(!told.contains(&phone.token), "never the token in clear");
    let mut mcs = phone.identity.connect(phone.broker);
    assert_eq!(mcs.message().persistent_id.as_deref(), Some(&*id));
    let told = phone.told(&["message", &id, "--token", &phone.token], "written to the device");
    assert!(told.contains("through gateway "), "{told}");
    mcs.ack_all();
    let told = phone.told(&["message", &id], "delivered");
    assert!(told.contains("acked it through gateway "), "{told}");
}

#[test]
fn an_expired_a_collapsed_and_an_unregistered_message_are_told_so() {
    let phone = phone(shared());
    let expired = phone.send(&json!({ "time_to_live": 1 }));
    let first = phone.send(&json!({ "collapse_key": "k" }));
    let second = phone.send(&json!({ "collapse_key": "k" }));
    let told = phone.told(&["message", &first], "collapsed");
    assert!(told.contains(&second), "by which: {told}");
    phone.told(&["message", &expired], "its time to live ended");
    phone.identity.register_form(phone.broker, &format!("app={APP}&delete=true"));
    let told = phone.told(&["message", &second], "unregistered");
    assert!(told.contains("of a registration that is gone"), "{told}");
}

#[test]
fn an_overflowed_message_is_told_so_and_the_counters_of_the_project_balance() {
    // Of its own, so that its messages can be counted.
    let broker = &Broker::start();
    let phone = phone(broker);
    let first = phone.send(&json!({}));
    let body = json!({ "registration_ids": vec![&phone.token; 101], "data": { "n": 0 } });
    let json = send_json(&broker.address("http"), ONE.1, &body).json();
    let last = json["results"][100]["message_id"].as_str().unwrap();
    for id in [&*first, last] {
        let told = phone.told(&["message", id], "overflow");
        assert!(told.contains("too many messages waited"), "{told}");
    }
    phone.send(&json!({ "collapse_key": "k" }));
    let told = phone.told(&["project", "counts", ONE.0], " all ");
    let row: Vec<&str> = told.lines().find(|line| line.contains(" all ")).unwrap().split_whitespace().collect();
    let numbers: Vec<u64> = row.iter().filter_map(|word| word.parse().ok()).collect();
    let [accepted, delivered, waiting, expired, collapsed, overflow, unregistered, recalled, stored] = numbers[..]
    else {
        panic!("{told}")
    };
    assert_eq!((accepted, waiting, overflow), (103, 1, 102), "{told}");
    assert_eq!(accepted, delivered + waiting + expired + collapsed + overflow + unregistered + recalled);
    assert!(stored > 0);
    assert!((broker.metric("martlet_node_messages_ended_total{fate=\"Overflow\"}") - 102.0).abs() < 0.5);
}

#[test]
fn a_recalled_message_never_arrives_and_a_delivered_one_cannot_be_recalled() {
    let phone = phone(shared());
    let (gone, stays) = (phone.send(&json!({})), phone.send(&json!({ "data": { "n": 2 } })));
    let (done, said) = phone.admin(&["recall", &gone]);
    assert!(done && said.contains("recalled 0:"), "{said}");
    phone.told(&["message", &gone], "an operator took it back");
    for key in ["a", "b", "b"] {
        phone.send(&json!({ "collapse_key": key }));
    }
    let (done, said) = phone.admin(&["recall", "--token", &phone.token, "--collapse-key", "b"]);
    assert!(done && said.contains("recalled 1 message"), "{said}");
    let (done, said) = phone.admin(&["recall", "--token", &phone.token, "--collapse-key", "b"]);
    assert!(done && said.contains("nothing waits"), "{said}");
    let mut mcs = phone.identity.connect(phone.broker);
    assert_eq!(value(&mcs.message(), "n"), Some("2"));
    assert_eq!(mcs.message().token.as_deref(), Some("a"));
    mcs.no_message();
    mcs.ack_all();
    phone.told(&["message", &stays], "delivered");
    let (done, said) = phone.admin(&["recall", &stays]);
    assert!(done && said.contains("nothing to take back") && said.contains("delivered"), "{said}");
}

#[test]
fn a_token_is_told_with_what_waits_and_what_its_messages_became() {
    let phone = phone(shared());
    for _ in 0..2 {
        phone.send(&json!({ "collapse_key": "k" }));
    }
    phone.send(&json!({}));
    let told = phone.told(&["token", "inspect", &phone.token], "collapsed");
    for part in ["registered", APP, ONE.0, "not connected", "2 messages of ", &fingerprint(&phone.token)] {
        assert!(told.contains(part), "{part}: {told}");
    }
    assert_eq!(told.matches("waits").count(), 2, "{told}");
    assert!(!told.contains(&phone.token));
    let again = phone
        .identity
        .register_form(phone.broker, &format!("app={APP}&sender={}&scope=GCM&appid=eAbCdEfGhIj&X-subtype=s", ONE.0));
    let other = again.text().strip_prefix("token=").unwrap().to_owned();
    let mut mcs = phone.identity.connect(phone.broker);
    mcs.message();
    let told = phone.told(&["token", "inspect", &other], "connected through gateway ");
    assert!(told.contains("waiting      nothing"), "{told}");
    phone.identity.register_form(phone.broker, &format!("app={APP}&delete=true"));
    phone.told(&["token", "inspect", &phone.token], "not registered");
}

#[test]
fn what_nobody_knows_and_what_is_no_id_or_token_is_said_so() {
    let phone = phone(shared());
    for (words, part) in [
        (&["message", "0:1700000000000000%0123456789abcdef"][..], "no node knows message"),
        (&["message", "17"], "has the form 0:1700000000000000%0123456789abcdef"),
        (&["recall", "0:1700000000000000%0123456789abcdef"], "no message 0:1700000000000000%0123456789abcdef waits"),
        (&["token", "inspect", "x:APA91bx"], "no token of this cluster"),
        (&["recall", "--collapse-key", "k"], "--token"),
        (&["recall"], "required"),
        (&["project", "counts", "42"], "there is no project 42"),
        (&["topic", ONE.0, "a b"], "a name is 1 to 900 characters"),
        (&["topic", "42", "x"], "there is no project 42"),
    ] {
        let (done, said) = phone.admin(words);
        assert!(!done && said.contains(part), "{words:?}: {said}");
    }
    let mut forged = phone.token.clone();
    let last = if forged.pop() == Some('A') { 'Q' } else { 'A' };
    forged.push(last);
    let (done, said) = phone.admin(&["token", "inspect", &forged]);
    assert!(!done && said.contains("no token of this cluster"), "{said}");
}

#[test]
fn a_topic_is_told_with_its_subscribers() {
    let phone = phone(shared());
    let form = format!("app={APP}&sender={}&scope=/topics/stories&X-gcm.topic=/topics/stories", phone.token);
    let answer = phone.identity.register_form(phone.broker, &form);
    assert_eq!(answer.status, 200, "{}", answer.text());
    for name in ["stories", "/topics/stories"] {
        let told = phone.told(&["topic", ONE.0, name], "subscribers       1");
        assert!(told.contains("home              shard ") && told.contains("on their way      0"), "{told}");
    }
    phone.told(&["topic", ONE.0, "nobody"], "subscribers       0");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn stories_survive_the_loss_of_the_leader_and_the_restart_of_the_gateway_that_delivered() {
    let (mut cluster, _dir) = cluster::start(1).await;
    let http = HttpClient::new(&cluster.http()).unwrap();
    let identity = device::check_in(&http, None).await.unwrap();
    let token = device::register(&http, identity, APP, &cluster.project.sender_id).await.unwrap();
    let authorization = format!("key={}", cluster.project.server_key);
    let mut ids = Vec::new();
    for options in [json!({}), json!({ "collapse_key": "k" }), json!({ "collapse_key": "k" })] {
        let mut body = json!({ "to": token, "data": { "n": 1 } });
        body.as_object_mut().unwrap().extend(options.as_object().unwrap().clone());
        let headers = [("authorization", &*authorization), ("content-type", "application/json")];
        let answer = http.post("/gcm/send", &headers, body.to_string()).await.unwrap();
        let json: Value = serde_json::from_slice(&answer.body).unwrap();
        ids.push(json["results"][0]["message_id"].as_str().unwrap_or_else(|| panic!("{json}")).to_owned());
    }
    let tls = trusting(&cluster.ca_file()).unwrap();
    let mut connection = Connection::open(&cluster.mcs(), Arc::clone(&tls), identity, Vec::new()).await.unwrap();
    let received = timeout(PATIENCE, connection.next()).await.unwrap().unwrap().unwrap();
    assert!(matches!(&received.stanza, Stanza::Data(data) if data.persistent_id.as_ref() == Some(&ids[0])));
    drop(connection);
    // Named as received at the next login: acknowledged.
    let mut connection = Connection::open(&cluster.mcs(), tls, identity, vec![ids[0].clone()]).await.unwrap();
    timeout(PATIENCE, connection.next()).await.unwrap().unwrap();
    told(&cluster, &["message", &ids[0]], "delivered").await;

    cluster.kill_gateway().unwrap();
    let lost = cluster::leader(&cluster, 1).await.unwrap();
    cluster.kill_node(lost).unwrap();
    cluster.start_gateway().unwrap();
    let delivered = told(&cluster, &["message", &ids[0]], "delivered").await;
    assert!(delivered.contains("acked it through gateway "), "{delivered}");
    let collapsed = told(&cluster, &["message", &ids[1]], "collapsed").await;
    assert!(collapsed.contains(&ids[2]), "{collapsed}");
    // What waits is its leader's to say, once there is one.
    told(&cluster, &["message", &ids[2]], "waits").await;
    let inspected = told(&cluster, &["token", "inspect", &token], "1 message of ").await;
    for word in ["delivered", "collapsed", "waits"] {
        assert!(inspected.contains(word), "{inspected}");
    }
    assert!(inspected.contains("did not answer"), "the lost node may know more: {inspected}");
}

/// Asks the nodes that answer until what is told has `part`.
async fn told(cluster: &Cluster, words: &[&str], part: &str) -> String {
    let mut said = String::new();
    for _ in 0..300 {
        match cluster.admin(words) {
            Ok(out) if out.contains(part) => return out,
            Ok(out) => said = out,
            Err(error) => said = format!("{error:#}"),
        }
        sleep(Duration::from_millis(100)).await;
    }
    panic!("never {part:?}: {said}");
}

//! Device groups: gcm-http.md section 9 and statements H140 to H152, on the wire.

use std::{
    sync::atomic::{AtomicU32, Ordering},
    time::Instant,
};

use martlet_loadtest::{cluster::Cluster, device, http::HttpClient};
use martlet_proto::token::fingerprint;
use serde_json::{Value, json};

use crate::{
    app_server::{Answer, Http, send_json},
    broker::{Broker, ONE, TWO, martlet, shared},
    clients::{last_line, node, npm, pip, python, requests},
    cluster,
    device::{Identity, Mcs, check_in, value},
};

const APP: &str = "com.example.app";

/// A registered device.
struct Phone {
    identity: Identity,
    token: String,
}

impl Phone {
    fn connect(&self, broker: &Broker) -> Mcs {
        self.identity.connect(broker)
    }

    /// Ends its registration.
    fn unregister(&self, broker: &Broker) {
        let answer = self.identity.register_form(broker, &format!("app={APP}&delete=true"));
        assert_eq!(answer.status, 200, "{}", answer.text());
    }
}

fn phone_of(broker: &Broker, sender: &str) -> Phone {
    let identity = check_in(broker);
    let token = identity.register(broker, APP, sender);
    Phone { identity, token }
}

fn phone(broker: &Broker) -> Phone {
    phone_of(broker, ONE.0)
}

/// A name that no other test of this broker has.
fn name(of: &str) -> String {
    static DRAWN: AtomicU32 = AtomicU32::new(0);
    format!("{of}-{}-{}", std::process::id(), DRAWN.fetch_add(1, Ordering::Relaxed))
}

fn request(broker: &Broker, project: (&str, &str), method: &str, path: &str, body: &[u8]) -> Answer {
    let authorization = format!("key={}", project.1);
    let headers = [("Authorization", &*authorization), ("Content-Type", "application/json"), ("project_id", project.0)];
    Http::connect(&broker.address("http")).request(method, path, &headers, body)
}

fn post(broker: &Broker, body: &Value) -> Answer {
    request(broker, ONE, "POST", "/gcm/notification", body.to_string().as_bytes())
}

fn create_body(name: &str, phones: &[&Phone]) -> Value {
    json!({ "operation": "create", "notification_key_name": name, "registration_ids": tokens(phones) })
}

fn create(broker: &Broker, name: &str, phones: &[&Phone]) -> String {
    key(&post(broker, &create_body(name, phones)))
}

fn change(broker: &Broker, operation: &str, key: &str, phones: &[&Phone]) -> Answer {
    post(broker, &json!({ "operation": operation, "notification_key": key, "registration_ids": tokens(phones) }))
}

fn look_up(broker: &Broker, project: (&str, &str), name: &str) -> Answer {
    let path = format!("/gcm/notification?notification_key_name={name}");
    request(broker, project, "GET", &path, b"")
}

fn tokens<'a>(phones: &[&'a Phone]) -> Vec<&'a str> {
    phones.iter().map(|phone| &*phone.token).collect()
}

fn key(answer: &Answer) -> String {
    assert_eq!(answer.status, 200, "{}", answer.text());
    let json = answer.json();
    assert_eq!(json.as_object().unwrap().len(), 1, "{json}");
    json["notification_key"].as_str().unwrap_or_else(|| panic!("{json}")).to_owned()
}

/// The text of a 400.
fn error(answer: &Answer) -> String {
    assert_eq!(answer.status, 400, "{}", answer.text());
    assert!(answer.header("content-type").unwrap().starts_with("application/json"));
    answer.json()["error"].as_str().unwrap().to_owned()
}

fn send(broker: &Broker, body: &Value) -> Answer {
    let answer = send_json(&broker.address("http"), ONE.1, body);
    assert_eq!(answer.status, 200, "{}", answer.text());
    answer
}

/// The error of a send that was answered as for one token.
fn one_error(answer: &Answer) -> String {
    let json = answer.json();
    assert!(json["multicast_id"].is_u64() && json["success"] == 0 && json["failure"] == 1, "{json}");
    assert_eq!(json["results"].as_array().unwrap().len(), 1);
    json["results"][0]["error"].as_str().unwrap().to_owned()
}

#[test]
fn h140_create_gives_a_notification_key_on_both_paths() {
    let broker = shared();
    let (a, b) = (phone(broker), phone(broker));
    let made = create(broker, &name("h140"), &[&a, &b]);
    assert!(made.starts_with("APA91b") && !made.contains(':'), "{made}");
    for path in ["/fcm/notification", "/gcm/notification/", "/fcm/notification/"] {
        let body = create_body(&name("h140"), &[&a, &b]).to_string();
        assert_ne!(key(&request(broker, ONE, "POST", path, body.as_bytes())), made);
    }
    let answer = request(broker, ONE, "DELETE", "/gcm/notification", b"");
    assert_eq!((answer.status, answer.header("allow")), (405, Some("GET, POST")));
    assert_eq!(request(broker, ONE, "POST", "/gcm/googlenotification", b"{}").status, 404);
    assert_eq!(request(broker, (ONE.0, "wrong"), "POST", "/gcm/notification", b"{").status, 401);
    let foreign = request(broker, (TWO.0, ONE.1), "POST", "/gcm/notification", b"{}");
    assert!(error(&foreign).contains("project_id"));
}

#[test]
fn h141_a_second_create_with_the_same_name_is_refused() {
    let broker = shared();
    let (a, b, name) = (phone(broker), phone(broker), name("h141"));
    let made = create(broker, &name, &[&a]);
    assert_eq!(error(&post(broker, &create_body(&name, &[&b]))), "notification_key already exists");
    assert_eq!(key(&look_up(broker, ONE, &name)), made);
}

#[test]
fn h142_a_look_up_by_name_gives_the_same_key() {
    let broker = shared();
    let a = phone(broker);
    let unusual = format!("{} ü&=%/?", name("h142"));
    let made = create(broker, &unusual, &[&a]);
    let escaped: String = unusual.bytes().map(|byte| format!("%{byte:02X}")).collect();
    assert_eq!(key(&look_up(broker, ONE, &escaped)), made);
    assert_eq!(error(&look_up(broker, ONE, &name("h142"))), "notification_key not found");
    // The longest name, and one more byte.
    let longest = format!("{:n<900}", name("h142"));
    let made = create(broker, &longest, &[&a]);
    assert_eq!(key(&look_up(broker, ONE, &longest)), made);
    assert!(error(&post(broker, &create_body(&format!("{longest}n"), &[&a]))).contains("longer than 900 bytes"));
}

#[test]
fn h143_add_and_remove_give_the_key_and_change_who_is_reached() {
    let broker = shared();
    let (a, b, c) = (phone(broker), phone(broker), phone(broker));
    let made = create(broker, &name("h143"), &[&a, &b]);
    for (operation, phone) in [("add", &c), ("add", &c), ("remove", &a), ("remove", &a)] {
        assert_eq!(key(&change(broker, operation, &made, &[phone])), made, "{operation}");
    }
    assert_eq!(send(broker, &json!({ "to": made, "data": { "n": 1 } })).text(), r#"{"success":2,"failure":0}"#);
    for phone in [&b, &c] {
        assert_eq!(value(&phone.connect(broker).message(), "n"), Some("1"));
    }
    a.connect(broker).no_message();
}

#[test]
fn h144_a_21st_member_is_refused_and_a_thousand_times_one_is_one() {
    let broker = shared();
    let phones: Vec<Phone> = (0..21).map(|_| phone(broker)).collect();
    let all: Vec<&Phone> = phones.iter().collect();
    let name = name("h144");
    assert!(error(&post(broker, &create_body(&name, &all))).starts_with("too many registration ids"));
    assert_eq!(error(&look_up(broker, ONE, &name)), "notification_key not found");
    let mut thousand = all[..20].to_vec();
    thousand.extend(vec![all[7]; 980]);
    let made = create(broker, &name, &thousand);
    assert!(error(&change(broker, "add", &made, &[all[20]])).starts_with("too many registration ids"));
    assert_eq!(send(broker, &json!({ "to": made })).text(), r#"{"success":20,"failure":0}"#);
    assert_eq!(key(&change(broker, "remove", &made, &[all[0]])), made);
    assert_eq!(key(&change(broker, "add", &made, &[all[20]])), made);
    assert_eq!(send(broker, &json!({ "to": made })).text(), r#"{"success":20,"failure":0}"#);
    thousand.push(all[0]);
    assert!(error(&change(broker, "add", &made, &thousand)).contains("at most 1000"));
}

#[test]
fn h145_h146_a_key_that_is_none_and_a_name_that_is_anothers_have_their_texts() {
    let broker = shared();
    let (a, name) = (phone(broker), name("h146"));
    let made = create(broker, &name, &[&a]);
    let mut forged = made.clone();
    let last = forged.pop().unwrap();
    forged.push(if last == 'A' { 'Q' } else { 'A' });
    for unknown in [forged.as_str(), a.token.as_str(), "nonsense"] {
        for operation in ["add", "remove"] {
            assert_eq!(error(&change(broker, operation, unknown, &[&a])), "notification_key not found", "{unknown}");
        }
    }
    assert_eq!(one_error(&send(broker, &json!({ "to": forged }))), "InvalidRegistration");
    let misnamed = |name: &str| {
        json!({ "operation": "add", "notification_key": made, "notification_key_name": name,
            "registration_ids": tokens(&[&a]) })
    };
    let text = "notification_key_name doesn't match the group name of the notification_key";
    assert_eq!(error(&post(broker, &misnamed("other"))), text);
    assert_eq!(key(&post(broker, &misnamed(&name))), made);
}

#[test]
fn h147_a_create_with_only_invalid_tokens_is_refused() {
    let broker = shared();
    let (foreign, gone) = (phone_of(broker, TWO.0), phone(broker));
    gone.unregister(broker);
    let name = name("h147");
    let with = |ids: &[&str]| json!({ "operation": "create", "notification_key_name": name, "registration_ids": ids });
    for ids in [&[][..], &["nonsense", ""], &[&foreign.token], &[&gone.token, &gone.token[1..]]] {
        assert_eq!(error(&post(broker, &with(ids))), "no valid registration ids", "{ids:?}");
    }
    // One that is valid is enough, and the others are no members.
    let a = phone(broker);
    let made = key(&post(broker, &with(&[&foreign.token, "nonsense", &a.token, &gone.token])));
    assert_eq!(send(broker, &json!({ "to": made })).text(), r#"{"success":1,"failure":0}"#);
}

#[test]
fn h148_h151_a_group_that_nobody_is_left_in_is_deleted_and_its_name_is_free() {
    let broker = shared();
    let (a, b, name) = (phone(broker), phone(broker), name("h148"));
    let made = create(broker, &name, &[&a, &b]);
    assert_eq!(key(&change(broker, "remove", &made, &[&a, &b])), made);
    assert_eq!(one_error(&send(broker, &json!({ "to": made }))), "NotRegistered");
    assert_eq!(error(&look_up(broker, ONE, &name)), "notification_key not found");
    assert_eq!(error(&change(broker, "add", &made, &[&a])), "notification_key not found");
    let again = create(broker, &name, &[&b]);
    assert_ne!(again, made);
    assert_eq!(one_error(&send(broker, &json!({ "to": made }))), "NotRegistered");
    // The members die instead.
    b.unregister(broker);
    assert_eq!(one_error(&send(broker, &json!({ "to": again }))), "NotRegistered");
    let third = create(broker, &name, &[&a]);
    a.unregister(broker);
    let c = phone(broker);
    assert_ne!(create(broker, &name, &[&c]), third, "nobody needs to have sent to it");
    a.connect(broker).no_message();
    b.connect(broker).no_message();
}

#[test]
fn h149_h150_every_member_receives_the_message_and_the_answer_only_counts() {
    let broker = shared();
    let (here, away, foreign) = (phone(broker), phone(broker), phone(broker));
    let made = create(broker, &name("h150"), &[&here, &away]);
    let mut mcs = here.connect(broker);
    for (number, target) in ["to", "notification_key"].into_iter().enumerate() {
        let body = json!({ target: made, "data": { "n": number }, "collapse_key": "k", "time_to_live": 600 });
        let answer = send(broker, &body);
        assert_eq!(answer.text(), r#"{"success":2,"failure":0}"#);
        assert!(answer.header("content-type").unwrap().starts_with("application/json"));
        let message = mcs.message();
        assert_eq!(value(&message, "n"), Some(&*number.to_string()));
        assert_eq!((message.from.as_str(), message.category.as_str()), (ONE.0, APP));
    }
    let mut theirs = away.connect(broker);
    let message = theirs.message();
    assert!(message.persistent_id.is_some_and(|id| id.starts_with("0:")));
    theirs.ack_all();
    // A dry run, and a package that is another's, reach nobody.
    let dry = send(broker, &json!({ "to": made, "dry_run": true }));
    assert_eq!(dry.text(), r#"{"success":2,"failure":0}"#);
    let other = send(broker, &json!({ "to": made, "restricted_package_name": "com.other" })).json();
    let failed = |json: &Value| -> std::collections::BTreeSet<String> {
        json["failed_registration_ids"].as_array().unwrap().iter().map(|id| id.as_str().unwrap().to_owned()).collect()
    };
    assert_eq!((&other["success"], &other["failure"]), (&json!(0), &json!(2)));
    assert_eq!(failed(&other), [here.token.clone(), away.token.clone()].into());
    // One that is gone fails once, and leaves.
    away.unregister(broker);
    let partial = send(broker, &json!({ "to": made, "data": { "n": 7 } })).json();
    assert_eq!((&partial["success"], &partial["failure"]), (&json!(1), &json!(1)));
    assert_eq!(failed(&partial), [away.token.clone()].into());
    assert_eq!(send(broker, &json!({ "to": made, "data": { "n": 8 } })).text(), r#"{"success":1,"failure":0}"#);
    assert_eq!([7, 8].map(|_| value(&mcs.message(), "n").unwrap().to_owned()), ["7", "8"]);
    mcs.no_message();
    foreign.connect(broker).no_message();
    // A key is no token.
    let many = send(broker, &json!({ "registration_ids": [made, here.token] })).json();
    assert_eq!((&many["success"], &many["results"][0]["error"]), (&json!(1), &json!("InvalidRegistration")));
}

#[test]
fn h152_one_name_under_two_senders_is_two_groups() {
    let broker = shared();
    let (one, two, name) = (phone_of(broker, ONE.0), phone_of(broker, TWO.0), name("h152"));
    let first = create(broker, &name, &[&one]);
    let body = create_body(&name, &[&two]).to_string();
    let second = key(&request(broker, TWO, "POST", "/gcm/notification", body.as_bytes()));
    assert_ne!(first, second);
    assert_eq!(key(&look_up(broker, ONE, &name)), first);
    assert_eq!(key(&look_up(broker, TWO, &name)), second);
    assert_eq!(one_error(&send(broker, &json!({ "to": second }))), "MismatchSenderId");
    assert_eq!(error(&change(broker, "remove", &second, &[&one])), "notification_key not found");
    let answer = send_json(&broker.address("http"), TWO.1, &json!({ "to": second, "data": { "n": 2 } }));
    assert_eq!(answer.text(), r#"{"success":1,"failure":0}"#);
    assert_eq!(value(&two.connect(broker).message(), "n"), Some("2"));
    one.connect(broker).no_message();
}

#[test]
fn a_group_survives_kill_9_and_admin_shows_it_without_its_secrets() {
    let mut broker = Broker::start();
    let (a, b) = (phone(&broker), phone(&broker));
    let made = create(&broker, "user-7", &[&a, &b]);
    broker.kill();
    broker.restart();
    assert_eq!(key(&look_up(&broker, ONE, "user-7")), made);
    assert_eq!(send(&broker, &json!({ "to": made, "data": { "n": 1 } })).text(), r#"{"success":2,"failure":0}"#);
    for phone in [&a, &b] {
        assert_eq!(value(&phone.connect(&broker).message(), "n"), Some("1"));
    }
    let node = broker.address("grpc");
    let admin = |words: &[&str]| martlet(&[&["admin", "--node", &node, "group"], words].concat());
    let (status, out, said) = admin(&[ONE.0, "user-7"]);
    assert!(status.success(), "{said}");
    for token in [&a.token, &b.token, &made] {
        assert!(out.contains(&fingerprint(token)), "{out}");
        assert!(!out.contains(&token[..]) && !broker.log_text().contains(&token[..]));
    }
    assert!(out.contains("created (ms)") && out.contains("user-7"), "{out}");
    let (status, out, said) = admin(&[ONE.0, "user-8"]);
    assert!(!status.success() && out.is_empty() && said.contains("user-8"), "{out}{said}");
    let (status, _, said) = admin(&["x", "user-7"]);
    assert!(!status.success() && said.contains("sender id"), "{said}");
}

#[test]
fn h149_h163_node_gcm_and_pyfcm_send_to_a_group_once_and_read_what_became_of_it() {
    // Of its own, so that its requests can be counted.
    let broker = &Broker::start();
    let (a, b, gone) = (phone(broker), phone(broker), phone(broker));
    let made = create(broker, "clients", &[&a, &b, &gone]);
    gone.unregister(broker);
    let url = format!("https://{}/fcm/send", broker.address("https"));
    let dir = pip("python");
    let answers = last_line(python(broker, &dir, "group.py").args([&url, ONE.1, &made]));
    assert_eq!((&answers["whole"]["success"], &answers["whole"]["failure"]), (&json!(2), &json!(1)), "{answers}");
    assert_eq!(answers["none"]["results"][0]["error"], "InvalidRegistration", "{answers}");
    let dir = npm("node-gcm");
    let answers = last_line(node(broker, &dir, "group.cjs").args([&url, ONE.1, &made]));
    assert_eq!(answers["whole"], json!({ "success": 2, "failure": 0 }), "{answers}");
    assert_eq!(answers["none"]["results"][0]["error"], "InvalidRegistration", "{answers}");
    assert_eq!(requests(broker, "Send"), 4.0, "one for each call of the libraries");
    for phone in [&a, &b] {
        let mut mcs = phone.connect(broker);
        assert_eq!([1, 2].map(|_| value(&mcs.message(), "n").unwrap().to_owned()), ["1", "2"]);
        mcs.no_message();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_node_shows_a_group_and_the_loss_of_its_leader_loses_neither_it_nor_its_messages() {
    let (mut cluster, _dir) = cluster::start(1).await;
    let http = HttpClient::new(&cluster.http()).unwrap();
    let identity = device::check_in(&http, None).await.unwrap();
    let sender = cluster.project.sender_id.clone();
    let token = device::register(&http, identity, APP, &sender).await.unwrap();
    let authorization = format!("key={}", cluster.project.server_key);
    let headers = [("authorization", &*authorization), ("content-type", "application/json"), ("project_id", &*sender)];
    let body = json!({ "operation": "create", "notification_key_name": "n", "registration_ids": [token] });
    let answer = http.post("/gcm/notification", &headers, body.to_string()).await.unwrap();
    let made: Value = serde_json::from_slice(&answer.body).unwrap();
    let made = made["notification_key"].as_str().unwrap_or_else(|| panic!("{made}")).to_owned();
    let shown = |cluster: &Cluster, at: usize| {
        let node = &cluster.grpc()[at];
        let (status, out, said) = martlet(&["admin", "--node", node, "group", &sender, "n"]);
        (
            status.success() && out.contains(&fingerprint(&token)) && out.contains(&fingerprint(&made)),
            format!("{out}{said}"),
        )
    };
    for at in 0..3 {
        let (right, said) = shown(&cluster, at);
        assert!(right, "node {}: {said}", at + 1);
    }
    let lost = cluster::leader(&cluster, 1).await.unwrap();
    cluster.kill_node(lost).unwrap();
    let begun = Instant::now();
    loop {
        let body = json!({ "to": made, "data": { "n": 1 } }).to_string();
        let answer = http.post("/gcm/send", &headers, body).await.unwrap();
        if answer.body[..] == br#"{"success":1,"failure":0}"#[..] {
            break;
        }
        assert!(begun.elapsed() < cluster::PATIENCE, "{} {:?}", answer.status, answer.body);
    }
    let (right, said) = shown(&cluster, (lost + 1) % 3);
    assert!(right, "{said}");
    cluster.stop().await.unwrap();
}

//! From an app server to a device and back by its acknowledgement: gcm-http.md "Semantics" and device.md "DL".

use std::time::{Duration, Instant};

use martlet_proto::{
    device::mcs::{DataMessageStanza, HeartbeatPing},
    mcs::stanza::{self, Stanza},
};
use serde_json::{Value, json};

use crate::{
    app_server::send_json,
    broker::{Broker, ONE, shared},
    device::{Identity, Mcs, check_in, value},
};

const APP: &str = "com.example.app";

/// A registered device of a broker.
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
    /// Sends `{"n": n}`; the message id.
    fn send(&self, n: u32) -> String {
        self.send_with(n, &[])
    }

    fn send_with(&self, n: u32, options: &[(&str, Value)]) -> String {
        let mut body = json!({ "to": self.token, "data": { "n": n } });
        for (key, option) in options {
            body[*key] = option.clone();
        }
        let json = send_json(&self.broker.address("http"), ONE.1, &body).json();
        json["results"][0]["message_id"].as_str().unwrap_or_else(|| panic!("{json}")).to_owned()
    }

    /// Sends this many in multicasts to the one token.
    fn send_many(&self, count: usize) {
        let body = json!({ "registration_ids": vec![&self.token; count], "data": { "n": 0 } });
        assert_eq!(send_json(&self.broker.address("http"), ONE.1, &body).json()["success"], count);
    }

    fn connect(&self) -> Mcs {
        self.identity.connect(self.broker)
    }
}

fn n(message: &DataMessageStanza) -> u32 {
    value(message, "n").unwrap().parse().unwrap()
}

fn id(message: &DataMessageStanza) -> &str {
    message.persistent_id.as_deref().unwrap()
}

#[test]
fn dl_01_dl_19_a_message_for_a_connected_device_arrives_with_all_its_fields() {
    let phone = phone(shared());
    let mut mcs = phone.connect();
    let message_id = phone.send_with(1, &[("time_to_live", json!(600)), ("collapse_key", json!("score"))]);
    let message = mcs.message();
    assert_eq!((message.from.as_str(), message.category.as_str()), (ONE.0, APP));
    assert_eq!(message.persistent_id.as_deref(), Some(&*message_id));
    assert_eq!((message.ttl, message.token.as_deref()), (Some(600), Some("score")));
    // Milliseconds: after 2020 and before 2100.
    assert!((1_577_836_800_000..4_102_444_800_000).contains(&message.sent.unwrap()));
    assert!(message.id.is_some_and(|id| !id.is_empty()));
    assert_eq!(message.app_data.len(), 1);
    // Within a second; the machine may be busy with other tests now and then.
    let quickest = (0..10).map(|number| {
        let begun = Instant::now();
        phone.send(number);
        assert_eq!(n(&mcs.message()), number);
        begun.elapsed()
    });
    assert!(quickest.min() < Some(Duration::from_secs(1)));
}

#[test]
fn dl_19_subtype_and_category_are_the_registration_s_whatever_the_sender_writes() {
    let broker = shared();
    let identity = check_in(broker);
    let form = format!("app={APP}&sender={}&X-subtype=wp%3Ahttps://x%23y&scope=GCM&appid=eAbCdEfGhIj", ONE.0);
    let answer = identity.register_form(broker, &form);
    let token = answer.text().strip_prefix("token=").unwrap();
    let mut mcs = identity.connect(broker);
    send_json(&broker.address("http"), ONE.1, &json!({ "to": token, "data": { "subtype": "mine", "k": "v" } }));
    let message = mcs.message();
    assert_eq!(value(&message, "subtype"), Some("wp:https://x#y"));
    assert_eq!(message.app_data.iter().filter(|pair| pair.key == "subtype").count(), 1);
    assert_eq!(message.category, APP);
}

#[test]
fn dl_02_h100_h105_messages_for_a_device_that_was_away_arrive_oldest_first() {
    let phone = phone(shared());
    for number in 0..5 {
        phone.send(number);
    }
    let mut mcs = phone.connect();
    let arrived: Vec<_> = (0..5).map(|_| n(&mcs.message())).collect();
    assert_eq!(arrived, [0, 1, 2, 3, 4]);
}

#[test]
fn dl_03_dl_18_an_unacked_message_comes_again_under_the_id_its_sender_was_told() {
    let phone = phone(shared());
    let told = phone.send(1);
    assert!(told.len() <= 40);
    let first = phone.connect().message();
    let again = phone.connect().message();
    assert_eq!((id(&first), id(&again)), (&*told, &*told));
}

#[test]
fn dl_04_a_cumulative_ack_in_a_ping_removes_what_it_covers() {
    let phone = phone(shared());
    for number in 0..3 {
        phone.send(number);
    }
    let mut mcs = phone.connect();
    mcs.message();
    let through = mcs.received;
    mcs.message();
    mcs.message();
    let ping = HeartbeatPing { last_stream_id_received: Some(through + 1), ..HeartbeatPing::default() };
    mcs.send(&Stanza::HeartbeatPing(ping));
    mcs.confirmed(mcs.sent);
    drop(mcs);
    let mut mcs = phone.connect();
    assert_eq!(n(&mcs.message()), 2, "the first two are acknowledged, the third is not");
    mcs.no_message();
}

#[test]
fn dl_05_a_stream_ack_removes_what_it_covers() {
    let phone = phone(shared());
    phone.send(1);
    phone.send(2);
    let mut mcs = phone.connect();
    mcs.message();
    mcs.message();
    mcs.ack_all();
    drop(mcs);
    phone.connect().no_message();
}

#[test]
fn dl_06_a_selective_ack_removes_exactly_the_named_ids() {
    let phone = phone(shared());
    for number in 0..3 {
        phone.send(number);
    }
    let mut mcs = phone.connect();
    let ids: Vec<_> = (0..3).map(|_| id(&mcs.message()).to_owned()).collect();
    let named = vec![ids[1].clone(), "0:1%0123456789abcdef".to_owned(), "unknown".to_owned()];
    mcs.send(&Stanza::Iq(Box::new(stanza::selective_ack(named, None))));
    mcs.confirmed(mcs.sent);
    drop(mcs);
    let mut mcs = phone.connect();
    assert_eq!([n(&mcs.message()), n(&mcs.message())], [0, 2]);
    mcs.no_message();
}

#[test]
fn dl_07_ids_named_at_login_are_removed_and_unknown_ones_ignored() {
    let phone = phone(shared());
    for number in 0..3 {
        phone.send(number);
    }
    let mut mcs = phone.connect();
    let ids: Vec<_> = (0..3).map(|_| id(&mcs.message()).to_owned()).collect();
    drop(mcs);
    let mut mcs = phone.identity.connect_having(phone.broker, &[&ids[0], &ids[2], "unknown", "0:1%0123456789abcdef"]);
    assert_eq!(n(&mcs.message()), 1);
    mcs.no_message();
}

#[test]
fn dl_08_an_ack_beyond_what_was_sent_is_ignored() {
    let phone = phone(shared());
    phone.send(1);
    let mut mcs = phone.connect();
    mcs.message();
    let ping = HeartbeatPing { last_stream_id_received: Some(1_000), ..HeartbeatPing::default() };
    mcs.send(&Stanza::HeartbeatPing(ping));
    mcs.send(&Stanza::HeartbeatPing(HeartbeatPing { last_stream_id_received: Some(-5), ..HeartbeatPing::default() }));
    mcs.confirmed(mcs.sent);
    phone.send(2);
    assert_eq!(n(&mcs.message()), 2);
    drop(mcs);
    let mut mcs = phone.connect();
    assert_eq!([n(&mcs.message()), n(&mcs.message())], [1, 2]);
}

#[test]
fn dl_10_a_client_that_never_acks_still_receives_everything_in_order() {
    // More than are kept as written and not acknowledged, at the node and at the gateway, and more bytes than may be under way.
    const BATCHES: u32 = 24;
    const EACH: usize = 50;
    let phone = phone(shared());
    let mut mcs = phone.connect();
    for number in 0..BATCHES {
        let body = json!({ "registration_ids": vec![&phone.token; EACH], "data": { "n": number } });
        assert_eq!(send_json(&phone.broker.address("http"), ONE.1, &body).json()["success"], EACH);
        // Never as many as may wait for a device that is away.
        for _ in 0..EACH {
            assert_eq!(n(&mcs.message()), number);
        }
    }
}

#[test]
fn dl_12_h109_h110_time_to_live_0_is_now_or_never() {
    let phone = phone(shared());
    phone.send_with(1, &[("time_to_live", json!(0))]);
    let mut mcs = phone.connect();
    mcs.no_message();
    phone.send_with(2, &[("time_to_live", json!(0))]);
    let message = mcs.message();
    assert_eq!((n(&message), message.persistent_id), (2, None));
    drop(mcs);
    phone.connect().no_message();
}

#[test]
fn dl_13_h111_an_expired_message_is_not_delivered() {
    let phone = phone(shared());
    phone.send_with(1, &[("time_to_live", json!(1))]);
    phone.send_with(2, &[("time_to_live", json!(600))]);
    // Time to live plus the second and the share that promise 3 allows.
    std::thread::sleep(Duration::from_millis(2_200));
    let mut mcs = phone.connect();
    assert_eq!(n(&mcs.message()), 2);
    mcs.no_message();
}

#[test]
fn h106_100_waiting_messages_are_all_delivered() {
    let phone = phone(shared());
    phone.send_many(100);
    let mut mcs = phone.connect();
    let ids: std::collections::BTreeSet<_> = (0..100).map(|_| id(&mcs.message()).to_owned()).collect();
    assert_eq!(ids.len(), 100);
    mcs.no_message();
}

#[test]
fn h107_of_101_waiting_messages_none_is_delivered_but_one_notice_that_counts_them() {
    let phone = phone(shared());
    phone.send_many(101);
    let mut mcs = phone.connect();
    let notice = mcs.message();
    assert_eq!(value(&notice, "message_type"), Some("deleted_messages"));
    assert_eq!(value(&notice, "total_deleted"), Some("101"));
    assert_eq!((notice.from.as_str(), notice.category.as_str()), (ONE.0, APP));
    mcs.no_message();
    // It is kept until it is acknowledged, and then the queue works as before.
    drop(mcs);
    let mut mcs = phone.connect();
    assert_eq!(id(&mcs.message()), id(&notice));
    mcs.ack_all();
    phone.send(7);
    assert_eq!(n(&mcs.message()), 7);
}

#[test]
fn h115_after_unregistration_waiting_messages_are_not_delivered() {
    let phone = phone(shared());
    phone.send(1);
    phone.identity.register_form(phone.broker, &format!("app={APP}&delete=true"));
    phone.connect().no_message();
}

#[test]
fn h116_a_connected_device_receives_both_of_two_with_one_collapse_key() {
    let phone = phone(shared());
    let mut mcs = phone.connect();
    for number in [1, 2] {
        phone.send_with(number, &[("collapse_key", json!("k"))]);
        assert_eq!(n(&mcs.message()), number);
    }
}

#[test]
fn h112_dl_20_an_accepted_message_survives_kill_9_and_an_acknowledged_one_stays_away() {
    let mut broker = Broker::start();
    let (identity, token, told) = {
        let phone = phone(&broker);
        phone.send(1);
        let mut mcs = phone.connect();
        assert_eq!(n(&mcs.message()), 1);
        mcs.ack_all();
        drop(mcs);
        (phone.identity, phone.token.clone(), [phone.send(2), phone.send(3)])
    };
    broker.kill();
    broker.restart();
    let phone = Phone { broker: &broker, identity, token };
    let mut mcs = phone.connect();
    let arrived = [mcs.message(), mcs.message()];
    assert_eq!(arrived.each_ref().map(|message| id(message).to_owned()), told);
    mcs.no_message();
    mcs.ack_all();
    // The token lives on, and so does the identity.
    phone.send(4);
    assert_eq!(n(&mcs.message()), 4);
}

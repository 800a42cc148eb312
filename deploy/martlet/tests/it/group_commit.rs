//! What many sends at once cost on the disk, counted by the broker's own instrument.

use std::collections::BTreeSet;

use serde_json::json;

use crate::{
    app_server::{Http, send_json},
    broker::{Broker, ONE},
    device::check_in,
};

/// fdatasync calls of the log so far.
fn fdatasyncs(broker: &Broker) -> u64 {
    let metrics = Http::connect(&broker.address("admin")).request("GET", "/metrics", &[], b"");
    let line = metrics.text().lines().find_map(|line| line.strip_prefix("martlet_node_log_fdatasyncs_total "));
    line.unwrap().parse().unwrap()
}

#[test]
fn must_hold_1000_sends_at_once_to_16_groups_take_fewer_than_100_fdatasyncs() {
    let broker = Broker::start();
    // Enough devices to meet every one of the 16 shards, but for one chance in some thousands.
    let tokens: Vec<String> = (0..160).map(|_| check_in(&broker).register(&broker, "com.example.app", ONE.0)).collect();
    let thousand: Vec<&String> = tokens.iter().cycle().take(1_000).collect();
    let before = fdatasyncs(&broker);
    let answer =
        send_json(&broker.address("http"), ONE.1, &json!({ "registration_ids": thousand, "data": { "k": "v" } }));
    let taken = fdatasyncs(&broker) - before;
    let json = answer.json();
    assert_eq!(json["success"], 1_000);
    let ids: BTreeSet<_> =
        json["results"].as_array().unwrap().iter().map(|result| result["message_id"].to_string()).collect();
    assert_eq!(ids.len(), 1_000);
    println!("1,000 sends took {taken} fdatasync calls");
    assert!(taken > 0 && taken < 100, "{taken}");
}

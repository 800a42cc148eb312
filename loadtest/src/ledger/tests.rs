//! Histories that are right, and the same ones edited: each edit must be found.

use super::*;
use crate::history::What;

/// Two devices of one tenant; `a` gets three messages in order and acks them, `b` gets one.
fn right() -> Vec<Event> {
    let text = r#"
        {"t":0,"type":"register","token":"ta","device":"a","tenant":"p","app":"x"}
        {"t":0,"type":"register","token":"tb","device":"b","tenant":"p","app":"x"}
        {"t":0.1,"type":"connected","device":"a","session":"a1"}
        {"t":0.1,"type":"connected","device":"b","session":"b1"}
        {"t":1.0,"type":"send-invoked","op":"1","token":"ta","tenant":"p","ttl":60,"sha":"s1"}
        {"t":1.1,"type":"send-acked","op":"1","message_id":"m1"}
        {"t":1.2,"type":"delivered","device":"a","op":"1","tenant":"p","app":"x","sha":"s1","session":"a1"}
        {"t":2.0,"type":"send-invoked","op":"2","token":"ta","tenant":"p"}
        {"t":2.1,"type":"send-acked","op":"2","message_id":"m2"}
        {"t":2.2,"type":"delivered","device":"a","op":"2","session":"a1"}
        {"t":2.3,"type":"device-acked","device":"a","op":"2","confirmed":true}
        {"t":3.0,"type":"send-invoked","op":"3","token":"ta","tenant":"p"}
        {"t":3.1,"type":"send-acked","op":"3","message_id":"m3"}
        {"t":3.2,"type":"delivered","device":"a","message_id":"m3","session":"a1"}
        {"t":4.0,"type":"send-invoked","op":"4","token":"tb","tenant":"p"}
        {"t":4.1,"type":"send-unknown","op":"4","error":"500"}
        {"t":4.2,"type":"delivered","device":"b","op":"4","session":"b1"}
        {"t":5.0,"type":"send-invoked","op":"5","token":"tb","tenant":"p"}
        {"t":5.1,"type":"send-failed","op":"5","error":"Unavailable"}
        {"t":90,"type":"end"}"#;
    text.lines().filter(|line| !line.trim().is_empty()).map(|line| serde_json::from_str(line).unwrap()).collect()
}

fn rules(events: &[Event]) -> Vec<&'static str> {
    judge(events, &Terms::default()).violations.iter().map(|violation| violation.rule).collect()
}

fn event(text: &str) -> Event {
    serde_json::from_str(text).unwrap()
}

/// The right history with the delivery of `op` changed.
fn edited(op: &str, change: impl Fn(&mut Event)) -> Vec<Event> {
    let mut events = right();
    let found = events.iter_mut().find(|event| matches!(&event.what, What::Delivered { op: Some(o), .. } if o == op));
    change(found.unwrap());
    events
}

#[test]
fn a_right_history_is_kept_and_counted() {
    let verdict = judge(&right(), &Terms::default());
    assert_eq!(verdict.violations, []);
    assert_eq!((verdict.acked, verdict.failed, verdict.unknown), (3, 1, 1));
    assert_eq!((verdict.delivered, verdict.lost, verdict.duplicates), (4, 0, 0));
}

#[test]
fn one_message_lost_is_found() {
    let mut events = right();
    events.retain(|event| !matches!(&event.what, What::Delivered { op: Some(op), .. } if op == "2"));
    let verdict = judge(&events, &Terms::default());
    assert_eq!(verdict.lost, 1);
    assert_eq!(rules(&events), ["lost"]);
}

#[test]
fn a_message_lost_while_its_device_was_on_line_is_not_excused_by_its_time_to_live() {
    let mut events = right();
    events.retain(|event| !matches!(&event.what, What::Delivered { op: Some(op), .. } if op == "1"));
    assert_eq!(rules(&events), ["lost"]);
}

#[test]
fn a_message_whose_time_ran_out_before_its_device_came_is_excused() {
    let mut events = right();
    events.retain(|event| !matches!(&event.what, What::Delivered { op: Some(op), .. } if op == "1"));
    events.retain(|event| !matches!(&event.what, What::Connected { device, .. } if device == "a"));
    assert_eq!(rules(&events), [""; 0]);
}

#[test]
fn a_copy_at_a_wrong_device_is_found() {
    let mut events = right();
    events.insert(10, event(r#"{"t":2.3,"type":"delivered","device":"b","op":"2"}"#));
    assert_eq!(rules(&events), ["wrong device"]);
}

#[test]
fn a_late_message_is_found() {
    assert_eq!(rules(&edited("1", |event| event.t = 70.0)), ["after its time to live"]);
}

#[test]
fn a_message_out_of_order_is_found() {
    let mut events = right();
    events.swap(6, 13);
    assert!(rules(&events).contains(&"order"));
}

#[test]
fn a_refused_message_that_arrives_is_found() {
    let mut events = right();
    events.insert(19, event(r#"{"t":6,"type":"delivered","device":"b","op":"5"}"#));
    assert_eq!(rules(&events), ["refused and delivered"]);
}

#[test]
fn a_message_that_nobody_sent_is_found() {
    let mut events = right();
    events.insert(19, event(r#"{"t":6,"type":"delivered","device":"b","op":"9"}"#));
    assert_eq!(rules(&events), ["never sent"]);
}

#[test]
fn a_message_that_comes_again_after_a_confirmed_ack_is_found() {
    let mut events = right();
    events.insert(19, event(r#"{"t":6,"type":"delivered","device":"a","op":"2"}"#));
    assert_eq!(rules(&events), ["after a confirmed ack"]);
}

#[test]
fn a_second_arrival_without_a_confirmed_ack_is_allowed_and_counted() {
    let mut events = right();
    events.insert(19, event(r#"{"t":6,"type":"delivered","device":"a","op":"1"}"#));
    let verdict = judge(&events, &Terms::default());
    assert!(verdict.is_kept());
    assert_eq!(verdict.duplicates, 1);
}

#[test]
fn an_altered_payload_another_tenant_and_another_application_are_found() {
    let change = |field: &str, value: &str| {
        let mut events = right();
        let mut json = serde_json::to_value(&events[6]).unwrap();
        json[field] = value.into();
        events[6] = serde_json::from_value(json).unwrap();
        rules(&events)
    };
    assert_eq!(change("sha", "s2"), ["altered"]);
    assert_eq!(change("tenant", "q"), ["wrong tenant"]);
    assert_eq!(change("app", "y"), ["wrong application"]);
}

#[test]
fn a_message_after_unregistration_is_found() {
    let mut events = right();
    events.insert(18, event(r#"{"t":4.5,"type":"unregister","token":"tb"}"#));
    events.insert(20, event(r#"{"t":9,"type":"delivered","device":"b","op":"4"}"#));
    assert_eq!(rules(&events), ["after unregistration"]);
}

#[test]
fn two_acked_messages_with_one_id_are_found() {
    let mut events = right();
    events[8] = event(r#"{"t":2.1,"type":"send-acked","op":"2","message_id":"m1"}"#);
    assert_eq!(rules(&events), ["message id"]);
}

#[test]
fn the_limit_excuses_what_was_sent_before_its_notice() {
    let mut events = right();
    events.retain(|event| !matches!(&event.what, What::Delivered { op: Some(op), .. } if op == "2"));
    events.insert(17, event(r#"{"t":6,"type":"deleted-messages","device":"a"}"#));
    let verdict = judge(&events, &Terms::default());
    assert!(verdict.is_kept(), "{:?}", verdict.violations);
    assert_eq!(verdict.dropped_by_limit, 1);
}

#[test]
fn a_drop_reason_that_is_not_so_is_found() {
    let mut events = right();
    events.insert(19, event(r#"{"t":6,"type":"dropped","op":"3","reason":"collapse"}"#));
    assert_eq!(rules(&events), ["drop reason"]);
}

#[test]
fn a_collapsed_message_after_its_successor_is_found() {
    let text = r#"
        {"t":0,"type":"register","token":"ta","device":"a","tenant":"p"}
        {"t":1.0,"type":"send-invoked","op":"1","token":"ta","tenant":"p","collapse_key":"k"}
        {"t":1.1,"type":"send-acked","op":"1","message_id":"m1"}
        {"t":2.0,"type":"send-invoked","op":"2","token":"ta","tenant":"p","collapse_key":"k"}
        {"t":2.1,"type":"send-acked","op":"2","message_id":"m2"}
        {"t":9.0,"type":"connected","device":"a","session":"s"}
        {"t":9.1,"type":"delivered","device":"a","op":"2","session":"s"}
        {"t":90,"type":"end"}"#;
    let mut events: Vec<Event> = text.lines().filter(|l| !l.trim().is_empty()).map(event).collect();
    assert_eq!(rules(&events), [""; 0]);
    events.insert(7, event(r#"{"t":9.2,"type":"delivered","device":"a","op":"1","session":"s"}"#));
    assert_eq!(rules(&events), ["collapsed", "collapsed"]);
}

#[test]
fn a_run_that_did_too_little_is_no_run() {
    let terms = Terms { acked_min: 4, unknown_min: 2, ..Terms::default() };
    let verdict = judge(&right(), &terms);
    assert_eq!(verdict.violations.iter().filter(|violation| violation.rule == "no run").count(), 2);
}

#[test]
fn a_history_that_was_cut_is_not_called_kept() {
    let mut events = right();
    events.pop();
    assert_eq!(rules(&events), ["history"]);
}

#[test]
fn a_pause_in_acked_sends_is_found_where_asked_for() {
    let terms = Terms { gap_max_secs: Some(0.5), ..Terms::default() };
    assert_eq!(judge(&right(), &terms).violations.len(), 2);
}

#[test]
fn an_upstream_message_lost_or_at_another_tenant_is_found() {
    let text = r#"
        {"t":1,"type":"send-invoked","op":"1","token":"ta","tenant":"p"}
        {"t":1,"type":"register","token":"ta","device":"a","tenant":"p"}
        {"t":1.1,"type":"send-acked","op":"1"}
        {"t":1.2,"type":"delivered","device":"a","op":"1"}
        {"t":2,"type":"up-invoked","op":"u","device":"a","tenant":"p"}
        {"t":2.1,"type":"up-acked","op":"u"}
        {"t":2.2,"type":"up-delivered","op":"u","tenant":"p","conn":"c","device":"a"}
        {"t":90,"type":"end"}"#;
    let events: Vec<Event> = text.lines().filter(|l| !l.trim().is_empty()).map(event).collect();
    assert_eq!(rules(&events), [""; 0]);
    let mut lost = events.clone();
    lost.remove(6);
    assert_eq!(rules(&lost), ["lost"]);
    let mut astray = events;
    astray[6] = event(r#"{"t":2.2,"type":"up-delivered","op":"u","tenant":"q","conn":"c","device":"a"}"#);
    assert_eq!(rules(&astray), ["wrong tenant"]);
}

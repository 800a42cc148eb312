//! A device with too much waiting: what is dropped, and the notice of it.

use super::*;

fn notices(shard: &Shard) -> Vec<(Sequence, MailboxRow)> {
    shard.mailbox().into_iter().filter(|(_, row)| row.is_notice()).collect()
}

#[test]
fn h106_core_a_hundred_waiting_messages_stay() {
    let mut shard = Shard::new();
    let app = shard.register(instance(IID, 1));
    for _ in 0..100 {
        assert!(is_accepted(&shard.send(&app)));
    }
    assert_eq!(shard.mailbox().len(), 100);
    assert_eq!(notices(&shard), []);
}

#[test]
fn h107_core_the_101st_leaves_one_notice_with_their_number() {
    let mut shard = Shard::new();
    let app = shard.register(instance(IID, 1));
    for _ in 0..101 {
        assert!(is_accepted(&shard.send(&app)));
    }
    let mailbox = shard.mailbox();
    assert_eq!(mailbox.len(), 1);
    let notice = &mailbox[0].1;
    assert_eq!(notice.message.total_deleted, 101);
    assert_eq!(notice.message.wire_from, "1001");
    assert_eq!(notice.message.application, "app.one");
    assert_eq!(notice.message.payload, "");
    assert_eq!((shard.count().accepted, shard.count().overflow), (101, 101));
}

#[test]
fn h107_core_later_ones_raise_the_number_under_a_new_id() {
    let mut shard = Shard::new();
    let app = shard.register(instance(IID, 1));
    for _ in 0..101 {
        shard.send(&app);
    }
    let first = notices(&shard).pop().unwrap();
    shard.send(&app);
    let second = notices(&shard);
    assert_eq!(second.len(), 1);
    assert_eq!(second[0].1.message.total_deleted, 102);
    assert_ne!(second[0].1.message.message_id, first.1.message.message_id);
    assert_eq!(shard.mailbox().len(), 1);
}

#[test]
fn h107_core_once_the_notice_is_written_messages_wait_again() {
    let mut shard = Shard::new();
    let app = shard.register(instance(IID, 1));
    for _ in 0..101 {
        shard.send(&app);
    }
    let at = shard.places()[0];
    shard.send_written(&app, Some(at));
    assert_eq!(shard.mailbox().len(), 2);
    assert!(!shard.mailbox()[1].1.is_notice());
    shard.ack(&[at]);
    assert_eq!(shard.count().delivered, 0, "a notice is no message");
    assert_eq!(shard.mailbox().len(), 1);
}

#[test]
fn h108_core_waiting_collapsible_messages_survive_the_101st_and_are_not_counted() {
    let mut shard = Shard::new();
    let app = shard.register(instance(IID, 1));
    shard.operation(Kind::Enqueue(Enqueue { collapse_key: "score".into(), ..message(&app) }));
    for _ in 0..100 {
        shard.send(&app);
    }
    assert_eq!(shard.mailbox().len(), 101);
    shard.send(&app);
    let mailbox = shard.mailbox();
    assert_eq!(mailbox.len(), 2);
    assert_eq!(mailbox[0].1.message.collapse_key, "score");
    assert_eq!(mailbox[1].1.message.total_deleted, 101);
}

#[test]
fn the_limit_is_one_sender_of_one_application_and_subtype() {
    let mut shard = Shard::new();
    shard.limits.waiting_max = 2;
    let app = shard.register(legacy(&["1001", "1002"], 1));
    let other = shard.register(Register { application: "app.two".into(), ..instance(IID, 2) });
    let sub = shard.register(Register { subtype: "sub".into(), ..instance(IID, 3) });
    for _ in 0..2 {
        shard.send(&app);
        shard.send(&other);
        shard.send(&sub);
        shard.operation(Kind::Enqueue(Enqueue { sender: "1002".into(), ..message(&app) }));
    }
    assert_eq!(shard.mailbox().len(), 8);
    shard.send(&app);
    assert_eq!(shard.mailbox().len(), 7);
    assert_eq!(notices(&shard).len(), 1);
}

#[test]
fn dl_10_core_what_is_written_does_not_count_and_the_mark_is_remembered() {
    let mut shard = Shard::new();
    shard.limits.waiting_max = 3;
    let app = shard.register(instance(IID, 1));
    for _ in 0..3 {
        shard.send(&app);
    }
    let written = shard.places()[2];
    shard.send_written(&app, Some(written));
    // A new leader knows of nothing written; the state was told.
    shard.send_written(&app, None);
    shard.send_written(&app, Some(shard.places()[0]));
    assert_eq!(shard.mailbox().len(), 6);
    shard.send(&app);
    assert_eq!(shard.mailbox().len(), 4);
    assert_eq!(notices(&shard)[0].1.message.total_deleted, 4);
}

#[test]
fn written_and_unacked_messages_have_a_cap_and_the_oldest_go() {
    let mut shard = Shard::new();
    shard.limits.unacked_max = 2;
    let app = shard.register(instance(IID, 1));
    for _ in 0..4 {
        shard.send(&app);
    }
    let places = shard.places();
    shard.send_written(&app, Some(places[3]));
    assert_eq!(shard.places()[..2], places[2..]);
    assert_eq!(shard.count().overflow, 2);
    assert_eq!(notices(&shard), []);
}

#[test]
fn written_and_unacked_bytes_have_a_cap() {
    let mut shard = Shard::new();
    let app = shard.register(instance(IID, 1));
    for _ in 0..3 {
        shard.send(&app);
    }
    let places = shard.places();
    shard.limits.unacked_bytes_max = 0;
    shard.send_written(&app, Some(places[1]));
    assert_eq!(shard.places()[0], places[2]);
    assert_eq!(shard.mailbox().len(), 2);
}

#[test]
fn messages_that_have_run_out_do_not_count() {
    let mut shard = Shard::new();
    shard.limits.waiting_max = 1;
    let app = shard.register(instance(IID, 1));
    shard.send(&app);
    shard.now_ms += 3_600_000;
    shard.send(&app);
    assert_eq!(notices(&shard), []);
}

#[test]
fn a_device_that_acks_promptly_costs_no_row_of_its_own() {
    let mut shard = Shard::new();
    let app = shard.register(instance(IID, 1));
    shard.send(&app);
    let at = shard.places()[0];
    shard.ack(&[at]);
    let row = |shard: &Shard| shard.rows.iter().find(|(key, _)| key::Family::Device.is_of(key)).unwrap().1.clone();
    let before = row(&shard);
    shard.send_written(&app, Some(at));
    assert_eq!(row(&shard), before);
}

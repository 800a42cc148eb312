//! Messages that take the place of others.

use super::*;

/// What waits, in order: collapse key and message id's last byte.
fn keys(shard: &Shard) -> Vec<String> {
    shard.mailbox().into_iter().map(|(_, row)| row.message.collapse_key).collect()
}

#[test]
fn h101_core_of_one_key_the_later_message_waits_at_its_own_place() {
    let mut shard = Shard::new();
    let app = shard.register(instance(IID, 1));
    shard.send_key(&app, "score");
    let first = shard.mailbox().pop().unwrap();
    shard.send(&app);
    assert!(is_accepted(&shard.send_key(&app, "score")));
    assert_eq!(keys(&shard), ["", "score"]);
    assert_ne!(shard.mailbox()[1].1.message.message_id, first.1.message.message_id);
    assert_eq!((shard.count().accepted, shard.count().collapsed), (3, 1));
}

#[test]
fn h102_core_four_keys_wait_together() {
    let mut shard = Shard::new();
    let app = shard.register(instance(IID, 1));
    for key in ["a", "b", "c", "d"] {
        shard.send_key(&app, key);
    }
    assert_eq!(keys(&shard), ["a", "b", "c", "d"]);
}

#[test]
fn h103_core_a_fifth_key_drives_out_the_oldest() {
    let mut shard = Shard::new();
    let app = shard.register(instance(IID, 1));
    for key in ["a", "b", "c", "d", "a", "e"] {
        shard.send_key(&app, key);
    }
    assert_eq!(keys(&shard), ["c", "d", "a", "e"], "b waited longest");
    assert_eq!(shard.count().collapsed, 2);
}

#[test]
fn h104_core_another_application_subtype_or_sender_has_keys_of_its_own() {
    let mut shard = Shard::new();
    let app = shard.register(legacy(&["1001", "1002"], 1));
    let other = shard.register(Register { application: "app.two".into(), ..instance(IID, 2) });
    let sub = shard.register(Register { subtype: "sub".into(), ..instance(IID, 3) });
    for key in ["a", "b", "c", "d"] {
        shard.send_key(&app, key);
        shard.send_key(&other, key);
        shard.send_key(&sub, key);
        let of_another = Enqueue { sender: "1002".into(), collapse_key: key.into(), ..message(&app) };
        shard.operation(Kind::Enqueue(of_another));
    }
    assert_eq!(shard.mailbox().len(), 16);
    assert_eq!(shard.count().collapsed, 0);
}

#[test]
fn h114_core_messages_to_an_old_and_a_new_token_collapse_together() {
    let mut shard = Shard::new();
    let old = shard.register(instance(IID, 1));
    let new = shard.register(instance(IID_2, 2));
    shard.send_key(&old, "score");
    shard.send_key(&new, "score");
    assert_eq!(keys(&shard), ["score"]);
}

#[test]
fn h116_core_what_was_written_is_neither_a_waiting_key_nor_written_again() {
    let mut shard = Shard::new();
    let app = shard.register(instance(IID, 1));
    for key in ["a", "b", "c", "d"] {
        shard.send_key(&app, key);
    }
    let written = shard.places()[3];
    let of = |key: &str| Kind::Enqueue(Enqueue { collapse_key: key.into(), ..message(&app) });
    let next = shard.tried_now(of("e"));
    shard.stamped(next, Some(written));
    assert_eq!(keys(&shard), ["a", "b", "c", "d", "e"], "four were written: one key waits");
    shard.send_key(&app, "a");
    assert_eq!(keys(&shard), ["b", "c", "d", "e", "a"], "a device that comes back has the newest only");
    assert_eq!(shard.count().collapsed, 1);
}

#[test]
fn a_message_that_has_run_out_is_expired_and_not_collapsed() {
    let mut shard = Shard::new();
    let app = shard.register(instance(IID, 1));
    let brief = Enqueue { collapse_key: "a".into(), ttl_secs: 1, ..message(&app) };
    shard.operation(Kind::Enqueue(brief));
    shard.now_ms += 1_000;
    shard.send_key(&app, "a");
    assert_eq!((shard.count().collapsed, shard.mailbox().len()), (0, 2));
    shard.expire(10);
    assert_eq!((shard.count().expired, shard.mailbox().len()), (1, 1));
}

#[test]
fn a_message_in_place_of_another_needs_room_for_the_difference_only() {
    let mut shard = Shard::new();
    let app = shard.register(instance(IID, 1));
    shard.send_key(&app, "a");
    let bytes = shard.count().stored_bytes;
    shard.limits.device_bytes_max = bytes;
    shard.limits.project_bytes_max = bytes;
    assert!(is_accepted(&shard.send_key(&app, "a")));
    assert_eq!(refusal(&shard.send_key(&app, "b")), Some(Refusal::QuotaExceeded));
    assert_eq!((keys(&shard), shard.count().accepted), (vec!["a".to_owned()], 2));
}

#[test]
fn a_projects_bytes_are_its_own_and_come_free_with_its_messages() {
    let mut shard = Shard::new();
    let app = shard.register(legacy(&["1001", "1002"], 1));
    shard.send(&app);
    shard.limits.project_bytes_max = shard.count().stored_bytes;
    assert_eq!(refusal(&shard.send(&app)), Some(Refusal::QuotaExceeded));
    let of_another = Enqueue { sender: "1002".into(), ..message(&app) };
    assert!(is_accepted(&shard.operation(Kind::Enqueue(of_another))));
    let first = shard.places()[0];
    shard.ack(&[first]);
    assert_eq!(shard.count().stored_bytes, 0);
    assert!(is_accepted(&shard.send(&app)));
}

//! Enqueues: what is stored, refused and answered.

use martlet_proto::cluster::queue::Check;

use super::*;

#[test]
fn dl_02_core_messages_wait_in_the_order_in_which_they_came() {
    let mut shard = Shard::new();
    let app = shard.register(instance(IID, 1));
    let first = shard.tried_now(Kind::Enqueue(message(&app)));
    let second = shard.tried_now(Kind::Enqueue(message(&app)));
    let (one, two) = (shard.stamp(first.clone(), None), shard.stamp(second.clone(), None));
    let applied = shard.apply(vec![one, two]);

    assert!(applied.answers.iter().flatten().all(is_accepted));
    let mailbox = shard.mailbox();
    assert_eq!(mailbox.iter().map(|(at, _)| (at.index, at.position)).collect::<Vec<_>>(), [(2, 0), (2, 1)]);
    assert_eq!(mailbox[0].1.message.message_id, first.id);
    assert_eq!(mailbox[1].1.message.message_id, second.id);
    assert_eq!(waiting(&shard.rows, DeviceTag(PHONE), Some(mailbox[0].0), 9).unwrap(), mailbox[1..]);
}

#[test]
fn dl_19_core_a_message_carries_application_and_subtype_of_its_registration() {
    let mut shard = Shard::new();
    let app = shard.register(Register { subtype: "wp:https://a#1".into(), ..instance(IID, 1) });
    let sent = Enqueue { collapse_key: "score".into(), receipt_wanted: true, ..message(&app) };
    shard.operation(Kind::Enqueue(sent));

    let (_, row) = shard.mailbox().pop().unwrap();
    assert_eq!(row.message.application, "app.one");
    assert_eq!(row.message.subtype, "wp:https://a#1");
    assert_eq!(row.message.wire_from, "1001");
    assert_eq!(row.message.collapse_key, "score");
    assert_eq!(row.message.accepted_ms, START_MS);
    assert_eq!(row.message.payload, "payload");
    assert!(row.message.receipt_wanted);
    assert_eq!(row.expiry_ms, START_MS + 3_600_000);
}

#[test]
fn h070_h071_core_only_senders_of_the_registration_may_send() {
    let mut shard = Shard::new();
    let app = shard.register(legacy(&["1001", "1002"], 1));
    for sender in ["1001", "1002"] {
        let answer = shard.operation(Kind::Enqueue(Enqueue { sender: sender.into(), ..message(&app) }));
        assert!(is_accepted(&answer));
    }
    let answer = shard.operation(Kind::Enqueue(Enqueue { sender: "1003".into(), ..message(&app) }));
    assert_eq!(refusal(&answer), Some(Refusal::MismatchSenderId));
}

#[test]
fn h069_core_a_restricted_package_must_be_the_application() {
    let mut shard = Shard::new();
    let app = shard.register(instance(IID, 1));
    let mut to = |package: &str| {
        shard.operation(Kind::Enqueue(Enqueue { restricted_package_name: package.into(), ..message(&app) }))
    };
    assert!(is_accepted(&to("app.one")));
    assert_eq!(refusal(&to("app.two")), Some(Refusal::InvalidPackageName));
}

#[test]
fn a_stranger_is_not_registered_before_it_is_anything_else() {
    let mut shard = Shard::new();
    let app = shard.register(instance(IID, 1));
    let nobody = RegistrationRef { registration_id: vec![9; 16].into(), ..app };
    let answer = shard.operation(Kind::Enqueue(Enqueue { sender: "1003".into(), ..message(&nobody) }));
    assert_eq!(refusal(&answer), Some(Refusal::NotRegistered));
    assert_eq!(shard.count().accepted, 0);
}

#[test]
fn h074_core_a_check_answers_as_an_enqueue_would_and_changes_nothing() {
    let mut shard = Shard::new();
    let app = shard.register(instance(IID, 1));
    let check = |sender: &str, package: &str| Check {
        device_tag: PHONE,
        registration_id: app.registration_id.clone(),
        sender: sender.into(),
        restricted_package_name: package.into(),
    };
    let check = |sender, package| shard.state.check(&shard.rows, &check(sender, package)).unwrap();
    assert!(is_accepted(&check("1001", "")));
    assert_eq!(refusal(&check("1002", "")), Some(Refusal::MismatchSenderId));
    assert_eq!(refusal(&check("1001", "app.two")), Some(Refusal::InvalidPackageName));
    assert_eq!(shard.mailbox(), []);
}

#[test]
fn h109_core_a_message_for_now_or_never_is_accepted_and_never_waits() {
    let mut shard = Shard::new();
    let app = shard.register(instance(IID, 1));
    assert!(is_accepted(&shard.operation(Kind::Enqueue(Enqueue { ttl_secs: 0, ..message(&app) }))));
    assert_eq!(shard.mailbox(), []);
    assert_eq!((shard.count().accepted, shard.count().expired), (1, 1));
}

#[test]
fn a_device_over_its_stored_bytes_is_refused_and_keeps_what_it_has() {
    let mut shard = Shard::new();
    shard.limits.device_bytes_max = 6000;
    let app = shard.register(instance(IID, 1));
    let big = Enqueue { payload: vec![0; 4096].into(), ..message(&app) };
    assert!(is_accepted(&shard.operation(Kind::Enqueue(big.clone()))));
    assert_eq!(refusal(&shard.operation(Kind::Enqueue(big))), Some(Refusal::QuotaExceeded));
    assert!(is_accepted(&shard.send(&app)));
    assert_eq!(shard.mailbox().len(), 2);
}

/// Today's behaviour, until collapse keys collapse: H101 wants the second alone.
#[test]
fn a_message_without_limits_stamped_by_a_leader_is_malformed() {
    let mut shard = Shard::new();
    let app = shard.register(instance(IID, 1));
    let operation = Some(shard.tried_now(Kind::Enqueue(message(&app))));
    let applied = shard.one(command::Kind::Stamped(Stamped { operation, ..Default::default() }));
    assert_eq!(applied.answers[0].as_ref().and_then(refusal), Some(Refusal::Malformed));
}

#[test]
fn what_is_malformed_is_answered_so_and_does_not_stop_the_shard() {
    let mut shard = Shard::new();
    let app = shard.register(instance(IID, 1));
    let short = Enqueue { registration_id: Bytes::from_static(b"short"), ..message(&app) };
    let long_lived = Enqueue { ttl_secs: 2_419_201, ..message(&app) };
    for kind in [Kind::Enqueue(short), Kind::Enqueue(long_lived), Kind::Check(Check::default())] {
        assert_eq!(refusal(&shard.operation(kind)), Some(Refusal::Malformed));
    }
    let nameless = Operation { id: Bytes::new(), ..shard.tried_now(Kind::Enqueue(message(&app))) };
    assert_eq!(refusal(&shard.stamped(nameless, None)), Some(Refusal::Malformed));
    let empty = Operation { kind: None, ..shard.tried_now(Kind::Enqueue(message(&app))) };
    assert_eq!(refusal(&shard.stamped(empty, None)), Some(Refusal::Malformed));
    let future = Sequence { incarnation: 0, index: u64::MAX, position: 0 };
    assert_eq!(refusal(&shard.send_written(&app, Some(future))), Some(Refusal::Malformed));
}

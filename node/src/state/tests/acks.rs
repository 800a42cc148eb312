//! Acknowledgements: what they remove, and what they leave.

use super::*;

#[test]
fn dl_04_core_an_acked_message_is_gone_and_counted_delivered() {
    let mut shard = Shard::new();
    let app = shard.register(instance(IID, 1));
    shard.send(&app);
    shard.send(&app);
    let places = shard.places();
    shard.ack(&places[..1]);
    assert_eq!(shard.places(), places[1..]);
    assert_eq!(shard.count().delivered, 1);
}

#[test]
fn dl_06_dl_07_core_an_ack_by_message_id_removes_exactly_what_it_names() {
    let mut shard = Shard::new();
    let app = shard.register(instance(IID, 1));
    for _ in 0..3 {
        shard.send(&app);
    }
    let middle = shard.mailbox()[1].1.message.message_id.clone();
    let message_ids = vec![middle.clone(), id(4711), Bytes::from_static(b"junk"), middle.clone()];
    shard.device_ack(DeviceAck { device_tag: PHONE, sequences: vec![], message_ids, gateway: 0 });
    assert!(shard.mailbox().iter().all(|(_, row)| row.message.message_id != middle));
    assert_eq!(shard.mailbox().len(), 2);
}

#[test]
fn unknown_and_repeated_acks_are_passed_over() {
    let mut shard = Shard::new();
    let app = shard.register(instance(IID, 1));
    shard.send(&app);
    let at = shard.places()[0];
    shard.ack(&[at, at, Sequence { incarnation: 9, ..at }]);
    shard.ack(&[at]);
    let junk =
        DeviceAck { device_tag: PHONE, sequences: vec![Bytes::from_static(b"?")], message_ids: vec![], gateway: 0 };
    shard.device_ack(junk);
    assert_eq!(shard.count().delivered, 1);
}

#[test]
fn an_ack_of_one_device_leaves_the_mailbox_of_another_alone() {
    let mut shard = Shard::new();
    let app = shard.register(instance(IID, 1));
    shard.send(&app);
    let (at, row) = shard.mailbox().pop().unwrap();
    let sequences = vec![at.to_bytes().to_vec().into()];
    shard.device_ack(DeviceAck {
        device_tag: PHONE + 1,
        sequences,
        message_ids: vec![row.message.message_id],
        gateway: 0,
    });
    assert_eq!(shard.mailbox().len(), 1);
}

#[test]
fn a_message_enqueued_and_acked_in_one_entry_leaves_no_trace_in_the_mailbox() {
    let mut shard = Shard::new();
    let app = shard.register(instance(IID, 1));
    let operation = shard.tried_now(Kind::Enqueue(message(&app)));
    let ack = DeviceAck { device_tag: PHONE, sequences: vec![], message_ids: vec![operation.id.clone()], gateway: 0 };
    let enqueue = shard.stamp(operation, None);
    let applied = shard.apply(vec![enqueue, Command { kind: Some(command::Kind::Acks(Acks { acks: vec![ack] })) }]);
    let of_messages = |write: &&super::super::Write| {
        let key = match write {
            super::super::Write::Put { key, .. } => key,
            super::super::Write::Remove { key } => key,
            super::super::Write::Append { key, .. } => key,
        };
        [key::Family::Mailbox, key::Family::Expiry].iter().any(|family| family.is_of(key))
    };
    assert_eq!(applied.writes.iter().filter(of_messages).count(), 0);
    assert_eq!(shard.count().delivered, 1);
}

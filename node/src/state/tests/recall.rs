//! Messages that an operator takes back.

use martlet_proto::cluster::queue::{Recall, RecallKey, recall};

use super::*;

fn count(answer: &Answer) -> u32 {
    match answer.kind {
        Some(Answered::Recalled(recalled)) => recalled.count,
        ref other => panic!("not recalled: {other:?}"),
    }
}

fn by_id(device_tag: u64, id: Bytes) -> Kind {
    Kind::Recall(Recall { device_tag, what: Some(recall::What::MessageId(id)) })
}

fn by_key(registration_id: Bytes, collapse_key: &str) -> Kind {
    let what = recall::What::CollapseKey(RecallKey { registration_id, collapse_key: collapse_key.into() });
    Kind::Recall(Recall { device_tag: PHONE, what: Some(what) })
}

#[test]
fn a_recalled_message_is_gone_and_counted_once() {
    let mut shard = Shard::new();
    let app = shard.register(instance(IID, 1));
    shard.send(&app);
    shard.send(&app);
    let id = shard.mailbox()[0].1.message.message_id.clone();
    assert_eq!(count(&shard.operation(by_id(PHONE, id.clone()))), 1);
    assert_eq!(count(&shard.operation(by_id(PHONE, id.clone()))), 0);
    assert_eq!(count(&shard.operation(by_id(PHONE + 1, id))), 0, "of another device");
    assert_eq!((shard.mailbox().len(), shard.count().recalled), (1, 1));
}

#[test]
fn a_key_is_recalled_for_the_registration_that_an_old_token_stands_for() {
    let mut shard = Shard::new();
    let old = shard.register(instance(IID, 1));
    let new = shard.register(instance(IID_2, 2));
    let other = shard.register(Register { application: "app.two".into(), ..instance(IID, 3) });
    for to in [&new, &other] {
        shard.send_key(to, "a");
        shard.send_key(to, "b");
        shard.send(to);
    }
    assert_eq!(count(&shard.operation(by_key(old.registration_id, "a"))), 1);
    assert_eq!(shard.mailbox().len(), 5);
    assert_eq!(refusal(&shard.operation(by_key(vec![9; 16].into(), "a"))), Some(Refusal::NotRegistered));
    assert_eq!(refusal(&shard.operation(by_key(new.registration_id, ""))), Some(Refusal::Malformed));
}

#[test]
fn a_notice_is_no_message_to_take_back() {
    let mut shard = Shard::new();
    shard.limits.waiting_max = 1;
    let app = shard.register(instance(IID, 1));
    shard.send(&app);
    shard.send(&app);
    let notice = shard.mailbox().pop().unwrap().1;
    assert!(notice.is_notice());
    assert_eq!(count(&shard.operation(by_id(PHONE, notice.message.message_id))), 0);
    assert_eq!(shard.mailbox().len(), 1);
}

#[test]
fn what_has_run_out_is_not_recalled() {
    let mut shard = Shard::new();
    let app = shard.register(instance(IID, 1));
    shard.send(&app);
    let id = shard.mailbox()[0].1.message.message_id.clone();
    shard.now_ms += 3_600_000;
    assert_eq!(count(&shard.operation(by_id(PHONE, id))), 0);
    assert_eq!(shard.count().recalled, 0);
}

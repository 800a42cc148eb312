//! Messages and registrations that run out.

use super::*;

#[test]
fn h111_core_a_message_whose_time_ran_out_is_removed_and_counted() {
    let mut shard = Shard::new();
    let app = shard.register(instance(IID, 1));
    shard.send(&app);
    assert_eq!(shard.state.next_due_ms(&shard.rows).unwrap(), Some(START_MS + 3_600_000));
    shard.now_ms += 3_599_999;
    shard.expire(1000);
    assert_eq!(shard.mailbox()[0].1.remaining_ms(shard.now_ms), 1);
    shard.now_ms += 1;
    assert_eq!(shard.mailbox()[0].1.remaining_ms(shard.now_ms), 0);
    shard.expire(1000);
    assert_eq!(shard.mailbox(), []);
    assert_eq!(shard.count().expired, 1);
    assert_eq!(shard.state.next_due_ms(&shard.rows).unwrap(), None);
}

#[test]
fn nothing_expires_before_shard_time_whatever_the_command_says() {
    let mut shard = Shard::new();
    let app = shard.register(instance(IID, 1));
    shard.send(&app);
    shard.one(command::Kind::Expire(Expire { upto_ms: u64::MAX, rows_max: 1000 }));
    assert_eq!(shard.mailbox().len(), 1);
}

#[test]
fn an_expire_removes_at_most_what_it_may_earliest_first() {
    let mut shard = Shard::new();
    let app = shard.register(instance(IID, 1));
    for ttl_secs in [30, 10, 20] {
        shard.operation(Kind::Enqueue(Enqueue { ttl_secs, ..message(&app) }));
    }
    shard.now_ms += 60_000;
    shard.expire(2);
    assert_eq!(shard.mailbox()[0].1.message.ttl_secs, 30);
    assert_eq!(shard.mailbox().len(), 1);
    shard.expire(2);
    assert_eq!(shard.mailbox(), []);
}

#[test]
fn rg_21_core_a_registration_runs_out_with_what_waits_for_it() {
    let mut shard = Shard::new();
    let app = shard.register(Register { ttl_secs: 60, ..instance(IID, 1) });
    for _ in 0..3 {
        shard.send(&app);
    }
    assert_eq!(shard.state.next_due_ms(&shard.rows).unwrap(), Some(START_MS + 60_000));
    shard.now_ms += 60_000;
    assert_eq!(refusal(&shard.send(&app)), Some(Refusal::NotRegistered));
    // In bounded steps: the registration stays until the last of its messages is gone.
    let applied = shard.expire(2);
    assert_eq!(applied.effects.len(), 2);
    let applied = shard.expire(2);
    assert!(matches!(applied.effects[..], [Effect::Removed { .. }, Effect::RegistrationGone { .. }]));
    assert_eq!(shard.count().unregistered, 3);
    assert_eq!(shard.state.next_due_ms(&shard.rows).unwrap(), None);
}

#[test]
fn a_repeated_registration_moves_its_end() {
    let mut shard = Shard::new();
    let app = shard.register(Register { ttl_secs: 60, ..instance(IID, 1) });
    shard.now_ms += 30_000;
    assert_eq!(shard.register(Register { ttl_secs: 60, ..instance(IID, 2) }), app);
    shard.now_ms += 59_999;
    assert!(is_accepted(&shard.send(&app)));
    assert_eq!(shard.register(instance(IID, 3)), app);
    shard.expire(1000);
    shard.now_ms += 1_000_000;
    assert!(is_accepted(&shard.send(&app)));
}

#[test]
fn a_registration_that_ran_out_is_made_anew() {
    let mut shard = Shard::new();
    let old = shard.register(Register { ttl_secs: 60, ..instance(IID, 1) });
    shard.now_ms += 60_000;
    let new = shard.register(instance(IID, 2));
    assert_ne!(new.registration_id, old.registration_id);
    assert_eq!(refusal(&shard.send(&old)), Some(Refusal::NotRegistered));
    shard.expire(1000);
    assert!(is_accepted(&shard.send(&new)));
}

#[test]
fn a_superseded_registration_works_for_30_days() {
    let mut shard = Shard::new();
    let old = shard.register(instance(IID, 1));
    let new = shard.register(instance(IID_2, 2));
    shard.now_ms += super::super::registry::SUPERSEDED_LIFE_MS - 1;
    shard.expire(1000);
    assert_eq!(canonical(&shard.send(&old)), Some(new.clone()));
    shard.now_ms += 1;
    assert_eq!(refusal(&shard.send(&old)), Some(Refusal::NotRegistered));
    shard.expire(1000);
    assert_eq!(shard.rows.iter().filter(|(key, _)| key::Family::Registration.is_of(key)).count(), 1);
    assert!(is_accepted(&shard.send(&new)));
}

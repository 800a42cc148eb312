//! Shard time, versions, and what stops a replica.

use martlet_proto::cluster::command::Raise;

use super::*;
use crate::state::{ApplyError, VERSION_KNOWN};

#[test]
fn shard_time_never_falls() {
    let mut shard = Shard::new();
    let app = shard.register(instance(IID, 1));
    shard.now_ms -= 10_000;
    shard.send(&app);
    assert_eq!(shard.state.time_ms(), START_MS);
    assert_eq!(shard.mailbox()[0].1.message.accepted_ms, START_MS);
}

#[test]
fn a_version_that_is_known_is_taken_and_one_that_is_not_stops_the_replica() {
    let mut shard = Shard::new();
    assert_eq!(shard.state.version(), 1);
    shard.one(command::Kind::Raise(Raise { version: VERSION_KNOWN }));
    assert_eq!(shard.state.version(), VERSION_KNOWN);
    shard.one(command::Kind::Raise(Raise { version: 0 }));
    assert_eq!(shard.state.version(), VERSION_KNOWN);
    let ahead = Command { kind: Some(command::Kind::Raise(Raise { version: VERSION_KNOWN + 1 })) };
    let error = fail(&mut shard, vec![ahead]);
    assert!(matches!(error.source, StateError::Version { .. }));
}

#[test]
fn rows_of_a_version_that_is_not_known_are_not_taken_up() {
    let mut rows = MemoryRows::default();
    let row = key::shard::ShardRow { version: VERSION_KNOWN + 1, ..Default::default() };
    rows.put_raw(key::shard::key(), key::shard::encode(&row));
    assert!(matches!(State::load(&rows), Err(StateError::Version { .. })));
}

#[test]
fn an_entry_that_fails_leaves_the_state_as_it_was_and_says_where() {
    let mut shard = Shard::new();
    let app = shard.register(instance(IID, 1));
    let operation = shard.tried_now(Kind::Enqueue(message(&app)));
    let send = shard.stamp(operation, None);
    let error = fail(&mut shard, vec![send, Command { kind: None }]);
    assert_eq!((error.index, error.position), (2, 1));
    assert!(matches!(error.source, StateError::UnknownCommand));
}

#[test]
fn a_bad_row_stops_the_replica() {
    let mut shard = Shard::new();
    let app = shard.register(instance(IID, 1));
    shard.send(&app);
    let at = shard.places()[0];
    shard.rows.put_raw(key::mailbox::key(DeviceTag(PHONE), at), Bytes::from_static(b"\xff"));
    // Started again, it has no copy of the row that was good.
    shard.state = State::load(&shard.rows).unwrap();
    let operation = shard.tried_now(Kind::Enqueue(message(&app)));
    let send = shard.stamp(operation, None);
    assert!(matches!(fail(&mut shard, vec![send]).source, StateError::BadRow(_)));
}

#[test]
fn a_message_missing_from_its_mailbox_stops_the_replica() {
    let mut shard = Shard::new();
    let nobody = key::expiry::key(1, DeviceTag(PHONE), Sequence { incarnation: 0, index: 1, position: 0 });
    shard.rows.put_raw(nobody, Bytes::new());
    let expire = Command { kind: Some(command::Kind::Expire(Expire { upto_ms: u64::MAX, rows_max: 10 })) };
    assert!(broken(&fail(&mut shard, vec![expire]).source));
}

#[cfg(feature = "bugs")]
#[test]
fn a_panic_in_a_command_keeps_nothing_of_its_entry_and_is_named() {
    crate::bug::poison();
    let mut shard = Shard::new();
    let app = shard.register(instance(IID, 1));
    let fine = shard.tried_now(Kind::Enqueue(message(&app)));
    let poison = Enqueue { payload: Bytes::from_static(crate::bug::POISON), ..message(&app) };
    let poison = shard.tried_now(Kind::Enqueue(poison));
    let commands = vec![shard.stamp(fine, None), shard.stamp(poison, None)];
    let error = fail(&mut shard, commands);
    assert!(error.is_of_the_entry());
    assert_eq!(error.operation(), "command 1, Enqueue");
    assert_eq!(error.source.to_string(), "panicked: poisoned by a test");
    assert_eq!(shard.mailbox(), []);
    assert!(is_accepted(&shard.send(&app)), "the state goes on");
}

/// Applies an entry that must fail, and sees that nothing of it happened.
fn fail(shard: &mut Shard, commands: Vec<Command>) -> ApplyError {
    let before = shard.state.clone();
    let entry = Entry { shard_time_ms: shard.now_ms + 5000, commands, term: 0 };
    let error = shard.state.apply(&shard.rows, shard.index + 1, &entry).unwrap_err();
    assert_eq!(shard.state, before);
    error
}

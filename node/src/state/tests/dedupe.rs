//! An operation that comes again is answered as it was, and done once.

use super::*;

fn resolved(answer: &Answer) -> Option<Answer> {
    match &answer.kind {
        Some(Answered::Resolved(resolved)) => resolved.answer.as_deref().cloned(),
        other => panic!("not resolved: {other:?}"),
    }
}

#[test]
fn an_operation_tried_again_is_answered_as_first_and_done_once() {
    let mut shard = Shard::new();
    let app = shard.register(instance(IID, 1));
    let send = shard.tried_now(Kind::Enqueue(message(&app)));
    let first = shard.stamped(send.clone(), None);
    shard.now_ms += 59_000;
    assert_eq!(shard.stamped(send.clone(), None), first);
    let (one, two) = (shard.stamp(send.clone(), None), shard.stamp(send, None));
    shard.apply(vec![one, two]);
    assert_eq!(shard.mailbox().len(), 1);
    assert_eq!(shard.count().accepted, 1);
}

#[test]
fn a_refusal_and_a_registration_are_answered_as_first_too() {
    let mut shard = Shard::new();
    let register = shard.tried_now(Kind::Register(instance(IID, 1)));
    let registered = shard.stamped(register.clone(), None);
    let Some(Answered::Registered(made)) = &registered.kind else { panic!() };
    assert!(made.created);
    assert_eq!(shard.stamped(register, None), registered);

    let stranger = RegistrationRef { registration_id: vec![2; 16].into(), ..made.registration.clone().unwrap() };
    let send = shard.tried_now(Kind::Enqueue(message(&stranger)));
    assert_eq!(refusal(&shard.stamped(send.clone(), None)), Some(Refusal::NotRegistered));
    shard.register(Register { subtype: "sub".into(), ..instance(IID, 2) });
    assert_eq!(refusal(&shard.stamped(send, None)), Some(Refusal::NotRegistered));
}

#[test]
fn a_repeat_in_the_same_entry_is_one() {
    let mut shard = Shard::new();
    let app = shard.register(instance(IID, 1));
    let send = shard.tried_now(Kind::Enqueue(message(&app)));
    let (one, two) = (shard.stamp(send.clone(), None), shard.stamp(send, None));
    let applied = shard.apply(vec![one, two]);
    assert_eq!(applied.answers[0], applied.answers[1]);
    assert_eq!(shard.mailbox().len(), 1);
}

#[test]
fn an_operation_first_tried_before_the_window_is_refused() {
    let mut shard = Shard::new();
    let app = shard.register(instance(IID, 1));
    let send = shard.tried_now(Kind::Enqueue(message(&app)));
    shard.now_ms += 60_001;
    assert_eq!(refusal(&shard.stamped(send, None)), Some(Refusal::ExpiredOperation));
    assert_eq!(shard.mailbox(), []);
}

#[test]
fn an_operation_first_tried_ahead_of_time_is_refused_for_ever() {
    let mut shard = Shard::new();
    let app = shard.register(instance(IID, 1));
    let ahead = |shard: &mut Shard, by_ms| Operation {
        first_try_ms: shard.now_ms + by_ms,
        ..shard.tried_now(Kind::Enqueue(message(&app)))
    };
    let (just, far) = (ahead(&mut shard, 1000), ahead(&mut shard, 1001));
    assert!(is_accepted(&shard.stamped(just, None)));
    assert_eq!(refusal(&shard.stamped(far.clone(), None)), Some(Refusal::ExpiredOperation));
    shard.now_ms += 5000;
    assert_eq!(refusal(&shard.stamped(far, None)), Some(Refusal::ExpiredOperation));
    assert_eq!(shard.mailbox().len(), 1);
}

#[test]
fn what_was_refused_as_ahead_of_time_is_never_done_as_long_as_it_is_in_time() {
    let mut shard = Shard::new();
    let app = shard.register(instance(IID, 1));
    let window_ms = shard.limits.dedupe_window_ms;
    // Late in a second, so that what lies ahead is in another.
    shard.now_ms += 900;
    let (begun, mut ahead) = (shard.now_ms, Vec::new());
    for by_ms in [1001, 1500, 30_000, 60_000] {
        let send = shard.tried_now(Kind::Enqueue(message(&app)));
        ahead.push(Operation { first_try_ms: begun + by_ms, ..send });
    }
    let mut now_ms = begun;
    while now_ms <= begun + 2 * window_ms + 2000 {
        shard.now_ms = now_ms;
        // What else is tried lets go of what is older than the window.
        let other = shard.tried_now(Kind::Unregister(Unregister { device_tag: PHONE, ..Default::default() }));
        shard.stamped(other, None);
        for send in &ahead {
            assert_eq!(refusal(&shard.stamped(send.clone(), None)), Some(Refusal::ExpiredOperation), "{now_ms}");
        }
        now_ms += 100;
    }
    assert_eq!(shard.mailbox(), []);
}

#[test]
fn what_lies_ahead_by_more_than_the_window_is_refused_and_not_remembered() {
    let mut shard = Shard::new();
    let app = shard.register(instance(IID, 1));
    let (known, window_ms) = (shard.state.operations_known(), shard.limits.dedupe_window_ms);
    for by_ms in [window_ms + 1, u64::MAX - shard.now_ms] {
        let send = shard.tried_now(Kind::Enqueue(message(&app)));
        let send = Operation { first_try_ms: shard.now_ms + by_ms, ..send };
        assert_eq!(refusal(&shard.stamped(send, None)), Some(Refusal::ExpiredOperation));
    }
    assert_eq!(shard.state.operations_known(), known);
}

#[test]
fn resolve_tells_the_answer_of_what_was_done() {
    let mut shard = Shard::new();
    let app = shard.register(instance(IID, 1));
    let send = shard.tried_now(Kind::Enqueue(message(&app)));
    let answer = shard.stamped(send.clone(), None);
    assert_eq!(resolved(&shard.operation(resolve(&send))), Some(answer));
}

#[test]
fn resolve_bars_what_was_not_done_for_ever() {
    let mut shard = Shard::new();
    let app = shard.register(instance(IID, 1));
    let send = shard.tried_now(Kind::Enqueue(message(&app)));
    for _ in 0..2 {
        assert_eq!(resolved(&shard.operation(resolve(&send))), None);
    }
    for seconds in [0, 59, 61, 600] {
        shard.now_ms += seconds * 1000;
        assert_eq!(refusal(&shard.stamped(send.clone(), None)), Some(Refusal::ExpiredOperation));
    }
    assert_eq!(shard.mailbox(), []);
}

#[test]
fn a_resolve_that_comes_too_late_claims_nothing() {
    let mut shard = Shard::new();
    let app = shard.register(instance(IID, 1));
    let send = shard.tried_now(Kind::Enqueue(message(&app)));
    let ask = Operation { kind: Some(resolve(&send)), ..shard.tried_now(resolve(&send)) };
    shard.stamped(send, None);
    shard.now_ms += 200_000;
    shard.send(&app);
    shard.send(&app);
    assert_eq!(refusal(&shard.stamped(ask, None)), Some(Refusal::ExpiredOperation));
}

#[test]
fn a_longer_window_does_not_bring_back_what_a_shorter_one_forgot() {
    let mut shard = Shard::new();
    let app = shard.register(instance(IID, 1));
    let send = shard.tried_now(Kind::Enqueue(message(&app)));
    shard.stamped(send.clone(), None);
    shard.now_ms += 70_000;
    shard.send(&app);
    shard.limits.dedupe_window_ms = 600_000;
    assert_eq!(refusal(&shard.stamped(send, None)), Some(Refusal::ExpiredOperation));
    assert_eq!(shard.count().accepted, 2);
}

#[test]
fn what_is_known_of_operations_goes_with_the_window() {
    let mut shard = Shard::new();
    let app = shard.register(instance(IID, 1));
    for _ in 0..300 {
        shard.now_ms += 1000;
        shard.send(&app);
    }
    assert!((60..66).contains(&shard.state.operations_known()), "{}", shard.state.operations_known());
    let seconds = shard.rows.iter().filter(|(key, _)| key::Family::Dedupe.is_of(key)).count();
    assert!((60..66).contains(&seconds));
}

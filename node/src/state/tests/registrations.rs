//! Registrations: new, superseded, removed.

use super::*;

#[test]
fn rg_09_core_the_same_registration_again_has_the_same_token() {
    let mut shard = Shard::new();
    let first = shard.register(instance(IID, 1));
    let again = shard.operation(Kind::Register(Register { token_key_id: 9, ..instance(IID, 2) }));
    let Some(Answered::Registered(again)) = again.kind else { panic!() };
    assert_eq!(again.registration, Some(first));
    assert!(!again.created);
    let invented = shard.register(legacy(&["1001"], 3));
    assert_eq!(
        shard.register(legacy(&["1001"], 4)),
        invented,
        "the client names no Instance ID, and gets its own again"
    );
}

#[test]
fn rg_10_core_another_sender_of_an_instance_has_a_token_of_its_own_and_both_work() {
    let mut shard = Shard::new();
    let a = shard.register(instance(IID, 1));
    let b = shard.register(Register { senders: vec!["1002".into()], ..instance(IID, 2) });
    assert_ne!(a.registration_id, b.registration_id);
    assert!(is_accepted(&shard.send(&a)));
    assert!(is_accepted(&shard.operation(Kind::Enqueue(Enqueue { sender: "1002".into(), ..message(&b) }))));
}

#[test]
fn rg_11_core_one_legacy_token_serves_its_senders_and_no_other() {
    let mut shard = Shard::new();
    let app = shard.register(legacy(&["1001", "1002"], 1));
    for (sender, refused) in [("1001", None), ("1002", None), ("1003", Some(Refusal::MismatchSenderId))] {
        let answer = shard.operation(Kind::Enqueue(Enqueue { sender: sender.into(), ..message(&app) }));
        assert_eq!(refusal(&answer), refused);
    }
}

#[test]
fn a_legacy_application_that_changes_its_senders_gets_a_new_token_and_the_old_follows_the_new_senders() {
    let mut shard = Shard::new();
    let old = shard.register(legacy(&["1001", "1002"], 1));
    let new = shard.register(legacy(&["1001", "1003"], 2));
    assert_ne!(old.registration_id, new.registration_id);
    assert_eq!(canonical(&shard.send(&old)), Some(new.clone()));
    let mut from = |sender: &str| shard.operation(Kind::Enqueue(Enqueue { sender: sender.into(), ..message(&old) }));
    assert_eq!(refusal(&from("1002")), Some(Refusal::MismatchSenderId));
    assert_eq!(canonical(&from("1003")), Some(new));
}

#[test]
fn h114_rg_22_core_the_token_of_an_older_instance_delivers_to_the_newer_and_names_it() {
    let mut shard = Shard::new();
    let old = shard.register(instance(IID, 1));
    let new = shard.register(instance(IID_2, 2));
    let newest = shard.register(instance("cAAAAAAAAA3", 3));
    for superseded in [&old, &new] {
        assert_eq!(canonical(&shard.send(superseded)), Some(newest.clone()));
    }
    assert!(is_accepted(&shard.send(&newest)));
    assert!(shard.mailbox().iter().all(|(_, row)| row.message.registration_id == newest.registration_id));
}

#[test]
fn the_instance_registered_last_is_canonical_also_when_it_is_an_old_one() {
    let mut shard = Shard::new();
    let old = shard.register(instance(IID, 1));
    let new = shard.register(instance(IID_2, 2));
    assert_eq!(shard.register(instance(IID, 3)), old);
    assert_eq!(canonical(&shard.send(&new)), Some(old.clone()));
    assert!(is_accepted(&shard.send(&old)));
}

#[test]
fn tokens_of_other_senders_scopes_subtypes_or_certificates_do_not_supersede_each_other() {
    let mut shard = Shard::new();
    shard.limits.registrations_max = 9;
    let all = [
        shard.register(instance(IID, 1)),
        shard.register(Register { senders: vec!["1002".into()], ..instance(IID_2, 2) }),
        shard.register(Register { scope: "*".into(), ..instance(IID_2, 3) }),
        shard.register(Register { subtype: "sub".into(), ..instance(IID_2, 4) }),
        shard.register(Register { cert: "aa".into(), ..instance(IID_2, 5) }),
        shard.register(Register { application: "app.two".into(), ..instance(IID_2, 6) }),
    ];
    for (app, sender) in all.iter().zip(["1001", "1002", "1001", "1001", "1001", "1001"]) {
        let answer = shard.operation(Kind::Enqueue(Enqueue { sender: sender.into(), ..message(app) }));
        assert!(is_accepted(&answer));
    }
}

#[test]
fn rg_20_core_a_device_has_so_many_registrations_and_no_more() {
    let mut shard = Shard::new();
    shard.limits.registrations_max = 2;
    let subtype = |subtype: &str, number| Register { subtype: subtype.into(), ..instance(IID, number) };
    shard.register(subtype("a", 1));
    shard.register(subtype("b", 2));
    let third = shard.operation(Kind::Register(subtype("c", 3)));
    assert_eq!(refusal(&third), Some(Refusal::TooManyRegistrations));
    // Taking the place of one is no third.
    shard.register(Register { subtype: "a".into(), ..instance(IID_2, 4) });
}

#[test]
fn a_device_that_registers_anew_all_day_keeps_few_superseded_registrations() {
    let mut shard = Shard::new();
    let first = shard.register(instance("cAAAAAAAA00", 100));
    for number in 1..20 {
        shard.now_ms += 1;
        shard.register(instance(&format!("cAAAAAAAA{number:02}"), number));
    }
    let registrations = shard.rows.iter().filter(|(key, _)| key::Family::Registration.is_of(key)).count();
    assert_eq!(registrations, 1 + LIMITS.registrations_max as usize);
    assert_eq!(refusal(&shard.send(&first)), Some(Refusal::NotRegistered));
}

#[test]
fn h115_rg_13_core_unregistering_an_application_ends_its_tokens_and_what_waits() {
    let mut shard = Shard::new();
    let old = shard.register(instance(IID, 1));
    let new = shard.register(instance(IID_2, 2));
    let other = shard.register(Register { application: "app.two".into(), ..instance(IID, 3) });
    for app in [&old, &new, &other] {
        shard.send(app);
    }
    assert_eq!(shard.unregister("app.one", What::WholeApplication(true)), 2);
    for app in [&old, &new] {
        assert_eq!(refusal(&shard.send(app)), Some(Refusal::NotRegistered));
    }
    assert_eq!(shard.mailbox().len(), 1);
    assert_eq!(shard.mailbox()[0].1.message.application, "app.two");
    assert_eq!(shard.count().unregistered, 2);
    assert_eq!(shard.unregister("app.one", What::WholeApplication(true)), 0);
}

#[test]
fn rg_14_rg_16_core_deleting_one_token_ends_only_that_one() {
    let mut shard = Shard::new();
    let a = shard.register(instance(IID, 1));
    let b = shard.register(Register { senders: vec!["1002".into()], ..instance(IID, 2) });
    assert_eq!(shard.unregister("app.one", one_token(IID, "1001")), 1);
    assert_eq!(refusal(&shard.send(&a)), Some(Refusal::NotRegistered));
    assert!(is_accepted(&shard.operation(Kind::Enqueue(Enqueue { sender: "1002".into(), ..message(&b) }))));
    let again = shard.register(instance(IID, 3));
    assert_ne!(again.registration_id, a.registration_id, "a token that died does not come back");
}

#[test]
fn rg_15_core_deleting_an_instance_ends_its_tokens_and_no_other_applications() {
    let mut shard = Shard::new();
    let a = shard.register(instance(IID, 1));
    shard.register(Register { senders: vec!["1002".into()], ..instance(IID, 2) });
    let other_app = shard.register(Register { application: "app.two".into(), ..instance(IID, 3) });
    let other_iid = shard.register(Register { subtype: "sub".into(), ..instance(IID_2, 4) });
    assert_eq!(shard.unregister("app.one", What::InstanceId(IID.into())), 2);
    assert_eq!(refusal(&shard.send(&a)), Some(Refusal::NotRegistered));
    assert!(is_accepted(&shard.send(&other_app)));
    assert!(is_accepted(&shard.send(&other_iid)));
}

#[test]
fn a_superseded_token_ends_with_its_successor_and_not_the_other_way() {
    let mut shard = Shard::new();
    let old = shard.register(instance(IID, 1));
    let new = shard.register(instance(IID_2, 2));
    assert_eq!(shard.unregister("app.one", one_token(IID, "1001")), 1);
    assert_eq!(refusal(&shard.send(&old)), Some(Refusal::NotRegistered));
    assert!(is_accepted(&shard.send(&new)));
    let newest = shard.register(instance(IID, 3));
    assert_eq!(shard.unregister("app.one", one_token(IID, "1001")), 2);
    for app in [&new, &newest] {
        assert_eq!(refusal(&shard.send(app)), Some(Refusal::NotRegistered));
    }
}

#[test]
fn malformed_registrations_are_answered_so() {
    let mut shard = Shard::new();
    let senders = |senders: &[&str]| senders.iter().map(|sender| (*sender).to_owned()).collect::<Vec<_>>();
    let bad = [
        Register { application: String::new(), ..instance(IID, 1) },
        Register { iid: "short".into(), ..instance(IID, 1) },
        Register { senders: vec![], ..instance(IID, 1) },
        Register { senders: senders(&["1001", "1002"]), ..instance(IID, 1) },
        Register { scope: String::new(), senders: senders(&["2", "1"]), ..instance(IID, 1) },
        Register { scope: String::new(), senders: senders(&["1", "1"]), ..instance(IID, 1) },
        Register { registration_id: Bytes::new(), ..instance(IID, 1) },
    ];
    for register in bad {
        assert_eq!(refusal(&shard.operation(Kind::Register(register))), Some(Refusal::Malformed));
    }
    shard.register(instance(IID, 1));
    let taken = Register { subtype: "sub".into(), ..instance(IID, 1) };
    assert_eq!(refusal(&shard.operation(Kind::Register(taken))), Some(Refusal::Malformed));
    let nothing = Unregister { device_tag: PHONE, application: "app.one".into(), what: None };
    assert_eq!(refusal(&shard.operation(Kind::Unregister(nothing))), Some(Refusal::Malformed));
}

#[test]
fn a_device_is_seen_once_a_day() {
    use martlet_proto::cluster::command::Seen;
    let mut shard = Shard::new();
    let seen = |day| command::Kind::Seen(Seen { device_tag: PHONE, day });
    let days = |shard: &Shard| {
        let key = key::device::key(DeviceTag(PHONE));
        let row = shard.rows.iter().find(|(found, _)| **found == key).unwrap();
        key::device::decode(&key, row.1.clone()).unwrap().last_seen_day
    };
    shard.one(seen(20_000));
    assert_eq!(shard.one(seen(20_000)).writes, []);
    shard.one(seen(19_999));
    assert_eq!(days(&shard), 20_000);
    shard.one(seen(20_001));
    assert_eq!(days(&shard), 20_001);
}

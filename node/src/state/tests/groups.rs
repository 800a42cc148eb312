//! Device groups: made, changed, deleted; whole or not at all.

use martlet_proto::{
    cluster::queue::{Group, GroupChange, GroupGet, GroupMember, group_get::By},
    group::{GroupBits, GroupTag},
    limits::GROUP_NAME_MAX_BYTES,
};

use super::*;

const TAG: u64 = 77;

fn member(number: u8) -> GroupMember {
    GroupMember {
        device_tag: u64::from(number),
        registration_id: vec![number; 16].into(),
        token_key_id: 3,
        iid: IID.into(),
    }
}

fn create(name: &str, bits: u64, members: impl IntoIterator<Item = u8>) -> GroupChange {
    GroupChange {
        group_tag: TAG,
        sender: "1001".into(),
        name: name.into(),
        key_bits: bits,
        create: true,
        token_key_id: 3,
        leave: vec![],
        join: members.into_iter().map(member).collect(),
    }
}

fn change(bits: u64, leave: &[u8], join: &[u8]) -> GroupChange {
    GroupChange {
        create: false,
        leave: leave.iter().map(|number| vec![*number; 16].into()).collect(),
        ..create("", bits, join.iter().copied())
    }
}

impl Shard {
    fn change(&mut self, change: GroupChange) -> Result<Group, Refusal> {
        let answer = self.operation(Kind::GroupChange(change));
        told(&answer)
    }

    fn read(&self, sender: &str, by: By) -> Result<Group, Refusal> {
        let get = GroupGet { group_tag: TAG, sender: sender.into(), by: Some(by) };
        told(&self.state.group(&self.rows, &get).unwrap())
    }

    fn members(&self, bits: u64) -> Vec<u8> {
        let group = self.read("1001", By::KeyBits(bits)).unwrap();
        group.members.iter().map(|member| member.registration_id[0]).collect()
    }
}

fn told(answer: &Answer) -> Result<Group, Refusal> {
    match &answer.kind {
        Some(Answered::Group(group)) => Ok(group.clone()),
        _ => Err(refusal(answer).unwrap()),
    }
}

#[test]
fn h140_h142_core_a_group_is_found_by_its_name_and_by_its_key() {
    let mut shard = Shard::new();
    let made = shard.change(create("user-7", 5, [1, 2])).unwrap();
    assert_eq!((made.key_bits, made.token_key_id, made.created_ms), (5, 3, START_MS));
    assert!(made.members.is_empty(), "an answer that is remembered holds no members");
    let read = shard.read("1001", By::Name("user-7".into())).unwrap();
    assert_eq!(read, Group { members: vec![member(1), member(2)], ..made });
    assert_eq!(shard.read("1001", By::KeyBits(5)), Ok(read));
    assert_eq!(shard.read("1001", By::Name("user-8".into())), Err(Refusal::GroupNotFound));
    assert_eq!(shard.read("1001", By::KeyBits(6)), Err(Refusal::GroupNotFound));
    assert_eq!(shard.read("1002", By::KeyBits(5)), Err(Refusal::MismatchSenderId));
    assert_eq!(shard.read("1002", By::Name("user-7".into())), Err(Refusal::GroupNotFound));
}

#[test]
fn h141_h152_core_a_name_is_one_group_of_its_sender_and_another_of_another_sender() {
    let mut shard = Shard::new();
    shard.change(create("a", 1, [1])).unwrap();
    assert_eq!(shard.change(create("a", 2, [2])), Err(Refusal::GroupExists));
    // By chance under the same tag.
    shard.change(create("b", 3, [3])).unwrap();
    shard.change(GroupChange { sender: "1002".into(), ..create("a", 4, [4]) }).unwrap();
    assert_eq!((shard.members(1), shard.members(3)), (vec![1], vec![3]));
    assert_eq!(shard.read("1002", By::Name("a".into())).unwrap().key_bits, 4);
}

#[test]
fn h143_core_present_members_join_and_absent_ones_leave_without_a_trace() {
    let mut shard = Shard::new();
    shard.change(create("a", 1, [1, 2, 2, 1])).unwrap();
    let before = shard.rows.clone();
    shard.change(change(1, &[9], &[2])).unwrap();
    let groups = |rows: &MemoryRows| rows.iter().filter(|(key, _)| key::Family::Group.is_of(key)).count();
    assert_eq!((groups(&before), shard.members(1)), (1, vec![1, 2]));
    shard.change(change(1, &[1], &[3, 4])).unwrap();
    assert_eq!(shard.members(1), [2, 3, 4]);
    // Who leaves and joins in one change is there.
    shard.change(change(1, &[2, 3, 4], &[3])).unwrap();
    assert_eq!(shard.members(1), [3]);
}

#[test]
fn h144_core_a_21st_member_is_refused_with_all_that_came_with_it() {
    let mut shard = Shard::new();
    assert_eq!(shard.change(create("a", 1, 0..21)), Err(Refusal::GroupFull));
    shard.change(create("a", 1, 0..19)).unwrap();
    assert_eq!(shard.change(change(1, &[], &[100, 101])), Err(Refusal::GroupFull));
    assert_eq!(shard.members(1).len(), 19);
    shard.change(change(1, &[], &[100])).unwrap();
    // A thousand times the same.
    let again = GroupChange { join: vec![member(100); 1000], ..change(1, &[], &[]) };
    shard.change(again).unwrap();
    assert_eq!(shard.change(change(1, &[], &[101])), Err(Refusal::GroupFull));
    shard.change(change(1, &[0], &[101])).unwrap();
    assert_eq!(shard.members(1).len(), 20);
    // A limit that was lowered since makes nobody leave, and lets nobody join.
    shard.limits.group_members_max = 5;
    assert_eq!(shard.change(change(1, &[], &[102])), Err(Refusal::GroupFull));
    shard.change(change(1, &[1, 2], &[])).unwrap();
    assert_eq!(shard.members(1).len(), 18);
}

#[test]
fn h145_h146_core_a_change_needs_the_key_its_sender_and_if_named_its_name() {
    let mut shard = Shard::new();
    shard.change(create("a", 1, [1])).unwrap();
    assert_eq!(shard.change(change(2, &[], &[2])), Err(Refusal::GroupNotFound));
    let foreign = GroupChange { sender: "1002".into(), ..change(1, &[1], &[]) };
    assert_eq!(shard.change(foreign), Err(Refusal::MismatchSenderId));
    let misnamed = GroupChange { name: "b".into(), ..change(1, &[1], &[]) };
    assert_eq!(shard.change(misnamed), Err(Refusal::GroupNameMismatch));
    assert_eq!(shard.members(1), [1]);
    shard.change(GroupChange { name: "a".into(), ..change(1, &[], &[2]) }).unwrap();
    assert_eq!(shard.members(1), [1, 2]);
}

#[test]
fn h147_h148_core_a_group_of_nobody_is_none_and_its_name_is_free() {
    let mut shard = Shard::new();
    assert_eq!(shard.change(create("a", 1, [])), Err(Refusal::NoValidMembers));
    shard.change(create("a", 1, [1, 2])).unwrap();
    let left = shard.change(change(1, &[1, 2], &[])).unwrap();
    assert_eq!(left.key_bits, 1);
    assert_eq!(shard.read("1001", By::Name("a".into())), Err(Refusal::GroupNotFound));
    assert!(!shard.rows.iter().any(|(key, _)| key::Family::Group.is_of(key)));
    assert_eq!(shard.change(change(1, &[], &[3])), Err(Refusal::GroupNotFound), "its key does not come back");
    shard.change(create("a", 2, [3])).unwrap();
    assert_eq!(shard.members(2), [3]);
}

#[test]
fn a_change_that_is_tried_again_is_answered_as_first() {
    let mut shard = Shard::new();
    let operation = shard.tried_now(Kind::GroupChange(create("a", 1, [1])));
    let first = shard.stamped(operation.clone(), None);
    assert!(told(&first).is_ok());
    shard.change(change(1, &[1], &[])).unwrap();
    assert_eq!(shard.stamped(operation.clone(), None), first);
    assert_eq!(shard.read("1001", By::Name("a".into())), Err(Refusal::GroupNotFound), "not made again");
    let resolve = shard.tried_now(resolve(&operation));
    let answer = shard.stamped(resolve, None);
    assert!(matches!(answer.kind, Some(Answered::Resolved(resolved)) if resolved.answer.as_deref() == Some(&first)));
}

#[test]
fn the_longest_name_is_taken_and_what_is_malformed_is_not() {
    let mut shard = Shard::new();
    let longest = "n".repeat(GROUP_NAME_MAX_BYTES);
    shard.change(create(&longest, 1, 0..20)).unwrap();
    assert_eq!(shard.read("1001", By::Name(longest.clone())).unwrap().members.len(), 20);
    let short = GroupMember { registration_id: Bytes::from_static(b"x"), ..member(1) };
    for malformed in [
        create(&format!("{longest}n"), 2, [1]),
        create("", 2, [1]),
        GroupChange { sender: String::new(), ..create("b", 2, [1]) },
        GroupChange { join: vec![short], ..create("b", 2, [1]) },
        GroupChange { leave: vec![Bytes::new()], ..change(1, &[], &[]) },
        GroupChange { join: vec![member(1); 2001], ..create("b", 2, []) },
        // The random bits of a group there is.
        create("b", 1, [1]),
    ] {
        assert_eq!(shard.change(malformed), Err(Refusal::Malformed));
    }
    let get = GroupGet { group_tag: TAG, sender: "1001".into(), by: None };
    assert_eq!(told(&shard.state.group(&shard.rows, &get).unwrap()), Err(Refusal::Malformed));
}

#[test]
fn a_group_row_without_members_stops_the_replica() {
    let mut shard = Shard::new();
    shard.rows.put_raw(key::group::key(GroupTag(TAG), GroupBits(1)), Bytes::new());
    let stamped = shard.tried_now(Kind::GroupChange(create("a", 2, [1])));
    let entry = Entry { shard_time_ms: START_MS, commands: vec![shard.stamp(stamped, None)], term: 0 };
    let error = shard.state.apply(&shard.rows, 1, &entry).unwrap_err();
    assert!(matches!(error.source, StateError::BadRow(_)), "{error}");
    assert_eq!(error.kind, "GroupChange");
}

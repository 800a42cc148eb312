//! The groups of all shards of the fake nodes.

use std::collections::BTreeMap;

use martlet_proto::cluster::queue::{Answer, Group, GroupChange, GroupGet, Refusal, answer, group_get::By};

const MEMBERS_MAX: usize = 20;

/// Sender and group, by tag and bits.
#[derive(Debug, Default)]
pub(crate) struct FakeGroups(pub(crate) BTreeMap<(u64, u64), (String, Group)>);

fn refused(refusal: Refusal) -> Answer {
    Answer { kind: Some(answer::Kind::Refusal(refusal.into())) }
}

fn told(group: Group) -> Answer {
    Answer { kind: Some(answer::Kind::Group(group)) }
}

impl FakeGroups {
    pub(crate) fn change(&mut self, change: GroupChange) -> Answer {
        let at = (change.group_tag, change.key_bits);
        if change.create {
            let taken = |(sender, group): &(String, Group)| *sender == change.sender && group.name == change.name;
            if self.0.values().any(taken) {
                return refused(Refusal::GroupExists);
            }
            let (name, token_key_id) = (change.name.clone(), change.token_key_id);
            let group = Group { key_bits: change.key_bits, token_key_id, name, created_ms: 1, members: vec![] };
            self.0.insert(at, (change.sender.clone(), group));
        }
        let Some((sender, group)) = self.0.get(&at).cloned() else { return refused(Refusal::GroupNotFound) };
        if sender != change.sender {
            return refused(Refusal::MismatchSenderId);
        }
        if !change.name.is_empty() && change.name != group.name {
            return refused(Refusal::GroupNameMismatch);
        }
        let mut members = group.members.clone();
        members.retain(|member| !change.leave.contains(&member.registration_id));
        for member in change.join {
            if !members.contains(&member) {
                members.push(member);
            }
        }
        if members.is_empty() || (change.create && members.len() > MEMBERS_MAX) {
            self.0.remove(&at);
        } else if members.len() <= MEMBERS_MAX {
            self.0.insert(at, (sender, Group { members: members.clone(), ..group.clone() }));
        }
        if members.len() > MEMBERS_MAX {
            return refused(Refusal::GroupFull);
        }
        told(Group { members: vec![], ..group })
    }

    pub(crate) fn get(&self, get: &GroupGet) -> Answer {
        let of_tag = || self.0.iter().filter(|((tag, _), _)| *tag == get.group_tag);
        let found = match get.by.as_ref().unwrap() {
            By::Name(name) => of_tag().find(|(_, (sender, group))| *sender == get.sender && group.name == *name),
            By::KeyBits(bits) => of_tag().find(|((_, own), _)| own == bits),
        };
        match found {
            None => refused(Refusal::GroupNotFound),
            Some((_, (sender, _))) if *sender != get.sender => refused(Refusal::MismatchSenderId),
            Some((_, (_, group))) => told(group.clone()),
        }
    }
}

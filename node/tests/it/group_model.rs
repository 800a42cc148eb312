//! A small model of a shard's device groups: a list that is walked. A part of [`crate::model`].

use martlet_proto::cluster::{
    command::Limits,
    queue::{Answer, Group, GroupChange, GroupMember, Refusal, answer::Kind},
};

#[derive(Debug, Clone)]
pub(crate) struct OneGroup {
    pub(crate) tag: u64,
    pub(crate) bits: u64,
    pub(crate) sender: String,
    pub(crate) name: String,
    key_id: u32,
    created: u64,
    members: Vec<GroupMember>,
}

#[derive(Debug, Default)]
pub(crate) struct Groups {
    pub(crate) live: Vec<OneGroup>,
    /// Tag, bits, sender and name of every group that ever was.
    pub(crate) ever: Vec<OneGroup>,
}

impl OneGroup {
    pub(crate) fn told(&self, members: bool) -> Group {
        Group {
            key_bits: self.bits,
            token_key_id: self.key_id,
            name: self.name.clone(),
            created_ms: self.created,
            members: if members { self.members.clone() } else { vec![] },
        }
    }
}

fn refuse(refusal: Refusal) -> Answer {
    Answer { kind: Some(Kind::Refusal(refusal as i32)) }
}

impl Groups {
    pub(crate) fn change(&mut self, change: &GroupChange, limits: &Limits, now: u64) -> Answer {
        let max = limits.group_members_max as usize;
        let mut group = if change.create {
            if self.live.iter().any(|one| (&one.sender, &one.name) == (&change.sender, &change.name)) {
                return refuse(Refusal::GroupExists);
            }
            OneGroup {
                tag: change.group_tag,
                bits: change.key_bits,
                sender: change.sender.clone(),
                name: change.name.clone(),
                key_id: change.token_key_id,
                created: now,
                members: vec![],
            }
        } else {
            let found = self.live.iter().find(|one| (one.tag, one.bits) == (change.group_tag, change.key_bits));
            let Some(found) = found else { return refuse(Refusal::GroupNotFound) };
            if found.sender != change.sender {
                return refuse(Refusal::MismatchSenderId);
            }
            if !change.name.is_empty() && change.name != found.name {
                return refuse(Refusal::GroupNameMismatch);
            }
            found.clone()
        };
        let before = group.members.len();
        group.members.retain(|member| !change.leave.contains(&member.registration_id));
        for member in &change.join {
            if !group.members.iter().any(|there| there.registration_id == member.registration_id) {
                group.members.push(member.clone());
            }
        }
        if group.members.len() > max.max(before) {
            return refuse(Refusal::GroupFull);
        }
        if change.create && group.members.is_empty() {
            return refuse(Refusal::NoValidMembers);
        }
        let told = group.told(false);
        self.live.retain(|one| (one.tag, one.bits) != (group.tag, group.bits));
        if change.create {
            self.ever.push(group.clone());
        }
        if !group.members.is_empty() {
            self.live.push(group);
        }
        Answer { kind: Some(Kind::Group(told)) }
    }
}

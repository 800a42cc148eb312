//! Device groups: what a notification key stands for, who joins, who leaves, and a message to all of them. Shared by HTTP and CCS.
//!
//! Owns what can only be known across shards: a group lives in the shard of its tag, its members in theirs. Keys and tokens are
//! verified here; whether a member is alive is asked of its shard, and the dead leave whenever a group is read for a request that may
//! not name them. Leaves to the group's shard whether a change fits, to [`crate::downstream`] what became of each message, and to each
//! edge its words.
//!
//! Members are kept as the app server named them. Of two that mean one registration, because one was superseded by the other, the
//! older leaves: its device would get everything twice.

use std::{collections::BTreeSet, time::Duration};

use bytes::Bytes;
use martlet_proto::{
    cluster::queue::{
        self, Check, Group, GroupChange, GroupGet, GroupMember, Operation, RegistrationRef, answer, group_get::By,
        operation,
    },
    group::{GroupBits, GroupTag, NotificationKey, message_id},
    http::{group::GroupError, reply::TargetOutcome},
    message::SenderId,
    refusal::Refusal,
    tag::DeviceTag,
    token::{RegistrationId, RegistrationToken},
};

use crate::{
    downstream::{self, Order, Target, token_of, verified},
    metrics::Metrics,
    route::{Facts, Outcome, Route},
};

/// Longest that a request waits for the dead to have left.
const LEAVE_MAX: Duration = Duration::from_secs(2);

/// The groups of one sender, as a request finds them.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Groups<'a> {
    pub(crate) route: &'a Route,
    pub(crate) facts: &'a Facts,
    /// Of the key that asks.
    pub(crate) sender: &'a SenderId,
}

/// Why a request about a group came to nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Trouble {
    /// The app server is to blame.
    Refused(GroupError),
    /// Definite: nothing was or will be done. Try again later.
    Unavailable,
    /// It may have been done.
    Unknown,
}

/// What became of a message to a group.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Sent {
    /// There is no such group for this sender, or nobody is in it, or it could not be read: told as of a token.
    Refused(Refusal),
    /// The token of each member and what became of it; no token where its key is not known here yet.
    Members(Vec<(Option<String>, TargetOutcome)>),
}

/// What a member's shard says of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Life {
    /// It would take a message; `successor`: as another registration.
    Alive { successor: Option<RegistrationId> },
    /// Gone, or no longer of this sender.
    Dead,
    /// Its shard did not say.
    Unheard,
}

impl Groups<'_> {
    /// Makes a group of those tokens that are alive and of this sender.
    pub(crate) async fn create(&self, name: &str, tokens: &[String]) -> Result<NotificationKey, Trouble> {
        let join = self.joining(tokens, &[]).await?;
        let tag = self.facts.group_tag(self.sender, name);
        let minting = self.facts.minting_key().ok_or(Trouble::Unavailable)?;
        let key = self.route.draw(|rng| NotificationKey::draw(minting, tag, rng));
        let change = GroupChange {
            group_tag: tag.0,
            sender: self.sender.as_str().to_owned(),
            name: name.to_owned(),
            key_bits: key.bits().0,
            create: true,
            token_key_id: key.key_id(),
            leave: Vec::new(),
            join,
        };
        match self.changed(change.clone()).await {
            Ok(_) => Ok(key),
            Err(Trouble::Refused(GroupError::Exists)) => {
                // One whose members have all died is gone, and its name is free.
                match self.look_up(name).await {
                    Err(Trouble::Refused(GroupError::NotFound)) => self.changed(change).await.map(|_| key),
                    Err(trouble) => Err(trouble),
                    Ok(_) => Err(Trouble::Refused(GroupError::Exists)),
                }
            }
            Err(trouble) => Err(trouble),
        }
    }

    /// Lets those tokens join that are alive and of this sender.
    pub(crate) async fn add(
        &self,
        key: &str,
        name: Option<&str>,
        tokens: &[String],
    ) -> Result<NotificationKey, Trouble> {
        let (key, group) = self.named(key, name).await?;
        let join = self.joining(tokens, &group.members).await?;
        let lives = self.lives(&group.members).await;
        let leave = leaving(&group.members, &lives, &join);
        if leave.len() == group.members.len() && lives.iter().all(|life| *life == Life::Dead) {
            self.leave(key.group_tag(), key.bits(), leave).await;
            return Err(Trouble::Refused(GroupError::NotFound));
        }
        let change = GroupChange { join, leave, ..self.change_of(key.group_tag(), key.bits()) };
        self.changed(change).await.map(|_| key)
    }

    /// Lets tokens go; of this cluster they must be, but may be dead.
    pub(crate) async fn remove(
        &self,
        key: &str,
        name: Option<&str>,
        tokens: &[String],
    ) -> Result<NotificationKey, Trouble> {
        let (key, _) = self.named(key, name).await?;
        let leave: Vec<Bytes> = self.of_ours(tokens).await?.into_iter().map(|member| member.registration_id).collect();
        if leave.is_empty() {
            return Err(Trouble::Refused(GroupError::NoValidIds));
        }
        let change = GroupChange { leave, ..self.change_of(key.group_tag(), key.bits()) };
        self.changed(change).await.map(|_| key)
    }

    /// The notification key of a name.
    pub(crate) async fn look_up(&self, name: &str) -> Result<NotificationKey, Trouble> {
        let tag = self.facts.group_tag(self.sender, name);
        let group = self.read(tag, By::Name(name.to_owned())).await?;
        let lives = self.lives(&group.members).await;
        let leave = leaving(&group.members, &lives, &[]);
        let bits = GroupBits(group.key_bits);
        let nobody = leave.len() == group.members.len();
        if !leave.is_empty() {
            self.leave(tag, bits, leave).await;
        }
        if nobody {
            return Err(Trouble::Refused(GroupError::NotFound));
        }
        let minted = self.route.token_key(self.facts, group.token_key_id).await.ok_or(Trouble::Unavailable)?;
        // It was drawn so that it can be spelled.
        NotificationKey::mint(&minted, tag, bits).map_err(|_| Trouble::Unknown)
    }

    /// Sends to every member. Those that are found dead leave afterwards.
    pub(crate) async fn send(&self, metrics: &Metrics, key: &str, order: &Order<'_>) -> Sent {
        let (key, group) = match self.addressed(key).await {
            Ok(found) => found,
            Err(refusal) => {
                downstream::count(metrics, &[TargetOutcome::Refused(refusal)]);
                return Sent::Refused(refusal);
            }
        };
        // Derived: whatever tries a member again names the same message.
        let of = self.route.operation_id();
        let targets = group.members.iter().filter_map(|member| {
            let registration = RegistrationId::from_bytes(&member.registration_id)?;
            Some(Target { tag: DeviceTag(member.device_tag), registration, id: message_id(of, registration) })
        });
        let targets: Vec<Target> = targets.collect();
        if targets.len() != group.members.len() {
            // Registration ids are 16 bytes: anything else is a defect of the node.
            return Sent::Refused(Refusal::InternalServerError);
        }
        let outcomes = downstream::deliver(self.route, self.facts, &targets, order).await;
        downstream::count(metrics, &outcomes);
        let mut tokens = Vec::with_capacity(group.members.len());
        for member in &group.members {
            let token = token_of(self.route, self.facts, DeviceTag(member.device_tag), &reference(member)).await;
            tokens.push(token.map(|token| token.to_string()));
        }
        let dead = |outcome: &TargetOutcome| {
            matches!(outcome, TargetOutcome::Refused(Refusal::NotRegistered | Refusal::MismatchSenderId))
        };
        let doubled = |outcome: &TargetOutcome| match outcome {
            TargetOutcome::Accepted { canonical, .. } => canonical.is_some() && tokens.contains(canonical),
            TargetOutcome::Refused(_) => false,
        };
        let leave: Vec<Bytes> = group
            .members
            .iter()
            .zip(&outcomes)
            .filter(|(_, outcome)| dead(outcome) || doubled(outcome))
            .map(|(member, _)| member.registration_id.clone())
            .collect();
        if !leave.is_empty() && !order.dry_run {
            self.leave(key.group_tag(), key.bits(), leave).await;
        }
        if outcomes.iter().all(dead) {
            return Sent::Refused(Refusal::NotRegistered);
        }
        Sent::Members(tokens.into_iter().zip(outcomes).collect())
    }

    /// The group of a key that a message is for.
    async fn addressed(&self, key: &str) -> Result<(NotificationKey, Group), Refusal> {
        let key = self.key(key).await?;
        match self.asked(key.group_tag(), self.get(key.group_tag(), By::KeyBits(key.bits().0))).await {
            Outcome::Answered(answer::Kind::Group(group)) => Ok((key, group)),
            Outcome::Answered(answer::Kind::Refusal(refusal)) => {
                Err(queue::Refusal::try_from(refusal).unwrap_or_default().into())
            }
            Outcome::Unavailable => Err(Refusal::Unavailable),
            Outcome::Answered(_) | Outcome::Unknown => Err(Refusal::InternalServerError),
        }
    }

    /// A notification key of ours, as its text says.
    async fn key(&self, text: &str) -> Result<NotificationKey, Refusal> {
        let key = NotificationKey::parse(text).map_err(|_| Refusal::InvalidRegistration)?;
        let minted = self.route.token_key(self.facts, key.key_id()).await.ok_or(Refusal::Unavailable)?;
        key.verify(&minted).map_err(|_| Refusal::InvalidRegistration)
    }

    /// The group that a request wants changed, of that name if it has one.
    async fn named(&self, key: &str, name: Option<&str>) -> Result<(NotificationKey, Group), Trouble> {
        let key = self.key(key).await.map_err(|refusal| match refusal {
            Refusal::Unavailable => Trouble::Unavailable,
            _ => Trouble::Refused(GroupError::NotFound),
        })?;
        let group = self.read(key.group_tag(), By::KeyBits(key.bits().0)).await?;
        if name.is_some_and(|name| name != group.name) {
            return Err(Trouble::Refused(GroupError::NameMismatch));
        }
        Ok((key, group))
    }

    /// Which of the tokens may join a group of these members, each registration once.
    async fn joining(&self, tokens: &[String], members: &[GroupMember]) -> Result<Vec<GroupMember>, Trouble> {
        let ours = self.of_ours(tokens).await?;
        let lives = self.lives(&ours).await;
        if lives.contains(&Life::Unheard) {
            return Err(Trouble::Unavailable);
        }
        if lives.iter().all(|life| *life == Life::Dead) {
            return Err(Trouble::Refused(GroupError::NoValidIds));
        }
        let stay_out: BTreeSet<Bytes> = leaving(&ours, &lives, members).into_iter().collect();
        Ok(ours.into_iter().filter(|member| !stay_out.contains(&member.registration_id)).collect())
    }

    /// Those of the tokens that this cluster minted, each once.
    async fn of_ours(&self, tokens: &[String]) -> Result<Vec<GroupMember>, Trouble> {
        let (mut ours, mut seen) = (Vec::new(), BTreeSet::new());
        for token in tokens.iter().filter(|token| seen.insert(*token)) {
            match verified(self.route, self.facts, token).await {
                Ok(token) => ours.push(member(&token)),
                Err(Refusal::Unavailable) => return Err(Trouble::Unavailable),
                Err(_) => {}
            }
        }
        Ok(ours)
    }

    /// What the shards say of registrations, in their order.
    async fn lives(&self, members: &[GroupMember]) -> Vec<Life> {
        let check = |member: &GroupMember| {
            let kind = operation::Kind::Check(Check {
                device_tag: member.device_tag,
                registration_id: member.registration_id.clone(),
                sender: self.sender.as_str().to_owned(),
                restricted_package_name: String::new(),
            });
            (self.facts.shard(DeviceTag(member.device_tag)), self.operation(kind))
        };
        let outcomes = self.route.submit(members.iter().map(check).collect()).await;
        outcomes.into_iter().map(life).collect()
    }

    async fn read(&self, tag: GroupTag, by: By) -> Result<Group, Trouble> {
        told(self.asked(tag, self.get(tag, by)).await)
    }

    async fn changed(&self, change: GroupChange) -> Result<Group, Trouble> {
        told(self.asked(GroupTag(change.group_tag), operation::Kind::GroupChange(change)).await)
    }

    /// Lets the dead go. Where that fails, whoever comes next does it: nobody waits long for it, least of all for the answer to a send
    /// that was accepted.
    async fn leave(&self, tag: GroupTag, bits: GroupBits, leave: Vec<Bytes>) {
        let left = self.changed(GroupChange { leave, ..self.change_of(tag, bits) });
        match tokio::time::timeout(LEAVE_MAX, left).await {
            Ok(Ok(_)) => {}
            Ok(Err(trouble)) => tracing::debug!(?trouble, "members that are gone stay in their group for now"),
            Err(_) => tracing::debug!("it takes long to let members go that are gone"),
        }
    }

    fn change_of(&self, tag: GroupTag, bits: GroupBits) -> GroupChange {
        let sender = self.sender.as_str().to_owned();
        GroupChange { group_tag: tag.0, sender, key_bits: bits.0, ..GroupChange::default() }
    }

    fn get(&self, tag: GroupTag, by: By) -> operation::Kind {
        let sender = self.sender.as_str().to_owned();
        operation::Kind::GroupGet(GroupGet { group_tag: tag.0, sender, by: Some(by) })
    }

    async fn asked(&self, tag: GroupTag, kind: operation::Kind) -> Outcome {
        let operation = (self.facts.group_shard(tag), self.operation(kind));
        self.route.submit(vec![operation]).await.pop().expect("one operation has one outcome")
    }

    fn operation(&self, kind: operation::Kind) -> Operation {
        let id = Bytes::copy_from_slice(&self.route.operation_id().to_bytes());
        Operation { id, first_try_ms: 0, kind: Some(kind) }
    }
}

/// Which members leave: the dead, and those superseded by one that is there or joins.
fn leaving(members: &[GroupMember], lives: &[Life], join: &[GroupMember]) -> Vec<Bytes> {
    let there: BTreeSet<&[u8]> = members.iter().chain(join).map(|member| &member.registration_id[..]).collect();
    let leaves = |life: &Life| match life {
        Life::Dead => true,
        Life::Alive { successor } => successor.is_some_and(|successor| there.contains(&successor.0[..])),
        Life::Unheard => false,
    };
    let leaving = members.iter().zip(lives).filter(|(_, life)| leaves(life));
    leaving.map(|(member, _)| member.registration_id.clone()).collect()
}

fn life(outcome: Outcome) -> Life {
    match outcome {
        Outcome::Answered(answer::Kind::Accepted(accepted)) => {
            let successor = accepted.canonical.and_then(|now| RegistrationId::from_bytes(&now.registration_id));
            Life::Alive { successor }
        }
        Outcome::Answered(answer::Kind::Refusal(refusal)) => {
            match queue::Refusal::try_from(refusal).unwrap_or_default() {
                queue::Refusal::NotRegistered | queue::Refusal::MismatchSenderId => Life::Dead,
                _ => Life::Unheard,
            }
        }
        Outcome::Answered(_) | Outcome::Unavailable | Outcome::Unknown => Life::Unheard,
    }
}

fn told(outcome: Outcome) -> Result<Group, Trouble> {
    match outcome {
        Outcome::Answered(answer::Kind::Group(group)) => Ok(group),
        Outcome::Answered(answer::Kind::Refusal(refusal)) => {
            Err(meaning(queue::Refusal::try_from(refusal).unwrap_or_default()))
        }
        Outcome::Unavailable => Err(Trouble::Unavailable),
        // Another kind of answer than was asked for is a defect of the node: what it did is not known.
        Outcome::Answered(_) | Outcome::Unknown => Err(Trouble::Unknown),
    }
}

/// What a shard's refusal means to who asks about a group. Another sender's key is told as one that nobody has.
fn meaning(refusal: queue::Refusal) -> Trouble {
    use queue::Refusal as Shard;
    match refusal {
        Shard::GroupExists => Trouble::Refused(GroupError::Exists),
        Shard::GroupNotFound | Shard::MismatchSenderId => Trouble::Refused(GroupError::NotFound),
        Shard::GroupFull => Trouble::Refused(GroupError::Full),
        Shard::GroupNameMismatch => Trouble::Refused(GroupError::NameMismatch),
        Shard::NoValidMembers => Trouble::Refused(GroupError::NoValidIds),
        Shard::ExpiredOperation | Shard::QuotaExceeded => Trouble::Unavailable,
        Shard::NotRegistered
        | Shard::InvalidPackageName
        | Shard::TooManyRegistrations
        | Shard::TooManyTopics
        | Shard::DeviceRateExceeded
        | Shard::TopicsRateExceeded
        | Shard::Malformed
        | Shard::Unspecified => Trouble::Unknown,
    }
}

fn member(token: &RegistrationToken) -> GroupMember {
    GroupMember {
        device_tag: token.device_tag().0,
        registration_id: Bytes::copy_from_slice(&token.registration_id().0),
        token_key_id: token.key_id(),
        iid: token.iid().as_str().to_owned(),
    }
}

fn reference(member: &GroupMember) -> RegistrationRef {
    let GroupMember { device_tag: _, registration_id, token_key_id, iid } = member;
    RegistrationRef { registration_id: registration_id.clone(), token_key_id: *token_key_id, iid: iid.clone() }
}

#[cfg(test)]
mod tests {
    use martlet_proto::cluster::queue::Accepted;

    use super::*;

    fn member(number: u8) -> GroupMember {
        GroupMember { registration_id: vec![number; 16].into(), ..GroupMember::default() }
    }

    #[test]
    fn the_dead_leave_and_so_does_who_was_superseded_by_another_member() {
        let members = [member(1), member(2), member(3), member(4)];
        let by = |number: u8| Life::Alive { successor: Some(RegistrationId([number; 16])) };
        let alive = Life::Alive { successor: None };
        let named = |lives: [Life; 4], join: &[GroupMember]| -> Vec<u8> {
            leaving(&members, &lives, join).iter().map(|id| id[0]).collect()
        };
        assert_eq!(named([alive, Life::Dead, Life::Unheard, by(1)], &[]), [2, 4]);
        assert!(named([alive, alive, alive, by(9)], &[]).is_empty());
        assert_eq!(named([alive, alive, alive, by(9)], &[member(9)]), [4]);
    }

    #[test]
    fn only_a_shard_that_says_so_makes_a_member_dead() {
        let refused = |refusal: queue::Refusal| life(Outcome::Answered(answer::Kind::Refusal(refusal.into())));
        assert_eq!(refused(queue::Refusal::NotRegistered), Life::Dead);
        assert_eq!(refused(queue::Refusal::MismatchSenderId), Life::Dead);
        assert_eq!(refused(queue::Refusal::Malformed), Life::Unheard);
        assert_eq!(life(Outcome::Unavailable), Life::Unheard);
        assert_eq!(life(Outcome::Unknown), Life::Unheard);
        assert_eq!(
            life(Outcome::Answered(answer::Kind::Accepted(Accepted::default()))),
            Life::Alive { successor: None }
        );
    }

    #[test]
    fn every_refusal_of_a_shard_has_its_word_and_what_was_not_asked_for_is_never_definite() {
        for refusal in (0..100).filter_map(|number| queue::Refusal::try_from(number).ok()) {
            let trouble = meaning(refusal);
            let ours = format!("{refusal:?}").starts_with("Group") || refusal == queue::Refusal::NoValidMembers;
            let refused = ours || refusal == queue::Refusal::MismatchSenderId;
            assert_eq!(matches!(trouble, Trouble::Refused(_)), refused, "{refusal:?}");
        }
    }
}

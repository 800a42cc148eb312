//! `Admin.Message`, `Token` and `Recall`: what operators ask about one message, or those of one token.
//!
//! Owns the way to all nodes that may know, and the choice between what they say: an end is final, what waits is its leader's to say.
//! Tokens leave here as the hashes by which logs name them. Leaves the reading to `shard/inspect.rs`, and taking back to the log.

use std::{collections::BTreeMap, sync::Arc};

use martlet_proto::{
    cluster::{
        admin::{
            Fate, MessageReply, MessageRequest, RecallReply, RecallRequest, Story, TokenReply, TokenRequest,
            admin_client::AdminClient,
        },
        meta::{MetaState, Node},
        queue::{Recall, RecallKey, Recalled, Refusal, answer, operation, recall::What},
    },
    message::MessageId,
    shard::{Shard, shard_of},
    tag::DeviceTag,
    token::{Iid, RegistrationId, RegistrationToken, TokenError, fingerprint},
};
use tonic::{Response, Status, transport::Channel};

use super::{
    admin::AdminService,
    ask::{SEARCH_MAX, off_the_runtime, shards_of},
    group::{ASK_MAX, nodes_of},
};
use crate::{
    delivery::link,
    shard::inspect::{Known, STORIES_OF_TOKEN_MAX, TokenView, Waits},
    state::{End, Ended, StateError},
    store::key::registration::RegistrationRow,
};

impl AdminService {
    /// What became of a message.
    pub(super) async fn read_message(&self, request: MessageRequest) -> Result<MessageReply, Status> {
        let id = message_id(&request.message_id)?;
        let state = self.kept();
        let of = match &*request.token {
            "" => None,
            token => Some(self.placed(&state, token)?),
        };
        let mut found =
            self.stories_here(Arc::clone(&state), id, of.map(|(shard, token)| (shard, token.device_tag()))).await?;
        if request.here {
            return Ok(MessageReply { story: found, silent_nodes: Vec::new() });
        }
        let wanted = MessageRequest { here: true, ..request };
        let ask = |mut admin: AdminClient<Channel>| {
            let wanted = wanted.clone();
            async move { admin.message(wanted).await.map(Response::into_inner) }
        };
        let (replies, silent_nodes) = self.ask_all(&state.nodes, SEARCH_MAX, ask).await;
        found = replies.into_iter().filter_map(|reply| reply.story).fold(found, surer);
        if let Some(story) = &mut found {
            let names = self.gateways(&state).await;
            story.gateway_name = names.get(&story.gateway).cloned().unwrap_or_default();
        }
        Ok(MessageReply { story: found, silent_nodes })
    }

    /// What a token is and what became of its messages.
    pub(super) async fn read_token(&self, request: TokenRequest) -> Result<TokenReply, Status> {
        let state = self.kept();
        let (shard, token) = self.placed(&state, &request.token)?;
        let own = self.token_here(Arc::clone(&state), shard, token.clone()).await?;
        if request.here {
            return own.ok_or_else(|| Status::unavailable(format!("shard {shard} has no replica here")));
        }
        let wanted = TokenRequest { here: true, ..request };
        let ask = |mut admin: AdminClient<Channel>| {
            let wanted = wanted.clone();
            async move { admin.token(wanted).await.map(Response::into_inner) }
        };
        let nodes: Vec<Node> = nodes_of(&state, shard).cloned().collect();
        let (mut replies, silent_nodes) = self.ask_all(&nodes, ASK_MAX, ask).await;
        replies.extend(own);
        let mut reply = merged(replies)
            .ok_or_else(|| Status::unavailable(format!("no node with a replica of shard {shard} answers")))?;
        reply.silent_nodes = silent_nodes;
        let names = self.gateways(&state).await;
        let name = |gateway: u32| names.get(&gateway).cloned().unwrap_or_default();
        reply.gateway_name = name(reply.gateway);
        for story in &mut reply.stories {
            story.gateway_name = name(story.gateway);
        }
        Ok(reply)
    }

    /// Takes back one message, or what waits under a collapse key.
    pub(super) async fn take_back(&self, request: RecallRequest) -> Result<RecallReply, Status> {
        let state = self.kept();
        let RecallRequest { message_id: id, token, collapse_key } = request;
        if id.is_empty() == collapse_key.is_empty() {
            return Err(Status::invalid_argument("name either a message id, or a token and its collapse key"));
        }
        let recall =
            |device: DeviceTag, what| operation::Kind::Recall(Recall { device_tag: device.0, what: Some(what) });
        if !collapse_key.is_empty() {
            let (shard, token) = self.placed(&state, &token)?;
            let registration_id = token.registration_id().0.to_vec().into();
            let what = What::CollapseKey(RecallKey { registration_id, collapse_key });
            let count = self.recalled(shard, recall(token.device_tag(), what)).await?;
            return Ok(RecallReply { count, shard: u32::from(shard.0), story: None });
        }
        let what = What::MessageId(message_id(&id)?.to_bytes().to_vec().into());
        let found = self.read_message(MessageRequest { message_id: id.clone(), token, here: false }).await?;
        let silent = found.silent_nodes;
        let Some(story) = found.story else {
            return Err(Status::not_found(match silent[..] {
                [] => format!("no message {id} waits, nor is remembered"),
                _ => format!("no node that answers knows a message {id}; nodes {silent:?} do not answer"),
            }));
        };
        let shard = Shard(u16::try_from(story.shard).unwrap_or(u16::MAX));
        if story.fate() != Fate::Waiting {
            return Ok(RecallReply { count: 0, shard: story.shard, story: Some(story) });
        }
        let count = self.recalled(shard, recall(DeviceTag(story.device_tag), what)).await?;
        Ok(RecallReply { count, shard: story.shard, story: Some(story) })
    }

    async fn recalled(&self, shard: Shard, kind: operation::Kind) -> Result<u32, Status> {
        let id = MessageId::mint(self.parts.clock.wall_ms().saturating_mul(1000), &mut rand::rng());
        let answer = self.parts.shards.operate(shard, id, kind).await;
        let answer = answer.map_err(|why| {
            Status::unavailable(format!("{why}; it may have been recalled, or not: asking again does no harm"))
        })?;
        match answer.kind {
            Some(answer::Kind::Recalled(Recalled { count })) => Ok(count),
            Some(answer::Kind::Refusal(refusal)) if refusal == Refusal::NotRegistered as i32 => {
                Err(Status::not_found("the token's registration is gone, and its messages with it"))
            }
            _ => Err(Status::internal("the shard answered in a way this version does not know")),
        }
    }

    async fn stories_here(
        &self,
        state: Arc<MetaState>,
        id: MessageId,
        of: Option<(Shard, DeviceTag)>,
    ) -> Result<Option<Story>, Status> {
        let replicas = match of {
            Some((shard, _)) => self.parts.shards.replica(shard).into_iter().collect(),
            None => self.parts.shards.replicas(),
        };
        let device = of.map(|(_, device)| device);
        let found = off_the_runtime(move || {
            replicas.into_iter().try_fold(None, |best, replica| {
                let known = replica.story(id, device)?;
                let with_row = known.map(|known| {
                    let (device, registration) = place_of(&known);
                    Ok::<_, StateError>((replica.shard, replica.registration(device, registration)?, known))
                });
                Ok::<_, StateError>(best.or(with_row.transpose()?))
            })
        })
        .await?;
        Ok(found.map(|(shard, row, known)| self.story(&state, shard, row.as_ref(), &known)))
    }

    async fn token_here(
        &self,
        state: Arc<MetaState>,
        shard: Shard,
        token: RegistrationToken,
    ) -> Result<Option<TokenReply>, Status> {
        let Some(replica) = self.parts.shards.replica(shard) else { return Ok(None) };
        let of = token.clone();
        let (leads, now_ms, view) = off_the_runtime(move || {
            let view = replica.token(of.device_tag(), of.registration_id())?;
            Ok::<_, StateError>((replica.leads(), replica.applied_ms(), view))
        })
        .await?;
        let TokenView { registration, successor, .. } = &view;
        let row = registration.clone().unwrap_or_default();
        let superseder = RegistrationId::from_bytes(&row.superseded_by).zip(successor.as_ref());
        let waits = view.newest.iter().map(|waits| Known::Waits(waits.clone()));
        let ended = view.ended.iter().map(|ended| Known::Ended(*ended));
        let stories =
            waits.chain(ended).map(|known| self.story(&state, shard, registration.as_ref(), &known)).collect();
        Ok(Some(TokenReply {
            token: fingerprint(token.as_str()),
            shard: u32::from(shard.0),
            device_tag: token.device_tag().0,
            leads,
            node_id: self.parts.config.node.id,
            registered: registration.is_some() && (row.expires_ms == 0 || row.expires_ms > now_ms),
            successor: superseder
                .and_then(|(id, row)| self.spelled(&state, token.device_tag(), id, row))
                .unwrap_or_default(),
            application: row.application,
            subtype: row.subtype,
            scope: row.scope,
            senders: row.senders,
            app_version: row.app_version,
            created_ms: row.created_ms,
            expires_ms: row.expires_ms,
            superseded_ms: row.superseded_ms,
            last_seen_day: view.last_seen_day,
            connected: view.attached.is_some(),
            gateway: view.attached.unwrap_or(0),
            gateway_name: String::new(),
            waiting: view.waiting,
            waiting_bytes: view.waiting_bytes,
            oldest_ms: view.oldest.as_ref().map_or(0, |oldest| oldest.accepted_ms),
            stories,
            silent_nodes: Vec::new(),
        }))
    }

    fn story(&self, state: &MetaState, shard: Shard, row: Option<&RegistrationRow>, known: &Known) -> Story {
        let (device, registration) = place_of(known);
        let token = row.and_then(|row| self.spelled(state, device, registration, row)).unwrap_or_default();
        let story = match known {
            Known::Ended(ended) => ended_story(ended),
            Known::Waits(waits) => waiting_story(waits),
        };
        Story {
            shard: u32::from(shard.0),
            device_tag: device.0,
            registration_id: registration.0.to_vec().into(),
            token,
            ..story
        }
    }

    /// The hash of a registration's token.
    fn spelled(
        &self,
        state: &MetaState,
        device: DeviceTag,
        id: RegistrationId,
        row: &RegistrationRow,
    ) -> Option<String> {
        let key = self.token_key(state, row.token_key_id).ok()?;
        let token = RegistrationToken::mint(&key, &Iid::parse(&row.iid).ok()?, device, id).ok()?;
        Some(fingerprint(token.as_str()))
    }

    /// A token of this cluster, and its shard.
    fn placed(&self, state: &MetaState, text: &str) -> Result<(Shard, RegistrationToken), Status> {
        let wrong = |error: TokenError| Status::invalid_argument(format!("no token of this cluster: {error}"));
        let token = RegistrationToken::parse(text).map_err(wrong)?;
        let key = self.token_key(state, token.key_id()).map_err(|_| {
            Status::invalid_argument(format!(
                "no token of this cluster: it names token key {}, which is not here",
                token.key_id()
            ))
        })?;
        let token = token.verify(&key).map_err(wrong)?;
        Ok((shard_of(token.device_tag(), shards_of(state)?), token))
    }

    /// The names of gateways by the beginning of their ids, as far as any node knows them still.
    async fn gateways(&self, state: &MetaState) -> BTreeMap<u32, String> {
        let (_, gateways) = self.everywhere(&state.nodes).await;
        gateways.into_iter().map(|status| (link::gateway(&status.gateway), status.name)).collect()
    }
}

fn message_id(text: &str) -> Result<MessageId, Status> {
    text.parse().map_err(|error| {
        Status::invalid_argument(format!("{text:?}: {error}; it has the form 0:1700000000000000%0123456789abcdef"))
    })
}

fn place_of(known: &Known) -> (DeviceTag, RegistrationId) {
    match known {
        Known::Ended(ended) => (ended.device, ended.registration),
        Known::Waits(waits) => (waits.device, waits.registration),
    }
}

fn ended_story(ended: &Ended) -> Story {
    let (fate, gateway, by) = match ended.end {
        End::Delivered { gateway } => (Fate::Delivered, gateway, None),
        End::Expired => (Fate::Expired, 0, None),
        End::Collapsed { by } => (Fate::Collapsed, 0, Some(by)),
        End::Overflow => (Fate::Overflow, 0, None),
        End::Unregistered => (Fate::Unregistered, 0, None),
        End::Recalled => (Fate::Recalled, 0, None),
    };
    Story {
        message_id: ended.message_id.to_string(),
        fate: fate as i32,
        term: ended.term,
        index: ended.sequence.index,
        accepted_ms: ended.accepted_ms,
        ended_ms: ended.ended_ms,
        gateway,
        by: by.map(|id| id.to_string()).unwrap_or_default(),
        ..Story::default()
    }
}

fn waiting_story(waits: &Waits) -> Story {
    Story {
        message_id: waits.message_id.to_string(),
        fate: Fate::Waiting as i32,
        term: waits.term,
        index: waits.sequence.index,
        accepted_ms: waits.accepted_ms,
        expires_ms: waits.expiry_ms,
        gateway: waits.attached.map_or(0, |(gateway, _)| gateway),
        written: waits.attached.is_some_and(|(_, written)| written),
        ..Story::default()
    }
}

/// Of two that speak of one message the one to believe: an end is final.
fn surer(one: Option<Story>, other: Story) -> Option<Story> {
    match one {
        Some(one) if one.fate() != Fate::Waiting || other.fate() == Fate::Waiting => Some(one),
        _ => Some(other),
    }
}

/// What several replicas say of one token: the leader's facts, and the stories of all.
fn merged(replies: Vec<TokenReply>) -> Option<TokenReply> {
    let mut stories: BTreeMap<String, Story> = BTreeMap::new();
    for story in replies.iter().flat_map(|reply| &reply.stories) {
        let known = stories.remove(&story.message_id);
        stories.extend(surer(known, story.clone()).map(|story| (story.message_id.clone(), story)));
    }
    let mut stories: Vec<Story> = stories.into_values().collect();
    stories.sort_by_key(|story| std::cmp::Reverse((story.index, story.accepted_ms, story.message_id.clone())));
    stories.truncate(STORIES_OF_TOKEN_MAX);
    let best = replies.into_iter().max_by_key(|reply| (reply.leads, reply.created_ms))?;
    Some(TokenReply { stories, ..best })
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    fn story(message_id: &str, index: u64, fate: Fate) -> Story {
        Story { message_id: message_id.into(), index, fate: fate as i32, ..Story::default() }
    }

    #[test]
    fn of_a_token_the_leader_says_what_it_is_and_every_replica_what_became_of_its_messages() {
        let follower = TokenReply {
            stories: vec![story("a", 1, Fate::Delivered), story("c", 3, Fate::Expired)],
            waiting: 0,
            ..TokenReply::default()
        };
        let leader = TokenReply {
            leads: true,
            waiting: 1,
            stories: vec![story("d", 4, Fate::Waiting), story("c", 3, Fate::Waiting)],
            ..TokenReply::default()
        };
        let merged = merged(vec![follower, leader]).unwrap();
        assert_eq!((merged.leads, merged.waiting), (true, 1));
        let told: Vec<_> = merged.stories.iter().map(|story| (&*story.message_id, story.fate())).collect();
        assert_eq!(told, [("d", Fate::Waiting), ("c", Fate::Expired), ("a", Fate::Delivered)]);
    }

    #[test]
    fn of_many_stories_the_newest_are_told() {
        let stories = (0..120).map(|n| story(&n.to_string(), n, Fate::Delivered)).collect();
        let merged = merged(vec![TokenReply { stories, ..TokenReply::default() }]).unwrap();
        assert_eq!((merged.stories.len(), merged.stories[0].index), (STORIES_OF_TOKEN_MAX, 119));
    }

    #[test]
    fn every_end_has_a_fate_of_its_own() {
        let by = MessageId { micros: 1, random: 2 };
        let ends = [
            End::Delivered { gateway: 7 },
            End::Expired,
            End::Collapsed { by },
            End::Overflow,
            End::Unregistered,
            End::Recalled,
        ];
        let ended = |end| Ended {
            message_id: by,
            device: DeviceTag(1),
            registration: RegistrationId([0; 16]),
            sequence: martlet_proto::message::Sequence { incarnation: 0, index: 1, position: 0 },
            term: 1,
            accepted_ms: 1,
            ended_ms: 2,
            end,
        };
        let fates: BTreeSet<i32> = ends.into_iter().map(|end| ended_story(&ended(end)).fate).collect();
        assert_eq!(fates.len(), ends.len());
        assert!(!fates.contains(&(Fate::Waiting as i32)) && !fates.contains(&(Fate::Unspecified as i32)));
        assert_eq!(ended_story(&ended(End::Collapsed { by })).by, by.to_string());
    }
}

//! `Admin.Group`: shows one device group, wherever its shard is led.
//!
//! Owns the way to the leader and the hiding of keys and tokens: what leaves here is their hashes. Leaves the reading to the shard.

use std::time::Duration;

use martlet_proto::{
    cluster::{
        admin::{GroupReply, GroupRequest},
        meta::{KeyPurpose, MetaState, Node},
        queue::{Group, GroupGet, GroupMember, Refusal, answer::Kind, group_get::By},
    },
    group::{GroupBits, GroupTag, NotificationKey},
    message::SenderId,
    shard::{Shard, ShardCount, shard_of},
    tag::{DeviceTag, TagKey},
    token::{Iid, RegistrationId, RegistrationToken, TokenKey, fingerprint},
};
use tokio::time::timeout;
use tonic::{Code, Status};

use super::admin::AdminService;

/// Longest another node is waited for.
pub(super) const ASK_MAX: Duration = Duration::from_secs(2);

impl AdminService {
    /// Reads a group here or where its shard is led.
    pub(super) async fn read_group(&self, request: GroupRequest) -> Result<GroupReply, Status> {
        let sender = SenderId::parse(&request.sender_id)
            .map_err(|error| Status::invalid_argument(format!("sender id {:?}: {error}", request.sender_id)))?;
        let state = self.kept();
        let count = ShardCount::new(state.shard_count)
            .ok_or_else(|| Status::failed_precondition("this cluster has no shards yet"))?;
        let tag = GroupTag::of(&TagKey::new(self.key(&state, KeyPurpose::Tag, None)?), &sender, &request.name);
        let shard = shard_of(DeviceTag(tag.0), count);
        let by = Some(By::Name(request.name.clone()));
        let get = GroupGet { group_tag: tag.0, sender: request.sender_id.clone(), by };
        match self.parts.shards.group(shard, &get) {
            Ok(answer) => match answer.kind {
                Some(Kind::Group(group)) => self.told(&state, shard, tag, group),
                Some(Kind::Refusal(refusal)) if refusal == Refusal::GroupNotFound as i32 => {
                    let GroupRequest { sender_id, name, .. } = request;
                    Err(Status::not_found(format!("sender {sender_id} has no group {name:?}")))
                }
                _ => Err(Status::internal("the shard answered without a group")),
            },
            Err(why) if request.here => Err(Status::unavailable(why)),
            Err(_) => self.ask_others(&state, shard, request).await,
        }
    }

    /// Asks the other nodes of a shard; the one that leads it answers.
    async fn ask_others(&self, state: &MetaState, shard: Shard, request: GroupRequest) -> Result<GroupReply, Status> {
        let mut said = Status::unavailable(format!("no node leads shard {shard} at this moment"));
        let own = self.parts.config.node.id;
        for node in nodes_of(state, shard).filter(|node| node.node_id != own) {
            let mut admin = self.parts.peers.admin(node);
            match timeout(ASK_MAX, admin.group(GroupRequest { here: true, ..request.clone() })).await {
                Ok(Ok(reply)) => return Ok(reply.into_inner()),
                Ok(Err(status)) if status.code() == Code::Unavailable => {}
                // Only who leads says anything else.
                Ok(Err(status)) => return Err(status),
                Err(_) => said = Status::unavailable(format!("node {} does not answer", node.node_id)),
            }
        }
        Err(said)
    }

    fn told(&self, state: &MetaState, shard: Shard, tag: GroupTag, group: Group) -> Result<GroupReply, Status> {
        let Group { key_bits, token_key_id, created_ms, members, .. } = group;
        let key = NotificationKey::mint(&self.token_key(state, token_key_id)?, tag, GroupBits(key_bits));
        let key = key.map_err(|error| Status::internal(error.to_string()))?;
        let members = members.iter().map(|member| self.token(state, member)).collect::<Result<_, _>>()?;
        let shard = u32::from(shard.0);
        Ok(GroupReply { notification_key: fingerprint(key.as_str()), shard, created_ms, members })
    }

    /// The hash of a member's token.
    fn token(&self, state: &MetaState, member: &GroupMember) -> Result<String, Status> {
        let key = self.token_key(state, member.token_key_id)?;
        let tag = DeviceTag(member.device_tag);
        let minted = RegistrationId::from_bytes(&member.registration_id)
            .zip(Iid::parse(&member.iid).ok())
            .and_then(|(id, iid)| RegistrationToken::mint(&key, &iid, tag, id).ok());
        let token = minted.ok_or_else(|| Status::internal("a member is no registration of ours"))?;
        Ok(fingerprint(token.as_str()))
    }

    pub(super) fn token_key(&self, state: &MetaState, id: u32) -> Result<TokenKey, Status> {
        Ok(TokenKey::new(id, self.key(state, KeyPurpose::Token, Some(id))?))
    }

    /// Opens a key of the cluster: the one of this id, or the only one of its purpose.
    fn key(&self, state: &MetaState, purpose: KeyPurpose, id: Option<u32>) -> Result<[u8; 32], Status> {
        let key = state.keys.iter().find(|key| key.purpose() == purpose && id.is_none_or(|id| key.key_id == id));
        let key = key.ok_or_else(|| Status::failed_precondition(format!("the cluster has no such {purpose:?} key")))?;
        let opened = self.parts.secret.unseal(&state.cluster_id, key);
        opened.map_err(|error| Status::internal(format!("{purpose:?} key {}: {error}", key.key_id)))
    }
}

pub(super) fn nodes_of(state: &MetaState, shard: Shard) -> impl Iterator<Item = &Node> {
    let replicas = state.shards.iter().filter(move |map| map.shard == u32::from(shard.0)).flat_map(|map| &map.replicas);
    replicas.filter_map(|replica| state.nodes.iter().find(|node| node.node_id == replica.node_id))
}

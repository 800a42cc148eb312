//! `Admin.Topic` and `Counts`: what each shard's leader says, side by side.
//!
//! Owns the gathering of one answer a shard. A shard whose leader does not answer is missing in the reply, which says how many there are.

use martlet_proto::{
    cluster::{
        admin::{
            CountsReply, CountsRequest, ShardCounts, TopicReply, TopicRequest, TopicShard, admin_client::AdminClient,
        },
        meta::MetaState,
    },
    message::SenderId,
    topic::{self, Condition},
};
use tonic::{Response, Status, transport::Channel};

use super::{
    admin::AdminService,
    ask::{SEARCH_MAX, off_the_runtime, shards_of},
    group::ASK_MAX,
};
use crate::{shard::Replica, state::StateError};

impl AdminService {
    /// Who subscribes to a topic.
    pub(super) async fn read_topic(&self, request: TopicRequest) -> Result<TopicReply, Status> {
        let state = self.kept();
        let (sender, count) = (known_sender(&state, &request.sender_id)?, shards_of(&state)?);
        let name = request.name.strip_prefix(topic::PREFIX).unwrap_or(&request.name).to_owned();
        if !topic::is_name(&name) {
            return Err(Status::invalid_argument(format!(
                "topic {name:?}: a name is 1 to 900 characters of [a-zA-Z0-9-_.~%]"
            )));
        }
        let home = Condition::topic(&name).home(sender.as_str(), count);
        let of = sender.as_str().to_owned();
        let topic = name.clone();
        let mut shards = self
            .led_here(move |replica| {
                let view = replica.topic(&of, &topic)?;
                Ok(TopicShard { shard: u32::from(replica.shard.0), subscribers: view.subscribers, open: view.open })
            })
            .await?;
        if !request.here {
            let wanted = TopicRequest { here: true, name, ..request };
            let ask = |mut admin: AdminClient<Channel>| {
                let wanted = wanted.clone();
                async move { admin.topic(wanted).await.map(Response::into_inner) }
            };
            let (replies, _) = self.ask_all(&state.nodes, SEARCH_MAX, ask).await;
            shards.extend(replies.into_iter().flat_map(|reply| reply.shards));
            shards.sort_by_key(|of| of.shard);
            shards.dedup_by_key(|of| of.shard);
        }
        Ok(TopicReply { shards, home: u32::from(home.0), shard_count: u32::from(count.get()) })
    }

    /// What became of a project's messages.
    pub(super) async fn read_counts(&self, request: CountsRequest) -> Result<CountsReply, Status> {
        let state = self.kept();
        let (sender, count) = (known_sender(&state, &request.sender_id)?, shards_of(&state)?);
        let mut shards = self
            .led_here(move |replica| {
                let row = replica.counts(sender.as_str())?;
                Ok(ShardCounts {
                    shard: u32::from(replica.shard.0),
                    accepted: row.accepted,
                    delivered: row.delivered,
                    waiting: row.waiting().unwrap_or(0),
                    expired: row.expired,
                    collapsed: row.collapsed,
                    overflow: row.overflow,
                    unregistered: row.unregistered,
                    recalled: row.recalled,
                    stored_bytes: row.stored_bytes,
                })
            })
            .await?;
        if !request.here {
            let wanted = CountsRequest { here: true, ..request };
            let ask = |mut admin: AdminClient<Channel>| {
                let wanted = wanted.clone();
                async move { admin.counts(wanted).await.map(Response::into_inner) }
            };
            let (replies, _) = self.ask_all(&state.nodes, ASK_MAX, ask).await;
            shards.extend(replies.into_iter().flat_map(|reply| reply.shards));
            shards.sort_by_key(|of| of.shard);
            shards.dedup_by_key(|of| of.shard);
        }
        Ok(CountsReply { shards, shard_count: u32::from(count.get()) })
    }

    /// What each replica that leads here says.
    async fn led_here<T: Send + 'static>(
        &self,
        read: impl Fn(&Replica) -> Result<T, StateError> + Send + 'static,
    ) -> Result<Vec<T>, Status> {
        let replicas = self.parts.shards.replicas();
        off_the_runtime(move || {
            replicas.iter().filter(|replica| replica.leads()).map(|replica| read(replica)).collect()
        })
        .await
    }
}

fn known_sender(state: &MetaState, text: &str) -> Result<SenderId, Status> {
    if !state.projects.iter().any(|project| project.sender_id == text) {
        return Err(Status::not_found(format!("there is no project {text}; `project list` shows all")));
    }
    SenderId::parse(text).map_err(|error| Status::invalid_argument(format!("sender id {text:?}: {error}")))
}

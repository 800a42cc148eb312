//! The watch: the state at once and at every change, from any node, with or without a quorum; revoked keys are confirmed.

use martlet_proto::cluster::{
    admin::RevokeKeyRequest,
    meta::{MetaState, WatchReply, WatchRequest},
};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Streaming;

use crate::nodes::{Nodes, until};

struct Watch {
    say: mpsc::Sender<WatchRequest>,
    replies: Streaming<WatchReply>,
}

impl Watch {
    async fn open(nodes: &Nodes, at: usize) -> Self {
        let (say, requests) = mpsc::channel(8);
        say.send(hello(0)).await.unwrap();
        let replies = nodes.meta(at).watch(ReceiverStream::new(requests)).await.unwrap().into_inner();
        Self { say, replies }
    }

    /// The next reply with a state that `fits`; keepalives go by.
    async fn state(&mut self, fits: impl Fn(&MetaState) -> bool) -> MetaState {
        loop {
            let reply = self.replies.message().await.unwrap().expect("the watch goes on");
            assert_eq!(reply.lease_ms, 10_000);
            if let Some(state) = reply.state.filter(&fits) {
                return state;
            }
        }
    }
}

fn hello(confirmed_revision: u64) -> WatchRequest {
    WatchRequest {
        gateway: vec![7; 16].into(),
        name: "a gateway".into(),
        confirmed_revision,
        confirmed_token_keys: vec![1],
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_watch_tells_the_state_at_once_and_every_change_and_keeps_itself_alive() {
    let mut nodes = Nodes::created(1, 2).await;
    let mut watch = Watch::open(&nodes, 1).await;
    let first = watch.state(|_| true).await;
    assert_eq!((first.shards.len(), first.projects.len()), (2, 0));
    nodes.create_project(1, "100000000001").await.unwrap();
    watch.state(|state| state.projects.len() == 1 && state.revision > first.revision).await;
    while watch.replies.message().await.unwrap().unwrap().state.is_some() {}
    nodes.stop(1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_revocation_returns_when_the_gateway_has_confirmed_it() {
    let mut nodes = Nodes::created(3, 2).await;
    nodes.create_project(1, "100000000001").await.unwrap();
    let mut watch = Watch::open(&nodes, 2).await;
    watch.state(|state| !state.projects.is_empty()).await;
    until("another node's status names the gateway", async || {
        nodes.status(3).await.gateways.iter().any(|gateway| gateway.name == "a gateway")
    })
    .await;

    let mut admin = nodes.admin(3);
    let request = RevokeKeyRequest { sender_id: "100000000001".into(), key_id: 1 };
    let confirming = async {
        let revoked = watch.state(|state| state.projects[0].server_keys[0].revoked_ms != 0).await;
        watch.say.send(hello(revoked.revision)).await.unwrap();
        revoked
    };
    let (reply, revoked) = tokio::join!(admin.revoke_key(request), confirming);
    let reply = reply.unwrap().into_inner();
    assert_eq!((reply.revision, reply.unconfirmed, reply.accepts_for_at_most_ms), (revoked.revision, vec![], 0));
    nodes.stop_all().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_revocation_names_the_gateway_that_does_not_confirm_and_forgets_one_that_said_goodbye() {
    let mut nodes = Nodes::created(1, 1).await;
    nodes.create_project(1, "100000000001").await.unwrap();
    let mut watch = Watch::open(&nodes, 1).await;
    watch.state(|_| true).await;
    let request = RevokeKeyRequest { sender_id: "100000000001".into(), key_id: 1 };
    let reply = nodes.admin(1).revoke_key(request.clone()).await.unwrap().into_inner();
    assert_eq!(reply.unconfirmed.len(), 1);
    assert_eq!(reply.unconfirmed[0].name, "a gateway");
    assert_ne!(reply.accepts_for_at_most_ms, 0);

    drop(watch.say);
    while watch.replies.message().await.unwrap().is_some() {}
    let reply = nodes.admin(1).revoke_key(request).await.unwrap().into_inner();
    assert_eq!(reply.unconfirmed, vec![]);
    nodes.stop(1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_serves_the_watch_without_a_quorum_also_after_a_restart() {
    let mut nodes = Nodes::created(3, 2).await;
    nodes.create_project(1, "100000000001").await.unwrap();
    nodes.knows_projects(3, 1).await;
    nodes.stop_all().await;
    nodes.start(3).await;
    let mut watch = Watch::open(&nodes, 3).await;
    watch.state(|state| state.projects.len() == 1).await;
    nodes.ready(3).await;
    nodes.stop(3).await;
}

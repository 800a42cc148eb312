//! Follows the meta state of the cluster from whichever node answers.
//!
//! Owns the one task that holds a `Meta.Watch` stream, and moves on to another node when it breaks, falls silent for a lease,
//! or somebody needs newer keys. A state is in force before it is confirmed: a revocation that the meta group reports as
//! confirmed is refused here already. A state older than the one in force is passed over, so a lagging node takes nothing back.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use martlet_proto::{
    cluster::meta::{MetaState, WatchRequest, meta_client::MetaClient},
    limits::META_STATE_MAX_BYTES,
};
use rand::Rng;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;

use super::{
    Route,
    facts::{Facts, RejectedState},
    link,
};

/// Confirmations that wait: one per state, and states wait for them.
const CONFIRMATIONS_MAX: usize = 4;
/// Silence that ends a stream before its first reply.
const FIRST_REPLY: Duration = Duration::from_secs(10);

#[derive(Debug, thiserror::Error)]
enum Ended {
    #[error("{0}")]
    Stream(#[from] Box<Status>),
    #[error(transparent)]
    Address(#[from] link::NotAnAddress),
    #[error("nothing was heard for a lease")]
    Silent,
    #[error(transparent)]
    Rejected(#[from] RejectedState),
    #[error("newer keys are needed")]
    AskedAgain,
}

/// Follows until it is dropped.
pub(super) async fn follow(route: &Route) {
    let config = &route.0.config;
    let mut wait = config.retry_min;
    for turn in 0_usize.. {
        let addresses = route.addresses();
        let address = &addresses[turn % addresses.len()];
        let mut heard = false;
        match watch(route, address, &mut heard).await {
            Ended::AskedAgain => continue,
            Ended::Rejected(error) => {
                route.0.metrics.meta_rejected.inc();
                tracing::error!(%address, %error, "a meta state was not taken");
            }
            error => tracing::debug!(%address, %error, "the watch of the meta state ended"),
        }
        if heard {
            wait = config.retry_min;
        }
        let jitter = route.0.entropy.draw(|rng| rng.random_range(0.5..1.0));
        tokio::time::sleep(wait.mul_f64(jitter)).await;
        wait = (wait * 2).min(config.dial_max);
    }
}

async fn watch(route: &Route, address: &str, heard: &mut bool) -> Ended {
    match stream(route, address, heard).await {
        Ok(never) => match never {},
        Err(ended) => ended,
    }
}

async fn stream(route: &Route, address: &str, heard: &mut bool) -> Result<std::convert::Infallible, Ended> {
    let (confirm, requests) = mpsc::channel(CONFIRMATIONS_MAX);
    confirm.try_send(confirmation(route)).expect("the channel is new");
    let mut client =
        MetaClient::new(link::channel(address, &route.0.config)?).max_decoding_message_size(META_STATE_MAX_BYTES);
    let mut replies = tokio::time::timeout(FIRST_REPLY, client.watch(ReceiverStream::new(requests)))
        .await
        .map_err(|_| Ended::Silent)?
        .map_err(Box::new)?
        .into_inner();
    let mut silence = FIRST_REPLY;
    loop {
        let reply = tokio::select! {
            () = route.0.ask_again.notified() => return Err(Ended::AskedAgain),
            reply = tokio::time::timeout(silence, replies.message()) => reply,
        };
        let reply = reply.map_err(|_| Ended::Silent)?.map_err(Box::new)?;
        let Some(reply) = reply else { return Err(Box::new(Status::unavailable("the node closed the watch")).into()) };
        if let Some(state) = reply.state {
            take(route, &state)?;
            if confirm.send(confirmation(route)).await.is_err() {
                return Err(Ended::Silent);
            }
        }
        // A lease counts only with a state: before the first there is nothing to serve by.
        *heard = true;
        let lease = Duration::from_millis(reply.lease_ms);
        route.leased(lease);
        silence = lease.max(route.0.config.connect_timeout);
    }
}

/// Puts a state in force, unless it is older than the one that is.
fn take(route: &Route, state: &MetaState) -> Result<(), RejectedState> {
    if let Some(facts) = route.0.facts.borrow().as_ref() {
        if facts.cluster_id != state.cluster_id {
            return Err(RejectedState::AnotherCluster);
        }
        if facts.revision >= state.revision {
            return Ok(());
        }
    }
    let facts = Facts::open(state, &route.0.secret)?;
    tracing::info!(revision = facts.revision, "a meta state is in force");
    route.adopt(state, Arc::new(facts));
    Ok(())
}

fn confirmation(route: &Route) -> WatchRequest {
    let facts = route.0.facts.borrow();
    WatchRequest {
        gateway: Bytes::copy_from_slice(&route.0.gateway),
        name: route.0.name.clone(),
        confirmed_revision: facts.as_ref().map_or(0, |facts| facts.revision),
        confirmed_token_keys: facts.as_ref().map_or_else(Vec::new, |facts| facts.token_key_ids()),
    }
}

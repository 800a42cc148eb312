//! One pair of streams to one node: Control and Deliver.
//!
//! The task of a link is owned by its lane's driver, dials for as long as it is wanted, and reports in order: up, replies, down.
//! It always reads: nothing on the way from here to a connection's queue waits for a device.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use martlet_proto::cluster::queue::{
    ControlReply, ControlRequest, DeliverReply, DeliverRequest, Hello, StreamCredit, control_request, deliver_request,
    queue_client::QueueClient,
};
use rand::Rng;
use tokio::sync::mpsc;
use tokio_stream::{StreamExt, wrappers::ReceiverStream};
use tokio_util::sync::CancellationToken;
use tonic::{Status, Streaming, transport::Channel};

use super::{AttachConfig, Routes};

/// What a link tells its lane.
#[derive(Debug)]
#[expect(clippy::large_enum_variant, reason = "nearly all of them are deliveries, the large variant")]
pub(crate) enum LinkEvent {
    Up { node: u64, generation: u64, outbound: Outbound },
    Control { node: u64, generation: u64, reply: ControlReply },
    Deliver { node: u64, generation: u64, reply: DeliverReply },
    Down { node: u64, generation: u64 },
}

/// Where requests for a node go. Full means that the node does not keep up: the link is reset.
#[derive(Debug)]
pub(crate) struct Outbound {
    pub(crate) control: mpsc::Sender<ControlRequest>,
    pub(crate) deliver: mpsc::Sender<DeliverRequest>,
    pub(crate) reset: CancellationToken,
}

/// Which pair it is.
#[derive(Debug, Clone)]
pub(crate) struct LinkName {
    pub(crate) gateway: Bytes,
    pub(crate) link: u32,
    pub(crate) node: u64,
}

/// Dials until `stop` fires or the lane is gone.
pub(crate) async fn run(
    name: LinkName,
    config: AttachConfig,
    routes: Arc<dyn Routes>,
    lane: mpsc::Sender<LinkEvent>,
    stop: CancellationToken,
) {
    let mut generation = 0;
    let mut failures = 0;
    loop {
        generation += 1;
        let lived = tokio::select! {
            () = stop.cancelled() => return,
            lived = connect(&name, &config, &*routes, &lane, generation) => lived,
        };
        match lived {
            Ok(()) => failures = 0,
            Err(status) => {
                failures += 1;
                tracing::debug!(node = name.node, link = name.link, code = ?status.code(), "link to node failed");
            }
        }
        let wait = pause(&config, failures);
        tokio::select! {
            () = stop.cancelled() => return,
            () = tokio::time::sleep(wait) => {}
        }
    }
}

/// Opens both streams and passes replies on until one of them ends. `Err` when it never came up.
async fn connect(
    name: &LinkName,
    config: &AttachConfig,
    routes: &dyn Routes,
    lane: &mpsc::Sender<LinkEvent>,
    generation: u64,
) -> Result<(), Status> {
    let node = name.node;
    let channel = routes.channel(node).ok_or_else(|| Status::unavailable("the node is not in the map"))?;
    let (outbound, mut control, mut deliver) = open(name, config, channel).await?;
    let reset = outbound.reset.clone();
    let gone = |_| Status::cancelled("the lane is gone");
    lane.send(LinkEvent::Up { node, generation, outbound }).await.map_err(gone)?;
    loop {
        let event = tokio::select! {
            () = reset.cancelled() => None,
            reply = control.next() => match reply {
                Some(Ok(reply)) => Some(LinkEvent::Control { node, generation, reply }),
                Some(Err(_)) | None => None,
            },
            reply = deliver.next() => match reply {
                Some(Ok(reply)) => Some(LinkEvent::Deliver { node, generation, reply }),
                Some(Err(_)) | None => None,
            },
        };
        let Some(event) = event else { break };
        lane.send(event).await.map_err(gone)?;
    }
    lane.send(LinkEvent::Down { node, generation }).await.map_err(gone)
}

async fn open(
    name: &LinkName,
    config: &AttachConfig,
    channel: Channel,
) -> Result<(Outbound, Streaming<ControlReply>, Streaming<DeliverReply>), Status> {
    let hello = || Hello { gateway: name.gateway.clone(), link: name.link };
    let (control, control_requests) = mpsc::channel(config.outbound_max.max(2));
    let (deliver, deliver_requests) = mpsc::channel(config.outbound_max.max(2));
    let first = [deliver_request::Kind::Hello(hello()), credit(config.stream_credit_bytes)];
    // The requests wait in the channels before the calls are made: a node may look at the Hello before it answers.
    for kind in first {
        let room = deliver.try_send(DeliverRequest { kind: Some(kind) });
        room.map_err(|_| Status::internal("no room for the first requests"))?;
    }
    let kind = Some(control_request::Kind::Hello(hello()));
    control.try_send(ControlRequest { kind }).map_err(|_| Status::internal("no room for the first request"))?;
    let mut control_client = QueueClient::new(channel.clone());
    let mut deliver_client = QueueClient::new(channel);
    let (control_replies, deliver_replies) = tokio::try_join!(
        control_client.control(ReceiverStream::new(control_requests)),
        deliver_client.deliver(ReceiverStream::new(deliver_requests)),
    )?;
    let outbound = Outbound { control, deliver, reset: CancellationToken::new() };
    Ok((outbound, control_replies.into_inner(), deliver_replies.into_inner()))
}

fn credit(bytes: u64) -> deliver_request::Kind {
    deliver_request::Kind::StreamCredit(StreamCredit { bytes })
}

fn pause(config: &AttachConfig, failures: u32) -> Duration {
    let whole = config.retry_min.saturating_mul(1 << failures.min(16)).min(config.retry_max);
    whole.mul_f64(0.5 + 0.5 * rand::rng().random::<f64>())
}

//! The gRPC service `Queue`: a gateway's three streams.
//!
//! Owns the reading of requests and the form of the streams; what they mean is the business of [`Shards`]. A stream that breaks its
//! contract (no Hello first) is ended with INVALID_ARGUMENT. The invariant: requests are not read faster than replies are.

use std::{pin::Pin, sync::Arc};

use futures::{Stream, stream};
use martlet_proto::cluster::queue::{
    ControlReply, ControlRequest, DeliverReply, DeliverRequest, Hello, SubmitReply, SubmitRequest, control_request,
    deliver_request, queue_server::Queue,
};
use tokio::sync::{Semaphore, oneshot};
use tonic::{Request, Response, Status, Streaming};

use crate::{
    delivery::link::{Half, Link},
    shard::{Shards, replies::Replies},
};

type Out<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

/// Serves the shards of this node to gateways.
#[derive(Debug, Clone)]
pub struct QueueService {
    shards: Arc<Shards>,
}

impl QueueService {
    /// Serves these shards.
    pub fn new(shards: Arc<Shards>) -> Self {
        QueueService { shards }
    }
}

/// Who a stream is, once its Hello was read.
type Named = oneshot::Receiver<Result<Arc<Link>, Status>>;

#[tonic::async_trait]
impl Queue for QueueService {
    type SubmitStream = Out<SubmitReply>;
    type ControlStream = Out<ControlReply>;
    type DeliverStream = Out<DeliverReply>;

    async fn submit(&self, request: Request<Streaming<SubmitRequest>>) -> Result<Response<Out<SubmitReply>>, Status> {
        let replies = Arc::new(Replies::new(self.shards.settings().batches_per_stream_max));
        let (shards, expected) = (Arc::clone(&self.shards), Arc::clone(&replies));
        self.shards.tracker().spawn(read_batches(shards, request.into_inner(), expected));
        let out = stream::unfold(replies, async |replies| Some((Ok(replies.next().await?), replies)));
        Ok(Response::new(Box::pin(out)))
    }

    async fn control(
        &self,
        request: Request<Streaming<ControlRequest>>,
    ) -> Result<Response<Out<ControlReply>>, Status> {
        let (name, named) = oneshot::channel();
        self.shards.tracker().spawn(read_control(Arc::clone(&self.shards), request.into_inner(), name));
        let out = stream::unfold(Outgoing::Unnamed(named), async |half| {
            let link = match half.link().await? {
                Ok(link) => link,
                Err(status) => return Some((Err(status), Outgoing::Over)),
            };
            let reply = link.next_reply().await?;
            Some((Ok(reply), Outgoing::Named(link)))
        });
        Ok(Response::new(Box::pin(out)))
    }

    async fn deliver(
        &self,
        request: Request<Streaming<DeliverRequest>>,
    ) -> Result<Response<Out<DeliverReply>>, Status> {
        let (name, named) = oneshot::channel();
        self.shards.tracker().spawn(read_deliver(Arc::clone(&self.shards), request.into_inner(), name));
        let shards = Arc::clone(&self.shards);
        let out = stream::unfold((Outgoing::Unnamed(named), shards), async |(half, shards)| {
            let link = match half.link().await? {
                Ok(link) => link,
                Err(status) => return Some((Err(status), (Outgoing::Over, shards))),
            };
            let reply = shards.next_delivery(&link).await?;
            Some((Ok(reply), (Outgoing::Named(link), shards)))
        });
        Ok(Response::new(Box::pin(out)))
    }
}

/// The outgoing half of a stream.
enum Outgoing {
    Unnamed(Named),
    Named(Arc<Link>),
    Over,
}

impl Outgoing {
    async fn link(self) -> Option<Result<Arc<Link>, Status>> {
        match self {
            Outgoing::Unnamed(named) => named.await.ok(),
            Outgoing::Named(link) => Some(Ok(link)),
            Outgoing::Over => None,
        }
    }
}

/// Ends with the stream or the node. Owned by the shards' tracker, as all readers.
async fn read_batches(shards: Arc<Shards>, mut requests: Streaming<SubmitRequest>, replies: Arc<Replies>) {
    let read = async {
        while let Ok(Some(request)) = requests.message().await {
            for batch in request.batches {
                replies.has_room().await;
                replies.expect();
                shards.submit(batch, &replies);
            }
        }
    };
    tokio::select! {
        () = read => {}
        () = shards.ended().cancelled() => {}
    }
    replies.end();
}

async fn read_control(
    shards: Arc<Shards>,
    mut requests: Streaming<ControlRequest>,
    name: oneshot::Sender<Result<Arc<Link>, Status>>,
) {
    let hello = match requests.message().await {
        Ok(Some(ControlRequest { kind: Some(control_request::Kind::Hello(hello)) })) => Some(hello),
        _ => None,
    };
    let Some(link) = joined(&shards, hello, Half::Control, name) else { return };
    let attaching = Arc::new(Semaphore::new(shards.settings().attach_batches_per_link_max));
    let read = async {
        while let Ok(Some(request)) = requests.message().await {
            link.has_room().await;
            match request.kind {
                Some(control_request::Kind::Attach(batch)) => {
                    let Ok(permit) = Arc::clone(&attaching).acquire_owned().await else { return };
                    batch.attaches.iter().for_each(|attach| link.attach_begins(attach.attach));
                    let (shards, link) = (Arc::clone(&shards), Arc::clone(&link));
                    // Not waited for here: a shard without a quorum must not hold up the acks of the others.
                    shards.clone().tracker().spawn(async move {
                        tokio::select! {
                            () = shards.attach(&link, batch) => {}
                            () = link.closed().cancelled() => {}
                        }
                        drop(permit);
                    });
                }
                Some(control_request::Kind::Detach(detach)) => shards.detach(&link, detach.shard, detach.attach),
                Some(control_request::Kind::Ack(ack)) => shards.ack(&link, ack),
                Some(control_request::Kind::Hello(_)) | None => return,
            }
        }
    };
    tokio::select! {
        () = read => {}
        () = link.closed().cancelled() => {}
        () = shards.ended().cancelled() => {}
    }
    shards.link_gone(&link);
}

async fn read_deliver(
    shards: Arc<Shards>,
    mut requests: Streaming<DeliverRequest>,
    name: oneshot::Sender<Result<Arc<Link>, Status>>,
) {
    let hello = match requests.message().await {
        Ok(Some(DeliverRequest { kind: Some(deliver_request::Kind::Hello(hello)) })) => Some(hello),
        _ => None,
    };
    let Some(link) = joined(&shards, hello, Half::Deliver, name) else { return };
    let read = async {
        while let Ok(Some(request)) = requests.message().await {
            match request.kind {
                Some(deliver_request::Kind::StreamCredit(credit)) => link.credit(credit.bytes),
                Some(deliver_request::Kind::Written(written)) => shards.written(&link, &written),
                Some(deliver_request::Kind::Returned(returned)) => shards.returned(&link, &returned),
                Some(deliver_request::Kind::Hello(_)) | None => return,
            }
        }
    };
    tokio::select! {
        () = read => {}
        () = link.closed().cancelled() => {}
        () = shards.ended().cancelled() => {}
    }
    shards.link_gone(&link);
}

fn joined(
    shards: &Shards,
    hello: Option<Hello>,
    half: Half,
    name: oneshot::Sender<Result<Arc<Link>, Status>>,
) -> Option<Arc<Link>> {
    let Some(hello) = hello.filter(|hello| hello.gateway.len() == 16) else {
        let _ = name.send(Err(Status::invalid_argument("the first request is a Hello with a gateway of 16 bytes")));
        return None;
    };
    let link = shards.join(&hello, half);
    let _ = name.send(Ok(Arc::clone(&link)));
    Some(link)
}

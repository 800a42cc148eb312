//! A node in memory behind the real gRPC trait: one shard, mailboxes in a map, always the leader unless told otherwise.
//!
//! It keeps the promises that a gateway relies on: a message stays until an ack names it, an attach is served everything above
//! `written_through` in order, the newer connection of a device wins.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::SocketAddr,
    ops::Bound,
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard},
};

use bytes::Bytes;
use martlet_proto::{
    cluster::queue::{
        self, ControlReply, ControlRequest, DeliverReply, DeliverRequest, Message, SubmitReply, SubmitRequest,
        control_reply, control_request, deliver_reply, deliver_request,
        queue_server::{Queue, QueueServer},
    },
    limits::ACKS_BYTES_MAX,
    message::{MessageId, Sequence},
    tag::DeviceTag,
};
use prost::Message as _;
use tokio::{net::TcpListener, sync::mpsc};
use tokio_stream::{Stream, StreamExt, wrappers::ReceiverStream};
use tokio_util::task::TaskTracker;
use tonic::{Request, Response, Status, Streaming, transport::Server};

/// What every delivery of the fake costs.
pub(crate) const COST: u64 = 1_000;

/// Names a pair of streams: never used twice, so that what still comes on a lost pair counts for nothing.
type LinkId = u64;
type Out<T> = mpsc::Sender<Result<T, Status>>;

#[derive(Debug, Default)]
struct Link {
    name: (Bytes, u32),
    control: Option<Out<ControlReply>>,
    deliver: Option<Out<DeliverReply>>,
}

#[derive(Debug)]
struct Attached {
    attach: u64,
    link: LinkId,
    session: queue::Session,
    sent: Option<Sequence>,
    credit: u64,
}

#[derive(Debug, Default)]
struct State {
    term: u64,
    sessions: u64,
    index: u64,
    mailboxes: BTreeMap<u64, BTreeMap<Sequence, Message>>,
    attached: BTreeMap<u64, Attached>,
    links: BTreeMap<LinkId, Link>,
    last_link: LinkId,
    /// Acks that are not confirmed while `holds_acks`.
    held: Vec<(LinkId, u64)>,
    holds_acks: bool,
    acks_seen: u64,
    attaches: Vec<queue::Attach>,
    written: BTreeMap<u64, Sequence>,
    returned: u64,
}

/// The handle.
#[derive(Debug, Clone)]
pub(crate) struct FakeNode {
    state: Arc<Mutex<State>>,
    tasks: TaskTracker,
    pub(crate) address: SocketAddr,
}

impl FakeNode {
    /// Serves on a free port of loopback for the rest of the test.
    pub(crate) async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let state = State { term: 1, ..State::default() };
        let address = listener.local_addr().unwrap();
        let node = Self { state: Arc::new(Mutex::new(state)), tasks: TaskTracker::new(), address };
        let server = Server::builder().add_service(QueueServer::new(node.clone()));
        let incoming = tonic::transport::server::TcpIncoming::from(listener);
        node.tasks.spawn(async move { server.serve_with_incoming(incoming).await.unwrap() });
        node
    }

    /// Stores a message, and delivers it if the device is attached.
    pub(crate) fn enqueue(&self, tag: DeviceTag, message: Message) -> Sequence {
        let mut state = self.lock();
        state.index += 1;
        let sequence = Sequence { incarnation: 0, index: state.index, position: 0 };
        state.mailboxes.entry(tag.0).or_default().insert(sequence, message);
        state.pump(tag.0);
        sequence
    }

    /// Hands a message out without storing it (time to live 0, or past its time).
    pub(crate) fn hand_out(&self, tag: DeviceTag, message: Message, remaining_ms: u64) {
        let state = self.lock();
        let attached = &state.attached[&tag.0];
        state.send(attached, Bytes::new(), remaining_ms, message);
    }

    /// Message ids that wait for the device.
    pub(crate) fn waiting(&self, tag: DeviceTag) -> Vec<MessageId> {
        let state = self.lock();
        let rows = state.mailboxes.get(&tag.0).into_iter().flat_map(BTreeMap::values);
        rows.map(|message| MessageId::from_bytes(&message.message_id).unwrap()).collect()
    }

    /// From now on acks are taken and confirmed only by [`FakeNode::confirm_acks`].
    pub(crate) fn hold_acks(&self) {
        self.lock().holds_acks = true;
    }

    /// Confirms what was held.
    pub(crate) fn confirm_acks(&self) {
        let mut state = self.lock();
        state.holds_acks = false;
        for (link, ack) in std::mem::take(&mut state.held) {
            state.reply(link, control_reply::Kind::Acked(queue::Acked { acks: vec![ack] }));
        }
    }

    /// A new term begins: everybody attached is forgotten, and the gateways are told.
    pub(crate) fn new_term(&self) {
        let mut state = self.lock();
        state.term += 1;
        state.attached.clear();
        let links: Vec<LinkId> = state.links.keys().copied().collect();
        for link in links {
            state.announce(link);
        }
    }

    /// Ends every stream, as a node that dies does.
    pub(crate) fn drop_streams(&self) {
        let mut state = self.lock();
        state.links.clear();
        state.attached.clear();
    }

    /// Attaches asked for so far.
    pub(crate) fn attaches(&self) -> Vec<queue::Attach> {
        self.lock().attaches.clone()
    }

    /// Sets of acks that came so far.
    pub(crate) fn acks_seen(&self) -> u64 {
        self.lock().acks_seen
    }

    /// Whether the device is attached.
    pub(crate) fn is_attached(&self, tag: DeviceTag) -> bool {
        self.lock().attached.contains_key(&tag.0)
    }

    /// Highest sequence told to be written to the device.
    pub(crate) fn written(&self, tag: DeviceTag) -> Option<Sequence> {
        self.lock().written.get(&tag.0).copied()
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    fn control_request(&self, link: LinkId, request: ControlRequest) {
        let mut state = self.lock();
        if !state.links.contains_key(&link) {
            return;
        }
        match request.kind.unwrap() {
            control_request::Kind::Attach(batch) => {
                for ask in batch.attaches {
                    state.attach(link, ask);
                }
            }
            control_request::Kind::Detach(detach) => state.attached.retain(|_, at| at.attach != detach.attach),
            control_request::Kind::Ack(ack) => state.ack(link, &ack),
            control_request::Kind::Hello(_) => panic!("a second Hello"),
        }
    }

    fn deliver_request(&self, link: LinkId, request: DeliverRequest) {
        let mut state = self.lock();
        if !state.links.contains_key(&link) {
            return;
        }
        match request.kind.unwrap() {
            deliver_request::Kind::Written(written) => {
                let at = state.attached.iter_mut().find(|(_, at)| at.attach == written.attach && at.link == link);
                let Some((&tag, at)) = at else { return };
                at.credit += written.credit_bytes;
                if let Some(through) = Sequence::from_bytes(&written.through) {
                    state.written.insert(tag, through);
                }
                state.pump(tag);
            }
            deliver_request::Kind::Returned(_) => state.returned += 1,
            deliver_request::Kind::StreamCredit(_) => {}
            deliver_request::Kind::Hello(_) => panic!("a second Hello"),
        }
    }
}

impl State {
    fn attach(&mut self, link: LinkId, ask: queue::Attach) {
        self.attaches.push(ask.clone());
        if let Some(older) = self.attached.remove(&ask.device_tag) {
            if ask.session.is_some_and(|session| session.counter < older.session.counter) {
                let why = Some(queue::attach_refused::Why::Superseded(queue::Superseded { attach: ask.attach }));
                let refused = queue::AttachRefused { attach: ask.attach, shard: 0, why };
                self.reply(link, control_reply::Kind::AttachRefused(refused));
                self.attached.insert(ask.device_tag, older);
                return;
            }
            // The same connection again is no newer one.
            if ask.session != Some(older.session) {
                let superseded = queue::Superseded { attach: older.attach };
                self.reply(older.link, control_reply::Kind::Superseded(superseded));
            }
        }
        self.sessions += 1;
        let session = ask.session.unwrap_or(queue::Session { term: self.term, counter: self.sessions });
        let attached = queue::Attached { attach: ask.attach, shard: 0, term: self.term, session: Some(session) };
        self.reply(link, control_reply::Kind::Attached(attached));
        let sent = Sequence::from_bytes(&ask.written_through);
        let at = Attached { attach: ask.attach, link, session, sent, credit: ask.credit_bytes };
        self.attached.insert(ask.device_tag, at);
        self.pump(ask.device_tag);
    }

    fn ack(&mut self, link: LinkId, ack: &queue::Ack) {
        self.acks_seen += 1;
        if ack.encoded_len() > ACKS_BYTES_MAX {
            // As a leader's packer does.
            let refused = queue::AckRefused { ack: ack.ack, redirect: None };
            return self.reply(link, control_reply::Kind::AckRefused(refused));
        }
        if let Some(mailbox) = self.mailboxes.get_mut(&ack.device_tag) {
            for sequence in ack.sequences.iter().filter_map(|bytes| Sequence::from_bytes(bytes)) {
                mailbox.remove(&sequence);
            }
            let ids: BTreeSet<_> = ack.message_ids.iter().collect();
            mailbox.retain(|_, message| !ids.contains(&message.message_id));
        }
        if self.holds_acks {
            self.held.push((link, ack.ack));
        } else {
            self.reply(link, control_reply::Kind::Acked(queue::Acked { acks: vec![ack.ack] }));
        }
    }

    fn pump(&mut self, tag: u64) {
        let Some(mut at) = self.attached.remove(&tag) else { return };
        let from = at.sent.map_or(Bound::Unbounded, Bound::Excluded);
        let rows = self.mailboxes.get(&tag).into_iter().flat_map(|rows| rows.range((from, Bound::Unbounded)));
        for (sequence, message) in rows {
            if at.credit < COST {
                break;
            }
            at.credit -= COST;
            at.sent = Some(*sequence);
            self.send(&at, Bytes::copy_from_slice(&sequence.to_bytes()), 60_000, message.clone());
        }
        self.attached.insert(tag, at);
    }

    fn send(&self, at: &Attached, sequence: Bytes, remaining_ms: u64, message: Message) {
        let delivery = queue::Delivery {
            shard: 0,
            term: self.term,
            attach: at.attach,
            sequence,
            remaining_ms,
            message: Some(message),
            cost_bytes: COST,
        };
        if let Some(out) = self.links.get(&at.link).and_then(|link| link.deliver.as_ref()) {
            out.try_send(Ok(DeliverReply { kind: Some(deliver_reply::Kind::Delivery(delivery)) })).unwrap();
        }
    }

    /// The pair of this name that still lacks the half; a pair that has it is over.
    fn pair(&mut self, name: (Bytes, u32), has_half: impl Fn(&Link) -> bool) -> LinkId {
        let open = self.links.iter().find(|(_, link)| link.name == name).map(|(id, link)| (*id, has_half(link)));
        if let Some((id, false)) = open {
            return id;
        }
        if let Some((id, true)) = open {
            self.links.remove(&id);
            self.attached.retain(|_, at| at.link != id);
        }
        self.last_link += 1;
        self.links.insert(self.last_link, Link { name, ..Link::default() });
        self.last_link
    }

    fn reply(&self, link: LinkId, kind: control_reply::Kind) {
        if let Some(out) = self.links.get(&link).and_then(|link| link.control.as_ref()) {
            out.try_send(Ok(ControlReply { kind: Some(kind) })).unwrap();
        }
    }

    fn announce(&self, link: LinkId) {
        if let Some(out) = self.links.get(&link).and_then(|link| link.deliver.as_ref()) {
            let led = queue::Led { shard: 0, term: self.term };
            out.try_send(Ok(DeliverReply { kind: Some(deliver_reply::Kind::Led(led)) })).unwrap();
        }
    }
}

type Replies<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

#[tonic::async_trait]
impl Queue for FakeNode {
    type SubmitStream = Replies<SubmitReply>;
    type ControlStream = Replies<ControlReply>;
    type DeliverStream = Replies<DeliverReply>;

    async fn submit(&self, _: Request<Streaming<SubmitRequest>>) -> Result<Response<Self::SubmitStream>, Status> {
        Err(Status::unimplemented("this fake takes no operations"))
    }

    async fn control(
        &self,
        requests: Request<Streaming<ControlRequest>>,
    ) -> Result<Response<Self::ControlStream>, Status> {
        let mut requests = requests.into_inner();
        let Some(ControlRequest { kind: Some(control_request::Kind::Hello(hello)) }) = requests.message().await? else {
            return Err(Status::invalid_argument("no Hello"));
        };
        let (out, replies) = mpsc::channel(100_000);
        let link = {
            let mut state = self.lock();
            let link = state.pair((hello.gateway, hello.link), |link| link.control.is_some());
            state.links.get_mut(&link).unwrap().control = Some(out);
            link
        };
        let node = self.clone();
        self.tasks.spawn(async move {
            while let Some(Ok(request)) = requests.next().await {
                node.control_request(link, request);
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(replies))))
    }

    async fn deliver(
        &self,
        requests: Request<Streaming<DeliverRequest>>,
    ) -> Result<Response<Self::DeliverStream>, Status> {
        let mut requests = requests.into_inner();
        let Some(DeliverRequest { kind: Some(deliver_request::Kind::Hello(hello)) }) = requests.message().await? else {
            return Err(Status::invalid_argument("no Hello"));
        };
        let (out, replies) = mpsc::channel(100_000);
        let link = {
            let mut state = self.lock();
            let link = state.pair((hello.gateway, hello.link), |link| link.deliver.is_some());
            state.links.get_mut(&link).unwrap().deliver = Some(out);
            state.announce(link);
            link
        };
        let node = self.clone();
        self.tasks.spawn(async move {
            while let Some(Ok(request)) = requests.next().await {
                node.deliver_request(link, request);
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(replies))))
    }
}

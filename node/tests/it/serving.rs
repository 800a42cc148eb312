//! A message's way through real nodes: registered, accepted, kept over a restart, delivered, acknowledged.

use std::time::Duration;

use bytes::Bytes;
use martlet_proto::cluster::queue::{
    Ack, Answer, Attach, AttachBatch, Batch, ControlReply, ControlRequest, DeliverReply, DeliverRequest, Delivery,
    Enqueue, Hello, Operation, Register, StreamCredit, SubmitReply, SubmitRequest, answer, batch_reply::Outcome,
    control_reply, control_request, deliver_reply, deliver_request, operation, queue_client::QueueClient,
    refused::Reason,
};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Streaming, transport::Channel};

use crate::nodes::{Nodes, until};

pub(crate) const DEVICE: u64 = 0x1122_3344_5566_7788;
const SENDER: &str = "100000000001";

/// Operations on one shard at one node.
pub(crate) struct Submit {
    batches: mpsc::Sender<SubmitRequest>,
    replies: Streaming<SubmitReply>,
    shard: u32,
    /// Shard time as last heard.
    pub(crate) time_ms: u64,
    calls: u64,
    /// Why the last operation was refused, if it was.
    pub(crate) refused: Option<Reason>,
    /// Id of the last operation.
    pub(crate) last_id: Bytes,
}

impl Submit {
    pub(crate) async fn open(nodes: &Nodes, at: usize) -> Self {
        Self::open_shard(nodes, at, 0).await
    }

    async fn open_shard(nodes: &Nodes, at: usize, shard: u32) -> Self {
        let (batches, requests) = mpsc::channel(8);
        let replies = queue(nodes, at).submit(ReceiverStream::new(requests)).await.unwrap().into_inner();
        Self { batches, replies, shard, time_ms: 0, calls: 0, refused: None, last_id: Bytes::new() }
    }

    /// The outcome of one operation; `None` when it was not taken: no leader here, or the time was to be learned first.
    pub(crate) async fn once(&mut self, id: u8, kind: operation::Kind) -> Option<answer::Kind> {
        self.once_of(self.time_ms, id, kind).await
    }

    /// As [`Submit::once`], of an operation that was first tried at a shard time of before.
    pub(crate) async fn once_of(&mut self, first_try_ms: u64, id: u8, kind: operation::Kind) -> Option<answer::Kind> {
        match self.outcome_of(first_try_ms, id, kind).await {
            Outcome::Answers(mut answers) => {
                let Answer { kind } = answers.answers.remove(0);
                return kind;
            }
            Outcome::Refused(refused) if refused.reason() == Reason::TimeNeeded => {}
            Outcome::Refused(refused) => {
                let known = matches!(refused.reason(), Reason::NoLease | Reason::Draining);
                assert!(known, "{refused:?}");
                self.refused = Some(refused.reason());
            }
            Outcome::Redirect(_) => {}
            Outcome::Unknown(_) => panic!("nothing that was proposed is lost in this test"),
        }
        None
    }

    /// What one operation came to, whatever it is.
    pub(crate) async fn outcome(&mut self, id: u8, kind: operation::Kind) -> Outcome {
        self.outcome_of(self.time_ms, id, kind).await
    }

    async fn outcome_of(&mut self, first_try_ms: u64, id: u8, kind: operation::Kind) -> Outcome {
        self.calls += 1;
        // Micros of the id lie at the first try, so that it is not older than the window of repeats.
        let mut bytes = (first_try_ms * 1_000).to_be_bytes().to_vec();
        bytes.extend([id; 8]);
        self.last_id = bytes.into();
        let operation = Operation { id: self.last_id.clone(), first_try_ms, kind: Some(kind) };
        let batch = Batch { call: self.calls, shard: self.shard, epoch: 1, operations: vec![operation] };
        self.batches.send(SubmitRequest { batches: vec![batch] }).await.unwrap();
        let mut reply = self.replies.message().await.unwrap().unwrap().replies;
        assert_eq!((reply.len(), reply[0].call), (1, self.calls));
        let reply = reply.remove(0);
        self.refused = None;
        let outcome = reply.outcome.unwrap();
        match &outcome {
            Outcome::Answers(_) => self.time_ms = self.time_ms.max(reply.shard_time_ms),
            Outcome::Refused(refused) if refused.reason() == Reason::TimeNeeded => self.time_ms = reply.shard_time_ms,
            Outcome::Refused(_) | Outcome::Redirect(_) | Outcome::Unknown(_) => {}
        }
        outcome
    }
}

fn queue(nodes: &Nodes, at: usize) -> QueueClient<Channel> {
    QueueClient::new(nodes.channel(at))
}

/// Asks every node until the leader answers.
pub(crate) async fn ask(nodes: &Nodes, of: &[usize], id: u8, kind: operation::Kind) -> answer::Kind {
    ask_shard(nodes, of, 0, id, kind).await
}

pub(crate) async fn ask_shard(nodes: &Nodes, of: &[usize], shard: u32, id: u8, kind: operation::Kind) -> answer::Kind {
    let asked = async {
        loop {
            for at in of {
                let mut submit = Submit::open_shard(nodes, *at, shard).await;
                for _ in 0..2 {
                    if let Some(answer) = submit.once(id, kind.clone()).await {
                        return answer;
                    }
                }
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(60), asked).await.expect("the shard gets a leader")
}

pub(crate) fn register() -> operation::Kind {
    operation::Kind::Register(Register {
        device_tag: DEVICE,
        registration_id: vec![5; 16].into(),
        token_key_id: 1,
        application: "com.example.app".into(),
        senders: vec![SENDER.into()],
        scope: "GCM".into(),
        iid: "fXk2_abcdeF".into(),
        ..Register::default()
    })
}

pub(crate) fn enqueue(payload: &'static [u8]) -> operation::Kind {
    enqueue_for(payload, 3_600)
}

pub(crate) fn enqueue_for(payload: &'static [u8], ttl_secs: u32) -> operation::Kind {
    operation::Kind::Enqueue(Enqueue {
        device_tag: DEVICE,
        registration_id: vec![5; 16].into(),
        sender: SENDER.into(),
        wire_from: SENDER.into(),
        ttl_secs,
        payload: Bytes::from_static(payload),
        ..Enqueue::default()
    })
}

/// A gateway with one device attached at the node that leads shard 0.
pub(crate) struct Device {
    control: mpsc::Sender<ControlRequest>,
    replies: Streaming<ControlReply>,
    credit: mpsc::Sender<DeliverRequest>,
    deliveries: Streaming<DeliverReply>,
}

impl Device {
    /// `None` when the node does not lead the shard.
    async fn attach(nodes: &Nodes, at: usize, device_tag: u64) -> Option<Self> {
        let device = Self::attach_without_credit(nodes, at, device_tag).await?;
        device.give_credit().await;
        Some(device)
    }

    /// As attached; but nothing may be delivered before [`Device::give_credit`].
    pub(crate) async fn attach_without_credit(nodes: &Nodes, at: usize, device_tag: u64) -> Option<Self> {
        let hello = Hello { gateway: vec![9; 16].into(), link: 0 };
        let (control, requests) = mpsc::channel(8);
        control.send(ControlRequest { kind: Some(control_request::Kind::Hello(hello.clone())) }).await.unwrap();
        let mut replies = queue(nodes, at).control(ReceiverStream::new(requests)).await.unwrap().into_inner();
        let (credit, requests) = mpsc::channel(8);
        credit.send(DeliverRequest { kind: Some(deliver_request::Kind::Hello(hello)) }).await.unwrap();
        let deliveries = queue(nodes, at).deliver(ReceiverStream::new(requests)).await.unwrap().into_inner();
        let attach = Attach { attach: 1, device_tag, credit_bytes: 1 << 20, ..Attach::default() };
        let batch = control_request::Kind::Attach(AttachBatch { shard: 0, attaches: vec![attach] });
        control.send(ControlRequest { kind: Some(batch) }).await.unwrap();
        match replies.message().await.unwrap()?.kind? {
            control_reply::Kind::Attached(_) => Some(Self { control, replies, credit, deliveries }),
            control_reply::Kind::AttachRefused(_) => None,
            other => panic!("not an answer to an attach: {other:?}"),
        }
    }

    /// From now on deliveries may come.
    pub(crate) async fn give_credit(&self) {
        let room = deliver_request::Kind::StreamCredit(StreamCredit { bytes: 1 << 20 });
        self.credit.send(DeliverRequest { kind: Some(room) }).await.unwrap();
    }

    pub(crate) async fn attach_anywhere(nodes: &Nodes, of: &[usize]) -> Self {
        Self::attach_as(nodes, of, DEVICE).await
    }

    async fn attach_as(nodes: &Nodes, of: &[usize], device_tag: u64) -> Self {
        let attached = async {
            loop {
                for at in of {
                    if let Some(device) = Self::attach(nodes, *at, device_tag).await {
                        return device;
                    }
                }
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(60), attached).await.expect("shard 0 gets a leader")
    }

    /// The next delivery. Safe to cancel.
    pub(crate) async fn delivery(&mut self) -> Delivery {
        loop {
            if let deliver_reply::Kind::Delivery(delivery) =
                self.deliveries.message().await.unwrap().unwrap().kind.unwrap()
            {
                return delivery;
            }
        }
    }

    pub(crate) async fn ack(&mut self, sequence: Bytes) {
        let ack = Ack { ack: 1, shard: 0, device_tag: DEVICE, sequences: vec![sequence], message_ids: Vec::new() };
        self.control.send(ControlRequest { kind: Some(control_request::Kind::Ack(ack)) }).await.unwrap();
        let reply = self.replies.message().await.unwrap().unwrap().kind.unwrap();
        assert!(matches!(reply, control_reply::Kind::Acked(_)), "{reply:?}");
    }
}

/// What waits for a device of shard 0 at node 1, in order: the first `count`.
pub(crate) async fn payloads(nodes: &Nodes, device_tag: u64, count: usize) -> Vec<Vec<u8>> {
    payloads_at(nodes, &[1], device_tag, count).await
}

/// As [`payloads`], at whichever of these nodes leads.
pub(crate) async fn payloads_at(nodes: &Nodes, of: &[usize], device_tag: u64, count: usize) -> Vec<Vec<u8>> {
    let mut device = Device::attach_as(nodes, of, device_tag).await;
    let mut found = Vec::new();
    while found.len() < count {
        found.push(device.delivery().await.message.unwrap().payload.to_vec());
    }
    found
}

#[tokio::test(flavor = "multi_thread")]
async fn a_message_survives_the_restart_of_its_node_until_it_is_acked() {
    let mut nodes = Nodes::created(1, 1).await;
    let registered = ask(&nodes, &[1], 1, register()).await;
    assert!(matches!(registered, answer::Kind::Registered(_)), "{registered:?}");
    for (id, payload) in [(2, &b"first"[..]), (3, b"second")] {
        let accepted = ask(&nodes, &[1], id, enqueue(payload)).await;
        assert!(matches!(accepted, answer::Kind::Accepted(_)), "{accepted:?}");
    }
    nodes.stop(1).await;
    nodes.start(1).await;
    nodes.ready(1).await;

    let mut device = Device::attach_anywhere(&nodes, &[1]).await;
    let first = device.delivery().await;
    let second = device.delivery().await;
    assert_eq!([&first, &second].map(|d| d.message.as_ref().unwrap().payload.clone()), [&b"first"[..], b"second"]);
    device.ack(first.sequence).await;
    drop(device);
    nodes.stop(1).await;
    nodes.start(1).await;
    nodes.ready(1).await;

    let mut device = Device::attach_anywhere(&nodes, &[1]).await;
    assert_eq!(device.delivery().await.message.unwrap().payload, &b"second"[..]);
    nodes.stop(1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_message_is_delivered_by_the_others_when_a_node_goes() {
    let mut nodes = Nodes::created(3, 1).await;
    ask(&nodes, &[1, 2, 3], 1, register()).await;
    let accepted = ask(&nodes, &[1, 2, 3], 2, enqueue(b"survivor")).await;
    assert!(matches!(accepted, answer::Kind::Accepted(_)), "{accepted:?}");
    let leader = leader(&nodes).await;
    nodes.stop(leader).await;
    let left: Vec<usize> = (1..=3).filter(|id| *id != leader).collect();
    let mut device = Device::attach_anywhere(&nodes, &left).await;
    assert_eq!(device.delivery().await.message.unwrap().payload, &b"survivor"[..]);
    nodes.stop_all().await;
}

/// The node that leads shard 0, as node 1 sees it.
async fn leader(nodes: &Nodes) -> usize {
    leader_seen_by(nodes, 1).await
}

/// The node that leads shard 0, as node `at` sees it.
pub(crate) async fn leader_seen_by(nodes: &Nodes, at: usize) -> usize {
    let led = async || {
        let status = nodes.status(at).await;
        let leads = |node: &&martlet_proto::cluster::admin::NodeStatus| {
            node.groups.iter().any(|group| group.group == 1 && group.leader_replica == group.replica_id)
        };
        status.nodes.iter().find(leads).map(|node| usize::try_from(node.node_id).unwrap())
    };
    until("shard 0 has a leader", async || led().await.is_some()).await;
    led().await.unwrap()
}

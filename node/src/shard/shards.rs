//! All shards of this node, and the links of gateways to them.
//!
//! Owns the tasks of each shard (lead, propose, read mailboxes and last-seen days) and of each gateway stream: they end when [`Shards::shutdown`] is
//! called, which awaits them. Decides nothing about messages.

use std::{
    collections::BTreeMap,
    fmt,
    sync::{Arc, Mutex, PoisonError, RwLock, RwLockReadGuard},
};

use martlet_proto::{
    cluster::command::DeviceAck,
    cluster::queue::{
        Ack, AckRefused, Answer, AttachBatch, Batch, BatchReply, DeliverReply, GroupGet, Hello, Refused, Returned,
        Written, attach_refused::Why, batch_reply::Outcome, control_reply, deliver_reply, refused::Reason,
    },
    message::Sequence,
    shard::Shard,
};
use tokio::sync::Notify;
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use super::{
    consensus::Consensus,
    courier::Courier,
    lead::{Directory, Lead, Overload, nowhere, refuse_attach},
    machine::{Kept, Replica},
    pack::Packer,
    rates::Rates,
    reads::ReadChecks,
    replies::Replies,
    settings::ShardSettings,
    sight::Arrivals,
    stories::Stories,
};
use crate::{
    clock::Clock,
    delivery::{
        attached::{Bounds, Found, Parcel},
        desk::Desk,
        link::{Half, Link, Links},
    },
    metrics::Metrics,
    state::StateError,
};

/// What the shards of a node are given.
#[derive(Clone)]
pub struct ShardsConfig {
    /// Bounds and waits.
    pub settings: ShardSettings,
    /// Time.
    pub clock: Arc<dyn Clock>,
    /// Where replicas live.
    pub directory: Arc<dyn Directory>,
    /// Instruments.
    pub metrics: Arc<Metrics>,
    /// What the node is short of, if anything: enqueues are refused then.
    pub overload: Overload,
    /// Highest state version that is applied.
    pub state_version: u32,
    /// This node.
    pub node: u64,
    /// Reaches the others.
    pub courier: Arc<dyn Courier>,
}

impl fmt::Debug for ShardsConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ShardsConfig").field("settings", &self.settings).finish_non_exhaustive()
    }
}

/// All shards of this node.
#[derive(Debug)]
pub struct Shards {
    config: ShardsConfig,
    settings: Arc<ShardSettings>,
    links: Arc<Links>,
    open: RwLock<BTreeMap<Shard, Open>>,
    tracker: TaskTracker,
    /// No new work is taken.
    draining: CancellationToken,
    /// Streams end.
    ended: CancellationToken,
    closing: Mutex<()>,
    /// Something was published to a topic.
    published: Arc<Notify>,
}

#[derive(Debug, Clone)]
struct Open {
    lead: Arc<Lead>,
    end: CancellationToken,
}

impl Shards {
    /// No shard is open.
    pub fn new(config: ShardsConfig) -> Arc<Self> {
        let settings = Arc::new(config.settings.clone());
        let links = Arc::new(Links::new(settings.control_replies_max));
        Arc::new(Shards {
            config,
            settings,
            links,
            open: RwLock::default(),
            tracker: TaskTracker::new(),
            draining: CancellationToken::new(),
            ended: CancellationToken::new(),
            closing: Mutex::default(),
            published: Arc::default(),
        })
    }

    /// Hands over to every shard what is published here, until [`Shards::shutdown`]. Must be called once, within a tokio runtime.
    pub fn hand_over(self: &Arc<Self>) {
        self.tracker.spawn(Arc::clone(self).hand_over_all(self.ended.child_token()));
    }

    /// Takes up a replica's rows. Its [`Replica::machine`] goes to the group; then [`Shards::open`].
    ///
    /// # Errors
    /// When the rows cannot be read, are wrong, or are of a state version that is not applied here.
    pub fn load(&self, shard: Shard, rows: Arc<dyn Kept>) -> Result<Arc<Replica>, StateError> {
        let bounds = Bounds {
            held_bytes_max: self.settings.held_bytes_max,
            held_bytes_per_device_max: self.settings.held_bytes_per_device_max,
            now_or_never_max: self.settings.now_or_never_max,
        };
        let desk = Desk::new(shard, bounds, Arc::clone(&self.links), self.config.metrics.attached.clone());
        let stories = Stories::new(self.settings.stories_max, self.settings.stories_for);
        let (metrics, clock) = (Arc::clone(&self.config.metrics), Arc::clone(&self.config.clock));
        Replica::load(shard, rows, desk, stories, metrics, clock, self.config.state_version).map(Arc::new)
    }

    /// Serves a shard whose group runs. Must be called within a tokio runtime.
    pub fn open(&self, replica: Arc<Replica>, group: Arc<dyn Consensus>) {
        let shard = replica.shard;
        let lead = Arc::new(Lead {
            replica,
            group,
            settings: Arc::clone(&self.settings),
            limits: self.settings.limits(),
            clock: Arc::clone(&self.config.clock),
            directory: Arc::clone(&self.config.directory),
            metrics: Arc::clone(&self.config.metrics),
            overload: Arc::clone(&self.config.overload),
            draining: self.draining.clone(),
            packer: Mutex::new(Packer::new(&self.settings)),
            rates: Mutex::new(Rates::new(&self.settings)),
            arrivals: Arrivals::default(),
            wake: Notify::new(),
            stalled: Notify::new(),
            published: Arc::clone(&self.published),
            reads: ReadChecks::default(),
            outcomes_given_up: CancellationToken::new(),
        });
        let end = self.ended.child_token();
        self.tracker.spawn(Arc::clone(&lead).lead(end.clone()));
        self.tracker.spawn(Arc::clone(&lead).propose_all(end.clone()));
        self.tracker.spawn(Arc::clone(&lead).pull_all(end.clone()));
        self.tracker.spawn(Arc::clone(&lead).see_all(end.clone()));
        let before = self.open.write().unwrap_or_else(PoisonError::into_inner).insert(shard, Open { lead, end });
        if let Some(before) = before {
            before.end.cancel();
        }
    }

    /// Serves a shard no more.
    pub fn close(&self, shard: Shard) {
        if let Some(open) = self.open.write().unwrap_or_else(PoisonError::into_inner).remove(&shard) {
            open.end.cancel();
        }
    }

    /// From now on operations and attaches are refused with DRAINING; acknowledgements are taken until the end.
    pub fn drain(&self) {
        self.draining.cancel();
    }

    /// Ends all streams and tasks. The groups must still run, so that what is proposed is answered; what has no outcome within
    /// seconds is answered as unknown.
    pub async fn shutdown(&self) {
        self.drain();
        self.ended.cancel();
        for link in self.links.all() {
            self.link_gone(&link);
        }
        self.tracker.close();
        self.tracker.wait().await;
    }

    /// Fires when streams are to end.
    pub(crate) fn ended(&self) -> &CancellationToken {
        &self.ended
    }

    /// Owner of the tasks of streams.
    pub(crate) fn tracker(&self) -> &TaskTracker {
        &self.tracker
    }

    /// Bounds and waits.
    pub fn settings(&self) -> &ShardSettings {
        &self.settings
    }

    /// A batch of a gateway; answered on `replies`, which expects it.
    pub fn submit(&self, batch: Batch, replies: &Arc<Replies>) {
        match self.lead(batch.shard) {
            Some(lead) => lead.submit(batch, Arc::clone(replies)),
            None => replies.answer(BatchReply {
                call: batch.call,
                shard: batch.shard,
                shard_time_ms: 0,
                outcome: Some(Outcome::Refused(no_replica())),
            }),
        }
    }

    /// A gateway's stream says who it is; it is told what this node leads.
    pub fn join(&self, hello: &Hello, half: Half) -> Arc<Link> {
        let (link, replaced) = self.links.join(hello, half);
        if let Some(replaced) = replaced {
            self.link_gone(&replaced);
        }
        if half == Half::Deliver {
            for open in self.read().values() {
                if let Some(term) = open.lead.replica.desk().term() {
                    link.announce(open.lead.replica.shard, term);
                }
            }
        }
        link
    }

    /// A stream of a link ended: both end, and its attachments are let go of.
    pub fn link_gone(&self, link: &Link) {
        let _one_at_a_time = self.closing.lock().unwrap_or_else(PoisonError::into_inner);
        self.links.close(link);
        for open in self.read().values() {
            open.lead.replica.desk().link_gone(link.id());
        }
    }

    /// Attaches devices; replies come on the link. Waits for a read check.
    pub async fn attach(&self, link: &Link, batch: AttachBatch) {
        if let Some(lead) = self.lead(batch.shard) {
            return lead.attach(link, batch).await;
        }
        let shard = Shard(u16::try_from(batch.shard).unwrap_or(u16::MAX));
        for attach in batch.attaches {
            link.attach_ends(attach.attach);
            refuse_attach(link, shard, attach.attach, Why::Refused(no_replica()));
        }
    }

    /// The gateway lets go of an attachment.
    pub fn detach(&self, link: &Link, shard: u32, attach: u64) {
        if !link.detach(attach)
            && let Some(lead) = self.lead(shard)
        {
            lead.replica.desk().detach(link.id(), attach);
        }
    }

    /// What a device acknowledged.
    pub fn ack(&self, link: &Arc<Link>, ack: Ack) {
        let Ack { ack, shard, device_tag, sequences, message_ids } = ack;
        match self.lead(shard) {
            Some(lead) => {
                let device = DeviceAck { device_tag, sequences, message_ids, gateway: link.gateway() };
                lead.ack(Arc::clone(link), ack, device);
            }
            None => link.reply(control_reply::Kind::AckRefused(AckRefused { ack, redirect: Some(nowhere(0)) })),
        }
    }

    /// Frames were written to a device.
    pub fn written(&self, link: &Link, written: &Written) {
        if let Some(lead) = self.lead(written.shard) {
            let through = Sequence::from_bytes(&written.through);
            lead.replica.desk().written(link.id(), written.attach, through, written.credit_bytes);
        }
    }

    /// A delivery found no taker: it stays queued, and its attachment is over.
    pub fn returned(&self, link: &Link, returned: &Returned) {
        if let Some(lead) = self.lead(returned.shard) {
            lead.replica.desk().detach(link.id(), returned.attach);
        }
    }

    /// The next thing for a deliver stream; `None` when its link is closed. Safe to cancel.
    pub async fn next_delivery(&self, link: &Link) -> Option<DeliverReply> {
        loop {
            if link.closed().is_cancelled() {
                return None;
            }
            if let Some(kind) = self.delivery_now(link) {
                return Some(DeliverReply { kind: Some(kind) });
            }
            if !link.may_deliver().await {
                return None;
            }
        }
    }

    fn delivery_now(&self, link: &Link) -> Option<deliver_reply::Kind> {
        if let Some(led) = link.next_led() {
            return Some(deliver_reply::Kind::Led(led));
        }
        while let Some((shard, room)) = link.next_turn() {
            let Some(lead) = self.lead(u32::from(shard.0)) else { continue };
            match lead.take(link.id(), room) {
                Found::Parcel { parcel, more } => {
                    link.charge(parcel.handed.cost);
                    if more {
                        link.has_something(shard);
                    }
                    self.config.metrics.deliveries.inc();
                    return Some(deliver_reply::Kind::Delivery(delivery(shard, parcel)));
                }
                Found::NoRoom => {
                    link.keeps_turn(shard);
                    return None;
                }
                Found::Nothing => {}
            }
        }
        None
    }

    /// Reads a device group, if its shard is led here at this moment; why not otherwise.
    pub fn group(&self, shard: Shard, get: &GroupGet) -> Result<Answer, String> {
        let lead = self.lead(u32::from(shard.0)).ok_or_else(|| format!("shard {shard} has no replica here"))?;
        lead.group(get)
    }

    /// The replica of a shard here.
    pub fn replica(&self, shard: Shard) -> Option<Arc<Replica>> {
        self.lead(u32::from(shard.0)).map(|lead| Arc::clone(&lead.replica))
    }

    /// All replicas here.
    pub fn replicas(&self) -> Vec<Arc<Replica>> {
        self.read().values().map(|open| Arc::clone(&open.lead.replica)).collect()
    }

    /// The highest state version that this node applies.
    pub fn state_version_known(&self) -> u32 {
        self.config.state_version
    }

    /// The state version of a shard, as it is applied here; `None` when the shard is not served here.
    pub fn state_version(&self, shard: u32) -> Option<u32> {
        Some(self.lead(shard)?.replica.state_version())
    }

    /// What this node leads.
    pub(super) fn led(&self) -> Vec<Arc<Lead>> {
        self.read().values().filter(|open| open.lead.term().is_some()).map(|open| Arc::clone(&open.lead)).collect()
    }

    /// The time of a shard that this node leads.
    pub(super) fn home_ms(&self, home: Shard) -> Option<u64> {
        self.lead(u32::from(home.0))?.replica.time_ms()
    }

    /// The node that leads a shard, as a replica here knows it.
    pub(super) fn leader_node(&self, shard: Shard) -> Option<u64> {
        Some(self.lead(u32::from(shard.0))?.redirect().leader_node).filter(|node| *node > 0)
    }

    /// Every shard of the cluster.
    pub(super) fn all_shards(&self) -> Vec<Shard> {
        (0..self.config.directory.shards()).map(Shard).collect()
    }

    pub(super) fn directory(&self) -> &dyn Directory {
        &*self.config.directory
    }

    pub(super) fn courier(&self) -> &dyn Courier {
        &*self.config.courier
    }

    pub(super) fn node(&self) -> u64 {
        self.config.node
    }

    pub(super) fn now(&self) -> std::time::Instant {
        self.config.clock.now()
    }

    /// Fires when something was published.
    pub(super) fn published(&self) -> &Notify {
        &self.published
    }

    fn lead(&self, shard: u32) -> Option<Arc<Lead>> {
        let shard = Shard(u16::try_from(shard).ok()?);
        self.read().get(&shard).map(|open| Arc::clone(&open.lead))
    }

    fn read(&self) -> RwLockReadGuard<'_, BTreeMap<Shard, Open>> {
        self.open.read().unwrap_or_else(PoisonError::into_inner)
    }
}

fn delivery(shard: Shard, parcel: Parcel) -> martlet_proto::cluster::queue::Delivery {
    let Parcel { attach, term, handed } = parcel;
    martlet_proto::cluster::queue::Delivery {
        shard: u32::from(shard.0),
        term,
        attach,
        sequence: handed.sequence.map(|s| s.to_bytes().to_vec().into()).unwrap_or_default(),
        remaining_ms: handed.remaining_ms,
        message: Some((*handed.message).clone()),
        cost_bytes: handed.cost,
    }
}

fn no_replica() -> Refused {
    Refused { reason: Reason::NoReplica.into(), detail: "no replica of the shard runs here".into() }
}

//! Drives the lanes: takes orders of connections and events of links, carries out what each [`Lane`] decides.
//!
//! One task per lane, owned by the tracker in [`Attachments`]; it ends when `stop` fires. It never waits for a device nor for
//! a node: queues of connections are bounded by credit, and a link whose queue is full is reset.

use std::{
    collections::{BTreeMap, HashMap},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use bytes::Bytes;
use martlet_proto::{cluster::queue::deliver_request, shard::shard_of, tag::DeviceTag};
use rand::{SeedableRng, rngs::StdRng};
use tokio::sync::{mpsc, watch};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use super::{
    AttachConfig, AttachMetrics, Attachment, Routes, ShardMap,
    lane::{Action, Lane, Note},
    link::{self, LinkEvent, LinkName, Outbound},
    metrics::Fate,
    slot::{Event, Mailslot, Order, Slot, Terms},
};
use crate::clock::Clock;

/// Replies of links that wait for their lane; a full queue makes links wait to read, never a connection.
const LINK_EVENTS_MAX: usize = 1_024;

/// All lanes of a gateway. Clones are handles to the same ones.
#[derive(Debug, Clone)]
pub struct Attachments {
    lanes: Arc<[Arc<Mailslot<Order>>]>,
    map: watch::Receiver<Option<ShardMap>>,
    next: Arc<AtomicU64>,
    terms: Arc<Terms>,
    metrics: Arc<AttachMetrics>,
    tasks: TaskTracker,
}

impl Attachments {
    /// Starts the lanes. `gateway`: the 16 bytes this gateway drew at its start. They end when `stop` fires: after the
    /// connections, or their last acks are not sent.
    pub fn start(
        config: &AttachConfig,
        gateway: [u8; 16],
        routes: Arc<dyn Routes>,
        clock: Arc<dyn Clock>,
        metrics: Arc<AttachMetrics>,
        stop: &CancellationToken,
    ) -> Self {
        let terms = Arc::new(Terms::default());
        let tasks = TaskTracker::new();
        let mut lanes = Vec::new();
        for number in 0..config.links.max(1) {
            let orders = Arc::new(Mailslot::default());
            let driver = Driver {
                name: LinkName { gateway: Bytes::copy_from_slice(&gateway), link: number, node: 0 },
                config: config.clone(),
                routes: Arc::clone(&routes),
                clock: Arc::clone(&clock),
                metrics: Arc::clone(&metrics),
                terms: Arc::clone(&terms),
                orders: Arc::clone(&orders),
                slots: HashMap::new(),
                links: BTreeMap::new(),
                link_tasks: TaskTracker::new(),
                stop: stop.clone(),
            };
            tasks.spawn(driver.run());
            lanes.push(orders);
        }
        tasks.close();
        let map = routes.map();
        Self { lanes: lanes.into(), map, next: Arc::new(AtomicU64::new(1)), terms, metrics, tasks }
    }

    /// A hold on a device's queue. Nothing is delivered before [`Attachment::attach`]. `None` while no shard map is known.
    pub fn open(&self, tag: DeviceTag) -> Option<Attachment> {
        let shard = shard_of(tag, self.map.borrow().as_ref()?.count);
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        // The low bits decide the shard's spread as well; a lane takes the high ones.
        let lane = usize::try_from(tag.0 >> 32).unwrap_or(0) % self.lanes.len();
        Some(Attachment::open(id, tag, shard, Arc::clone(&self.lanes[lane]), Arc::clone(&self.terms)))
    }

    /// The instruments.
    pub fn metrics(&self) -> &AttachMetrics {
        &self.metrics
    }

    /// Waits until every lane has ended, after `stop`.
    pub async fn stopped(&self) {
        self.tasks.wait().await;
    }
}

#[derive(Debug)]
struct NodeLink {
    stop: CancellationToken,
    /// The streams that are open now.
    open: Option<(u64, Outbound)>,
}

#[derive(Debug)]
struct Driver {
    name: LinkName,
    config: AttachConfig,
    routes: Arc<dyn Routes>,
    clock: Arc<dyn Clock>,
    metrics: Arc<AttachMetrics>,
    terms: Arc<Terms>,
    orders: Arc<Mailslot<Order>>,
    slots: HashMap<u64, Arc<Slot>>,
    links: BTreeMap<u64, NodeLink>,
    link_tasks: TaskTracker,
    stop: CancellationToken,
}

impl Driver {
    async fn run(mut self) {
        let stop = self.stop.clone();
        tokio::select! {
            () = stop.cancelled() => {}
            () = self.serve() => {}
        }
        for link in self.links.values() {
            link.stop.cancel();
        }
        self.link_tasks.close();
        self.link_tasks.wait().await;
    }

    /// Until the source of maps is gone, which is the end of the gateway.
    async fn serve(&mut self) {
        let mut maps = self.routes.map();
        let Ok(map) = maps.wait_for(Option::is_some).await.map(|map| map.clone()) else { return };
        let Some(map) = map else { return };
        let (events, mut from_links) = mpsc::channel(LINK_EVENTS_MAX);
        let mut lane = Lane::new(self.config.clone(), map.clone(), StdRng::from_os_rng());
        self.keep_links(&mut lane, &map, &events);
        let orders = Arc::clone(&self.orders);
        let mut received = Vec::new();
        loop {
            let deadline = lane.deadline().map(tokio::time::Instant::from_std);
            tokio::select! {
                () = orders.filled() => {}
                count = from_links.recv_many(&mut received, LINK_EVENTS_MAX) => if count == 0 { return },
                changed = maps.changed() => {
                    if changed.is_err() {
                        return;
                    }
                    let map = maps.borrow_and_update().clone();
                    if let Some(map) = map {
                        self.keep_links(&mut lane, &map, &events);
                        lane.map(map, self.clock.now());
                    }
                }
                () = at(deadline) => {}
            }
            // Events first: a term heard of makes void what an order would otherwise be judged by.
            for event in received.drain(..) {
                self.event(&mut lane, event);
                self.carry_out(&mut lane);
            }
            for order in orders.take() {
                self.order(&mut lane, order);
                self.carry_out(&mut lane);
            }
            lane.tick(self.clock.now());
            lane.flush();
            self.carry_out(&mut lane);
        }
    }

    fn event(&mut self, lane: &mut Lane, event: LinkEvent) {
        let now = self.clock.now();
        match event {
            LinkEvent::Up { node, generation, outbound } => {
                let Some(link) = self.links.get_mut(&node) else { return };
                link.open = Some((generation, outbound));
                self.metrics.links.inc();
                lane.link_up(node, now);
            }
            LinkEvent::Control { node, generation, reply } if self.is_open(node, generation) => {
                lane.control(node, reply, now);
            }
            LinkEvent::Deliver { node, generation, reply } if self.is_open(node, generation) => {
                lane.deliver(node, reply, now);
            }
            LinkEvent::Down { node, generation } if self.is_open(node, generation) => self.lose(lane, node),
            // Of streams that were given up already.
            LinkEvent::Control { .. } | LinkEvent::Deliver { .. } | LinkEvent::Down { .. } => {}
        }
    }

    fn order(&mut self, lane: &mut Lane, order: Order) {
        match order {
            Order::Open { attach, tag, shard, slot } => {
                self.slots.insert(attach, slot);
                self.metrics.attachments.inc();
                lane.open(attach, tag, shard);
            }
            Order::Attach { attach } => lane.attach(attach, self.clock.now()),
            Order::Ack { attach, acks } => {
                self.metrics.acks.inc();
                lane.ack(attach, acks);
            }
            Order::Written { attach, round, through, cost_bytes } => lane.written(attach, round, through, cost_bytes),
            Order::End { attach, last } => {
                lane.end(attach, last);
                if self.slots.remove(&attach).is_some() {
                    self.metrics.attachments.dec();
                }
            }
        }
    }

    fn carry_out(&mut self, lane: &mut Lane) {
        while let Some(action) = lane.next_action() {
            let full = match action {
                Action::Control { node, request } => {
                    if let Some(martlet_proto::cluster::queue::control_request::Kind::Attach(batch)) = &request.kind {
                        self.metrics.asks.inc_by(batch.attaches.len() as u64);
                    }
                    self.outbound(node).filter(|outbound| outbound.control.try_send(request).is_err()).map(|_| node)
                }
                Action::Deliver { node, request } => {
                    if matches!(request.kind, Some(deliver_request::Kind::Returned(_))) {
                        self.metrics.fate(Fate::Returned);
                    }
                    self.outbound(node).filter(|outbound| outbound.deliver.try_send(request).is_err()).map(|_| node)
                }
                Action::Place { attach, delivery } => {
                    self.metrics.fate(Fate::Placed);
                    self.tell(attach, Event::Delivery(delivery));
                    None
                }
                Action::Clear { attach } => {
                    if let Some(slot) = self.slots.get(&attach) {
                        slot.retain(|event| !matches!(event, Event::Delivery(_)));
                    }
                    None
                }
                Action::Tell { attach, note } => {
                    if note == Note::Superseded {
                        self.metrics.superseded.inc();
                    }
                    self.tell(attach, Event::Note(note));
                    None
                }
                Action::Learned { shard, node, term } => {
                    self.terms.raise(shard, term);
                    self.routes.leads(shard, node, term);
                    None
                }
            };
            if let Some(node) = full {
                tracing::warn!(
                    node,
                    link = self.name.link,
                    "the node does not take what it is sent: its streams are reset"
                );
                self.lose(lane, node);
            }
        }
    }

    fn tell(&self, attach: u64, event: Event) {
        if let Some(slot) = self.slots.get(&attach) {
            slot.push(event);
        }
    }

    fn lose(&mut self, lane: &mut Lane, node: u64) {
        let open = self.links.get_mut(&node).and_then(|link| link.open.take());
        if let Some((_, outbound)) = open {
            outbound.reset.cancel();
            self.metrics.links.dec();
            self.metrics.links_lost.inc();
            lane.link_down(node, self.clock.now());
        }
    }

    fn outbound(&self, node: u64) -> Option<&Outbound> {
        self.links.get(&node)?.open.as_ref().map(|(_, outbound)| outbound)
    }

    fn is_open(&self, node: u64, generation: u64) -> bool {
        self.links.get(&node).and_then(|link| link.open.as_ref()).is_some_and(|(open, _)| *open == generation)
    }

    /// A link to every node of the map, none to others.
    fn keep_links(&mut self, lane: &mut Lane, map: &ShardMap, events: &mpsc::Sender<LinkEvent>) {
        let gone: Vec<u64> = self.links.keys().copied().filter(|node| !map.nodes.contains(node)).collect();
        for node in gone {
            self.lose(lane, node);
            if let Some(link) = self.links.remove(&node) {
                link.stop.cancel();
            }
        }
        for node in &map.nodes {
            if self.links.contains_key(node) {
                continue;
            }
            let stop = self.stop.child_token();
            let name = LinkName { node: *node, ..self.name.clone() };
            let link = link::run(name, self.config.clone(), Arc::clone(&self.routes), events.clone(), stop.clone());
            self.link_tasks.spawn(link);
            self.links.insert(*node, NodeLink { stop, open: None });
        }
    }
}

async fn at(deadline: Option<tokio::time::Instant>) {
    match deadline {
        Some(deadline) => tokio::time::sleep_until(deadline).await,
        None => std::future::pending().await,
    }
}

//! What a lane and one connection share: the events that wait for the connection, and the orders that wait for the lane.
//!
//! Plain queues behind a mutex, because an idle connection must hold next to nothing and both sides must never wait for each
//! other. Both are bounded by construction: events by the credit of the attachment (the lane ends one that overruns it) and
//! two notes; orders of one connection by one open, attach and end, one unconfirmed set of acks, and one `written` for each
//! delivery within its credit.

use std::{
    collections::VecDeque,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Instant,
};

use martlet_proto::{
    message::Sequence,
    shard::{Shard, ShardCount},
    tag::DeviceTag,
};
use tokio::sync::Notify;

use super::lane::{Acks, Note, Placed};

/// What a connection learns.
#[derive(Debug, PartialEq)]
pub enum Event {
    /// A message to write.
    Delivery(Box<Placed>),
    /// Something else.
    Note(Note),
}

/// What connections ask of their lane.
#[derive(Debug)]
pub(crate) enum Order {
    Open { attach: u64, tag: DeviceTag, shard: Shard, slot: Arc<Slot> },
    Attach { attach: u64 },
    Ack { attach: u64, acks: Acks },
    Written { attach: u64, round: u32, through: Option<Sequence>, cost_bytes: u64 },
    End { attach: u64, last: Acks },
}

/// A queue that one side fills and the other is woken for.
#[derive(Debug)]
pub(crate) struct Mailslot<T> {
    waiting: Mutex<VecDeque<T>>,
    filled: Notify,
}

impl<T> Default for Mailslot<T> {
    fn default() -> Self {
        Self { waiting: Mutex::new(VecDeque::new()), filled: Notify::new() }
    }
}

impl<T> Mailslot<T> {
    pub(crate) fn push(&self, item: T) {
        self.lock().push_back(item);
        self.filled.notify_one();
    }

    /// Everything that waits; leaves no capacity behind.
    pub(crate) fn take(&self) -> VecDeque<T> {
        std::mem::take(&mut *self.lock())
    }

    pub(crate) fn pop(&self) -> Option<T> {
        let mut waiting = self.lock();
        let item = waiting.pop_front();
        if waiting.is_empty() {
            *waiting = VecDeque::new();
        }
        item
    }

    pub(crate) fn retain(&self, keep: impl FnMut(&T) -> bool) {
        self.lock().retain(keep);
    }

    /// Waits until something was pushed since the last call that returned. Safe to cancel. One waiter at a time.
    pub(crate) async fn filled(&self) {
        self.filled.notified().await;
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, VecDeque<T>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

pub(crate) type Slot = Mailslot<Event>;

/// Highest term heard of, per shard: what makes a queued delivery void.
#[derive(Debug)]
pub(crate) struct Terms(Vec<AtomicU64>);

impl Default for Terms {
    fn default() -> Self {
        Self((0..ShardCount::MAX).map(|_| AtomicU64::new(0)).collect())
    }
}

impl Terms {
    pub(crate) fn raise(&self, shard: Shard, term: u64) {
        if let Some(highest) = self.0.get(usize::from(shard.0)) {
            highest.fetch_max(term, Ordering::AcqRel);
        }
    }

    fn is_void(&self, placed: &Placed) -> bool {
        self.0.get(usize::from(placed.shard.0)).is_some_and(|highest| placed.term < highest.load(Ordering::Acquire))
    }
}

/// Why a delivery is not written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unfit {
    /// A higher term of its shard is known: its leader may be none.
    Void,
    /// Its time to live is over.
    Expired,
}

/// A connection's hold on its device's queue. Ends with it: dropping it detaches.
#[derive(Debug)]
pub struct Attachment {
    id: u64,
    slot: Arc<Slot>,
    lane: Arc<Mailslot<Order>>,
    terms: Arc<Terms>,
    last: Acks,
}

impl Attachment {
    pub(crate) fn open(id: u64, tag: DeviceTag, shard: Shard, lane: Arc<Mailslot<Order>>, terms: Arc<Terms>) -> Self {
        let slot = Arc::new(Slot::default());
        lane.push(Order::Open { attach: id, tag, shard, slot: Arc::clone(&slot) });
        Self { id, slot, lane, terms, last: Acks::default() }
    }

    /// Number of the attachment, unique in this gateway's life.
    pub fn id(&self) -> u64 {
        self.id
    }

    /// Asks for the queue: deliveries come from now on. An older connection of the device is told that it is superseded.
    pub fn attach(&self) {
        self.lane.push(Order::Attach { attach: self.id });
    }

    /// Hands acks to the node, whoever leads, until it says [`Note::Acked`]. The next may be handed over only then.
    pub fn ack(&self, acks: Acks) {
        self.lane.push(Order::Ack { attach: self.id, acks });
    }

    /// The next event, if one waits.
    pub fn next(&self) -> Option<Event> {
        self.slot.pop()
    }

    /// Waits until there may be a next event. Safe to cancel.
    pub async fn changed(&self) {
        self.slot.filled().await;
    }

    /// Whether a delivery may still be written; asked right before the write.
    ///
    /// # Errors
    /// Why it may not.
    pub fn check(&self, placed: &Placed, now: Instant) -> Result<(), Unfit> {
        if self.terms.is_void(placed) {
            return Err(Unfit::Void);
        }
        if now > placed.expires {
            return Err(Unfit::Expired);
        }
        Ok(())
    }

    /// The delivery was written, or will not be: its credit is free. `through` is the highest sequence written on the
    /// connection.
    pub fn done(&self, placed: &Placed, through: Option<Sequence>) {
        let (round, cost_bytes) = (placed.round, placed.cost_bytes);
        self.lane.push(Order::Written { attach: self.id, round, through, cost_bytes });
    }

    /// Ends with acks that were never handed over: they are sent once.
    pub fn end(mut self, last: Acks) {
        self.last = last;
    }
}

impl Drop for Attachment {
    fn drop(&mut self) {
        self.lane.push(Order::End { attach: self.id, last: std::mem::take(&mut self.last) });
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use martlet_proto::cluster::queue::Message;

    use super::*;

    fn placed(term: u64, expires: Instant) -> Placed {
        Placed { shard: Shard(3), term, sequence: None, expires, cost_bytes: 10, round: 1, message: Message::default() }
    }

    #[test]
    fn a_queued_delivery_is_void_once_a_higher_term_of_its_shard_is_heard_of() {
        #[expect(clippy::disallowed_methods, reason = "a starting point for arithmetic")]
        let now = Instant::now();
        let (lane, terms) = (Arc::new(Mailslot::default()), Arc::new(Terms::default()));
        let attachment = Attachment::open(1, DeviceTag(7), Shard(3), lane, Arc::clone(&terms));
        let second = Duration::from_secs(1);
        terms.raise(Shard(3), 5);
        terms.raise(Shard(4), 9);
        assert_eq!(attachment.check(&placed(5, now + second), now), Ok(()));
        assert_eq!(attachment.check(&placed(5, now), now), Ok(()));
        assert_eq!(attachment.check(&placed(5, now), now + second), Err(Unfit::Expired));
        terms.raise(Shard(3), 6);
        terms.raise(Shard(3), 2);
        assert_eq!(attachment.check(&placed(5, now + second), now), Err(Unfit::Void));
    }

    #[test]
    fn dropping_an_attachment_tells_the_lane_its_end_and_the_acks_left() {
        let lane = Arc::new(Mailslot::default());
        let open = || Attachment::open(1, DeviceTag(7), Shard(3), Arc::clone(&lane), Arc::default());
        drop(open());
        let last = Acks { sequences: vec![Sequence { incarnation: 0, index: 1, position: 0 }], message_ids: vec![] };
        open().end(last.clone());
        let orders = lane.take();
        assert!(matches!(&orders[1], Order::End { attach: 1, last } if last.is_empty()));
        assert!(matches!(&orders[3], Order::End { attach: 1, last: left } if *left == last));
        assert_eq!(orders.len(), 4);
    }
}

//! One pair of streams of a gateway, and what waits to go out on each.
//!
//! Owns the replies of the control stream, the announcements and the credit of the deliver stream, and the turn of shards that have
//! something for it. Deliveries themselves stay in their shard until the stream takes them. Attachments live as long as their pair:
//! when either stream ends, or a new one comes under the same name, the pair is closed and both end.
//!
//! The invariant: nothing here waits, so that `apply` can call it; what grows is bounded by attachments and by the replies bound.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use martlet_proto::{
    cluster::queue::{ControlReply, Hello, Led, control_reply},
    shard::Shard,
};
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

/// Numbers pairs of streams; never used twice in the life of a process.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LinkId(pub u64);

/// Which half of a pair.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Half {
    /// Attach and acks in, replies out.
    Control,
    /// Credit in, deliveries out.
    Deliver,
}

/// All pairs of streams of this node.
#[derive(Debug)]
pub struct Links {
    replies_max: usize,
    open: Mutex<Open>,
}

#[derive(Debug, Default)]
struct Open {
    last: u64,
    by_id: BTreeMap<LinkId, Arc<Link>>,
    by_name: BTreeMap<(Vec<u8>, u32), LinkId>,
}

/// One pair.
#[derive(Debug)]
pub struct Link {
    id: LinkId,
    gateway: u32,
    replies_max: usize,
    state: Mutex<State>,
    /// The control stream has something to send.
    control: Notify,
    /// The deliver stream has something to send.
    deliver: Notify,
    /// Replies were taken.
    room: Notify,
    closed: CancellationToken,
}

#[derive(Debug, Default)]
struct State {
    has_control: bool,
    has_deliver: bool,
    replies: VecDeque<ControlReply>,
    led: BTreeMap<Shard, u64>,
    turn: VecDeque<Shard>,
    in_turn: BTreeSet<Shard>,
    credit: u64,
    under_way: u64,
    /// Attaches under way; `true`: let go of before they were done.
    attaching: BTreeMap<u64, bool>,
}

/// A gateway in the stories of messages: the beginning of its id.
pub fn gateway(id: &[u8]) -> u32 {
    id.first_chunk().map_or(0, |first| u32::from_be_bytes(*first))
}

impl Links {
    /// No pairs; a control stream with `replies_max` replies waiting is not read.
    pub fn new(replies_max: usize) -> Self {
        Links { replies_max, open: Mutex::default() }
    }

    /// A stream says who it is: joins the other half of its pair, or begins a pair. Returns the pair that it replaces, if there
    /// is one, closed: its attachments are to be let go of.
    pub fn join(&self, hello: &Hello, half: Half) -> (Arc<Link>, Option<Arc<Link>>) {
        let mut open = lock(&self.open);
        let name = (hello.gateway.to_vec(), hello.link);
        let present = open.by_name.get(&name).and_then(|id| open.by_id.get(id)).cloned();
        if let Some(link) = present {
            if link.take_half(half) {
                return (link, None);
            }
            link.close();
            open.by_id.remove(&link.id);
            return (open.begin(name, half, self.replies_max), Some(link));
        }
        (open.begin(name, half, self.replies_max), None)
    }

    /// A stream of this pair ended: closes it. Its attachments are to be let go of.
    pub fn close(&self, link: &Link) {
        link.close();
        let mut open = lock(&self.open);
        open.by_id.remove(&link.id);
        open.by_name.retain(|_, id| *id != link.id);
    }

    /// An open pair.
    pub fn get(&self, id: LinkId) -> Option<Arc<Link>> {
        lock(&self.open).by_id.get(&id).cloned()
    }

    /// All open pairs.
    pub fn all(&self) -> Vec<Arc<Link>> {
        lock(&self.open).by_id.values().cloned().collect()
    }
}

impl Open {
    fn begin(&mut self, name: (Vec<u8>, u32), half: Half, replies_max: usize) -> Arc<Link> {
        self.last += 1;
        let link = Arc::new(Link {
            id: LinkId(self.last),
            gateway: gateway(&name.0),
            replies_max,
            state: Mutex::default(),
            control: Notify::new(),
            deliver: Notify::new(),
            room: Notify::new(),
            closed: CancellationToken::new(),
        });
        link.take_half(half);
        self.by_id.insert(link.id, Arc::clone(&link));
        self.by_name.insert(name, link.id);
        link
    }
}

impl Link {
    /// Its number.
    pub fn id(&self) -> LinkId {
        self.id
    }

    /// Whose it is, as [`gateway`] says.
    pub fn gateway(&self) -> u32 {
        self.gateway
    }

    /// Fires when the pair is closed.
    pub fn closed(&self) -> &CancellationToken {
        &self.closed
    }

    /// Queues a reply. A gateway that lets far too many wait loses the pair.
    pub fn reply(&self, reply: control_reply::Kind) {
        let mut state = lock(&self.state);
        state.replies.push_back(ControlReply { kind: Some(reply) });
        if state.replies.len() > self.replies_max.saturating_mul(16) {
            self.closed.cancel();
        }
        drop(state);
        self.control.notify_one();
    }

    /// The next reply; `None` when the pair is closed. Safe to cancel.
    pub async fn next_reply(&self) -> Option<ControlReply> {
        loop {
            if self.closed.is_cancelled() {
                return None;
            }
            let reply = lock(&self.state).replies.pop_front();
            if let Some(reply) = reply {
                self.room.notify_one();
                return Some(reply);
            }
            tokio::select! {
                () = self.control.notified() => {}
                () = self.closed.cancelled() => return None,
            }
        }
    }

    /// Waits until few enough replies wait that more requests may be read. Safe to cancel.
    pub async fn has_room(&self) {
        while !self.closed.is_cancelled() && lock(&self.state).replies.len() >= self.replies_max {
            tokio::select! {
                () = self.room.notified() => {}
                () = self.closed.cancelled() => {}
            }
        }
    }

    /// This node leads `shard` in `term`.
    pub fn announce(&self, shard: Shard, term: u64) {
        lock(&self.state).led.insert(shard, term);
        self.deliver.notify_one();
    }

    /// The next announcement to send.
    pub fn next_led(&self) -> Option<Led> {
        let (shard, term) = lock(&self.state).led.pop_first()?;
        Some(Led { shard: u32::from(shard.0), term })
    }

    /// `shard` has something for this pair.
    pub fn has_something(&self, shard: Shard) {
        let mut state = lock(&self.state);
        if state.in_turn.insert(shard) {
            state.turn.push_back(shard);
        }
        drop(state);
        self.deliver.notify_one();
    }

    /// The shard whose turn it is and the bytes the stream has room for; `None` while nothing waits or there is no credit.
    ///
    /// With nothing under way there is room for anything: a delivery larger than all credit would otherwise never go.
    pub fn next_turn(&self) -> Option<(Shard, u64)> {
        let mut state = lock(&self.state);
        if state.credit == 0 {
            return None;
        }
        let room = if state.under_way == 0 { u64::MAX } else { state.credit };
        let shard = state.turn.pop_front()?;
        state.in_turn.remove(&shard);
        Some((shard, room))
    }

    /// `shard` had something larger than there was room for: it keeps its turn.
    pub fn keeps_turn(&self, shard: Shard) {
        let mut state = lock(&self.state);
        if state.in_turn.insert(shard) {
            state.turn.push_front(shard);
        }
    }

    /// Takes `cost` bytes of the stream's credit.
    pub fn charge(&self, cost: u64) {
        let mut state = lock(&self.state);
        state.credit = state.credit.saturating_sub(cost);
        state.under_way = state.under_way.saturating_add(cost);
    }

    /// The gateway has room for `bytes` more.
    pub fn credit(&self, bytes: u64) {
        let mut state = lock(&self.state);
        state.credit = state.credit.saturating_add(bytes);
        state.under_way = state.under_way.saturating_sub(bytes);
        drop(state);
        self.deliver.notify_one();
    }

    /// Waits until the deliver stream may have something; `false`: the pair is closed. Safe to cancel.
    pub async fn may_deliver(&self) -> bool {
        tokio::select! {
            () = self.deliver.notified() => !self.closed.is_cancelled(),
            () = self.closed.cancelled() => false,
        }
    }

    /// An attach is under way.
    pub fn attach_begins(&self, attach: u64) {
        lock(&self.state).attaching.insert(attach, false);
    }

    /// A detach came; `true`: its attach is still under way and will find out.
    pub fn detach(&self, attach: u64) -> bool {
        match lock(&self.state).attaching.get_mut(&attach) {
            Some(let_go) => {
                *let_go = true;
                true
            }
            None => false,
        }
    }

    /// An attach is done; `false`: it was let go of meanwhile.
    pub fn attach_ends(&self, attach: u64) -> bool {
        !lock(&self.state).attaching.remove(&attach).unwrap_or(false)
    }

    fn take_half(&self, half: Half) -> bool {
        let mut state = lock(&self.state);
        let taken = match half {
            Half::Control => &mut state.has_control,
            Half::Deliver => &mut state.has_deliver,
        };
        !std::mem::replace(taken, true)
    }

    fn close(&self) {
        self.closed.cancel();
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hello() -> Hello {
        Hello { gateway: vec![7; 16].into(), link: 1 }
    }

    #[test]
    fn the_two_streams_of_one_name_are_one_pair() {
        let links = Links::new(8);
        let (control, replaced) = links.join(&hello(), Half::Control);
        assert!(replaced.is_none());
        let (deliver, replaced) = links.join(&hello(), Half::Deliver);
        assert!(replaced.is_none());
        assert_eq!(control.id(), deliver.id());
    }

    #[test]
    fn a_second_stream_of_one_half_replaces_the_whole_pair() {
        let links = Links::new(8);
        let (old, _) = links.join(&hello(), Half::Control);
        let (new, replaced) = links.join(&hello(), Half::Control);
        assert_eq!(replaced.map(|l| l.id()), Some(old.id()));
        assert!(old.closed().is_cancelled());
        assert!(!new.closed().is_cancelled());
        links.close(&old);
        assert_eq!(links.join(&hello(), Half::Deliver).0.id(), new.id());
    }

    #[test]
    fn without_stream_credit_no_shard_has_a_turn() {
        let links = Links::new(8);
        let (link, _) = links.join(&hello(), Half::Deliver);
        link.has_something(Shard(3));
        assert_eq!(link.next_turn(), None);
        link.credit(10);
        assert_eq!(link.next_turn(), Some((Shard(3), u64::MAX)));
        assert_eq!(link.next_turn(), None);
        link.charge(4);
        link.has_something(Shard(3));
        assert_eq!(link.next_turn(), Some((Shard(3), 6)));
    }

    #[test]
    fn shards_take_turns() {
        let links = Links::new(8);
        let (link, _) = links.join(&hello(), Half::Deliver);
        link.credit(10);
        link.has_something(Shard(1));
        link.has_something(Shard(2));
        link.has_something(Shard(1));
        let turns: Vec<_> = std::iter::from_fn(|| link.next_turn().map(|(shard, _)| shard.0)).collect();
        assert_eq!(turns, [1, 2]);
    }

    #[test]
    fn an_attach_learns_that_it_was_let_go_of() {
        let links = Links::new(8);
        let (link, _) = links.join(&hello(), Half::Control);
        link.attach_begins(5);
        assert!(link.detach(5));
        assert!(!link.attach_ends(5));
        assert!(!link.detach(5));
    }

    #[test]
    fn a_gateway_that_never_reads_its_replies_loses_the_pair() {
        let links = Links::new(1);
        let (link, _) = links.join(&hello(), Half::Control);
        for _ in 0..17 {
            link.reply(control_reply::Kind::Acked(Default::default()));
        }
        assert!(link.closed().is_cancelled());
    }
}

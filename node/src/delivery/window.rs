//! What one attached device is about to be given: a value.
//!
//! Owns the order of its deliveries, its credit, and what of its mailbox is in memory. Owns no socket, clock or store: rows, time
//! and credit come in, deliveries are taken out. [`super::attached`] keeps one per attached device.
//!
//! A window is either *at the tail* (all rows above `taken` will arrive as effects of the log) or *behind* (rows above `taken` must
//! be read from the store). The invariant: rows are handed out in mailbox order, none is skipped unless it was removed or has
//! expired, and none is handed out twice.

use std::{collections::VecDeque, sync::Arc, time::Instant};

use martlet_proto::{cluster::queue::Message, message::Sequence};
use prost::Message as _;

/// Bytes that a delivery costs besides its message: frame, numbers, bookkeeping on both sides.
const COST_BESIDES: u64 = 128;

/// A row of a mailbox, ready to be delivered.
#[derive(Debug, Clone, PartialEq)]
pub struct Waiting {
    /// Its place in the mailbox.
    pub sequence: Sequence,
    /// Shard time at which it ends, milliseconds.
    pub expires_ms: u64,
    /// What the device is to see.
    pub message: Arc<Message>,
}

/// What a message costs of both credits, bytes.
pub fn cost(message: &Message) -> u64 {
    message.encoded_len() as u64 + COST_BESIDES
}

/// A delivery taken out of a window.
#[derive(Debug, Clone, PartialEq)]
pub struct Handed {
    /// `None`: time to live 0, never acknowledged.
    pub sequence: Option<Sequence>,
    /// Time to live that is left.
    pub remaining_ms: u64,
    /// What the device is to see.
    pub message: Arc<Message>,
    /// Bytes taken from both credits.
    pub cost: u64,
}

/// What [`Window::take`] found.
#[derive(Debug, Clone, PartialEq)]
pub enum Take {
    /// Hand this out.
    Handed(Handed),
    /// The next one costs more than the stream has room for.
    NoRoom,
    /// Nothing can be handed out until something comes in.
    Nothing,
}

/// One device's deliveries.
#[derive(Debug)]
pub struct Window {
    written: Option<Sequence>,
    taken: Option<Sequence>,
    credit: u64,
    under_way: u64,
    place: Place,
    held: Option<Box<Held>>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Place {
    Tail,
    Behind,
    /// The store is being read; `missed`: rows came in meanwhile that the read may not have seen.
    Pulling {
        missed: bool,
    },
}

/// Present only while something is held, so that an idle window is small.
#[derive(Debug, Default)]
struct Held {
    items: VecDeque<Item>,
    /// Messages with time to live 0 that came while rows before them are still in the store.
    late: VecDeque<NowOrNever>,
    /// Removed while the store was read.
    removed: Vec<Sequence>,
    bytes: u64,
}

#[derive(Debug)]
enum Item {
    Row(Waiting),
    Now(NowOrNever),
}

#[derive(Debug)]
struct NowOrNever {
    message: Arc<Message>,
    dies: Instant,
}

impl Item {
    fn message(&self) -> &Arc<Message> {
        match self {
            Item::Row(row) => &row.message,
            Item::Now(it) => &it.message,
        }
    }
}

impl Window {
    /// The window of a connection that has been written everything up to `written_through`, behind until its mailbox is read.
    pub fn new(written_through: Option<Sequence>, credit: u64) -> Self {
        Window {
            written: written_through,
            taken: written_through,
            credit,
            under_way: 0,
            place: Place::Behind,
            held: None,
        }
    }

    /// Highest sequence written to the device.
    pub fn written_through(&self) -> Option<Sequence> {
        self.written
    }

    /// Bytes held in memory.
    pub fn held_bytes(&self) -> u64 {
        self.held.as_ref().map_or(0, |held| held.bytes)
    }

    /// A row was added to the mailbox. `room` bytes may be held more; a row that does not fit leaves the window behind.
    pub fn enqueued(&mut self, row: Waiting, room: u64) {
        match &mut self.place {
            Place::Behind => return,
            Place::Pulling { missed } => {
                *missed = true;
                return;
            }
            Place::Tail => {}
        }
        if self.taken.is_some_and(|taken| row.sequence <= taken) {
            return;
        }
        if cost(&row.message) > room {
            self.place = Place::Behind;
            return;
        }
        self.hold_row(row);
    }

    /// A message with time to live 0; dropped at `dies`. `false`: there were `most` already, it is dropped now.
    pub fn now_or_never(&mut self, message: Arc<Message>, dies: Instant, most: usize) -> bool {
        let at_tail = self.place == Place::Tail;
        let held = self.held.get_or_insert_default();
        let waiting = held.late.len() + held.items.iter().filter(|item| matches!(item, Item::Now(_))).count();
        if waiting >= most {
            return false;
        }
        held.bytes += cost(&message);
        let now = NowOrNever { message, dies };
        if at_tail {
            held.items.push_back(Item::Now(now));
        } else {
            held.late.push_back(now);
        }
        true
    }

    /// A row left the mailbox: acknowledged, collapsed, expired, unregistered or recalled.
    pub fn removed(&mut self, sequence: Sequence) {
        if self.taken.is_none_or(|taken| sequence > taken) {
            if matches!(self.place, Place::Pulling { .. }) {
                self.held.get_or_insert_default().removed.push(sequence);
            }
            return;
        }
        let Some(held) = &mut self.held else { return };
        let found = held.items.iter().position(|item| matches!(item, Item::Row(row) if row.sequence == sequence));
        if let Some(Item::Row(row)) = found.and_then(|at| held.items.remove(at)) {
            held.bytes -= cost(&row.message);
        }
        self.forget_empty();
    }

    /// Whether the store should be read: behind, nothing held before it, and credit to hand out what is found.
    pub fn wants_pull(&self) -> bool {
        let drained = self.held.as_ref().is_none_or(|held| held.items.is_empty());
        self.place == Place::Behind && drained && self.credit > 0
    }

    /// Rows above the returned sequence are about to be read.
    pub fn pull(&mut self) -> Option<Sequence> {
        self.place = Place::Pulling { missed: false };
        self.taken
    }

    /// The read found these rows, in order; `complete`: there were no more.
    pub fn pulled(&mut self, rows: Vec<Waiting>, complete: bool) {
        let Place::Pulling { missed } = self.place else { return };
        let removed = self.held.as_mut().map(|held| std::mem::take(&mut held.removed)).unwrap_or_default();
        for row in rows {
            if removed.contains(&row.sequence) {
                self.taken = Some(row.sequence);
            } else {
                self.hold_row(row);
            }
        }
        if missed || !complete {
            self.place = Place::Behind;
        } else {
            self.place = Place::Tail;
            if let Some(held) = &mut self.held {
                held.items.extend(held.late.drain(..).map(Item::Now));
            }
        }
        self.forget_empty();
    }

    /// The read failed or was put off: it is to be done again.
    pub fn pull_failed(&mut self) {
        if matches!(self.place, Place::Pulling { .. }) {
            self.place = Place::Behind;
            if let Some(held) = &mut self.held {
                held.removed.clear();
            }
            self.forget_empty();
        }
    }

    /// Whether credit allows [`Window::take`] to look at what is next.
    pub fn is_ready(&self) -> bool {
        let next = self.held.as_ref().and_then(|held| held.items.front());
        next.is_some_and(|item| self.allows(cost(item.message())))
    }

    /// Takes the next delivery, if credit and `stream_room` (bytes) allow. What has expired by shard time `time_ms`, or is a
    /// message with time to live 0 from too long ago, is passed over.
    ///
    /// A delivery that costs more than all the credit there is goes out when nothing else is under way: otherwise it never would.
    pub fn take(&mut self, now: Instant, time_ms: u64, stream_room: u64) -> Take {
        let taken = self.take_held(now, time_ms, stream_room);
        self.forget_empty();
        taken
    }

    fn take_held(&mut self, now: Instant, time_ms: u64, stream_room: u64) -> Take {
        while let Some(item) = self.held.as_ref().and_then(|held| held.items.front()) {
            let message = Arc::clone(item.message());
            let cost = cost(&message);
            let (sequence, remaining_ms) = match item {
                Item::Row(row) => (Some(row.sequence), row.expires_ms.saturating_sub(time_ms)),
                Item::Now(it) => {
                    let left = it.dies.saturating_duration_since(now).as_millis();
                    (None, u64::try_from(left).unwrap_or(u64::MAX))
                }
            };
            if remaining_ms == 0 {
                self.let_go(cost);
                continue;
            }
            if !self.allows(cost) {
                return Take::Nothing;
            }
            if cost > stream_room {
                return Take::NoRoom;
            }
            self.let_go(cost);
            self.credit = self.credit.saturating_sub(cost);
            self.under_way += cost;
            return Take::Handed(Handed { sequence, remaining_ms, message, cost });
        }
        Take::Nothing
    }

    fn allows(&self, cost: u64) -> bool {
        cost <= self.credit || (self.under_way == 0 && self.credit > 0)
    }

    fn let_go(&mut self, cost: u64) {
        if let Some(held) = &mut self.held {
            held.items.pop_front();
            held.bytes -= cost;
        }
    }

    /// The device was written everything that was handed out up to `through`; `credit` bytes come back.
    pub fn written(&mut self, through: Option<Sequence>, credit: u64) {
        // What was never taken in cannot have been written: a gateway's mistake must not make the limits count wrongly.
        let through = through.min(self.taken);
        self.written = self.written.max(through);
        self.under_way = self.under_way.saturating_sub(credit);
        self.credit = self.credit.saturating_add(credit);
    }

    fn hold_row(&mut self, row: Waiting) {
        self.taken = Some(row.sequence);
        let held = self.held.get_or_insert_default();
        held.bytes += cost(&row.message);
        held.items.push_back(Item::Row(row));
    }

    fn forget_empty(&mut self) {
        let empty = |held: &Held| held.items.is_empty() && held.late.is_empty() && held.removed.is_empty();
        if self.held.as_deref().is_some_and(empty) {
            self.held = None;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    const ROOM: u64 = u64::MAX;
    const T: u64 = 1_000;

    #[expect(clippy::disallowed_methods, reason = "an origin for made-up instants")]
    fn origin() -> Instant {
        Instant::now()
    }

    fn seq(index: u64) -> Sequence {
        Sequence { incarnation: 0, index, position: 0 }
    }

    fn row(index: u64) -> Waiting {
        Waiting { sequence: seq(index), expires_ms: T + 60_000, message: Arc::new(Message::default()) }
    }

    fn now_message() -> Arc<Message> {
        Arc::new(Message { wire_from: "now".into(), ..Message::default() })
    }

    /// Handed out, in order; `None` is a message with time to live 0.
    fn taken(window: &mut Window, now: Instant) -> Vec<Option<u64>> {
        let mut out = Vec::new();
        while let Take::Handed(handed) = window.take(now, T, ROOM) {
            out.push(handed.sequence.map(|s| s.index));
        }
        out
    }

    /// A window that has read its empty mailbox.
    fn at_tail(credit: u64) -> Window {
        let mut window = Window::new(None, credit);
        window.pull();
        window.pulled(vec![], true);
        window
    }

    #[test]
    fn a_new_window_reads_its_mailbox_above_what_was_written() {
        let mut window = Window::new(Some(seq(4)), 1_000);
        assert!(window.wants_pull());
        assert_eq!(window.pull(), Some(seq(4)));
        window.pulled(vec![row(5), row(6)], true);
        assert_eq!(taken(&mut window, origin()), [Some(5), Some(6)]);
    }

    #[test]
    fn at_the_tail_an_effect_is_delivered_without_the_store() {
        let mut window = at_tail(1_000);
        window.enqueued(row(1), ROOM);
        assert_eq!(taken(&mut window, origin()), [Some(1)]);
        assert!(!window.wants_pull());
    }

    #[test]
    fn a_row_that_arrives_while_the_store_is_read_is_read_again() {
        let mut window = Window::new(None, 1_000);
        window.pull();
        window.enqueued(row(2), ROOM);
        window.pulled(vec![row(1)], true);
        assert_eq!(taken(&mut window, origin()), [Some(1)]);
        assert!(window.wants_pull());
        assert_eq!(window.pull(), Some(seq(1)));
    }

    #[test]
    fn a_row_that_the_read_saw_is_not_delivered_again_by_its_effect() {
        let mut window = Window::new(None, 1_000);
        window.pull();
        window.pulled(vec![row(1)], true);
        window.enqueued(row(1), ROOM);
        assert_eq!(taken(&mut window, origin()), [Some(1)]);
    }

    #[test]
    fn a_row_removed_while_the_store_is_read_is_not_delivered() {
        let mut window = Window::new(None, 1_000);
        window.pull();
        window.removed(seq(1));
        window.pulled(vec![row(1), row(2)], true);
        assert_eq!(taken(&mut window, origin()), [Some(2)]);
    }

    #[test]
    fn a_removed_row_is_not_handed_out_any_more() {
        let mut window = at_tail(1_000);
        window.enqueued(row(1), ROOM);
        window.enqueued(row(2), ROOM);
        window.removed(seq(1));
        assert_eq!(taken(&mut window, origin()), [Some(2)]);
        assert_eq!(window.held_bytes(), 0);
    }

    #[test]
    fn an_expired_row_is_passed_over() {
        let mut window = at_tail(1_000);
        window.enqueued(Waiting { expires_ms: T, ..row(1) }, ROOM);
        window.enqueued(row(2), ROOM);
        assert_eq!(taken(&mut window, origin()), [Some(2)]);
    }

    #[test]
    fn what_is_left_of_the_time_to_live_is_told() {
        let mut window = at_tail(1_000);
        window.enqueued(row(1), ROOM);
        let Take::Handed(handed) = window.take(origin(), T + 1, ROOM) else { panic!("nothing handed out") };
        assert_eq!(handed.remaining_ms, 59_999);
    }

    #[test]
    fn without_credit_nothing_goes_out_until_it_comes_back() {
        let one = cost(&Message::default());
        let mut window = at_tail(one);
        window.enqueued(row(1), ROOM);
        window.enqueued(row(2), ROOM);
        assert_eq!(taken(&mut window, origin()), [Some(1)]);
        assert!(!window.is_ready());
        window.written(Some(seq(1)), one);
        assert_eq!(taken(&mut window, origin()), [Some(2)]);
    }

    #[test]
    fn a_delivery_larger_than_all_credit_goes_when_nothing_is_under_way() {
        let mut window = at_tail(1);
        window.enqueued(row(1), ROOM);
        assert_eq!(taken(&mut window, origin()), [Some(1)]);
    }

    #[test]
    fn a_delivery_waits_for_room_on_the_stream() {
        let mut window = at_tail(1_000);
        window.enqueued(row(1), ROOM);
        assert_eq!(window.take(origin(), T, 1), Take::NoRoom);
        assert_eq!(taken(&mut window, origin()), [Some(1)]);
    }

    #[test]
    fn a_row_that_cannot_be_held_is_read_from_the_store_later() {
        let mut window = at_tail(1_000);
        window.enqueued(row(1), ROOM);
        window.enqueued(row(2), 0);
        window.enqueued(row(3), ROOM);
        assert!(!window.wants_pull());
        assert_eq!(taken(&mut window, origin()), [Some(1)]);
        assert!(window.wants_pull());
        assert_eq!(window.pull(), Some(seq(1)));
    }

    #[test]
    fn a_now_or_never_message_stays_behind_what_is_still_in_the_store() {
        let now = origin();
        let mut window = Window::new(None, 1_000);
        assert!(window.now_or_never(now_message(), now + Duration::from_secs(1), 4));
        assert_eq!(taken(&mut window, now), []);
        window.pull();
        window.pulled(vec![row(1)], false);
        window.pull();
        window.pulled(vec![row(2)], true);
        assert_eq!(taken(&mut window, now), [Some(1), Some(2), None]);
    }

    #[test]
    fn a_now_or_never_message_is_dropped_after_its_second() {
        let now = origin();
        let mut window = at_tail(1_000);
        window.now_or_never(now_message(), now + Duration::from_secs(1), 4);
        assert_eq!(taken(&mut window, now + Duration::from_secs(1)), []);
        assert_eq!(window.held_bytes(), 0);
    }

    #[test]
    fn only_so_many_now_or_never_messages_wait() {
        let now = origin();
        let mut window = Window::new(None, 1_000);
        assert!(window.now_or_never(now_message(), now, 1));
        assert!(!window.now_or_never(now_message(), now, 1));
    }

    #[test]
    fn the_written_mark_never_passes_what_was_taken_in_and_never_goes_back() {
        let mut window = at_tail(1_000);
        window.enqueued(row(3), ROOM);
        taken(&mut window, origin());
        window.written(Some(seq(9)), 0);
        assert_eq!(window.written_through(), Some(seq(3)));
        window.written(Some(seq(1)), 0);
        assert_eq!(window.written_through(), Some(seq(3)));
    }

    #[test]
    fn an_idle_window_is_small() {
        assert!(size_of::<Window>() <= 128, "{}", size_of::<Window>());
    }
}

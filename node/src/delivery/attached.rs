//! The devices attached to one shard, as its leader remembers them: a value.
//!
//! Owns sessions (of two connections of a device the higher wins, whatever the order of arrival), which device's window waits for
//! which gateway link, and how much of the mailboxes is in memory. Owns no stream, clock or store: [`super::desk`] carries out
//! the [`Todo`]s. The invariant: one attachment per device; without a term there are none, so a replica that does not lead knows
//! no device, and nothing survives a change of leader.

use std::{
    collections::{BTreeMap, HashMap, VecDeque},
    ops::Bound,
    sync::Arc,
    time::Instant,
};

use martlet_proto::{
    cluster::queue::{Message, Session},
    message::Sequence,
    tag::DeviceTag,
};

use super::{
    link::LinkId,
    window::{Handed, Take, Waiting, Window},
};

/// What one shard may hold of its mailboxes in memory.
#[derive(Debug, Clone, Copy)]
pub struct Bounds {
    /// Bytes of all devices.
    pub held_bytes_max: u64,
    /// Bytes of one device.
    pub held_bytes_per_device_max: u64,
    /// Messages with time to live 0 of one device.
    pub now_or_never_max: usize,
}

/// What the driver must do after a call.
#[derive(Debug, Default, PartialEq)]
pub struct Todo {
    /// These links have something to take.
    pub wake: Vec<LinkId>,
    /// These attachments lost to a newer connection of their device.
    pub superseded: Vec<(LinkId, u64)>,
    /// Some window wants the store read.
    pub pull: bool,
}

/// An attach, as a gateway asks for it.
#[derive(Debug, Clone)]
pub struct Wanted {
    /// The gateway's number for it.
    pub attach: u64,
    /// The device.
    pub device: DeviceTag,
    /// What the connection was given before.
    pub session: Option<Session>,
    /// Bytes that may be under way.
    pub credit: u64,
    /// Written on this connection before.
    pub written_through: Option<Sequence>,
}

/// What became of an attach.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Attaching {
    /// Deliveries follow.
    Attached(Session),
    /// A newer connection of the device is attached.
    Superseded,
    /// This replica does not lead in that term.
    NotLeading,
}

/// A delivery with its addressee.
#[derive(Debug, Clone, PartialEq)]
pub struct Parcel {
    /// The gateway's number of the attachment.
    pub attach: u64,
    /// Term in which this replica leads.
    pub term: u64,
    /// What to deliver.
    pub handed: Handed,
}

/// What [`Attached::take`] found for a link.
#[derive(Debug, Clone, PartialEq)]
pub enum Found {
    /// Hand this out; `more`: ask again.
    Parcel {
        /// The delivery.
        parcel: Parcel,
        /// Whether another may be waiting.
        more: bool,
    },
    /// The next one costs more than the stream has room for.
    NoRoom,
    /// Nothing waits for this link.
    Nothing,
}

/// A mailbox to be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pull {
    /// Whose.
    pub device: DeviceTag,
    /// Rows above this.
    pub after: Option<Sequence>,
    /// Which attachment asked: an answer for an earlier one is dropped.
    serial: u64,
}

/// The attached devices of one shard.
#[derive(Debug)]
pub struct Attached {
    bounds: Bounds,
    term: Option<u64>,
    counter: u64,
    serial: u64,
    devices: BTreeMap<DeviceTag, Attachment>,
    by_attach: HashMap<(LinkId, u64), DeviceTag>,
    /// Devices whose window has something, by link, each once.
    ready: BTreeMap<LinkId, VecDeque<(DeviceTag, u64)>>,
    /// Devices whose mailbox is to be read, each once.
    pulls: VecDeque<(DeviceTag, u64)>,
    held_bytes: u64,
}

#[derive(Debug)]
struct Attachment {
    attach: u64,
    link: LinkId,
    session: Session,
    /// Tells this attachment from an earlier one of the device.
    serial: u64,
    is_ready: bool,
    is_pulling: bool,
    window: Window,
}

impl Attached {
    /// A replica that does not lead.
    pub fn new(bounds: Bounds) -> Self {
        Attached {
            bounds,
            term: None,
            counter: 0,
            serial: 0,
            devices: BTreeMap::new(),
            by_attach: HashMap::new(),
            ready: BTreeMap::new(),
            pulls: VecDeque::new(),
            held_bytes: 0,
        }
    }

    /// This replica leads in `term` and its state is complete.
    pub fn lead(&mut self, term: u64) {
        self.follow();
        self.term = Some(term);
        self.counter = 0;
    }

    /// This replica leads no more: everything is forgotten.
    pub fn follow(&mut self) {
        self.term = None;
        self.devices.clear();
        self.by_attach.clear();
        self.ready.clear();
        self.pulls.clear();
        self.held_bytes = 0;
    }

    /// The term in which it leads.
    pub fn term(&self) -> Option<u64> {
        self.term
    }

    /// Number of attached devices.
    pub fn len(&self) -> usize {
        self.devices.len()
    }

    /// Whether no device is attached.
    pub fn is_empty(&self) -> bool {
        self.devices.is_empty()
    }

    /// Attached devices above `above` in the order of their tags, at most `most`.
    pub fn devices_above(&self, above: Option<DeviceTag>, most: usize) -> Vec<DeviceTag> {
        let from = above.map_or(Bound::Unbounded, Bound::Excluded);
        self.devices.range((from, Bound::Unbounded)).map(|(device, _)| *device).take(most).collect()
    }

    /// Attaches a device, in the term in which the read check was made.
    pub fn attach(&mut self, term: u64, link: LinkId, wanted: Wanted) -> (Attaching, Todo) {
        let mut todo = Todo::default();
        if self.term != Some(term) {
            return (Attaching::NotLeading, todo);
        }
        if let Some(present) = self.devices.get(&wanted.device) {
            let Session { term, counter } = present.session;
            match wanted.session.map(|s| (s.term, s.counter)) {
                Some(mine) if mine < (term, counter) => return (Attaching::Superseded, todo),
                // The same connection again: what it had before is replaced without a word.
                Some(mine) if mine == (term, counter) => {}
                Some(_) | None => todo.superseded.push((present.link, present.attach)),
            }
            self.remove(wanted.device);
        }
        let session = wanted.session.unwrap_or_else(|| {
            self.counter += 1;
            Session { term, counter: self.counter }
        });
        self.serial += 1;
        // A number used twice names the newer one only.
        self.detach(link, wanted.attach);
        self.by_attach.insert((link, wanted.attach), wanted.device);
        let attachment = Attachment {
            attach: wanted.attach,
            link,
            session,
            serial: self.serial,
            is_ready: false,
            is_pulling: false,
            window: Window::new(wanted.written_through, wanted.credit),
        };
        self.devices.insert(wanted.device, attachment);
        self.after(wanted.device, &mut todo);
        (Attaching::Attached(session), todo)
    }

    /// The gateway lets go of an attachment, or cannot place what it was handed; what is unacknowledged stays queued.
    pub fn detach(&mut self, link: LinkId, attach: u64) {
        if let Some(&device) = self.by_attach.get(&(link, attach)) {
            self.remove(device);
        }
    }

    /// A link is gone, and all attachments through it.
    pub fn link_gone(&mut self, link: LinkId) {
        let gone: Vec<_> = self.devices.iter().filter(|(_, a)| a.link == link).map(|(device, _)| *device).collect();
        for device in gone {
            self.remove(device);
        }
        self.ready.remove(&link);
    }

    /// A row was added to a mailbox. `row` makes it ready for delivery, and is called only if somebody is attached.
    pub fn enqueued(&mut self, device: DeviceTag, row: impl FnOnce() -> Waiting, todo: &mut Todo) {
        let room = self.room(device);
        if let Some(attachment) = self.devices.get_mut(&device) {
            let before = attachment.window.held_bytes();
            attachment.window.enqueued(row(), room);
            self.recount(device, before);
            self.after(device, todo);
        }
    }

    /// A row left a mailbox.
    pub fn removed(&mut self, device: DeviceTag, sequence: Sequence, todo: &mut Todo) {
        if let Some(attachment) = self.devices.get_mut(&device) {
            let before = attachment.window.held_bytes();
            attachment.window.removed(sequence);
            self.recount(device, before);
            self.after(device, todo);
        }
    }

    /// A message with time to live 0, to be dropped at `dies`. `false`: dropped at once, as nobody is attached or too much waits.
    pub fn now_or_never(&mut self, device: DeviceTag, message: Arc<Message>, dies: Instant) -> (bool, Todo) {
        let mut todo = Todo::default();
        if self.room(device) == 0 {
            return (false, todo);
        }
        let most = self.bounds.now_or_never_max;
        let Some(attachment) = self.devices.get_mut(&device) else { return (false, todo) };
        let before = attachment.window.held_bytes();
        let kept = attachment.window.now_or_never(message, dies, most);
        self.recount(device, before);
        self.after(device, &mut todo);
        (kept, todo)
    }

    /// The gateway wrote to the device everything handed out up to `through`; `credit` bytes come back.
    pub fn written(&mut self, link: LinkId, attach: u64, through: Option<Sequence>, credit: u64) -> Todo {
        let mut todo = Todo::default();
        if let Some(&device) = self.by_attach.get(&(link, attach))
            && let Some(attachment) = self.devices.get_mut(&device)
        {
            attachment.window.written(through, credit);
            self.after(device, &mut todo);
        }
        todo
    }

    /// Through which link the device is attached, and the highest sequence written to it.
    pub fn attachment(&self, device: DeviceTag) -> Option<(LinkId, Option<Sequence>)> {
        let attachment = self.devices.get(&device)?;
        Some((attachment.link, attachment.window.written_through()))
    }

    /// Highest sequence written to the device, if it is attached and was written anything.
    pub fn written_through(&self, device: DeviceTag) -> Option<Sequence> {
        self.devices.get(&device)?.window.written_through()
    }

    /// Takes the next delivery for `link`, devices in turn. The caller has made sure, at this moment, that the lease of `term` holds.
    pub fn take(&mut self, link: LinkId, now: Instant, time_ms: u64, stream_room: u64, todo: &mut Todo) -> Found {
        let Some(term) = self.term else { return Found::Nothing };
        while let Some((device, serial)) = self.ready.get_mut(&link).and_then(VecDeque::pop_front) {
            let Some(attachment) = self.devices.get_mut(&device).filter(|a| a.serial == serial) else { continue };
            attachment.is_ready = false;
            let attach = attachment.attach;
            let before = attachment.window.held_bytes();
            let take = attachment.window.take(now, time_ms, stream_room);
            let no_room = take == Take::NoRoom;
            if no_room {
                attachment.is_ready = true;
            }
            self.recount(device, before);
            if no_room {
                self.ready.entry(link).or_default().push_front((device, serial));
                return Found::NoRoom;
            }
            // This link is being served: it needs no waking for itself.
            let mut own = Todo::default();
            self.after(device, &mut own);
            todo.pull |= own.pull;
            if let Take::Handed(handed) = take {
                let more = self.ready.get(&link).is_some_and(|ready| !ready.is_empty());
                return Found::Parcel { parcel: Parcel { attach, term, handed }, more };
            }
        }
        self.ready.remove(&link);
        Found::Nothing
    }

    /// Links that have something to take.
    pub fn links_ready(&self) -> Vec<LinkId> {
        self.ready.keys().copied().collect()
    }

    /// Mailboxes to be read now, at most `most`; none while as much is held as may be.
    pub fn pulls(&mut self, most: usize) -> Vec<Pull> {
        let mut begun = Vec::new();
        while begun.len() < most && self.held_bytes < self.bounds.held_bytes_max {
            let Some((device, serial)) = self.pulls.pop_front() else { break };
            let Some(attachment) = self.devices.get_mut(&device).filter(|a| a.serial == serial) else { continue };
            if attachment.window.wants_pull() {
                begun.push(Pull { device, after: attachment.window.pull(), serial });
            } else {
                attachment.is_pulling = false;
            }
        }
        begun
    }

    /// A mailbox was read; `None`: it was not, and is to be read again.
    pub fn pulled(&mut self, pull: Pull, found: Option<(Vec<Waiting>, bool)>, todo: &mut Todo) {
        let Some(attachment) = self.devices.get_mut(&pull.device).filter(|a| a.serial == pull.serial) else { return };
        attachment.is_pulling = false;
        let before = attachment.window.held_bytes();
        match found {
            Some((rows, complete)) => attachment.window.pulled(rows, complete),
            None => attachment.window.pull_failed(),
        }
        self.recount(pull.device, before);
        self.after(pull.device, todo);
    }

    /// Bytes that may be held more for this device.
    fn room(&self, device: DeviceTag) -> u64 {
        let Some(attachment) = self.devices.get(&device) else { return 0 };
        let own = self.bounds.held_bytes_per_device_max.saturating_sub(attachment.window.held_bytes());
        own.min(self.bounds.held_bytes_max.saturating_sub(self.held_bytes))
    }

    fn recount(&mut self, device: DeviceTag, before: u64) {
        let after = self.devices.get(&device).map_or(0, |a| a.window.held_bytes());
        self.held_bytes = (self.held_bytes + after).saturating_sub(before);
    }

    /// Enters a device whose window has changed into the lists it now belongs to.
    fn after(&mut self, device: DeviceTag, todo: &mut Todo) {
        let Some(attachment) = self.devices.get_mut(&device) else { return };
        if !attachment.is_ready && attachment.window.is_ready() {
            attachment.is_ready = true;
            self.ready.entry(attachment.link).or_default().push_back((device, attachment.serial));
            todo.wake.push(attachment.link);
        }
        if !attachment.is_pulling && attachment.window.wants_pull() {
            attachment.is_pulling = true;
            self.pulls.push_back((device, attachment.serial));
        }
        todo.pull |= !self.pulls.is_empty() && self.held_bytes < self.bounds.held_bytes_max;
    }

    fn remove(&mut self, device: DeviceTag) {
        if let Some(gone) = self.devices.remove(&device) {
            self.by_attach.remove(&(gone.link, gone.attach));
            self.held_bytes = self.held_bytes.saturating_sub(gone.window.held_bytes());
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::delivery::window::cost;

    const LINK: LinkId = LinkId(1);
    const OTHER: LinkId = LinkId(2);
    const DEVICE: DeviceTag = DeviceTag(7);

    #[expect(clippy::disallowed_methods, reason = "an origin for made-up instants")]
    fn origin() -> Instant {
        Instant::now()
    }

    fn leading(term: u64) -> Attached {
        let bounds = Bounds { held_bytes_max: 4_000, held_bytes_per_device_max: 1_000, now_or_never_max: 4 };
        let mut attached = Attached::new(bounds);
        attached.lead(term);
        attached
    }

    fn wanted(attach: u64, session: Option<(u64, u64)>) -> Wanted {
        let session = session.map(|(term, counter)| Session { term, counter });
        Wanted { attach, device: DEVICE, session, credit: 1_000, written_through: None }
    }

    fn session(attaching: Attaching) -> (u64, u64) {
        match attaching {
            Attaching::Attached(session) => (session.term, session.counter),
            other => panic!("{other:?}"),
        }
    }

    fn seq(index: u64) -> Sequence {
        Sequence { incarnation: 0, index, position: 0 }
    }

    fn row(index: u64) -> Waiting {
        Waiting { sequence: seq(index), expires_ms: u64::MAX, message: Arc::new(Message::default()) }
    }

    /// Does what the driver does: reads mailboxes when asked to.
    fn read_empty_mailboxes(attached: &mut Attached) {
        for pull in attached.pulls(100) {
            attached.pulled(pull, Some((vec![], true)), &mut Todo::default());
        }
    }

    fn taken(attached: &mut Attached, link: LinkId) -> Vec<(u64, u64)> {
        let mut out = vec![];
        while let Found::Parcel { parcel, .. } = attached.take(link, origin(), 0, u64::MAX, &mut Todo::default()) {
            out.push((parcel.attach, parcel.handed.sequence.unwrap().index));
        }
        out
    }

    #[test]
    fn the_newer_connection_takes_over_and_the_older_is_told() {
        let mut attached = leading(3);
        assert_eq!(session(attached.attach(3, LINK, wanted(1, None)).0), (3, 1));
        let (attaching, todo) = attached.attach(3, OTHER, wanted(2, None));
        assert_eq!(session(attaching), (3, 2));
        assert_eq!(todo.superseded, [(LINK, 1)]);
    }

    #[test]
    fn the_higher_session_wins_whatever_the_order_of_arrival() {
        let mut attached = leading(4);
        attached.attach(4, LINK, wanted(1, Some((3, 2))));
        assert_eq!(attached.attach(4, OTHER, wanted(2, Some((3, 1)))).0, Attaching::Superseded);
        let (attaching, todo) = attached.attach(4, OTHER, wanted(3, Some((3, 9))));
        assert_eq!(session(attaching), (3, 9));
        assert_eq!(todo.superseded, [(LINK, 1)]);
    }

    #[test]
    fn a_connection_that_attaches_again_keeps_its_session_and_supersedes_nobody() {
        let mut attached = leading(4);
        let kept = session(attached.attach(4, LINK, wanted(1, None)).0);
        let (attaching, todo) = attached.attach(4, OTHER, wanted(2, Some(kept)));
        assert_eq!(session(attaching), kept);
        assert_eq!(todo.superseded, []);
        assert_eq!(attached.len(), 1);
    }

    #[test]
    fn an_attach_of_another_term_is_not_taken() {
        let mut attached = leading(4);
        assert_eq!(attached.attach(3, LINK, wanted(1, None)).0, Attaching::NotLeading);
        attached.follow();
        assert_eq!(attached.attach(4, LINK, wanted(1, None)).0, Attaching::NotLeading);
    }

    #[test]
    fn an_effect_wakes_the_link_of_its_device_once() {
        let mut attached = leading(4);
        attached.attach(4, LINK, wanted(1, None));
        read_empty_mailboxes(&mut attached);
        let mut todo = Todo::default();
        attached.enqueued(DEVICE, || row(1), &mut todo);
        attached.enqueued(DEVICE, || row(2), &mut todo);
        attached.enqueued(DeviceTag(8), || panic!("nobody is attached"), &mut todo);
        assert_eq!(todo.wake, [LINK]);
        assert_eq!(taken(&mut attached, LINK), [(1, 1), (1, 2)]);
    }

    #[test]
    fn a_lost_term_leaves_nothing() {
        let mut attached = leading(4);
        attached.attach(4, LINK, wanted(1, None));
        read_empty_mailboxes(&mut attached);
        attached.enqueued(DEVICE, || row(1), &mut Todo::default());
        attached.lead(5);
        assert!(attached.is_empty());
        assert_eq!(taken(&mut attached, LINK), []);
        assert_eq!(attached.held_bytes, 0);
    }

    #[test]
    fn what_was_read_for_an_earlier_attachment_is_dropped() {
        let mut attached = leading(4);
        attached.attach(4, LINK, wanted(1, None));
        let old = attached.pulls(1)[0];
        attached.attach(4, LINK, wanted(2, None));
        attached.pulled(old, Some((vec![row(1)], true)), &mut Todo::default());
        assert_eq!(taken(&mut attached, LINK), []);
    }

    #[test]
    fn a_link_that_is_gone_takes_its_attachments_with_it() {
        let mut attached = leading(4);
        attached.attach(4, LINK, wanted(1, None));
        attached.link_gone(LINK);
        assert!(attached.is_empty());
    }

    #[test]
    fn an_idle_attachment_is_small() {
        let bytes = size_of::<Attachment>() + size_of::<(DeviceTag, (LinkId, u64), DeviceTag)>();
        assert!(bytes <= 320, "{bytes}");
    }

    #[derive(Debug, Clone)]
    enum Step {
        Enqueue,
        Take,
        Written,
        Ack,
        Collapse(usize),
        BeginPull,
        EndPull,
        Reattach,
        Fail,
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            4 => Just(Step::Enqueue),
            4 => Just(Step::Take),
            2 => Just(Step::Written),
            2 => Just(Step::Ack),
            1 => (0usize..8).prop_map(Step::Collapse),
            3 => Just(Step::BeginPull),
            3 => Just(Step::EndPull),
            1 => Just(Step::Reattach),
            1 => Just(Step::Fail),
        ]
    }

    /// A mailbox, its device and its gateway, as simply as can be.
    struct Model {
        attached: Attached,
        term: u64,
        attach: u64,
        last: u64,
        mailbox: BTreeMap<u64, ()>,
        removed: Vec<u64>,
        /// Written on the connection, in order.
        seen: Vec<u64>,
        unwritten: Vec<(u64, u64)>,
        acked: usize,
        reads: Vec<(Pull, Vec<Waiting>, bool)>,
        credit: u64,
    }

    impl Model {
        fn new(credit: u64) -> Self {
            let mut model = Model {
                attached: leading(1),
                term: 1,
                attach: 0,
                last: 0,
                mailbox: BTreeMap::new(),
                removed: vec![],
                seen: vec![],
                unwritten: vec![],
                acked: 0,
                reads: vec![],
                credit,
            };
            model.reattach();
            model
        }

        fn reattach(&mut self) {
            self.attach += 1;
            self.unwritten.clear();
            let wanted = Wanted {
                attach: self.attach,
                device: DEVICE,
                session: None,
                credit: self.credit,
                written_through: self.seen.last().map(|index| seq(*index)),
            };
            self.attached.attach(self.term, LINK, wanted);
        }

        fn remove(&mut self, index: u64) {
            if self.mailbox.remove(&index).is_some() {
                self.removed.push(index);
                self.attached.removed(DEVICE, seq(index), &mut Todo::default());
            }
        }

        fn step(&mut self, step: &Step) {
            let mut todo = Todo::default();
            match step {
                Step::Enqueue => {
                    self.last += 1;
                    let index = self.last;
                    self.mailbox.insert(index, ());
                    self.attached.enqueued(DEVICE, || row(index), &mut todo);
                }
                Step::Take => {
                    if let Found::Parcel { parcel, .. } = self.attached.take(LINK, origin(), 0, u64::MAX, &mut todo) {
                        assert_eq!(parcel.attach, self.attach);
                        let index = parcel.handed.sequence.unwrap().index;
                        assert!(!self.removed.contains(&index), "{index} was removed before it was handed out");
                        self.seen.push(index);
                        self.unwritten.push((index, parcel.handed.cost));
                    }
                }
                Step::Written => {
                    let through = self.unwritten.last().map(|(index, _)| seq(*index));
                    let credit = self.unwritten.drain(..).map(|(_, cost)| cost).sum();
                    self.attached.written(LINK, self.attach, through, credit);
                }
                Step::Ack => {
                    if let Some(index) = self.seen.get(self.acked).copied() {
                        self.acked += 1;
                        self.remove(index);
                    }
                }
                Step::Collapse(nth) => {
                    if let Some(index) = self.mailbox.keys().nth(*nth).copied() {
                        self.remove(index);
                    }
                }
                Step::BeginPull => {
                    for pull in self.attached.pulls(1) {
                        let after = pull.after.map_or(0, |after| after.index);
                        let rows: Vec<_> =
                            self.mailbox.range(after + 1..).take(2).map(|(index, ())| row(*index)).collect();
                        let complete = rows.len() < 2;
                        self.reads.push((pull, rows, complete));
                    }
                }
                Step::EndPull => {
                    if !self.reads.is_empty() {
                        let (pull, rows, complete) = self.reads.remove(0);
                        self.attached.pulled(pull, Some((rows, complete)), &mut todo);
                    }
                }
                Step::Reattach => self.reattach(),
                Step::Fail => {
                    self.term += 1;
                    self.attached.lead(self.term);
                    self.reattach();
                }
            }
        }
    }

    proptest! {
        #[test]
        fn under_starved_credit_nothing_is_reordered_or_lost(
            steps in prop::collection::vec(step(), 1..120),
            messages_of_credit in 1u64..4,
        ) {
            let mut model = Model::new(messages_of_credit * cost(&Message::default()));
            for step in &steps {
                model.step(step);
            }
            // Reads that were begun end first, also those for attachments that are gone.
            for _ in 0..=2 * model.last + model.reads.len() as u64 {
                for step in [Step::BeginPull, Step::EndPull, Step::Take, Step::Written] {
                    model.step(&step);
                }
            }
            prop_assert!(model.seen.is_sorted_by(|a, b| a < b), "out of order: {:?}", model.seen);
            let lost: Vec<_> = model.mailbox.keys().filter(|index| !model.seen.contains(index)).collect();
            prop_assert!(lost.is_empty(), "never handed out: {lost:?}");
        }
    }
}

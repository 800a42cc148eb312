//! Where a shard's effects, its attached devices and the gateways' links meet: the driver of [`super::attached`].
//!
//! Owns the lock of one shard's attachments and wakes the links and the reader of mailboxes. Nothing here waits: `apply` calls it.
//! Locks are taken in the order attachments, link; never the other way round.

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Instant,
};

use martlet_proto::{
    cluster::queue::{Attached as AttachedReply, Message, Superseded, control_reply::Kind},
    message::Sequence,
    shard::Shard,
    tag::DeviceTag,
};
use prometheus_client::metrics::gauge::Gauge;
use tokio::sync::Notify;

use super::{
    attached::{Attached, Attaching, Bounds, Found, Pull, Todo, Wanted},
    link::{Link, LinkId, Links},
    window::Waiting,
};
use crate::shard::machine::{Change, copied};

/// One shard's attached devices.
#[derive(Debug)]
pub struct Desk {
    shard: Shard,
    links: Arc<Links>,
    attached: Mutex<Counted>,
    pull: Notify,
}

/// The attachments, and the node's gauge of them.
#[derive(Debug)]
struct Counted {
    attached: Attached,
    gauge: Gauge,
    shown: i64,
}

impl Desk {
    /// Nobody is attached.
    pub fn new(shard: Shard, bounds: Bounds, links: Arc<Links>, gauge: Gauge) -> Self {
        let attached = Mutex::new(Counted { attached: Attached::new(bounds), gauge, shown: 0 });
        Desk { shard, links, attached, pull: Notify::new() }
    }

    /// This replica leads in `term` and its state is complete: every gateway is told.
    pub fn lead(&self, term: u64) {
        self.with(|attached| attached.lead(term));
        for link in self.links.all() {
            link.announce(self.shard, term);
        }
    }

    /// The term in which this replica leads and takes attaches.
    pub fn term(&self) -> Option<u64> {
        self.with(|attached| attached.term())
    }

    /// This replica leads no more.
    pub fn follow(&self) {
        self.with(Attached::follow);
    }

    /// Carries out what an entry changed.
    pub fn applied<'a>(&self, changes: impl Iterator<Item = Change<'a>>) {
        self.with_todo(|attached, todo| {
            for change in changes {
                match change {
                    Change::Enqueued(device, sequence, row) => {
                        attached.enqueued(device, || copied(sequence, row), todo);
                    }
                    Change::Removed(device, sequence) => attached.removed(device, sequence, todo),
                    Change::None => {}
                }
            }
        });
    }

    /// Attaches a device whose read check was made in `term`, and replies so on the link. What it returns is not replied yet.
    pub fn attach(&self, term: u64, link: &Link, wanted: Wanted) -> Attaching {
        let attach = wanted.attach;
        self.with_todo(|attached, todo| {
            // Under the lock: a link that closes lets go of its attachments afterwards.
            if link.closed().is_cancelled() {
                return Attaching::NotLeading;
            }
            let (attaching, more) = attached.attach(term, link.id(), wanted);
            *todo = more;
            if let Attaching::Attached(session) = attaching {
                let shard = u32::from(self.shard.0);
                link.reply(Kind::Attached(AttachedReply { attach, shard, term, session: Some(session) }));
            }
            attaching
        })
    }

    /// The gateway lets go of an attachment.
    pub fn detach(&self, link: LinkId, attach: u64) {
        self.with(|attached| attached.detach(link, attach));
    }

    /// A link is gone.
    pub fn link_gone(&self, link: LinkId) {
        self.with(|attached| attached.link_gone(link));
    }

    /// Frames were written to a device.
    pub fn written(&self, link: LinkId, attach: u64, through: Option<Sequence>, credit: u64) {
        self.with_todo(|attached, todo| *todo = attached.written(link, attach, through, credit));
    }

    /// A message with time to live 0; `false`: dropped.
    pub fn now_or_never(&self, device: DeviceTag, message: Message, dies: Instant) -> bool {
        self.with_todo(|attached, todo| {
            let (kept, more) = attached.now_or_never(device, Arc::new(message), dies);
            *todo = more;
            kept
        })
    }

    /// Attached devices above `above` in the order of their tags, at most `most`.
    pub fn devices_above(&self, above: Option<DeviceTag>, most: usize) -> Vec<DeviceTag> {
        self.lock().attached.devices_above(above, most)
    }

    /// Highest sequence written to each of these devices.
    pub fn written_through(&self, devices: impl Iterator<Item = DeviceTag>) -> Vec<Option<Sequence>> {
        let counted = self.lock();
        devices.map(|device| counted.attached.written_through(device)).collect()
    }

    /// Through which gateway the device is attached ([`Link::gateway`]), and the highest sequence written to it.
    pub fn attachment(&self, device: DeviceTag) -> Option<(u32, Option<Sequence>)> {
        let (link, written) = self.lock().attached.attachment(device)?;
        Some((self.links.get(link).map_or(0, |link| link.gateway()), written))
    }

    /// The next delivery for a link. `leads` is asked at this moment for the term that the lease covers; none: nothing goes out.
    pub fn take(
        &self,
        link: LinkId,
        stream_room: u64,
        now: Instant,
        leads: impl FnOnce() -> Option<(u64, u64)>,
    ) -> Found {
        self.with_todo(|attached, todo| {
            let Some((term, time_ms)) = leads() else { return Found::Nothing };
            if attached.term() != Some(term) {
                return Found::Nothing;
            }
            attached.take(link, now, time_ms, stream_room, todo)
        })
    }

    /// Offers again what could not go out.
    pub fn offer_again(&self) {
        self.with_todo(|attached, todo| todo.wake = attached.links_ready());
    }

    /// Waits until mailboxes are to be read.
    pub async fn pull_wanted(&self) {
        self.pull.notified().await;
    }

    /// Mailboxes to be read now, at most `most`.
    pub fn pulls(&self, most: usize) -> Vec<Pull> {
        self.with(|attached| attached.pulls(most))
    }

    /// A mailbox was read; `None`: it could not be.
    pub fn pulled(&self, pull: Pull, found: Option<(Vec<Waiting>, bool)>) {
        self.with_todo(|attached, todo| attached.pulled(pull, found, todo));
    }

    fn with<T>(&self, change: impl FnOnce(&mut Attached) -> T) -> T {
        self.with_todo(|attached, _| change(attached))
    }

    fn with_todo<T>(&self, change: impl FnOnce(&mut Attached, &mut Todo) -> T) -> T {
        let mut todo = Todo::default();
        let mut counted = self.lock();
        let result = change(&mut counted.attached, &mut todo);
        // Under the lock, so that a device hears of its attachments in their order.
        for (link, attach) in todo.superseded {
            if let Some(link) = self.links.get(link) {
                link.reply(Kind::Superseded(Superseded { attach }));
            }
        }
        todo.wake.sort_unstable();
        todo.wake.dedup();
        for link in todo.wake {
            if let Some(link) = self.links.get(link) {
                link.has_something(self.shard);
            }
        }
        if todo.pull {
            self.pull.notify_one();
        }
        counted.show();
        result
    }

    fn lock(&self) -> MutexGuard<'_, Counted> {
        self.attached.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Counted {
    fn show(&mut self) {
        let have = i64::try_from(self.attached.len()).unwrap_or(i64::MAX);
        if have != self.shown {
            self.gauge.inc_by(have - self.shown);
            self.shown = have;
        }
    }
}

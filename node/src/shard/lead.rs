//! One shard on this node: what it does when it leads, and when it stops.
//!
//! Owns the turn from follower to leader and back: a leader whose first entry is applied takes up shard time, opens its desk and
//! tells the gateways; one that leads no more forgets its devices and refuses what it did not propose. Reads mailboxes for windows
//! that are behind, off the path of `apply`.

use std::{
    fmt,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use martlet_proto::{
    cluster::{
        command::Limits,
        queue::{
            AttachBatch, AttachRefused, Redirect, Refused, Superseded, attach_refused::Why, control_reply, refused,
        },
    },
    message::Sequence,
    shard::Shard,
    tag::DeviceTag,
};
use tokio::{sync::Notify, time::sleep};
use tokio_util::sync::CancellationToken;

use super::{
    consensus::Consensus,
    machine::Replica,
    pack::Packer,
    propose::{Pending, PendingAck},
    rates::Rates,
    reads::ReadChecks,
    settings::ShardSettings,
    sight::Arrivals,
    time::believed_ms,
};
use crate::{
    bug::Bug,
    clock::Clock,
    delivery::{
        attached::{Attaching, Found, Wanted},
        link::{Link, LinkId},
    },
    metrics::{Mark, Metrics},
    raft::{Leadership, ReadError},
};

/// Mailboxes read in one go off the async threads.
const PULLS_AT_ONCE: usize = 128;
/// Between two looks whether the lease is back, while deliveries wait for it.
const LEASE_RETRY: Duration = Duration::from_millis(50);

/// Which node a replica lives on, as the meta state says.
pub trait Directory: Send + Sync + fmt::Debug + 'static {
    /// Node of a shard's replica.
    fn node_of(&self, shard: Shard, replica: u64) -> Option<u64>;
    /// Epoch of the shard's list of replicas.
    fn epoch(&self, shard: Shard) -> u64;
    /// Shards of the cluster.
    fn shards(&self) -> u16;
    /// Nodes of a shard's replicas, the first to lead first.
    fn nodes_of(&self, shard: Shard) -> Vec<u64>;
}

/// What the node is short of, if anything.
pub(crate) type Overload = Arc<dyn Fn() -> Option<Mark> + Send + Sync>;

/// One shard.
pub(crate) struct Lead {
    pub(super) replica: Arc<Replica>,
    pub(super) group: Arc<dyn Consensus>,
    pub(super) settings: Arc<ShardSettings>,
    pub(super) limits: Limits,
    pub(super) clock: Arc<dyn Clock>,
    pub(super) directory: Arc<dyn Directory>,
    pub(super) metrics: Arc<Metrics>,
    pub(super) overload: Overload,
    pub(super) draining: CancellationToken,
    pub(super) packer: Mutex<Packer<Pending, PendingAck>>,
    /// How often messages come.
    pub(super) rates: Mutex<Rates>,
    /// Devices that attached and whose last-seen day was not looked at yet.
    pub(super) arrivals: Arrivals,
    /// Something may be proposed.
    pub(super) wake: Notify,
    /// Deliveries wait for the lease.
    pub(super) stalled: Notify,
    /// Something was published to a topic, at a home on this node.
    pub(super) published: Arc<Notify>,
    pub(super) reads: ReadChecks,
    /// What is proposed is not waited for any longer: this replica ends.
    pub(super) outcomes_given_up: CancellationToken,
}

impl fmt::Debug for Lead {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Lead").field("shard", &self.replica.shard).finish_non_exhaustive()
    }
}

impl Lead {
    pub(super) fn packer(&self) -> MutexGuard<'_, Packer<Pending, PendingAck>> {
        self.packer.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn leadership(&self) -> Leadership {
        *self.group.leadership().borrow()
    }

    /// The term this replica leads in, once its state is complete.
    pub(crate) fn term(&self) -> Option<u64> {
        let leadership = self.leadership();
        (leadership.is_leader && leadership.first_applied).then_some(leadership.term)
    }

    /// Follows leadership until `end` fires. Owned by [`super::shards::Shards`].
    pub(crate) async fn lead(self: Arc<Self>, end: CancellationToken) {
        let mut leadership = self.group.leadership();
        let mut leads_in = None;
        loop {
            let now = *leadership.borrow_and_update();
            let term = (now.is_leader && now.first_applied).then_some(now.term);
            if term != leads_in {
                if leads_in.take().is_some() {
                    self.step_down();
                }
                if let Some(term) = term {
                    tokio::select! {
                        () = self.take_up(term) => leads_in = Some(term),
                        changed = leadership.changed() => if changed.is_err() { break } else { continue },
                        () = end.cancelled() => break,
                    }
                }
            } else if leads_in.is_some() {
                self.look_for_expired();
                self.look_for_raise();
                self.look_for_fan_out();
            }
            tokio::select! {
                changed = leadership.changed() => if changed.is_err() { break },
                () = sleep(self.settings.expire_every), if leads_in.is_some() => {}
                () = self.stalled.notified() => {
                    sleep(LEASE_RETRY).await;
                    self.replica.desk().offer_again();
                }
                () = end.cancelled() => break,
            }
        }
        self.step_down();
    }

    /// Begins to lead. Safe to cancel: then it does not lead yet.
    async fn take_up(&self, term: u64) {
        if !self.replica.time().is_known()
            && let Some(time_ms) = self.group.time_of_others_ms().await
        {
            self.replica.time().told(time_ms, self.clock.now());
        }
        let is_known = self.replica.time().is_known();
        let otherwise_ms = if is_known { 0 } else { self.wall_ms() };
        self.replica.time().lead(self.clock.now(), otherwise_ms);
        self.replica.desk().lead(term);
        if !is_known {
            // Into the log with it: from then on the other replicas know it too, also where nobody sends anything.
            self.packer().expire();
            self.wake.notify_one();
        }
        self.look_for_fan_out();
        self.published.notify_one();
        tracing::info!(shard = self.replica.shard.0, term, "leads");
    }

    /// The wall time to begin with where no replica knows the shard's.
    fn wall_ms(&self) -> u64 {
        let own_ms = self.clock.wall_ms();
        let wall_ms = believed_ms(own_ms, &self.group.peer_clocks_ms());
        if wall_ms != own_ms {
            tracing::warn!(
                shard = self.replica.shard.0,
                own_ms,
                wall_ms,
                "this node's wall clock differs by more than a second from the other nodes', which are believed: set it right"
            );
        }
        wall_ms
    }

    fn step_down(&self) {
        self.replica.time().follow();
        self.replica.desk().follow();
        self.rates().forget();
        self.give_up();
    }

    fn look_for_expired(&self) {
        let Some(now_ms) = self.replica.time_ms() else { return };
        match self.replica.next_due_ms() {
            Ok(Some(due_ms)) if due_ms <= now_ms => {
                self.packer().expire();
                self.wake.notify_one();
            }
            Ok(_) => {}
            Err(error) => tracing::error!(shard = self.replica.shard.0, %error, "what has expired cannot be read"),
        }
    }

    /// Has the next step of a fan-out proposed, if one is not through.
    pub(super) fn look_for_fan_out(&self) {
        match self.replica.fans_out() {
            Ok(true) => {
                self.packer().fan_step();
                self.wake.notify_one();
            }
            Ok(false) => {}
            Err(error) => tracing::error!(shard = self.replica.shard.0, %error, "what is fanned out cannot be read"),
        }
    }

    /// Reads the mailboxes of windows that are behind until `end` fires. Owned by [`super::shards::Shards`].
    pub(crate) async fn pull_all(self: Arc<Self>, end: CancellationToken) {
        loop {
            let pulls = self.replica.desk().pulls(PULLS_AT_ONCE);
            if pulls.is_empty() {
                tokio::select! {
                    () = self.replica.desk().pull_wanted() => continue,
                    () = end.cancelled() => return,
                }
            }
            let this = Arc::clone(&self);
            let read = tokio::task::spawn_blocking(move || {
                let (mut failed, mut bytes) = (false, 0);
                for pull in pulls {
                    // What is read beyond the bound of memory is put off, as what cannot be read.
                    if failed || bytes > this.settings.held_bytes_max {
                        this.replica.desk().pulled(pull, None);
                        continue;
                    }
                    let found = this.replica.waiting(pull.device, pull.after, this.settings.pull_rows);
                    if let Err(error) = &found {
                        tracing::error!(shard = this.replica.shard.0, %error, "a mailbox cannot be read");
                        failed = true;
                    }
                    let found = found.ok();
                    bytes += found
                        .iter()
                        .flat_map(|(rows, _)| rows)
                        .map(|row| crate::delivery::window::cost(&row.message))
                        .sum::<u64>();
                    this.replica.desk().pulled(pull, found);
                }
                failed
            });
            if read.await.unwrap_or(true) {
                sleep(self.settings.expire_every).await;
            }
        }
    }

    /// Takes the next delivery for a link.
    pub(crate) fn take(&self, link: LinkId, stream_room: u64) -> Found {
        self.replica.desk().take(link, stream_room, self.clock.now(), || {
            let term = self.term()?;
            if !self.group.lease_valid() && !Bug::DeliveryWithoutLease.is_in() {
                self.stalled.notify_one();
                return None;
            }
            Some((term, self.replica.time_ms()?))
        })
    }

    /// Attaches the devices of one batch after one read check, and replies for each.
    pub(crate) async fn attach(&self, link: &Link, batch: AttachBatch) {
        let checked = self.read_check().await;
        for attach in batch.attaches {
            let number = attach.attach;
            if !link.attach_ends(number) {
                continue;
            }
            let device = DeviceTag(attach.device_tag);
            let wanted = Wanted {
                attach: number,
                device,
                session: attach.session,
                credit: attach.credit_bytes,
                written_through: Sequence::from_bytes(&attach.written_through),
            };
            let attaching = match &checked {
                Ok(term) => self.replica.desk().attach(*term, link, wanted),
                Err(why) => {
                    self.refuse_attach(link, number, why.clone());
                    continue;
                }
            };
            match attaching {
                Attaching::Attached(_) => self.arrivals.add(device),
                Attaching::Superseded => {
                    self.refuse_attach(link, number, Why::Superseded(Superseded { attach: number }))
                }
                Attaching::NotLeading => self.refuse_attach(link, number, Why::Redirect(self.redirect())),
            }
        }
    }

    /// Makes sure of leadership once; the term in which it was, or why not.
    async fn read_check(&self) -> Result<u64, Why> {
        let refused = |reason: refused::Reason, detail: String| Why::Refused(Refused { reason: reason.into(), detail });
        if self.draining.is_cancelled() {
            return Err(refused(refused::Reason::Draining, "the node drains".into()));
        }
        let leadership = self.leadership();
        if !leadership.is_leader {
            return Err(Why::Redirect(self.redirect()));
        }
        let Some(term) = self.term() else {
            return Err(refused(refused::Reason::NoLease, "has not applied its first entry".into()));
        };
        match self.reads.after_now(async || self.group.read_barrier().await).await {
            Ok(()) => Ok(term),
            Err(ReadError::NotLeader { .. }) => Err(Why::Redirect(self.redirect())),
            Err(ReadError::Stopped(why)) => Err(refused(refused::Reason::NoReplica, why)),
        }
    }

    fn refuse_attach(&self, link: &Link, attach: u64, why: Why) {
        refuse_attach(link, self.replica.shard, attach, why);
    }
}

/// Replies that an attach is refused.
pub(crate) fn refuse_attach(link: &Link, shard: Shard, attach: u64, why: Why) {
    let refused = AttachRefused { attach, shard: u32::from(shard.0), why: Some(why) };
    link.reply(control_reply::Kind::AttachRefused(refused));
}

/// Nobody here knows who leads.
pub(crate) fn nowhere(epoch: u64) -> Redirect {
    Redirect { leader_node: 0, term: 0, epoch }
}

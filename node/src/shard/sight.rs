//! The last-seen day of devices: whom the leader tells the state that it was here, at most once a day each.
//!
//! Owns which devices are looked at: those that attach, and at each change of the day all that are attached. Rows are read off the
//! async threads, a bounded number at once, and only a day that is older goes to the packer, beside the acknowledgements; `apply`
//! drops one that came twice. A device without a row has nothing in the shard that could be removed, and is given none: whoever
//! checks in and logs in, which anyone may, writes nothing.

use std::{
    collections::BTreeSet,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use martlet_proto::tag::DeviceTag;
use tokio::{sync::Notify, time::sleep};
use tokio_util::sync::CancellationToken;

use super::lead::Lead;
use crate::state::day;

/// Devices of one shard that attached and wait to be looked at. Beyond, all that are attached are looked at.
const ARRIVALS_MAX: usize = 4_096;

/// Devices that attached.
#[derive(Debug, Default)]
pub(super) struct Arrivals {
    held: Mutex<Held>,
    came: Notify,
}

#[derive(Debug, Default)]
struct Held {
    devices: BTreeSet<DeviceTag>,
    /// Some are not among `devices`, for want of room.
    missed: bool,
}

impl Arrivals {
    /// A device attached.
    pub(super) fn add(&self, device: DeviceTag) {
        let mut held = self.lock();
        if held.devices.len() < ARRIVALS_MAX {
            held.devices.insert(device);
        } else {
            held.missed = true;
        }
        drop(held);
        self.came.notify_one();
    }

    /// At most `most` of them.
    fn take(&self, most: usize) -> Vec<DeviceTag> {
        let mut held = self.lock();
        let mut taken = Vec::new();
        while taken.len() < most
            && let Some(device) = held.devices.pop_first()
        {
            taken.push(device);
        }
        taken
    }

    fn any_missed(&self) -> bool {
        std::mem::take(&mut self.lock().missed)
    }

    fn lock(&self) -> MutexGuard<'_, Held> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The daily walk over all that are attached.
#[derive(Debug, Default)]
struct Walk {
    day: u32,
    /// The last one looked at.
    at: Option<DeviceTag>,
    ended: bool,
}

impl Walk {
    fn from_the_start(day: u32) -> Self {
        Self { day, ..Self::default() }
    }
}

impl Lead {
    /// Looks at the last-seen day of devices until `end` fires. Owned by [`super::shards::Shards`].
    pub(super) async fn see_all(self: Arc<Self>, end: CancellationToken) {
        let mut walk = Walk::default();
        loop {
            if !self.see_some(&mut walk).await {
                tokio::select! {
                    () = self.arrivals.came.notified() => {}
                    () = sleep(self.settings.expire_every) => {}
                    () = end.cancelled() => return,
                }
            }
            // Room comes when an entry goes, which waits for company as long. And when all devices come back at once, a look at
            // each costs more than the row that it reads: those who come meanwhile are looked at together.
            tokio::select! {
                () = sleep(self.settings.ack_wait) => {}
                () = end.cancelled() => return,
            }
        }
    }

    /// Looks at as many as the packer has room for; whether there may be more.
    async fn see_some(self: &Arc<Self>, walk: &mut Walk) -> bool {
        let time_ms = self.term().and_then(|_| self.replica.time_ms());
        let Some(today) = time_ms.map(day) else {
            *walk = Walk::default();
            self.arrivals.take(ARRIVALS_MAX);
            return false;
        };
        if walk.day != today || self.arrivals.any_missed() {
            *walk = Walk::from_the_start(today);
        }
        let room = self.packer().seen_room();
        let mut devices = self.arrivals.take(room);
        if !walk.ended {
            let walked = self.replica.desk().devices_above(walk.at, room - devices.len());
            walk.ended = walked.len() < room - devices.len();
            walk.at = walked.last().copied().or(walk.at);
            devices.extend(walked);
        }
        if devices.is_empty() {
            return !walk.ended;
        }
        let replica = Arc::clone(&self.replica);
        let read = tokio::task::spawn_blocking(move || replica.not_seen_on(today, devices)).await;
        match read {
            Ok(Ok(stale)) if !stale.is_empty() => {
                let now = self.clock.now();
                let mut packer = self.packer();
                stale.into_iter().for_each(|device| packer.seen(device, today, now));
                drop(packer);
                self.wake.notify_one();
            }
            Ok(Ok(_)) => {}
            Ok(Err(error)) => tracing::error!(shard = self.replica.shard.0, %error, "a last-seen day cannot be read"),
            // The runtime ends.
            Err(_) => return false,
        }
        !walk.ended || !self.arrivals.lock().devices.is_empty()
    }
}

//! The load under the faults: app servers that never stop sending, devices that come and go.
//!
//! Owns who is on line: a third of most devices is away and comes back a round later, one device in four drops its connection
//! again and again. Sends to one token or a few, with and without a time to live. The invariant: no device has more waiting than
//! the limit of 100, so that the limit explains nothing.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
    },
    time::Duration,
};

use super::plan::Draw;
use crate::{
    app_server::{AppServer, Sent, Target},
    clock::RunClock,
    fleet::Device,
    history::Recorder,
};

/// Messages sent and not arrived that a device may have. Those of unknown outcome may come on top, so it is well below 100.
const OUTSTANDING_MAX: usize = 60;

/// Requests under way at once.
pub(super) const SENDERS: usize = 8;

/// Looks for a request on its way, a millisecond apart.
const UNDER_WAY_LOOKS: usize = 2_000;

/// Pause of a sender after a refusal.
const REFUSED_PAUSE: Duration = Duration::from_millis(50);

/// Times to live of the messages, seconds: of every tenth, which may end while its device is away; of every third, which an
/// hour's jump would end; of the others the protocol's own.
const TTLS: [Option<u32>; 3] = [Some(20), Some(1_800), None];

/// Groups of devices of which one is away at a time; the last of four drops connections instead.
const COHORTS: usize = 3;

/// What the senders share.
#[derive(Debug)]
pub(super) struct Load {
    app_server: AppServer,
    clock: RunClock,
    recorder: Arc<Recorder>,
    devices: Vec<Arc<Device>>,
    /// Of each device, when its last acked send was begun, microseconds of the run.
    served: Vec<AtomicU64>,
    stop: AtomicBool,
    sends: AtomicU64,
    under_way: AtomicUsize,
    /// Between two sends of one sender.
    period: Duration,
}

impl Load {
    /// Of `rate` requests a second over all senders.
    pub(super) fn new(
        app_server: AppServer,
        clock: RunClock,
        recorder: Arc<Recorder>,
        devices: Vec<Arc<Device>>,
        rate: f64,
    ) -> Self {
        let served = devices.iter().map(|_| AtomicU64::new(0)).collect();
        let period = Duration::from_secs_f64(1.0 / rate.max(0.1)) * u32::try_from(SENDERS).unwrap_or(1);
        let (stop, sends, under_way) = (AtomicBool::new(false), AtomicU64::new(0), AtomicUsize::new(0));
        Self { app_server, clock, recorder, devices, served, stop, sends, under_way, period }
    }

    /// Waits for a moment at which a request is on its way; whether one came.
    pub(super) async fn wait_under_way(&self) -> bool {
        for _ in 0..UNDER_WAY_LOOKS {
            if self.under_way.load(Ordering::Relaxed) > 0 {
                return true;
            }
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        false
    }

    /// Lets all senders and droppers end.
    pub(super) fn stop(&self) {
        self.stop.store(true, Ordering::Relaxed);
    }

    /// Devices that no send begun after `since` of the run has been acked for; one that is full is not sent to.
    pub(super) fn unserved(&self, since: Duration) -> usize {
        let since = u64::try_from(since.as_micros()).unwrap_or(u64::MAX);
        let served = |at: &usize| self.served[*at].load(Ordering::Relaxed) > since;
        (0..self.devices.len()).filter(|at| !served(at) && self.has_room(*at)).count()
    }

    fn has_room(&self, at: usize) -> bool {
        self.devices[at].outstanding.load(Ordering::Relaxed) < OUTSTANDING_MAX
    }

    /// One sender, until [`Load::stop`].
    pub(super) async fn send(self: Arc<Self>) {
        let mut due = self.clock.elapsed();
        while !self.stop.load(Ordering::Relaxed) {
            due = (due + self.period).max(self.clock.elapsed());
            let n = self.sends.fetch_add(1, Ordering::Relaxed);
            let targets = self.pick(n);
            if !targets.is_empty() && !self.send_to(n, &targets).await {
                tokio::time::sleep(REFUSED_PAUSE).await;
            }
            tokio::time::sleep_until(self.clock.instant(due).into()).await;
        }
    }

    /// Devices of send `n`, in turn: one, or three.
    fn pick(&self, n: u64) -> Vec<usize> {
        let len = self.devices.len();
        let first = usize::try_from(n % len as u64).unwrap_or(0);
        let count = if n % 8 == 7 { 3.min(len) } else { 1 };
        (0..count).map(|more| (first + more) % len).filter(|at| self.has_room(*at)).collect()
    }

    /// Whether all were acked.
    async fn send_to(&self, n: u64, targets: &[usize]) -> bool {
        let tokens: Vec<Target> = targets
            .iter()
            .map(|at| Target { device: self.devices[*at].name.clone(), token: self.devices[*at].token.clone() })
            .collect();
        for at in targets {
            self.devices[*at].outstanding.fetch_add(1, Ordering::Relaxed);
        }
        let ttl = if n.is_multiple_of(10) {
            0
        } else if n.is_multiple_of(3) {
            1
        } else {
            2
        };
        let app_server = AppServer { ttl_secs: TTLS[ttl], ..self.app_server.clone() };
        self.under_way.fetch_add(1, Ordering::Relaxed);
        let begun = self.clock.elapsed();
        let sent = app_server.send(&self.clock, &self.recorder, &n.to_string(), &tokens, begun.as_secs_f64()).await;
        self.under_way.fetch_sub(1, Ordering::Relaxed);
        let mut all = true;
        for (at, outcome) in targets.iter().zip(sent) {
            if matches!(outcome, Sent::Acked(_)) {
                let begun = u64::try_from(begun.as_micros()).unwrap_or(u64::MAX);
                self.served[*at].fetch_max(begun, Ordering::Relaxed);
            } else {
                all = false;
                let outstanding = &self.devices[*at].outstanding;
                let _ = outstanding.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |count| count.checked_sub(1));
            }
        }
        all
    }

    /// Sends home those who were away and lets the next ones go; `round` counts from 0.
    pub(super) fn rotate(&self, round: usize) {
        for (at, device) in self.devices.iter().enumerate() {
            let cohort = at % (COHORTS + 1);
            if cohort == COHORTS {
                continue;
            }
            let away = cohort == round % COHORTS;
            if !away && device.is_wanted() {
                // On line all round: what has not arrived is expired or was never stored.
                device.outstanding.store(0, Ordering::Relaxed);
            }
            device.want(!away);
        }
    }

    /// All are to be on line.
    pub(super) fn call_home(&self) {
        self.devices.iter().for_each(|device| device.want(true));
    }

    /// Drops connections of the devices that no round sends away, until [`Load::stop`].
    pub(super) async fn drop_connections(self: Arc<Self>, seed: u64) {
        let mut draw = Draw(seed);
        let shaky: Vec<&Arc<Device>> = self.devices.iter().skip(COHORTS).step_by(COHORTS + 1).collect();
        while !self.stop.load(Ordering::Relaxed) && !shaky.is_empty() {
            let device = shaky[usize::try_from(draw.below(shaky.len() as u64)).unwrap_or(0)];
            device.want(false);
            tokio::time::sleep(Duration::from_millis(100 + draw.below(1_500))).await;
            device.want(true);
            tokio::time::sleep(Duration::from_millis(draw.below(800))).await;
        }
    }
}

//! The scenarios: what is measured, and when.
//!
//! A run registers its devices, brings them on line, sends, waits until everything acked has arrived, and hands the history to
//! the ledger. Owns the phases and the measured window; sends fewer than the limit of waiting messages to any device, so that the
//! limit explains nothing. `steady` and `offline-drain` are here; `idle` and `storm`, which measure connections,
//! `restart`, which measures a node that comes back, `offline-fill`, which measures a full cluster, and `topic`, which measures messages
//! to many, have their files.

mod fill;
mod idle;
mod restart;
mod storm;
mod topic;

use std::{
    ops::Range,
    path::PathBuf,
    sync::{
        Arc, PoisonError,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
    },
    time::Duration,
};

use anyhow::{Context as _, Result, bail};
use indicatif::{ProgressBar, ProgressStyle};
use tokio::{sync::Semaphore, task::JoinSet};

pub use self::{
    fill::FillFigures, idle::IdleFigures, restart::RestartFigures, storm::StormFigures, topic::TopicFigures,
};
use crate::{
    app_server::{AppServer, Project, Sent, Target},
    clock::RunClock,
    cluster::Cluster,
    device,
    fleet::{Device, Fleet, Surroundings},
    history::{Recorder, What},
    http::HttpClient,
    ledger::{self, Terms},
    machine,
    pace::Pace,
    patience::Patience,
    report::{Report, to_f64},
};

/// Messages sent and not arrived that a device may have: below the limit of 100 waiting ones.
const OUTSTANDING_MAX: usize = 90;

/// Requests under way at once in a closed loop, unless the plan says otherwise.
pub const SENDERS_DEFAULT: usize = 64;

/// Requests under way at once in an open loop; beyond it the generator itself is late, which counts as latency.
const OPEN_LOOP_MAX: usize = 4_096;

/// Sending before the measured window begins.
const WARM_UP: Duration = Duration::from_secs(2);

/// Longest wait without any arrival for what was acked.
const DRAIN_PATIENCE: Duration = Duration::from_secs(30);

/// How long a message that the broker refuses for now is tried again where it is to be stored.
const STORE_PATIENCE: Duration = Duration::from_secs(120);

/// Devices stay on line this long after the last arrival, for what should not come.
const LINGER: Duration = Duration::from_millis(1_500);

/// Longest wait for devices to come on line.
const ON_LINE_PATIENCE: Duration = Duration::from_secs(180);

/// Which scenario.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Devices on line, messages at a rate.
    Steady,
    /// Messages for devices that are away; then all come at once.
    OfflineDrain,
    /// Devices that are connected and say nothing.
    Idle,
    /// All devices log in again, first without and then with a message that waits.
    Storm,
    /// Messages for devices that are away; then a node is started again.
    Restart,
    /// One message for each of very many devices that are away.
    OfflineFill,
    /// Messages to a topic with many subscribers, and what others notice of them.
    Topic,
}

impl Kind {
    /// Its name on the command line and in the report.
    fn name(self) -> &'static str {
        match self {
            Self::Steady => "steady",
            Self::OfflineDrain => "offline-drain",
            Self::Idle => "idle",
            Self::Storm => "storm",
            Self::Restart => "restart",
            Self::OfflineFill => "offline-fill",
            Self::Topic => "topic",
        }
    }
}

/// What a run is to do.
#[derive(Debug, Clone)]
pub struct Plan {
    /// Which scenario.
    pub kind: Kind,
    /// Devices on line.
    pub devices: usize,
    /// Registered devices, those on line included.
    pub registered: usize,
    /// Measured window of `steady`; quiet time of `idle`, once without devices and once with them.
    pub window: Duration,
    /// Requests a second; none: as fast as answers come.
    pub rate: Option<f64>,
    /// Requests under way at once where no rate is given.
    pub senders: usize,
    /// Tokens of a request.
    pub recipients: usize,
    /// Size of the body, bytes.
    pub payload_bytes: usize,
    /// Messages for each device of `offline-drain` and `restart`; `offline-fill` stores one.
    pub per_device: usize,
    /// Windows without and with a message to the topic, each so many; of `topic`.
    pub rounds: usize,
    /// Subscribers that are away and come on line at the end, at most; of `topic`.
    pub sample: usize,
    /// Whether the leader of the topic's home is killed right behind a message; of `topic`.
    pub kill_leader: bool,
    /// Where the history is written.
    pub history: Option<PathBuf>,
    /// Directory whose disk is measured.
    pub disk: PathBuf,
}

/// The broker of a run.
#[derive(Debug)]
pub struct Broker {
    /// Base address of HTTP.
    pub http: String,
    /// Address of MCS.
    pub mcs: String,
    /// CA of MCS.
    pub ca_file: PathBuf,
    /// Project that sends.
    pub project: Project,
    /// Its processes, where they are ours.
    pub cluster: Option<Cluster>,
    /// Shards of the local cluster.
    pub shards: u32,
}

/// Runs a plan and judges it.
///
/// # Errors
/// When the broker could not be used at all; broken promises are in the report.
pub async fn run(plan: &Plan, broker: &mut Broker, quiet: bool) -> Result<Report> {
    let clock = RunClock::begin();
    let history = plan.history.as_deref();
    let recorder = match plan.kind {
        Kind::OfflineFill => Recorder::of_sample(history, fill::sample_every(plan.devices)),
        Kind::Steady | Kind::OfflineDrain | Kind::Idle | Kind::Storm | Kind::Restart | Kind::Topic => {
            Recorder::new(history)
        }
    };
    let recorder = Arc::new(recorder.context("create --history")?);
    let http = HttpClient::new(&broker.http)?;
    let around = Surroundings {
        http: http.clone(),
        mcs: broker.mcs.clone(),
        tls: device::trusting(&broker.ca_file)?,
        sender_id: broker.project.sender_id.clone(),
        clock: clock.clone(),
        recorder: Arc::clone(&recorder),
    };
    let fdatasync_per_s = machine::fdatasync_per_sec(&plan.disk, Duration::from_secs(1))?;
    let empty = match plan.kind {
        Kind::Idle => Some(idle::empty(plan, broker, quiet).await?),
        Kind::Steady | Kind::OfflineDrain | Kind::Storm | Kind::Restart | Kind::OfflineFill | Kind::Topic => None,
    };
    let bar = progress(quiet, "registering", plan.registered);
    let fleet = Fleet::register(around, plan.registered, |done| bar.inc(done)).await?;
    bar.finish_and_clear();
    if plan.kind == Kind::Idle
        && let Some(cluster) = &mut broker.cluster
    {
        // What registrations left behind in its allocator would serve connections for nothing.
        cluster.restart_gateway().await?;
    }
    let app_server =
        AppServer { http, project: broker.project.clone(), payload_bytes: plan.payload_bytes, ttl_secs: None };
    let mut run = Run { plan, broker, clock, recorder, fleet, app_server, sends: AtomicU64::new(0), quiet };
    let mut report = match plan.kind {
        Kind::Steady => run.steady().await?,
        Kind::OfflineDrain => run.offline_drain().await?,
        Kind::Idle => run.idle(empty.unwrap_or_default()).await?,
        Kind::Storm => {
            let (back, report) = run.storm().await?;
            run = back;
            report
        }
        Kind::Restart => run.restart().await?,
        Kind::OfflineFill => run.offline_fill().await?,
        Kind::Topic => run.topic().await?,
    };
    report.fdatasync_per_s = fdatasync_per_s;
    run.recorder.record(run.clock.secs(), What::End {});
    let recorder = Arc::clone(&run.recorder);
    drop(run);
    let recorder = Arc::into_inner(recorder).context("a task of the run still records")?;
    let events = recorder.finish().context("write --history")?;
    let terms = Terms { acked_min: 1, delivered_min: 1, ..Terms::default() };
    report.judged(&ledger::judge(&events, &terms));
    if let Some(topic) = &mut report.topic {
        topic.stored_twice = topic::stored_twice(&events);
        let found = topic.violations();
        report.breaks(found);
    }
    Ok(report)
}

struct Run<'a> {
    plan: &'a Plan,
    broker: &'a mut Broker,
    clock: RunClock,
    recorder: Arc<Recorder>,
    fleet: Fleet,
    app_server: AppServer,
    sends: AtomicU64,
    quiet: bool,
}

/// Counters at an edge of the measured window.
struct Edge {
    at: f64,
    acked: u64,
    arrived: u64,
    cpu_secs: f64,
    cpu_secs_each: Vec<(String, f64)>,
}

impl Edge {
    /// CPU seconds of each process since an earlier edge, by name.
    fn cpu_secs_since(&self, from: &Self) -> Vec<(String, f64)> {
        let before =
            |name: &str| from.cpu_secs_each.iter().find(|(other, _)| other == name).map_or(0.0, |(_, secs)| *secs);
        self.cpu_secs_each.iter().map(|(name, secs)| (name.clone(), secs - before(name))).collect()
    }
}

impl Run<'_> {
    async fn steady(&self) -> Result<Report> {
        self.bring_on_line().await?;
        let sending = Arc::new(Sending::default());
        let mut senders = JoinSet::new();
        let devices: Arc<[Arc<Device>]> = self.fleet.devices[..self.plan.devices].into();
        let begin = self.clock.elapsed();
        match self.plan.rate {
            Some(rate) => drop(senders.spawn(self.sender(&sending, &devices).open_loop(Pace::new(begin, rate)))),
            None => {
                for _ in 0..self.plan.senders {
                    senders.spawn(self.sender(&sending, &devices).closed_loop());
                }
            }
        }
        let bar = progress(self.quiet, "sending", usize::try_from(self.plan.window.as_secs()).unwrap_or(0));
        tokio::time::sleep(WARM_UP).await;
        self.fleet.seen.measuring.store(true, Ordering::Relaxed);
        let from = self.edge(&sending);
        while Duration::from_secs_f64(self.clock.secs() - from.at) < self.plan.window {
            tokio::time::sleep(Duration::from_millis(100)).await;
            bar.set_position((self.clock.secs() - from.at) as u64);
        }
        let to = self.edge(&sending);
        self.fleet.seen.measuring.store(false, Ordering::Relaxed);
        let resident = self.broker.cluster.as_ref().map_or(0, Cluster::resident_bytes);
        bar.finish_and_clear();
        sending.stop.store(true, Ordering::Relaxed);
        while let Some(done) = senders.join_next().await {
            done.context("a sender panicked")?;
        }
        self.drain(&sending).await;
        self.fleet.leave().await;
        let mut report = self.report(&from, &to, resident);
        report.throughput_per_s = to_f64(to.acked - from.acked) / report.seconds;
        self.per_cpu(&mut report, to_f64(to.acked - from.acked));
        Ok(report)
    }

    async fn offline_drain(&self) -> Result<Report> {
        if self.plan.per_device >= OUTSTANDING_MAX {
            bail!("--per-device: at most {}, below the limit of waiting messages", OUTSTANDING_MAX - 1);
        }
        let sending = Arc::new(Sending::default());
        self.store(&sending, 0..self.plan.devices, self.plan.per_device).await?;
        let from = self.edge(&sending);
        self.fleet.seen.measuring.store(true, Ordering::Relaxed);
        self.fleet.connect(0..self.plan.devices);
        self.drain(&sending).await;
        let mut to = self.edge(&sending);
        // The linger at the end of the drain is not part of what is measured.
        to.at -= LINGER.as_secs_f64();
        let resident = self.broker.cluster.as_ref().map_or(0, Cluster::resident_bytes);
        self.fleet.leave().await;
        let mut report = self.report(&from, &to, resident);
        report.throughput_per_s = report.delivered_per_s;
        self.per_cpu(&mut report, to_f64(to.arrived - from.arrived));
        Ok(report)
    }

    /// Stores `per_device` messages for each of these devices. What is refused for now is sent again.
    ///
    /// # Errors
    /// When one was refused for two minutes.
    async fn store(&self, sending: &Arc<Sending>, devices: Range<usize>, per_device: usize) -> Result<()> {
        let devices: Arc<[Arc<Device>]> = self.fleet.devices[devices].into();
        let bar = progress(self.quiet, "storing", devices.len() * per_device);
        let slots = Arc::new(Semaphore::new(self.plan.senders));
        let mut sends = JoinSet::new();
        for _ in 0..per_device {
            for chunk in devices.chunks(self.plan.recipients) {
                let slot = Arc::clone(&slots).acquire_owned().await?;
                let (sender, chunk) = (self.sender(sending, &devices), chunk.to_vec());
                bar.inc(chunk.len() as u64);
                sends.spawn(async move {
                    let _slot = slot;
                    sender.store(chunk).await
                });
            }
        }
        while let Some(done) = sends.join_next().await {
            done.context("a sender panicked")??;
        }
        bar.finish_and_clear();
        Ok(())
    }

    async fn bring_on_line(&self) -> Result<()> {
        let bar = progress(self.quiet, "connecting", self.plan.devices);
        self.fleet.connect(0..self.plan.devices);
        let all = self.plan.devices;
        self.fleet.wait_on_line(all, ON_LINE_PATIENCE, |on_line| bar.set_position(on_line)).await?;
        bar.finish_and_clear();
        Ok(())
    }

    /// Waits until everything acked has arrived, or nothing arrives any more, and a little longer; the second of the run at
    /// which the last arrival was seen.
    async fn drain(&self, sending: &Sending) -> f64 {
        let expected = sending.acked.load(Ordering::Relaxed);
        let bar = progress(self.quiet, "draining", usize::try_from(expected).unwrap_or(usize::MAX));
        let arrived = || self.fleet.seen.arrivals.load(Ordering::Relaxed);
        let mut last = (arrived(), self.clock.elapsed());
        while self.fleet.outstanding() > 0 && self.clock.elapsed() - last.1 < DRAIN_PATIENCE {
            tokio::time::sleep(Duration::from_millis(20)).await;
            if arrived() != last.0 {
                last = (arrived(), self.clock.elapsed());
            }
            bar.set_position(last.0);
        }
        let over = self.clock.secs();
        tokio::time::sleep(LINGER).await;
        bar.finish_and_clear();
        over
    }

    /// Waits until every arrival's acknowledgement is confirmed.
    async fn confirmed(&self, patience: Duration) -> Result<()> {
        let begin = self.clock.elapsed();
        while self.fleet.unconfirmed() > 0 {
            if self.clock.elapsed() - begin > patience {
                bail!("{} acknowledgements were not confirmed within {patience:?}", self.fleet.unconfirmed());
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        Ok(())
    }

    fn sender(&self, sending: &Arc<Sending>, devices: &Arc<[Arc<Device>]>) -> Sender {
        Sender {
            sending: Arc::clone(sending),
            devices: Arc::clone(devices),
            app_server: self.app_server.clone(),
            clock: self.clock.clone(),
            recorder: Arc::clone(&self.recorder),
            recipients: self.plan.recipients,
            first_send: self.sends.fetch_add(1, Ordering::Relaxed),
        }
    }

    fn edge(&self, sending: &Sending) -> Edge {
        Edge {
            at: self.clock.secs(),
            acked: sending.acked.load(Ordering::Relaxed),
            arrived: self.fleet.seen.arrivals.load(Ordering::Relaxed),
            cpu_secs: self.broker.cluster.as_ref().map_or(0.0, Cluster::cpu_secs),
            cpu_secs_each: self.broker.cluster.as_ref().map_or_else(Vec::new, Cluster::cpu_secs_each),
        }
    }

    fn per_cpu(&self, report: &mut Report, messages: f64) {
        if report.server_cpu_s > 0.0 {
            report.messages_per_server_cpu_s = messages / report.server_cpu_s;
        }
    }

    fn report(&self, from: &Edge, to: &Edge, server_rss_bytes: u64) -> Report {
        let seconds = (to.at - from.at).max(f64::MIN_POSITIVE);
        let latency = self.fleet.seen.latency_micros.lock().unwrap_or_else(PoisonError::into_inner);
        let ms = |quantile: f64| to_f64(latency.value_at_quantile(quantile)) / 1_000.0;
        Report {
            scenario: self.plan.kind.name(),
            verdict: "broken",
            devices: self.plan.devices,
            registered: self.plan.registered,
            seconds,
            rate: self.plan.rate.unwrap_or(0.0),
            recipients: self.plan.recipients,
            payload_bytes: self.plan.payload_bytes,
            nodes: self.broker.cluster.as_ref().map_or(0, Cluster::nodes),
            shards: self.broker.shards,
            throughput_per_s: 0.0,
            delivered_per_s: to_f64(to.arrived - from.arrived) / seconds,
            messages_per_server_cpu_s: 0.0,
            server_cpu_s: to.cpu_secs - from.cpu_secs,
            server_cpu_s_each: to.cpu_secs_since(from),
            p50_ms: ms(0.5),
            p99_ms: ms(0.99),
            p999_ms: ms(0.999),
            max_ms: to_f64(latency.max()) / 1_000.0,
            acked: 0,
            delivered: 0,
            failed: 0,
            unknown: 0,
            lost: 0,
            duplicates: 0,
            dropped_by_limit: 0,
            fdatasync_per_s: 0.0,
            server_rss_bytes,
            idle: None,
            storm: None,
            restart: None,
            fill: None,
            topic: None,
            violations: Vec::new(),
            machine: machine::name(),
        }
    }
}

/// What all senders of a run share.
#[derive(Debug, Default)]
pub struct Sending {
    /// Set when sending is to end.
    pub stop: AtomicBool,
    /// Messages acked so far.
    pub acked: AtomicU64,
    /// Messages refused or of unknown outcome so far.
    pub not_acked: AtomicU64,
    next_device: AtomicUsize,
    next_send: AtomicU64,
}

/// One app server's loop; clones share what is under way.
#[derive(Debug, Clone)]
struct Sender {
    sending: Arc<Sending>,
    devices: Arc<[Arc<Device>]>,
    app_server: AppServer,
    clock: RunClock,
    recorder: Arc<Recorder>,
    recipients: usize,
    first_send: u64,
}

impl Sender {
    async fn closed_loop(self) {
        while !self.sending.stop.load(Ordering::Relaxed) {
            match self.pick() {
                Some(devices) => drop(self.send(&devices, None).await),
                None => tokio::time::sleep(Duration::from_millis(1)).await,
            }
        }
    }

    async fn open_loop(self, pace: Pace) {
        let slots = Arc::new(Semaphore::new(OPEN_LOOP_MAX));
        let mut sends = JoinSet::new();
        for n in 0.. {
            let due = pace.due(n);
            tokio::time::sleep_until(self.clock.instant(due).into()).await;
            if self.sending.stop.load(Ordering::Relaxed) {
                break;
            }
            let Ok(slot) = Arc::clone(&slots).acquire_owned().await else { break };
            while sends.try_join_next().is_some() {}
            // All devices full: this one is not sent, and the report's rate shows it.
            let Some(devices) = self.pick() else { continue };
            let sender = self.clone();
            sends.spawn(async move {
                let _slot = slot;
                sender.send(&devices, Some(due.as_secs_f64())).await;
            });
        }
        while sends.join_next().await.is_some() {}
    }

    /// The next devices in turn that have room; none when too few have.
    fn pick(&self) -> Option<Vec<Arc<Device>>> {
        let mut picked = Vec::with_capacity(self.recipients);
        for _ in 0..self.devices.len() {
            let at = self.sending.next_device.fetch_add(1, Ordering::Relaxed) % self.devices.len();
            if self.devices[at].outstanding.load(Ordering::Relaxed) < OUTSTANDING_MAX {
                picked.push(Arc::clone(&self.devices[at]));
                if picked.len() == self.recipients {
                    return Some(picked);
                }
            }
        }
        None
    }

    /// Sends a message to each until none is refused for now any more.
    async fn store(&self, mut devices: Vec<Arc<Device>>) -> Result<()> {
        let mut patience = Patience::of(STORE_PATIENCE);
        loop {
            let sent = self.send(&devices, None).await;
            let (mut refused, mut asked, mut said) = (Vec::new(), None, String::new());
            for (device, outcome) in devices.into_iter().zip(sent) {
                if let Sent::Busy { word, retry_after } = outcome {
                    refused.push(device);
                    asked = asked.max(retry_after);
                    said = word;
                }
            }
            if refused.is_empty() {
                return Ok(());
            }
            let Some(pause) = patience.pause(asked) else {
                bail!("{} messages were refused for {STORE_PATIENCE:?}, at last with {said:?}", refused.len());
            };
            tokio::time::sleep(pause).await;
            devices = refused;
        }
    }

    async fn send(&self, devices: &[Arc<Device>], due: Option<f64>) -> Vec<Sent> {
        let targets: Vec<Target> =
            devices.iter().map(|device| Target { device: device.name.clone(), token: device.token.clone() }).collect();
        for device in devices {
            device.outstanding.fetch_add(1, Ordering::Relaxed);
        }
        let name = format!("{}.{}", self.first_send, self.sending.next_send.fetch_add(1, Ordering::Relaxed));
        let intended = due.unwrap_or_else(|| self.clock.secs());
        let sent = self.app_server.send(&self.clock, &self.recorder, &name, &targets, intended).await;
        for (device, outcome) in devices.iter().zip(&sent) {
            if matches!(outcome, Sent::Acked(_)) {
                self.sending.acked.fetch_add(1, Ordering::Relaxed);
            } else {
                // One of unknown outcome may arrive all the same; the count is a guard, not a fact.
                self.sending.not_acked.fetch_add(1, Ordering::Relaxed);
                let _ = device.outstanding.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |n| n.checked_sub(1));
            }
        }
        sent
    }
}

fn progress(quiet: bool, what: &'static str, len: usize) -> ProgressBar {
    if quiet {
        return ProgressBar::hidden();
    }
    let bar = ProgressBar::new(len as u64);
    if let Ok(style) = ProgressStyle::with_template("{msg:12} {wide_bar} {pos}/{len} {elapsed}") {
        bar.set_style(style);
    }
    bar.set_message(what);
    bar
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        device::Identity,
        scripted::{Answer, Scripted},
    };

    #[tokio::test]
    async fn what_is_refused_for_now_is_sent_again_under_another_name_until_it_is_stored() {
        let broker = Scripted::start([
            ("/gcm/send", Answer::busy(Some(1))),
            ("/gcm/send", Answer::ok(r#"{"results":[{"error":"Unavailable"},{"message_id":"m1"}]}"#)),
            ("/gcm/send", Answer::ok(r#"{"results":[{"message_id":"m2"}]}"#)),
        ])
        .await;
        let identity = Identity { android_id: 1, security_token: 1 };
        let device = |name: &str| Arc::new(Device::new(name.to_owned(), identity, format!("token of {name}")));
        let devices = [device("a"), device("b")];
        let project = Project { sender_id: "1".to_owned(), server_key: "k".to_owned() };
        let recorder = Arc::new(Recorder::new(None).unwrap());
        let sender = Sender {
            sending: Arc::default(),
            devices: devices.to_vec().into(),
            app_server: AppServer { http: broker.client(), project, payload_bytes: 10, ttl_secs: None },
            clock: RunClock::begin(),
            recorder: Arc::clone(&recorder),
            recipients: 2,
            first_send: 0,
        };
        sender.store(devices.to_vec()).await.unwrap();
        assert!(sender.clock.elapsed() >= Duration::from_secs(1), "sooner than it was asked");
        assert_eq!(sender.sending.acked.load(Ordering::Relaxed), 2);
        assert!(devices.iter().all(|device| device.outstanding.load(Ordering::Relaxed) == 1));
        broker.ended().await;
        drop(sender);
        let history = Arc::into_inner(recorder).unwrap().finish().unwrap();
        let ops = |wanted: fn(&What) -> Option<&String>| history.iter().filter_map(move |event| wanted(&event.what));
        let invoked = ops(|what| if let What::SendInvoked { op, .. } = what { Some(op) } else { None });
        assert_eq!(invoked.collect::<std::collections::BTreeSet<_>>().len(), 5, "each try is an op of its own");
        let acked = ops(|what| if let What::SendAcked { op, .. } = what { Some(op) } else { None });
        assert_eq!(acked.collect::<Vec<_>>(), ["0.1@b", "0.2@a"]);
    }
}

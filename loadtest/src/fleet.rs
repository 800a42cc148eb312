//! The devices of a run: registered, some of them on line, each recording what it gets and acknowledges.
//!
//! Owns the device tasks and what they count. A device behaves as published clients do: it acknowledges after ten messages or a
//! short while, keeps the persistent ids it has no confirmation for, and names them at its next login.

use std::{
    collections::VecDeque,
    pin::pin,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    time::Duration,
};

use anyhow::{Context as _, Result, bail};
use hdrhistogram::Histogram;
use martlet_proto::{device::mcs::DataMessageStanza, mcs::stanza::Stanza};
use rustls::ClientConfig;
use tokio::{
    sync::{Semaphore, watch},
    task::JoinSet,
    time::Instant,
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use crate::{
    app_server::{digest, op_of},
    clock::RunClock,
    device::{self, Busy, Connection, Identity},
    history::{Recorder, What},
    http::HttpClient,
    patience::Patience,
};

/// Application id of every device of the generator.
pub const APP: &str = "net.martlet.loadtest";

/// Messages after which a device acknowledges at once. Source: device.md section 8.3 (Chromium).
const ACK_AFTER: usize = 10;

/// How long a device keeps an acknowledgement to itself.
const ACK_DELAY: Duration = Duration::from_millis(300);

/// How long it waits for the confirmation of one before it asks by a ping.
const CONFIRM_DELAY: Duration = Duration::from_secs(2);

/// Registrations and logins under way at once.
const PARALLEL_MAX: usize = 48;

/// How long a check-in or a registration that the broker puts off is tried again: many devices of one address wait for its limit.
const ENROLL_PATIENCE: Duration = Duration::from_secs(120);

/// Longest latency that is told apart, microseconds: ten minutes.
const LATENCY_MAX_MICROS: u64 = 600_000_000;

/// Pause before a connection is tried again, doubled up to [`RECONNECT_MAX`].
const RECONNECT_MIN: Duration = Duration::from_millis(100);

/// Longest pause between two tries.
const RECONNECT_MAX: Duration = Duration::from_secs(2);

/// A registered device.
#[derive(Debug)]
pub struct Device {
    /// Its name in the history.
    pub name: String,
    /// From check-in.
    pub identity: Identity,
    /// From registration.
    pub token: String,
    /// Sent and not yet arrived.
    pub outstanding: AtomicUsize,
    /// Whether it is to be on line.
    wanted: watch::Sender<bool>,
}

impl Device {
    /// A registered device that is to be on line once its fleet connects it.
    pub(crate) fn new(name: String, identity: Identity, token: String) -> Self {
        Self { name, identity, token, outstanding: AtomicUsize::new(0), wanted: watch::Sender::new(true) }
    }

    /// Says whether it is to be on line, once its fleet has connected it: false drops its connection without a word, as a device
    /// that leaves its network does.
    pub fn want(&self, on_line: bool) {
        self.wanted.send_replace(on_line);
    }

    /// Whether it is to be on line.
    #[must_use]
    pub fn is_wanted(&self) -> bool {
        *self.wanted.borrow()
    }
}

/// What the devices saw, together.
#[derive(Debug)]
pub struct Seen {
    /// From the intended send time to arrival, microseconds; first arrivals of the measured window only.
    pub latency_micros: Mutex<Histogram<u64>>,
    /// First and further arrivals.
    pub arrivals: AtomicU64,
    /// Devices on line now.
    pub on_line: AtomicUsize,
    /// Notices of overflow.
    pub notices: AtomicU64,
    /// Arrived on a connection that is still open, and not confirmed as acknowledged.
    pub unconfirmed: AtomicUsize,
    /// Whether arrivals are measured now.
    pub measuring: std::sync::atomic::AtomicBool,
}

/// Where devices connect, and who listens to them.
#[derive(Debug, Clone)]
pub struct Surroundings {
    /// HTTP of check-in and registration.
    pub http: HttpClient,
    /// `host:port` of MCS.
    pub mcs: String,
    /// Trust for it.
    pub tls: Arc<ClientConfig>,
    /// Sender the devices register for.
    pub sender_id: String,
    /// The run's clock.
    pub clock: RunClock,
    /// The run's history.
    pub recorder: Arc<Recorder>,
}

/// Registered devices and the tasks of those on line.
#[derive(Debug)]
pub struct Fleet {
    /// All that are registered.
    pub devices: Vec<Arc<Device>>,
    /// What they saw.
    pub seen: Arc<Seen>,
    around: Surroundings,
    tasks: TaskTracker,
    stop: CancellationToken,
    logins: Arc<Semaphore>,
    /// How often all have left.
    round: u32,
}

impl Fleet {
    /// Checks in and registers `count` devices, named `d0` and so on, in this order; `progress` is told each. What the broker puts off is tried again as it asks.
    ///
    /// # Errors
    /// The first device that the broker refuses, or puts off for longer than two minutes.
    pub async fn register(around: Surroundings, count: usize, progress: impl Fn(u64)) -> Result<Self> {
        let mut devices = Vec::with_capacity(count);
        let mut under_way = JoinSet::new();
        for n in 0..count {
            if under_way.len() >= PARALLEL_MAX {
                devices.push(joined(under_way.join_next().await)?);
                progress(1);
            }
            let around = around.clone();
            under_way.spawn(async move { Ok((n, enroll(around, format!("d{n}")).await?)) });
        }
        while !under_way.is_empty() {
            devices.push(joined(under_way.join_next().await)?);
            progress(1);
        }
        devices.sort_unstable_by_key(|(n, _)| *n);
        let devices = devices.into_iter().map(|(_, device)| device).collect();
        let latency = Histogram::new_with_bounds(1, LATENCY_MAX_MICROS, 3).context("a histogram of three digits")?;
        let seen = Seen {
            latency_micros: Mutex::new(latency),
            arrivals: AtomicU64::new(0),
            on_line: AtomicUsize::new(0),
            notices: AtomicU64::new(0),
            unconfirmed: AtomicUsize::new(0),
            measuring: false.into(),
        };
        Ok(Self {
            devices,
            seen: Arc::new(seen),
            around,
            tasks: TaskTracker::new(),
            stop: CancellationToken::new(),
            logins: Arc::new(Semaphore::new(PARALLEL_MAX)),
            round: 0,
        })
    }

    /// Brings devices on line, by their places; they reconnect until [`Fleet::leave`].
    pub fn connect(&self, places: impl IntoIterator<Item = usize>) {
        for device in places.into_iter().map(|at| &self.devices[at]) {
            let task = Task {
                device: Arc::clone(device),
                seen: Arc::clone(&self.seen),
                around: self.around.clone(),
                stop: self.stop.clone(),
                logins: Arc::clone(&self.logins),
                round: self.round,
                unacked: VecDeque::new(),
                carried: Vec::new(),
            };
            self.tasks.spawn(task.run());
        }
    }

    /// Waits until `count` devices are on line.
    ///
    /// # Errors
    /// When it takes longer than `patience`.
    pub async fn wait_on_line(&self, count: usize, patience: Duration, progress: impl Fn(u64)) -> Result<()> {
        let until = self.around.clock.elapsed() + patience;
        loop {
            let on_line = self.seen.on_line.load(Ordering::Relaxed);
            progress(on_line as u64);
            if on_line >= count {
                return Ok(());
            }
            if self.around.clock.elapsed() > until {
                bail!("{on_line} of {count} devices came on line within {patience:?}");
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// Sent and not yet arrived, over all devices.
    #[must_use]
    pub fn outstanding(&self) -> usize {
        self.devices.iter().map(|device| device.outstanding.load(Ordering::Relaxed)).sum()
    }

    /// Messages that devices have and whose acknowledgement no frame of the server has confirmed yet.
    #[must_use]
    pub fn unconfirmed(&self) -> usize {
        self.seen.unconfirmed.load(Ordering::Relaxed)
    }

    /// Ends all connections and waits for them.
    pub async fn leave(&self) {
        self.stop.cancel();
        self.tasks.close();
        self.tasks.wait().await;
    }

    /// The same devices after [`Fleet::leave`], none on line: they may connect again.
    #[must_use]
    pub fn come_back(self) -> Self {
        Self { tasks: TaskTracker::new(), stop: CancellationToken::new(), round: self.round + 1, ..self }
    }
}

fn joined<T>(done: Option<Result<Result<T>, tokio::task::JoinError>>) -> Result<T> {
    done.context("a registration was under way")?.context("a registration panicked")?
}

async fn enroll(around: Surroundings, name: String) -> Result<Arc<Device>> {
    let identity = patiently(|| device::check_in(&around.http, None)).await?;
    let token = patiently(|| device::register(&around.http, identity, APP, &around.sender_id)).await?;
    let what = What::Register {
        token: token.clone(),
        device: name.clone(),
        tenant: around.sender_id.clone(),
        app: Some(APP.to_owned()),
    };
    around.recorder.record(around.clock.secs(), what);
    Ok(Arc::new(Device::new(name, identity, token)))
}

/// Tries until it is done, or refused for good, or put off for too long.
async fn patiently<T, F: Future<Output = Result<T>>>(attempt: impl Fn() -> F) -> Result<T> {
    let mut patience = Patience::of(ENROLL_PATIENCE);
    loop {
        let error = match attempt().await {
            Ok(done) => return Ok(done),
            Err(error) => error,
        };
        let pause = error.downcast_ref::<Busy>().and_then(|busy| patience.pause(busy.retry_after));
        let Some(pause) = pause else { return Err(error) };
        tokio::time::sleep(pause).await;
    }
}

/// Waits until the device is to be on line, or not.
async fn until(wanted: &mut watch::Receiver<bool>, on_line: bool) {
    // An error means that the device is gone; the task that waits holds it.
    drop(wanted.wait_for(|wanted| *wanted == on_line).await);
}

/// A message that was received and has no confirmed acknowledgement.
#[derive(Debug)]
struct Unacked {
    stream_id: i32,
    /// None for a notice: nobody sent it.
    op: Option<String>,
    persistent_id: String,
}

/// One device on line; it owns the device's connections one after the other.
struct Task {
    device: Arc<Device>,
    seen: Arc<Seen>,
    around: Surroundings,
    stop: CancellationToken,
    logins: Arc<Semaphore>,
    round: u32,
    unacked: VecDeque<Unacked>,
    /// Named at the last login; kept until the server has confirmed something after it.
    carried: Vec<String>,
}

impl Task {
    async fn run(mut self) {
        let stop = self.stop.clone();
        let mut pause = RECONNECT_MIN;
        let mut wanted = self.device.wanted.subscribe();
        for session in 1.. {
            tokio::select! {
                () = stop.cancelled() => return,
                () = until(&mut wanted, true) => {}
            }
            let connection = tokio::select! { () = stop.cancelled() => return, opened = self.open() => opened };
            let Ok(connection) = connection else {
                tokio::select! { () = stop.cancelled() => return, () = tokio::time::sleep(pause) => {} }
                pause = (pause * 2).min(RECONNECT_MAX);
                continue;
            };
            pause = RECONNECT_MIN;
            let session = format!("{}/{}.{session}", self.device.name, self.round);
            let device = self.device.name.clone();
            self.record(What::Connected { device: device.clone(), session: Some(session.clone()) });
            self.seen.on_line.fetch_add(1, Ordering::Relaxed);
            self.serve(connection, &session, &stop, &mut wanted).await;
            self.seen.on_line.fetch_sub(1, Ordering::Relaxed);
            self.record(What::Disconnected { device, session: Some(session) });
            if stop.is_cancelled() {
                return;
            }
        }
    }

    async fn open(&mut self) -> Result<Connection> {
        let _slot = self.logins.acquire().await?;
        self.seen.unconfirmed.fetch_sub(self.unacked.len(), Ordering::Relaxed);
        let open = self.unacked.drain(..).map(|message| message.persistent_id);
        self.carried.extend(open);
        let ids = self.carried.clone();
        Connection::open(&self.around.mcs, Arc::clone(&self.around.tls), self.device.identity, ids).await
    }

    /// Serves until the connection ends, the device is not wanted on line, or the run ends.
    async fn serve(
        &mut self,
        mut connection: Connection,
        session: &str,
        stop: &CancellationToken,
        wanted: &mut watch::Receiver<bool>,
    ) {
        let mut ack_at: Option<Instant> = None;
        let mut acked_len = 0;
        // What waits from message to message is made once: that costs more than the message.
        let mut stopped = pin!(stop.cancelled());
        let mut unwanted = pin!(until(wanted, false));
        let mut alarm = pin!(tokio::time::sleep_until(Instant::now() + CONFIRM_DELAY));
        loop {
            // One that is early looks again.
            if let Some(at) = ack_at.filter(|at| *at < alarm.deadline() || alarm.is_elapsed()) {
                alarm.as_mut().reset(at);
            }
            let next = tokio::select! {
                () = &mut stopped => {
                    // A connection that is gone already ends the same.
                    drop(connection.close().await);
                    return;
                }
                () = &mut unwanted => return,
                next = connection.next() => next,
                () = &mut alarm, if ack_at.is_some() => {
                    if ack_at.is_some_and(|at| at > Instant::now()) {
                        continue;
                    }
                    let sent = if connection.owes_ack() { connection.stream_ack().await } else { connection.ping().await };
                    acked_len = self.unacked.len();
                    ack_at = (!self.unacked.is_empty()).then(|| Instant::now() + CONFIRM_DELAY);
                    if sent.is_err() { return }
                    continue;
                }
            };
            let Ok(Some(received)) = next else { return };
            match received.stanza {
                Stanza::Data(data) => self.arrived(&data, received.stream_id, session),
                Stanza::Close | Stanza::StreamError(_) => return,
                _ => {}
            }
            let before = self.unacked.len();
            self.confirm(connection.confirmed_through());
            acked_len = acked_len.saturating_sub(before - self.unacked.len());
            let new = self.unacked.len() - acked_len.min(self.unacked.len());
            if new >= ACK_AFTER {
                acked_len = self.unacked.len();
                if connection.stream_ack().await.is_err() {
                    return;
                }
                ack_at = Some(Instant::now() + CONFIRM_DELAY);
            } else if new > 0 && acked_len == 0 {
                ack_at.get_or_insert_with(|| Instant::now() + ACK_DELAY);
            } else if new > 0 {
                let soon = Instant::now() + ACK_DELAY;
                ack_at = Some(ack_at.map_or(soon, |at| at.min(soon)));
            } else if self.unacked.is_empty() {
                ack_at = None;
            }
        }
    }

    fn arrived(&mut self, data: &DataMessageStanza, stream_id: i32, session: &str) {
        let value = |key: &str| data.app_data.iter().find(|pair| pair.key == key).map(|pair| pair.value.as_str());
        let device = self.device.name.clone();
        if value("message_type") == Some("deleted_messages") {
            self.seen.notices.fetch_add(1, Ordering::Relaxed);
            self.device.outstanding.store(0, Ordering::Relaxed);
            let (token, app) = (Some(self.device.token.clone()), Some(data.category.clone()));
            self.record(What::DeletedMessages { device, token, tenant: Some(data.from.clone()), app });
        } else {
            self.record(What::Delivered {
                op: value("op").map(|send| op_of(send, &device)),
                message_id: data.persistent_id.clone(),
                device,
                // A topic's message names its topic and not who sent it.
                tenant: (!data.from.starts_with("/topics/")).then(|| data.from.clone()),
                app: Some(data.category.clone()),
                token: None,
                session: Some(session.to_owned()),
                sha: value("body").map(digest),
            });
            self.seen.arrivals.fetch_add(1, Ordering::Relaxed);
            let outstanding = &self.device.outstanding;
            let _ = outstanding.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |count| count.checked_sub(1));
            if self.seen.measuring.load(Ordering::Relaxed)
                && let Some(at) = value("at").and_then(|at| at.parse::<f64>().ok())
            {
                let micros = ((self.around.clock.secs() - at).max(0.0) * 1e6) as u64;
                let mut latency = self.seen.latency_micros.lock().unwrap_or_else(PoisonError::into_inner);
                latency.saturating_record(micros);
            }
        }
        if let Some(persistent_id) = data.persistent_id.clone() {
            let op = value("op").map(|send| op_of(send, &self.device.name));
            self.unacked.push_back(Unacked { stream_id, op, persistent_id });
            self.seen.unconfirmed.fetch_add(1, Ordering::Relaxed);
        }
    }

    fn confirm(&mut self, through: i32) {
        if through > 1 {
            self.carried.clear();
        }
        while self.unacked.front().is_some_and(|message| message.stream_id <= through) {
            let Some(message) = self.unacked.pop_front() else { return };
            self.seen.unconfirmed.fetch_sub(1, Ordering::Relaxed);
            if message.op.is_some() {
                self.record(What::DeviceAcked {
                    device: self.device.name.clone(),
                    op: message.op,
                    message_id: Some(message.persistent_id),
                    confirmed: Some(true),
                });
            }
        }
    }

    fn record(&self, what: What) {
        self.around.recorder.record(self.around.clock.secs(), what);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scripted::{Answer, Scripted};

    #[tokio::test]
    async fn a_device_that_is_put_off_checks_in_and_registers_once_the_broker_takes_it() {
        use martlet_proto::device::checkin::AndroidCheckinResponse;
        use prost::Message as _;
        let id = AndroidCheckinResponse {
            stats_ok: true,
            android_id: Some(7),
            security_token: Some(8),
            ..AndroidCheckinResponse::default()
        };
        let broker = Scripted::start([
            ("/checkin", Answer::busy(Some(1))),
            ("/checkin", Answer::ok(id.encode_to_vec())),
            ("/c2dm/register3", Answer::busy(None)),
            ("/c2dm/register3", Answer::ok("token=t")),
        ])
        .await;
        let around = Surroundings {
            http: broker.client(),
            mcs: String::new(),
            tls: Arc::new(no_tls()),
            sender_id: "1".to_owned(),
            clock: RunClock::begin(),
            recorder: Arc::new(Recorder::new(None).unwrap()),
        };
        let begun = around.clock.elapsed();
        let device = enroll(around.clone(), "d".to_owned()).await.unwrap();
        assert_eq!((device.identity, device.token.as_str()), (Identity { android_id: 7, security_token: 8 }, "t"));
        assert!(around.clock.elapsed() - begun >= Duration::from_secs(1), "sooner than it was asked");
        broker.ended().await;
    }

    fn no_tls() -> ClientConfig {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let config = ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions().unwrap();
        config.with_root_certificates(rustls::RootCertStore::empty()).with_no_client_auth()
    }

    #[tokio::test(start_paused = true)]
    async fn a_broker_that_puts_off_for_ever_is_given_up_and_a_refusal_is_final() {
        let refusals = [Some(Busy::later(Some(Duration::from_secs(5)))), None];
        for (refusal, tries) in refusals.into_iter().zip([25, 1]) {
            let (begun, tried) = (Instant::now(), AtomicUsize::new(0));
            let refused = patiently(|| async {
                tried.fetch_add(1, Ordering::Relaxed);
                match &refusal {
                    Some(busy) => Err::<(), _>(busy.clone().into()),
                    None => bail!("Error=INVALID_SENDER"),
                }
            });
            refused.await.unwrap_err();
            assert_eq!(tried.load(Ordering::Relaxed), tries);
            assert!(begun.elapsed() <= ENROLL_PATIENCE);
        }
    }
}

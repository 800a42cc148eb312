//! The faults: real processes under load that are killed, paused, damaged, starved and lied to, and what became of every message.
//!
//! [`plan`] says what happens, as a value of the seed; [`able`] what this machine can do; each family of faults is a file and a
//! type with a begin and an end; [`site`] is the cluster they strike; `load` never stops; [`table`] judges. This module owns the
//! order of a run and the bound within which the cluster must serve again. Partitions are not here: the in-process tests cut links.

mod able;
mod clocks;
mod damage;
mod fsync;
mod full;
mod interposer;
mod kill;
mod load;
mod log_files;
mod pause;
pub mod plan;
mod power;
mod restart;
mod site;
pub mod table;
mod volume;

use std::{
    collections::{BTreeMap, BTreeSet},
    future::Future,
    path::{Path, PathBuf},
    pin::Pin,
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use anyhow::{Context as _, Result, bail};
use tokio::{
    signal::unix::{SignalKind, signal},
    task::JoinSet,
};

use self::{
    able::Able,
    clocks::ClockJump,
    damage::{Damage, Family, How},
    fsync::{FailFsync, SlowFsync},
    full::DiskFull,
    interposer::Control,
    kill::Kill,
    load::Load,
    pause::Pause,
    plan::{Kind, Round, Rounds, Strike},
    power::PowerLoss,
    restart::Restart,
    site::Site,
    table::{FaultReport, ON_TOP},
    volume::Volume,
};
use crate::{
    app_server::AppServer,
    clock::RunClock,
    cluster::{Cluster, Environments, Layout, Member},
    device,
    fleet::{Fleet, Surroundings},
    history::{Phase, Recorder, What},
    http::HttpClient,
    ledger::Terms,
    machine,
};

/// Small segments and early checkpoints: every part of the node's disk is at work in every round.
const NODE_EXTRA: &str = "[log]\nsegment_bytes = 1048576\ncheckpoint_bytes = 8388608\n\n\
                          [store]\ncheckpoint_age = \"2s\"\n";

/// Bytes of a node's file system, where it has one of its own: well above the reserve of 256 MiB that a node keeps.
const VOLUME_BYTES: u64 = 1 << 30;

/// Size of a message's body, bytes.
const PAYLOAD_BYTES: usize = 600;

/// Messages acked and delivered in a round, on average, below which a run is none.
const PER_ROUND_MIN: usize = 20;

/// Patience for devices at the beginning, and for all to be on line at the end.
const ON_LINE_PATIENCE: Duration = Duration::from_secs(90);

/// The end is when nothing has arrived for this long with all devices on line.
const QUIET: Duration = Duration::from_secs(8);

/// Longest wait for that.
const DRAIN_MAX: Duration = Duration::from_secs(180);

/// What a run is to do.
#[derive(Debug, Clone)]
pub struct Options {
    /// Seed of the rounds.
    pub seed: u64,
    /// Rounds end when this much time has passed.
    pub time: Duration,
    /// Rounds at most.
    pub rounds: usize,
    /// What may happen.
    pub kinds: Vec<Kind>,
    /// Devices.
    pub devices: usize,
    /// Requests a second.
    pub rate: f64,
    /// Nodes: 3 or 5.
    pub nodes: usize,
    /// Shards.
    pub shards: u32,
    /// The executable.
    pub martlet: PathBuf,
    /// Directory of the run.
    pub dir: PathBuf,
    /// Where the history is written.
    pub history: Option<PathBuf>,
    /// From the end of a fault until every device is served again, at most.
    pub recover_within: Duration,
    /// Sends of unknown outcome, at least.
    pub unknown_min: usize,
}

/// A step of a fault.
type Step<'a, T> = Pin<Box<dyn Future<Output = Result<T>> + Send + 'a>>;

/// Whether a fault met anything.
#[derive(Debug, PartialEq, Eq)]
enum Struck {
    Yes,
    No(String),
}

/// Something that is done to the cluster, and undone.
trait Fault: Send {
    /// On whom, and how, in a few words.
    fn on(&self) -> String;
    /// Does it. An error means that the run cannot go on.
    fn begin<'a>(&'a mut self, site: &'a mut Site) -> Step<'a, Struck>;
    /// Undoes it: on return everything runs and says that it is ready.
    fn end<'a>(&'a mut self, site: &'a mut Site) -> Step<'a, ()>;
}

fn on(members: &[Member]) -> String {
    members.iter().map(ToString::to_string).collect::<Vec<_>>().join(" ")
}

/// The fault of a strike, with its victims; none when nothing is left to strike.
async fn fault(strike: &Strike, site: &Site) -> Result<Option<Box<dyn Fault>>> {
    let Strike { kind, pick, .. } = *strike;
    let nodes = site.nodes();
    let node = site.choose(&nodes, pick);
    let gateway = site.choose(&[Member::Gateway], pick);
    let some_or_all = |members: Vec<Member>, one: Option<Member>| match one {
        Some(one) if pick >> 16 & 3 != 0 => vec![one],
        _ => members,
    };
    let victim = match kind {
        Kind::KillLeader | Kind::PauseLeader => site.leader(pick).await?,
        Kind::KillFollower | Kind::PauseFollower => site.follower(pick).await?,
        Kind::KillGateway | Kind::PauseGateway | Kind::RestartGateway => gateway,
        _ => node,
    };
    let Some(victim) = victim else { return Ok(None) };
    let damage = |family, how| {
        let at = match victim {
            Member::Node(at) => at,
            Member::Gateway => 0,
        };
        Box::new(Damage::new(at, family, how, pick)) as Box<dyn Fault>
    };
    Ok(Some(match kind {
        Kind::KillLeader | Kind::KillFollower | Kind::KillGateway => Box::new(Kill { victims: vec![victim] }),
        Kind::KillAll => Box::new(Kill { victims: site.members() }),
        Kind::PauseLeader | Kind::PauseFollower | Kind::PauseGateway => Box::new(Pause { victim }),
        Kind::RestartNode | Kind::RestartGateway => Box::new(Restart { victim }),
        Kind::FlipLog => damage(Family::Log, How::Flip),
        Kind::CutLog => damage(Family::Log, How::Cut),
        Kind::FlipStore => damage(Family::Store, How::Flip),
        Kind::CutStore => damage(Family::Store, How::Cut),
        Kind::FlipBase => damage(Family::Base, How::Flip),
        Kind::FlipKept => damage(Family::Kept, How::Flip),
        Kind::SlowFsync => {
            let delay = Duration::from_millis(50 + (pick >> 24) % 250);
            Box::new(SlowFsync { victims: some_or_all(nodes, Some(victim)), delay })
        }
        Kind::FailFsync => Box::new(FailFsync { victim }),
        Kind::DiskFull => Box::new(DiskFull { victims: vec![victim] }),
        Kind::DiskFullAll => Box::new(DiskFull { victims: nodes }),
        Kind::PowerLoss => Box::new(PowerLoss { victims: vec![victim] }),
        Kind::PowerLossAll => Box::new(PowerLoss { victims: nodes }),
        Kind::ClockJump | Kind::ClockJumpAll => {
            let secs = if pick >> 32 & 1 == 0 { clocks::JUMP_SECS } else { -clocks::JUMP_SECS };
            let restarted = (pick >> 33 & 1 == 0).then_some(victim);
            let victims = if kind == Kind::ClockJumpAll { site.members() } else { vec![victim] };
            Box::new(ClockJump { victims, secs, restarted })
        }
    }))
}

/// Runs the faults and judges what became of the messages. Ctrl-C and SIGTERM end it and leave nothing behind.
///
/// # Errors
/// When the cluster could not be started, or the history not be written; broken promises are in the report.
pub async fn run(options: &Options) -> Result<FaultReport> {
    let mut terminated = signal(SignalKind::terminate()).context("listen for SIGTERM")?;
    tokio::select! {
        report = Box::pin(run_uninterrupted(options)) => report,
        _ = tokio::signal::ctrl_c() => bail!("interrupted"),
        _ = terminated.recv() => bail!("terminated"),
    }
}

async fn run_uninterrupted(options: &Options) -> Result<FaultReport> {
    let able = Able::find(&options.kinds, &options.martlet, &options.dir);
    for skip in &able.skipped {
        say(&format!("SKIPPED {}: {}; enable it with: {}", skip.kind, skip.reason, skip.enable));
    }
    if able.kinds.is_empty() {
        bail!("this machine can do none of the faults that were asked for");
    }
    if options.rounds < able.kinds.len() {
        bail!("--rounds {}: each of the {} kinds comes once, before any comes twice", options.rounds, able.kinds.len());
    }
    let site = build(options, &able).await?;
    let clock = RunClock::begin();
    let recorder = Arc::new(Recorder::new(options.history.as_deref()).context("create --history")?);
    let http = HttpClient::new(&site.cluster.http())?;
    let around = Surroundings {
        http: http.clone(),
        mcs: site.cluster.mcs(),
        tls: device::trusting(&site.cluster.ca_file())?,
        sender_id: site.cluster.project.sender_id.clone(),
        clock: clock.clone(),
        recorder: Arc::clone(&recorder),
    };
    let fleet = Fleet::register(around, options.devices, |_| {}).await?;
    fleet.connect(0..options.devices);
    fleet.wait_on_line(options.devices, ON_LINE_PATIENCE, |_| {}).await?;
    let project = site.cluster.project.clone();
    let app_server = AppServer { http, project, payload_bytes: PAYLOAD_BYTES, ttl_secs: None };
    let load =
        Arc::new(Load::new(app_server, clock.clone(), Arc::clone(&recorder), fleet.devices.clone(), options.rate));
    let mut tasks = JoinSet::new();
    for _ in 0..load::SENDERS {
        tasks.spawn(Arc::clone(&load).send());
    }
    tasks.spawn(Arc::clone(&load).drop_connections(options.seed));

    let mut run = Run {
        options,
        site,
        load,
        clock,
        recorder,
        recovered: BTreeMap::new(),
        struck: BTreeSet::new(),
        nothing: BTreeMap::new(),
        interrupted: 0,
    };
    let rounds = run.rounds(&able.kinds).await;
    run.settle().await;
    run.load.stop();
    while let Some(done) = tasks.join_next().await {
        done.context("a task of the load panicked")?;
    }
    run.drain(&fleet).await;
    fleet.leave().await;
    run.recorder.record(run.clock.secs(), What::End {});
    let seconds = run.clock.secs();
    drop(fleet);
    let Run { site, load, recorder, recovered, struck, nothing, interrupted, .. } = run;
    drop(load);
    let Site { cluster, controls, volumes, mut findings, .. } = site;
    if let Err(error) = cluster.stop().await {
        findings.push(format!("at the end: {error:#}"));
    }
    drop((controls, volumes));
    if interrupted * 3 < rounds {
        findings.push(format!("no run: only {interrupted} of {rounds} rounds had a send under way"));
    }

    let recorder = Arc::into_inner(recorder).context("a task of the run still records")?;
    let events = recorder.finish().context("write --history")?;
    let least = PER_ROUND_MIN * rounds.max(1);
    let terms = Terms { acked_min: least, delivered_min: least, unknown_min: options.unknown_min, ..Terms::default() };
    let (mut kinds, verdict) = table::judge(&events, &terms);
    for row in &mut kinds {
        row.longest_recovery_s = recovered.get(row.kind.as_str()).copied().unwrap_or_default();
    }
    for kind in &able.kinds {
        let Some(row) = kinds.iter_mut().find(|row| row.kind == kind.name()) else {
            findings.push(format!("no run: {kind} had no round; give more --minutes"));
            continue;
        };
        if !struck.contains(kind) {
            row.skipped = nothing.get(kind).cloned();
        }
    }
    let mut report = FaultReport {
        scenario: "faults",
        verdict: "broken",
        seed: options.seed,
        nodes: options.nodes,
        shards: options.shards,
        devices: options.devices,
        seconds,
        total: table::total(&kinds),
        dropped_by_limit: 0,
        kinds,
        violations: Vec::new(),
        machine: machine::name(),
    };
    report.skip(&able.skipped);
    report.judged(&verdict, &findings);
    Ok(report)
}

/// Starts the cluster with what its faults need.
async fn build(options: &Options, able: &Able) -> Result<Site> {
    let dir = options.dir.join("cluster");
    std::fs::create_dir_all(&dir).with_context(|| format!("create {}", dir.display()))?;
    let mut volumes = Vec::new();
    if able.volumes {
        for at in 0..options.nodes {
            let image = options.dir.join(format!("node-{}.img", at + 1));
            volumes.push(Volume::create(&image, &dir.join(Member::Node(at).to_string()), VOLUME_BYTES)?);
        }
    }
    let mut controls = BTreeMap::new();
    let mut environments = Environments::new();
    if let Some(interposer) = &able.interposer {
        for member in (0..options.nodes).map(Member::Node).chain([Member::Gateway]) {
            let control = Control::new(&options.dir.join(format!("{member}.page")))?;
            environments.insert(member, interposer.environment(&control));
            controls.insert(member, control);
        }
    }
    let layout = Layout {
        martlet: options.martlet.clone(),
        dir,
        nodes: options.nodes,
        shards: options.shards,
        node_extra: NODE_EXTRA.to_owned(),
        gateway_extra: String::new(),
    };
    let cluster = Cluster::start_with(layout, &environments).await?;
    Ok(Site::new(cluster, controls, volumes))
}

/// A run on its way.
struct Run<'a> {
    options: &'a Options,
    site: Site,
    load: Arc<Load>,
    clock: RunClock,
    recorder: Arc<Recorder>,
    /// Longest recovery of each kind, seconds.
    recovered: BTreeMap<&'static str, f64>,
    /// Kinds that met something.
    struck: BTreeSet<Kind>,
    /// Kinds that met nothing, and why.
    nothing: BTreeMap<Kind, String>,
    /// Rounds that began with a send under way.
    interrupted: usize,
}

impl Run<'_> {
    /// All rounds; how many there were. Ends early when the cluster cannot be used any more, which is a finding.
    async fn rounds(&mut self, kinds: &[Kind]) -> usize {
        let mut done = 0;
        for round in Rounds::new(self.options.seed, kinds).take(self.options.rounds) {
            if self.clock.elapsed() >= self.options.time {
                break;
            }
            self.site.doing = format!("round {} {}", round.number, round.strike.kind);
            self.load.rotate(round.number);
            done += 1;
            if let Err(error) = self.round(&round).await {
                self.site.found(format!("{error:#}; no further round"));
                say(&format!("round {}: {error:#}", round.number));
                break;
            }
        }
        done
    }

    async fn round(&mut self, round: &Round) -> Result<()> {
        tokio::time::sleep(round.lead).await;
        let known = self.site.findings.len();
        let Some(mut first) = fault(&round.strike, &self.site).await? else { bail!("there is nothing to strike") };
        self.interrupted += usize::from(self.load.wait_under_way().await);
        let began = self.clock.secs();
        // The name is complete only when it is known what was hit; the row needs no more than the kind.
        self.record(format!("{} {}", round.strike.kind, first.on()), Phase::Start);
        let struck = first.begin(&mut self.site).await?;
        tokio::time::sleep(round.strike.hold / 2).await;
        let mut story = format!("{} {}", round.strike.kind, first.on());
        if let Some(strike) = &round.on_top
            && let Some(mut second) = fault(strike, &self.site).await?
        {
            let name = format!("{ON_TOP}{} {}", strike.kind, second.on());
            self.record(name.clone(), Phase::Start);
            second.begin(&mut self.site).await?;
            tokio::time::sleep(strike.hold).await;
            second.end(&mut self.site).await?;
            self.record(name.clone(), Phase::End);
            story = format!("{story}, {name}");
        }
        tokio::time::sleep(round.strike.hold / 2).await;
        first.end(&mut self.site).await?;
        self.site.returned().await?;
        self.record(story.clone(), Phase::End);
        match struck {
            Struck::Yes => drop(self.struck.insert(round.strike.kind)),
            Struck::No(why) => drop(self.nothing.insert(round.strike.kind, why)),
        }
        let recovered = self.recover(round.strike.kind).await?;
        let lasted = self.clock.secs() - began;
        say(&format!("round {} {story}: {lasted:.1} s, all served again after {recovered:.1} s", round.number));
        self.site.findings[known..].iter().for_each(|finding| say(&format!("  FOUND {finding}")));
        Ok(())
    }

    /// Waits until every device is served again, and looks at the processes.
    async fn recover(&mut self, kind: Kind) -> Result<f64> {
        let since = self.clock.elapsed();
        let within = self.options.recover_within;
        let after = loop {
            let after = self.clock.elapsed() - since;
            let unserved = self.load.unserved(since);
            if unserved == 0 {
                break after;
            }
            if after > within {
                self.site
                    .found(format!("availability: {unserved} devices were not served within {within:?} of its end"));
                break after;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        };
        self.site.inspect().await?;
        let longest = self.recovered.entry(kind.name()).or_default();
        *longest = longest.max(after.as_secs_f64());
        Ok(after.as_secs_f64())
    }

    /// Waits, longer than after a round, until every device is served: what a cluster that stands still holds back is not lost.
    async fn settle(&mut self) {
        self.site.doing = "at the end".to_owned();
        self.load.call_home();
        let since = self.clock.elapsed();
        while self.load.unserved(since) > 0 {
            if self.clock.elapsed() - since > DRAIN_MAX {
                let unserved = self.load.unserved(since);
                self.site.found(format!("availability: {unserved} devices were not served within {DRAIN_MAX:?}"));
                return;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    /// Brings everybody on line and waits until nothing arrives any more.
    async fn drain(&mut self, fleet: &Fleet) {
        let all = self.options.devices;
        if let Err(error) = fleet.wait_on_line(all, ON_LINE_PATIENCE, |_| {}).await {
            self.site.found(format!("{error:#}"));
        }
        let arrivals = || fleet.seen.arrivals.load(Ordering::Relaxed);
        let begin = self.clock.elapsed();
        let mut last = (arrivals(), begin);
        while self.clock.elapsed() - last.1 < QUIET && self.clock.elapsed() - begin < DRAIN_MAX {
            tokio::time::sleep(Duration::from_millis(50)).await;
            if arrivals() != last.0 {
                last = (arrivals(), self.clock.elapsed());
            }
        }
    }

    fn record(&self, name: String, phase: Phase) {
        self.recorder.record(self.clock.secs(), What::Fault { name, phase });
    }
}

/// Tells how the run goes; standard output belongs to the report.
fn say(line: &str) {
    eprintln!("{line}");
}

/// The executable beside this one, or the one that was named.
///
/// # Errors
/// When it is missing.
pub fn executable(named: Option<&Path>) -> Result<PathBuf> {
    let martlet = match named {
        Some(path) => path.to_owned(),
        None => std::env::current_exe()?.with_file_name("martlet"),
    };
    if !martlet.exists() {
        bail!("{} is missing: build it with `cargo build --release`, or name it with --martlet", martlet.display());
    }
    Ok(martlet)
}

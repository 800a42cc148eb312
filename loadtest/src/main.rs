//! `martlet-loadtest`: drives a Martlet broker, measures it, and judges whether it kept its promises.

mod faults_args;

use std::{path::PathBuf, process::ExitCode, time::Duration};

use anyhow::{Context as _, Result, bail};
use clap::{Args, Parser, Subcommand};
use martlet_loadtest::{
    app_server::Project,
    cluster::{Cluster, Layout},
    faults::executable,
    scenario::{self, Broker, Kind, Plan},
};

/// Devices of a run that says nothing of them.
const DEVICES_ON_LINE: usize = 1_000;

/// The same of `offline-fill`.
const DEVICES_AWAY: usize = 1_000_000;

/// Configuration of a gateway where one address stands for a million: the limits of an address would have them wait for a quarter of an hour.
const UNLIMITED_ENROLLMENT: &str = "[admit]\ncheckins_per_sec = 0\nregistrations_per_sec = 0\n";

/// A generator that shares the machine with what it measures must take little of it.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Drives a Martlet broker, measures it, and judges whether it kept its promises.
///
/// The exit status is 0 when every promise was kept, 1 when one was broken or the run could not be made.
#[derive(Debug, Parser)]
#[command(name = "martlet-loadtest", version)]
struct Cli {
    #[command(subcommand)]
    scenario: Scenario,
}

#[derive(Debug, Subcommand)]
enum Scenario {
    /// Devices on line; messages at a rate, or as fast as answers come.
    Steady(Options),
    /// Messages for devices that are away; then all come at once.
    OfflineDrain(Options),
    /// A cluster under load that is killed, paused, damaged, starved and lied to, round after round, as a seed says.
    Faults(faults_args::FaultsArgs),
    /// Devices that are connected and say nothing: memory of each connection, and what an empty cluster costs.
    Idle(Options),
    /// All devices log in at once, first with nothing stored, then with one message each: CPU of a login and of a drain.
    Storm(Options),
    /// Messages for devices that are away; then a node is started again, after SIGTERM and after SIGKILL: how long until it serves.
    Restart(Options),
    /// One message for each of very many devices that are away (1,000,000 unless --devices says otherwise): what a full cluster costs
    /// in rate, memory, disk and time to start again.
    OfflineFill(Options),
    /// Messages to a topic with many subscribers, all registered devices but half of those on line, which are bystanders: log entries of
    /// one message, what bystanders notice, and whether every subscriber has each exactly once. --seconds is one window, --rate what
    /// bystanders get.
    Topic(TopicOptions),
}

#[derive(Debug, Args)]
struct TopicOptions {
    #[command(flatten)]
    all: Options,
    /// Windows without a message to the topic, and as many with one, in turn.
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// Subscribers that are away and come on line at the end, to be judged; at most so many.
    #[arg(long, default_value_t = 1_000)]
    sample: usize,
    /// Kill the node that leads the topic's home right behind a further message, and start it again.
    #[arg(long)]
    kill_leader: bool,
}

#[derive(Debug, Args)]
struct Options {
    /// Devices on line, 1000 unless given; of `offline-fill` those that are away, a million.
    #[arg(long)]
    devices: Option<usize>,
    /// Registered devices; those beyond --devices stay offline. At least --devices.
    #[arg(long)]
    registered: Option<usize>,
    /// Seconds: the measured window of `steady`; the quiet time of `idle`, without devices and again with them.
    #[arg(long, default_value_t = 20)]
    seconds: u64,
    /// Requests a second, sent when they are due whatever became of those before; latency counts from then. Without it:
    /// --senders app servers, each sending when its last answer came.
    #[arg(long)]
    rate: Option<f64>,
    /// Requests under way at once without --rate.
    #[arg(long, default_value_t = scenario::SENDERS_DEFAULT)]
    senders: usize,
    /// Tokens of one request, 1 to 1000.
    #[arg(long, default_value_t = 1)]
    recipients: usize,
    /// Size of a message's body, bytes.
    #[arg(long, default_value_t = 1_024)]
    payload: usize,
    /// Messages for each device of `offline-drain` and `restart`.
    #[arg(long, default_value_t = 4)]
    per_device: usize,
    /// Print one last line of JSON with stable keys instead of the table.
    #[arg(long)]
    json: bool,
    /// Write every event to this file, one JSON object a line.
    #[arg(long, value_name = "FILE")]
    history: Option<PathBuf>,
    /// Start this many node processes (1, 3 or 5) and a gateway on loopback, and end them afterwards.
    #[arg(long, value_name = "N")]
    local_cluster: Option<usize>,
    /// Shards of the local cluster.
    #[arg(long, default_value_t = 16)]
    shards: u32,
    /// The `martlet` executable; by default the one beside this executable.
    #[arg(long, value_name = "PATH")]
    martlet: Option<PathBuf>,
    /// Directory for the local cluster, which must be empty or absent; by default a new one that is removed afterwards.
    #[arg(long, value_name = "DIR")]
    dir: Option<PathBuf>,
    /// A running broker: the `connection.json` of `martlet standalone`.
    #[arg(long, value_name = "FILE", conflicts_with = "local_cluster")]
    connection: Option<PathBuf>,
}

#[tokio::main]
async fn main() -> ExitCode {
    match run(Cli::parse()).await {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("martlet-loadtest: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Whether the promises were kept.
#[expect(clippy::print_stdout, reason = "the report is what the command is for")]
async fn run(cli: Cli) -> Result<bool> {
    let (mut rounds, mut sample, mut kill_leader) = (0, 0, false);
    let (kind, options) = match cli.scenario {
        Scenario::Steady(options) => (Kind::Steady, options),
        Scenario::OfflineDrain(options) => (Kind::OfflineDrain, options),
        Scenario::Faults(args) => {
            raise_descriptor_limit();
            let scratch = Scratch::new(args.dir.clone())?;
            return Box::pin(faults_args::run(args, &scratch.dir)).await;
        }
        Scenario::Idle(options) => (Kind::Idle, options),
        Scenario::Storm(options) => (Kind::Storm, options),
        Scenario::Restart(options) => (Kind::Restart, options),
        Scenario::OfflineFill(options) => (Kind::OfflineFill, options),
        Scenario::Topic(options) => {
            (rounds, sample, kill_leader) = (options.rounds, options.sample, options.kill_leader);
            (Kind::Topic, options.all)
        }
    };
    raise_descriptor_limit();
    let devices = options.devices.unwrap_or(if kind == Kind::OfflineFill { DEVICES_AWAY } else { DEVICES_ON_LINE });
    let registered = options.registered.unwrap_or(devices);
    if registered < devices || devices == 0 {
        bail!("--registered {registered}: at least --devices {devices}, and that at least 1");
    }
    if !(1..=1_000).contains(&options.recipients) || options.recipients > devices {
        bail!("--recipients {}: 1 to 1000, and at most --devices", options.recipients);
    }
    let scratch = Scratch::new(options.dir.clone())?;
    let plan = Plan {
        kind,
        devices,
        registered,
        window: Duration::from_secs(options.seconds),
        rate: options.rate,
        senders: options.senders.max(1),
        recipients: options.recipients,
        payload_bytes: options.payload,
        per_device: options.per_device,
        rounds,
        sample,
        kill_leader,
        history: options.history.clone(),
        disk: scratch.dir.clone(),
    };
    let mut broker = match &options.connection {
        Some(file) => running(file)?,
        None => started(kind, &options, &scratch).await?,
    };
    let report = scenario::run(&plan, &mut broker, options.json).await?;
    if let Some(cluster) = broker.cluster {
        cluster.stop().await?;
    }
    println!("{}", if options.json { report.json() } else { report.table() });
    Ok(report.verdict == "kept")
}

async fn started(kind: Kind, options: &Options, scratch: &Scratch) -> Result<Broker> {
    let Some(nodes) = options.local_cluster else {
        bail!("name a broker with --connection FILE, or start one with --local-cluster 3");
    };
    if ![1, 3, 5].contains(&nodes) {
        bail!("--local-cluster {nodes}: 1, 3 or 5 nodes");
    }
    let martlet = executable(options.martlet.as_deref())?;
    let layout = Layout {
        martlet,
        dir: scratch.dir.join("cluster"),
        nodes,
        shards: options.shards,
        node_extra: String::new(),
        gateway_extra: match kind {
            Kind::OfflineFill | Kind::Topic => UNLIMITED_ENROLLMENT.to_owned(),
            Kind::Steady | Kind::OfflineDrain | Kind::Idle | Kind::Storm | Kind::Restart => String::new(),
        },
    };
    let cluster = Cluster::start(layout).await?;
    Ok(Broker {
        http: cluster.http(),
        mcs: cluster.mcs(),
        ca_file: cluster.ca_file(),
        project: cluster.project.clone(),
        shards: options.shards,
        cluster: Some(cluster),
    })
}

/// A broker that runs already.
fn running(file: &std::path::Path) -> Result<Broker> {
    let text = std::fs::read_to_string(file).with_context(|| format!("read --connection {}", file.display()))?;
    let json: serde_json::Value = serde_json::from_str(&text).with_context(|| format!("parse {}", file.display()))?;
    let word = |value: &serde_json::Value, key: &str| {
        let word = value[key].as_str().map(ToOwned::to_owned);
        word.with_context(|| format!("{} has no {key}", file.display()))
    };
    let project = &json["projects"][0];
    Ok(Broker {
        http: word(&json, "http")?,
        mcs: word(&json, "mcs")?,
        ca_file: word(&json, "ca_file")?.into(),
        project: Project { sender_id: word(project, "sender_id")?, server_key: word(project, "server_key")? },
        cluster: None,
        shards: 0,
    })
}

/// A directory for the run; one that we made ourselves goes with it.
#[derive(Debug)]
struct Scratch {
    dir: PathBuf,
    ours: bool,
}

impl Scratch {
    fn new(named: Option<PathBuf>) -> Result<Self> {
        let ours = named.is_none();
        let dir = named.unwrap_or_else(|| {
            let name = format!("martlet-loadtest-{}", std::process::id());
            std::env::temp_dir().join(name)
        });
        std::fs::create_dir_all(&dir).with_context(|| format!("create {}", dir.display()))?;
        Ok(Self { dir, ours })
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if self.ours {
            drop(std::fs::remove_dir_all(&self.dir));
        }
    }
}

/// A device is a descriptor.
fn raise_descriptor_limit() {
    use rustix::process::{Resource, getrlimit, setrlimit};
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    // With the limit as it was, a run of too many devices fails at connecting and says so.
    let _ = setrlimit(Resource::Nofile, limit);
}

#[cfg(test)]
mod tests {
    use super::*;

    const DOCUMENTS: [&str; 3] =
        [include_str!("../README.md"), include_str!("../../README.md"), include_str!("../../.ci/run")];

    #[test]
    fn every_command_line_of_the_documents_is_understood() {
        let mut seen = 0;
        for text in DOCUMENTS {
            for line in text.replace("\\\n", " ").lines() {
                let line = line.trim().split(" #").next().unwrap_or_default();
                let mut words = line.split_whitespace();
                let program = words.next().unwrap_or_default();
                if program != "martlet-loadtest" && !program.ends_with("/martlet-loadtest") {
                    continue;
                }
                seen += 1;
                let parsed = Cli::try_parse_from(std::iter::once("martlet-loadtest").chain(words));
                assert!(parsed.is_ok(), "{line}: {}", parsed.unwrap_err());
            }
        }
        assert!(seen >= 12, "{seen} lines were found");
    }

    #[test]
    fn steady_and_offline_drain_take_every_flag_that_runs_are_described_by() {
        let flags = "--devices 10 --seconds 2 --rate 5 --recipients 2 --payload 100 --json --history run.jsonl \
                     --local-cluster 3 --shards 4 --registered 20 --martlet target/release/martlet";
        for scenario in ["steady", "offline-drain"] {
            let words = ["martlet-loadtest", scenario].into_iter().chain(flags.split_whitespace());
            let (Scenario::Steady(options) | Scenario::OfflineDrain(options)) = Cli::parse_from(words).scenario else {
                panic!("{scenario} is another scenario");
            };
            assert_eq!((options.devices, options.registered, options.shards), (Some(10), Some(20), 4));
        }
    }
}

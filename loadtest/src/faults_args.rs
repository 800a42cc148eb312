//! The command line of `faults`.

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Result, bail};
use clap::Args;
use martlet_loadtest::faults::{
    self, executable,
    plan::{Kind, Rounds},
};

/// Rounds that `--plan` prints when no number is given.
const PLAN_ROUNDS: usize = 50;

/// What `faults` is told.
#[derive(Debug, Args)]
pub(crate) struct FaultsArgs {
    /// Says which rounds there are, with whom and for how long: the same seed, the same rounds.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Rounds begin until this much time has passed. Each kind comes once and alone first.
    #[arg(long, default_value_t = 10)]
    minutes: u64,
    /// Rounds at most.
    #[arg(long)]
    rounds: Option<usize>,
    /// What may happen, by commas; all by default. `--list` says what there is.
    #[arg(long, value_delimiter = ',')]
    kinds: Vec<Kind>,
    /// Print the kinds and end.
    #[arg(long)]
    list: bool,
    /// Print the rounds of the seed and end.
    #[arg(long)]
    plan: bool,
    /// Node processes on loopback: 3 or 5.
    #[arg(long, value_name = "N", default_value_t = 3)]
    local_cluster: usize,
    /// Shards.
    #[arg(long, default_value_t = 8)]
    shards: u32,
    /// Devices; a quarter of them is away at any time, another keeps losing its connection. At least 8.
    #[arg(long, default_value_t = 40)]
    devices: usize,
    /// Requests a second.
    #[arg(long, default_value_t = 100.0)]
    rate: f64,
    /// Seconds from the end of a fault within which every device must be served again.
    #[arg(long, default_value_t = 20)]
    recover_within: u64,
    /// Sends whose outcome nobody knows, at least: without one a run proves little. 0 only for kinds that break no request.
    #[arg(long, default_value_t = 1)]
    unknown_min: usize,
    /// The `martlet` executable, dynamically linked; by default the one beside this executable.
    #[arg(long, value_name = "PATH")]
    martlet: Option<PathBuf>,
    /// Directory for the run, which must be empty or absent; by default a new one that is removed afterwards.
    #[arg(long, value_name = "DIR")]
    pub(crate) dir: Option<PathBuf>,
    /// Write every event to this file, one JSON object a line.
    #[arg(long, value_name = "FILE")]
    history: Option<PathBuf>,
    /// Print one last line of JSON with stable keys instead of the table.
    #[arg(long)]
    json: bool,
}

/// Whether the promises were kept.
#[expect(clippy::print_stdout, reason = "the report is what the command is for")]
pub(crate) async fn run(args: FaultsArgs, dir: &Path) -> Result<bool> {
    let mut kinds = if args.kinds.is_empty() { Kind::ALL.to_vec() } else { args.kinds.clone() };
    kinds.sort_unstable();
    kinds.dedup();
    if args.list {
        Kind::ALL.iter().for_each(|kind| println!("{:16} {}", kind.name(), kind.about()));
        return Ok(true);
    }
    if args.plan {
        let rounds = Rounds::new(args.seed, &kinds).take(args.rounds.unwrap_or(PLAN_ROUNDS));
        rounds.for_each(|round| println!("{round}"));
        return Ok(true);
    }
    if ![3, 5].contains(&args.local_cluster) {
        bail!("--local-cluster {}: 3 or 5 nodes; one node has no other to lose", args.local_cluster);
    }
    if args.devices < 8 {
        bail!("--devices {}: at least 8", args.devices);
    }
    let options = faults::Options {
        seed: args.seed,
        time: Duration::from_secs(60 * args.minutes),
        rounds: args.rounds.unwrap_or(usize::MAX),
        kinds,
        devices: args.devices,
        rate: args.rate,
        nodes: args.local_cluster,
        shards: args.shards,
        martlet: executable(args.martlet.as_deref())?,
        dir: dir.to_owned(),
        history: args.history,
        recover_within: Duration::from_secs(args.recover_within),
        unknown_min: args.unknown_min,
    };
    let report = faults::run(&options).await?;
    println!("{}", if args.json { report.json() } else { report.table() });
    Ok(report.verdict == "kept")
}

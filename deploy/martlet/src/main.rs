//! `martlet`: the executable, with all its roles.
//!
//! Owns the command line. Each role is a module; none of them decides anything about messages.

mod admin;
mod ca;
mod config;
mod connection;
mod demo;
mod device;
mod ops;
mod private_file;
mod serve;
mod shutdown;
mod standalone;
mod story;
mod telemetry;

use std::{path::PathBuf, process::ExitCode};

use anyhow::Result;
use clap::{Args, Parser, Subcommand};

/// Messages are many small allocations that cross threads. Without the feature, and without `jemalloc`: the system's.
#[cfg(feature = "mimalloc")]
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// For comparison only.
#[cfg(all(feature = "jemalloc", not(feature = "mimalloc")))]
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

/// A self-hosted push-message broker that speaks Google Cloud Messaging.
///
/// Begin with `martlet standalone`: it needs no configuration and prints what to paste next.
#[derive(Debug, Parser)]
#[command(name = "martlet", version)]
struct Cli {
    #[command(subcommand)]
    role: Role,
}

#[derive(Debug, Subcommand)]
enum Role {
    /// Node and gateway in one process, with a development CA, a project and a demo device: the quickstart.
    Standalone(Box<standalone::StandaloneArgs>),
    /// A node: holds replicas of shards and owns their queues.
    Node(ConfigArgs),
    /// A gateway: ends the connections of app servers and devices.
    Gateway(ConfigArgs),
    /// A device: receives and prints what is sent to it.
    Device(device::DeviceArgs),
    /// Makes a development CA and a server certificate under it.
    Ca(ca::CaArgs),
    /// Creates a cluster, manages projects and keys, shows what is.
    Admin(admin::AdminArgs),
}

/// Where the configuration is. Every key may also be given as a variable: `MARTLET_NODE__ID=2` is `id` of `[node]`.
#[derive(Debug, Args)]
struct ConfigArgs {
    /// TOML file; deploy/config/default.toml lists every key with its default.
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Permits gRPC without TLS on an address other than loopback: for networks that are closed by other means.
    #[arg(long)]
    insecure_grpc: bool,
}

impl ConfigArgs {
    fn read(&self) -> Result<config::Config> {
        let mut config = config::Config::read(self.config.as_deref(), std::env::vars())?;
        config.node.node.insecure_grpc |= self.insecure_grpc;
        Ok(config)
    }
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    let result =
        tokio::runtime::Builder::new_multi_thread().enable_all().build().map_err(Into::into).and_then(|runtime| {
            let result = runtime.block_on(run(cli));
            // Whatever still blocks (a terminal that is read) must not hold up the end.
            runtime.shutdown_timeout(std::time::Duration::from_secs(1));
            result
        });
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("martlet: {error:#}");
            ExitCode::FAILURE
        }
    }
}

async fn run(cli: Cli) -> Result<()> {
    match cli.role {
        Role::Standalone(args) => Box::pin(standalone::run(*args)).await,
        Role::Node(args) => Box::pin(serve::node(args.read()?)).await,
        Role::Gateway(args) => Box::pin(serve::gateway(args.read()?)).await,
        Role::Device(args) => Box::pin(device::run(args)).await,
        Role::Ca(args) => ca::run(&args),
        Role::Admin(args) => Box::pin(admin::run(args)).await,
    }
}

//! `martlet standalone`: node and gateway in one process, over the same gRPC on loopback, with nothing to configure.
//!
//! Owns the data directory's layout (secret, CA, projects, demo device, `connection.json`) and the first start: it creates what
//! is missing, the cluster included, and keeps what is there. Decides nothing that the two parts decide.

use std::{
    collections::BTreeMap,
    fs,
    net::SocketAddr,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context as _, Result, bail};
use clap::Args;
use martlet_gateway::{Gateway, GatewayError};
use martlet_node::Node;
use martlet_proto::cluster::{
    admin::{AddKeyRequest, CreateClusterRequest, CreateProjectRequest, ListProjectsRequest, StatusRequest},
    meta,
};
use rand::{RngCore as _, TryRngCore as _, rngs::OsRng};
use tonic::Code;

use crate::{
    admin, ca,
    config::Config,
    connection::{self, Connection, ProjectKey},
    demo::{self, DemoDevice},
    private_file,
    serve::Parts,
    shutdown, telemetry,
};

/// File with the projects' server keys in clear: the broker itself keeps only hashes.
const PROJECTS_FILE: &str = "projects.json";

/// Sender id of the project that is made when none is named.
const DEFAULT_SENDER_ID: &str = "900100200300";

/// What is logged unless the configuration says otherwise.
const QUIET_LOG: &str = "warn,openraft=error";

/// Patience for the broker to be ready.
const READY_TIMEOUT: Duration = Duration::from_secs(60);

/// Between two looks.
const READY_POLL: Duration = Duration::from_millis(20);

/// Arguments of `martlet standalone`.
#[derive(Debug, Args)]
pub(crate) struct StandaloneArgs {
    /// Directory of everything the broker keeps; what is missing is made.
    #[arg(long, value_name = "DIR", default_value = "./martlet-data")]
    data: PathBuf,
    /// Further names the certificate is good for, beside localhost and 127.0.0.1.
    #[arg(long, value_name = "NAME")]
    cert_name: Vec<String>,
    /// A project and its server key; repeatable. Without any, one is made and kept.
    #[arg(long, value_name = "SENDER_ID=SERVER_KEY")]
    project: Vec<String>,
    /// HTTP for app servers and device registration, plain.
    #[arg(long, value_name = "ADDR", default_value = "127.0.0.1:8080")]
    http: SocketAddr,
    /// The same over TLS.
    #[arg(long, value_name = "ADDR", default_value = "127.0.0.1:8443")]
    https: SocketAddr,
    /// XMPP (CCS) over TLS. Not built yet: the flag is kept and nothing listens.
    #[arg(long, value_name = "ADDR", default_value = "127.0.0.1:5235")]
    xmpp: SocketAddr,
    /// Second XMPP address. Not built yet: the flag is kept and nothing listens.
    #[arg(long, value_name = "ADDR", default_value = "127.0.0.1:5236")]
    xmpp_test: SocketAddr,
    /// MCS (devices) over TLS.
    #[arg(long, value_name = "ADDR", default_value = "127.0.0.1:5228")]
    mcs: SocketAddr,
    /// Metrics and health.
    #[arg(long, value_name = "ADDR", default_value = "127.0.0.1:9400")]
    admin: SocketAddr,
    /// gRPC of the node. Loopback only, as it has no TLS yet, unless --insecure-grpc permits more.
    #[arg(long, value_name = "ADDR", default_value = "127.0.0.1:7400")]
    grpc: SocketAddr,
    /// Permits gRPC without TLS on an address other than loopback: for networks that are closed by other means.
    #[arg(long)]
    insecure_grpc: bool,
    /// The cluster secret; by default DIR/secret, made when missing.
    #[arg(long, value_name = "FILE")]
    secret_file: Option<PathBuf>,
    /// Shards, fixed at the first start.
    #[arg(long, default_value_t = 16)]
    shards: u32,
    /// Configuration of everything else; deploy/config/default.toml lists it.
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
}

/// Runs the role.
///
/// # Errors
/// Why it did not start, or could not go on.
pub(crate) async fn run(args: StandaloneArgs) -> Result<()> {
    let mut projects = given_projects(&args.project)?;
    let mut config = Config::read(args.config.as_deref(), std::env::vars())?;
    if config.process.telemetry.log == telemetry::TelemetryConfig::default().log {
        // One node elects itself sixteen times at every start: that would bury what a new user is to read.
        QUIET_LOG.clone_into(&mut config.process.telemetry.log);
    }
    let telemetry = telemetry::install(&config.process.telemetry, "standalone")?;
    shutdown::raise_descriptor_limit();
    let drain = shutdown::on_signal()?;

    fs::create_dir_all(&args.data).with_context(|| format!("create --data {}", args.data.display()))?;
    let secret_file = args.secret_file.clone().unwrap_or_else(|| args.data.join("secret"));
    make_secret(&secret_file)?;
    let ca = ca::open(&args.data, &args.cert_name)?;
    let connection_file = args.data.join(connection::FILE);
    config.process.admin.listen = args.admin;

    config.node.node.listen = args.grpc;
    config.node.node.insecure_grpc |= args.insecure_grpc;
    config.node.node.data = args.data.join("node");
    config.node.node.secret_file.clone_from(&secret_file);
    let node =
        Node::start(config.node.clone()).await.with_context(|| format!("start the node (--grpc {})", args.grpc))?;
    // Only now: the node's lock says that no other broker wrote it.
    remove_if_there(&connection_file)?;
    let grpc = node.started().grpc;
    let mut parts = Parts::default();
    parts.add_node(node);
    let keys_file = args.data.join(PROJECTS_FILE);
    keep_projects(&keys_file, &mut projects)?;
    create_cluster(grpc, args.shards).await?;
    for (sender_id, server_key) in &projects {
        seed_project(grpc, sender_id, server_key).await.with_context(|| format!("create project {sender_id}"))?;
    }

    let gateway = &mut config.gateway.gateway;
    gateway.seeds = vec![grpc.to_string()];
    gateway.secret_file = secret_file;
    gateway.cert_file.clone_from(&ca.cert_file);
    gateway.key_file.clone_from(&ca.key_file);
    gateway.http = Some(args.http);
    gateway.https = Some(args.https);
    gateway.mcs = vec![args.mcs];
    let gateway = Gateway::start(config.gateway.clone()).await.map_err(by_flag)?;
    let started = gateway.started();
    parts.add_gateway(gateway);
    let admin = parts.open_ops(&config.process, &drain).await?;

    let ready = async {
        while !started.readiness().ready {
            tokio::time::sleep(READY_POLL).await;
        }
    };
    tokio::select! {
        () = drain.cancelled() => return parts.run(drain).await,
        ready = tokio::time::timeout(READY_TIMEOUT, ready) => if ready.is_err() {
            bail!("not ready within {READY_TIMEOUT:?}: {:?}", started.readiness().checks);
        },
    }
    let http = format!("http://{}", started.http.context("the gateway has no plain HTTP")?);
    let first = projects.first_key_value().context("there is at least one project")?;
    let device = DemoDevice::open(&args.data.join(demo::FILE), &http, first.0).await?;
    let connection = Connection {
        https: format!("https://{}", started.https.context("the gateway has no HTTPS")?),
        xmpp: None,
        mcs: started.mcs.first().context("the gateway has no MCS")?.to_string(),
        grpc: grpc.to_string(),
        admin: format!("http://{admin}"),
        ca_file: fs::canonicalize(&ca.ca_file)?.display().to_string(),
        projects: projects
            .iter()
            .map(|(sender_id, server_key)| ProjectKey { sender_id: sender_id.clone(), server_key: server_key.clone() })
            .collect(),
        http,
    };
    connection.write(&connection_file)?;
    banner(&args.data, &connection, &device)?;
    let result = parts.run(drain).await;
    remove_if_there(&connection_file)?;
    telemetry.flush();
    result
}

/// `SENDER_ID=SERVER_KEY` each.
fn given_projects(given: &[String]) -> Result<BTreeMap<String, String>> {
    let parse = |text: &String| {
        let parsed = text.split_once('=').filter(|(id, key)| {
            !id.is_empty() && id.len() <= 20 && id.bytes().all(|byte| byte.is_ascii_digit()) && !key.is_empty()
        });
        let (sender_id, key) = parsed.with_context(|| {
            format!("--project {}: not SENDER_ID=SERVER_KEY with a decimal sender id", hide_key(text))
        })?;
        Ok((sender_id.to_owned(), key.to_owned()))
    };
    given.iter().map(parse).collect()
}

/// What may be shown of a `--project` argument.
fn hide_key(text: &str) -> String {
    text.split_once('=').map_or_else(|| text.to_owned(), |(id, _)| format!("{id}=…"))
}

/// The cluster secret, made when it is missing.
fn make_secret(path: &Path) -> Result<()> {
    if path.exists() {
        return Ok(());
    }
    let mut secret = [0; 32];
    OsRng.try_fill_bytes(&mut secret).context("draw the cluster secret")?;
    let text: String = secret.iter().map(|byte| format!("{byte:02x}")).collect();
    private_file::write(path, &(text + "\n")).with_context(|| format!("write {}", path.display()))
}

/// Projects of earlier starts join those given now; with none at all, one is made.
fn keep_projects(path: &Path, projects: &mut BTreeMap<String, String>) -> Result<()> {
    if path.exists() {
        let text = fs::read_to_string(path).with_context(|| format!("read {}", path.display()))?;
        let kept: BTreeMap<String, String> =
            serde_json::from_str(&text).with_context(|| format!("parse {}", path.display()))?;
        for (sender_id, key) in kept {
            projects.entry(sender_id).or_insert(key);
        }
    }
    if projects.is_empty() {
        let mut key = [0; 24];
        rand::rng().fill_bytes(&mut key);
        let key: String = key.iter().map(|byte| format!("{byte:02x}")).collect();
        projects.insert(DEFAULT_SENDER_ID.to_owned(), key);
    }
    let text = serde_json::to_string_pretty(projects).expect("strings always encode") + "\n";
    private_file::write(path, &text).with_context(|| format!("write {}", path.display()))
}

/// Creates the one-node cluster at the first start.
async fn create_cluster(grpc: SocketAddr, shard_count: u32) -> Result<()> {
    let mut client = admin::client(&[grpc.to_string()]).await?;
    let status = client.status(StatusRequest { cluster_wide: false }).await.context("ask the node for its cluster")?;
    if status.into_inner().meta.is_some_and(|meta| !meta.cluster_id.is_empty()) {
        return Ok(());
    }
    let nodes = vec![meta::Node { node_id: 1, address: grpc.to_string(), zone: String::new() }];
    match client.create_cluster(CreateClusterRequest { shard_count, nodes }).await {
        Ok(_) => Ok(()),
        // The node has an identity whose meta state it has not read yet.
        Err(status) if status.code() == Code::AlreadyExists => Ok(()),
        Err(status) => bail!("create the cluster: {}", status.message()),
    }
}

/// Makes sure that the project exists and takes this key.
async fn seed_project(grpc: SocketAddr, sender_id: &str, server_key: &str) -> Result<()> {
    let mut client = admin::client(&[grpc.to_string()]).await?;
    let projects = retried(async || client.clone().list_projects(ListProjectsRequest {}).await).await?.projects;
    let known = projects.iter().find(|project| project.sender_id == sender_id);
    let Some(known) = known else {
        let request = CreateProjectRequest {
            sender_id: sender_id.to_owned(),
            text_id: String::new(),
            name: String::new(),
            server_key: server_key.to_owned(),
        };
        client.create_project(request).await.map_err(|status| anyhow::anyhow!("{}", status.message()))?;
        return Ok(());
    };
    let sha256 = ring::digest::digest(&ring::digest::SHA256, server_key.as_bytes());
    if !known.server_keys.iter().any(|key| key.revoked_ms == 0 && key.sha256[..] == *sha256.as_ref()) {
        let request = AddKeyRequest { sender_id: sender_id.to_owned(), server_key: server_key.to_owned() };
        client.add_key(request).await.map_err(|status| anyhow::anyhow!("{}", status.message()))?;
    }
    Ok(())
}

/// Tries again while the one-node cluster elects itself.
async fn retried<T>(call: impl AsyncFn() -> Result<tonic::Response<T>, tonic::Status>) -> Result<T> {
    let until = tokio::time::Instant::now() + READY_TIMEOUT;
    loop {
        match call().await {
            Ok(reply) => return Ok(reply.into_inner()),
            Err(status) if status.code() == Code::Unavailable && tokio::time::Instant::now() < until => {
                tokio::time::sleep(READY_POLL).await;
            }
            Err(status) => bail!("{}", status.message()),
        }
    }
}

/// The gateway names keys of the configuration; here they were flags.
fn by_flag(error: GatewayError) -> anyhow::Error {
    match error {
        GatewayError::Bind { key, address, source } => {
            let flag = key.rsplit('.').next().unwrap_or(key);
            anyhow::anyhow!("bind --{flag} {address}: {source}")
        }
        other => anyhow::Error::from(other).context("start the gateway"),
    }
}

fn remove_if_there(path: &Path) -> Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("remove {}", path.display()))
        }
        _ => Ok(()),
    }
}

/// What to paste next.
#[expect(clippy::print_stdout, reason = "the quickstart is for people")]
fn banner(data: &Path, connection: &Connection, device: &DemoDevice) -> Result<()> {
    let executable = std::env::current_exe()?;
    let (executable, data) = (executable.display(), data.display());
    let key = connection.projects.iter().find(|project| project.sender_id == device.sender_id);
    let key = key.map_or("", |project| project.server_key.as_str());
    println!(
        "Martlet is ready. Data: {data}   CA to trust: {ca}\n\n\
         Send a message to the demo device:\n  \
         curl -H 'Authorization: key={key}' -H 'Content-Type: application/json' \
         -d '{{\"to\":\"{token}\",\"data\":{{\"hello\":\"world\"}}}}' {http}/gcm/send\n\n\
         Receive it, now or later:\n  \
         {executable} device --data {data}\n\n\
         Addresses, projects and keys are in {data}/{file}. End with Ctrl-C.",
        ca = connection.ca_file,
        token = device.token,
        http = connection.http,
        file = connection::FILE,
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_project_is_a_decimal_sender_and_a_key_and_errors_do_not_show_the_key() {
        let good = given_projects(&["123=a=b".to_owned()]).unwrap();
        assert_eq!(good["123"], "a=b");
        let error = format!("{:#}", given_projects(&["abc=very-secret".to_owned()]).unwrap_err());
        assert!(error.contains("abc=") && !error.contains("very-secret"), "{error}");
    }

    #[test]
    fn a_second_start_keeps_the_projects_and_their_keys() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join(PROJECTS_FILE);
        let mut first = BTreeMap::new();
        keep_projects(&file, &mut first).unwrap();
        let mut second = given_projects(&["7=seven".to_owned()]).unwrap();
        keep_projects(&file, &mut second).unwrap();
        assert_eq!(second[DEFAULT_SENDER_ID], first[DEFAULT_SENDER_ID]);
        assert_eq!(second["7"], "seven");
    }

    #[test]
    fn the_secret_is_made_once() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("secret");
        make_secret(&file).unwrap();
        let first = fs::read(&file).unwrap();
        make_secret(&file).unwrap();
        assert_eq!(fs::read(&file).unwrap(), first);
        assert_eq!(first.len(), 65);
    }
}

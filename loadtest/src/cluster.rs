//! A cluster of processes on loopback: node processes, one gateway, all of the real executable.
//!
//! Owns the layout: ports, configuration files, directories (each node has one of its own), the order of the start. Leaves to
//! [`process`](crate::process) how one of them is started, signalled and ended; they end with it.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::Duration,
};

use anyhow::{Context as _, Result, bail};
use martlet_proto::cluster::admin::{NodeStatus, StatusRequest, admin_client::AdminClient};

use crate::{app_server::Project, clock::RunClock, machine, ports, process::Process};

/// Patience for one node to say what it holds.
const STATUS_TIMEOUT: Duration = Duration::from_secs(3);

/// How a local cluster is laid out.
#[derive(Debug, Clone)]
pub struct Layout {
    /// The `martlet` executable.
    pub martlet: PathBuf,
    /// Directory for data, configuration and logs; it must be empty or absent.
    pub dir: PathBuf,
    /// Nodes: 1, 3 or 5.
    pub nodes: usize,
    /// Shards.
    pub shards: u32,
    /// Further lines of every node's configuration, TOML.
    pub node_extra: String,
    /// Further lines of the gateway's configuration, TOML.
    pub gateway_extra: String,
}

/// One process of a cluster.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Member {
    /// The node at this place, from 0.
    Node(usize),
    /// The gateway.
    Gateway,
}

impl std::fmt::Display for Member {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Node(at) => write!(f, "node-{}", at + 1),
            Self::Gateway => f.write_str("gateway"),
        }
    }
}

/// Variables that each process of a cluster is started with, beyond those of this one.
pub type Environments = BTreeMap<Member, Vec<(String, String)>>;

/// A running cluster.
#[derive(Debug)]
pub struct Cluster {
    layout: Layout,
    nodes: Vec<Process>,
    gateway: Process,
    grpc: Vec<u16>,
    /// Ports of the gateway: HTTP and MCS.
    http: u16,
    mcs: u16,
    /// The project that was created.
    pub project: Project,
}

impl Cluster {
    /// Starts nodes and gateway, creates the cluster and one project, and waits until all are ready.
    ///
    /// # Errors
    /// When a process ends or does not become ready; its log is named.
    pub async fn start(layout: Layout) -> Result<Self> {
        Self::start_with(layout, &Environments::new()).await
    }

    /// As [`Cluster::start`]; every start of a process gets its variables of `environments`.
    ///
    /// # Errors
    /// As [`Cluster::start`].
    pub async fn start_with(layout: Layout, environments: &Environments) -> Result<Self> {
        fs::create_dir_all(&layout.dir).with_context(|| format!("create {}", layout.dir.display()))?;
        let secret = layout.dir.join("secret");
        let seed = crate::app_server::digest(&format!("{}{}", RunClock::wall_micros(), std::process::id()));
        fs::write(&secret, format!("{seed}\n"))?;
        let ports = ports::free(2 * layout.nodes + 4)?;
        let (grpc, rest) = ports.split_at(layout.nodes);
        let (node_admin, rest) = rest.split_at(layout.nodes);
        let &[http, https, mcs, gateway_admin] = rest else { bail!("ports were counted wrong") };
        run(&layout, &["ca", "--data", path(&layout.dir)?])?;

        let mut nodes = Vec::new();
        for (at, (&grpc, &admin)) in grpc.iter().zip(node_admin).enumerate() {
            let id = at + 1;
            let data = layout.dir.join(format!("node-{id}"));
            // Its data is thrown away: a disk that is full of other things must not refuse the run, only one that is full.
            let text = format!(
                "[node]\nid = {id}\ndisk_reserve_percent = 0\nlisten = \"127.0.0.1:{grpc}\"\ndata = {data:?}\nsecret_file = {secret:?}\n\n\
                 [admin]\nlisten = \"127.0.0.1:{admin}\"\n\n{}\n",
                layout.node_extra
            );
            let environment = environments.get(&Member::Node(at)).cloned().unwrap_or_default();
            nodes.push(Process::new(&layout, format!("node-{id}"), "node", &text, admin, environment)?);
        }
        let seeds: Vec<String> = grpc.iter().map(|port| format!("127.0.0.1:{port}")).collect();
        let ca = layout.dir.join("ca");
        let text = format!(
            "[gateway]\nseeds = {seeds:?}\nsecret_file = {secret:?}\ncert_file = {:?}\nkey_file = {:?}\n\
             http = \"127.0.0.1:{http}\"\nhttps = \"127.0.0.1:{https}\"\nmcs = [\"127.0.0.1:{mcs}\"]\n\n\
             [admin]\nlisten = \"127.0.0.1:{gateway_admin}\"\n\n{}\n",
            ca.join("server.pem"),
            ca.join("server.key"),
            layout.gateway_extra
        );
        let environment = environments.get(&Member::Gateway).cloned().unwrap_or_default();
        let gateway = Process::new(&layout, "gateway".to_owned(), "gateway", &text, gateway_admin, environment)?;
        let project = Project { sender_id: "900100200300".to_owned(), server_key: format!("key-{}", &seed[..32]) };
        let mut cluster = Self { nodes, gateway, grpc: grpc.to_vec(), http, mcs, project, layout };
        cluster.begin().await?;
        Ok(cluster)
    }

    async fn begin(&mut self) -> Result<()> {
        for node in &mut self.nodes {
            node.spawn(&self.layout)?;
        }
        for node in &mut self.nodes {
            node.wait("/livez").await?;
        }
        let peers: Vec<String> =
            self.grpc.iter().enumerate().map(|(at, port)| format!("{}=127.0.0.1:{port}", at + 1)).collect();
        let shards = self.layout.shards.to_string();
        self.admin(&["cluster", "create", "--peers", &peers.join(","), "--shards", &shards])?;
        for node in &mut self.nodes {
            node.wait("/readyz").await?;
        }
        let (sender_id, key) = (self.project.sender_id.clone(), self.project.server_key.clone());
        self.admin(&["project", "create", "--sender-id", &sender_id, "--server-key", &key])?;
        self.gateway.spawn(&self.layout)?;
        self.gateway.wait("/readyz").await
    }

    /// Runs `martlet admin` with these arguments against the cluster; what it printed.
    ///
    /// # Errors
    /// When it fails, with what it said.
    pub fn admin(&self, arguments: &[&str]) -> Result<String> {
        let nodes = self.grpc().join(",");
        let all: Vec<&str> = ["admin", "--node", &nodes].into_iter().chain(arguments.iter().copied()).collect();
        run(&self.layout, &all)
    }

    /// What node `at` (from 0) says of itself; nothing when it does not answer.
    pub async fn status(&self, at: usize) -> Option<NodeStatus> {
        let address = format!("http://127.0.0.1:{}", self.grpc[at]);
        let asked = async {
            let mut client = AdminClient::connect(address).await.ok()?;
            let reply = client.status(StatusRequest { cluster_wide: false }).await.ok()?;
            reply.into_inner().nodes.into_iter().next()
        };
        tokio::time::timeout(STATUS_TIMEOUT, asked).await.ok().flatten()
    }

    /// Base address of HTTP.
    #[must_use]
    pub fn http(&self) -> String {
        format!("http://127.0.0.1:{}", self.http)
    }

    /// Address of MCS.
    #[must_use]
    pub fn mcs(&self) -> String {
        format!("127.0.0.1:{}", self.mcs)
    }

    /// Addresses of the health endpoints of all processes, gateway last.
    #[must_use]
    pub fn admin_addresses(&self) -> Vec<String> {
        self.processes().map(|process| format!("http://127.0.0.1:{}", process.admin)).collect()
    }

    /// gRPC addresses of the nodes.
    #[must_use]
    pub fn grpc(&self) -> Vec<String> {
        self.grpc.iter().map(|port| format!("127.0.0.1:{port}")).collect()
    }

    /// PEM file of the CA.
    #[must_use]
    pub fn ca_file(&self) -> PathBuf {
        self.layout.dir.join("ca/ca.pem")
    }

    /// Number of nodes.
    #[must_use]
    pub fn nodes(&self) -> usize {
        self.nodes.len()
    }

    /// Data directory of node `at` (from 0).
    #[must_use]
    pub fn node_data(&self, at: usize) -> PathBuf {
        self.layout.dir.join(format!("node-{}", at + 1))
    }

    /// Kills node `at` (from 0) with SIGKILL.
    ///
    /// # Errors
    /// When it is not running.
    pub fn kill_node(&mut self, at: usize) -> Result<()> {
        self.nodes[at].kill()
    }

    /// Starts node `at` again and does not wait.
    ///
    /// # Errors
    /// When the executable cannot be started.
    pub fn start_node(&mut self, at: usize) -> Result<()> {
        self.nodes[at].spawn(&self.layout)
    }

    /// Kills the gateway with SIGKILL.
    ///
    /// # Errors
    /// When it is not running.
    pub fn kill_gateway(&mut self) -> Result<()> {
        self.gateway.kill()
    }

    /// Starts the gateway again and does not wait.
    ///
    /// # Errors
    /// When the executable cannot be started.
    pub fn start_gateway(&mut self) -> Result<()> {
        self.gateway.spawn(&self.layout)
    }

    /// The process of a member.
    #[must_use]
    pub fn process(&self, member: Member) -> &Process {
        match member {
            Member::Node(at) => &self.nodes[at],
            Member::Gateway => &self.gateway,
        }
    }

    /// As [`Cluster::process`], to do something to it.
    pub fn process_mut(&mut self, member: Member) -> &mut Process {
        match member {
            Member::Node(at) => &mut self.nodes[at],
            Member::Gateway => &mut self.gateway,
        }
    }

    /// Starts a member again and does not wait.
    ///
    /// # Errors
    /// When the executable cannot be started.
    pub fn start_member(&mut self, member: Member) -> Result<()> {
        match member {
            Member::Node(at) => self.nodes[at].spawn(&self.layout),
            Member::Gateway => self.gateway.spawn(&self.layout),
        }
    }

    /// Waits until every process is ready.
    ///
    /// # Errors
    /// When one ended or is not in time.
    pub async fn wait_ready(&mut self) -> Result<()> {
        for process in self.nodes.iter_mut().chain([&mut self.gateway]) {
            process.wait("/readyz").await?;
        }
        Ok(())
    }

    /// CPU seconds of all processes that run.
    #[must_use]
    pub fn cpu_secs(&self) -> f64 {
        self.pids().filter_map(|pid| machine::cpu_secs(pid).ok()).sum()
    }

    /// CPU seconds of each process that runs, by name.
    #[must_use]
    pub fn cpu_secs_each(&self) -> Vec<(String, f64)> {
        let each = self.processes().filter_map(|process| {
            let pid = process.pid()?;
            Some((process.name.clone(), machine::cpu_secs(pid).ok()?))
        });
        each.collect()
    }

    /// Resident memory of each process that runs, bytes, by name; the gateway is last.
    #[must_use]
    pub fn resident_bytes_each(&self) -> Vec<(String, u64)> {
        let each = self.processes().filter_map(|process| {
            let pid = process.pid()?;
            Some((process.name.clone(), machine::resident_bytes(pid).ok()?))
        });
        each.collect()
    }

    /// Resident memory of the gateway, bytes; 0 when it is not running.
    #[must_use]
    pub fn gateway_resident_bytes(&self) -> u64 {
        self.gateway.pid().and_then(|pid| machine::resident_bytes(pid).ok()).unwrap_or(0)
    }

    /// Ends the gateway in order and starts it anew, with memory as fresh as its connections are gone.
    ///
    /// # Errors
    /// When it does not end cleanly, or does not become ready again.
    pub async fn restart_gateway(&mut self) -> Result<()> {
        self.gateway.end().await?;
        self.gateway.spawn(&self.layout)?;
        self.gateway.wait("/readyz").await
    }

    /// Resident memory of all processes that run, bytes.
    #[must_use]
    pub fn resident_bytes(&self) -> u64 {
        self.pids().filter_map(|pid| machine::resident_bytes(pid).ok()).sum()
    }

    /// Ends all processes in order (SIGTERM, then SIGKILL); the first that did not end cleanly is named.
    ///
    /// # Errors
    /// When a process ended with a failure.
    pub async fn stop(mut self) -> Result<()> {
        let mut failed = None;
        for process in std::iter::once(&mut self.gateway).chain(&mut self.nodes) {
            if let Err(error) = process.end().await {
                failed.get_or_insert(error);
            }
        }
        failed.map_or(Ok(()), Err)
    }

    fn processes(&self) -> impl Iterator<Item = &Process> {
        self.nodes.iter().chain([&self.gateway])
    }

    fn pids(&self) -> impl Iterator<Item = u32> {
        self.processes().filter_map(Process::pid)
    }
}

/// Runs the executable to its end; what it printed.
fn run(layout: &Layout, arguments: &[&str]) -> Result<String> {
    let output = Command::new(&layout.martlet)
        .args(arguments)
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("start {}", layout.martlet.display()))?;
    if !output.status.success() {
        bail!("martlet {}: {}", arguments.join(" "), String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

pub(crate) fn path(path: &Path) -> Result<&str> {
    path.to_str().with_context(|| format!("{} is not UTF-8", path.display()))
}

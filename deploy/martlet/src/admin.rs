//! `martlet admin`: what an operator asks of a cluster, over gRPC to any of its nodes.
//!
//! Owns the words and tables of the command; leaves every decision to the node. Prints server keys only when they were just
//! made.

use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use clap::{Args, Subcommand};
use comfy_table::{Table, presets::UTF8_BORDERS_ONLY};
use martlet_proto::{
    cluster::{
        admin::{
            AddKeyRequest, CountsRequest, CreateClusterRequest, CreateProjectRequest, GroupReply, GroupRequest,
            GroupStatus, ListProjectsRequest, MessageRequest, NodeStatus, RecallRequest, RevokeKeyRequest,
            SkipEntryReply, SkipEntryRequest, StatusRequest, TokenRequest, TopicRequest, admin_client::AdminClient,
        },
        meta::{Node, Project, Skip, SkipState},
    },
    limits::META_STATE_MAX_BYTES,
};
use tonic::{Code, transport::Channel};

use crate::story;

/// Patience for one node.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);

/// Patience for an answer: creating a cluster and revoking a key wait for others.
const CALL_TIMEOUT: Duration = Duration::from_secs(60);

/// Arguments of `martlet admin`.
#[derive(Debug, Args)]
pub(crate) struct AdminArgs {
    /// gRPC addresses of nodes, `host:port`, separated by commas; the first that answers is asked.
    #[arg(
        long,
        value_name = "ADDR",
        value_delimiter = ',',
        default_value = "127.0.0.1:7400",
        env = "MARTLET_ADMIN_NODE"
    )]
    node: Vec<String>,
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, Subcommand)]
enum What {
    /// The cluster as a whole.
    #[command(subcommand)]
    Cluster(ClusterCommand),
    /// Projects: tenants, each one sender id.
    #[command(subcommand)]
    Project(ProjectCommand),
    /// Server keys of a project.
    #[command(subcommand)]
    Key(KeyCommand),
    /// Shards: queues of devices, each replicated.
    #[command(subcommand)]
    Shard(ShardCommand),
    /// Registration tokens.
    #[command(subcommand)]
    Token(TokenCommand),
    /// What became of one message: accepted where and when, whether it waits, through which gateway it was written or acked, or why it
    /// is gone. Ends are remembered for `shard.stories_for`, of each shard the last `shard.stories_max`.
    Message {
        /// As the app server was told: `0:1700000000000000%0123456789abcdef`.
        message_id: String,
        /// The token that it was sent to: then one mailbox is looked through and not all.
        #[arg(long, default_value = "", hide_default_value = true)]
        token: String,
    },
    /// Takes messages back that no device has acked: one by its id, or what waits for a token under a collapse key. One that was
    /// written may have been shown already; it does not come again.
    Recall {
        /// As the app server was told.
        #[arg(required_unless_present = "collapse_key", conflicts_with = "collapse_key")]
        message_id: Option<String>,
        /// The token that it was sent to; of one message it saves looking through all mailboxes.
        #[arg(long, default_value = "", hide_default_value = true)]
        token: String,
        /// Recalls what waits for `--token` under this key.
        #[arg(long, requires = "token")]
        collapse_key: Option<String>,
    },
    /// One topic: how many subscribe, shard by shard, and messages to it that are on their way.
    Topic {
        /// Sender id of the project.
        sender_id: String,
        /// Name, with or without `/topics/`.
        name: String,
    },
    /// One device group: when it was made and who is in it. Its key and tokens are shown as the hashes by which logs name them.
    Group {
        /// Sender id of the project.
        sender_id: String,
        /// Name of the group (`notification_key_name`).
        name: String,
    },
}

#[derive(Debug, Subcommand)]
enum ClusterCommand {
    /// Creates the cluster, once: draws its keys, starts the meta group, spreads the shards.
    Create {
        /// All nodes, `ID=HOST:PORT` as peers reach them, separated by commas: 1, 3 or 5.
        #[arg(long, value_name = "ID=ADDR", value_delimiter = ',', required = true)]
        peers: Vec<String>,
        /// Number of shards, 1 to 256, fixed for good: 64 serve up to some twenty nodes.
        #[arg(long, default_value_t = 64)]
        shards: u32,
    },
    /// Nodes, their groups, and gateways.
    Status {
        /// One line for each group of each node.
        #[arg(long)]
        groups: bool,
    },
}

#[derive(Debug, Subcommand)]
enum ProjectCommand {
    /// Creates a project with one server key, which is printed this once.
    Create {
        /// Decimal digits; one is given when absent.
        #[arg(long)]
        sender_id: Option<String>,
        /// Text id, as in Firebase paths.
        #[arg(long, default_value = "")]
        text_id: String,
        /// Name for people.
        #[arg(long, default_value = "")]
        name: String,
        /// The first server key; one is drawn when absent.
        #[arg(long)]
        server_key: Option<String>,
    },
    /// All projects.
    List,
    /// One project and its keys.
    Show {
        /// Sender id.
        sender_id: String,
    },
    /// What became of a project's messages, from the counters of all shards: accepted is the sum of the others.
    Counts {
        /// Sender id.
        sender_id: String,
        /// One line for each shard.
        #[arg(long)]
        shards: bool,
    },
}

#[derive(Debug, Subcommand)]
enum TokenCommand {
    /// What a token is, whether it lives, what waits for it and since when, and what its last 50 messages became.
    Inspect {
        /// The registration token.
        token: String,
    },
}

#[derive(Debug, Subcommand)]
enum KeyCommand {
    /// Adds a server key, which is printed this once.
    Add {
        /// Sender id of the project.
        sender_id: String,
        /// The key; one is drawn when absent.
        #[arg(long)]
        server_key: Option<String>,
    },
    /// Revokes a server key; returns when every gateway has confirmed, or names those that have not.
    Revoke {
        /// Sender id of the project.
        sender_id: String,
        /// Number of the key, as `project show` lists it.
        key_id: u32,
    },
}

#[derive(Debug, Subcommand)]
enum ShardCommand {
    /// Has every replica of a shard pass over one entry of its log that none of them can apply. Nothing of the entry is done;
    /// gateways learn that, or say that they do not know. Refused unless all replicas have stopped at it.
    Skip {
        /// Number of the shard.
        shard: u32,
        /// Index of the entry, as `cluster status` names it.
        index: u64,
        /// Why; kept for good.
        #[arg(long)]
        reason: String,
        /// Who decides this; kept for good.
        #[arg(long, env = "USER", default_value = "")]
        by: String,
        /// How the entry's digest begins, hexadecimal, as `cluster status` names it: refused if it is another entry.
        #[arg(long, default_value = "", hide_default_value = true)]
        digest: String,
    },
    /// All entries that were skipped, or were to be.
    Skips,
}

/// A client of the first node that answers.
///
/// # Errors
/// Names every address and what came instead.
pub(crate) async fn client(nodes: &[String]) -> Result<AdminClient<Channel>> {
    let mut tried = Vec::new();
    for node in nodes {
        let endpoint = Channel::from_shared(format!("http://{node}"))
            .with_context(|| format!("--node {node}: not host:port"))?
            .connect_timeout(CONNECT_TIMEOUT)
            .timeout(CALL_TIMEOUT);
        match endpoint.connect().await {
            Ok(channel) => return Ok(AdminClient::new(channel).max_decoding_message_size(META_STATE_MAX_BYTES)),
            Err(error) => tried.push(format!("{node} ({:#})", anyhow::Error::from(error))),
        }
    }
    bail!("no node answers: {}; name one that runs with --node HOST:PORT", tried.join(", "))
}

/// Runs the command.
///
/// # Errors
/// What the node refused, in its words.
pub(crate) async fn run(args: AdminArgs) -> Result<()> {
    let mut client = client(&args.node).await?;
    match args.what {
        What::Cluster(ClusterCommand::Create { peers, shards }) => {
            let nodes = peers.iter().map(|peer| parse_peer(peer)).collect::<Result<Vec<_>>>()?;
            let count = nodes.len();
            let created = client.create_cluster(CreateClusterRequest { shard_count: shards, nodes }).await;
            let id = created.map_err(said)?.into_inner().cluster_id;
            let id: String = id.iter().map(|byte| format!("{byte:02x}")).collect();
            print(&format!("cluster {id} created: {count} nodes, {shards} shards"));
        }
        What::Cluster(ClusterCommand::Status { groups }) => status(&mut client, groups).await?,
        What::Project(ProjectCommand::Create { sender_id, text_id, name, server_key }) => {
            let request = CreateProjectRequest {
                sender_id: sender_id.unwrap_or_default(),
                text_id,
                name,
                server_key: server_key.unwrap_or_default(),
            };
            let reply = client.create_project(request).await.map_err(said)?.into_inner();
            let project = reply.project.context("the node answered without the project")?;
            print(&format!("sender id   {}\nserver key  {}", project.sender_id, reply.server_key));
        }
        What::Project(ProjectCommand::List) => print(&list(&projects(&mut client).await?)),
        What::Project(ProjectCommand::Show { sender_id }) => {
            let all = projects(&mut client).await?;
            let project = all.iter().find(|project| project.sender_id == sender_id);
            print(&show(
                project.with_context(|| format!("there is no project {sender_id}; `project list` shows all"))?,
            ));
        }
        What::Key(KeyCommand::Add { sender_id, server_key }) => {
            let request = AddKeyRequest { sender_id, server_key: server_key.unwrap_or_default() };
            let reply = client.add_key(request).await.map_err(said)?.into_inner();
            let key = reply.key.context("the node answered without the key")?;
            print(&format!("key id      {}\nserver key  {}", key.key_id, reply.server_key));
        }
        What::Shard(ShardCommand::Skip { shard, index, reason, by, digest }) => {
            let digest = parse_hex(&digest).with_context(|| format!("--digest {digest}: not hexadecimal bytes"))?;
            let request = SkipEntryRequest { shard, index, reason, by, digest: digest.into() };
            let SkipEntryReply { skip, waiting_nodes } = client.skip_entry(request).await.map_err(said)?.into_inner();
            let skip = skip.context("the node answered without the skip")?;
            let name = format!("entry {index} of term {} of shard {shard} (digest {})", skip.term, short(&skip.digest));
            if waiting_nodes.is_empty() {
                print(&format!("skipped: {name}; every replica has gone on"));
            } else {
                let nodes: Vec<String> = waiting_nodes.iter().map(u64::to_string).collect();
                print(&format!(
                    "skipped: {name}; the replicas of nodes {} have not gone on yet: `cluster status` tells why; one that has \
                     ended goes on when its node is started again",
                    nodes.join(", ")
                ));
            }
        }
        What::Shard(ShardCommand::Skips) => {
            let reply = client.status(StatusRequest { cluster_wide: false }).await.map_err(said)?.into_inner();
            print(&skips(&reply.meta.context("the node answered without the meta state")?.skips));
        }
        What::Project(ProjectCommand::Counts { sender_id, shards }) => {
            let request = CountsRequest { sender_id: sender_id.clone(), here: false };
            let reply = client.counts(request).await.map_err(said)?.into_inner();
            print(&story::counts(&sender_id, &reply, shards));
        }
        What::Token(TokenCommand::Inspect { token }) => {
            let reply = client.token(TokenRequest { token, here: false }).await.map_err(said)?.into_inner();
            print(&story::token(&reply));
        }
        What::Message { message_id, token } => {
            let request = MessageRequest { message_id: message_id.clone(), token, here: false };
            let reply = client.message(request).await.map_err(said)?.into_inner();
            let nobody = || story::nobody_knows(&message_id, &reply.silent_nodes);
            print(&story::message(reply.story.as_ref().with_context(nobody)?));
        }
        What::Recall { message_id, token, collapse_key } => {
            let request = RecallRequest {
                message_id: message_id.unwrap_or_default(),
                token,
                collapse_key: collapse_key.unwrap_or_default(),
            };
            let reply = client.recall(request).await.map_err(said)?.into_inner();
            print(&story::recalled(&reply));
        }
        What::Topic { sender_id, name } => {
            let request = TopicRequest { sender_id, name: name.clone(), here: false };
            let reply = client.topic(request).await.map_err(said)?.into_inner();
            print(&story::topic(&name, &reply));
        }
        What::Group { sender_id, name } => {
            let request = GroupRequest { sender_id: sender_id.clone(), name: name.clone(), here: false };
            let reply = client.group(request).await.map_err(said)?.into_inner();
            print(&group(&sender_id, &name, &reply));
        }
        What::Key(KeyCommand::Revoke { sender_id, key_id }) => {
            let reply = client.revoke_key(RevokeKeyRequest { sender_id, key_id }).await.map_err(said)?.into_inner();
            if reply.unconfirmed.is_empty() {
                print("revoked: every gateway has confirmed");
            } else {
                let names: Vec<&str> = reply.unconfirmed.iter().map(|gateway| gateway.name.as_str()).collect();
                let still = Duration::from_millis(reply.accepts_for_at_most_ms).as_secs();
                bail!("revoked, but {} may accept it for up to {still} s more: not heard", names.join(", "));
            }
        }
    }
    Ok(())
}

async fn projects(client: &mut AdminClient<Channel>) -> Result<Vec<Project>> {
    Ok(client.list_projects(ListProjectsRequest {}).await.map_err(said)?.into_inner().projects)
}

async fn status(client: &mut AdminClient<Channel>, groups: bool) -> Result<()> {
    let reply = client.status(StatusRequest { cluster_wide: true }).await.map_err(said)?.into_inner();
    let Some(meta) = reply.meta.filter(|meta| !meta.cluster_id.is_empty()) else {
        print("no cluster yet: `martlet admin cluster create` makes one");
        return Ok(());
    };
    if !reply.meta_unconfirmed.is_empty() {
        print(&format!("what follows is what this node has, and may be old: {}", reply.meta_unconfirmed));
    }
    let id: String = meta.cluster_id.iter().map(|byte| format!("{byte:02x}")).collect();
    print(&format!(
        "cluster {id}: {} shards, {} projects, revision {}",
        meta.shard_count,
        meta.projects.len(),
        meta.revision
    ));
    let mut table = table(&["node", "address", "version", "groups", "leads", "stopped", "log"]);
    for node in &reply.nodes {
        let leads = node.groups.iter().filter(|group| group.leader_replica == group.replica_id).count();
        let stopped = node.groups.iter().filter(|group| !group.stopped.is_empty()).count();
        let (version, log) = if node.unreachable.is_empty() {
            (node.version.clone(), format!("{} MiB", node.log_bytes >> 20))
        } else {
            (format!("unreachable: {}", node.unreachable), String::new())
        };
        let counts = [node.groups.len(), leads, stopped].map(|count| count.to_string());
        let [groups, leads, stopped] = counts;
        table.add_row([node.node_id.to_string(), node.address.clone(), version, groups, leads, stopped, log]);
    }
    print(&table.to_string());
    let stopped = stopped(&reply.nodes);
    if !stopped.is_empty() {
        print(&stopped);
    }
    let behind = behind(&reply.nodes);
    if !behind.is_empty() {
        print(&behind);
    }
    if groups {
        let mut rows = self::table(&[
            "node",
            "group",
            "version",
            "term",
            "leader",
            "last",
            "applied",
            "checkpointed",
            "state",
            "stopped",
        ]);
        for (node, group) in reply.nodes.iter().flat_map(|node| node.groups.iter().map(move |group| (node, group))) {
            let name = name(group);
            let leads = if group.leader_replica == group.replica_id { " (here)" } else { "" };
            rows.add_row([
                node.node_id.to_string(),
                name,
                version(group),
                group.term.to_string(),
                format!("{}{leads}", group.leader_replica),
                group.last_log_index.to_string(),
                group.applied_index.to_string(),
                group.checkpointed_index.to_string(),
                format!("{:016x}", group.state_hash),
                group.stopped.clone(),
            ]);
        }
        print(&rows.to_string());
    }
    let mut gateways = self::table(&["gateway", "confirmed revision", "heard"]);
    for gateway in &reply.gateways {
        let heard = format!("{:.1} s ago", Duration::from_millis(gateway.silent_ms).as_secs_f64());
        gateways.add_row([gateway.name.clone(), gateway.confirmed_revision.to_string(), heard]);
    }
    print(&gateways.to_string());
    Ok(())
}

fn name(group: &GroupStatus) -> String {
    group.group.checked_sub(1).map_or_else(|| "meta".to_owned(), |shard| format!("shard {shard}"))
}

/// State version of a shard; the meta group has none.
fn version(group: &GroupStatus) -> String {
    match group.state_version {
        0 => String::new(),
        version => version.to_string(),
    }
}

/// What holds back new behaviour, whatever was asked for: nodes whose program knows less than another's; empty when all know the same.
fn behind(nodes: &[NodeStatus]) -> String {
    let answering = || nodes.iter().filter(|node| node.unreachable.is_empty());
    let newest = answering().map(|node| node.state_version_known).max().unwrap_or(0);
    let older: Vec<_> = answering().filter(|node| node.state_version_known < newest).collect();
    if older.is_empty() {
        return String::new();
    }
    let older: Vec<_> =
        older.iter().map(|node| format!("node {} knows {}", node.node_id, node.state_version_known)).collect();
    format!("state version {newest} waits until every node of a shard knows it; as yet {}", older.join(", "))
}

/// A line for each replica that has stopped, whatever was asked for; empty when none has.
fn stopped(nodes: &[NodeStatus]) -> String {
    let all = nodes.iter().flat_map(|node| node.groups.iter().map(move |group| (node, group)));
    let lines = all.filter(|(_, group)| !group.stopped.is_empty()).map(|(node, group)| {
        let next = match &group.poison {
            Some(poison) if !poison.operation.is_empty() => format!(
                "; if no replica can apply it: martlet admin shard skip {} {} --reason …",
                group.group.saturating_sub(1),
                poison.index
            ),
            Some(_) | None => String::new(),
        };
        format!("stopped: node {}, {}: {}{next}", node.node_id, name(group), group.stopped)
    });
    lines.collect::<Vec<_>>().join("\n")
}

fn skips(skips: &[Skip]) -> String {
    let mut table = table(&["shard", "index", "term", "digest", "state", "by", "asked (ms)", "decided (ms)", "reason"]);
    for skip in skips {
        let state = match skip.state() {
            SkipState::Held => "asked for",
            SkipState::Skipped => "skipped",
            SkipState::Lifted => "not skipped",
            SkipState::Unspecified => "unknown here",
        };
        table.add_row([
            skip.shard.to_string(),
            skip.index.to_string(),
            skip.term.to_string(),
            short(&skip.digest),
            state.to_owned(),
            skip.by.clone(),
            skip.asked_ms.to_string(),
            skip.decided_ms.to_string(),
            skip.reason.clone(),
        ]);
    }
    table.to_string()
}

/// The beginning of a digest, as the nodes print it.
fn short(digest: &[u8]) -> String {
    digest.iter().take(8).map(|byte| format!("{byte:02x}")).collect()
}

fn parse_hex(text: &str) -> Option<Vec<u8>> {
    if !text.bytes().all(|byte| byte.is_ascii_hexdigit()) || !text.len().is_multiple_of(2) {
        return None;
    }
    (0..text.len()).step_by(2).map(|at| u8::from_str_radix(&text[at..at + 2], 16).ok()).collect()
}

fn list(projects: &[Project]) -> String {
    let mut table = table(&["sender id", "text id", "name", "live keys"]);
    for project in projects {
        let live = project.server_keys.iter().filter(|key| key.revoked_ms == 0).count();
        table.add_row([project.sender_id.clone(), project.text_id.clone(), project.name.clone(), live.to_string()]);
    }
    table.to_string()
}

fn show(project: &Project) -> String {
    let mut table = table(&["key id", "begins with", "state"]);
    for key in &project.server_keys {
        let state = if key.revoked_ms == 0 { "live" } else { "revoked" };
        table.add_row([key.key_id.to_string(), format!("{}…", key.hint), state.to_owned()]);
    }
    format!("sender id   {}\ntext id     {}\nname        {}\n{table}", project.sender_id, project.text_id, project.name)
}

fn group(sender_id: &str, name: &str, reply: &GroupReply) -> String {
    let mut table = table(&["member", "token"]);
    for (place, token) in (1..).zip(&reply.members) {
        let place: u32 = place;
        table.add_row([place.to_string(), token.clone()]);
    }
    let GroupReply { notification_key, shard, created_ms, .. } = reply;
    // A name may hold anything: a terminal must not obey it.
    let name = name.escape_debug();
    format!(
        "sender id         {sender_id}\nname              {name}\nnotification key  {notification_key}\nshard             {shard}\n\
         created (ms)      {created_ms}\n{table}"
    )
}

pub(crate) fn table(header: &[&str]) -> Table {
    let mut table = Table::new();
    table.load_style(UTF8_BORDERS_ONLY).set_header(header.iter().copied());
    table
}

fn parse_peer(text: &str) -> Result<Node> {
    let parsed = text.split_once('=').and_then(|(id, address)| Some((id.parse().ok()?, address)));
    let Some((node_id, address)) = parsed.filter(|(_, address)| address.contains(':')) else {
        bail!("--peers {text}: not ID=HOST:PORT");
    };
    Ok(Node { node_id, address: address.to_owned(), zone: String::new() })
}

/// The node's words, without the wrapping of gRPC.
fn said(status: tonic::Status) -> anyhow::Error {
    match status.code() {
        Code::Unavailable => anyhow::anyhow!("{} (try again: the cluster may be electing a leader)", status.message()),
        _ => anyhow::anyhow!("{}", status.message()),
    }
}

#[expect(clippy::print_stdout, reason = "what the operator asked for goes to standard output")]
fn print(text: &str) {
    println!("{text}");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stopped_replica_is_named_with_what_to_do_about_it() {
        use martlet_proto::cluster::admin::Poison;
        let poison = Poison { index: 17, operation: "command 0, Enqueue".into(), ..Poison::default() };
        let group = GroupStatus {
            group: 6,
            stopped: "shard 5 waits before entry 17".into(),
            poison: Some(poison),
            ..GroupStatus::default()
        };
        let nodes = [NodeStatus { node_id: 2, groups: vec![group, GroupStatus::default()], ..NodeStatus::default() }];
        assert_eq!(
            stopped(&nodes),
            "stopped: node 2, shard 5: shard 5 waits before entry 17; if no replica can apply it: martlet admin shard skip 5 17 \
             --reason …"
        );
    }

    #[test]
    fn nodes_that_hold_a_newer_state_version_back_are_named() {
        let node = |node_id, state_version_known| NodeStatus { node_id, state_version_known, ..NodeStatus::default() };
        assert_eq!(behind(&[node(1, 2), node(2, 2)]), "");
        assert!(behind(&[node(1, 1), node(2, 2), node(3, 1)]).ends_with("as yet node 1 knows 1, node 3 knows 1"));
        let away = NodeStatus { unreachable: "no answer".into(), ..node(3, 0) };
        assert_eq!(behind(&[node(1, 2), away]), "", "nothing is known of one that does not answer");
    }

    #[test]
    fn a_digest_is_whole_hexadecimal_bytes() {
        assert_eq!(parse_hex("0aF1"), Some(vec![0x0a, 0xf1]));
        assert_eq!(parse_hex(""), Some(Vec::new()));
        for wrong in ["a", "zz", "ä", "+1"] {
            assert_eq!(parse_hex(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn a_peer_is_an_id_and_an_address() {
        assert_eq!(parse_peer("3=node-2.martlet:7400").unwrap().address, "node-2.martlet:7400");
        for wrong in ["3", "x=a:1", "3=host"] {
            assert!(parse_peer(wrong).is_err(), "{wrong}");
        }
    }
}

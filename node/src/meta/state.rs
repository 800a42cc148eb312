//! What the meta group decides, as a pure value: `apply(index, command) -> (answer, rows that changed)`.
//!
//! Owns every rule about projects, server keys, nodes and the first shard map. Knows no Raft, disk, clock or randomness: time, ids
//! and keys are stamped into the command by who proposes. Every object is a row of its own (see [`Row`]), at most 8 KiB, so that
//! a change writes what it changed. Invariants: replica ids are never given twice; a revoked key stays in the state and is never
//! accepted again; a refused command changes nothing; a command repeated after an unknown outcome answers as it did first.

use bytes::Bytes;
use martlet_proto::cluster::meta::{
    AddKey, CreateCluster, CreateProject, KeyPurpose, MetaAnswer, MetaCommand, MetaState, Node, Project, Replica,
    RevokeKey, SealedKey, ServerKey, ShardReplicas, Skip, meta_answer, meta_command,
};
use prost::Message;

use super::{placement, skips};

/// Most shards of a cluster (design.md section 4).
pub const SHARDS_MAX: u32 = 256;
/// Most projects. Every watcher holds all of them in memory.
pub const PROJECTS_MAX: usize = 10_000;
/// Most server keys of a project, revoked ones included: its row stays below 8 KiB.
pub const KEYS_OF_PROJECT_MAX: usize = 64;
/// Most characters of a project's name and of its text id.
pub const NAME_MAX: usize = 128;

/// Most characters of the hint of a server key.
pub const HINT_MAX: usize = 8;

/// One object of the state, as a row: key `family u8 | id`, value the object in protocol buffers.
///
/// `c` the cluster (everything that is not listed), `n | node id u64`, `s | shard u32`, `p | sender id`, `k | purpose u32 | key id
/// u32`, `x | shard u32 | index u64`; integers big-endian. Rows are only ever put: nothing leaves the state.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Row {
    /// Key, without what the store puts before it.
    pub key: Bytes,
    /// Value.
    pub value: Bytes,
}

/// A row that is none of the state's.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("row {key:02x?} of the meta state: {what}")]
pub struct RowError {
    /// Its key.
    pub key: Vec<u8>,
    /// What is wrong with it.
    pub what: String,
}

/// The state of the meta group.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct State(MetaState);

impl State {
    /// Takes rows in any order, as they were written.
    pub fn from_rows(rows: impl IntoIterator<Item = (Bytes, Bytes)>) -> Result<Self, RowError> {
        let mut state = MetaState::default();
        for (key, value) in rows {
            let wrong = |what: String| RowError { key: key.to_vec(), what };
            let bad = |error: prost::DecodeError| wrong(error.to_string());
            match key.first() {
                Some(b'c') => {
                    let cluster = MetaState::decode(value).map_err(bad)?;
                    state = MetaState {
                        nodes: state.nodes,
                        shards: state.shards,
                        projects: state.projects,
                        keys: state.keys,
                        skips: state.skips,
                        ..cluster
                    };
                }
                Some(b'n') => state.nodes.push(Node::decode(value).map_err(bad)?),
                Some(b's') => state.shards.push(ShardReplicas::decode(value).map_err(bad)?),
                Some(b'p') => state.projects.push(Project::decode(value).map_err(bad)?),
                Some(b'x') => state.skips.push(Skip::decode(value).map_err(bad)?),
                Some(b'k') => state.keys.push(SealedKey::decode(value).map_err(bad)?),
                _ => return Err(wrong("no such family".into())),
            }
        }
        state.nodes.sort_by_key(|node| node.node_id);
        state.shards.sort_by_key(|shard| shard.shard);
        state.projects.sort_by(|a, b| a.sender_id.cmp(&b.sender_id));
        state.keys.sort_by_key(|key| (key.purpose, key.key_id));
        state.skips.sort_by_key(|skip| (skip.shard, skip.index));
        Ok(Self(state))
    }

    /// The state as watchers see it.
    pub fn get(&self) -> &MetaState {
        &self.0
    }

    /// Applies the command at `index` of the log; the answer and the rows to write with it.
    pub fn apply(&mut self, index: u64, command: &MetaCommand) -> (MetaAnswer, Vec<Row>) {
        use meta_command::Kind;
        let now_ms = command.now_ms;
        let done = match &command.kind {
            Some(Kind::CreateCluster(create)) => self.create_cluster(create),
            _ if self.0.cluster_id.is_empty() => Err("no cluster has been created".into()),
            Some(Kind::CreateProject(create)) => self.create_project(now_ms, create),
            Some(Kind::AddKey(add)) => self.add_key(now_ms, add),
            Some(Kind::RevokeKey(revoke)) => self.revoke_key(now_ms, revoke),
            Some(Kind::HoldEntry(hold)) => skips::hold(&mut self.0, index, now_ms, hold).map(skipped),
            Some(Kind::SkipEntry(skip)) => skips::skip(&mut self.0, now_ms, skip).map(skipped),
            Some(Kind::LiftHold(lift)) => skips::lift(&mut self.0, now_ms, lift).map(skipped),
            None => Err("this version does not know the command".into()),
        };
        let (done, mut rows) = match done {
            Ok(done) => done,
            Err(why) => return (MetaAnswer { kind: Some(meta_answer::Kind::Refused(why)) }, Vec::new()),
        };
        if !rows.is_empty() {
            self.0.revision = index;
            rows.push(self.cluster_row());
        }
        let kind = match done {
            Done::Revision => meta_answer::Kind::Revision(self.0.revision),
            Done::Project(project) => meta_answer::Kind::Project(project),
            Done::Skip(skip) => meta_answer::Kind::Skip(skip),
        };
        (MetaAnswer { kind: Some(kind) }, rows)
    }

    fn create_cluster(&mut self, create: &CreateCluster) -> Change {
        if self.0.cluster_id == create.cluster_id && !create.cluster_id.is_empty() {
            return Ok((Done::Revision, Vec::new()));
        }
        if !self.0.cluster_id.is_empty() {
            return Err("the cluster has been created already".into());
        }
        if create.cluster_id.len() != 16 {
            return Err("a cluster id has 16 bytes".into());
        }
        if create.shard_count == 0 || create.shard_count > SHARDS_MAX {
            return Err(format!("shard count {} is not between 1 and {SHARDS_MAX}", create.shard_count));
        }
        check_nodes(&create.nodes)?;
        check_keys(&create.keys)?;
        let shards = u16::try_from(create.shard_count).expect("checked against SHARDS_MAX");

        let mut nodes = create.nodes.clone();
        nodes.sort_by_key(|node| node.node_id);
        let mut next = create.meta_replicas.iter().map(|replica| replica.replica_id + 1).max().unwrap_or(1);
        let map = placement::spread(&nodes, shards, placement::COPIES);
        let mut give = |node_id| {
            let replica_id = next;
            next += 1;
            Replica { node_id, replica_id }
        };
        self.0.shards = (0..create.shard_count)
            .zip(map)
            .map(|(shard, nodes)| ShardReplicas {
                shard,
                epoch: 1,
                replicas: nodes.into_iter().map(&mut give).collect(),
            })
            .collect();
        self.0.next_replica_id = next;
        self.0.cluster_id = create.cluster_id.clone();
        self.0.shard_count = create.shard_count;
        self.0.incarnation = 1;
        self.0.nodes = nodes;
        self.0.keys = create.keys.clone();
        self.0.keys.sort_by_key(|key| (key.purpose, key.key_id));

        let rows = (self.0.nodes.iter().map(node_row))
            .chain(self.0.shards.iter().map(shard_row))
            .chain(self.0.keys.iter().map(key_row))
            .collect();
        Ok((Done::Revision, rows))
    }

    fn create_project(&mut self, now_ms: u64, create: &CreateProject) -> Change {
        check_name("name", &create.name)?;
        check_text_id(&create.text_id)?;
        let first = create.first_key.as_ref().ok_or("a project begins with a server key")?;
        if let Some(project) = self.0.projects.iter().find(|project| was_made_by(project, create, first)) {
            return Ok((Done::Project(project.clone()), Vec::new()));
        }
        let sender_id = if create.sender_id.is_empty() {
            self.free_sender_id(&create.candidate_sender_id)?
        } else {
            check_sender_id(&create.sender_id)?;
            create.sender_id.clone()
        };
        if self.project(&sender_id).is_some() {
            return Err(format!("project {sender_id} exists already"));
        }
        if self.0.projects.len() >= PROJECTS_MAX {
            return Err(format!("there are {PROJECTS_MAX} projects already"));
        }
        if !create.text_id.is_empty() && self.0.projects.iter().any(|project| project.text_id == create.text_id) {
            return Err(format!("text id {} belongs to another project", create.text_id));
        }
        self.check_server_key(first)?;
        let project = Project {
            sender_id,
            text_id: create.text_id.clone(),
            server_keys: vec![ServerKey { key_id: 1, created_ms: now_ms, revoked_ms: 0, ..first.clone() }],
            name: create.name.clone(),
        };
        let row = project_row(&project);
        let at = self.0.projects.partition_point(|other| other.sender_id < project.sender_id);
        self.0.projects.insert(at, project.clone());
        Ok((Done::Project(project), vec![row]))
    }

    fn add_key(&mut self, now_ms: u64, add: &AddKey) -> Change {
        let key = add.key.as_ref().ok_or("no key was given")?;
        let project = self.project(&add.sender_id).ok_or_else(|| unknown_project(&add.sender_id))?;
        if project.server_keys.iter().any(|other| other.sha256 == key.sha256 && other.revoked_ms == 0) {
            return Ok((Done::Project(project.clone()), Vec::new()));
        }
        if project.server_keys.len() >= KEYS_OF_PROJECT_MAX {
            return Err(format!("project {} has had {KEYS_OF_PROJECT_MAX} server keys", add.sender_id));
        }
        self.check_server_key(key)?;
        let project = self.project_mut(&add.sender_id).expect("found above");
        let key_id = project.server_keys.iter().map(|other| other.key_id).max().unwrap_or(0) + 1;
        project.server_keys.push(ServerKey { key_id, created_ms: now_ms, revoked_ms: 0, ..key.clone() });
        Ok((Done::Project(project.clone()), vec![project_row(project)]))
    }

    fn revoke_key(&mut self, now_ms: u64, revoke: &RevokeKey) -> Change {
        let project = self.project_mut(&revoke.sender_id).ok_or_else(|| unknown_project(&revoke.sender_id))?;
        let key = project
            .server_keys
            .iter_mut()
            .find(|key| key.key_id == revoke.key_id)
            .ok_or_else(|| format!("project {} has no key {}", revoke.sender_id, revoke.key_id))?;
        if key.revoked_ms != 0 {
            return Ok((Done::Revision, Vec::new()));
        }
        key.revoked_ms = now_ms.max(1);
        Ok((Done::Revision, vec![project_row(project)]))
    }

    fn project(&self, sender_id: &str) -> Option<&Project> {
        let at = self.0.projects.binary_search_by(|project| project.sender_id.as_str().cmp(sender_id)).ok()?;
        self.0.projects.get(at)
    }

    fn project_mut(&mut self, sender_id: &str) -> Option<&mut Project> {
        let at = self.0.projects.binary_search_by(|project| project.sender_id.as_str().cmp(sender_id)).ok()?;
        self.0.projects.get_mut(at)
    }

    /// A server key stands for one project: gateways look it up by its hash alone.
    fn check_server_key(&self, key: &ServerKey) -> Result<(), String> {
        if key.sha256.len() != 32 {
            return Err("a server key's hash has 32 bytes".into());
        }
        if key.hint.len() > HINT_MAX {
            return Err(format!("a server key's hint has at most {HINT_MAX} bytes"));
        }
        let known = |project: &Project| project.server_keys.iter().any(|other| other.sha256 == key.sha256);
        if self.0.projects.iter().any(known) {
            return Err("the server key has been used before".into());
        }
        Ok(())
    }

    fn free_sender_id(&self, candidate: &str) -> Result<String, String> {
        const FIRST: u64 = 100_000_000_000;
        const LAST: u64 = 999_999_999_999;
        let from = candidate.parse().unwrap_or(FIRST).clamp(FIRST, LAST);
        (from..=LAST)
            .chain(FIRST..from)
            .map(|number| number.to_string())
            .find(|sender_id| self.project(sender_id).is_none())
            .ok_or_else(|| "every sender id is taken".into())
    }

    fn cluster_row(&self) -> Row {
        let cluster = MetaState {
            nodes: Vec::new(),
            shards: Vec::new(),
            projects: Vec::new(),
            keys: Vec::new(),
            skips: Vec::new(),
            ..self.0.clone()
        };
        Row { key: Bytes::from_static(b"c"), value: cluster.encode_to_vec().into() }
    }
}

/// Whether `create` is the command that made the project, come again after an unknown outcome.
fn was_made_by(project: &Project, create: &CreateProject, first: &ServerKey) -> bool {
    project.server_keys.first().is_some_and(|key| key.sha256 == first.sha256)
        && (create.sender_id.is_empty() || create.sender_id == project.sender_id)
        && (&create.name, &create.text_id) == (&project.name, &project.text_id)
}

/// What a command came to, before its revision is known, and the rows it changed.
type Change = Result<(Done, Vec<Row>), String>;

enum Done {
    Revision,
    Project(Project),
    Skip(Skip),
}

fn skipped((skip, changed): (Skip, bool)) -> (Done, Vec<Row>) {
    let rows = if changed { vec![skip_row(&skip)] } else { Vec::new() };
    (Done::Skip(skip), rows)
}

fn row(family: u8, id: &[u8], value: &impl Message) -> Row {
    Row { key: [&[family], id].concat().into(), value: value.encode_to_vec().into() }
}

fn node_row(node: &Node) -> Row {
    row(b'n', &node.node_id.to_be_bytes(), node)
}

fn shard_row(shard: &ShardReplicas) -> Row {
    row(b's', &shard.shard.to_be_bytes(), shard)
}

fn project_row(project: &Project) -> Row {
    row(b'p', project.sender_id.as_bytes(), project)
}

fn key_row(key: &SealedKey) -> Row {
    row(b'k', &[key.purpose.to_be_bytes(), key.key_id.to_be_bytes()].concat(), key)
}

fn skip_row(skip: &Skip) -> Row {
    row(b'x', &[&skip.shard.to_be_bytes()[..], &skip.index.to_be_bytes()].concat(), skip)
}

/// Whether these nodes can begin a cluster; the reason why not, for people.
pub fn check_nodes(nodes: &[Node]) -> Result<(), String> {
    if ![1, 3, 5].contains(&nodes.len()) {
        return Err(format!("a cluster begins with 1, 3 or 5 nodes, not {}", nodes.len()));
    }
    for (at, node) in nodes.iter().enumerate() {
        if node.node_id == 0 {
            return Err("a node id is 1 or more".into());
        }
        if node.address.is_empty() || node.address.len() > NAME_MAX || node.zone.len() > NAME_MAX {
            return Err(format!("node {} needs an address, of at most {NAME_MAX} bytes like its zone", node.node_id));
        }
        if nodes[..at].iter().any(|other| other.node_id == node.node_id || other.address == node.address) {
            return Err(format!("node {} at {} is named twice", node.node_id, node.address));
        }
    }
    Ok(())
}

fn check_keys(keys: &[SealedKey]) -> Result<(), String> {
    let of = |purpose: KeyPurpose| keys.iter().filter(move |key| key.purpose() == purpose);
    if of(KeyPurpose::Tag).count() != 1 {
        return Err("a cluster has exactly one tag key".into());
    }
    if of(KeyPurpose::Checkin).count() == 0 || !of(KeyPurpose::Token).any(|key| key.mints) {
        return Err("a cluster begins with a check-in key and a token key that mints".into());
    }
    Ok(())
}

fn check_sender_id(sender_id: &str) -> Result<(), String> {
    if sender_id.is_empty() || sender_id.len() > 20 || !sender_id.bytes().all(|byte| byte.is_ascii_digit()) {
        return Err("a sender id is 1 to 20 decimal digits".into());
    }
    Ok(())
}

fn check_text_id(text_id: &str) -> Result<(), String> {
    let fits = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
    if !text_id.is_empty()
        && (text_id.len() > NAME_MAX
            || !text_id.starts_with(|c: char| c.is_ascii_lowercase())
            || !text_id.bytes().all(fits))
    {
        return Err("a text id is lower-case letters, digits and hyphens, beginning with a letter".into());
    }
    Ok(())
}

fn check_name(what: &str, name: &str) -> Result<(), String> {
    if name.len() > NAME_MAX || name.chars().any(char::is_control) {
        return Err(format!("a {what} has at most {NAME_MAX} bytes and no control characters"));
    }
    Ok(())
}

fn unknown_project(sender_id: &str) -> String {
    // The text came from an operator; it is cut so that an answer stays small.
    format!("there is no project {}", sender_id.chars().take(20).collect::<String>())
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use martlet_proto::cluster::meta::{HoldEntry, LiftHold, SkipEntry};
    use proptest::prelude::*;

    use super::*;

    #[derive(Default)]
    struct Group {
        state: State,
        rows: BTreeMap<Bytes, Bytes>,
        index: u64,
    }

    impl Group {
        fn propose(&mut self, kind: meta_command::Kind) -> meta_answer::Kind {
            self.index += 1;
            let command = MetaCommand { now_ms: 1_000 + self.index, kind: Some(kind) };
            let (answer, rows) = self.state.apply(self.index, &command);
            self.rows.extend(rows.into_iter().map(|row| (row.key, row.value)));
            answer.kind.unwrap()
        }

        fn created(nodes: u64) -> Self {
            let mut group = Self::default();
            assert_eq!(group.propose(create(nodes, 64)), meta_answer::Kind::Revision(1));
            group
        }

        fn with_project() -> Self {
            let mut group = Self::created(1);
            group.propose(project("123456789012", 1));
            group
        }
    }

    fn refused(answer: meta_answer::Kind) -> String {
        match answer {
            meta_answer::Kind::Refused(why) => why,
            other => panic!("not refused but {other:?}"),
        }
    }

    fn made(answer: meta_answer::Kind) -> Project {
        match answer {
            meta_answer::Kind::Project(project) => project,
            other => panic!("not a project but {other:?}"),
        }
    }

    fn nodes(count: u64) -> Vec<Node> {
        (1..=count).map(|id| Node { node_id: id, address: format!("n{id}:7400"), zone: String::new() }).collect()
    }

    fn sealed(purpose: KeyPurpose) -> SealedKey {
        SealedKey {
            purpose: purpose.into(),
            key_id: 1,
            sealed: Bytes::from_static(b"sealed"),
            mints: true,
            created_ms: 1,
        }
    }

    fn create(count: u64, shard_count: u32) -> meta_command::Kind {
        meta_command::Kind::CreateCluster(CreateCluster {
            cluster_id: Bytes::from_static(&[7; 16]),
            shard_count,
            nodes: nodes(count),
            keys: [KeyPurpose::Token, KeyPurpose::Checkin, KeyPurpose::Tag].map(sealed).into(),
            meta_replicas: (1..=count).map(|id| Replica { node_id: id, replica_id: id }).collect(),
        })
    }

    fn server_key(seed: u8) -> ServerKey {
        ServerKey { sha256: vec![seed; 32].into(), hint: format!("AIza{seed}"), ..ServerKey::default() }
    }

    fn project(sender_id: &str, seed: u8) -> meta_command::Kind {
        meta_command::Kind::CreateProject(CreateProject {
            sender_id: sender_id.into(),
            first_key: Some(server_key(seed)),
            candidate_sender_id: "999999999999".into(),
            ..CreateProject::default()
        })
    }

    fn add(sender_id: &str, seed: u8) -> meta_command::Kind {
        meta_command::Kind::AddKey(AddKey { sender_id: sender_id.into(), key: Some(server_key(seed)) })
    }

    fn hold(shard: u32, index: u64, digest: u8) -> meta_command::Kind {
        let (digest, reason) = (vec![digest; 32].into(), "why".to_owned());
        meta_command::Kind::HoldEntry(HoldEntry { shard, index, term: 1, digest, reason, by: String::new() })
    }

    fn revoke(sender_id: &str, key_id: u32) -> meta_command::Kind {
        meta_command::Kind::RevokeKey(RevokeKey { sender_id: sender_id.into(), key_id })
    }

    #[test]
    fn creating_a_cluster_gives_every_replica_an_id_of_its_own_above_those_of_the_meta_group() {
        let group = Group::created(3);
        let state = group.state.get();
        let mut ids: Vec<u64> = state.shards.iter().flat_map(|shard| &shard.replicas).map(|r| r.replica_id).collect();
        ids.sort_unstable();
        assert_eq!(ids, (4..4 + 3 * 64).collect::<Vec<_>>());
        assert_eq!((state.next_replica_id, state.revision, state.incarnation), (196, 1, 1));
    }

    #[test]
    fn a_cluster_is_created_once_and_the_same_creation_may_be_repeated() {
        let mut group = Group::created(3);
        let before = group.state.clone();
        assert_eq!(group.propose(create(3, 64)), meta_answer::Kind::Revision(1));
        let meta_command::Kind::CreateCluster(mut other) = create(3, 64) else { unreachable!() };
        other.cluster_id = Bytes::from_static(&[8; 16]);
        refused(group.propose(meta_command::Kind::CreateCluster(other)));
        assert_eq!(group.state, before);
    }

    #[test]
    fn nothing_is_taken_before_the_cluster_is_created() {
        assert_eq!(refused(Group::default().propose(project("1", 1))), "no cluster has been created");
    }

    #[test]
    fn a_cluster_of_the_wrong_size_or_without_its_keys_is_refused() {
        for kind in [create(2, 64), create(4, 64), create(3, 0), create(3, 257)] {
            refused(Group::default().propose(kind));
        }
        let meta_command::Kind::CreateCluster(mut two_tags) = create(1, 1) else { unreachable!() };
        two_tags.keys.push(SealedKey { key_id: 2, ..sealed(KeyPurpose::Tag) });
        refused(Group::default().propose(meta_command::Kind::CreateCluster(two_tags)));
    }

    #[test]
    fn a_project_is_created_with_its_key_and_a_repeated_creation_answers_the_same() {
        let mut group = Group::created(1);
        let first = made(group.propose(project("123456789012", 1)));
        assert_eq!((first.server_keys[0].key_id, first.server_keys[0].created_ms), (1, 1_002));
        let revision = group.state.get().revision;
        assert_eq!(made(group.propose(project("123456789012", 1))), first);
        assert_eq!(group.state.get().revision, revision);
        refused(group.propose(project("123456789012", 2)));
    }

    #[test]
    fn a_project_without_a_sender_id_gets_the_next_free_one_and_the_search_wraps() {
        let mut group = Group::created(1);
        assert_eq!(made(group.propose(project("", 1))).sender_id, "999999999999");
        let second = made(group.propose(project("", 2)));
        assert_eq!(second.sender_id, "100000000000");
        assert_eq!(made(group.propose(project("", 2))), second, "a repeated call makes no third");
    }

    #[test]
    fn a_sender_id_is_decimal_digits_and_a_text_id_belongs_to_one_project() {
        let mut group = Group::created(1);
        refused(group.propose(project("12a", 1)));
        refused(group.propose(project(&"1".repeat(21), 1)));
        let named = |sender_id: &str, seed| {
            meta_command::Kind::CreateProject(CreateProject {
                sender_id: sender_id.into(),
                text_id: "my-app".into(),
                first_key: Some(server_key(seed)),
                ..CreateProject::default()
            })
        };
        made(group.propose(named("1", 1)));
        refused(group.propose(named("2", 2)));
    }

    #[test]
    fn a_server_key_belongs_to_one_project_for_ever() {
        let mut group = Group::with_project();
        refused(group.propose(project("2", 1)));
        group.propose(revoke("123456789012", 1));
        refused(group.propose(project("2", 1)));
        refused(group.propose(add("123456789012", 1)));
    }

    #[test]
    fn keys_are_numbered_and_revoked_for_good() {
        let mut group = Group::with_project();
        let two = made(group.propose(add("123456789012", 2)));
        assert_eq!(two.server_keys.iter().map(|key| key.key_id).collect::<Vec<_>>(), [1, 2]);
        assert_eq!(made(group.propose(add("123456789012", 2))), two, "a repeated call adds nothing");
        let revision = group.propose(revoke("123456789012", 1));
        assert_eq!(revision, meta_answer::Kind::Revision(group.index));
        assert_ne!(group.state.get().projects[0].server_keys[0].revoked_ms, 0);
        assert_eq!(group.propose(revoke("123456789012", 1)), revision, "revoking again changes nothing");
        refused(group.propose(revoke("123456789012", 9)));
        refused(group.propose(revoke("2", 1)));
    }

    #[test]
    fn a_project_holds_a_bounded_number_of_keys_and_its_row_stays_small() {
        let mut group = Group::with_project();
        let taken =
            (2..=255).filter(|seed| matches!(group.propose(add("123456789012", *seed)), meta_answer::Kind::Project(_)));
        assert_eq!(taken.count(), KEYS_OF_PROJECT_MAX - 1);
        assert!(group.rows.values().all(|value| value.len() <= 8 << 10));
    }

    #[test]
    fn the_largest_state_of_a_cluster_fits_one_message() {
        let key = ServerKey {
            key_id: u32::MAX,
            sha256: vec![0xff; 32].into(),
            hint: "h".repeat(HINT_MAX),
            created_ms: u64::MAX,
            revoked_ms: u64::MAX,
        };
        let project = Project {
            sender_id: "9".repeat(NAME_MAX),
            text_id: "t".repeat(NAME_MAX),
            server_keys: vec![key; KEYS_OF_PROJECT_MAX],
            name: "n".repeat(NAME_MAX),
        };
        let skip = Skip {
            shard: SHARDS_MAX,
            index: u64::MAX,
            term: u64::MAX,
            digest: vec![0xff; 32].into(),
            reason: "r".repeat(skips::REASON_MAX),
            by: "b".repeat(skips::BY_MAX),
            asked_ms: u64::MAX,
            decided_ms: u64::MAX,
            hold: u64::MAX,
            state: 3,
        };
        let replica = Replica { node_id: u64::MAX, replica_id: u64::MAX };
        let shard = ShardReplicas { shard: SHARDS_MAX, epoch: u64::MAX, replicas: vec![replica; 5] };
        // Each with its tag and length before it. Nodes and sealed keys are few.
        let each = |len: usize| len + 6;
        let bytes = PROJECTS_MAX * each(project.encoded_len())
            + skips::SKIPS_MAX * each(skip.encoded_len())
            + SHARDS_MAX as usize * each(shard.encoded_len());
        let room = martlet_proto::limits::META_STATE_MAX_BYTES - (1 << 20);
        assert!(bytes < room, "{bytes} bytes");
    }

    #[test]
    fn a_command_of_a_later_version_changes_nothing() {
        let mut state = Group::created(1).state;
        let before = state.clone();
        let (answer, rows) = state.apply(9, &MetaCommand { now_ms: 1, kind: None });
        refused(answer.kind.unwrap());
        assert_eq!((state, rows), (before, Vec::new()));
    }

    #[test]
    fn a_row_of_no_family_is_an_error() {
        assert!(State::from_rows([(Bytes::from_static(b"zz"), Bytes::new())]).is_err());
        assert!(State::from_rows([(Bytes::from_static(b"p1"), Bytes::from_static(b"\xff\xff"))]).is_err());
    }

    fn any_command() -> impl Strategy<Value = meta_command::Kind> {
        let sender = prop::sample::select(vec!["", "1", "22", "x"]);
        prop_oneof![
            Just(create(3, 4)),
            (sender.clone(), 0_u8..6).prop_map(|(sender, seed)| project(sender, seed)),
            (sender.clone(), 0_u8..6).prop_map(|(sender, seed)| add(sender, seed)),
            (sender, 0_u32..4).prop_map(|(sender, key)| revoke(sender, key)),
            (0_u32..5, 1_u64..4, 0_u8..2).prop_map(|(shard, index, digest)| hold(shard, index, digest)),
            (0_u32..5, 1_u64..4, 0_u64..40, prop::bool::ANY).prop_map(|(shard, index, hold, skips)| match skips {
                true => meta_command::Kind::SkipEntry(SkipEntry { shard, index, hold }),
                false => meta_command::Kind::LiftHold(LiftHold { shard, index, hold }),
            }),
        ]
    }

    proptest! {
        #[test]
        fn the_rows_always_give_the_state_back(commands in prop::collection::vec(any_command(), 0..40)) {
            let mut group = Group::default();
            for command in commands {
                group.propose(command);
                let rows = group.rows.iter().map(|(key, value)| (key.clone(), value.clone()));
                prop_assert_eq!(&State::from_rows(rows).unwrap(), &group.state);
            }
        }
    }
}

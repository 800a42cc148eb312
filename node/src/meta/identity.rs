//! Which cluster a data directory belongs to, and as which node.
//!
//! Owns the file `identity`: cluster id, node id, the first nodes with their addresses, the replicas of the meta group, and a MAC
//! that tells the cluster's secret from another. Written once, when the cluster is created or the node is prepared for it; read at
//! every start, before anything else of the directory. Invariant: a directory never changes its cluster or its node.

use std::path::{Path, PathBuf};

use bytes::Bytes;
use martlet_proto::cluster::meta::{Node, Replica};
use prost::Message;

use super::{
    checked_file::{self, FileError},
    secret::Secret,
};
use crate::disk::Disk;

const MAGIC: &[u8; 8] = b"MARTLETi";
const NAME: &str = "identity";
/// Node id that no node has: under it the secret proves itself to the file, not to a peer.
const NOBODY: u64 = 0;

/// A node's membership of a cluster.
#[derive(Clone, PartialEq, Message)]
pub struct Identity {
    /// 16 bytes, drawn when the cluster was created.
    #[prost(bytes = "bytes", tag = "1")]
    pub cluster_id: Bytes,
    /// This node.
    #[prost(uint64, tag = "2")]
    pub node_id: u64,
    /// The nodes the cluster was created with; for addresses until the meta state is known.
    #[prost(message, repeated, tag = "3")]
    pub nodes: Vec<Node>,
    /// Replicas of the meta group.
    #[prost(message, repeated, tag = "4")]
    pub meta_replicas: Vec<Replica>,
    /// Proof of the cluster's secret.
    #[prost(bytes = "bytes", tag = "5")]
    secret_proof: Bytes,
}

/// Why a node cannot have an identity.
#[derive(Debug, thiserror::Error)]
pub enum IdentityError {
    /// The file is damaged or unreadable.
    #[error(transparent)]
    File(#[from] FileError),
    /// The directory is another node's.
    #[error("data directory {dir} belongs to node {found}, not to node.id = {configured}", dir = dir.display())]
    OtherNode {
        /// The data directory.
        dir: PathBuf,
        /// Whose it is.
        found: u64,
        /// Who was configured.
        configured: u64,
    },
    /// The secret is another cluster's.
    #[error("the secret in node.secret_file is not that of cluster {cluster}, to which data directory {dir} belongs", dir = dir.display())]
    OtherSecret {
        /// The data directory.
        dir: PathBuf,
        /// Its cluster, in hexadecimal digits.
        cluster: String,
    },
}

impl Identity {
    /// An identity that was not written yet.
    pub fn new(
        cluster_id: Bytes,
        node_id: u64,
        nodes: Vec<Node>,
        meta_replicas: Vec<Replica>,
        secret: &Secret,
    ) -> Self {
        let secret_proof = secret.proof(&cluster_id, NOBODY);
        Self { cluster_id, node_id, nodes, meta_replicas, secret_proof }
    }

    /// Reads the identity of a data directory, `None` when it has none yet, and refuses another node's or secret's.
    pub fn read(disk: &dyn Disk, dir: &Path, node_id: u64, secret: &Secret) -> Result<Option<Self>, IdentityError> {
        let path = dir.join(NAME);
        let Some(body) = checked_file::read(disk, &path, MAGIC)? else { return Ok(None) };
        let identity = Self::decode(&*body).map_err(|error| FileError::Damaged { path, what: error.to_string() })?;
        if identity.node_id != node_id {
            return Err(IdentityError::OtherNode { dir: dir.into(), found: identity.node_id, configured: node_id });
        }
        if !secret.proves(&identity.cluster_id, NOBODY, &identity.secret_proof) {
            return Err(IdentityError::OtherSecret { dir: dir.into(), cluster: identity.cluster() });
        }
        Ok(Some(identity))
    }

    /// Makes it durable.
    pub fn write(&self, disk: &dyn Disk, dir: &Path) -> Result<(), FileError> {
        checked_file::write(disk, &dir.join(NAME), MAGIC, &self.encode_to_vec())
    }

    /// The cluster id for people.
    pub fn cluster(&self) -> String {
        cluster_name(&self.cluster_id)
    }

    /// This node's replica of the meta group.
    pub fn meta_replica(&self) -> Option<u64> {
        self.meta_replicas.iter().find(|replica| replica.node_id == self.node_id).map(|replica| replica.replica_id)
    }

    /// The node that holds a replica of the meta group.
    pub fn node_of_meta(&self, replica: u64) -> Option<&Node> {
        let replica = self.meta_replicas.iter().find(|other| other.replica_id == replica)?;
        self.nodes.iter().find(|node| node.node_id == replica.node_id)
    }
}

/// A cluster id as people see it.
pub fn cluster_name(cluster_id: &[u8]) -> String {
    cluster_id.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use martlet_proto::seal::ClusterSecret;

    use super::*;
    use crate::disk::RealDisk;

    fn secret(byte: u8) -> Secret {
        Secret::new(ClusterSecret::new([byte; 32]))
    }

    fn identity() -> Identity {
        let node = Node { node_id: 3, address: "n3:7400".into(), zone: String::new() };
        let replica = Replica { node_id: 3, replica_id: 2 };
        Identity::new(Bytes::from_static(&[9; 16]), 3, vec![node], vec![replica], &secret(1))
    }

    #[test]
    fn an_identity_is_read_back_by_its_node_with_its_secret_only() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(Identity::read(&RealDisk, dir.path(), 3, &secret(1)).unwrap(), None);
        identity().write(&RealDisk, dir.path()).unwrap();
        assert_eq!(Identity::read(&RealDisk, dir.path(), 3, &secret(1)).unwrap(), Some(identity()));
        let other_node = Identity::read(&RealDisk, dir.path(), 4, &secret(1)).unwrap_err();
        assert!(other_node.to_string().contains("belongs to node 3, not to node.id = 4"), "{other_node}");
        let other_secret = Identity::read(&RealDisk, dir.path(), 3, &secret(2)).unwrap_err();
        assert!(other_secret.to_string().contains("node.secret_file"), "{other_secret}");
    }

    #[test]
    fn the_file_does_not_hold_the_secret() {
        let dir = tempfile::tempdir().unwrap();
        identity().write(&RealDisk, dir.path()).unwrap();
        let bytes = std::fs::read(dir.path().join(NAME)).unwrap();
        assert!(!bytes.windows(8).any(|window| window == [1; 8]));
        assert!(!bytes.windows(8).any(|window| window == b"01010101"));
    }

    #[test]
    fn replicas_of_the_meta_group_are_found_by_node_and_by_id() {
        let identity = identity();
        assert_eq!(identity.meta_replica(), Some(2));
        assert_eq!(identity.node_of_meta(2).unwrap().node_id, 3);
        assert_eq!(identity.node_of_meta(7), None);
    }
}

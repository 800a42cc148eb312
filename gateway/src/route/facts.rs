//! What a gateway knows of projects and keys at one revision: a value made from the watched meta state.
//!
//! Owns the opened keys. Server keys are looked up by their SHA-256, so that the time a look-up takes tells nothing about a
//! key. Invariant: a state whose keys do not all open makes no facts, for a gateway that cannot verify some tokens would call
//! them invalid.

use std::collections::BTreeMap;

use bytes::Bytes;
use martlet_proto::{
    cluster::meta::{KeyPurpose, MetaState, SealedKey},
    group::GroupTag,
    message::SenderId,
    seal::{ClusterSecret, SealError},
    shard::{Shard, ShardCount, shard_of},
    tag::{AndroidId, CheckinKey, DeviceTag, SecurityToken, TagKey},
    token::TokenKey,
    topic::Condition,
};
use sha2::{Digest, Sha256};

/// Projects and keys at one revision.
#[derive(Debug)]
pub struct Facts {
    /// Of the cluster: 16 bytes.
    pub cluster_id: Bytes,
    /// Log index of the last change.
    pub revision: u64,
    /// Number of shards.
    pub shards: ShardCount,
    senders: BTreeMap<SenderId, String>,
    by_text_id: BTreeMap<String, SenderId>,
    server_keys: BTreeMap<[u8; 32], SenderId>,
    token_keys: BTreeMap<u32, TokenKey>,
    mints: Option<u32>,
    checkin: Vec<CheckinKey>,
    checkin_mints: usize,
    tag: TagKey,
}

/// Why a meta state is not taken.
#[derive(Debug, thiserror::Error)]
pub enum RejectedState {
    /// The cluster is not created yet.
    #[error("the cluster has no {0} yet")]
    Unfinished(&'static str),
    /// The number of shards is out of range.
    #[error("{0} shards")]
    ShardCount(u32),
    /// Most likely the secret file of another cluster.
    #[error("{purpose:?} key {key_id}: {source}")]
    Key {
        /// Of the key.
        purpose: KeyPurpose,
        /// Of the key.
        key_id: u32,
        /// Why it does not open.
        source: SealError,
    },
    /// The node belongs to another cluster than the one followed so far.
    #[error("the node belongs to another cluster")]
    AnotherCluster,
}

impl Facts {
    /// Reads a state and opens its keys.
    pub(crate) fn open(state: &MetaState, secret: &ClusterSecret) -> Result<Self, RejectedState> {
        if state.shard_count == 0 {
            return Err(RejectedState::Unfinished("shards"));
        }
        let shards = ShardCount::new(state.shard_count).ok_or(RejectedState::ShardCount(state.shard_count))?;
        let mut keys: Vec<&SealedKey> = state.keys.iter().collect();
        keys.sort_by_key(|key| std::cmp::Reverse((key.created_ms, key.key_id)));
        let (mut token_keys, mut mints, mut checkin, mut tag) = (BTreeMap::new(), None, Vec::new(), None);
        let mut checkin_mints = None;
        for key in keys {
            let open = || {
                secret.unseal(&state.cluster_id, key).map_err(|source| RejectedState::Key {
                    purpose: key.purpose(),
                    key_id: key.key_id,
                    source,
                })
            };
            match key.purpose() {
                KeyPurpose::Token => {
                    token_keys.insert(key.key_id, TokenKey::new(key.key_id, open()?));
                    mints = mints.or(key.mints.then_some(key.key_id));
                }
                KeyPurpose::Checkin => {
                    checkin_mints = checkin_mints.or(key.mints.then_some(checkin.len()));
                    checkin.push(CheckinKey::new(key.key_id, open()?));
                }
                KeyPurpose::Tag => tag = Some(TagKey::new(open()?)),
                // A purpose of a newer version.
                KeyPurpose::Unspecified => {}
            }
        }
        if checkin.is_empty() {
            return Err(RejectedState::Unfinished("check-in key"));
        }
        let mut facts = Self {
            cluster_id: state.cluster_id.clone(),
            revision: state.revision,
            shards,
            senders: BTreeMap::new(),
            by_text_id: BTreeMap::new(),
            server_keys: BTreeMap::new(),
            token_keys,
            mints,
            checkin,
            checkin_mints: checkin_mints.unwrap_or(0),
            tag: tag.ok_or(RejectedState::Unfinished("tag key"))?,
        };
        for project in &state.projects {
            let Ok(sender) = SenderId::parse(&project.sender_id) else { continue };
            for key in project.server_keys.iter().filter(|key| key.revoked_ms == 0) {
                if let Ok(hash) = <[u8; 32]>::try_from(&key.sha256[..]) {
                    facts.server_keys.insert(hash, sender.clone());
                }
            }
            if !project.text_id.is_empty() {
                facts.by_text_id.insert(project.text_id.clone(), sender.clone());
            }
            facts.senders.insert(sender, project.name.clone());
        }
        Ok(facts)
    }

    /// The sender id that a server key belongs to; `None` for one that is unknown or revoked.
    pub fn sender_of(&self, server_key: &str) -> Option<&SenderId> {
        self.server_keys.get(&<[u8; 32]>::from(Sha256::digest(server_key)))
    }

    /// Whether a project has this sender id.
    pub fn knows(&self, sender: &SenderId) -> bool {
        self.senders.contains_key(sender)
    }

    /// The sender id of a project, named by it or by its text id.
    pub fn project(&self, name: &str) -> Option<&SenderId> {
        let by_number = SenderId::parse(name).ok().and_then(|sender| self.senders.get_key_value(&sender));
        by_number.map(|(sender, _)| sender).or_else(|| self.by_text_id.get(name))
    }

    /// A key that tokens are verified with.
    pub fn token_key(&self, id: u32) -> Option<&TokenKey> {
        self.token_keys.get(&id)
    }

    /// Ids of all keys that tokens are verified with.
    pub(crate) fn token_key_ids(&self) -> Vec<u32> {
        self.token_keys.keys().copied().collect()
    }

    /// The key that new tokens are minted with; `None` while none is confirmed everywhere.
    pub fn minting_key(&self) -> Option<&TokenKey> {
        self.token_keys.get(&self.mints?)
    }

    /// The token that goes with a new android id.
    pub fn security_token(&self, id: AndroidId) -> SecurityToken {
        self.checkin[self.checkin_mints].security_token(id)
    }

    /// The device's tag, if one of the live check-in keys made this token of this id; newest first.
    pub fn authenticate(&self, id: AndroidId, token: SecurityToken) -> Option<DeviceTag> {
        self.checkin.iter().any(|key| key.security_token(id).ct_eq(token)).then(|| self.tag.tag(id))
    }

    /// The check-in key that makes installation tokens.
    pub fn installation_key(&self) -> &CheckinKey {
        &self.checkin[self.checkin_mints]
    }

    /// Where a sender's group of this name lives.
    pub fn group_tag(&self, sender: &SenderId, name: &str) -> GroupTag {
        GroupTag::of(&self.tag, sender, name)
    }

    /// The shard of a group: by the hash that devices have.
    pub fn group_shard(&self, tag: GroupTag) -> Shard {
        shard_of(DeviceTag(tag.0), self.shards)
    }

    /// The shard that a publish is at home in.
    pub fn home(&self, condition: &Condition, sender: &str) -> Shard {
        condition.home(sender, self.shards)
    }

    /// The shard of a device.
    pub fn shard(&self, tag: DeviceTag) -> Shard {
        shard_of(tag, self.shards)
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use martlet_proto::cluster::meta::{Project, ServerKey};
    use rand::{SeedableRng, rngs::StdRng};

    use super::*;

    pub(crate) fn secret() -> ClusterSecret {
        ClusterSecret::new([9; 32])
    }

    /// A created cluster: one project `1` named `shop` with the key `k`, one key of each purpose.
    pub(crate) fn state() -> MetaState {
        let mut rng = StdRng::seed_from_u64(7);
        let mut seal = |purpose: KeyPurpose, key_id: u32| SealedKey {
            purpose: purpose.into(),
            key_id,
            sealed: secret().seal(b"cluster", purpose, key_id, &[key_id as u8; 32], &mut rng),
            mints: true,
            created_ms: key_id.into(),
        };
        MetaState {
            cluster_id: Bytes::from_static(b"cluster"),
            revision: 5,
            shard_count: 4,
            projects: vec![Project {
                sender_id: "1".into(),
                text_id: "shop".into(),
                server_keys: vec![ServerKey {
                    key_id: 1,
                    sha256: Bytes::copy_from_slice(&Sha256::digest("k")),
                    ..ServerKey::default()
                }],
                name: String::new(),
            }],
            keys: vec![seal(KeyPurpose::Token, 1), seal(KeyPurpose::Checkin, 1), seal(KeyPurpose::Tag, 1)],
            ..MetaState::default()
        }
    }

    #[test]
    fn a_server_key_names_its_sender_until_it_is_revoked() {
        let mut state = state();
        let facts = Facts::open(&state, &secret()).unwrap();
        assert_eq!(facts.sender_of("k").unwrap().as_str(), "1");
        assert_eq!(facts.sender_of("K"), None);
        assert_eq!(facts.project("shop").unwrap().as_str(), "1");
        assert_eq!(facts.project("1").unwrap().as_str(), "1");
        assert_eq!(facts.project("2"), None);
        state.projects[0].server_keys[0].revoked_ms = 1;
        assert_eq!(Facts::open(&state, &secret()).unwrap().sender_of("k"), None);
    }

    #[test]
    fn older_checkin_keys_verify_and_the_newest_that_may_mint_mints() {
        let mut state = state();
        let mut rng = StdRng::seed_from_u64(8);
        let id = AndroidId::new(77).unwrap();
        let old = Facts::open(&state, &secret()).unwrap().security_token(id);
        let mut newer = SealedKey {
            purpose: KeyPurpose::Checkin.into(),
            key_id: 2,
            sealed: secret().seal(b"cluster", KeyPurpose::Checkin, 2, &[2; 32], &mut rng),
            mints: false,
            created_ms: 2,
        };
        state.keys.push(newer.clone());
        let facts = Facts::open(&state, &secret()).unwrap();
        assert!(facts.security_token(id).ct_eq(old));
        newer.mints = true;
        state.keys.pop();
        state.keys.push(newer);
        let facts = Facts::open(&state, &secret()).unwrap();
        let new = facts.security_token(id);
        assert!(!new.ct_eq(old));
        assert!(facts.authenticate(id, old).is_some());
        assert_eq!(facts.authenticate(id, old), facts.authenticate(id, new));
        assert_eq!(facts.authenticate(AndroidId::new(78).unwrap(), new), None);
    }

    #[test]
    fn a_state_whose_keys_do_not_open_is_not_taken() {
        let another = ClusterSecret::new([8; 32]);
        assert!(matches!(Facts::open(&state(), &another), Err(RejectedState::Key { .. })));
        assert!(matches!(Facts::open(&MetaState::default(), &secret()), Err(RejectedState::Unfinished(_))));
        let keyless = MetaState { keys: Vec::new(), ..state() };
        assert!(matches!(Facts::open(&keyless, &secret()), Err(RejectedState::Unfinished(_))));
    }
}

//! Which node leads which shard: a value.
//!
//! Owns the nodes and replicas of the newest meta state, and what was learned about leaders since: from redirects, from
//! answers, from `Led` on delivery streams. A hint of a lower term never replaces one of a higher term. Knows no connection:
//! whether a node can be reached is told by the caller. Wrong hints cost a round trip, never a message: only a leader proposes.

use std::collections::BTreeMap;

use martlet_proto::{
    cluster::{meta::MetaState, queue::Redirect},
    shard::Shard,
};

/// Nodes, replicas and leaders.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Map {
    nodes: BTreeMap<u64, String>,
    shards: BTreeMap<Shard, Group>,
}

#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Group {
    epoch: u64,
    /// In order of preference for leadership.
    replicas: Vec<u64>,
    leader: Option<u64>,
    /// Highest term heard of.
    term: u64,
}

impl Map {
    /// Takes nodes and replicas of a newer meta state; keeps leaders that still have a replica.
    pub fn adopt(&mut self, state: &MetaState) {
        self.nodes = state.nodes.iter().map(|node| (node.node_id, node.address.clone())).collect();
        let mut known = std::mem::take(&mut self.shards);
        for shard in &state.shards {
            let Ok(number) = u16::try_from(shard.shard) else { continue };
            let mut group = known.remove(&Shard(number)).unwrap_or_default();
            group.epoch = shard.epoch;
            group.replicas = shard.replicas.iter().map(|replica| replica.node_id).collect();
            group.leader = group.leader.filter(|leader| group.replicas.contains(leader));
            self.shards.insert(Shard(number), group);
        }
    }

    /// Every node with its `host:port`.
    pub fn nodes(&self) -> impl Iterator<Item = (u64, &str)> {
        self.nodes.iter().map(|(node, address)| (*node, address.as_str()))
    }

    /// Every shard with the nodes that have a replica, in order of preference for leadership.
    pub fn shards(&self) -> impl Iterator<Item = (Shard, &[u64])> {
        self.shards.iter().map(|(shard, group)| (*shard, group.replicas.as_slice()))
    }

    /// The leader, as far as known.
    pub fn leader(&self, shard: Shard) -> Option<u64> {
        self.shards.get(&shard)?.leader
    }

    /// Whom to ask at the given try: the leader if one is known, else the replicas in turn.
    pub fn target(&self, shard: Shard, tries: usize) -> Option<u64> {
        let group = self.shards.get(&shard)?;
        group.leader.or_else(|| group.replicas.get(tries.checked_rem(group.replicas.len())?).copied())
    }

    /// Epoch of the shard's replica list; 0 when the shard is unknown.
    pub fn epoch(&self, shard: Shard) -> u64 {
        self.shards.get(&shard).map_or(0, |group| group.epoch)
    }

    /// `node` announced that it leads in `term`.
    pub fn leads(&mut self, shard: Shard, node: u64, term: u64) {
        if let Some(group) = self.shards.get_mut(&shard)
            && term >= group.term
        {
            group.term = term;
            group.leader = Some(node);
        }
    }

    /// `node` answered as a leader does; a leader known by its term is kept.
    pub fn answered(&mut self, shard: Shard, node: u64) {
        if let Some(group) = self.shards.get_mut(&shard) {
            group.leader.get_or_insert(node);
        }
    }

    /// `from` does not lead and knows who does, or not.
    pub fn redirected(&mut self, shard: Shard, from: u64, redirect: &Redirect) {
        self.lost(shard, from);
        let Some(group) = self.shards.get_mut(&shard) else { return };
        if redirect.term < group.term {
            return;
        }
        group.term = redirect.term;
        // A node that names itself has just lost its leadership: asking it again at once helps nobody.
        if redirect.leader_node != 0 && redirect.leader_node != from {
            group.leader = Some(redirect.leader_node);
        }
    }

    /// `node` cannot be asked for this shard: it is not reachable, or has no replica. Another leader stays known.
    pub fn lost(&mut self, shard: Shard, node: u64) {
        if let Some(group) = self.shards.get_mut(&shard)
            && group.leader == Some(node)
        {
            group.leader = None;
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use martlet_proto::cluster::meta::{Node, Replica, ShardReplicas};

    use super::*;

    const S: Shard = Shard(0);

    /// A state with these nodes, one shard on all of them.
    pub(crate) fn state(nodes: &[u64]) -> MetaState {
        MetaState {
            nodes: nodes
                .iter()
                .map(|n| Node { node_id: *n, address: format!("n{n}:7400"), zone: String::new() })
                .collect(),
            shards: vec![ShardReplicas {
                shard: 0,
                epoch: 7,
                replicas: nodes.iter().map(|n| Replica { node_id: *n, replica_id: 10 + n }).collect(),
            }],
            ..MetaState::default()
        }
    }

    fn map(nodes: &[u64]) -> Map {
        let mut map = Map::default();
        map.adopt(&state(nodes));
        map
    }

    fn to(leader_node: u64, term: u64) -> Redirect {
        Redirect { leader_node, term, epoch: 7 }
    }

    #[test]
    fn without_a_known_leader_the_replicas_are_asked_in_turn() {
        let map = map(&[1, 2, 3]);
        assert_eq!([0, 1, 2, 3].map(|tries| map.target(S, tries)), [Some(1), Some(2), Some(3), Some(1)]);
        assert_eq!(map.target(Shard(9), 0), None);
        assert_eq!(Map::default().target(S, 0), None);
        assert_eq!(map.epoch(S), 7);
    }

    #[test]
    fn a_redirect_is_followed_unless_a_higher_term_is_known() {
        let mut map = map(&[1, 2, 3]);
        map.redirected(S, 1, &to(2, 5));
        assert_eq!(map.leader(S), Some(2));
        map.leads(S, 3, 6);
        map.redirected(S, 1, &to(2, 5));
        assert_eq!(map.leader(S), Some(3));
    }

    #[test]
    fn a_leader_that_denies_it_is_forgotten_even_if_it_knows_no_other() {
        let mut map = map(&[1, 2, 3]);
        map.leads(S, 1, 5);
        map.redirected(S, 1, &to(0, 5));
        assert_eq!(map.leader(S), None);
        map.leads(S, 1, 5);
        map.redirected(S, 1, &to(1, 6));
        assert_eq!(map.leader(S), None);
    }

    #[test]
    fn an_answer_names_a_leader_only_where_none_is_known() {
        let mut map = map(&[1, 2, 3]);
        map.answered(S, 2);
        assert_eq!(map.leader(S), Some(2));
        map.leads(S, 3, 1);
        map.answered(S, 2);
        assert_eq!(map.leader(S), Some(3));
        map.lost(S, 2);
        assert_eq!(map.leader(S), Some(3));
        map.lost(S, 3);
        assert_eq!(map.leader(S), None);
    }

    #[test]
    fn a_new_state_keeps_leaders_that_still_have_a_replica() {
        let mut map = map(&[1, 2, 3]);
        map.leads(S, 3, 2);
        map.adopt(&state(&[2, 3]));
        assert_eq!(map.leader(S), Some(3));
        map.adopt(&state(&[2]));
        assert_eq!(map.leader(S), None);
        assert_eq!(map.nodes().collect::<Vec<_>>(), [(2, "n2:7400")]);
    }
}

//! Which nodes hold a replica of which shard, when a cluster is created.
//!
//! A value: the same input gives the same map on every replica of the meta group. Balance comes first (least loaded node), then
//! the spread over zones wins over balance where nodes name zones, and a rendezvous hash breaks ties, so that the neighbours of a
//! shard differ from shard to shard and a lost node's work spreads over all others. Moves of a later change are not planned here.

use std::collections::{BTreeMap, BTreeSet};

use martlet_proto::cluster::meta::Node;
use xxhash_rust::xxh3::xxh3_64;

/// Copies of a shard where enough nodes exist.
pub const COPIES: usize = 3;

/// Node ids of each shard's replicas, the preferred leader first. No node twice in a shard; `min(copies, nodes)` of them.
pub fn spread(nodes: &[Node], shards: u16, copies: usize) -> Vec<Vec<u64>> {
    let copies = copies.min(nodes.len());
    // No node takes more than its part, unless zones leave no other.
    let cap = (usize::from(shards) * copies).div_ceil(nodes.len().max(1));
    let mut held: BTreeMap<u64, usize> = BTreeMap::new();
    let mut led: BTreeMap<u64, usize> = BTreeMap::new();
    let count = |of: &BTreeMap<u64, usize>, node: u64| of.get(&node).copied().unwrap_or(0);

    (0..shards)
        .map(|shard| {
            let mut zones = BTreeSet::new();
            let mut chosen: Vec<u64> = Vec::with_capacity(copies);
            while chosen.len() < copies {
                let next = nodes
                    .iter()
                    .filter(|node| !chosen.contains(&node.node_id))
                    .min_by_key(|node| {
                        let load = count(&held, node.node_id);
                        let same_zone = !node.zone.is_empty() && zones.contains(&node.zone);
                        (same_zone, load >= cap, load, rendezvous(node.node_id, shard))
                    })
                    .expect("copies are at most the nodes");
                zones.insert(&next.zone);
                chosen.push(next.node_id);
                *held.entry(next.node_id).or_default() += 1;
            }
            chosen.sort_by_key(|node| (count(&led, *node), rendezvous(*node, shard)));
            *led.entry(chosen[0]).or_default() += 1;
            chosen
        })
        .collect()
}

fn rendezvous(node: u64, shard: u16) -> u64 {
    let mut bytes = [0; 10];
    bytes[..8].copy_from_slice(&node.to_be_bytes());
    bytes[8..].copy_from_slice(&shard.to_be_bytes());
    xxh3_64(&bytes)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn nodes(ids: &[u64], zones: &[&str]) -> Vec<Node> {
        let zone = |at: usize| zones.get(at % zones.len().max(1)).copied().unwrap_or_default().to_owned();
        ids.iter()
            .enumerate()
            .map(|(at, id)| Node { node_id: *id, address: format!("n{id}:7400"), zone: zone(at) })
            .collect()
    }

    fn spans(counts: impl Iterator<Item = usize> + Clone) -> usize {
        counts.clone().max().unwrap_or(0) - counts.min().unwrap_or(0)
    }

    fn held(map: &[Vec<u64>], node: u64) -> usize {
        map.iter().filter(|replicas| replicas.contains(&node)).count()
    }

    fn led(map: &[Vec<u64>], node: u64) -> usize {
        map.iter().filter(|replicas| replicas[0] == node).count()
    }

    proptest! {
        #[test]
        fn every_shard_has_its_copies_on_different_nodes_and_no_node_more_than_its_part(
            ids in prop::collection::btree_set(1_u64..1_000, 1..12), shards in 1_u16..=256, copies in 1_usize..=5,
        ) {
            let ids: Vec<u64> = ids.into_iter().collect();
            let map = spread(&nodes(&ids, &[]), shards, copies);
            prop_assert_eq!(map.len(), usize::from(shards));
            for replicas in &map {
                let distinct: BTreeSet<_> = replicas.iter().collect();
                prop_assert_eq!(distinct.len(), copies.min(ids.len()));
                prop_assert_eq!(distinct.len(), replicas.len());
            }
            prop_assert!(spans(ids.iter().map(|id| held(&map, *id))) <= 1);
        }

        #[test]
        fn the_order_in_which_nodes_are_named_does_not_matter(shards in 1_u16..=64, seed in any::<u64>()) {
            let mut ids: Vec<u64> = vec![7, 3, 11, 5, 2];
            let sorted = spread(&nodes(&[2, 3, 5, 7, 11], &[]), shards, 3);
            ids.rotate_left((seed % 5) as usize);
            prop_assert_eq!(spread(&nodes(&ids, &[]), shards, 3), sorted);
        }
    }

    #[test]
    fn leaders_are_balanced_in_every_cluster_that_can_be_created() {
        for count in [1, 3, 5] {
            let ids: Vec<u64> = (1..=count).collect();
            for shards in 1..=256 {
                let map = spread(&nodes(&ids, &[]), shards, COPIES);
                assert!(spans(ids.iter().map(|id| led(&map, *id))) <= 2, "{count} nodes, {shards} shards");
            }
        }
    }

    #[test]
    fn three_nodes_lead_a_third_of_the_shards_each() {
        let map = spread(&nodes(&[1, 2, 3], &[]), 64, COPIES);
        let mut leads: Vec<_> = [1, 2, 3].map(|id| led(&map, id)).into();
        leads.sort_unstable();
        assert_eq!(leads, [21, 21, 22]);
    }

    #[test]
    fn zones_never_hold_two_copies_while_there_are_enough_of_them() {
        let nodes = nodes(&[1, 2, 3, 4, 5, 6, 7], &["a", "b", "c"]);
        let map = spread(&nodes, 128, COPIES);
        let zone = |id: u64| nodes.iter().find(|n| n.node_id == id).unwrap().zone.as_str();
        for replicas in &map {
            let zones: BTreeSet<_> = replicas.iter().map(|id| zone(*id)).collect();
            assert_eq!(zones.len(), 3);
        }
    }

    #[test]
    fn a_lone_node_holds_everything_once() {
        assert_eq!(spread(&nodes(&[9], &[]), 2, COPIES), [[9], [9]]);
    }
}

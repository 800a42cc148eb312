//! When a leader raises the state version of its shard.
//!
//! Owns the one rule: to the highest version that every replica of the shard, learners too, announces at this moment, once the leader
//! has applied its own first entry; so that in a cluster of older and newer programs no replica meets an entry that it would apply
//! otherwise than the rest. A replica that is away may come back with an older program: it is waited for. A new shard begins at
//! version 1 and is raised like any other. One `Raise` is under way at most: the next is judged by what the last one did.

use super::lead::Lead;

/// The version to propose; nothing while a replica is not heard, or the shard has what all can apply.
fn due(version: u32, announced: Option<u32>) -> Option<u32> {
    announced.filter(|announced| *announced > version)
}

impl Lead {
    /// Has a `Raise` proposed if one is due. Called while this replica leads and has applied its first entry.
    pub(super) fn look_for_raise(&self) {
        let version = self.replica.state_version();
        if let Some(to) = due(version, self.group.state_version_announced())
            && self.packer().raise(to)
        {
            tracing::info!(
                shard = self.replica.shard.0,
                from = version,
                to,
                "every replica can apply a newer state version"
            );
            self.wake.notify_one();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_raise_is_due_when_all_announce_more_than_there_is() {
        assert_eq!(due(1, None), None);
        assert_eq!(due(1, Some(1)), None);
        assert_eq!(due(2, Some(1)), None, "never back");
        assert_eq!(due(1, Some(3)), Some(3));
    }
}

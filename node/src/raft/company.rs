//! Commits that wait for company.
//!
//! openraft tells a follower of each commit; with no entry at hand it makes an append for that alone, which would double what
//! travels: entries that come one after the other are each followed by one. A follower has no use for it but to keep up, so it waits
//! here for the append that comes next, which tells of the newest commit as well, and goes alone only when none comes.
//!
//! Owns what waits of one session, and until when. Leaves time and sending to the session (`client`). An append with entries never
//! waits, none overtakes another, and the newest commit always goes in the end. That fewer leave than openraft made is safe: it takes
//! an answer as one to every append that ends at or before the entry it names (`replication/inflight_append_queue.rs`), and by that
//! takes the same moment for its lease whether they left or not.

use std::time::Duration;

use openraft::raft::AppendEntriesRequest;
use tokio::time::Instant;

use super::types::Types;
use crate::log::GroupId;

/// Longest that a follower is not told of a commit. It serves nobody before it leads, and then applies what it lacks first: of a
/// busy group one entry, of another what 100 ms brought.
pub(super) const COMMIT_WAIT: Duration = Duration::from_millis(100);

type Append = AppendEntriesRequest<Types>;

/// See the module.
#[derive(Debug)]
pub(super) struct Company {
    /// The followers of the meta group serve gateways what it committed.
    waits: bool,
    /// The first append of a session may be a question about the log.
    has_begun: bool,
    held: Option<(Append, Instant)>,
}

impl Company {
    /// Of a session that begins.
    pub(super) fn new(group: GroupId) -> Company {
        Company { waits: group != GroupId::META, has_begun: false, held: None }
    }

    /// Takes the next append; what is to be sent now.
    pub(super) fn take(&mut self, append: Append, now: Instant) -> Option<Append> {
        if self.waits && self.has_begun && append.entries.is_empty() {
            let until = self.until().unwrap_or(now + COMMIT_WAIT);
            self.held = Some((append, until));
            return None;
        }
        self.has_begun = true;
        // What waited knew of no newer commit.
        self.held = None;
        Some(append)
    }

    /// When what waits goes alone; `None` when nothing waits.
    pub(super) fn until(&self) -> Option<Instant> {
        self.held.as_ref().map(|(_, until)| *until)
    }

    /// What waits, to be sent now: its time has come, or nothing more does.
    pub(super) fn release(&mut self) -> Option<Append> {
        self.held.take().map(|(append, _)| append)
    }
}

#[cfg(test)]
mod tests {
    use openraft::{Entry, EntryPayload};

    use super::*;
    use crate::raft::types::{LogId, Vote, log_id};

    const SHARD: GroupId = GroupId(1);

    fn at(index: u64) -> LogId {
        log_id(crate::log::Index { term: 1, index })
    }

    fn append(entries: std::ops::Range<u64>, committed: u64) -> Append {
        Append {
            vote: Vote::new_committed(1, 1),
            prev_log_id: Some(at(entries.start - 1)),
            entries: entries.map(|index| Entry { log_id: at(index), payload: EntryPayload::Blank }).collect(),
            leader_commit: Some(at(committed)),
        }
    }

    /// What is told to be committed.
    fn committed(append: Option<Append>) -> Option<u64> {
        append.map(|append| append.leader_commit.unwrap().index())
    }
    #[test]
    fn what_a_session_begins_with_goes_at_once_and_so_does_what_has_entries() {
        let (mut company, now) = (Company::new(SHARD), Instant::now());
        assert_eq!(committed(company.take(append(5..5, 3), now)), Some(3));
        assert_eq!(committed(company.take(append(5..6, 4), now)), Some(4));
        assert_eq!(company.until(), None);
    }

    #[test]
    fn a_commit_waits_for_the_next_entry_which_tells_of_the_newest_one() {
        let (mut company, now) = (Company::new(SHARD), Instant::now());
        company.take(append(5..6, 4), now);
        assert_eq!(committed(company.take(append(6..6, 5), now)), None);
        assert_eq!(company.until(), Some(now + COMMIT_WAIT));
        assert_eq!(committed(company.take(append(6..7, 5), now)), Some(5));
        assert_eq!(company.until(), None);
        assert_eq!(committed(company.release()), None, "it is not told again");
    }

    #[test]
    fn the_newest_commit_goes_alone_when_the_first_that_waited_has_waited_long_enough() {
        let (mut company, now) = (Company::new(SHARD), Instant::now());
        company.take(append(5..8, 4), now);
        company.take(append(8..8, 5), now);
        assert_eq!(committed(company.take(append(8..8, 7), now + COMMIT_WAIT / 2)), None);
        assert_eq!(company.until(), Some(now + COMMIT_WAIT), "commits that keep coming put it off no further");
        assert_eq!(committed(company.release()), Some(7));
        assert_eq!(company.until(), None);
    }

    #[test]
    fn a_commit_of_the_meta_group_waits_for_nothing() {
        let (mut company, now) = (Company::new(GroupId::META), Instant::now());
        company.take(append(5..6, 4), now);
        assert_eq!(committed(company.take(append(6..6, 5), now)), Some(5));
    }
}

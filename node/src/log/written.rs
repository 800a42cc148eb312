//! One group as of what is written: its small facts, and in which segments its live entries stand.
//!
//! Owned by the writer. What a new segment opens with, what is copied forward and which old segments may go is decided by this
//! alone, never by what is still queued: a purge that is not on disk frees nothing.

use super::{Index, kept::Kept, recover::Facts};

/// Entries of consecutive indexes in one segment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Run {
    pub(super) first: u64,
    pub(super) last: u64,
    pub(super) segment: u64,
}

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Written {
    pub(super) facts: Facts,
    /// By index; copies stand in later segments than what follows them.
    runs: Vec<Run>,
}

impl Written {
    /// As a start finds it.
    pub(super) fn of(kept: &Kept) -> Written {
        let mut written = Written { facts: Facts::of(kept), ..Written::default() };
        for slot in kept.slots(0, u64::MAX) {
            if let Some(place) = slot.place {
                written.append(slot.at.index, place.segment);
            }
        }
        written
    }

    /// An entry was written, after all others.
    pub(super) fn append(&mut self, index: u64, segment: u64) {
        match self.runs.last_mut() {
            Some(run) if run.segment == segment && run.last + 1 == index => run.last = index,
            _ => self.runs.push(Run { first: index, last: index, segment }),
        }
    }

    /// Entries from `index` on are gone.
    pub(super) fn truncate(&mut self, index: u64) {
        self.runs.retain(|run| run.first < index);
        if let (Some(run), Some(before)) = (self.runs.last_mut(), index.checked_sub(1)) {
            run.last = run.last.min(before);
        }
    }

    /// Entries up to `at` are gone.
    pub(super) fn purge(&mut self, at: Index) {
        self.facts.purged = self.facts.purged.max(Some(at));
        self.runs.retain(|run| run.last > at.index);
        if let Some(run) = self.runs.first_mut() {
            run.first = run.first.max(at.index + 1);
        }
    }

    /// Whether the entry at `index` is live and stands in `segment`.
    pub(super) fn stands_in(&self, index: u64, segment: u64) -> bool {
        self.runs.iter().any(|run| run.segment == segment && (run.first..=run.last).contains(&index))
    }

    /// The live entry at `index` stands in segment `to` now.
    pub(super) fn moved(&mut self, index: u64, to: u64) {
        let Some(at) = self.runs.iter().position(|run| (run.first..=run.last).contains(&index)) else { return };
        let old = self.runs.remove(at);
        let parts = [
            Run { last: index.wrapping_sub(1), ..old },
            Run { first: index, last: index, segment: to },
            Run { first: index + 1, ..old },
        ];
        let there = [old.first < index, true, index < old.last];
        let parts = parts.into_iter().zip(there).filter_map(|(run, there)| there.then_some(run));
        self.runs.splice(at..at, parts);
        self.runs.dedup_by(|next, run| {
            let joins = run.segment == next.segment && run.last + 1 == next.first;
            if joins {
                run.last = next.last;
            }
            joins
        });
    }

    /// The oldest segment that holds a live entry.
    pub(super) fn oldest(&self) -> Option<u64> {
        self.runs.iter().map(|run| run.segment).min()
    }

    /// Live entries in segments before `segment`.
    pub(super) fn before(&self, segment: u64) -> impl Iterator<Item = Run> {
        self.runs.iter().copied().filter(move |run| run.segment < segment)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn written(runs: &[(u64, u64, u64)]) -> Written {
        let mut written = Written::default();
        for (first, last, segment) in runs {
            (*first..=*last).for_each(|index| written.append(index, *segment));
        }
        written
    }

    fn runs(written: &Written) -> Vec<(u64, u64, u64)> {
        written.runs.iter().map(|run| (run.first, run.last, run.segment)).collect()
    }

    #[test]
    fn entries_are_remembered_by_segment_and_forgotten_from_both_ends() {
        let mut one = written(&[(3, 9, 1), (10, 12, 2)]);
        assert_eq!(runs(&one), [(3, 9, 1), (10, 12, 2)]);
        one.purge(Index { term: 1, index: 4 });
        one.truncate(11);
        assert_eq!(runs(&one), [(5, 9, 1), (10, 10, 2)]);
        one.truncate(7);
        one.append(7, 2);
        assert_eq!(runs(&one), [(5, 6, 1), (7, 7, 2)]);
        one.purge(Index { term: 1, index: 6 });
        assert_eq!((runs(&one), one.oldest()), (vec![(7, 7, 2)], Some(2)));
        one.truncate(0);
        assert_eq!((runs(&one), one.oldest()), (vec![], None));
    }

    #[test]
    fn what_is_copied_forward_no_longer_pins_its_segment() {
        let mut one = written(&[(3, 6, 1), (7, 8, 2)]);
        for index in 3..=5 {
            assert!(one.stands_in(index, 1));
            one.moved(index, 4);
        }
        assert_eq!((runs(&one), one.oldest()), (vec![(3, 5, 4), (6, 6, 1), (7, 8, 2)], Some(1)));
        one.moved(6, 4);
        assert_eq!((runs(&one), one.oldest()), (vec![(3, 6, 4), (7, 8, 2)], Some(2)));
        assert!(!one.stands_in(6, 1));
        assert_eq!(one.before(4).map(|run| run.last).max(), Some(8));
        one.moved(99, 4);
        assert_eq!(runs(&one), [(3, 6, 4), (7, 8, 2)]);
    }

    #[test]
    fn an_entry_in_the_middle_of_a_run_can_move_alone() {
        let mut one = written(&[(3, 6, 1)]);
        one.moved(4, 2);
        assert_eq!(runs(&one), [(3, 3, 1), (4, 4, 2), (5, 6, 1)]);
        one.moved(3, 2);
        one.moved(5, 2);
        one.moved(6, 2);
        assert_eq!(runs(&one), [(3, 6, 2)]);
    }
}

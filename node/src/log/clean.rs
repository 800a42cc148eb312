//! Which old segments go, who holds them up, and when that is worth copying: a value.
//!
//! Segments go oldest first, when every group has purged past them. The small facts of a group (vote, purge point, committed
//! index) hold up nothing: every segment opens with those of all groups. Entries do. With what is kept, in bytes:
//!
//! - above `ask`, groups whose entries stand in the oldest segments are named ([`Pin`]): whoever checkpoints does them first and
//!   purges them that far;
//! - above `copy`, halfway to the bound, the few entries that still stand in the oldest segment (of idle groups, or of a group
//!   whose purge waits for a peer) are copied forward by the writer, if they are less than a quarter of it: freeing a segment
//!   never costs more than a quarter of its writing;
//! - above `bound` leaders refuse enqueues ([`super::Log::is_over_bound`]).

use std::collections::BTreeMap;

use super::{GroupId, written::Written};

/// Bytes at which something is done about the length of the log.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Marks {
    pub(super) ask: u64,
    pub(super) bound: u64,
}

impl Marks {
    /// Entries are copied from here on.
    fn copy(self) -> u64 {
        self.ask + self.bound.saturating_sub(self.ask) / 2
    }
}

/// A group that holds up the removal of old segments.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pin {
    /// Which.
    pub group: GroupId,
    /// Purged up to this index it would no longer.
    pub upto: u64,
}

/// Ranges of indexes, first and last, of each group whose entries stand in one segment.
pub(super) type Ranges = BTreeMap<GroupId, Vec<(u64, u64)>>;

/// Entries to be copied forward out of one segment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Copying {
    pub(super) segment: u64,
    /// Where its live entries are.
    pub(super) entries: Ranges,
}

/// What is to be done.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Plan {
    /// Segments before this one are not needed.
    pub(super) needed: u64,
    pub(super) pins: Vec<Pin>,
    pub(super) copying: Option<Copying>,
    pub(super) over_bound: bool,
}

/// Decides, given the segments in use (sequence and bytes, oldest first) and the groups as of what is written.
pub(super) fn plan<'a>(
    segments: &[(u64, u64)],
    current: u64,
    groups: impl Iterator<Item = (GroupId, &'a Written)> + Clone,
    marks: Marks,
) -> Plan {
    let needed = groups.clone().filter_map(|(_, written)| written.oldest()).min().unwrap_or(current).min(current);
    let kept = segments.iter().filter(|(sequence, _)| *sequence >= needed);
    let mut bytes: u64 = kept.clone().map(|(_, bytes)| bytes).sum();
    let mut plan = Plan { needed, over_bound: bytes > marks.bound, ..Plan::default() };
    if bytes > marks.copy() && needed < current {
        let mut entries = Ranges::new();
        for (group, written) in groups.clone() {
            let here = written.before(needed + 1).map(|run| (run.first, run.last));
            let here: Vec<_> = here.collect();
            if !here.is_empty() {
                entries.insert(group, here);
            }
        }
        plan.copying = Some(Copying { segment: needed, entries });
    }
    // Segments that must go so that the rest is short enough; the current one stays in any case.
    let mut first = needed;
    for (sequence, of) in kept {
        if bytes <= marks.ask {
            break;
        }
        bytes -= of;
        first = sequence + 1;
    }
    let first = first.min(current);
    plan.pins = groups
        .filter_map(|(group, written)| {
            let upto = written.before(first).map(|run| run.last).max()?;
            Some(Pin { group, upto })
        })
        .collect();
    plan
}

#[cfg(test)]
mod tests {
    use super::*;

    const MARKS: Marks = Marks { ask: 300, bound: 500 };

    fn written(runs: &[(u64, u64, u64)]) -> Written {
        let mut written = Written::default();
        for (first, last, segment) in runs {
            (*first..=*last).for_each(|index| written.append(index, *segment));
        }
        written
    }

    fn plan_of(segments: u64, groups: &[&[(u64, u64, u64)]]) -> Plan {
        let segments: Vec<_> = (1..=segments).map(|sequence| (sequence, 100)).collect();
        let groups: Vec<_> = groups.iter().map(|runs| written(runs)).collect();
        let numbered = groups.iter().enumerate().map(|(n, written)| (GroupId(n as u32), written));
        plan(&segments, segments.len() as u64, numbered, MARKS)
    }

    fn pin(group: u32, upto: u64) -> Pin {
        Pin { group: GroupId(group), upto }
    }

    #[test]
    fn segments_that_every_group_has_purged_past_are_not_needed() {
        assert_eq!(plan_of(5, &[&[(7, 9, 4)], &[(3, 9, 3), (10, 11, 5)]]).needed, 3);
        assert_eq!(plan_of(5, &[&[]]).needed, 5);
        assert_eq!(plan_of(5, &[]).needed, 5);
    }

    #[test]
    fn nobody_is_asked_while_the_log_is_short() {
        let plan = plan_of(3, &[&[(1, 9, 1)]]);
        assert_eq!(plan, Plan { needed: 1, ..Plan::default() });
    }

    #[test]
    fn above_the_first_mark_those_who_pin_what_must_go_are_named_with_their_index() {
        let plan = plan_of(4, &[&[(1, 9, 1), (10, 19, 2)], &[(1, 4, 4)], &[(5, 6, 1), (7, 7, 3)]]);
        assert_eq!((plan.pins, plan.copying, plan.over_bound), (vec![pin(0, 9), pin(2, 6)], None, false));
    }

    #[test]
    fn halfway_to_the_bound_what_stands_in_the_oldest_segment_is_to_be_copied() {
        let plan = plan_of(5, &[&[(1, 9, 1), (10, 19, 2)], &[(1, 4, 4)], &[(5, 6, 1), (7, 7, 3)]]);
        let entries = Ranges::from([(GroupId(0), vec![(1, 9)]), (GroupId(2), vec![(5, 6)])]);
        assert_eq!(plan.copying, Some(Copying { segment: 1, entries }));
        assert_eq!(plan.pins, [pin(0, 19), pin(2, 6)]);
        assert!(!plan.over_bound);
    }

    #[test]
    fn above_the_bound_it_says_so_until_what_is_kept_is_short_again() {
        assert!(plan_of(6, &[&[(1, 9, 1)]]).over_bound);
        assert!(!plan_of(6, &[&[(1, 9, 2)]]).over_bound);
    }

    #[test]
    fn the_current_segment_pins_nothing() {
        let segments = [(1, 1_000)];
        let one = written(&[(1, 9, 1)]);
        let plan = plan(&segments, 1, [(GroupId(0), &one)].into_iter(), MARKS);
        assert_eq!((plan.pins, plan.copying), (vec![], None));
    }
}

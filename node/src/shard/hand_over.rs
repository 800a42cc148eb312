//! Which publishes go to which shards next: a value.
//!
//! Owns, for the homes that this node leads, what each shard has not confirmed, and when a shard that did not answer is asked again.
//! Owns no rows and no connection: [`super::courier`] reads, carries and tells. Nothing here is lost with the process: a new
//! leader hands everything over again that its rows hold, and a shard knows what it has. The invariant: a publish is over only
//! when every shard confirmed it or its time is over; to one shard, publishes of one home go in their order.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::{Duration, Instant},
};

use bytes::Bytes;
use martlet_proto::{
    cluster::queue::{FanOut, Operation, operation},
    message::Sequence,
    shard::Shard,
};

use crate::store::key::publish::HomeRow;

/// Publishes that go to one shard at once.
const AT_ONCE: usize = 64;
/// First wait before a shard that did not take what it was sent is asked again; doubled up to [`AGAIN_MAX`].
const AGAIN_MIN: Duration = Duration::from_millis(50);
/// Longest such wait.
const AGAIN_MAX: Duration = Duration::from_secs(2);
/// What was said to be over, and is kept all the same, is said again.
const SAY_AGAIN: Duration = Duration::from_secs(30);

/// A publish: the shard that keeps it, and its place there.
pub(super) type Place = (Shard, Sequence);

/// The book.
#[derive(Debug, Default)]
pub(super) struct HandOver {
    kept: BTreeMap<Place, Kept>,
    shards: BTreeMap<Shard, Way>,
}

#[derive(Debug)]
struct Kept {
    row: HomeRow,
    missing: BTreeSet<Shard>,
    said_over: Option<Instant>,
}

/// How it stands with one shard.
#[derive(Debug, Default)]
struct Way {
    is_asked: bool,
    again_at: Option<Instant>,
    wait: Duration,
}

impl HandOver {
    /// What is kept at `home` now: all of it, or the first so many. Nothing is kept where this node does not lead.
    pub(super) fn keeps(&mut self, home: Shard, rows: Vec<(Sequence, HomeRow)>, shards: impl Fn() -> Vec<Shard>) {
        let places: BTreeSet<Sequence> = rows.iter().map(|(place, _)| *place).collect();
        self.kept.retain(|(of, place), _| *of != home || places.contains(place));
        for (place, row) in rows {
            self.kept.entry((home, place)).or_insert_with(|| Kept {
                row,
                missing: shards().into_iter().collect(),
                said_over: None,
            });
        }
    }

    /// Only these homes are led here.
    pub(super) fn leads(&mut self, homes: &BTreeSet<Shard>) {
        self.kept.retain(|(home, _), _| homes.contains(home));
    }

    /// What is over everywhere and was not said to be, lately. `home_ms` is the time of a home.
    pub(super) fn over(&mut self, now: Instant, home_ms: impl Fn(Shard) -> Option<u64>) -> Vec<Place> {
        let mut over = Vec::new();
        for ((home, place), kept) in &mut self.kept {
            let is_late = home_ms(*home).is_some_and(|now_ms| kept.row.expiry_ms <= now_ms);
            let is_said = kept.said_over.is_some_and(|at| now.saturating_duration_since(at) < SAY_AGAIN);
            if (is_late || kept.missing.is_empty()) && !is_said {
                kept.said_over = Some(now);
                over.push((*home, *place));
            }
        }
        over
    }

    /// The shards to be sent to now, each with what it is sent. They count as asked until [`HandOver::answered`].
    pub(super) fn due(
        &mut self,
        now: Instant,
        home_ms: impl Fn(Shard) -> Option<u64>,
    ) -> BTreeMap<Shard, Vec<(Place, Operation)>> {
        let mut open_from: BTreeMap<Shard, Sequence> = BTreeMap::new();
        for ((home, place), kept) in &self.kept {
            if !kept.missing.is_empty() {
                open_from.entry(*home).or_insert(*place);
            }
        }
        let mut due: BTreeMap<Shard, Vec<(Place, Operation)>> = BTreeMap::new();
        for (at @ (home, place), kept) in &self.kept {
            let Some(now_ms) = home_ms(*home) else { continue };
            let remaining_ms = kept.row.expiry_ms.saturating_sub(now_ms);
            if remaining_ms == 0 {
                continue;
            }
            for shard in &kept.missing {
                let way = self.shards.entry(*shard).or_default();
                let batch = due.entry(*shard).or_default();
                if way.is_asked || way.again_at.is_some_and(|at| at > now) || batch.len() == AT_ONCE {
                    continue;
                }
                let fan_out = FanOut {
                    publish_id: kept.row.publish_id.clone(),
                    home: u32::from(home.0),
                    place: Bytes::copy_from_slice(&place.to_bytes()),
                    open_from: open_from
                        .get(home)
                        .map(|from| Bytes::copy_from_slice(&from.to_bytes()))
                        .unwrap_or_default(),
                    remaining_ms,
                    publish: Some(kept.row.publish.clone()),
                };
                let kind = Some(operation::Kind::FanOut(fan_out));
                batch.push((*at, Operation { id: kept.row.publish_id.clone(), first_try_ms: 0, kind }));
            }
        }
        due.retain(|_, batch| !batch.is_empty());
        for shard in due.keys() {
            self.shards.entry(*shard).or_default().is_asked = true;
        }
        due
    }

    /// The shard was not sent what was due, and is due as before.
    pub(super) fn not_sent(&mut self, shard: Shard) {
        self.shards.entry(shard).or_default().is_asked = false;
    }

    /// A shard confirmed these of what it was sent; `is_whole` if that was all of it.
    pub(super) fn answered(&mut self, shard: Shard, confirmed: &[Place], is_whole: bool, now: Instant) {
        for place in confirmed {
            if let Some(kept) = self.kept.get_mut(place) {
                kept.missing.remove(&shard);
            }
        }
        let way = self.shards.entry(shard).or_default();
        way.is_asked = false;
        if is_whole {
            *way = Way::default();
        } else {
            way.wait = (way.wait * 2).clamp(AGAIN_MIN, AGAIN_MAX);
            way.again_at = Some(now + way.wait);
        }
    }

    /// When [`HandOver::due`] may have more, if nothing else happens.
    pub(super) fn next_at(&self) -> Option<Instant> {
        let is_open = self.kept.values().any(|kept| !kept.missing.is_empty());
        self.shards.values().filter_map(|way| way.again_at).min().filter(|_| is_open)
    }
}

#[cfg(test)]
mod tests {
    use martlet_proto::cluster::queue::Publish;

    use super::*;

    const HOME: Shard = Shard(3);

    fn at(index: u64) -> Sequence {
        Sequence { incarnation: 0, index, position: 0 }
    }

    fn row(expiry_ms: u64) -> HomeRow {
        HomeRow { publish_id: Bytes::from_static(&[7; 16]), expiry_ms, publish: Publish::default() }
    }

    #[expect(clippy::disallowed_methods, reason = "an origin for made-up instants")]
    fn origin() -> Instant {
        Instant::now()
    }

    fn keeping(places: &[u64]) -> HandOver {
        let mut book = HandOver::default();
        book.keeps(HOME, places.iter().map(|index| (at(*index), row(9_000))).collect(), || vec![Shard(0), Shard(1)]);
        book
    }

    fn sent(due: &BTreeMap<Shard, Vec<(Place, Operation)>>) -> Vec<(u16, Vec<u64>)> {
        let indexes = |batch: &Vec<(Place, Operation)>| batch.iter().map(|((_, place), _)| place.index).collect();
        due.iter().map(|(shard, batch)| (shard.0, indexes(batch))).collect()
    }

    #[test]
    fn each_shard_gets_all_in_order_once_and_what_all_have_is_over_once() {
        let (mut book, now) = (keeping(&[1, 2]), origin());
        assert_eq!(sent(&book.due(now, |_| Some(0))), [(0, vec![1, 2]), (1, vec![1, 2])]);
        assert_eq!(sent(&book.due(now, |_| Some(0))), [], "asked, and not answered");
        book.answered(Shard(0), &[(HOME, at(1)), (HOME, at(2))], true, now);
        book.answered(Shard(1), &[(HOME, at(1))], true, now);
        assert_eq!(book.over(now, |_| Some(0)), [(HOME, at(1))]);
        assert_eq!(book.over(now, |_| Some(0)), [], "said already");
        let due = book.due(now, |_| Some(0));
        assert_eq!(sent(&due), [(1, vec![2])]);
        let Some(operation::Kind::FanOut(fan_out)) = &due[&Shard(1)][0].1.kind else { panic!("a fan-out") };
        assert_eq!((Sequence::from_bytes(&fan_out.open_from), fan_out.remaining_ms), (Some(at(2)), 9_000));
        assert_eq!(book.over(now + SAY_AGAIN, |_| Some(0)), [(HOME, at(1))], "its row is there all the same");
    }

    #[test]
    fn a_shard_that_does_not_answer_is_asked_again_later_and_holds_up_no_other() {
        let (mut book, now) = (keeping(&[1]), origin());
        book.due(now, |_| Some(0));
        book.answered(Shard(0), &[], false, now);
        book.answered(Shard(1), &[(HOME, at(1))], true, now);
        assert_eq!(sent(&book.due(now, |_| Some(0))), []);
        assert_eq!(book.next_at(), Some(now + AGAIN_MIN));
        assert_eq!(sent(&book.due(now + AGAIN_MIN, |_| Some(0))), [(0, vec![1])]);
        book.answered(Shard(0), &[], false, now);
        assert_eq!(book.next_at(), Some(now + 2 * AGAIN_MIN));
    }

    #[test]
    fn what_ran_out_is_over_and_sent_no_more_and_what_is_not_led_is_forgotten() {
        let (mut book, now) = (keeping(&[1]), origin());
        assert_eq!(sent(&book.due(now, |_| Some(9_000))), []);
        assert_eq!(book.over(now, |_| Some(9_000)), [(HOME, at(1))]);
        book.leads(&BTreeSet::new());
        assert!(book.kept.is_empty() && book.next_at().is_none());
    }
}

//! What a start finds: replays the segments, tells a torn tail from damage, and makes what it keeps durable again.
//!
//! - A bad record of the last drain is a torn tail: the drain is dropped whole and reported, and the node has to be caught up.
//!   It may have been a flipped bit in a synced record instead; that is why.
//! - A bad record with a whole record of a later drain behind it, in an earlier segment, or in a log that was closed cleanly,
//!   was once synced: refused with file and offset.
//! - Entries that were copied forward stand behind what follows them, and what they were copied from may be gone. They are put
//!   back in front of it; they never change what the log already has.
//! - Bytes that a killed process had only written are still readable, and may never have reached the disk. So the last drain
//!   is written anew into a segment of its own, synced, before anything is answered. The segment appears under its name only
//!   then, and its header records the cut: what it replaces is not judged again.

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
};

use bytes::Bytes;

use super::{
    GroupId, Index, LogConfig, LogError, Recovered,
    kept::{Kept, Place},
    record::{self, Kind, Parsed, Record},
    segment::{self, Cut, HEADER_BYTES, Header, Segment},
};
use crate::{bug::Bug, disk::Disk};

/// What the log goes on from.
#[derive(Debug)]
pub(super) struct Found {
    pub(super) groups: BTreeMap<GroupId, Kept>,
    /// All in use, the current one included.
    pub(super) segments: BTreeMap<u64, Segment>,
    pub(super) current: Segment,
    /// Where the next drain goes in it.
    pub(super) offset: u64,
    pub(super) next_drain: u64,
    pub(super) next_sequence: u64,
    /// Groups that are not marked caught up are behind.
    pub(super) behind: bool,
    pub(super) recovered: Recovered,
}

pub(super) fn recover(config: &LogConfig, disk: &dyn Disk) -> Result<Found, LogError> {
    let io = |source: io::Error| LogError::Io { path: config.dir.display().to_string(), source };
    let mut all = BTreeMap::new();
    for path in segment::names(disk, &config.dir).map_err(io)? {
        let segment = Segment::open(disk, &path)?;
        all.insert(segment.header.sequence, segment);
    }
    let next_sequence = all.keys().next_back().map_or(1, |last| last + 1);
    let chain = chain(&all)?;
    let in_chain: BTreeSet<u64> = chain.iter().map(|segment| segment.header.sequence).collect();

    let mut replay = Replay::new(config.cache_bytes, chain.first().map_or(1, |first| first.header.first_drain));
    let cuts: BTreeMap<u64, u64> =
        chain.iter().filter_map(|s| s.header.cut).map(|cut| (cut.segment, cut.offset)).collect();
    let mut tail = Tail::default();
    for (position, segment) in chain.iter().enumerate() {
        let cut = cuts.get(&segment.header.sequence).copied();
        tail = replay.segment(segment, cut, position + 1 == chain.len()).map_err(|e| match e {
            Failure::Io(source) => LogError::Io { path: segment.path.display().to_string(), source },
            Failure::Damaged { offset, what } => LogError::Damaged { file: segment.name(), offset, what },
        })?;
    }
    replay.join_copies()?;
    replay.check_gaps()?;

    for (sequence, segment) in &all {
        // Spares first: on a full disk the new segment takes their room.
        if !in_chain.contains(sequence) && !segment.header.active {
            disk.remove(&segment.path).map_err(io)?;
        }
    }
    let behind = replay.behind || tail.dropped.is_some();
    if tail.dropped.is_some() {
        for kept in replay.groups.values_mut() {
            kept.caught_up = false;
        }
    }
    let renewed =
        renew(config, disk, &mut replay.groups, chain.last().copied(), &tail, next_sequence, behind).map_err(io)?;
    let mut segments: BTreeMap<u64, Segment> = BTreeMap::new();
    for (sequence, segment) in &all {
        if in_chain.contains(sequence) && renewed.replaced != Some(*sequence) {
            segments.insert(*sequence, segment.clone());
        } else if segment.header.active {
            // What the new segment replaces, and what an earlier start replaced before it was ended.
            disk.remove(&segment.path).map_err(io)?;
        }
    }
    disk.sync_dir(&config.dir).map_err(io)?;
    segments.insert(next_sequence, renewed.segment.clone());
    let recovered = Recovered { dropped: tail.dropped, catch_up: behind, segments: chain.len(), clean: tail.ended };
    Ok(Found {
        groups: replay.groups,
        segments,
        current: renewed.segment,
        offset: renewed.offset,
        next_drain: renewed.next_drain,
        next_sequence: next_sequence + 1,
        behind,
        recovered,
    })
}

/// Segments in use, oldest first, each naming the one before.
fn chain(all: &BTreeMap<u64, Segment>) -> Result<Vec<&Segment>, LogError> {
    let damaged = |segment: &Segment, what: String| LogError::Damaged { file: segment.name(), offset: 0, what };
    let mut chain = Vec::new();
    let mut next = all.values().rev().find(|segment| segment.header.active);
    if next.is_none()
        && let Some(spare) = all.values().next()
    {
        return Err(damaged(spare, "a spare segment, and none that is in use".to_owned()));
    }
    while let Some(segment) = next {
        chain.push(segment);
        next = all.get(&segment.header.previous);
    }
    chain.reverse();
    if let Some(first) = chain.first()
        && let Some(older) = all.values().find(|s| s.header.active && s.header.sequence < first.header.previous)
    {
        let missing = first.header.previous;
        return Err(damaged(older, format!("segment {missing:016x}, which followed, is missing")));
    }
    Ok(chain)
}

/// How the last segment ends.
#[derive(Debug, Default)]
struct Tail {
    /// The last whole drain that is not an end mark: where it begins, its number, its entries and truncations.
    last: Option<(u64, u64, Vec<Owned>)>,
    ended: bool,
    dropped: Option<String>,
}

/// A record that outlives its segment's bytes.
#[derive(Debug)]
struct Owned {
    kind: Kind,
    group: GroupId,
    at: Index,
    payload: Bytes,
}

#[derive(Debug)]
enum Failure {
    Io(io::Error),
    Damaged { offset: u64, what: String },
}

impl From<io::Error> for Failure {
    fn from(e: io::Error) -> Failure {
        Failure::Io(e)
    }
}

struct Replay {
    groups: BTreeMap<GroupId, Kept>,
    cache_bytes: usize,
    /// Number of the next drain.
    drain: u64,
    behind: bool,
    /// Groups whose first entry was not preceded by anything: the purge that explains it must come.
    gaps: BTreeMap<GroupId, (u64, String, u64)>,
    /// Copied entries that the log does not have otherwise: they come before those in `groups`.
    copies: BTreeMap<GroupId, BTreeMap<u64, Copied>>,
}

struct Copied {
    at: Index,
    payload: Bytes,
    place: Place,
    segment: String,
}

impl Replay {
    fn new(cache_bytes: usize, drain: u64) -> Replay {
        Replay {
            groups: BTreeMap::new(),
            cache_bytes,
            drain,
            behind: false,
            gaps: BTreeMap::new(),
            copies: BTreeMap::new(),
        }
    }

    fn segment(&mut self, segment: &Segment, cut: Option<u64>, newest: bool) -> Result<Tail, Failure> {
        let header = &segment.header;
        let damaged = |offset: usize, what: String| Failure::Damaged { offset: (HEADER_BYTES + offset) as u64, what };
        if header.first_drain != self.drain {
            let what = format!("begins with drain {}, but {} was due", header.first_drain, self.drain);
            return Err(Failure::Damaged { offset: 0, what });
        }
        self.behind = header.catch_up;
        if header.catch_up {
            self.groups.values_mut().for_each(|kept| kept.caught_up = false);
        }
        let bytes = segment.read_records()?;
        let end = cut.map_or(bytes.len(), |offset| usize::try_from(offset).unwrap_or(usize::MAX) - HEADER_BYTES);
        let bytes = bytes.get(..end).ok_or_else(|| damaged(0, "cut outside of the segment".to_owned()))?;

        let mut tail = Tail::default();
        let mut drain: Vec<(Record<'_>, usize)> = Vec::new();
        let mut at = 0;
        loop {
            let why = match record::parse(&bytes[at..], header.salt) {
                Parsed::Whole(record) if record.drain == self.drain => {
                    drain.push((record, at));
                    at += record.size();
                    if record.kind.seals() {
                        self.finish(segment, &mut drain, &mut tail)?;
                    }
                    continue;
                }
                Parsed::Blank if drain.is_empty() => return Ok(tail),
                Parsed::Blank => "drain without its seal".to_owned(),
                Parsed::Whole(record) => format!("record of drain {} in drain {}", record.drain, self.drain),
                Parsed::Bad(why) => why.to_owned(),
            };
            if !newest || cut.is_some() || tail.ended || record::later_drain(&bytes[at..], header.salt, self.drain) {
                return Err(damaged(at, why));
            }
            let whole = drain.len();
            tail.dropped = Some(format!(
                "{}:{}: {why}; drain {} dropped, of which {whole} records were whole",
                segment.name(),
                HEADER_BYTES + at,
                self.drain,
            ));
            return Ok(tail);
        }
    }

    /// Applies a whole drain.
    fn finish(
        &mut self,
        segment: &Segment,
        drain: &mut Vec<(Record<'_>, usize)>,
        tail: &mut Tail,
    ) -> Result<(), Failure> {
        let mut owned = Vec::new();
        let start = drain.first().map_or(0, |(_, at)| HEADER_BYTES + at) as u64;
        for (record, at) in drain.drain(..) {
            if record.kind == Kind::End {
                tail.ended = true;
                self.drain += 1;
                return Ok(());
            }
            let offset = (HEADER_BYTES + at) as u64;
            let place = Place { segment: segment.header.sequence, offset, size: record.size() as u32 };
            let payload = Bytes::copy_from_slice(record.payload);
            if matches!(record.kind, Kind::Append | Kind::CopiedAppend | Kind::Truncate) {
                owned.push(Owned { kind: record.kind, group: record.group, at: record.at, payload: payload.clone() });
            }
            self.apply(&record, payload, place, segment).map_err(|what| Failure::Damaged { offset, what })?;
        }
        for kept in self.groups.values_mut() {
            kept.shrink(self.cache_bytes);
        }
        tail.ended = false;
        tail.last = Some((start, self.drain, owned));
        self.drain += 1;
        Ok(())
    }

    fn apply(&mut self, record: &Record<'_>, payload: Bytes, place: Place, segment: &Segment) -> Result<(), String> {
        if matches!(record.kind, Kind::Seal | Kind::End) {
            return Ok(());
        }
        let kept = self.groups.entry(record.group).or_default();
        let at = record.at;
        let kind = match record.kind {
            Kind::CopiedAppend if Bug::CopyForwardTruncates.is_in() => {
                kept.truncate(at.index);
                Kind::Append
            }
            kind => kind,
        };
        match kind {
            Kind::Append | Kind::CopiedAppend if kept.purged.is_some_and(|purged| at.index <= purged.index) => {}
            Kind::CopiedAppend => {
                if !kept.moved(at, place).map_err(|why| format!("{}: {why}", record.group))? {
                    let copied = Copied { at, payload, place, segment: segment.name() };
                    self.copies.entry(record.group).or_default().insert(at.index, copied);
                }
            }
            Kind::Append if kept.is_empty() => {
                // Whatever was before went with its segment; then a copy of it or a purge of at least that much follows.
                let due = kept.purged.map_or(1, |purged| purged.index + 1);
                if at.index > due {
                    self.gaps.insert(record.group, (at.index - 1, segment.name(), place.offset));
                }
                kept.push_first(at, payload, place);
            }
            Kind::Append => {
                kept.push(at, payload, Some(place)).map_err(|why| format!("{}: {why}", record.group))?;
            }
            Kind::Truncate => {
                kept.truncate(at.index);
                if let Some(copies) = self.copies.get_mut(&record.group) {
                    copies.split_off(&at.index);
                }
                // What a gap was found before may be gone too: then only what lies before the truncation must be explained, and
                // nothing when that is the beginning.
                if let Some((before, ..)) = self.gaps.get_mut(&record.group)
                    && at.index <= *before
                {
                    let due = kept.purged.map_or(1, |purged| purged.index + 1);
                    if at.index > due {
                        *before = at.index - 1;
                    } else {
                        self.gaps.remove(&record.group);
                    }
                }
            }
            Kind::Purge | Kind::CopiedPurge => {
                kept.purge(at);
                if let Some(copies) = self.copies.get_mut(&record.group) {
                    *copies = copies.split_off(&(at.index + 1));
                }
            }
            Kind::Vote => kept.vote = Some(record.vote()),
            Kind::CopiedVote => {
                let copied = record.vote();
                let lower = kept.vote.is_some_and(|vote| (copied.term, copied.committed) < (vote.term, vote.committed));
                if !lower {
                    kept.vote = Some(copied);
                }
            }
            Kind::Committed | Kind::CopiedCommitted => kept.committed = kept.committed.max(Some(at)),
            Kind::CaughtUp => kept.caught_up = true,
            Kind::Seal | Kind::End => {}
        }
        Ok(())
    }

    /// Puts copied entries where they belong: without a gap before what the log has of their group.
    fn join_copies(&mut self) -> Result<(), LogError> {
        for (group, copies) in std::mem::take(&mut self.copies) {
            let kept = self.groups.entry(group).or_default();
            for (index, Copied { at, payload, place, segment }) in copies.into_iter().rev() {
                let next =
                    kept.first().map(|first| first.index).or(self.gaps.get(&group).map(|(before, ..)| before + 1));
                if next.is_some_and(|next| next != index + 1) {
                    let what = format!("{group}: a copied entry {at} stands before index {next:?}");
                    return Err(LogError::Damaged { file: segment, offset: place.offset, what });
                }
                kept.push_front(at, payload, place);
                self.gaps.insert(group, (index.saturating_sub(1), segment, place.offset));
            }
            kept.shrink(self.cache_bytes);
        }
        Ok(())
    }

    fn check_gaps(&self) -> Result<(), LogError> {
        for (group, (before, file, offset)) in &self.gaps {
            if *before > 0
                && self.groups.get(group).and_then(|kept| kept.purged).is_none_or(|purged| purged.index < *before)
            {
                return Err(LogError::Damaged {
                    file: file.clone(),
                    offset: *offset,
                    what: format!("{group}: entries up to {before} are missing and were never purged"),
                });
            }
        }
        Ok(())
    }
}

/// The segment that a start writes.
struct Renewed {
    segment: Segment,
    offset: u64,
    next_drain: u64,
    /// Nothing of this segment is needed any more.
    replaced: Option<u64>,
}

/// Writes the facts of every group and the last drain into a new segment, synced on return.
fn renew(
    config: &LogConfig,
    disk: &dyn Disk,
    groups: &mut BTreeMap<GroupId, Kept>,
    last: Option<&Segment>,
    tail: &Tail,
    sequence: u64,
    behind: bool,
) -> io::Result<Renewed> {
    let mut header = Header {
        sequence,
        allocated: config.segment_bytes,
        salt: rand::random(),
        active: true,
        previous: 0,
        first_drain: 1,
        catch_up: behind,
        cut: None,
    };
    let mut replaced = None;
    if let Some(last) = last {
        // Drains behind the cut give their numbers to what is written here, so that numbers stay without gaps.
        match &tail.last {
            Some((offset, drain, _)) if *offset > HEADER_BYTES as u64 => {
                header.previous = last.header.sequence;
                header.first_drain = *drain;
                header.cut = Some(Cut { segment: last.header.sequence, offset: *offset, drain: *drain });
            }
            // All of that segment is written anew: restarts without work do not pile up segments.
            _ => {
                header.previous = last.header.previous;
                header.first_drain = last.header.first_drain;
                header.cut = last.header.cut;
                replaced = Some(last.header.sequence);
            }
        }
    }
    let mut records = Vec::new();
    let drain = header.first_drain;
    for (group, kept) in groups.iter() {
        opening(*group, Facts::of(kept), drain, behind, |record| record.encode(header.salt, &mut records));
    }
    let mut placed = Vec::new();
    for one in tail.last.iter().flat_map(|(_, _, records)| records) {
        let purged = groups.get(&one.group).and_then(|kept| kept.purged);
        if one.kind != Kind::Truncate && purged.is_some_and(|purged| one.at.index <= purged.index) {
            continue;
        }
        let record = Record { kind: one.kind, drain, group: one.group, at: one.at, payload: &one.payload };
        let offset = (HEADER_BYTES + records.len()) as u64;
        record.encode(header.salt, &mut records);
        if one.kind != Kind::Truncate {
            placed.push((one.group, one.at, Place { segment: sequence, offset, size: record.size() as u32 }));
        }
    }
    let mut next_drain = drain;
    if !records.is_empty() {
        seal(drain).encode(header.salt, &mut records);
        next_drain += 1;
    }
    header.allocated = header.allocated.max((HEADER_BYTES + records.len()) as u64);
    let segment = Segment::create(disk, &config.dir, header, &records)?;
    for (group, at, place) in placed {
        if let Some(kept) = groups.get_mut(&group) {
            kept.placed(at, place);
        }
    }
    Ok(Renewed { segment, offset: (HEADER_BYTES + records.len()) as u64, next_drain, replaced })
}

/// The small facts of a group that every segment opens with, so that an idle group never needs an old one.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Facts {
    pub(super) vote: Option<super::Vote>,
    pub(super) committed: Option<Index>,
    pub(super) purged: Option<Index>,
    pub(super) caught_up: bool,
}

impl Facts {
    pub(super) fn of(kept: &Kept) -> Facts {
        Facts { vote: kept.vote, committed: kept.committed, purged: kept.purged, caught_up: kept.caught_up }
    }
}

/// Gives each opening record of one group to `write`.
pub(super) fn opening(group: GroupId, facts: Facts, drain: u64, behind: bool, mut write: impl FnMut(Record<'_>)) {
    let plain = |kind, at| Record { kind, drain, group, at, payload: &[] };
    if let Some(vote) = facts.vote {
        let at = Index { term: vote.term, index: vote.replica };
        write(Record { payload: &[u8::from(vote.committed)], ..plain(Kind::CopiedVote, at) });
    }
    if let Some(purged) = facts.purged {
        write(plain(Kind::CopiedPurge, purged));
    }
    if let Some(committed) = facts.committed {
        write(plain(Kind::CopiedCommitted, committed));
    }
    if behind && facts.caught_up {
        write(plain(Kind::CaughtUp, Index::default()));
    }
}

/// The record that makes a drain whole.
pub(super) fn seal(drain: u64) -> Record<'static> {
    Record { kind: Kind::Seal, drain, group: GroupId(0), at: Index::default(), payload: &[] }
}

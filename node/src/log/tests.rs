//! The log as a whole, on a disk that forgets.

use std::{
    collections::BTreeMap,
    io,
    ops::Range,
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
};

use bytes::Bytes;
use proptest::prelude::*;
use tokio::sync::oneshot;

use super::*;
use crate::disk::forgetful::ForgetfulDisk;

const G: GroupId = GroupId(1);
const HEADER: u64 = segment::HEADER_BYTES as u64;

fn config() -> LogConfig {
    LogConfig {
        segment_bytes: 64 << 10,
        drain_bytes: 16 << 10,
        cache_bytes: 256,
        fatal: Arc::new(|_| {}),
        ..LogConfig::new("wal")
    }
}

/// With its spares allocated, so that nothing but what the test does happens on the disk.
fn open(disk: &ForgetfulDisk) -> Result<(Log, Recovered), LogError> {
    let opened = Log::open(config(), Arc::new(disk.clone()))?;
    settled(&opened.0);
    Ok(opened)
}

fn settled(log: &Log) {
    while log.spares() < SPARES && !log.is_full() {
        std::thread::yield_now();
    }
}

/// Old segments go after the answer.
fn until(condition: impl Fn() -> bool) {
    while !condition() {
        std::thread::yield_now();
    }
}

fn entry(term: u64, index: u64, bytes: usize) -> Entry {
    Entry { at: Index { term, index }, payload: Bytes::from(vec![(index % 250) as u8 + 1; bytes]) }
}

fn entries(range: Range<u64>) -> Vec<Entry> {
    range.map(|index| entry(1, index, 40)).collect()
}

fn done() -> (Done, oneshot::Receiver<io::Result<()>>) {
    let (tx, rx) = oneshot::channel();
    (Box::new(move |result| drop(tx.send(result))), rx)
}

async fn append(group: &GroupLog, entries: Vec<Entry>) -> io::Result<()> {
    let (done, on_disk) = done();
    group.append(entries, done).await?;
    on_disk.await.expect("the writer answers")
}

fn only_segment_in_use(disk: &ForgetfulDisk) -> PathBuf {
    let in_use = |path: &PathBuf| disk.bytes(path)[12] == 1;
    let mut files: Vec<_> = disk.files().into_iter().filter(in_use).collect();
    assert_eq!(files.len(), 1);
    files.remove(0)
}

/// Three drains of two entries each, not closed; the end of each.
async fn three_drains(disk: &ForgetfulDisk) -> (PathBuf, [u64; 3]) {
    let (log, _) = open(disk).unwrap();
    for n in 0..3 {
        append(&log.group(G), entries(2 * n..2 * n + 2)).await.unwrap();
    }
    let drain = (2 * record::size(40) + record::size(0)) as u64;
    (only_segment_in_use(disk), [HEADER + drain, HEADER + 2 * drain, HEADER + 3 * drain])
}

fn flipped(disk: &ForgetfulDisk, path: &Path, byte: u64, bit: u32) -> ForgetfulDisk {
    let copy = disk.restart();
    copy.tamper(path, |bytes| bytes[byte as usize] ^= 1 << bit);
    copy
}

fn indexes(log: &Log) -> Vec<u64> {
    log.group(G).read(0..u64::MAX).unwrap().iter().map(|entry| entry.at.index).collect()
}

#[tokio::test]
async fn promise_1_what_was_reported_done_survives_a_power_cut() {
    let disk = ForgetfulDisk::new();
    let (log, _) = open(&disk).unwrap();
    let group = log.group(G);
    append(&group, entries(0..5)).await.unwrap();
    group.save_vote(Vote { term: 4, replica: 9, committed: false }).await.unwrap();
    let (log, recovered) = open(&disk.power_cut()).unwrap();
    assert_eq!(recovered, Recovered { dropped: None, catch_up: false, segments: 1, clean: false });
    assert_eq!(log.group(G).read(0..10).unwrap(), entries(0..5));
    assert_eq!(log.group(G).vote(), Some(Vote { term: 4, replica: 9, committed: false }));
}

#[tokio::test]
async fn promise_5_a_bit_flipped_anywhere_is_refused_with_its_place_or_drops_the_last_drain_whole() {
    let disk = ForgetfulDisk::new();
    let (path, [_, second, third]) = three_drains(&disk).await;
    let name = path.file_name().unwrap().to_string_lossy().into_owned();
    for byte in (0..third + 64).step_by(3) {
        match open(&flipped(&disk, &path, byte, (byte % 8) as u32)) {
            Err(LogError::Damaged { file, offset, .. }) => {
                assert!(byte < second, "byte {byte} was in the last drain");
                assert_eq!(file, name);
                let record = record::size(40) as u64;
                assert!(offset <= byte && (byte < HEADER || byte < offset + record), "{byte} is not at {offset}");
            }
            Err(other) => panic!("byte {byte}: {other}"),
            Ok((log, recovered)) => {
                assert!(byte >= second, "byte {byte} was in a synced drain");
                let kept: Vec<u64> = if byte < third { (0..4).collect() } else { (0..6).collect() };
                assert_eq!(indexes(&log), kept, "byte {byte}");
                assert!(recovered.dropped.unwrap().starts_with(&format!("{name}:")));
                assert!(recovered.catch_up && log.group(G).is_behind());
            }
        }
    }
}

#[tokio::test]
async fn promise_5_after_a_clean_stop_every_bad_record_is_refused() {
    let disk = ForgetfulDisk::new();
    let (log, _) = open(&disk).unwrap();
    for n in 0..3 {
        append(&log.group(G), entries(2 * n..2 * n + 2)).await.unwrap();
    }
    log.close().await.unwrap();
    let path = only_segment_in_use(&disk);
    let entries_end = HEADER + 3 * (2 * record::size(40) + record::size(0)) as u64;
    // The closing drain held nothing else: the mark is its own.
    let mark_end = entries_end + record::size(0) as u64;
    for byte in (HEADER..entries_end).chain(mark_end..mark_end + 64).step_by(3) {
        let refused = matches!(open(&flipped(&disk, &path, byte, 1)), Err(LogError::Damaged { .. }));
        assert!(refused, "byte {byte}");
    }
    let (log, recovered) = open(&disk.restart()).unwrap();
    assert!(recovered.clean);
    assert_eq!(indexes(&log), (0..6).collect::<Vec<_>>());
    let (_, recovered) = open(&flipped(&disk, &path, entries_end + 9, 1)).unwrap();
    assert!(!recovered.clean && recovered.catch_up, "only the mark itself may be torn");
}

#[tokio::test]
async fn promise_5_a_short_or_missing_segment_is_refused() {
    let disk = ForgetfulDisk::new();
    let (path, _) = three_drains(&disk).await;
    for len in [0, 100, HEADER as usize, HEADER as usize + 200, (64 << 10) - 1] {
        let copy = disk.restart();
        copy.tamper(&path, |bytes| bytes.truncate(len));
        let Err(LogError::Damaged { file, .. }) = open(&copy) else { panic!("{len} bytes were accepted") };
        assert_eq!(file, path.file_name().unwrap().to_string_lossy());
    }
    let (log, _) = open(&disk).unwrap();
    let group = log.group(G);
    for index in 6..200 {
        append(&group, vec![entry(1, index, 1000)]).await.unwrap();
    }
    log.close().await.unwrap();
    let files = disk.files();
    assert!(files.len() >= 4, "{files:?}");
    let copy = disk.restart();
    copy.remove(&files[1]).unwrap();
    assert!(matches!(open(&copy), Err(LogError::Damaged { .. })));
}

#[tokio::test]
async fn bytes_behind_a_recorded_cut_are_not_judged_again() {
    let disk = ForgetfulDisk::new();
    let (path, [_, second, third]) = three_drains(&disk).await;
    let torn = flipped(&disk, &path, second + 20, 3);
    let (log, recovered) = open(&torn).unwrap();
    assert!(recovered.dropped.is_some());
    append(&log.group(G), vec![entry(2, 4, 40)]).await.unwrap();
    let (log, recovered) = open(&torn.restart()).unwrap();
    assert_eq!(recovered.dropped, None);
    assert!(recovered.catch_up, "nobody has caught it up");
    assert_eq!(indexes(&log), [0, 1, 2, 3, 4]);
    let again = torn.restart();
    again.tamper(&path, |bytes| bytes[third as usize - 5] ^= 1);
    assert!(open(&again).is_ok());
    again.tamper(&path, |bytes| bytes[HEADER as usize + 5] ^= 1);
    assert!(matches!(open(&again), Err(LogError::Damaged { .. })), "what is before the cut is judged");
}

#[tokio::test]
async fn a_group_that_was_caught_up_stays_so_and_the_others_do_not() {
    let disk = ForgetfulDisk::new();
    let (log, _) = open(&disk).unwrap();
    append(&log.group(GroupId(2)), entries(0..1)).await.unwrap();
    append(&log.group(G), entries(0..2)).await.unwrap();
    let path = only_segment_in_use(&disk);
    let first = HEADER + (record::size(40) + record::size(0)) as u64;
    let torn = flipped(&disk, &path, first + 9, 0);
    let (log, _) = open(&torn).unwrap();
    assert!(log.group(G).is_behind() && log.group(GroupId(2)).is_behind() && log.group(GroupId(3)).is_behind());
    log.group(G).caught_up().await.unwrap();
    let (log, _) = open(&torn.power_cut()).unwrap();
    assert!(!log.group(G).is_behind());
    assert!(log.group(GroupId(2)).is_behind());
}

#[tokio::test]
async fn restarts_without_work_do_not_pile_up_segments() {
    let mut disk = ForgetfulDisk::new();
    let _ = three_drains(&disk).await;
    let mut counts = Vec::new();
    for clean in [true, false, true, false, false] {
        let (log, _) = open(&disk).unwrap();
        assert_eq!(indexes(&log), (0..6).collect::<Vec<_>>());
        counts.push(log.segments());
        if clean {
            log.close().await.unwrap();
        }
        disk = disk.restart();
    }
    assert_eq!(counts, [2; 5]);
}

#[tokio::test]
async fn a_thousand_appends_of_sixteen_groups_take_few_syncs() {
    let disk = ForgetfulDisk::new();
    let (log, _) =
        Log::open(LogConfig { fatal: config().fatal, ..LogConfig::new("wal") }, Arc::new(disk.clone())).unwrap();
    append(&log.group(G), entries(0..1)).await.unwrap();
    let before = disk.syncs();
    disk.hold();
    let mut waiting = Vec::new();
    for n in 0..1000_u64 {
        let (done, on_disk) = done();
        log.group(GroupId(100 + (n % 16) as u32)).append(vec![entry(1, n / 16, 1024)], done).await.unwrap();
        waiting.push(on_disk);
    }
    disk.release();
    for on_disk in waiting {
        on_disk.await.unwrap().unwrap();
    }
    let syncs = disk.syncs() - before;
    assert!(syncs < 100, "{syncs} syncs");
}

#[tokio::test]
async fn old_entries_are_read_from_the_segments_and_damage_there_is_refused() {
    let disk = ForgetfulDisk::new();
    let (log, _) = open(&disk).unwrap();
    let group = log.group(G);
    let all: Vec<Entry> = (0..200).map(|index| entry(1, index, 1000)).collect();
    for one in &all {
        append(&group, vec![one.clone()]).await.unwrap();
    }
    assert!(log.segments() > 2);
    assert_eq!(group.read_cached(0..200), None);
    assert_eq!(group.read(0..200).unwrap(), all);
    assert_eq!(group.read(150..170).unwrap(), all[150..170]);
    let oldest = disk.files().remove(0);
    disk.tamper(&oldest, |bytes| bytes[HEADER as usize + 100] ^= 1);
    let refused = group.read(0..10).unwrap_err();
    assert_eq!(refused.kind(), io::ErrorKind::InvalidData);
    assert!(refused.to_string().contains(&format!("{}:{HEADER}", oldest.file_name().unwrap().to_string_lossy())));
}

#[tokio::test]
async fn segments_that_every_group_has_purged_past_go_and_an_idle_groups_vote_pins_none() {
    let disk = ForgetfulDisk::new();
    let (log, _) = open(&disk).unwrap();
    let vote = Vote { term: 3, replica: 1, committed: true };
    log.group(GroupId(7)).save_vote(vote).await.unwrap();
    let group = log.group(G);
    for index in 0..300 {
        append(&group, vec![entry(1, index, 1000)]).await.unwrap();
    }
    let full = log.segments();
    assert!(full > 4);
    group.purge(Index { term: 1, index: 250 }).await.unwrap();
    append(&group, vec![entry(1, 300, 10)]).await.unwrap();
    append(&group, vec![entry(1, 301, 10)]).await.unwrap();
    until(|| log.segments() < full - 2);
    let (log, recovered) = open(&disk.power_cut()).unwrap();
    assert_eq!(recovered.dropped, None);
    assert_eq!(indexes(&log), (251..302).collect::<Vec<_>>());
    assert_eq!(log.group(GroupId(7)).vote(), Some(vote));
    assert_eq!(log.group(G).purged(), Some(Index { term: 1, index: 250 }));
}

#[tokio::test]
async fn a_failed_sync_is_reported_once_and_nothing_is_acknowledged_afterwards() {
    let disk = ForgetfulDisk::new();
    let reasons = Arc::new(Mutex::new(Vec::new()));
    let seen = reasons.clone();
    let fatal: Fatal = Arc::new(move |reason| seen.lock().unwrap().push(reason.to_owned()));
    let (log, _) = Log::open(LogConfig { fatal, ..config() }, Arc::new(disk.clone())).unwrap();
    append(&log.group(G), entries(0..1)).await.unwrap();
    disk.fail_syncs(true);
    assert!(append(&log.group(G), entries(1..2)).await.is_err());
    disk.fail_syncs(false);
    assert!(append(&log.group(G), entries(2..3)).await.is_err());
    assert!(log.group(G).save_vote(Vote { term: 1, replica: 1, committed: false }).await.is_err());
    assert_eq!(reasons.lock().unwrap().len(), 1);
}

#[tokio::test]
async fn a_full_disk_is_waited_for_and_loses_nothing() {
    let disk = ForgetfulDisk::new();
    let (log, _) = open(&disk).unwrap();
    let group = log.group(G);
    append(&group, entries(0..1)).await.unwrap();
    disk.fill(true);
    let mut waiting = Vec::new();
    for index in 1..200 {
        let (done, on_disk) = done();
        group.append(vec![entry(1, index, 1000)], done).await.unwrap();
        waiting.push(on_disk);
    }
    // The spares take most of them; the first refusal shows when one is used.
    until(|| log.is_full());
    disk.fill(false);
    for on_disk in waiting {
        on_disk.await.unwrap().unwrap();
    }
    assert!(!log.is_full());
    let (log, _) = open(&disk.power_cut()).unwrap();
    assert_eq!(indexes(&log), (0..200).collect::<Vec<_>>());
}

#[tokio::test]
async fn a_log_that_was_full_has_room_again_with_nothing_to_write() {
    let disk = ForgetfulDisk::new();
    let (log, _) = open(&disk).unwrap();
    let group = log.group(G);
    disk.fill(true);
    for index in 0.. {
        append(&group, vec![entry(1, index, 1000)]).await.unwrap();
        if log.is_full() {
            break;
        }
    }
    disk.fill(false);
    until(|| !log.is_full());
}

/// The segment with the first entries goes when they are rewritten from the very first on; what stands in the next one before
/// that has no beginning any more, and needs none.
#[tokio::test]
async fn entries_rewritten_from_the_first_on_do_not_miss_the_segment_that_went() {
    let disk = ForgetfulDisk::new();
    let (log, _) = open(&disk).unwrap();
    append(&log.group(G), entries(0..2)).await.unwrap();
    append(&log.group(GroupId(2)), entries(0..1)).await.unwrap();
    let disk = disk.power_cut();
    let (log, _) = open(&disk).unwrap();
    append(&log.group(GroupId(2)), entries(1..2)).await.unwrap();
    let group = log.group(G);
    append(&group, entries(2..3)).await.unwrap();
    group.truncate(0).await.unwrap();
    append(&group, vec![entry(2, 0, 7)]).await.unwrap();
    until(|| log.segments() == 1);
    let (log, _) = open(&disk.power_cut()).unwrap();
    assert_eq!(log.group(G).read(0..10).unwrap(), [entry(2, 0, 7)]);
}

#[tokio::test]
async fn committed_goes_along_and_is_never_synced_for() {
    let disk = ForgetfulDisk::new();
    let (log, _) = open(&disk).unwrap();
    append(&log.group(G), entries(0..3)).await.unwrap();
    let syncs = disk.syncs();
    log.group(G).save_committed(Some(Index { term: 1, index: 1 }));
    assert_eq!(disk.syncs(), syncs);
    append(&log.group(GroupId(9)), entries(0..1)).await.unwrap();
    let (log, _) = open(&disk.power_cut()).unwrap();
    assert_eq!(log.group(G).committed(), Some(Index { term: 1, index: 1 }));
}

#[tokio::test]
async fn truncated_entries_stay_away_after_a_restart() {
    let disk = ForgetfulDisk::new();
    let (log, _) = open(&disk).unwrap();
    let group = log.group(G);
    append(&group, entries(0..5)).await.unwrap();
    group.truncate(2).await.unwrap();
    append(&group, vec![entry(2, 2, 5)]).await.unwrap();
    for disk in [disk.power_cut(), disk.power_cut().power_cut()] {
        let (log, _) = open(&disk).unwrap();
        let at: Vec<Index> = log.group(G).read(0..9).unwrap().iter().map(|e| e.at).collect();
        assert_eq!(at, [Index { term: 1, index: 0 }, Index { term: 1, index: 1 }, Index { term: 2, index: 2 }]);
    }
}

/// One step of a random history.
#[derive(Debug, Clone)]
enum Step {
    Append { group: u32, count: u64, bytes: usize },
    Rewrite { group: u32, back: u64 },
    Purge { group: u32, keep: u64 },
    Vote { group: u32 },
    Crash { how: u8, seed: u64, unfinished: usize },
}

fn step() -> impl Strategy<Value = Step> {
    let group = 1..4_u32;
    prop_oneof![
        8 => (group.clone(), 1..6_u64, 0..900_usize).prop_map(|(group, count, bytes)| Step::Append { group, count, bytes }),
        2 => (group.clone(), 1..4_u64).prop_map(|(group, back)| Step::Rewrite { group, back }),
        2 => (group.clone(), 0..4_u64).prop_map(|(group, keep)| Step::Purge { group, keep }),
        2 => group.prop_map(|group| Step::Vote { group }),
        1 => (0..4_u8, any::<u64>(), 0..3_usize).prop_map(|(how, seed, unfinished)| Step::Crash { how, seed, unfinished }),
    ]
}

/// What a group must hold.
#[derive(Debug, Clone, Default, PartialEq)]
struct Model {
    entries: BTreeMap<u64, Entry>,
    purged: Option<Index>,
    vote: Option<Vote>,
    term: u64,
}

type Models = BTreeMap<u32, Model>;

fn seen(log: &Log, like: &Models) -> Models {
    let of = |group: u32, model: &Model| {
        let log = log.group(GroupId(group));
        let entries = log.read(0..u64::MAX).unwrap().into_iter().map(|e| (e.at.index, e)).collect();
        Model { entries, purged: log.purged(), vote: log.vote(), term: model.term }
    };
    like.iter().map(|(group, model)| (*group, of(*group, model))).collect()
}

/// Does the step to the log, waiting for the disk or not, and to the model.
async fn take(log: &Log, models: &mut Models, step: &Step, wait: bool) {
    let (Step::Append { group, .. } | Step::Rewrite { group, .. } | Step::Purge { group, .. } | Step::Vote { group }) =
        *step
    else {
        return;
    };
    let model = models.entry(group).or_default();
    let log = log.group(GroupId(group));
    let next = model.entries.keys().next_back().copied().or(model.purged.map(|p| p.index)).map_or(0, |last| last + 1);
    let mut added = Vec::new();
    match *step {
        Step::Append { count, bytes, .. } => {
            model.term = model.term.max(1);
            added = (next..next + count).map(|index| entry(model.term, index, bytes)).collect();
        }
        Step::Rewrite { back, .. } => {
            let first = model.entries.keys().next().copied().unwrap_or(next);
            let from = next.saturating_sub(back).max(first);
            model.entries.split_off(&from);
            model.term += 1;
            log.truncate(from).await.unwrap();
            added.push(entry(model.term, from, 7));
        }
        Step::Purge { keep, .. } => {
            let Some(at) = model.entries.values().rev().nth(keep as usize).map(|e| e.at) else { return };
            model.entries = model.entries.split_off(&(at.index + 1));
            model.purged = Some(at);
            log.purge(at).await.unwrap();
        }
        Step::Vote { .. } => {
            model.term += 1;
            let vote = Vote { term: model.term, replica: 5, committed: model.term.is_multiple_of(2) };
            model.vote = Some(vote);
            let saving = async move { log.save_vote(vote).await };
            if wait {
                saving.await.unwrap();
            } else {
                // Asked for and not waited for: it is queued at the first poll.
                let _ = futures::poll!(std::pin::pin!(saving));
            }
            return;
        }
        Step::Crash { .. } => return,
    }
    model.entries.extend(added.iter().map(|e| (e.at.index, e.clone())));
    let (done, on_disk) = done();
    log.append(added, done).await.unwrap();
    if wait {
        on_disk.await.unwrap().unwrap();
    }
}

async fn run(steps: Vec<Step>) {
    let mut disk = ForgetfulDisk::new();
    let (mut log, _) = open(&disk).unwrap();
    let mut models = Models::new();
    let mut steps = steps.into_iter();
    while let Some(step) = steps.next() {
        let Step::Crash { how, seed, unfinished } = step else {
            take(&log, &mut models, &step, true).await;
            continue;
        };
        // Whatever was acknowledged, plus any beginning of what was under way.
        let mut allowed = vec![models.clone()];
        disk.hold();
        for step in steps.by_ref().filter(|step| !matches!(step, Step::Crash { .. })).take(unfinished) {
            // A rewrite is two items, of which the log may keep the first.
            if let Step::Rewrite { group, back } = step {
                let mut halfway = models.clone();
                let model = halfway.entry(group).or_default();
                let next = model.entries.keys().next_back().map_or(0, |last| last + 1);
                let first = model.entries.keys().next().copied().unwrap_or(next);
                model.entries.split_off(&next.saturating_sub(back).max(first));
                allowed.push(halfway);
            }
            take(&log, &mut models, &step, false).await;
            allowed.push(models.clone());
        }
        let after = match how {
            0 => disk.power_cut(),
            1 => disk.restart(),
            _ => disk.torn_power_cut(seed),
        };
        disk.release();
        disk = after;
        log = open(&disk).unwrap().0;
        let found = seen(&log, &models);
        let same = |allowed: &Models| {
            found.iter().all(|(group, found)| {
                let expected = allowed.get(group).cloned().unwrap_or_default();
                (&expected.entries, expected.purged, expected.vote) == (&found.entries, found.purged, found.vote)
            })
        };
        assert!(allowed.iter().any(same), "found {found:#?}\nallowed {allowed:#?}");
        models = found;
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, ..ProptestConfig::default() })]

    #[test]
    fn promise_1_no_crash_loses_what_was_acknowledged_or_keeps_half_of_what_was_not(
        steps in prop::collection::vec(step(), 1..80),
    ) {
        tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(run(steps));
    }
}

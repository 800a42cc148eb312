//! The log from outside, on a disk that forgets: what it acknowledges, how it is cleaned, what a full disk does to it.

use std::{io, ops::Range, path::PathBuf, sync::Arc};

use bytes::Bytes;
use martlet_node::{
    disk::forgetful::ForgetfulDisk,
    log::{Done, Entry, GroupId, GroupLog, Index, Log, LogConfig, Pin, Recovered, SPARES, Vote},
};
use tokio::sync::oneshot;

pub(crate) const IDLE: GroupId = GroupId(1);
pub(crate) const BUSY: GroupId = GroupId(2);
const SEGMENT: u64 = 64 << 10;

/// Small segments, of which four are much and seven too many.
pub(crate) fn config() -> LogConfig {
    LogConfig {
        segment_bytes: SEGMENT,
        drain_bytes: 16 << 10,
        cache_bytes: 256,
        clean_bytes: 4 * SEGMENT,
        kept_bytes_max: 6 * SEGMENT,
        fatal: Arc::new(|_| {}),
        ..LogConfig::new("wal")
    }
}

pub(crate) fn open(disk: &ForgetfulDisk) -> (Log, Recovered) {
    let opened = Log::open(config(), Arc::new(disk.clone())).unwrap();
    until(|| opened.0.spares() == SPARES || opened.0.is_full());
    opened
}

/// For what the log does by itself; a broken one is ended by the test runner.
pub(crate) fn until(condition: impl Fn() -> bool) {
    while !condition() {
        std::thread::yield_now();
    }
}

pub(crate) fn entry(index: u64, bytes: usize) -> Entry {
    Entry { at: Index { term: 1, index }, payload: Bytes::from(vec![(index % 250) as u8 + 1; bytes]) }
}

fn entries(range: Range<u64>, bytes: usize) -> Vec<Entry> {
    range.map(|index| entry(index, bytes)).collect()
}

pub(crate) fn done() -> (Done, oneshot::Receiver<io::Result<()>>) {
    let (tx, rx) = oneshot::channel();
    (Box::new(move |result| drop(tx.send(result))), rx)
}

pub(crate) async fn append(group: &GroupLog, entries: Vec<Entry>) -> io::Result<()> {
    let (done, on_disk) = done();
    group.append(entries, done).await?;
    on_disk.await.expect("the writer answers")
}

/// One entry of a group that keeps no more than its last.
async fn work_once(log: &Log, next: &mut u64) {
    let group = log.group(BUSY);
    append(&group, vec![entry(*next, 1_000)]).await.unwrap();
    if let Some(before) = next.checked_sub(1) {
        group.purge(Index { term: 1, index: before }).await.unwrap();
    }
    *next += 1;
}

/// Segments of such work.
async fn work(log: &Log, next: &mut u64, segments: u64) {
    for _ in 0..segments * SEGMENT / 1_000 {
        work_once(log, next).await;
    }
}

#[tokio::test]
async fn promise_1_an_entry_is_acknowledged_only_when_a_power_cut_keeps_it() {
    let disk = ForgetfulDisk::new();
    let (log, _) = open(&disk);
    disk.hold();
    let (done, mut on_disk) = done();
    log.group(IDLE).append(entries(0..1, 40), done).await.unwrap();
    disk.until_held();
    let acknowledged = on_disk.try_recv().is_ok();
    let kept = open(&disk.power_cut()).0.group(IDLE).last().is_some();
    assert!(kept || !acknowledged, "an entry was acknowledged that a power cut loses");
    disk.release();
    on_disk.await.unwrap().unwrap();
    assert_eq!(open(&disk.power_cut()).0.group(IDLE).read(0..9).unwrap(), entries(0..1, 40));
}

#[tokio::test]
async fn promise_1_a_vote_is_given_only_when_a_power_cut_keeps_it() {
    let vote = Vote { term: 4, replica: 9, committed: false };
    let disk = ForgetfulDisk::new();
    let (log, _) = open(&disk);
    let group = log.group(IDLE);
    disk.hold();
    let mut voting = Box::pin(group.save_vote(vote));
    let given = futures::poll!(voting.as_mut()).is_ready();
    disk.until_held();
    let kept = open(&disk.power_cut()).0.group(IDLE).vote();
    assert!(kept == Some(vote) || !given, "a vote was given that a power cut loses");
    disk.release();
    voting.await.unwrap();
    assert_eq!(open(&disk.power_cut()).0.group(IDLE).vote(), Some(vote));
}

#[tokio::test]
async fn the_last_entries_of_an_idle_group_are_copied_forward_and_nothing_behind_them_is_lost() {
    let vote = Vote { term: 3, replica: 7, committed: true };
    let disk = ForgetfulDisk::new();
    let (log, _) = open(&disk);
    let (idle, mut next) = (log.group(IDLE), 0);
    append(&idle, entries(0..5, 100)).await.unwrap();
    work(&log, &mut next, 1).await;
    append(&idle, entries(5..9, 100)).await.unwrap();
    idle.save_vote(vote).await.unwrap();
    // Until the log is so long that the first segment is copied from, and no longer: what follows stands in the second, and stays.
    while log.segments() < 6 {
        work_once(&log, &mut next).await;
    }
    until(|| log.bytes() <= 5 * SEGMENT);
    assert_eq!(idle.read(0..99).unwrap(), entries(0..9, 100));
    let mut disk = disk;
    for _ in 0..2 {
        disk = disk.power_cut();
        let (log, recovered) = open(&disk);
        assert_eq!(recovered.dropped, None);
        assert_eq!(log.group(IDLE).read(0..99).unwrap(), entries(0..9, 100));
        assert_eq!(log.group(IDLE).vote(), Some(vote));
        // What is copied again and again stays whole, and the log short.
        work(&log, &mut next, 6).await;
        until(|| log.bytes() <= 5 * SEGMENT);
        assert!(!log.is_over_bound());
        log.group(IDLE).read(0..99).unwrap();
    }
}

#[tokio::test]
async fn who_pins_old_segments_is_named_with_the_index_whose_purge_frees_them() {
    let disk = ForgetfulDisk::new();
    let (log, _) = open(&disk);
    let (idle, mut next) = (log.group(IDLE), 0);
    // Too much to be copied.
    append(&idle, entries(0..12, 3_000)).await.unwrap();
    work(&log, &mut next, 2).await;
    assert_eq!(log.pins(), []);
    work(&log, &mut next, 3).await;
    until(|| !log.pins().is_empty());
    assert_eq!(log.pins(), [Pin { group: IDLE, upto: 11 }]);
    work(&log, &mut next, 3).await;
    until(|| log.is_over_bound());
    idle.purge(Index { term: 1, index: 11 }).await.unwrap();
    until(|| log.segments() <= 2);
    until(|| log.pins().is_empty() && !log.is_over_bound());
}

#[tokio::test]
async fn promise_6_on_a_full_disk_votes_do_not_wait_as_long_as_there_is_a_spare_segment() {
    let disk = ForgetfulDisk::new();
    let (log, _) = open(&disk);
    disk.fill(true);
    // More than the segment in use has room for: both spares are taken up one after the other, except for the last drains.
    let each = 48;
    let (room, mut votes) = (2 * SEGMENT / (each + 48), 0);
    while votes < room {
        votes += 1;
        log.group(IDLE).save_vote(Vote { term: votes, replica: 1, committed: false }).await.unwrap();
    }
    until(|| log.is_full());
    assert!(log.spares() < SPARES);
    let (again, recovered) = open(&disk.power_cut());
    assert_eq!((again.group(IDLE).vote().map(|vote| vote.term), recovered.dropped), (Some(votes), None));
    disk.fill(false);
    until(|| log.spares() == SPARES && !log.is_full());
    append(&log.group(IDLE), entries(0..1, 40)).await.unwrap();
}

#[tokio::test]
async fn promise_6_a_log_on_a_full_disk_gives_up_only_with_whoever_wrote_it() {
    let disk = ForgetfulDisk::new();
    let (log, _) = open(&disk);
    disk.fill(true);
    let mut waiting = Vec::new();
    for index in 0..250 {
        let (done, on_disk) = done();
        log.group(IDLE).append(vec![entry(index, 1_000)], done).await.unwrap();
        waiting.push(on_disk);
    }
    until(|| log.is_full() && log.spares() == 0);
    drop(log);
    let mut acknowledged = 0;
    for on_disk in waiting {
        // What is not on disk is answered so, or not at all.
        acknowledged += u64::from(matches!(on_disk.await, Ok(Ok(()))));
    }
    assert!(acknowledged < 250);
    disk.fill(false);
    let found = open(&disk.power_cut()).0.group(IDLE).read(0..999).unwrap();
    assert!(
        found.len() as u64 >= acknowledged && acknowledged > 100,
        "{acknowledged} of which {} are there",
        found.len()
    );
}

#[tokio::test]
async fn promise_6_a_node_starts_again_on_a_disk_that_is_full_but_for_its_spares() {
    let disk = ForgetfulDisk::new();
    let (log, _) = open(&disk);
    append(&log.group(IDLE), entries(0..3, 40)).await.unwrap();
    log.close().await.unwrap();
    let spare: Vec<PathBuf> = disk.files().into_iter().filter(|path| disk.bytes(path)[12] == 0).collect();
    assert_eq!(spare.len(), SPARES);
    let disk = disk.restart();
    // As many files as there are: a new one finds room where a spare was.
    disk.fill_at(disk.files().len());
    let (log, _) = open(&disk);
    assert_eq!(log.group(IDLE).read(0..9).unwrap(), entries(0..3, 40));
    log.group(IDLE).save_vote(Vote { term: 1, replica: 1, committed: false }).await.unwrap();
}

//! Shard time on nodes whose wall clocks jump by an hour: TTL within promise 3's bound, nothing expires early, repeats are known.

use std::{sync::Arc, time::Duration};

use martlet_node::{Surroundings, clock::turned::TurnedClock, disk::forgetful::ForgetfulDisk};
use martlet_proto::cluster::queue::answer;

use crate::{
    nodes::{Nodes, until},
    serving::{Device, Submit, ask, enqueue_for, leader_seen_by, register},
};

const HOUR_MS: i64 = 3_600_000;

/// Three nodes, each with a clock of its own; their logs are in memory, so that no busy disk holds up an election.
async fn timed(clocks: &[TurnedClock; 3], disks: &[ForgetfulDisk; 3]) -> Nodes {
    let mut nodes = Nodes::new(3);
    for id in 1..=3 {
        start(&mut nodes, id, clocks, disks).await;
    }
    nodes.create(1, 1).await.unwrap();
    for id in 1..=3 {
        nodes.ready(id).await;
    }
    nodes
}

async fn start(nodes: &mut Nodes, id: usize, clocks: &[TurnedClock; 3], disks: &[ForgetfulDisk; 3]) {
    let (clock, disk) = (clocks[id - 1].clone(), disks[id - 1].clone());
    let mut config = nodes.config(id);
    config.log.segment_bytes = 1 << 20;
    config.raft.balance_after = Duration::from_secs(2);
    let around = Surroundings { clock: Arc::new(clock), disk: Arc::new(disk), ..Surroundings::default() };
    nodes.start_in(id, config, around).await.unwrap();
}

fn clocks() -> [TurnedClock; 3] {
    std::array::from_fn(|_| TurnedClock::running())
}

fn pass(clocks: &[TurnedClock; 3], secs: u64) {
    clocks.iter().for_each(|clock| clock.pass(Duration::from_secs(secs)));
}

fn is_accepted(answer: &answer::Kind) -> bool {
    matches!(answer, answer::Kind::Accepted(_))
}

/// One jump, then a message whose time runs out, one whose time does not, and a repeat.
async fn jumped(nodes: &Nodes, clocks: &[TurnedClock; 3], who: &[usize], by_ms: i64) {
    let all = [1, 2, 3];
    let leader = leader_seen_by(nodes, 1).await;
    let mut submit = Submit::open(nodes, leader).await;
    // Learns the time.
    while submit.time_ms == 0 {
        submit.once(1, register()).await;
    }
    let before_ms = submit.time_ms;
    who.iter().for_each(|id| clocks[id - 1].jump_ms(by_ms));

    // The repeat of an operation from before the jump is answered as the first, and makes no second row.
    let first = submit.once_of(before_ms, 2, enqueue_for(b"short", 1_800)).await.unwrap();
    assert!(is_accepted(&first), "{first:?}");
    let again = submit.once_of(before_ms, 2, enqueue_for(b"short", 1_800)).await.unwrap();
    assert_eq!(again, first);
    assert!(is_accepted(&submit.once_of(before_ms, 3, enqueue_for(b"long", 86_400)).await.unwrap()));

    // 100 s before its end; shard time may be pulled by a thousandth.
    pass(clocks, 1_700);
    let mut device = Device::attach_anywhere(nodes, &all).await;
    let short = device.delivery().await;
    assert_eq!(short.message.unwrap().payload, &b"short"[..], "expired early");
    assert!((90_000..=103_000).contains(&short.remaining_ms), "{} ms are left of 100 s", short.remaining_ms);
    let long = device.delivery().await;
    assert_eq!(long.message.unwrap().payload, &b"long"[..], "a repeat made a second row");
    drop(device);

    // One second and a thousandth of its life behind its end.
    pass(clocks, 100 + 1 + 2);
    let mut device = Device::attach_anywhere(nodes, &all).await;
    let only = device.delivery().await;
    assert_eq!(only.message.unwrap().payload, &b"long"[..], "written after its time");
    device.ack(only.sequence).await;
    drop(device);

    // Long past the window a repeat is refused or answered as the first was, and never done a second time.
    submit.once_of(before_ms, 3, enqueue_for(b"long", 86_400)).await.unwrap();
    assert!(is_accepted(&submit.once(4, enqueue_for(b"end", 86_400)).await.unwrap()));
    let mut device = Device::attach_anywhere(nodes, &all).await;
    let end = device.delivery().await;
    assert_eq!(end.message.unwrap().payload, &b"end"[..], "done twice");
    device.ack(end.sequence).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn promise_3_promise_4_clock_jumps_of_an_hour_on_one_node_and_on_all_move_no_expiry_core() {
    let clocks = clocks();
    let disks = std::array::from_fn(|_| ForgetfulDisk::new());
    let mut nodes = timed(&clocks, &disks).await;
    ask(&nodes, &[1, 2, 3], 1, register()).await;
    let leader = leader_seen_by(&nodes, 1).await;
    let follower = 1 + leader % 3;
    for who in [&[leader][..], &[follower], &[1, 2, 3]] {
        for by_ms in [HOUR_MS, -HOUR_MS] {
            jumped(&nodes, &clocks, who, by_ms).await;
        }
    }
    nodes.stop_all().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn promise_4_a_node_that_restarts_with_a_wrong_clock_and_leads_takes_its_shards_nowhere_core() {
    for by_ms in [HOUR_MS, -HOUR_MS] {
        let clocks = clocks();
        let disks = std::array::from_fn(|_| ForgetfulDisk::new());
        let mut nodes = timed(&clocks, &disks).await;
        ask(&nodes, &[1, 2, 3], 1, register()).await;
        let first = usize::try_from(nodes.state(1).await.shards[0].replicas[0].node_id).unwrap();
        until("the first of the list leads", async || leader_seen_by(&nodes, 1).await == first).await;
        let time = async |nodes: &Nodes, at: usize| {
            let mut submit = Submit::open(nodes, at).await;
            submit.once(7, enqueue_for(b"when", 60)).await;
            submit.time_ms
        };
        let before_ms = time(&nodes, first).await;
        assert_ne!(before_ms, 0);
        nodes.stop(first).await;
        clocks[first - 1].jump_ms(by_ms);
        let began = tokio::time::Instant::now();
        start(&mut nodes, first, &clocks, &disks).await;
        nodes.ready(first).await;
        until("the first of the list leads again", async || time(&nodes, first).await != 0).await;
        let now_ms = time(&nodes, first).await;
        let most = 10_000 + u64::try_from(began.elapsed().as_millis()).unwrap();
        assert!((before_ms..=before_ms + most).contains(&now_ms), "went from {before_ms} to {now_ms}");
        nodes.stop_all().await;
    }
}

/// Ends the first of the list and has it lead again; nobody sends anything meanwhile.
async fn restart_first(nodes: &mut Nodes, first: usize, clocks: &[TurnedClock; 3], disks: &[ForgetfulDisk; 3]) {
    nodes.stop(first).await;
    start(nodes, first, clocks, disks).await;
    nodes.ready(first).await;
    until("the first of the list leads again", async || leader_seen_by(nodes, 1 + first % 3).await == first).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn promise_2_promise_4_with_every_clock_wrong_a_restarted_leader_of_an_idle_shard_ends_no_time_to_live_core() {
    let clocks = clocks();
    let disks = std::array::from_fn(|_| ForgetfulDisk::new());
    let mut nodes = timed(&clocks, &disks).await;
    ask(&nodes, &[1, 2, 3], 1, register()).await;
    let first = usize::try_from(nodes.state(1).await.shards[0].replicas[0].node_id).unwrap();
    until("the first of the list leads", async || leader_seen_by(&nodes, 1).await == first).await;
    assert!(is_accepted(&ask(&nodes, &[1, 2, 3], 2, enqueue_for(b"short", 1_800)).await));
    clocks.iter().for_each(|clock| clock.jump_ms(HOUR_MS));
    restart_first(&mut nodes, first, &clocks, &disks).await;
    // All of them in turn: no clock of a wall is ever asked while one of them has run on.
    for id in 1..=3 {
        nodes.stop(id).await;
        start(&mut nodes, id, &clocks, &disks).await;
        nodes.ready(id).await;
        until("the first of the list leads again", async || leader_seen_by(&nodes, 1).await == first).await;
    }
    let mut device = Device::attach_anywhere(&nodes, &[1, 2, 3]).await;
    let short = tokio::time::timeout(Duration::from_secs(20), device.delivery()).await.expect("it ended early");
    assert_eq!(short.message.unwrap().payload, &b"short"[..]);
    assert!(short.remaining_ms > 1_700_000, "{} ms are left of 1,800 s", short.remaining_ms);
    device.ack(short.sequence).await;
    nodes.stop_all().await;
}

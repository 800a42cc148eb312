//! What a lane decides, as values: two nodes, a few shards, time moved by hand.

use martlet_proto::{
    limits::{ACKS_BYTES_MAX, ATTACH_BATCH_MAX, GRPC_MESSAGE_MAX_BYTES},
    shard::ShardCount,
};
use proptest::prelude::*;
use prost::Message as _;
use rand::SeedableRng;

use super::*;

const A: u64 = 1;
const B: u64 = 2;
const SHARD: Shard = Shard(0);

fn start() -> Instant {
    #[expect(clippy::disallowed_methods, reason = "an instant cannot be made otherwise; tests move it by hand")]
    Instant::now()
}

fn lane(config: AttachConfig) -> Lane {
    let map = ShardMap {
        count: ShardCount::new(1).unwrap(),
        nodes: vec![A, B],
        replicas: BTreeMap::from([(SHARD, vec![A, B])]),
    };
    Lane::new(config, map, StdRng::seed_from_u64(1))
}

fn actions(lane: &mut Lane) -> Vec<Action> {
    std::iter::from_fn(|| lane.next_action()).collect()
}

/// Moves time to each deadline until nothing is due any more, at most `for_ms` ahead.
fn settle(lane: &mut Lane, now: &mut Instant, for_ms: u64) -> Vec<Action> {
    let end = *now + Duration::from_millis(for_ms);
    while let Some(deadline) = lane.deadline().filter(|deadline| *deadline <= end) {
        *now = deadline.max(*now);
        lane.tick(*now);
    }
    lane.flush();
    actions(lane)
}

fn sequence(index: u64) -> Sequence {
    Sequence { incarnation: 0, index, position: 0 }
}

/// By what number the node in question knows the attachment now.
fn number(lane: &Lane, attach: u64) -> u64 {
    numbered(attach, lane.entries.get(&attach).map_or(0, |entry| entry.round))
}

fn delivery(lane: &Lane, attach: u64, term: u64, index: u64, cost_bytes: u64) -> DeliverReply {
    let delivery = queue::Delivery {
        shard: 0,
        term,
        attach: number(lane, attach),
        sequence: sequence_bytes(Some(sequence(index))),
        remaining_ms: 1_000,
        message: Some(queue::Message::default()),
        cost_bytes,
    };
    DeliverReply { kind: Some(deliver_reply::Kind::Delivery(delivery)) }
}

fn led(term: u64) -> DeliverReply {
    DeliverReply { kind: Some(deliver_reply::Kind::Led(queue::Led { shard: 0, term })) }
}

fn reply(kind: control_reply::Kind) -> ControlReply {
    ControlReply { kind: Some(kind) }
}

fn attached(lane: &Lane, attach: u64, term: u64, counter: u64) -> ControlReply {
    let session = Some(queue::Session { term, counter });
    reply(control_reply::Kind::Attached(queue::Attached { attach: number(lane, attach), shard: 0, term, session }))
}

fn refused(lane: &Lane, attach: u64, why: attach_refused::Why) -> ControlReply {
    reply(control_reply::Kind::AttachRefused(queue::AttachRefused {
        attach: number(lane, attach),
        shard: 0,
        why: Some(why),
    }))
}

fn redirect(leader_node: u64, term: u64) -> queue::Redirect {
    queue::Redirect { leader_node, term, epoch: 1 }
}

/// Attaches asked for: node, attach, written through, session's counter.
fn asks(actions: &[Action]) -> Vec<(u64, u64, Bytes, Option<u64>)> {
    let batches = actions.iter().filter_map(|action| match action {
        Action::Control { node, request: ControlRequest { kind: Some(control_request::Kind::Attach(batch)) } } => {
            Some((*node, batch))
        }
        _ => None,
    });
    let asks = batches.flat_map(|(node, batch)| batch.attaches.iter().map(move |ask| (node, ask)));
    asks.map(|(node, ask)| {
        (node, ask.attach >> ROUND_BITS, ask.written_through.clone(), ask.session.map(|s| s.counter))
    })
    .collect()
}

fn sent_acks(actions: &[Action]) -> Vec<(u64, u64)> {
    let acks = actions.iter().filter_map(|action| match action {
        Action::Control { node, request: ControlRequest { kind: Some(control_request::Kind::Ack(ack)) } } => {
            Some((*node, ack.ack))
        }
        _ => None,
    });
    acks.collect()
}

fn placed(actions: &[Action]) -> Vec<(u64, u64)> {
    let placed = actions.iter().filter_map(|action| match action {
        Action::Place { attach, delivery } => Some((*attach, delivery.sequence?.index)),
        _ => None,
    });
    placed.collect()
}

fn stream_credit(actions: &[Action]) -> u64 {
    let credits = actions.iter().map(|action| match action {
        Action::Deliver {
            request: DeliverRequest { kind: Some(deliver_request::Kind::StreamCredit(credit)) }, ..
        } => credit.bytes,
        _ => 0,
    });
    credits.sum()
}

/// A lane with a link to A and one attachment there, in term 1.
fn attached_lane(config: AttachConfig, now: &mut Instant) -> Lane {
    let mut lane = lane(config);
    lane.link_up(A, *now);
    lane.deliver(A, led(1), *now);
    lane.open(7, DeviceTag(70), SHARD);
    lane.attach(7, *now);
    settle(&mut lane, now, 100);
    lane.control(A, attached(&lane, 7, 1, 5), *now);
    assert_eq!(actions(&mut lane), []);
    lane
}

#[test]
fn attaches_of_one_shard_go_together_in_batches_of_bounded_size() {
    let mut now = start();
    let mut lane = lane(AttachConfig { batch_max: 2, ..AttachConfig::default() });
    lane.link_up(A, now);
    for attach in 1..=5 {
        lane.open(attach, DeviceTag(attach), SHARD);
        lane.attach(attach, now);
    }
    assert_eq!(actions(&mut lane), []);
    let actions = settle(&mut lane, &mut now, 100);
    assert_eq!(actions.len(), 3);
    assert_eq!(asks(&actions).len(), 5);
}

#[test]
fn without_a_link_an_attach_waits_for_one() {
    let mut now = start();
    let mut lane = lane(AttachConfig::default());
    lane.open(7, DeviceTag(70), SHARD);
    lane.attach(7, now);
    assert_eq!(settle(&mut lane, &mut now, 10_000), []);
    lane.link_up(B, now);
    assert_eq!(asks(&settle(&mut lane, &mut now, 1_000)), [(B, 7, Bytes::new(), None)]);
}

#[test]
fn a_redirect_is_followed_at_once_and_a_refusal_tried_again_later() {
    let mut now = start();
    let mut lane = lane(AttachConfig::default());
    lane.link_up(A, now);
    lane.link_up(B, now);
    lane.open(7, DeviceTag(70), SHARD);
    lane.attach(7, now);
    settle(&mut lane, &mut now, 100);
    lane.control(A, refused(&lane, 7, attach_refused::Why::Redirect(redirect(B, 4))), now);
    let before = now;
    assert_eq!(asks(&settle(&mut lane, &mut now, 100)), [(B, 7, Bytes::new(), None)]);
    assert_eq!(now - before, AttachConfig::default().batch_wait);
    let overloaded = queue::Refused { reason: queue::refused::Reason::Overloaded.into(), detail: String::new() };
    lane.control(B, refused(&lane, 7, attach_refused::Why::Refused(overloaded)), now);
    let before = now;
    assert_eq!(asks(&settle(&mut lane, &mut now, 1_000)), [(B, 7, Bytes::new(), None)]);
    assert!(now - before >= AttachConfig::default().retry_min / 2);
}

#[test]
fn a_redirect_to_a_node_out_of_reach_makes_the_next_replica_be_asked() {
    let mut now = start();
    let mut lane = lane(AttachConfig::default());
    lane.link_up(A, now);
    lane.link_up(B, now);
    lane.open(7, DeviceTag(70), SHARD);
    lane.attach(7, now);
    let mut asked = Vec::new();
    for _ in 0..3 {
        let ask = asks(&settle(&mut lane, &mut now, 5_000))[0].clone();
        asked.push(ask.0);
        lane.control(ask.0, refused(&lane, 7, attach_refused::Why::Redirect(redirect(99, 4))), now);
    }
    assert_eq!(asked, [A, B, A]);
    lane.link_up(99, now);
    assert_eq!(asks(&settle(&mut lane, &mut now, 5_000))[0].0, 99);
}

#[test]
fn a_node_that_knows_no_leader_makes_the_next_replica_be_asked() {
    let mut now = start();
    let mut lane = lane(AttachConfig::default());
    lane.link_up(A, now);
    lane.link_up(B, now);
    lane.open(7, DeviceTag(70), SHARD);
    lane.attach(7, now);
    let mut asked = Vec::new();
    for _ in 0..4 {
        let ask = asks(&settle(&mut lane, &mut now, 5_000))[0].clone();
        asked.push(ask.0);
        lane.control(ask.0, refused(&lane, 7, attach_refused::Why::Redirect(redirect(0, 0))), now);
    }
    assert_eq!(asked, [A, B, A, B]);
}

#[test]
fn a_new_leader_makes_the_device_attach_there_with_its_session_above_what_was_written() {
    let mut now = start();
    let mut lane = attached_lane(AttachConfig::default(), &mut now);
    lane.deliver(A, delivery(&lane, 7, 1, 10, 100), now);
    lane.deliver(A, delivery(&lane, 7, 1, 11, 100), now);
    let round = match &actions(&mut lane)[0] {
        Action::Place { delivery, .. } => delivery.round,
        other => panic!("{other:?}"),
    };
    lane.written(7, round, Some(sequence(10)), 100);
    lane.link_up(B, now);
    lane.deliver(B, led(2), now);
    let first = actions(&mut lane);
    assert!(first.contains(&Action::Learned { shard: SHARD, node: B, term: 2 }));
    assert!(first.contains(&Action::Clear { attach: 7 }), "what waits unwritten comes again");
    let asked = asks(&settle(&mut lane, &mut now, 1_000));
    assert_eq!(asked, [(B, 7, sequence_bytes(Some(sequence(10))), Some(5))]);
}

#[test]
fn a_delivery_of_a_lower_term_is_dropped_and_its_stream_credit_comes_back() {
    let mut now = start();
    let config = AttachConfig { stream_credit_bytes: 800, ..AttachConfig::default() };
    let mut lane = attached_lane(config, &mut now);
    lane.link_up(B, now);
    lane.deliver(B, led(2), now);
    actions(&mut lane);
    lane.deliver(A, delivery(&lane, 7, 1, 10, 100), now);
    let seen = actions(&mut lane);
    assert_eq!((placed(&seen), stream_credit(&seen)), (vec![], 100));
}

#[test]
fn a_leader_that_is_elected_again_in_a_higher_term_is_attached_to_again() {
    let mut now = start();
    let mut lane = attached_lane(AttachConfig::default(), &mut now);
    lane.deliver(A, led(3), now);
    assert_eq!(asks(&settle(&mut lane, &mut now, 1_000)), [(A, 7, Bytes::new(), Some(5))]);
}

#[test]
fn a_lost_link_makes_its_devices_attach_elsewhere_spread_in_time() {
    let mut now = start();
    let mut lane = lane(AttachConfig::default());
    lane.link_up(A, now);
    for attach in 1..=1_000 {
        lane.open(attach, DeviceTag(attach), SHARD);
        lane.attach(attach, now);
    }
    settle(&mut lane, &mut now, 1_000);
    lane.link_up(B, now);
    lane.link_down(A, now);
    let lost = now;
    let mut batches = 0;
    let mut asked = 0;
    while let Some(deadline) = lane.deadline() {
        now = deadline;
        lane.tick(now);
        let asks = asks(&actions(&mut lane));
        assert!(asks.iter().all(|(node, ..)| *node == B));
        asked += asks.len();
        batches += 1;
    }
    assert_eq!(asked, 1_000);
    assert!(batches > 10, "{batches}");
    assert!(now - lost <= AttachConfig::default().reattach_spread);
}

#[test]
fn what_is_late_for_an_earlier_ask_at_the_same_node_and_term_is_not_taken_for_the_new_one() {
    let mut now = start();
    let mut lane = attached_lane(AttachConfig::default(), &mut now);
    let (early, superseded) = (delivery(&lane, 7, 1, 10, 100), number(&lane, 7));
    lane.control(A, refused(&lane, 7, attach_refused::Why::Redirect(redirect(0, 0))), now);
    assert_eq!(asks(&settle(&mut lane, &mut now, 1_000)).len(), 1);
    lane.deliver(A, early, now);
    lane.control(A, reply(control_reply::Kind::Superseded(queue::Superseded { attach: superseded })), now);
    let seen = actions(&mut lane);
    assert!(placed(&seen).is_empty() && !seen.iter().any(|action| matches!(action, Action::Tell { .. })), "{seen:?}");
}

#[test]
fn a_delivery_for_nobody_is_handed_back() {
    let mut now = start();
    let config = AttachConfig { stream_credit_bytes: 800, ..AttachConfig::default() };
    let mut lane = attached_lane(config, &mut now);
    let (known, late) = (number(&lane, 7), delivery(&lane, 7, 1, 10, 100));
    lane.end(7, Acks::default());
    let detach = control(control_request::Kind::Detach(queue::Detach { shard: 0, attach: known }));
    assert_eq!(actions(&mut lane), [Action::Control { node: A, request: detach }]);
    lane.deliver(A, late, now);
    let returned = queue::Returned { shard: 0, attach: known, sequence: sequence_bytes(Some(sequence(10))) };
    let seen = actions(&mut lane);
    assert_eq!(stream_credit(&seen), 100);
    let request = DeliverRequest { kind: Some(deliver_request::Kind::Returned(returned)) };
    assert!(seen.contains(&Action::Deliver { node: A, request }));
    assert!(lane.is_empty());
}

#[test]
fn what_is_written_is_told_once_for_many_and_gives_credit_back() {
    let mut now = start();
    let mut lane = attached_lane(AttachConfig::default(), &mut now);
    for index in 10..13 {
        lane.deliver(A, delivery(&lane, 7, 1, index, 100), now);
    }
    let seen = actions(&mut lane);
    assert_eq!(placed(&seen), [(7, 10), (7, 11), (7, 12)]);
    let Action::Place { delivery, .. } = &seen[0] else { panic!() };
    let round = delivery.round;
    for index in 10..13 {
        lane.written(7, round, Some(sequence(index)), 100);
    }
    lane.flush();
    let written = queue::Written {
        shard: 0,
        attach: number(&lane, 7),
        through: sequence_bytes(Some(sequence(12))),
        credit_bytes: 300,
    };
    let request = DeliverRequest { kind: Some(deliver_request::Kind::Written(written)) };
    assert_eq!(actions(&mut lane), [Action::Deliver { node: A, request }]);
    lane.flush();
    assert_eq!(actions(&mut lane), []);
}

#[test]
fn mc_15_core_a_second_connection_of_a_device_here_supersedes_the_first() {
    let mut now = start();
    let mut lane = attached_lane(AttachConfig::default(), &mut now);
    lane.open(8, DeviceTag(70), SHARD);
    assert_eq!(actions(&mut lane), []);
    lane.attach(8, now);
    let seen = settle(&mut lane, &mut now, 100);
    assert!(seen.contains(&Action::Tell { attach: 7, note: Note::Superseded }));
    assert_eq!(asks(&seen), [(A, 8, Bytes::new(), None)]);
    lane.end(7, Acks::default());
    lane.link_down(A, now);
    lane.link_up(A, now);
    assert_eq!(asks(&settle(&mut lane, &mut now, 1_000)), [(A, 8, Bytes::new(), None)], "the first stays out");
}

#[test]
fn mc_15_core_a_connection_elsewhere_supersedes_by_the_nodes_word() {
    let mut now = start();
    let mut lane = attached_lane(AttachConfig::default(), &mut now);
    lane.control(A, reply(control_reply::Kind::Superseded(queue::Superseded { attach: number(&lane, 7) })), now);
    assert_eq!(actions(&mut lane), [Action::Tell { attach: 7, note: Note::Superseded }]);
    lane.deliver(A, led(2), now);
    assert_eq!(asks(&settle(&mut lane, &mut now, 1_000)), []);
}

#[test]
fn dl_04_core_an_ack_is_sent_at_once_and_confirmed_when_applied() {
    let mut now = start();
    let mut lane = attached_lane(AttachConfig::default(), &mut now);
    lane.ack(7, Acks { sequences: vec![sequence(10)], message_ids: vec![] });
    let seen = actions(&mut lane);
    assert_eq!(sent_acks(&seen), [(A, 1)]);
    lane.control(A, reply(control_reply::Kind::Acked(queue::Acked { acks: vec![1] })), now);
    assert_eq!(actions(&mut lane), [Action::Tell { attach: 7, note: Note::Acked }]);
    lane.control(A, reply(control_reply::Kind::Acked(queue::Acked { acks: vec![1, 99] })), now);
    assert_eq!(settle(&mut lane, &mut now, 10_000), []);
}

#[test]
fn dl_04_core_an_ack_follows_the_leader_until_it_is_applied() {
    let mut now = start();
    let mut lane = attached_lane(AttachConfig::default(), &mut now);
    lane.link_up(B, now);
    lane.ack(7, Acks { sequences: vec![sequence(10)], message_ids: vec![] });
    actions(&mut lane);
    let refusal = queue::AckRefused { ack: 1, redirect: Some(redirect(B, 2)) };
    lane.control(A, reply(control_reply::Kind::AckRefused(refusal)), now);
    assert_eq!(sent_acks(&actions(&mut lane)), [(B, 1)]);
    lane.link_down(B, now);
    assert_eq!(sent_acks(&settle(&mut lane, &mut now, 1_000)), [(A, 1)]);
    let refusal = queue::AckRefused { ack: 1, redirect: Some(redirect(0, 0)) };
    lane.control(A, reply(control_reply::Kind::AckRefused(refusal)), now);
    assert_eq!(sent_acks(&actions(&mut lane)), []);
    assert_eq!(sent_acks(&settle(&mut lane, &mut now, 1_000)), [(A, 1)]);
    lane.control(A, reply(control_reply::Kind::Acked(queue::Acked { acks: vec![1] })), now);
    assert!(actions(&mut lane).contains(&Action::Tell { attach: 7, note: Note::Acked }));
}

#[test]
fn dl_04_core_an_ack_lost_with_its_streams_is_sent_again_to_the_same_node() {
    let mut now = start();
    let mut lane = attached_lane(AttachConfig::default(), &mut now);
    lane.ack(7, Acks { sequences: vec![sequence(10)], message_ids: vec![] });
    actions(&mut lane);
    lane.link_down(A, now);
    assert_eq!(sent_acks(&settle(&mut lane, &mut now, 1_000)), []);
    lane.link_up(A, now);
    assert_eq!(sent_acks(&actions(&mut lane)), [(A, 1)]);
}

/// The acks that these requests name.
fn named(actions: &[Action]) -> Vec<queue::Ack> {
    let acks = actions.iter().filter_map(|action| match action {
        Action::Control { request: ControlRequest { kind: Some(control_request::Kind::Ack(ack)) }, .. } => {
            Some(ack.clone())
        }
        _ => None,
    });
    acks.collect()
}

/// More than a node takes at once.
fn many() -> Acks {
    let ids = (0..2_000).map(|random| MessageId { micros: 1, random }).collect();
    Acks { sequences: (0..60_000).map(sequence).collect(), message_ids: ids }
}

#[test]
fn dl_04_core_a_large_set_of_acks_is_sent_in_parts_and_confirmed_after_the_last() {
    let mut now = start();
    let mut lane = attached_lane(AttachConfig::default(), &mut now);
    lane.link_up(B, now);
    lane.ack(7, many());
    let mut seen = Acks::default();
    let mut sent = actions(&mut lane);
    let mut refused = false;
    let confirmed = loop {
        let [part] = &named(&sent)[..] else { break sent };
        let [Action::Control { node, .. }] = sent[..] else { panic!("{sent:?}") };
        assert!(part.encoded_len() <= ACKS_BYTES_MAX, "a node refuses {} bytes each time", part.encoded_len());
        if !refused && !seen.is_empty() {
            // One in the middle is refused: it alone comes again, to whoever leads now.
            refused = true;
            let refusal = queue::AckRefused { ack: part.ack, redirect: Some(redirect(B, 2)) };
            lane.control(node, reply(control_reply::Kind::AckRefused(refusal)), now);
            sent = actions(&mut lane);
            assert_eq!(named(&sent), std::slice::from_ref(part));
            continue;
        }
        seen.sequences.extend(part.sequences.iter().filter_map(|bytes| Sequence::from_bytes(bytes)));
        seen.message_ids.extend(part.message_ids.iter().filter_map(|bytes| MessageId::from_bytes(bytes)));
        lane.control(node, reply(control_reply::Kind::Acked(queue::Acked { acks: vec![part.ack] })), now);
        sent = actions(&mut lane);
    };
    assert_eq!(confirmed, [Action::Tell { attach: 7, note: Note::Acked }]);
    assert!(refused);
    assert_eq!(seen, many());
}

#[test]
fn parts_that_waited_for_their_turn_are_sent_at_the_end_of_a_connection() {
    let mut now = start();
    let mut lane = attached_lane(AttachConfig::default(), &mut now);
    lane.ack(7, many());
    let mut sent = named(&actions(&mut lane));
    let last = Acks { sequences: (60_000..90_000).map(sequence).collect(), message_ids: vec![] };
    lane.end(7, last);
    sent.extend(named(&actions(&mut lane)));
    assert!(sent.iter().all(|part| part.encoded_len() <= ACKS_BYTES_MAX));
    assert_eq!(sent.iter().map(|part| part.sequences.len()).sum::<usize>(), 90_000);
    assert_eq!(sent.iter().map(|part| part.message_ids.len()).sum::<usize>(), 2_000);
    let ids: BTreeSet<u64> = sent.iter().map(|part| part.ack).collect();
    assert_eq!(ids.len(), sent.len(), "each has a number of its own");
}

#[test]
fn the_largest_batch_of_attaches_can_be_taken_by_a_node() {
    let attach = queue::Attach {
        attach: u64::MAX,
        device_tag: u64::MAX,
        session: Some(queue::Session { term: u64::MAX, counter: u64::MAX }),
        credit_bytes: u64::MAX,
        written_through: sequence_bytes(Some(sequence(u64::MAX))),
    };
    let batch = queue::AttachBatch { shard: u32::MAX, attaches: vec![attach; ATTACH_BATCH_MAX] };
    let request = control(control_request::Kind::Attach(batch));
    assert!(request.encoded_len() < GRPC_MESSAGE_MAX_BYTES, "{} bytes", request.encoded_len());
}

#[test]
fn dl_07_core_acks_of_a_login_are_sent_before_anything_is_attached() {
    let now = start();
    let mut lane = lane(AttachConfig::default());
    lane.link_up(A, now);
    lane.open(7, DeviceTag(70), SHARD);
    lane.ack(7, Acks { sequences: vec![], message_ids: vec![MessageId { micros: 1, random: 2 }] });
    let seen = actions(&mut lane);
    assert_eq!((sent_acks(&seen), asks(&seen)), (vec![(A, 1)], vec![]));
}

#[test]
fn the_last_acks_of_a_connection_are_sent_before_its_detach() {
    let mut now = start();
    let mut lane = attached_lane(AttachConfig::default(), &mut now);
    lane.end(7, Acks { sequences: vec![sequence(10)], message_ids: vec![] });
    let seen = actions(&mut lane);
    assert_eq!(seen.len(), 2);
    assert_eq!(sent_acks(&seen[..1]), [(A, 1)]);
}

#[test]
fn a_node_that_sends_far_beyond_its_credit_costs_the_device_its_connection_not_the_gateway_its_memory() {
    let mut now = start();
    let config = AttachConfig { device_credit_bytes: 1_000, ..AttachConfig::default() };
    let mut lane = attached_lane(config, &mut now);
    for index in 0..100 {
        lane.deliver(A, delivery(&lane, 7, 1, index, 100), now);
    }
    let seen = actions(&mut lane);
    assert_eq!(placed(&seen).len(), 20);
    assert!(seen.contains(&Action::Tell { attach: 7, note: Note::Overrun }));
}

#[derive(Debug, Clone)]
enum Step {
    Open(u64),
    End(u64),
    Deliver { node: u64, attach: u64, term: u64 },
    Written(usize),
    Led { node: u64, term: u64 },
    Attached { attach: u64, term: u64 },
    Down(u64),
    Up(u64),
    Tick(u64),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        2 => (0u64..4).prop_map(Step::Open),
        1 => (0u64..4).prop_map(Step::End),
        6 => (1u64..3, 0u64..5, 0u64..4).prop_map(|(node, attach, term)| Step::Deliver { node, attach, term }),
        4 => (0usize..8).prop_map(Step::Written),
        1 => (1u64..3, 1u64..4).prop_map(|(node, term)| Step::Led { node, term }),
        2 => (0u64..4, 1u64..4).prop_map(|(attach, term)| Step::Attached { attach, term }),
        1 => (1u64..3).prop_map(Step::Down),
        2 => (1u64..3).prop_map(Step::Up),
        4 => (0u64..500).prop_map(Step::Tick),
    ]
}

proptest! {
    /// Whatever happens: no placed delivery is of a lower term than one heard of, and credit taken from a stream comes back
    /// exactly once (up to what is still under way, or below one portion).
    #[test]
    fn stream_credit_is_neither_lost_nor_made_up(steps in prop::collection::vec(step(), 1..120)) {
        let mut now = start();
        let config = AttachConfig { stream_credit_bytes: 8, device_credit_bytes: 1 << 40, ..AttachConfig::default() };
        let mut lane = lane(config);
        let mut up = [false; 3];
        // Per node: cost taken from the stream that is open now, less what came back.
        let mut owed = [0i64; 3];
        let mut queued: Vec<(u64, Placed)> = Vec::new();
        let (mut highest, mut index) = (0, 0);
        for step in steps {
            match step {
                Step::Open(attach) => {
                    if !lane.entries.contains_key(&attach) {
                        lane.open(attach, DeviceTag(attach % 3), SHARD);
                        lane.attach(attach, now);
                    }
                }
                Step::End(attach) => lane.end(attach, Acks::default()),
                Step::Deliver { node, attach, term } => {
                    if up[node as usize] {
                        index += 1;
                        owed[node as usize] += 10;
                        lane.deliver(node, delivery(&lane, attach, term, index, 10), now);
                        highest = highest.max(term);
                    }
                }
                Step::Written(at) => {
                    if at < queued.len() {
                        let (attach, placed) = queued.remove(at);
                        lane.written(attach, placed.round, placed.sequence, placed.cost_bytes);
                    }
                }
                Step::Led { node, term } => {
                    if up[node as usize] {
                        highest = highest.max(term);
                        lane.deliver(node, led(term), now);
                    }
                }
                Step::Attached { attach, term } => {
                    if let Some(node) = lane.entries.get(&attach).and_then(|entry| entry.stand.node()) {
                        lane.control(node, attached(&lane, attach, term, attach), now);
                    }
                }
                Step::Down(node) => {
                    up[node as usize] = false;
                    owed[node as usize] = 0;
                    lane.link_down(node, now);
                }
                Step::Up(node) => {
                    if !up[node as usize] {
                        up[node as usize] = true;
                        lane.link_up(node, now);
                    }
                }
                Step::Tick(ms) => {
                    now += Duration::from_millis(ms);
                    lane.tick(now);
                }
            }
            lane.flush();
            for action in actions(&mut lane) {
                match action {
                    Action::Place { attach, delivery } => {
                        prop_assert!(delivery.term >= highest);
                        queued.push((attach, *delivery));
                    }
                    Action::Clear { attach } => queued.retain(|(of, _)| *of != attach),
                    Action::Control { node, .. } => prop_assert!(up[node as usize]),
                    Action::Deliver { node, request } => {
                        prop_assert!(up[node as usize]);
                        if let Some(deliver_request::Kind::StreamCredit(credit)) = request.kind {
                            owed[node as usize] -= credit.bytes as i64;
                        }
                    }
                    Action::Tell { .. } | Action::Learned { .. } => {}
                }
            }
            for node in [A, B] {
                let on_its_way: u64 = lane
                    .entries
                    .values()
                    .filter(|entry| entry.stand.node() == Some(node))
                    .map(|entry| entry.under_way_bytes)
                    .sum();
                let debt = lane.nodes.get(&node).map_or(0, |view| view.debt_bytes);
                prop_assert_eq!(owed[node as usize], (on_its_way + debt) as i64);
            }
        }
    }
}

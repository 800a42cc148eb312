//! What a session answers to frames, deliveries and time; and a small model that it must agree with.

use std::collections::BTreeMap;

use martlet_proto::{
    device::mcs::{Extension, IqStanza, LoginRequest},
    mcs::{
        frame::Tag,
        stanza::{selective_ack, stream_ack},
    },
};
use proptest::prelude::*;
use prost::Message as _;

use super::*;

fn start() -> Instant {
    #[expect(clippy::disallowed_methods, reason = "an instant cannot be made otherwise; tests move it by hand")]
    Instant::now()
}

fn session(traits: Traits) -> Session {
    Session::new(&McsConfig::default(), traits, start())
}

fn sequence(index: u64) -> Sequence {
    Sequence { incarnation: 0, index, position: 0 }
}

fn message_id(index: u64) -> MessageId {
    MessageId { micros: 1_700_000_000_000_000 + index, random: index }
}

fn message(index: u64) -> queue::Message {
    queue::Message {
        message_id: Bytes::copy_from_slice(&message_id(index).to_bytes()),
        wire_from: "123456789012".into(),
        application: "com.example.app".into(),
        ttl_secs: 60,
        ..queue::Message::default()
    }
}

fn frame(stanza: &Stanza) -> Result<Frame, FrameError> {
    let bytes = stanza.encode().unwrap();
    let mut decoder = martlet_proto::mcs::frame::Decoder::of_client();
    let first = [&[41], &bytes[..]].concat();
    Ok(decoder.decode(&mut &first[..]).unwrap().unwrap())
}

fn ping(through: Option<i32>) -> Result<Frame, FrameError> {
    frame(&Stanza::HeartbeatPing(HeartbeatPing { last_stream_id_received: through, ..HeartbeatPing::default() }))
}

fn iq(iq: IqStanza) -> Result<Frame, FrameError> {
    frame(&Stanza::Iq(Box::new(iq)))
}

/// An action with its frame read.
#[derive(Debug, PartialEq)]
enum Seen {
    Write(Stanza),
    Ack { sequences: Vec<u64>, message_ids: Vec<MessageId> },
    Close(CloseReason),
}

fn seen(session: &mut Session) -> Vec<Seen> {
    std::iter::from_fn(|| session.next_action())
        .map(|action| match action {
            Action::Write(bytes) => {
                let mut decoder = martlet_proto::mcs::frame::Decoder::of_server();
                let first = [&[41], &bytes[..]].concat();
                let mut input = &first[..];
                let frame = decoder.decode(&mut input).unwrap().unwrap();
                assert!(input.is_empty(), "mc_14: one frame in a write");
                Seen::Write(Stanza::decode(&frame).unwrap())
            }
            Action::Ack(acks) => Seen::Ack {
                sequences: acks.sequences.iter().map(|sequence| sequence.index).collect(),
                message_ids: acks.message_ids,
            },
            Action::Close(reason) => Seen::Close(reason),
        })
        .collect()
}

fn pong(through: i32) -> Seen {
    let ack = HeartbeatAck { last_stream_id_received: Some(through), ..HeartbeatAck::default() };
    Seen::Write(Stanza::HeartbeatAck(ack))
}

fn acks(sequences: &[u64]) -> Seen {
    Seen::Ack { sequences: sequences.to_vec(), message_ids: Vec::new() }
}

/// Persistent ids and piggy-backed numbers of the data stanzas written.
fn data(seen: &[Seen]) -> Vec<(Option<String>, Option<i32>)> {
    seen.iter()
        .map(|seen| match seen {
            Seen::Write(Stanza::Data(data)) => (data.persistent_id.clone(), data.last_stream_id_received),
            other => panic!("{other:?}"),
        })
        .collect()
}

fn delivered(count: u64) -> Session {
    let mut session = session(Traits::default());
    for index in 1..=count {
        assert_eq!(session.deliver(Some(sequence(index)), &message(index)), Delivered::Written);
    }
    seen(&mut session);
    session
}

#[test]
fn mc_10_core_an_empty_ping_is_answered_at_once_with_the_number_reached() {
    let mut session = session(Traits::default());
    session.receive(Ok(Frame { tag: 0, body: Bytes::new() }), start());
    assert_eq!(seen(&mut session), [pong(2)]);
}

#[test]
fn mc_11_core_after_login_and_three_pings_the_ack_reports_4() {
    let mut session = session(Traits::default());
    for _ in 0..3 {
        session.receive(ping(None), start());
    }
    assert_eq!(seen(&mut session), [pong(2), pong(3), pong(4)]);
}

#[test]
fn mc_12_core_obsolete_tags_are_skipped_and_counted() {
    let mut session = session(Traits::default());
    for tag in [5, 6, 9, 11, 12, 13, 14, 15, 77] {
        session.receive(Ok(Frame { tag, body: Bytes::from_static(b"\xff\xff") }), start());
    }
    session.receive(ping(None), start());
    assert_eq!(seen(&mut session), [pong(11)]);
}

#[test]
fn mc_09_core_bytes_that_are_no_frames_are_answered_with_a_stream_error_and_close() {
    let mut session = session(Traits::default());
    session.receive(Err(FrameError::TooLarge { size: 1 << 30, cap: 1 }), start());
    let error = Stanza::StreamError(StreamErrorStanza { r#type: "bad-frame".into(), text: None });
    assert_eq!(seen(&mut session), [Seen::Write(error), Seen::Close(CloseReason::Protocol)]);
    session.receive(ping(None), start());
    session.at_deadline(start() + Duration::from_secs(100_000));
    assert_eq!(seen(&mut session), []);
}

#[test]
fn a_stanza_that_does_not_decode_or_a_second_login_ends_the_connection() {
    let login = LoginRequest { user: "1".into(), resource: "1".into(), auth_token: "1".into(), ..Default::default() };
    for bad in [Ok(Frame { tag: 0, body: Bytes::from_static(b"\xff") }), frame(&Stanza::LoginRequest(Box::new(login)))]
    {
        let mut session = session(Traits::default());
        session.receive(bad, start());
        let seen = seen(&mut session);
        assert!(
            matches!(seen[..], [Seen::Write(Stanza::StreamError(_)), Seen::Close(CloseReason::Protocol)]),
            "{seen:?}"
        );
    }
}

#[test]
fn a_device_that_says_close_is_closed() {
    let mut session = session(Traits::default());
    session.receive(frame(&Stanza::Close), start());
    assert_eq!(seen(&mut session), [Seen::Close(CloseReason::ByDevice)]);
}

#[test]
fn mc_15_core_a_superseded_connection_says_close_and_ends() {
    let mut session = delivered(1);
    session.close(CloseReason::Superseded);
    session.close(CloseReason::Draining);
    assert_eq!(seen(&mut session), [Seen::Write(Stanza::Close), Seen::Close(CloseReason::Superseded)]);
}

#[test]
fn dl_04_core_a_cumulative_ack_on_any_frame_acknowledges_all_up_to_it() {
    let mut session = delivered(3);
    // The login answer was frame 1: messages 1 and 2 are frames 2 and 3.
    session.receive(ping(Some(3)), start());
    // The ping is answered at once; its own number waits for the acks in it.
    assert_eq!(seen(&mut session), [pong(1), acks(&[1, 2])]);
    assert_eq!(session.unacked_len(), 1);
}

#[test]
fn the_number_reported_passes_a_frame_only_when_its_acks_are_applied() {
    let mut session = delivered(2);
    session.receive(ping(Some(2)), start());
    session.receive(ping(None), start());
    assert_eq!(seen(&mut session), [pong(1), acks(&[1]), pong(1)]);
    session.applied();
    session.receive(ping(None), start());
    assert_eq!(seen(&mut session), [pong(4)]);
}

#[test]
fn acks_that_come_while_others_are_applied_gather_and_go_together() {
    let mut session = delivered(4);
    session.receive(ping(Some(2)), start());
    session.receive(ping(Some(3)), start());
    session.receive(ping(Some(4)), start());
    assert_eq!(seen(&mut session), [pong(1), acks(&[1]), pong(1), pong(1)]);
    session.applied();
    assert_eq!(seen(&mut session), [acks(&[2, 3])]);
    session.receive(ping(None), start());
    assert_eq!(seen(&mut session), [pong(2)]);
    session.applied();
    session.receive(ping(None), start());
    assert_eq!(seen(&mut session), [pong(6)]);
}

#[test]
fn acks_that_were_not_handed_over_are_left_for_the_end() {
    let mut session = delivered(2);
    session.receive(ping(Some(2)), start());
    session.receive(ping(Some(3)), start());
    seen(&mut session);
    assert_eq!(session.into_unsent_acks().sequences, [sequence(2)]);
}

#[test]
fn dl_05_core_a_stream_ack_acknowledges_by_its_number() {
    let mut session = delivered(2);
    session.receive(iq(stream_ack(3)), start());
    assert_eq!(seen(&mut session), [acks(&[1, 2])]);
}

#[test]
fn dl_06_core_a_selective_ack_acknowledges_exactly_what_it_names() {
    let mut session = delivered(3);
    let earlier = message_id(99);
    let ids = vec![message_id(2).to_string(), earlier.to_string(), "u-1".into(), message_id(2).to_string()];
    session.receive(iq(selective_ack(ids, None)), start());
    // One of an earlier connection is the node's to find; a repeat is, too, and harmless.
    let message_ids = vec![earlier, message_id(2)];
    assert_eq!(seen(&mut session), [Seen::Ack { sequences: vec![2], message_ids }]);
    session.applied();
    session.receive(ping(Some(4)), start());
    assert_eq!(seen(&mut session), [pong(2), acks(&[1, 3])]);
}

#[test]
fn dl_08_core_a_number_larger_than_sent_is_ignored() {
    let mut session = delivered(2);
    for number in [4, i32::MAX, 0, -1, i32::MIN] {
        session.receive(ping(Some(number)), start());
    }
    assert_eq!(seen(&mut session), [pong(2), pong(3), pong(4), pong(5), pong(6)]);
    assert_eq!(session.unacked_len(), 2);
}

#[test]
fn dl_10_core_a_device_that_never_acks_receives_everything_and_the_window_stays_bounded() {
    let config = McsConfig { unacked_max: 10, ..McsConfig::default() };
    let mut session = Session::new(&config, Traits::default(), start());
    for index in 1..=100 {
        assert_eq!(session.deliver(Some(sequence(index)), &message(index)), Delivered::Written);
    }
    assert_eq!(data(&seen(&mut session)).len(), 100);
    assert_eq!((session.unacked_len(), session.forgotten()), (10, 90));
    session.receive(ping(Some(101)), start());
    assert_eq!(seen(&mut session), [pong(1), acks(&(91..=100).collect::<Vec<_>>())]);
}

#[test]
fn dl_03_core_nothing_is_written_twice_on_one_connection() {
    let mut session = delivered(3);
    assert_eq!(session.deliver(Some(sequence(3)), &message(3)), Delivered::Duplicate);
    assert_eq!(session.deliver(Some(sequence(1)), &message(1)), Delivered::Duplicate);
    assert_eq!(seen(&mut session), []);
    assert_eq!(session.written_through(), Some(sequence(3)));
}

#[test]
fn dl_12_core_a_message_for_now_or_never_has_no_persistent_id_and_is_not_awaited() {
    let mut session = session(Traits::default());
    let message = queue::Message { ttl_secs: 0, ..message(1) };
    assert_eq!(session.deliver(None, &message), Delivered::Written);
    assert_eq!(data(&seen(&mut session)), [(None, None)]);
    assert_eq!((session.unacked_len(), session.written_through()), (0, None));
}

#[test]
fn a_message_carries_the_number_reached_once() {
    let mut session = session(Traits::default());
    session.receive(frame(&Stanza::HeartbeatAck(HeartbeatAck::default())), start());
    session.deliver(Some(sequence(1)), &message(1));
    session.deliver(Some(sequence(2)), &message(2));
    let numbers: Vec<_> = data(&seen(&mut session)).into_iter().map(|(_, number)| number).collect();
    assert_eq!(numbers, [Some(2), None]);
}

#[test]
fn a_message_carries_its_stream_id_only_for_who_asked() {
    for (explicit_stream_ids, stream_id) in [(true, Some(2)), (false, None)] {
        let mut session = session(Traits { explicit_stream_ids, ..Traits::default() });
        session.deliver(Some(sequence(1)), &message(1));
        match &seen(&mut session)[..] {
            [Seen::Write(Stanza::Data(data))] => assert_eq!(data.stream_id, stream_id),
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn dl_07_core_nothing_past_the_login_is_confirmed_before_its_acks_are_applied() {
    let mut session = session(Traits { acks_pending: true, ..Traits::default() });
    session.receive(ping(None), start());
    assert_eq!(seen(&mut session), [pong(1)]);
    session.applied();
    session.receive(ping(None), start());
    assert_eq!(seen(&mut session), [pong(3)]);
}

#[test]
fn up_09_core_the_internal_category_is_swallowed_and_counted() {
    let mut session = session(Traits::default());
    let data = DataMessageStanza {
        from: "gcm@android.com".into(),
        category: INTERNAL_CATEGORY.into(),
        id: Some("1".into()),
        ..DataMessageStanza::default()
    };
    session.receive(frame(&Stanza::Data(Box::new(data))), start());
    session.receive(ping(None), start());
    assert_eq!(seen(&mut session), [pong(3)]);
}

#[test]
fn an_upstream_message_is_answered_with_send_error_under_the_apps_id() {
    let data = DataMessageStanza {
        id: Some("u-1".into()),
        from: "gcm@chrome.com".into(),
        to: Some("123456789012@gcm.googleapis.com".into()),
        category: "com.example.app".into(),
        persistent_id: Some("1397102968".into()),
        ..DataMessageStanza::default()
    };
    for (app_id_is_persistent, id) in [(false, "u-1"), (true, "1397102968")] {
        let mut session = session(Traits { app_id_is_persistent, ..Traits::default() });
        session.receive(frame(&Stanza::Data(Box::new(data.clone()))), start());
        let [Seen::Write(Stanza::Data(error))] = &seen(&mut session)[..] else { panic!() };
        assert_eq!(error.persistent_id.as_deref(), Some(id));
        assert_eq!((&*error.from, &*error.category), ("123456789012", "com.example.app"));
        let pairs: Vec<_> = error.app_data.iter().map(|pair| (&*pair.key, &*pair.value)).collect();
        assert_eq!(pairs, [("message_type", "send_error"), ("error", "service_not_available")]);
        assert_eq!(error.last_stream_id_received, Some(2));
    }
}

#[test]
fn an_iq_of_another_kind_is_counted_and_one_that_does_not_decode_ends_the_connection() {
    let with = |id, data: &'static [u8]| IqStanza {
        extension: Some(Extension { id, data: Bytes::from_static(data) }),
        ..IqStanza::default()
    };
    let mut session = session(Traits::default());
    session.receive(iq(with(99, b"\xff")), start());
    session.receive(iq(IqStanza::default()), start());
    session.receive(ping(None), start());
    assert_eq!(seen(&mut session), [pong(4)]);
    session.receive(iq(with(12, b"\xff")), start());
    assert_eq!(seen(&mut session).last(), Some(&Seen::Close(CloseReason::Protocol)));
}

#[test]
fn a_flood_of_ids_while_nothing_can_be_applied_ends_the_connection() {
    let mut session = delivered(1);
    session.receive(ping(Some(2)), start());
    for round in 0..100 {
        let ids = (0..300).map(|n| message_id(1_000 + round * 300 + n).to_string()).collect();
        session.receive(iq(selective_ack(ids, None)), start());
    }
    assert_eq!(seen(&mut session).last(), Some(&Seen::Close(CloseReason::Protocol)));
    assert!(session.gathered.message_ids.len() <= MCS_RECEIVED_IDS_MAX);
}

#[test]
fn mc_17_core_the_server_pings_when_its_time_has_come() {
    let t0 = start();
    let traits = Traits { wished_ping: Some(Duration::from_secs(10)), ..Traits::default() };
    let mut session = Session::new(&McsConfig::default(), traits, t0);
    assert_eq!(session.deadline(), t0 + Duration::from_secs(10));
    session.at_deadline(session.deadline());
    assert_eq!(seen(&mut session), [Seen::Write(Stanza::HeartbeatPing(HeartbeatPing::default()))]);
}

#[test]
fn the_examples_of_the_notes_are_read() {
    // device.md section 10: StreamAck of Chromium, number 16; SelectiveAck of one id.
    let mut session = delivered(20);
    let frame = |hex: &str| {
        let bytes: Vec<u8> =
            (0..hex.len()).step_by(2).map(|at| u8::from_str_radix(&hex[at..at + 2], 16).unwrap()).collect();
        let mut decoder = martlet_proto::mcs::frame::Decoder::of_client();
        decoder.decode(&mut &[&[41], &bytes[..]].concat()[..]).unwrap().unwrap()
    };
    session.receive(Ok(frame("070c10011a003a04080d12005010")), start());
    assert_eq!(seen(&mut session), [acks(&(1..=15).collect::<Vec<_>>())]);
    session.applied();
    let selective =
        "072f10011a003a29080c12250a23303a313730303030303030303030303030312530303030303030303030303030306131";
    session.receive(Ok(frame(selective)), start());
    let message_ids = vec!["0:1700000000000001%00000000000000a1".parse().unwrap()];
    assert_eq!(seen(&mut session), [Seen::Ack { sequences: vec![], message_ids }]);
}

/// What may happen to a session.
#[derive(Debug, Clone)]
enum Step {
    Deliver { index: u64, now_or_never: bool },
    Ping(Option<i32>),
    StreamAck(i32),
    Selective(Vec<u64>),
    Obsolete,
    Applied,
    Late,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => (0u64..40, prop::bool::weighted(0.1)).prop_map(|(index, now_or_never)| Step::Deliver { index, now_or_never }),
        2 => prop::option::of(-2..60i32).prop_map(Step::Ping),
        1 => (-2..60i32).prop_map(Step::StreamAck),
        1 => prop::collection::vec(0u64..45, 0..4).prop_map(Step::Selective),
        1 => Just(Step::Obsolete),
        3 => Just(Step::Applied),
        1 => Just(Step::Late),
    ]
}

proptest! {
    /// The model: a list of frames written (with the message in each), the set acknowledged, and for each frame of the device
    /// whether its acks are applied.
    #[test]
    fn a_session_agrees_with_a_list_of_frames(steps in prop::collection::vec(step(), 1..80)) {
        let traits = Traits { wished_ping: Some(Duration::from_secs(1)), ..Traits::default() };
        let mut now = start();
        let mut session = Session::new(&McsConfig { unacked_max: 1_000, ..McsConfig::default() }, traits, now);
        // Frame number -> sequence index of the message in it; frames of ours, from 1.
        let (mut sent, mut received) = (1u32, 1u32);
        let mut unacked: BTreeMap<u32, u64> = BTreeMap::new();
        let mut highest = None;
        // Acks the model has seen the device make and not yet seen applied: frame of the device -> indexes.
        let mut pending: BTreeMap<u32, Vec<u64>> = BTreeMap::new();
        let mut applying: Option<Vec<u64>> = None;
        let mut applying_frames: Vec<u32> = Vec::new();
        let mut reported = 1;
        for step in steps {
            match step {
                Step::Deliver { index, now_or_never } => {
                    let sequence = (!now_or_never).then(|| sequence(index));
                    let outcome = session.deliver(sequence, &message(index));
                    let duplicate = !now_or_never && Some(index) <= highest;
                    prop_assert_eq!(outcome, if duplicate { Delivered::Duplicate } else { Delivered::Written });
                    if !duplicate && !now_or_never {
                        highest = Some(index);
                        unacked.insert(sent + 1, index);
                    }
                }
                Step::Ping(number) => {
                    received += 1;
                    model_cumulative(number.unwrap_or(0), sent, received, &mut unacked, &mut pending);
                    session.receive(ping(number), now);
                }
                Step::StreamAck(number) => {
                    received += 1;
                    model_cumulative(number, sent, received, &mut unacked, &mut pending);
                    session.receive(iq(stream_ack(number)), now);
                }
                Step::Selective(indexes) => {
                    received += 1;
                    for index in &indexes {
                        // Known or not, the number waits for it.
                        unacked.retain(|_, unacked| unacked != index);
                        pending.entry(received).or_default().push(*index);
                    }
                    let ids = indexes.iter().map(|index| message_id(*index).to_string()).collect();
                    session.receive(iq(selective_ack(ids, None)), now);
                }
                Step::Obsolete => {
                    received += 1;
                    session.receive(Ok(Frame { tag: 9, body: Bytes::new() }), now);
                }
                Step::Applied => {
                    if applying.take().is_some() {
                        for frame in applying_frames.drain(..) {
                            pending.remove(&frame);
                        }
                        session.applied();
                    }
                }
                Step::Late => {
                    now = session.deadline().min(now + Duration::from_secs(30));
                    session.at_deadline(now);
                }
            }
            for seen in seen(&mut session) {
                match seen {
                    Seen::Write(stanza) => {
                        sent += 1;
                        if let Some(number) = stanza.acknowledged_through() {
                            // Never back, never past a frame whose acks are not applied.
                            prop_assert!(number >= reported);
                            let first_pending = pending.keys().next().copied().unwrap_or(received + 1);
                            prop_assert!(number < first_pending, "{} told, {:?} pending", number, pending);
                            reported = number;
                        } else {
                            prop_assert!(!matches!(stanza, Stanza::HeartbeatAck(_)));
                        }
                    }
                    Seen::Ack { sequences, message_ids } => {
                        prop_assert!(applying.is_none(), "one set at a time");
                        let mut indexes = sequences;
                        indexes.extend(message_ids.iter().map(|id| id.random));
                        let mut expected: Vec<u64> = pending.values().flatten().copied().collect();
                        indexes.sort_unstable();
                        expected.sort_unstable();
                        prop_assert_eq!(&indexes, &expected, "nothing lost, nothing made up");
                        applying_frames = pending.keys().copied().collect();
                        applying = Some(indexes);
                    }
                    Seen::Close(reason) => {
                        prop_assert!(matches!(reason, CloseReason::Unanswered | CloseReason::Silent), "{reason:?}");
                        return Ok(());
                    }
                }
            }
            prop_assert_eq!(session.unacked_len(), unacked.len());
        }
    }

    #[test]
    fn any_frames_are_answered_or_end_the_connection(frames in prop::collection::vec((0u8..20, prop::collection::vec(any::<u8>(), 0..40)), 0..20)) {
        let mut session = delivered(3);
        for (tag, body) in frames {
            session.receive(Ok(Frame { tag, body: body.into() }), start());
        }
        let closes = seen(&mut session).into_iter().filter(|seen| matches!(seen, Seen::Close(_))).count();
        prop_assert!(closes <= 1);
    }
}

fn model_cumulative(
    number: i32,
    sent: u32,
    received: u32,
    unacked: &mut BTreeMap<u32, u64>,
    pending: &mut BTreeMap<u32, Vec<u64>>,
) {
    let Ok(number) = u32::try_from(number) else { return };
    if number > sent {
        return;
    }
    let above = unacked.split_off(&(number + 1));
    let acked = std::mem::replace(unacked, above);
    if !acked.is_empty() {
        pending.entry(received).or_default().extend(acked.into_values());
    }
}

#[test]
fn mc_13_core_whatever_is_written_has_a_tag_that_is_in_use() {
    let mut session = delivered(0);
    session.receive(ping(None), start());
    session.deliver(Some(sequence(1)), &message(1));
    session.close(CloseReason::Draining);
    let tags = std::iter::from_fn(|| session.next_action()).filter_map(|action| match action {
        Action::Write(bytes) => Some(bytes[0]),
        Action::Ack(_) | Action::Close(_) => None,
    });
    let tags: Vec<u8> = tags.collect();
    assert_eq!(tags, [Tag::HeartbeatAck as u8, Tag::Data as u8, Tag::Close as u8]);
    assert_eq!(LoginRequest::default().encode_to_vec().len(), 10, "required fields are written even when empty");
}

#[test]
fn acks_that_are_never_applied_end_the_connection_before_they_are_without_number() {
    let config = McsConfig { unacked_max: 10, ..McsConfig::default() };
    let mut session = Session::new(&config, Traits { acks_pending: true, ..Traits::default() }, start());
    let mut index = 0;
    while seen(&mut session).last() != Some(&Seen::Close(CloseReason::Unconfirmed)) {
        index += 1;
        assert!(index <= 10 + GATHERED_MAX as u64 + 1, "they gather without end");
        session.deliver(Some(sequence(index)), &message(index));
        session.receive(ping(Some(i32::try_from(session.sent).unwrap())), start());
    }
    assert_eq!(index, 10 + GATHERED_MAX as u64 + 1);
    // Handed over at the end all the same.
    assert_eq!(session.into_unsent_acks().sequences.len(), 10 + GATHERED_MAX);
}

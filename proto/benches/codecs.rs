//! What every message passes: frames and stanzas of MCS, the JSON body of a send, the token's parse and MAC.

use std::{collections::BTreeMap, hint::black_box};

use bytes::Bytes;
use divan::{Bencher, counter::BytesCount};
use martlet_proto::{
    cluster::queue::{Message, Pair, Payload},
    http::send_json,
    mcs::{
        downstream,
        frame::Decoder,
        stanza::{Stanza, stream_ack},
    },
    message::MessageId,
    tag::{AndroidId, CheckinKey, DeviceTag, TagKey},
    token::{Iid, RegistrationId, RegistrationToken, TokenKey},
};
use prost::Message as _;

fn main() {
    divan::main();
}

/// Size of the message's body in all of these, bytes: that of the load scenarios.
const BODY_BYTES: usize = 1_024;

fn token() -> (TokenKey, RegistrationToken) {
    let key = TokenKey::new(1, [7; 32]);
    let iid = Iid::parse("fXk2_abcd01").expect("an IID of eleven characters");
    let token =
        (0..=255).find_map(|n| RegistrationToken::mint(&key, &iid, DeviceTag(42), RegistrationId([n; 16])).ok());
    (key, token.expect("one of these holds no `Error`"))
}

fn queued() -> Message {
    let pair = |key: &str, value: String| Pair { key: key.into(), value };
    let payload = Payload {
        app_data: vec![pair("op", "1.2345".into()), pair("body", "x".repeat(BODY_BYTES))],
        raw_data: Bytes::new(),
    };
    Message {
        message_id: MessageId { micros: 1_700_000_000_000_000, random: 7 }.to_bytes().to_vec().into(),
        wire_from: "900100200300".into(),
        application: "com.example.app".into(),
        ttl_secs: 2_419_200,
        accepted_ms: 1_700_000_000_000,
        payload: payload.encode_to_vec().into(),
        ..Message::default()
    }
}

/// A queued message to the bytes of a device's frame.
#[divan::bench]
fn mcs_message_to_frame(bencher: Bencher<'_, '_>) {
    let message = queued();
    bencher.counter(BytesCount::new(BODY_BYTES)).bench(|| {
        let stanza = downstream::stanza(black_box(&message), Some(3)).expect("a whole message");
        Stanza::Data(Box::new(stanza)).encode()
    });
}

/// A device's acknowledgement, from its bytes.
#[divan::bench]
fn mcs_ack_from_frame(bencher: Bencher<'_, '_>) {
    let bytes = Stanza::Iq(Box::new(stream_ack(17))).encode().expect("an IQ has bytes");
    bencher.bench(|| {
        let mut decoder = Decoder::of_client();
        decoder.logged_in();
        let frame = {
            // The version byte comes once, before the first frame.
            let first = [&[41], &bytes[..]].concat();
            decoder.decode(&mut &first[..]).expect("a frame").expect("a whole one")
        };
        Stanza::decode(black_box(&frame)).map(|stanza| stanza.acknowledged_through())
    });
}

/// The body of a send, with one recipient and with a thousand.
#[divan::bench(args = [1, 1_000])]
fn http_send_json(bencher: Bencher<'_, '_>, recipients: usize) {
    let (_, token) = token();
    let data = BTreeMap::from([("op", "1.2345".to_owned()), ("body", "x".repeat(BODY_BYTES))]);
    let tokens = vec![token.as_str(); recipients];
    let body = serde_json::json!({ "registration_ids": tokens, "data": data }).to_string();
    bencher
        .counter(BytesCount::new(body.len()))
        .bench(|| send_json::parse(black_box(body.as_bytes())).expect("a body of ours"));
}

/// The text of a token to a verified one.
#[divan::bench]
fn token_parse_and_verify(bencher: Bencher<'_, '_>) {
    let (key, token) = token();
    bencher.bench(|| RegistrationToken::parse(black_box(token.as_str())).and_then(|token| token.verify(&key)));
}

/// What a login costs before any node is asked: the security token's MAC, the device tag.
#[divan::bench]
fn login_credentials(bencher: Bencher<'_, '_>) {
    let (checkin, tag) = (CheckinKey::new(1, [1; 32]), TagKey::new([2; 32]));
    let device = AndroidId::new(4_234_066_615_089_043_076).expect("not 0");
    bencher.bench(|| (checkin.security_token(black_box(device)), tag.tag(device)));
}

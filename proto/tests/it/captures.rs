//! Bytes computed with another protocol buffer library, or captured from real clients. Source: device.md section 10.

use martlet_proto::{
    cluster::queue::{Message, Pair, Payload},
    device::{
        checkin::{AndroidCheckinRequest, AndroidCheckinResponse},
        mcs::{
            DataMessageStanza, ErrorInfo, HeartbeatAck, HeartbeatConfig, HeartbeatPing, LoginResponse,
            StreamErrorStanza,
        },
    },
    http::checkin,
    mcs::{
        downstream,
        frame::{Decoder, Frame, encode_login_response},
        stanza::{self, Ack, Stanza, ack_of},
    },
    message::MessageId,
    tag::{AndroidId, SecurityToken},
};
use prost::Message as _;

use crate::unhex;

const LOGIN_REQUEST: &str = "2902bb010a136368726f6d652d39342e302e343630362e3531120f6d63732e616e64726f69642e636f6d1a13343233\
    343036363631353038393034333037362213343233343036363631353038393034333037362a1332333234343430373034353938323734363033\
    3218616e64726f69642d33616332366432373433623931363834420b0a066e65775f76631201315223303a313730303030303030303030303030\
    31253030303030303030303030303030613160007001800102880101";
const LOGIN_RESPONSE: &str = "29033d0a136368726f6d652d39342e302e343630362e3531121d3432333430363636313530383930343330373640\
    6d63732e6c6f63616c30014080d095ffbc31";
const LOGIN_RESPONSE_WITH_INTERVAL: &str = "2903430a136368726f6d652d39342e302e343630362e3531121d343233343036363631353038\
    39303433303736406d63732e6c6f63616c30013a0418e0d4034080d095ffbc31";
const LOGIN_REFUSED: &str = "2903370a136368726f6d652d39342e302e343630362e35311a20089103121541757468656e7469636174696f6e20\
    6661696c65641a0461757468";
const CHECKIN_NEW: &str = "221660036a120803120c39342e302e343630362e353118017003b00100";
const CHECKIN_KNOWN: &str =
    "1084ade49df4a49be13a221660036a120803120c39342e302e343630362e35311801692bf20963811242207003b00100";
const CHECKIN_ANSWER: &str = "08011880d095ffbc31398416b943276dc23a412bf209638112422048005a076c6f63616c2d31";
const DATA_MESSAGE: &str = "0873120844463535464533431a0c3132333435363738393031322a0f636f6d2e6578616d706c652e617070320573\
    636f72653a0e0a0568656c6c6f1205776f726c644a23303a3137303030303030303030303030303225303030303030303030303030303061\
    32880180d493019001fbd095ffbc31";
const DELETED_MESSAGES: &str = "089401120844463535464533441a0c3132333435363738393031322a0f636f6d2e6578616d706c652e617070\
    3a200a0c6d6573736167655f74797065121064656c657465645f6d657373616765733a140a0d746f74616c5f64656c657465641203313031\
    4a23303a313730303030303030303030303030332530303030303030303030303030306133880180d493019001fbd095ffbc31";
const UPSTREAM: &str = "086b1203752d311a0e67636d406368726f6d652e636f6d221f3132333435363738393031324067636d2e676f6f676c6561\
    7069732e636f6d2a0f636f6d2e6578616d706c652e6170703a060a01691201314a0a3133393731303239363858018801901c9001befbd988\
    32980108";

/// What a client writes in one connection, and what a server does, with what reads it.
pub(crate) fn streams() -> [(Decoder, Vec<u8>); 2] {
    let acks = ["0000", "00021005", "01021003", "070c10011a003a04080d12005010", UPSTREAM, "0400"];
    let events = [DATA_MESSAGE, "0000", DELETED_MESSAGES, "01021003", "0a0b0a096261642d6672616d65", "0400"];
    let stream = |first: &str, frames: [&str; 6]| unhex(&[first, &frames.concat()].concat());
    [
        (Decoder::of_client(), stream(LOGIN_REQUEST, acks)),
        (Decoder::of_server(), stream(LOGIN_RESPONSE_WITH_INTERVAL, events)),
    ]
}

/// The one frame that the bytes are.
fn one_frame(mut decoder: Decoder, hex: &str) -> Frame {
    let bytes = unhex(hex);
    let mut input = &bytes[..];
    let frame = decoder.decode(&mut input).unwrap().expect("a whole frame");
    assert!(input.is_empty(), "{hex}");
    frame
}

/// What frames without a version byte are read with.
fn after_version() -> Decoder {
    let mut decoder = Decoder::of_client();
    assert_eq!(decoder.decode(&mut &[41][..]), Ok(None));
    decoder
}

fn read(hex: &str) -> Stanza {
    Stanza::decode(&one_frame(after_version(), hex)).unwrap()
}

/// The bytes read as this stanza, and this stanza is written as these bytes.
fn is(hex: &str, stanza: &Stanza) {
    assert_eq!(&read(hex), stanza);
    assert_eq!(stanza.encode().unwrap(), unhex(hex), "{stanza:?}");
}

#[test]
fn the_login_of_a_client_is_read_and_written() {
    let frame = one_frame(Decoder::of_client(), LOGIN_REQUEST);
    let Stanza::LoginRequest(login) = Stanza::decode(&frame).unwrap() else { panic!("a login") };
    assert_eq!(login.id, "chrome-94.0.4606.51");
    assert_eq!((login.user.as_str(), login.resource.as_str()), ("4234066615089043076", "4234066615089043076"));
    assert_eq!(login.auth_token, "2324440704598274603");
    assert_eq!(login.device_id.as_deref(), Some("android-3ac26d2743b91684"));
    assert_eq!(login.received_persistent_id, ["0:1700000000000001%00000000000000a1"]);
    assert_eq!((login.auth_service, login.network_type), (Some(2), Some(1)));
    // Field by field in the order of their numbers, as every library writes them.
    assert_eq!(Stanza::LoginRequest(login).encode().unwrap(), unhex(LOGIN_REQUEST)[1..]);
}

#[test]
fn mc_02_mc_04_core_the_first_bytes_of_the_server_are_exactly_these() {
    let response = LoginResponse {
        id: "chrome-94.0.4606.51".to_owned(),
        jid: Some("4234066615089043076@mcs.local".to_owned()),
        last_stream_id_received: Some(1),
        server_timestamp: Some(1_700_000_000_000),
        ..LoginResponse::default()
    };
    assert_eq!(encode_login_response(41, &response), unhex(LOGIN_RESPONSE));
    let frame = one_frame(Decoder::of_server(), LOGIN_RESPONSE);
    assert_eq!(Stanza::decode(&frame), Ok(Stanza::LoginResponse(Box::new(response.clone()))));
    let config = HeartbeatConfig { interval_ms: Some(60_000), ..HeartbeatConfig::default() };
    let response = LoginResponse { heartbeat_config: Some(config), ..response };
    assert_eq!(encode_login_response(41, &response), unhex(LOGIN_RESPONSE_WITH_INTERVAL));
    let frame = one_frame(Decoder::of_server(), LOGIN_RESPONSE_WITH_INTERVAL);
    assert_eq!(Stanza::decode(&frame), Ok(Stanza::LoginResponse(Box::new(response))));
}

#[test]
fn mc_05_core_a_refused_login_is_exactly_these_bytes() {
    let error = ErrorInfo {
        code: 401,
        message: Some("Authentication failed".to_owned()),
        r#type: Some("auth".to_owned()),
        extension: None,
    };
    let response =
        LoginResponse { id: "chrome-94.0.4606.51".to_owned(), error: Some(error), ..LoginResponse::default() };
    assert_eq!(encode_login_response(41, &response), unhex(LOGIN_REFUSED));
    let frame = one_frame(Decoder::of_server(), LOGIN_REFUSED);
    assert_eq!(Stanza::decode(&frame), Ok(Stanza::LoginResponse(Box::new(response))));
}

#[test]
fn mc_10_core_short_frames_are_exactly_these_bytes() {
    let through = |number| HeartbeatPing { last_stream_id_received: number, ..HeartbeatPing::default() };
    is("0000", &Stanza::HeartbeatPing(through(None)));
    is("00021005", &Stanza::HeartbeatPing(through(Some(5))));
    let ack = HeartbeatAck { last_stream_id_received: Some(3), ..HeartbeatAck::default() };
    is("01021003", &Stanza::HeartbeatAck(ack));
    is("0400", &Stanza::Close);
    is(
        "0a0b0a096261642d6672616d65",
        &Stanza::StreamError(StreamErrorStanza { r#type: "bad-frame".into(), text: None }),
    );
}

#[test]
fn dl_05_dl_06_core_acks_by_iq_are_exactly_these_bytes() {
    is("070c10011a003a04080d12005010", &Stanza::Iq(Box::new(stanza::stream_ack(16))));
    let ids = vec!["0:1700000000000001%00000000000000a1".to_owned()];
    let hex = "072f10011a003a29080c12250a23303a31373030303030303030303030303031253030303030303030303030303030613\
        1";
    is(hex, &Stanza::Iq(Box::new(stanza::selective_ack(ids.clone(), None))));
    let Stanza::Iq(iq) = read(hex) else { panic!("an IQ") };
    assert_eq!(ack_of(&iq), Ok(Ack::Selective(ids)));
}

fn queued() -> Message {
    let pair = Pair { key: "hello".to_owned(), value: "world".to_owned() };
    Message {
        message_id: MessageId { micros: 1_700_000_000_000_002, random: 0xa2 }.to_bytes().to_vec().into(),
        wire_from: "123456789012".to_owned(),
        application: "com.example.app".to_owned(),
        collapse_key: "score".to_owned(),
        ttl_secs: 2_419_200,
        accepted_ms: 1_700_000_000_123,
        payload: Payload { app_data: vec![pair], ..Payload::default() }.encode_to_vec().into(),
        ..Message::default()
    }
}

fn shown(message: &Message) -> DataMessageStanza {
    downstream::stanza(message, None).unwrap()
}

#[test]
fn dl_01_core_a_queued_message_is_exactly_these_bytes() {
    // The short id of the capture was drawn; ours is taken from the message id.
    let stanza = DataMessageStanza { id: Some("DF55FE3C".to_owned()), ..shown(&queued()) };
    is(DATA_MESSAGE, &Stanza::Data(Box::new(stanza)));
    assert_eq!(shown(&queued()).id.as_deref(), Some("000000A2"));
}

#[test]
fn dl_15_core_a_notice_of_dropped_messages_is_exactly_these_bytes() {
    let notice = Message {
        message_id: MessageId { micros: 1_700_000_000_000_003, random: 0xa3 }.to_bytes().to_vec().into(),
        collapse_key: String::new(),
        payload: bytes::Bytes::new(),
        total_deleted: 101,
        ..queued()
    };
    for ttl_secs in [0, 2_419_200] {
        let stanza =
            DataMessageStanza { id: Some("DF55FE3D".to_owned()), ..shown(&Message { ttl_secs, ..notice.clone() }) };
        is(DELETED_MESSAGES, &Stanza::Data(Box::new(stanza)));
    }
}

#[test]
fn dl_12_core_a_message_for_now_or_never_has_no_persistent_id() {
    let stanza = shown(&Message { ttl_secs: 0, ..queued() });
    assert_eq!((stanza.persistent_id, stanza.ttl), (None, Some(0)));
}

#[test]
fn dl_19_fi_09_core_the_registered_subtype_stands_instead_of_the_senders() {
    let pairs = ["subtype", "k"].map(|key| Pair { key: key.to_owned(), value: "sender's".to_owned() });
    let payload = Payload { app_data: pairs.to_vec(), raw_data: vec![0, 1].into() }.encode_to_vec();
    let message = Message { payload: payload.into(), ..queued() };
    let keys = |message: &Message| {
        let pairs = shown(message).app_data.into_iter().map(|pair| (pair.key, pair.value));
        pairs.collect::<Vec<_>>()
    };
    let own = ("k".to_owned(), "sender's".to_owned());
    assert_eq!(keys(&message), std::slice::from_ref(&own), "an application without a subtype gets none");
    let message = Message { subtype: "wp:x".to_owned(), ..message };
    assert_eq!(keys(&message), [own, ("subtype".to_owned(), "wp:x".to_owned())]);
    assert_eq!(shown(&message).raw_data.as_deref(), Some(&[0, 1][..]));
}

#[test]
fn a_row_that_is_no_message_is_refused_and_not_shown() {
    let message = Message { message_id: vec![0; 15].into(), ..queued() };
    assert_eq!(downstream::stanza(&message, None), Err(downstream::NotDeliverable::MessageId(15)));
    let message = Message { payload: vec![0xff].into(), ..queued() };
    assert_eq!(downstream::stanza(&message, None), Err(downstream::NotDeliverable::Payload));
}

#[test]
fn up_06_core_an_upstream_message_of_chromium_is_read() {
    let Stanza::Data(data) = read(UPSTREAM) else { panic!("a message") };
    assert_eq!((data.id.as_deref(), data.persistent_id.as_deref()), (Some("u-1"), Some("1397102968")));
    assert_eq!((data.from.as_str(), data.to.as_deref()), ("gcm@chrome.com", Some("123456789012@gcm.googleapis.com")));
    assert_eq!((data.ttl, data.sent, data.queued), (Some(3600), Some(13_440_023_998), Some(8)));
    let pairs: Vec<_> = data.app_data.iter().map(|pair| (pair.key.as_str(), pair.value.as_str())).collect();
    assert_eq!(pairs, [("i", "1")]);
    let data = Stanza::Data(data);
    assert_eq!(data.acknowledged_through(), Some(1));
    is(UPSTREAM, &data);
}

#[test]
fn ck_01_core_the_check_in_of_chromium_is_read_and_written() {
    for (captured, id, token) in
        [(CHECKIN_NEW, None, None), (CHECKIN_KNOWN, Some(4_234_066_615_089_043_076), Some(2_324_440_704_598_274_603))]
    {
        let request = AndroidCheckinRequest::decode(&unhex(captured)[..]).unwrap();
        assert_eq!((request.id, request.security_token), (id, token));
        assert_eq!((request.version, request.user_serial_number), (Some(3), Some(0)));
        assert_eq!(request.encode_to_vec(), unhex(captured));
    }
}

#[test]
fn ck_09_core_the_answer_of_a_check_in_is_read_and_ids_are_fixed_width() {
    let captured = unhex(CHECKIN_ANSWER);
    let response = AndroidCheckinResponse::decode(&captured[..]).unwrap();
    let (id, token) = (4_234_066_615_089_043_076, 2_324_440_704_598_274_603);
    assert_eq!((response.stats_ok, response.time_msec), (true, Some(1_700_000_000_000)));
    assert_eq!((response.android_id, response.security_token), (Some(id), Some(token)));
    assert_eq!(response.encode_to_vec(), captured);
    let (id, token) = (AndroidId::new(id).unwrap(), SecurityToken::new(token).unwrap());
    let ours = checkin::answer(id, token, 1_700_000_000_000, std::iter::empty());
    // Fields 7 and 8 with wire type 1, 8 bytes each.
    assert!(ours.windows(9).any(|window| window == [&[0x39][..], &id.get().to_le_bytes()].concat()));
    assert!(ours.windows(9).any(|window| window == [&[0x41][..], &token.get().to_le_bytes()].concat()));
}
